"""core_grad_rows: the gradients of a bank's cores, in one launch.

    dcore[s] = scale · scales[s] · sum over the rows m, in their order, of w[m] · t[m]ᵀ·g[m]
    w[m] = sum over j with handles[m // repeat, j] of adapter s of weights[m // repeat, j]

Of a diagonal it is the diagonal of that alone. A program is one adapter's tile of dcore: it goes
through the handles of all rows, or of a part of them where adapters are few, and through the t and
g of its own rows alone. What another adapter's rows hold does not reach it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from .common import (
    accumulator,
    aligned,
    cast,
    cdiv,
    dot,
    dot_mixed,
    gathered,
    multiprocessors,
    offset,
    sum_dtype,
    variants,
)
from .core_grad import COLUMN, MAX_SPLITS, MIN_ROWS
from .launch import LAUNCHES, Launch, key_of
from .tiles import Choice, Spec, TileConfig, padded, rank_constants


def core_grad_rows_kernel(
    t_ptr,
    g_ptr,
    handles_ptr,
    weights_ptr,
    scales_ptr,
    generations_ptr,
    dcore_ptr,
    partial_ptr,
    arrivals_ptr,
    scale,
    repeat,
    M,
    rows,
    P: tl.constexpr,
    Q: tl.constexpr,
    PAD_P: tl.constexpr,
    PAD_Q: tl.constexpr,
    MIX: tl.constexpr,  # handles to an entry
    DIAGONAL: tl.constexpr,  # of the product alone: Q is then 1
    SPLIT: tl.constexpr,  # the rows, over programs of `rows` each
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    dtype: tl.constexpr = t_ptr.dtype.element_ty
    acc_dtype: tl.constexpr = accumulator(dtype)
    slot, split = tl.program_id(0).to(tl.int64), 0
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    first_m, end = 0, M
    if SPLIT:
        split = tl.program_id(2)
        first_m, end = split * rows, min(M, (split + 1) * rows)
    tiles_q: tl.constexpr = PAD_Q // BLOCK_Q
    offs_p = (tile // tiles_q) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_q = (tile % tiles_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_p, mask_q = offs_p[:, None] < P, offs_q[None, :] < Q

    # The one handle of this adapter that is not refused: no other needs to be looked at.
    wanted = (tl.load(generations_ptr + slot).to(tl.int64) << 32) | slot
    acc, found = tl.zeros((BLOCK_P, BLOCK_Q), acc_dtype), 0
    for m in range(first_m, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        of_line = offset(offs_m // repeat, MIX)
        w = tl.zeros((BLOCK_M,), acc_dtype)
        times = tl.zeros((BLOCK_M,), tl.int32)
        for j in range(0, MIX):
            handle = tl.load(handles_ptr + of_line + j, offs_m < end, other=-1)
            mine = (handle >= 0) & (handle == wanted)
            times += mine.to(tl.int32)
            if weights_ptr is not None:
                w += tl.load(weights_ptr + of_line + j, mine, other=0.0)
        if tl.max(times, 0) > 0:
            found = 1
            t_ptrs = t_ptr + offset(offs_m[None, :], P) + offs_p[:, None]
            if DIAGONAL:
                g_ptrs = g_ptr + offset(offs_m[None, :], P) + offs_p[:, None]
                t = tl.load(t_ptrs, mask_p & (times[None, :] > 0), other=0.0)
                g = tl.load(g_ptrs, mask_p & (times[None, :] > 0), other=0.0)
                if weights_ptr is None:
                    w += times
                acc += tl.sum(t.to(acc_dtype) * g.to(acc_dtype) * w[None, :], 1)[:, None]
            else:
                g_ptrs = g_ptr + offset(offs_m[:, None], Q) + offs_q[None, :]
                t = tl.load(t_ptrs, mask_p & (times[None, :] > 0), other=0.0)
                g = tl.load(g_ptrs, mask_q & (times[:, None] > 0), other=0.0)
                if weights_ptr is None and MIX == 1:
                    acc = dot(t, g, acc)
                else:
                    if weights_ptr is None:
                        w += times
                    g = cast(g, acc_dtype) * w[:, None]
                    acc = acc + dot_mixed(t, g) if dtype != acc_dtype else dot(t, g, acc)

    # Of an adapter without rows dcore is zero, whatever its scale is.
    acc *= tl.where(found > 0, tl.load(scales_ptr + slot).to(acc_dtype) * scale, 0.0)
    last = True
    if SPLIT:  # the partial sums lie as (splits, slots, PAD_P, PAD_Q)
        size = tl.num_programs(0).to(tl.int64) * PAD_P * PAD_Q
        in_part = slot * PAD_P * PAD_Q + offs_p[:, None] * PAD_Q + offs_q[None, :]
        acc, last = gathered(
            acc, partial_ptr + in_part, split, tl.num_programs(2), size,
            arrivals_ptr + slot * tiles + tile,
        )  # fmt: skip
    if last:
        dcore_ptrs = dcore_ptr + slot * P * Q + offs_p[:, None] * Q + offs_q[None, :]
        tl.store(dcore_ptrs, acc, mask_p & mask_q)


KERNELS = variants(
    core_grad_rows_kernel,
    runtime=["handles_ptr", "weights_ptr", "scales_ptr", "generations_ptr", "repeat", "M", "rows"],
)


def constants(p: int, q: int, diagonal: bool, mix: int, config: TileConfig) -> dict[str, int]:
    """The compile-time arguments of a launch but SPLIT; a diagonal is one column of dcore."""
    ranks = rank_constants(p, q, 0)
    return {
        **{name: ranks[name] for name in ("P", "Q", "PAD_P", "PAD_Q")},
        "MIX": mix,
        "DIAGONAL": diagonal,
        "BLOCK_M": config.block_m,
        "BLOCK_P": min(padded(p), config.block_n),
        "BLOCK_Q": min(padded(q), config.block_n),
        **(COLUMN if diagonal else {}),
    }


def splits(tiles: int, m: int, device: torch.device) -> int:
    """The programs that share the rows of a tile: so many that tiles about fill the device."""
    return max(1, min(multiprocessors(device) // tiles, cdiv(m, MIN_ROWS), MAX_SPLITS))


INPUTS = ("t_ptr", "g_ptr", "handles_ptr", "weights_ptr", "scales_ptr", "generations_ptr")


def core_grad_rows(
    t: torch.Tensor, g: torch.Tensor, rows: Any, scale: float, choose: Choice
) -> torch.Tensor:
    """dcore, (slots, P, Q) or of diagonals (slots, P), in float32, or float64 for a float64 t.

    It is zero where there are no rows. t (M, P) and g (M, Q) of one dtype, contiguous, M at least
    1; `rows` as `shrink` takes them. Of a pair it is the gradient of the product.
    """
    tensors = t, g, rows.handles, rows.weights, rows.scales, rows.generations
    slots, diagonal = len(rows.table), rows.table.dim() == 2
    key, addresses = key_of("core_grad_rows", tensors, rows.repeat, slots, diagonal, choose)
    launch = LAUNCHES.get(key) or planned(t, g, rows, slots, diagonal, choose)
    (dcore,) = launch(key, tensors, addresses, float(scale))
    return dcore


def planned(
    t: torch.Tensor, g: torch.Tensor, rows: Any, slots: int, diagonal: bool, choose: Choice
) -> Launch:
    """The launch of a call of `core_grad_rows`."""
    (m, p), q = t.shape, g.shape[1]
    is_aligned = aligned((t, g), (p, q))
    itemsizes, ranks = (t.element_size(), t.element_size()), (padded(p), padded(q))
    config = choose(Spec("core_grad", *itemsizes, is_aligned, *ranks, by_row=True), m)
    values = constants(p, q, diagonal, rows.handles.shape[1], config)
    sides = values["PAD_P"], values["PAD_Q"]
    tiles = (sides[0] // values["BLOCK_P"]) * (sides[1] // values["BLOCK_Q"])
    blocks = cdiv(m, config.block_m)
    depth = cdiv(blocks, splits(slots * tiles, m, t.device))
    parts = cdiv(blocks, depth)  # none without a block
    partial = (parts, slots, *sides), sum_dtype(t.dtype)
    return Launch(
        KERNELS[is_aligned],
        (slots, tiles, parts),
        INPUTS,
        results={"dcore_ptr": ((slots, p) if diagonal else (slots, p, q), sum_dtype(t.dtype))},
        scratch={"partial_ptr": partial if parts > 1 else None},
        numbers={"repeat": rows.repeat, "M": m, "rows": depth * config.block_m},
        constants={**values, "SPLIT": parts > 1, **config.options()},
        varying=("scale",),
        unread=() if parts > 1 else ("arrivals_ptr",),
        meets=parts > 1,
        device=t.device,
    )
