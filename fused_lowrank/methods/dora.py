"""DoRA's norms (Liu et al. 2024, arXiv 2402.09353): the gain is a magnitude over a row's norm.

    y = gain ⊙ (x·Wᵀ + low-rank) + bias      gain = magnitude / norm      norm = ‖W + ΔW‖ by row

    ‖Wₙ + ΔWₙ‖² = ‖Wₙ‖² + 2·s·upₙ·coreᵀ·(down·Wₙᵀ) + s²·upₙ·coreᵀ·(down·downᵀ)·core·upₙᵀ

The paper holds the norm constant in the gradient, and so does all of this. What is of W alone, or
of W and a frozen down, is computed once (`Constants`); a step has N × P work then, and nothing of
N × K. Where down is trained a step multiplies it by W, into (N, P), and no ΔW is made either.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..compute.autograd import join, places
from ..compute.base.protocol import Base, dense
from ..compute.choose import transformed
from ..compute.gain import Gain, Ratio, divided, least
from ..compute.reference import Core, like, wide_dtype
from ..compute.run import no_autocast
from .method import MAGNITUDE, Method, Parts
from .tensors import is_sharded, whole

WIDENED = 1 << 18  # elements of W that are widened at a time, in the same memory
AT_ONCE = 1 << 22  # and on a device other than a CPU


class Constants(NamedTuple):
    """The parts of the norm that no step changes, in float32 or wider.

    `of_weight` (N,) is ‖Wₙ‖², and `least` (N,) what rounding may leave of it: never 0.
    `with_down` (N, P), W·downᵀ, and `of_down` (P, P), down·downᵀ, are None where down is trained.
    """

    of_weight: Tensor
    least: Tensor
    with_down: Tensor | None
    of_down: Tensor | None


@torch.no_grad()
def constants(weight: Tensor, down: Tensor | None = None) -> Constants:
    """The constants of weight (N, K) and of a frozen down (P, K); None where down is trained."""
    of_weight = by_rows(weight, lambda rows: rows.square().sum(1))
    known = torch.finfo(of_weight.dtype)
    rest = (known.eps * of_weight).clamp_min(known.tiny)
    return Constants(of_weight, rest, *((None, None) if down is None else products(weight, down)))


def products(weight: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(W·downᵀ (N, P), down·downᵀ (P, P)) in float32 or wider, some rows of W at a time."""
    down = like(down, wide_dtype(weight.dtype))
    across, same = down.t(), isinstance(weight, Tensor) and weight.dtype is down.dtype
    return weight @ across if same else by_rows(weight, lambda rows: rows @ across), down @ across


