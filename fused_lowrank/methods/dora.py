"""DoRA's norms (Liu et al. 2024, arXiv 2402.09353): the gain is a magnitude over a row's norm.

    y = gain ⊙ (x·Wᵀ + low-rank) + bias      gain = magnitude / norm      norm = ‖W + ΔW‖ by row

    ‖Wₙ + ΔWₙ‖² = ‖Wₙ‖² + 2·s·upₙ·coreᵀ·(down·Wₙᵀ) + s²·upₙ·coreᵀ·(down·downᵀ)·core·upₙᵀ

The paper holds the norm constant in the gradient, and so does all of this. What is of W alone, or
of W and a frozen down, is computed once (`Constants`); a step has N × P work then, and nothing of
N × K. Where down is trained a step multiplies it by W, into (P, N), and no ΔW is made either.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..compute.autograd import join, places
from ..compute.base.protocol import Base
from ..compute.reference import Core, is_diagonal, like, product, wide_dtype
from ..compute.run import no_autocast
from .method import MAGNITUDE, Method, Parts
from .tensors import whole

ROWS = 1024  # of W that are widened at a time


class Constants(NamedTuple):
    """The parts of the norm that no step changes, in float32 or wider.

    `of_weight` (N,) is ‖Wₙ‖². `with_down` (P, N), down·Wᵀ, and `of_down` (P, P), down·downᵀ, are
    None where down is trained.
    """

    of_weight: Tensor
    with_down: Tensor | None
    of_down: Tensor | None


@torch.no_grad()
def constants(weight: Tensor, down: Tensor | None = None) -> Constants:
    """The constants of weight (N, K) and of a frozen down (P, K); None where down is trained."""
    wide = wide_dtype(weight.dtype)
    squares = [like(rows, wide).square().sum(1) for rows in weight.split(ROWS)]
    of_weight = torch.cat(squares) if squares else weight.new_empty(0, dtype=wide)
    if down is None:
        return Constants(of_weight, None, None)
    return Constants(of_weight, *products(weight, down))


def products(weight: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(down·Wᵀ (P, N), down·downᵀ (P, P)) in float32 or wider, some rows of W at a time."""
    wide = wide_dtype(weight.dtype)
    down = like(down, wide)
    parts = [down @ like(rows, wide).t() for rows in weight.split(ROWS)]
    return torch.cat(parts, 1), down @ down.t()


@torch.no_grad()
def row_norms(
    fixed: Constants,
    weight: Tensor,
    down: Tensor,
    core: Core,
    up: Tensor,
    scale: float,
) -> Tensor:
    """‖Wₙ + ΔWₙ‖ (N,) in float32 or wider: ΔW = scale · up·coreᵀ·down.

    weight (N, K), down (P, K), core (P, Q), or a diagonal (P,), or a pair of factors, or None, up
    (N, Q); `fixed` are `constants` of them. Where ΔW takes almost all of W away, so that rounding
    is all that is left, or even less than nothing, the norm is the root of what rounding may leave.
    """
    with_down, of_down = fixed.with_down, fixed.of_down
    if with_down is None or of_down is None:
        with_down, of_down = products(weight, down)
    wide, matrix = with_down.dtype, product(core)
    rows = like(up, wide)  # (N, P): up·coreᵀ
    if matrix is not None:
        rows = rows * like(matrix, wide) if is_diagonal(core) else rows @ like(matrix, wide).t()
    rows = rows * scale
    mixed = torch.linalg.vecdot(rows, with_down.t())
    of_delta = torch.linalg.vecdot(rows @ of_down, rows).clamp_min_(0.0)
    sizes = fixed.of_weight + of_delta
    least = torch.finfo(wide).eps * sizes  # less than this is rounding's
    return torch.maximum(sizes + 2.0 * mixed, least).sqrt_()


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """magnitude / norm (N,), in float32 or wider; a norm of `row_norms` is a constant here.

    Where the norm is 0 so is all that is multiplied, and the gain is 1. A magnitude of 0 is taken
    for the smallest that has an inverse, so that the gain's own gradient is a number.
    """
    wide = torch.promote_types(wide_dtype(magnitude.dtype), norm.dtype)
    least = torch.finfo(wide).tiny ** 0.5
    norm = like(norm, wide)
    magnitude = like(magnitude, wide)
    magnitude = magnitude + torch.where(magnitude.detach() == 0, least, 0.0)
    return torch.where(norm > 0, magnitude / torch.where(norm > 0, norm, 1.0), 1.0)


