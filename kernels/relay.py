"""relay: the whole layer in one launch, for many rows, on Hopper.

    t = x·downᵀ    u = scale · t · core    y = gain ⊙ (x·Wᵀ + u·upᵀ) + bias

What is launched is in `relay_hopper` or, by a tile with several makers of t, in
`relay_slices_hopper`.
"""

from __future__ import annotations

import torch

from .common import N_ARRIVALS, cdiv, gemm_aligned
from .factors import Core, sides, unpacked
from .launch import LAUNCHES, Launch, key_of
from .rows import is_rows, kind, pointers
from .tile_choice import select
from .tiles import Choice, Spec, Target, TileConfig, has_hopper, is_bulk, padded

FLAGS = 2  # in `arrivals`, for each row of tiles: one for each group of warps


def spec_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    gain: torch.Tensor | None = None,
) -> Spec:
    """The `Spec` of a launch of `relay` with these operands."""
    _, _, p, q, _ = unpacked(down, core, transposed)
    factors, products = (down, up), 1
    if core_dtype(core, x.dtype) != x.dtype:
        products = 2 if x.dtype == torch.bfloat16 else 3
    return Spec(
        "relay",
        x.element_size(),
        x.element_size() * products,  # of t·core: so many halves lie side by side
        gemm_aligned(x, weight, (*factors, bias, gain)),
        padded(p),
        padded(q),
        by_row=is_rows(core),
        bulk=is_bulk(x, weight, *factors),
        n=weight.shape[0],
        k=x.shape[1],
    )


def core_dtype(core: Core, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the core as a matrix; of a diagonal, of 1, or of each row's own, x's."""
    if core is None or is_rows(core):
        return dtype
    left, right = core if isinstance(core, tuple) else (core, core)
    if left.dim() == 1:  # a diagonal is not multiplied as a matrix
        return dtype
    return torch.promote_types(left.dtype, right.dtype)


def has_flags(m: int, config: TileConfig) -> bool:
    """Whether there are flags for every row of tiles."""
    return FLAGS * cdiv(m, config.block_m) <= N_ARRIVALS


def is_possible(target: Target, spec: Spec, m: int) -> bool:
    """Whether `relay` can make this launch, with the tile that `select` gives."""
    return has_hopper(target, spec) and has_flags(m, select(target, spec, m))


def relay(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    transposed: bool,
    want_t: bool,
    choose: Choice,
    gain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, t): what `gemm_tail` gives for the u of t, u = shrink(x, down, core, scale, transposed).

    The operands are those of `shrink` and `gemm_tail`, as far as `is_possible`; the results are
    contiguous and in x's dtype; t is None unless it is wanted. Raises ValueError for others.
    """
    # A pair that all rows have is multiplied as it lies.
    left, right = sides(down, core, transposed and is_rows(core))
    tensors, bank = (x, weight, down, left, right, up, bias, gain), pointers(core)
    flags = kind(core), transposed, want_t, choose
    key, addresses = key_of("relay", tensors, *flags, plain=bank)
    launch = LAUNCHES.get(key) or planned(
        x, weight, down, core, up, bias, transposed, want_t, choose, gain
    )
    y, t = launch(key, (*tensors, *bank), addresses, float(scale))
    return y, t


def planned(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    want_t: bool,
    choose: Choice,
    gain: torch.Tensor | None,
) -> Launch:
    """The launch of a call of `relay`."""
    m, spec = x.shape[0], spec_of(x, weight, down, core, up, bias, transposed, gain)
    config = choose(spec, m)
    if not (config.hopper and spec.bulk and has_flags(m, config)):
        raise ValueError(f"relay cannot compute {m} rows of {spec} with {config}")
    if config.makers > 1:
        from .relay_slices_hopper import planned as of_kernel
    else:
        from .relay_hopper import planned as of_kernel
    return of_kernel(x, weight, down, core, up, bias, transposed, want_t, spec.wide, config, gain)
