"""The gain over outputs by library operations: the last steps of a forward, and the way back.

    z = x·Wᵀ + u·upᵀ    y = gain ⊙ z + bias
    dz = dy ⊙ gain      dgain[n] = Σ over m of dy[m, n] · z[m, n],   z = (y - bias) / gain

z is nowhere in memory: it is had again from y, which is the call's result. All is computed in
float32 or wider. On a CPU a batch norm with given statistics is each of the two lines, in one pass
and with nothing of M × N beside the result: torch has it for 16-bit tensors with a float32 weight.
Its variance is 0 beside an epsilon of 1, which divides by 1, so that one vector of zeros is enough.
Elsewhere some rows are computed at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import Products, like, wide_dtype

AT_ONCE = 1 << 22  # elements that are widened at a time on a device other than a CPU
NORM = torch.ops.aten.native_batch_norm.out
NORM_BACK = torch.ops.aten.native_batch_norm_backward.default


class Ratio(NamedTuple):
    """A gain that is a trained magnitude over a norm which is a constant, for one eager call.

    The call gives the magnitude its gradient: a `Gain` between the two would cost more than the
    arithmetic. values (N,) are without a gradient; all else is asked of the magnitude, as of a
    tensor.
    """

    values: Tensor
    magnitude: Tensor
    norm: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.magnitude.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.magnitude.dtype

    @property
    def device(self) -> torch.device:
        return self.magnitude.device

    @property
    def requires_grad(self) -> bool:
        return self.magnitude.requires_grad

    def tensor(self) -> Tensor:
        """The gain as one tensor, by `Gain`."""
        made: Tensor = Gain.apply(self.magnitude, self.norm)
        return made


def trains(gain: Tensor | Ratio | None) -> bool:
    """Whether a call is one that computes the gradient of its gain."""
    return gain is not None and gain.requires_grad and torch.is_grad_enabled()


def loses_z(gain: Tensor | Ratio | None, bias: Tensor | None) -> bool:
    """Whether y has nothing of a z whose gain needs a gradient, as far as is known without waiting.

    That is where a gain is 0, or beside a bias a magnitude, whose gain is nearly 0. On a GPU, and
    in a compiled graph, nobody looks.
    """
    if gain is None or torch.compiler.is_compiling() or not trains(gain):
        return False
    own = gain.magnitude if isinstance(gain, Ratio) else gain
    if not own.is_cpu or (own is not gain and bias is None):
        return False
    return not bool(own.all())


class Gain(torch.autograd.Function):
    """The gain, whose gradient is had from the two that are there anyway: the magnitude, which is a
    Parameter, and the gain itself, which the equation saves. So nothing more is saved for it.
    """

    @staticmethod
    def forward(ctx, magnitude, norm):  # type: ignore[no-untyped-def]
        gain = divided(magnitude, norm)
        ctx.save_for_backward(magnitude, gain)
        return gain

    @staticmethod
    def backward(ctx, dgain):  # type: ignore[no-untyped-def]
        magnitude, gain = ctx.saved_tensors
        return of_magnitude(dgain, gain, magnitude), None


def of_magnitude(dgain: Tensor, gain: Tensor, magnitude: Tensor) -> Tensor:
    """The gradient of a magnitude over a constant from that of the gain, which it is."""
    return like(dgain * (gain / off_zero(magnitude, gain.dtype)), magnitude.dtype)


def divided(magnitude: Tensor, norm: Tensor) -> Tensor:
    """magnitude / norm (N,), in norm's dtype; a magnitude of 0 is the `least`, no norm is 0."""
    return off_zero(magnitude, norm.dtype) / norm


def least(dtype: torch.dtype) -> float:
    """The smallest number whose inverse, and the square of that, are numbers."""
    return float(torch.finfo(dtype).tiny ** 0.5)


def off_zero(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The magnitudes in this dtype, those of 0 as the least."""
    return like(magnitude, dtype) + least(dtype)


def widened(gain: Tensor, dtype: torch.dtype) -> Tensor:
    """A gain as it is used beside an x of this dtype: contiguous, in float32 or wider."""
    return like(gain, wide_dtype(dtype)).contiguous()


def parts(y: Tensor) -> Iterator[slice]:
    """Slices of the rows of y (M, N), one after the other."""
    rows = max(1, AT_ONCE // max(1, y.shape[1]))
    return (slice(first, first + rows) for first in range(0, y.shape[0], rows))


def add_tail_(
    y: Tensor, u: Tensor, up: Tensor, gain: Tensor, bias: Tensor | None, products: Products
) -> Tensor:
    """y (M, N), which becomes gain ⊙ (y + u·up) + bias in place.

    u (M, Q), up (Q, N), gain (N,) `widened`, bias (N,) or None. On a CPU the sum is rounded to y's
    dtype, as it is where there is no gain, and the result once more.
    """
    wide = gain.dtype
    bias = None if bias is None else like(bias, wide)
    if y.is_cpu:
        y = products.add_matmul(y, u, up)
        if y.dtype is not wide and y.numel():
            zeros, none = torch.zeros_like(gain), gain.new_empty(0)
            out = {"save_mean": none, "save_invstd": none, "out": y}
            NORM(y, gain, bias, zeros, zeros, False, 0.0, 1.0, **out)
            return y
        return y.mul_(gain) if bias is None else torch.addcmul(bias, y, gain, out=y)
    return tail_by_rows_(y, u, up, gain, bias, products)


def tail_by_rows_(
    y: Tensor, u: Tensor, up: Tensor, gain: Tensor, bias: Tensor | None, products: Products
) -> Tensor:
    """`add_tail_` on any device, some rows at a time, rounded once; bias is of gain's dtype."""
    wide = gain.dtype
    up = like(up, wide)
    for rows in parts(y):
        part = products.add_matmul(like(y[rows], wide), like(u[rows], wide), up)
        if bias is None:
            part.mul_(gain)
        else:
            torch.addcmul(bias, part, gain, out=part)
        if part.dtype is not y.dtype:
            y[rows] = part
    return y


def gain_back(
    dy: Tensor, y: Tensor | None, gain: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(dy ⊙ gain, in dy's dtype; dgain, in gain's), in one pass over dy (M, N) and y (M, N).

    gain (N,) is `widened`. Without y there is no dgain. Where gain is 0, y says nothing of z: dgain
    is NaN there.
    """
    bias = None if bias is None else widened(bias, dy.dtype)
    if dy.is_cpu and dy.numel():
        dy, zeros = dy.contiguous(), torch.zeros_like(gain)
        given = dy, dy if y is None else y, gain, zeros if bias is None else bias, zeros, None, None
        dz, sums, _ = NORM_BACK(*given, False, 1.0, [True, y is not None, False])
        return dz, None if y is None else sums.div_(gain)
    return back_by_rows(dy, y, gain, bias)


def back_by_rows(
    dy: Tensor, y: Tensor | None, gain: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`gain_back` on any device, some rows at a time; bias is of gain's dtype."""
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    total: Tensor | None = None
    for rows in parts(dy):
        part = like(dy[rows], gain.dtype)
        torch.mul(part, gain, out=dz[rows])
        if y is not None:
            if total is None:
                total = torch.zeros_like(part)
            z = like(y[rows], gain.dtype)
            total[: len(part)].addcmul_(part, z if bias is None else z - bias)
    if y is None:
        return dz, None
    return dz, torch.zeros_like(gain) if total is None else total.sum(0).div_(gain)