def rounded_products(weight: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """`products` with down in W's dtype, as beside x, and W·downᵀ rounded to that, as t is."""
    down = like(down, weight.dtype)
    with_down = like(weight @ down.t(), wide_dtype(weight.dtype))
    down = like(down, with_down.dtype)
    return with_down, down @ down.t()


def is_rounded(weight: Tensor) -> bool:
    """Whether a step may look at the squares that `rounded_products` give, and keep them."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.is_cpu
    return plain and weight.dtype is torch.bfloat16 and not transformed()


def by_rows(weight: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """The result of a function of the rows of W in float32 or wider, which are never there at once.

    Nor are those that a quantised W is dequantised to. Those of a sharded W are: to take some of
    them would gather it.
    """
    wide, (n, k) = wide_dtype(weight.dtype), weight.shape
    most = WIDENED * torch.get_num_threads() if weight.is_cpu else AT_ONCE
    rows = max(1, most // max(1, k))
    if n <= rows or is_sharded(weight):
        return of(like(dense(weight), wide))
    parts: Iterable[Tensor] = weight.split(rows)
    if weight.is_cpu and weight.dtype is not wide:  # new memory costs more than what is done in it
        memory = weight.new_empty(rows, k, dtype=wide)
        parts = (memory[: len(part)].copy_(part) for part in parts)
    return torch.cat([of(like(part, wide)) for part in parts])


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

    On a CPU a trained down is multiplied by a bfloat16 W in that: the square is then off by at most
    2⁻⁷·scale·Σ|up·coreᵀ|·|down·Wᵀ|. Those that are much less than ‖W‖² are computed exactly.
    """
    wide = fixed.of_weight.dtype
    rows, middle = like(up, wide), core
    if isinstance(core, tuple):  # through the smaller of the pair's sizes
        rows, middle = rows @ like(core[1], wide).t(), core[0]
    elif isinstance(core, Tensor) and core.dim() == 1:
        rows, middle = rows * like(core, wide), None
    elif isinstance(core, Tensor) and core.shape[0] <= core.shape[1]:
        rows, middle = rows @ like(core, wide).t(), None
    middle = like(middle, wide) if isinstance(middle, Tensor) else None
    if fixed.with_down is None and is_rounded(weight):
        square = squares(fixed.of_weight, *rounded_products(weight, down), middle, rows, scale)
        if bool((square > 0.5 * fixed.of_weight).all()):
            return square.sqrt_()
    with_down, of_down = fixed.with_down, fixed.of_down
    if with_down is None or of_down is None:
        with_down, of_down = products(weight, down)
    square = squares(fixed.of_weight, with_down, of_down, middle, rows, scale)
    return torch.maximum(square, fixed.least).sqrt_()


def squares(
    of_weight: Tensor,
    with_down: Tensor,
    of_down: Tensor,
    middle: Tensor | None,
    rows: Tensor,
    scale: float,
) -> Tensor:
    """‖Wₙ + ΔWₙ‖² (N,) of the parts of the norm, where up·coreᵀ is rows·middleᵀ."""
    if middle is not None:
        with_down, of_down = with_down @ middle, middle.t() @ of_down @ middle
    added = torch.addmm(with_down, rows, of_down, beta=2.0 * scale, alpha=scale * scale)
    return torch.linalg.vecdot(rows, added).add_(of_weight)


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """magnitude / norm (N,), in float32 or wider; a norm of `row_norms` is a constant here.

    A magnitude of 0 and a norm of 0 are taken for the `least`: so the gain's own gradient is a
    number, and so is the gain where all is 0 that it multiplies. Beside a bias a magnitude of 0 has
    its gradient by impl="reference", and by "auto" on a CPU; elsewhere it is 0.
    """
    norm = norm.clamp_min(least(norm.dtype))
    if not torch.is_grad_enabled() or (not torch.compiler.is_compiling() and transformed()):
        return divided(magnitude, norm)
    made: Tensor = Gain.apply(magnitude, norm)
    return made


def of_call(magnitude: Tensor, norm: Tensor) -> Any:
    """`gain` for a call of the equation, a `Ratio` where the call is to give the gradient."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or transformed():
        return gain(magnitude, norm)
    values = divided(magnitude.detach(), norm)
    return Ratio(values, magnitude, norm) if magnitude.requires_grad else values


# --- of a layer ---

# Of each tensor itself and its storage, weakly, its version and its address.
Stamp = list[tuple[Any, Any, int, int]]
# The first of the factors that a frozen down is made of or, beside a trained one, the weight →
# {P, how the weight lies in what it is a view of, the ids of all that the constants are of:
# (a stamp of these, the constants)}
KEPT: Any = WeakTensorKeyDictionary()


def stamp(tensors: Iterable[Tensor]) -> Stamp:
    """A stamp by which tensors are known to be what they are now."""
    return [
        (weakref.ref(t), weakref.ref(t.untyped_storage()), t._version, t.data_ptr())
        for t in tensors
    ]


def holds(known: Stamp, tensors: Iterable[Tensor]) -> bool:
    """Whether these are the tensors of a stamp, and nobody has written to them.

    What is written through `.data` is not seen; memory that `.data = …` has put in place is.
    """
    for tensor, (own, memory, version, address) in zip(tensors, known, strict=True):
        if not (
            own() is tensor
            and tensor._version == version
            and tensor.data_ptr() == address
            and memory() is tensor.untyped_storage()
        ):
            return False
    return True


def parts_of(row: Method, factors: Mapping[str, Tensor], weight: Tensor, scale: float) -> Parts:
    """The equation's parts of a row's factors beside this weight, with DoRA's gain if any."""
    made = row.made(factors, weight, scale)
    return with_gain(made, factors, weight, scale, row.down_of) if row.dora else made


def with_gain(
    parts: Parts,
    factors: Mapping[str, Tensor],
    weight: Tensor,
    scale: float,
    down_of: Iterable[str] = (),
    over: Callable[[Tensor], Tensor] | None = None,
) -> Parts:
    """The parts of a layer with the gain that its factors' magnitude is over this weight.

    The norm's constants are computed anew where weight or, with a frozen down, one of the factors
    `down_of`, which that is made of, is another tensor, or has been written to; not where that was
    by way of `.data`, which leaves no trace: call `forget`. Without `down_of` nothing is kept of a
    down that is not trained either. Of a weight and a down that are some columns of more `over`
    sums over all of them.
    """
    down, core, up, _ = parts
    keeps, of = not weight.requires_grad, frozen(factors, down_of)
    if torch.compiler.is_compiling():
        a, b = (t if t is None else t.detach() for t in places(core))
        own = weight if keeps else weight.detach()
        if isinstance(weight, Base):  # which no op takes
            given = down.detach(), join(a, b), up.detach(), scale, keeps, of
            norm = torch.compiler.disable(norm_of)(weight, *given)
        else:
            norm = norm_op(own, down.detach(), a, b, up.detach(), scale, keeps, of)
    else:
        norm = norm_of(weight, down, core, up, scale, keeps, of)
    if over is not None:
        norm = over(norm.square()).sqrt()
    return parts._replace(gain=of_call(factors[MAGNITUDE], norm))


def frozen(factors: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    """The factors of these names, or none where one of them is trained."""
    found = [factors[name] for name in names]
    return [] if any(factor.requires_grad for factor in found) else found


def is_captured(tensor: Tensor) -> bool:
    """Whether what is computed of a tensor now belongs to a CUDA graph, and so does its memory."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def norm_of(
    weight: Tensor,
    down: Tensor,
    core: Core,
    up: Tensor,
    scale: float,
    keeps: bool,
    of: list[Tensor],
) -> Tensor:
    """`row_norms` of a layer, with constants that are kept if the weight `keeps` its values.

    `of` are the frozen factors that down is made of; none: it is trained.
    """
    with no_autocast(weight):
        fixed = kept(weight, down, of) if keeps else constants(weight, down if of else None)
        return row_norms(fixed, weight, down, core, up, scale)


def kept(weight: Tensor, down: Tensor, of: list[Tensor]) -> Constants:
    """The constants of a weight that is not trained, and of down if it is made `of` frozen ones.

    They are known by those, for down itself may be made, or cut, in each call; and by the weight,
    for layers may share what their down is made of. Of a view it is what that is a view of: a
    weight that is stored turned is another one in each call.
    """
    own: Any = weight.stored()[0] if isinstance(weight, Base) else weight
    laid = () if own._base is None else (own.shape, own.stride(), own.storage_offset())
    fixed_down = down if of else None
    tensors = [tensor if tensor._base is None else tensor._base for tensor in (own, *of)]
    # Nobody counts what is written to those of inference; those of a transform have no storage.
    if transformed() or any(tensor.is_inference() for tensor in tensors):
        return constants(weight, fixed_down)
    key, place = tensors[bool(of)], (len(down) if of else 0, laid, *map(id, tensors))
    known = KEPT.get(key) or {}
    found = known.get(place)
    if found is not None and holds(found[0], tensors):
        return found[1]
    fixed = constants(weight, fixed_down)
    if not is_captured(own):
        alive = {at: one for at, one in known.items() if all(t() is not None for t, *_ in one[0])}
        KEPT[key] = {**alive, place: (stamp(tensors), fixed)}
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
    of: list[Tensor],
) -> Tensor:
    return norm_of(weight, down, join(a, b), up, scale, keeps, of)


@norm_op.register_fake
def _(weight, *others):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape[0], dtype=wide_dtype(weight.dtype))


@torch.no_grad()
def fill_magnitude(layer: Any) -> None:
    """Give a layer with DoRA, whose other factors are filled, ‖W + ΔW‖ by row: a gain of 1."""
    if not layer.row.dora:
        return
    factors = layer.factors_now()
    factors[MAGNITUDE].copy_(norms_of(layer.row, factors, layer.base_weight, layer.scale))


@torch.no_grad()
def norms_of(row: Method, factors: Mapping[str, Tensor], weight: Tensor, scale: float) -> Tensor:
    """‖W + ΔW‖ by row, of a row's factors."""
    down, core, up, _ = row.made(factors, weight, scale)
    keeps = not weight.requires_grad
    return norm_of(weight, down, core, up, scale, keeps, frozen(factors, row.down_of))


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
