"""The gain over outputs by library operations: the last steps of a forward, and the way back.

    z = x·Wᵀ + u·upᵀ    y = gain ⊙ z + bias
    dz = dy ⊙ gain      dgain[n] = Σ over m of dy[m, n] · z[m, n],   z = (y - bias) / gain

z is nowhere in memory: it is had again from y, which is the call's result. All is computed in
float32 or wider, some rows at a time: as many as stay in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import Products, like, wide_dtype

CACHED = 1 << 16  # elements for each thread of a CPU that are computed at a time
AT_ONCE = 1 << 22  # on another device


def widened(gain: Tensor, dtype: torch.dtype) -> Tensor:
    """A gain as it is used beside an x of this dtype: contiguous, in float32 or wider."""
    return like(gain, wide_dtype(dtype)).contiguous()


def parts(y: Tensor) -> Iterator[slice]:
    """Slices of the rows of y (M, N), one after the other."""
    most = CACHED * torch.get_num_threads() if y.is_cpu else AT_ONCE
    rows = max(1, most // max(1, y.shape[1]))
    return (slice(first, first + rows) for first in range(0, y.shape[0], rows))


def add_tail_(
    y: Tensor, u: Tensor, up: Tensor, gain: Tensor, bias: Tensor | None, products: Products
) -> Tensor:
    """y (M, N), which becomes gain ⊙ (y + u·up) + bias in place, rounded once.

    u (M, Q), up (Q, N), gain (N,) `widened`, bias (N,) or None.
    """
    up, bias = like(up, gain.dtype), None if bias is None else like(bias, gain.dtype)
    for rows in parts(y):
        part = like(y[rows], gain.dtype)
        part = products.add_matmul(part, like(u[rows], gain.dtype), up)
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
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    bias = None if bias is None else widened(bias, dy.dtype)
    sums: Tensor | None = None
    for rows in parts(dy):
        part = like(dy[rows], gain.dtype)
        torch.mul(part, gain, out=dz[rows])
        if y is not None:
            if sums is None:
                sums = torch.zeros_like(part)
            z = like(y[rows], gain.dtype)
            sums[: len(part)].addcmul_(part, z if bias is None else z - bias)
    if y is None:
        return dz, None
    return dz, torch.zeros_like(gain) if sums is None else sums.sum(0).div_(gain)