# --- of a layer ---

Stamp = tuple[int, int, int, int]
# A frozen down or, beside a trained one, the weight → (the weight, their stamp, the constants)
KEPT: Any = WeakTensorKeyDictionary()


def with_gain(parts: Parts, factors: Mapping[str, Tensor], weight: Tensor, scale: float) -> Parts:
    """The parts of a layer with the gain that its factors' magnitude is over this weight.

    The norm's constants are computed anew where weight or a frozen down is another tensor, or has
    been written to; not where that was by way of `.data`, which leaves no trace: call `forget`.
    """
    down, core, up, _ = parts
    keeps, frozen = not weight.requires_grad, not down.requires_grad
    if torch.compiler.is_compiling():
        a, b = (t if t is None else t.detach() for t in places(core))
        own = weight if keeps else weight.detach(), down if frozen else down.detach()
        if isinstance(weight, Base):  # which no op takes
            given = own[1], join(a, b), up.detach(), scale, keeps, frozen
            norm = torch.compiler.disable(norm_of)(weight, *given)
        else:
            norm = norm_op(*own, a, b, up.detach(), scale, keeps, frozen)
    else:
        norm = norm_of(weight, down, core, up, scale, keeps, frozen)
    return parts._replace(gain=gain(factors[MAGNITUDE], norm))


@torch.no_grad()
def norm_of(
    weight: Tensor, down: Tensor, core: Core, up: Tensor, scale: float, keeps: bool, frozen: bool
) -> Tensor:
    """`row_norms` of a layer, with constants that are kept if the weight `keeps` its values."""
    with no_autocast(weight):
        fixed = kept(weight, down, frozen) if keeps else constants(weight, None)
        return row_norms(fixed, weight, down, core, up, scale)


def kept(weight: Tensor, down: Tensor, frozen: bool) -> Constants:
    """The constants of a weight that is not trained, and of down if it is `frozen`."""
    own: Any = weight.stored()[0] if isinstance(weight, Base) else weight
    key = down if frozen else own
    if own.is_inference() or key.is_inference():  # nobody counts what is written to them
        return constants(weight, down if frozen else None)
    stamp = own.data_ptr(), own._version, key.data_ptr(), key._version
    found = KEPT.get(key)
    if found is not None and found[1] == stamp and found[0]() is weight:
        return found[2]
    fixed = constants(weight, down if frozen else None)
    if not (own.is_cuda and torch.cuda.is_current_stream_capturing()):  # the graph's memory
        KEPT[key] = weakref.ref(weight), stamp, fixed
    return fixed


def forget() -> None:
    """Keep no constants: parameters are about to get values, or memory, in whatever way."""
    if KEPT:
        KEPT.clear()


@torch.library.custom_op("fused_lowrank::dora_norm", mutates_args=())
def norm_op(
    weight: Tensor,
    down: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    up: Tensor,
    scale: float,
    keeps: bool,
    frozen: bool,
) -> Tensor:
    return norm_of(weight, down, join(a, b), up, scale, keeps, frozen)


@norm_op.register_fake
def _(weight, *others):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape[0], dtype=wide_dtype(weight.dtype))


@torch.no_grad()
def fill_magnitude(layer: Any) -> None:
    """Give a layer with DoRA, whose other factors are filled, ‖W + ΔW‖ by row: a gain of 1."""
    if not layer.row.dora:
        return
    factors, weight = layer.factors_now(), layer.base_weight
    down, core, up, _ = layer.row.made(factors, weight, layer.scale)
    keeps, frozen = not weight.requires_grad, not down.requires_grad
    factors[MAGNITUDE].copy_(norm_of(weight, down, core, up, layer.scale, keeps, frozen))


@torch.no_grad()
def check_rows(row: Method, weight: Tensor) -> None:
    """Raise ValueError if, with DoRA, a row of W is all zeros, or holds NaN or Inf."""
    if weight.is_meta or not row.dora:
        return
    norm = whole(constants(weight).of_weight)
    bad = (~(norm > 0) | norm.isinf()).nonzero().flatten().tolist()
    if bad:
        said = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        raise ValueError(
            f"rows {said} of the weight are zero, or hold NaN or Inf: DoRA divides by their norms. "
            "Adapt this layer without dora"
        )
