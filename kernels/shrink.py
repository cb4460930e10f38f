"""shrink: the way down, and through the core, in one launch.

    t = x·downᵀ             x (M, K)   down (P, K)   t (M, P)
    u = scale · t · core    core (P, Q), or left (P, r)·right (r, Q), or a diagonal (P,), or 1
                            or a core for each row (`rows`)   u (M, Q)

x is read once; both sums are kept in fp32; t is rounded to x's dtype, as in the reference. An fp32
core beside a 16-bit x is multiplied on tensor cores as two bf16 values, far more exactly than u is
rounded (`dot_mixed`). The backward is the same kernel: g, v = shrink(dy, up, core, scale,
transposed), with g = dy·up and v = scale · g · coreᵀ.

Where the row tiles are too few to fill the device, K is split over programs: each stores its part
of x·downᵀ, and the last to arrive adds them in the order of their index and goes on to t and u.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import (
    Dropout,
    accumulator,
    aligned,
    byte_ptrs,
    cast,
    cdiv,
    dot,
    dot_mixed,
    drawn,
    gathered,
    mask_width,
    multiprocessors,
    offset,
    promote,
    step,
    sum_dtype,
    threshold,
    variants,
)
from .factors import Core, sides, unpacked
from .launch import LAUNCHES, Launch, key_of
from .rows import POINTERS, RUNTIME, kind, mix, pointers, row_blocks, sizes, store_u_of_rows
from .tiles import Choice, Spec, TileConfig, padded, rank_constants

WHOLE = 128  # padded(P) up to which t goes from registers into t · core
MIN_BLOCKS = 4  # of K for a program: fewer, and the partial sums cost more than x
MAX_SPLITS = 32


@triton.jit
def store_t_and_u(
    acc,
    t_ptr,
    u_ptr,
    left_ptr,
    right_ptr,
    first_m,
    M,
    scale,
    low_scale,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    PAD_P: tl.constexpr,
    PAD_Q: tl.constexpr,
    PAD_R: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STORE_T: tl.constexpr,
    STORE_U: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MIX: tl.constexpr = 0,
    BLOCK_ROWS: tl.constexpr = 1,
    bank=None,
):
    """Store t and u of BLOCK_M rows; `acc` is their x·downᵀ, not yet rounded."""
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_p = tl.arange(0, PAD_P)
    mask_m = offs_m[:, None] < M
    mask_p = offs_p[None, :] < P

    # x may hold Inf, and Inf · 0 is NaN: the padding is set to zero after the dot.
    acc = tl.where(mask_p, acc, 0.0)
    if DROPOUT:
        acc *= low_scale
    t = cast(acc, dtype)
    t_ptrs = t_ptr + offset(offs_m[:, None], P)
    if STORE_T:
        tl.store(t_ptrs + offs_p[None, :], t, mask_m & mask_p)
    if STORE_U:
        u_ptrs = u_ptr + offset(offs_m[:, None], PAD_Q)
        if R == -1:
            tl.store(u_ptrs + offs_p[None, :], cast(acc * scale, dtype), mask_m)
        elif MIX > 0:
            tl.debug_barrier()  # t is stored: it is read again, some rows at a time
            store_u_of_rows(
                t_ptr, u_ptr, left_ptr, right_ptr, bank, first_m, M, scale,
                P, Q, R, PAD_P, PAD_Q, PAD_R, TRANSPOSED, MIX,
                BLOCK_M, BLOCK_ROWS, BLOCK_P, BLOCK_Q,
            )  # fmt: skip
        elif R == -2:
            diagonal = tl.load(left_ptr + offs_p[None, :], mask_p, other=0.0)
            u = acc * scale * diagonal.to(accumulator(promote(diagonal.dtype, dtype)))
            tl.store(u_ptrs + offs_p[None, :], cast(u, dtype), mask_m)
        else:
            core_dtype: tl.constexpr = promote(
                left_ptr.dtype.element_ty, right_ptr.dtype.element_ty
            )
            if BLOCK_P < PAD_P:
                tl.debug_barrier()  # t is stored: it is read again below, BLOCK_P columns at a time
            for q in range(0, PAD_Q, BLOCK_Q):
                offs_q = q + tl.arange(0, BLOCK_Q)
                mask_q = offs_q[None, :] < Q
                u = tl.zeros((BLOCK_M, BLOCK_Q), accumulator(core_dtype))
                for p in range(0, PAD_P, BLOCK_P):
                    offs_c = p + tl.arange(0, BLOCK_P)
                    mask_c = offs_c[:, None] < P
                    if BLOCK_P < PAD_P:
                        mask_t = mask_m & (offs_c[None, :] < P)
                        part = tl.load(t_ptrs + offs_c[None, :], mask_t, other=0.0)
                    else:
                        part = t
                    if R == 0:
                        if TRANSPOSED:
                            core_ptrs = left_ptr + offs_q[None, :] * P + offs_c[:, None]
                        else:
                            core_ptrs = left_ptr + offs_c[:, None] * Q + offs_q[None, :]
                        core = tl.load(core_ptrs, mask_c & mask_q, other=0.0)
                    else:
                        core = tl.zeros((BLOCK_P, BLOCK_Q), accumulator(core_dtype))
                        for r in range(0, PAD_R, BLOCK_R):
                            offs_r = r + tl.arange(0, BLOCK_R)
                            if TRANSPOSED:
                                left_ptrs = left_ptr + offs_r[None, :] * P + offs_c[:, None]
                                right_ptrs = right_ptr + offs_q[None, :] * R + offs_r[:, None]
                            else:
                                left_ptrs = left_ptr + offs_c[:, None] * R + offs_r[None, :]
                                right_ptrs = right_ptr + offs_r[:, None] * Q + offs_q[None, :]
                            left = tl.load(left_ptrs, mask_c & (offs_r[None, :] < R), other=0.0)
                            right = tl.load(right_ptrs, (offs_r[:, None] < R) & mask_q, other=0.0)
                            core = dot(cast(left, core_dtype), cast(right, core_dtype), core)
                        core = cast(core, core_dtype)
                    if core_dtype == tl.float32 and dtype != tl.float32:
                        u += dot_mixed(part, core)
                    else:
                        u = dot(cast(part, core_dtype), core, u)
                u = tl.where(mask_q, u * scale, 0.0)
                tl.store(u_ptrs + offs_q[None, :], cast(u, dtype), mask_m)


def shrink_kernel(
    x_ptr,
    down_ptr,
    left_ptr,
    right_ptr,
    t_ptr,
    u_ptr,
    bits_ptr,
    seed_ptr,
    partial_ptr,
    arrivals_ptr,
    handles_ptr,
    weights_ptr,
    scales_ptr,
    generations_ptr,
    refused_ptr,
    repeat,
    slots,
    scale,
    low_scale,
    threshold,
    depth,
    M,
    K,
    stride_xm,
    stride_xk,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,  # LoRA-Mini's r; 0: the core is the matrix `left`; -1: it is 1; -2: a diagonal
    PAD_P: tl.constexpr,
    PAD_Q: tl.constexpr,
    PAD_R: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # down lies as (K, P), core (Q, P), left (r, P), right (Q, r)
    STORE_T: tl.constexpr,
    STORE_U: tl.constexpr,
    DROPOUT: tl.constexpr,  # of x, by `drawn`; low_scale is then 1 / (1 - p)
    STORE_BITS: tl.constexpr,  # of that mask, for the backward
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,  # K, over programs of `depth` blocks each
    MIX: tl.constexpr,  # cores to a row, each from the tables `left` and `right`; 0: one for all
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # of a core for each row, at a time
    BLOCK_P: tl.constexpr,  # of t · core: t as a whole does not fit beside it if P is large
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TF32X3: tl.constexpr,  # how fp32 is multiplied by down (`dot`)
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid, split = tl.program_id(0), 0
    first_k, end_k = 0, K
    if SPLIT:
        split = tl.program_id(1)
        first_k = split * depth * BLOCK_K
        end_k = min(K, first_k + depth * BLOCK_K)

    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_p = tl.arange(0, PAD_P)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m[:, None] < M
    mask_p = offs_p[None, :] < P

    x_ptrs = x_ptr + offset(offs_m[:, None], stride_xm) + offset(offs_k[None, :], stride_xk)
    if TRANSPOSED:
        down_ptrs = down_ptr + offs_k[:, None] * P + offs_p[None, :]
    else:
        down_ptrs = down_ptr + offset(offs_p[None, :], K) + offs_k[:, None]
    if SPLIT:
        x_ptrs += offset(first_k, stride_xk)
        down_ptrs += offset(first_k, P if TRANSPOSED else 1)
    acc = tl.zeros((BLOCK_M, PAD_P), accumulator(dtype))
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for k in range(first_k, end_k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask_m, other=0.0)
            down = tl.load(down_ptrs, mask_p, other=0.0)
        else:
            x = tl.load(x_ptrs, mask_m & (offs_k[None, :] < K - k), other=0.0)
            down = tl.load(down_ptrs, mask_p & (offs_k[:, None] < K - k), other=0.0)
        if DROPOUT:
            keep, bits = drawn(seed, pid * BLOCK_M, k, threshold, BLOCK_M, BLOCK_K)
            if STORE_BITS:  # each element of x is read by one program, hence drawn once
                bytes_at, there = byte_ptrs(bits_ptr, pid * BLOCK_M, k, M, K, BLOCK_M, BLOCK_K)
                tl.store(bytes_at, bits, there)
            x = tl.where(keep, x, 0.0)
        acc = dot(x, cast(down, dtype), acc, TF32X3)
        x_ptrs += step(BLOCK_K, stride_xk)
        down_ptrs += BLOCK_K * (P if TRANSPOSED else 1)

    last = True
    if SPLIT:  # the partial sums lie as (splits, row tiles, BLOCK_M, PAD_P)
        tile: tl.constexpr = BLOCK_M * PAD_P
        in_tile = tl.arange(0, BLOCK_M)[:, None] * PAD_P + offs_p[None, :]
        acc, last = gathered(
            acc, partial_ptr + pid * tile + in_tile, split, tl.num_programs(1),
            tl.num_programs(0) * tile, arrivals_ptr + pid, 4 if tile <= 8192 else 2,
        )  # fmt: skip
    if last:
        bank = handles_ptr, weights_ptr, scales_ptr, generations_ptr, refused_ptr, repeat, slots
        store_t_and_u(
            acc, t_ptr, u_ptr, left_ptr, right_ptr, pid * BLOCK_M, M, scale, low_scale,
            P, Q, R, PAD_P, PAD_Q, PAD_R, TRANSPOSED, STORE_T, STORE_U, DROPOUT,
            BLOCK_M, BLOCK_P, BLOCK_Q, BLOCK_R, MIX, BLOCK_ROWS, bank,
        )  # fmt: skip


# Were `bits_ptr` known to be a multiple of 16, several bytes would be stored at once, and for that
# the compiler would draw them a second time, in the places where it wants them.
NEVER = ["M", "depth", "threshold", "seed_ptr", "bits_ptr"]
KERNELS = variants(shrink_kernel, runtime=[*NEVER, *RUNTIME])


def constants(
    p: int,
    q: int,
    r: int,
    k: int,
    transposed: bool,
    want: tuple[bool, bool, bool],
    dropout: bool,
    split: bool,
    mix: int,
    config: TileConfig,
) -> dict[str, int]:
    """The compile-time arguments of a launch that stores t, u and the mask as `want` says."""
    shared = 1, padded(p) if padded(p) <= WHOLE else 64, min(padded(q), config.block_n)
    own = row_blocks(p, q, r, config.own_cores) if mix else shared
    return {
        **rank_constants(p, q, r),
        "TRANSPOSED": transposed,
        **dict(zip(("STORE_T", "STORE_U", "STORE_BITS"), want, strict=True)),
        "DROPOUT": dropout,
        "EVEN_K": k % config.block_k == 0,
        "SPLIT": split,
        "MIX": mix,
        "BLOCK_M": config.block_m,
        **dict(zip(("BLOCK_ROWS", "BLOCK_P", "BLOCK_Q"), own, strict=True)),
        "BLOCK_K": config.block_k,
        "BLOCK_R": min(padded(max(r, 1)), 32),
        "TF32X3": config.tf32x3,
    }


def splits(tiles: int, blocks: int, device: torch.device) -> int:
    """The programs that share a row tile's blocks of K: so many that they about fill the device.

    Each has at least MIN_BLOCKS. Of more row tiles than multiprocessors none is split.
    """
    return max(1, min(multiprocessors(device) // tiles, blocks // MIN_BLOCKS, MAX_SPLITS))


INPUTS = ("x_ptr", "down_ptr", "left_ptr", "right_ptr", "seed_ptr")


def shrink(
    x: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    scale: float,
    transposed: bool,
    want_t: bool,
    want_u: bool,
    dropout: Dropout,
    choose: Choice,
    want_bits: bool = False,
) -> tuple[Any, ...]:
    """(t, u), and with `want_bits` a third: the mask of the dropout, as bits.

    t = x·downᵀ, (M, P), and u = scale·t·core, (M, padded(Q)), in x's dtype. u is zero beyond Q. A
    result that is not wanted is not stored: it is None. x (M, K) of any strides, M and K at least
    1; down (P, K) and core (P, Q), or the pair (P, r) and (r, Q), or a diagonal (P,), contiguous,
    of any float dtype. If `transposed`, they are instead down (K, P) and core (Q, P), or (Q, r) and
    (r, P). A core for each row lies as `rows` says, `transposed` or not. With `dropout` (seed, p),
    x is dropout(x); the mask is uint8 (M, mask_width(K)): bit i of the byte [m, j] says whether
    x[m, 8·j + i] is kept.
    """
    left, right = sides(down, core, transposed)
    seed, drop_p = (None, None) if dropout is None else dropout
    tensors, bank = (x, down, left, right, seed), pointers(core)
    want = want_t, want_u, want_bits and drop_p is not None
    flags = kind(core), transposed, want, drop_p, choose
    key, addresses = key_of("shrink", tensors, *flags, plain=bank)
    launch = LAUNCHES.get(key) or planned(x, down, core, transposed, want, drop_p, choose)
    made = launch(key, (*tensors, *bank), addresses, float(scale))
    return tuple(made if want_bits else made[:2])


def planned(
    x: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    transposed: bool,
    want: tuple[bool, bool, bool],
    drop_p: float | None,
    choose: Choice,
) -> Launch:
    """The launch of a call of `shrink`; `want` is of t, u and the mask."""
    want_t, want_u, want_bits = want
    m, k = x.shape
    left, right, p, q, r = unpacked(down, core, transposed)
    factor_itemsize = max(tensor.element_size() for tensor in (down, left, right))
    is_aligned = x.stride(1) == 1 and aligned((x, down, left, right), (k, x.stride(0)))
    itemsizes, masked = (x.element_size(), factor_itemsize), drop_p is not None
    ranks, by_row = (padded(p), padded(q)), mix(core)
    config = choose(Spec("shrink", *itemsizes, is_aligned, *ranks, masked, by_row > 0), m)
    read_t = by_row > 0 or (r >= 0 and padded(p) > WHOLE)  # for t · core
    store_t = want_t or (want_u and read_t)
    stored = store_t, want_u, want_bits
    tiles, blocks = cdiv(m, config.block_m), cdiv(k, config.block_k)
    parts = 1 if config.whole_k else splits(tiles, blocks, x.device)
    depth = cdiv(blocks, parts)
    parts = cdiv(blocks, depth)  # none without a block
    new_t = (m, p), x.dtype
    partial = (parts, tiles * config.block_m, padded(p)), sum_dtype(x.dtype)
    return Launch(
        KERNELS[is_aligned],
        (tiles, parts),
        (*INPUTS, *POINTERS) if by_row else INPUTS,
        results={
            "t_ptr": new_t if want_t else None,
            "u_ptr": ((m, padded(q)), x.dtype) if want_u else None,
            "bits_ptr": ((m, mask_width(k)), torch.uint8) if want_bits else None,
        },
        scratch={
            **({"t_ptr": new_t} if store_t and not want_t else {}),
            "partial_ptr": partial if parts > 1 else None,
        },
        numbers={
            **sizes(core),
            "low_scale": 1.0 / (1.0 - (drop_p or 0.0)),
            "threshold": threshold(drop_p or 0.0),
            "depth": depth,
            "M": m,
            "K": k,
            "stride_xm": x.stride(0),
            "stride_xk": x.stride(1),
        },
        constants={
            **constants(p, q, r, k, transposed, stored, masked, parts > 1, by_row, config),
            **config.options(),
        },
        varying=("scale",),
        unread=(*(() if masked else ("seed_ptr",)), *(() if parts > 1 else ("arrivals_ptr",))),
        meets=parts > 1,
        device=x.device,
    )
