"""decode: the whole layer for few rows, in one launch.

    y = gain ⊙ (x·Wᵀ + u·upᵀ) + bias     x (M, K)   W (N, K)   up (N, Q)   y (M, N)
                                    bias (N,)   gain (N,), or 1
    u = scale · (x·downᵀ) · core    down (P, K)   core (P, Q), or left (P, r)·right (r, Q), or a
                                    diagonal (P,), or 1, or a core for each row (`rows`)

All rows are one tile, and reading W is what takes the time, so K is split over programs until they
fill the device. A program is one slice of K of one column tile of y; the last slice of each tile to
finish adds up the tile, waits for u and adds the tail. Partial sums are added in the order of their
index, so y is bitwise reproducible.

u is made by programs of their own, while those of y read W: some for a slice of K of x·downᵀ each,
and some that add these up and go through the core, for some rows each. They have the first tickets.
So a program that waits, for all of x·downᵀ or of u, waits for programs with smaller tickets: these
are running, in whatever order the device starts programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    accumulator,
    cast,
    cdiv,
    dot,
    gathered,
    gemm_aligned,
    multiprocessors,
    offset,
    step,
    sum_dtype,
    variants,
)
from .decode_shares import lows, rows_each, splits
from .factors import Core, sides, unpacked
from .gemm_tail import add_tail, load_columns
from .launch import LAUNCHES, Launch, key_of
from .rows import POINTERS, RUNTIME, kind, mix, pointers, row_blocks, sizes
from .shrink import WHOLE, store_t_and_u
from .tiles import Choice, Spec, TileConfig, padded, rank_constants

MAKERS = 8  # programs that make u of rows with cores of their own: more if there is room

# What the counters of a launch count; a counter for each column tile follows.
TICKETS = tl.constexpr(0)
LOW = tl.constexpr(1)  # slices of x·downᵀ that are there
PUBLISHED = tl.constexpr(2)  # groups of rows whose u is there
DONE = tl.constexpr(3)  # column tiles that have seen all of u
TILES = tl.constexpr(4)

THREADS = tl.constexpr(256)  # of a program on CUDA, at most


@triton.jit
def wait_for(counter_ptr, count):
    """Wait until the counter has reached `count`; what its arrivals have stored is there then.

    By adding 0 the counter is read, not written: compiled, this is a load that acquires. It empties
    the first-level cache, so that ordinary loads from here on find nothing older there.
    """
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < count:
        pass


@triton.jit
def arrive(counter_ptr):
    """Count this program as one that has stored its part."""
    tl.debug_barrier()  # every thread's part is stored before the arrival is counted
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def low_sums(
    x_ptr,
    down_ptr,
    first_k,
    end_k,
    M,
    K,
    stride_xm,
    stride_xk,
    P: tl.constexpr,
    PAD_P: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x·downᵀ over K from first_k to end_k."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_m, offs_p, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, PAD_P), tl.arange(0, BLOCK_K)
    mask_m, mask_p = offs_m[:, None] < M, offs_p[None, :] < P
    x_ptrs = x_ptr + offset(offs_m[:, None], stride_xm) + offset(offs_k[None, :], stride_xk)
    x_ptrs += offset(first_k, stride_xk)
    if TRANSPOSED:
        down_ptrs = down_ptr + offset(first_k + offs_k[:, None], P) + offs_p[None, :]
    else:
        down_ptrs = down_ptr + offset(offs_p[None, :], K) + (first_k + offs_k[:, None])
    low = tl.zeros((BLOCK_M, PAD_P), accumulator(dtype))
    for k in range(first_k, end_k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask_m, other=0.0)
            down = tl.load(down_ptrs, mask_p, other=0.0)
        else:
            x = tl.load(x_ptrs, mask_m & (offs_k[None, :] < K - k), other=0.0)
            down = tl.load(down_ptrs, mask_p & (offs_k[:, None] < K - k), other=0.0)
        low = dot(x, cast(down, dtype), low)
        x_ptrs += step(BLOCK_K, stride_xk)
        down_ptrs += BLOCK_K * (P if TRANSPOSED else 1)
    return low


@triton.jit
def slice_sums(
    x_ptr,
    w_ptr,
    first_n,
    first_k,
    end_k,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x·Wᵀ of one column tile over K from first_k to end_k."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_m, offs_n = tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m[:, None] < M, offs_n[None, :] < N
    x_ptrs = x_ptr + offset(offs_m[:, None], stride_xm) + offset(offs_k[None, :], stride_xk)
    w_ptrs = w_ptr + offset(offs_n[None, :], stride_wn) + offset(offs_k[:, None], stride_wk)
    x_ptrs += offset(first_k, stride_xk)
    w_ptrs += offset(first_k, stride_wk)
    acc = tl.zeros((BLOCK_M, BLOCK_N), accumulator(dtype))
    for k in range(first_k, end_k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask_m, other=0.0)
            w = tl.load(w_ptrs, mask_n, other=0.0)
        else:
            x = tl.load(x_ptrs, mask_m & (offs_k[None, :] < K - k), other=0.0)
            w = tl.load(w_ptrs, mask_n & (offs_k[:, None] < K - k), other=0.0)
        acc = dot(x, w, acc)
        x_ptrs += step(BLOCK_K, stride_xk)
        w_ptrs += step(BLOCK_K, stride_wk)
    return acc


def decode_kernel(
    x_ptr,
    w_ptr,
    down_ptr,
    left_ptr,
    right_ptr,
    up_ptr,
    bias_ptr,
    gain_ptr,
    t_ptr,
    u_ptr,
    y_ptr,
    partial_ptr,
    partial_low_ptr,
    arrivals_ptr,
    handles_ptr,
    weights_ptr,
    scales_ptr,
    generations_ptr,
    refused_ptr,
    repeat,
    slots,
    scale,
    lows,
    low_depth,
    makers,
    splits,
    depth,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,  # LoRA-Mini's r; 0: the core is the matrix `left`; -1: it is 1; -2: a diagonal
    PAD_P: tl.constexpr,
    PAD_Q: tl.constexpr,
    PAD_R: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # each of the five factors lies the other way round
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    STORE_T: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,  # K, over `splits` programs of `depth` blocks each
    MIX: tl.constexpr,  # cores to a row, each from the tables `left` and `right`; 0: one for all
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,  # rows of u to a program
    BLOCK_ROWS: tl.constexpr,  # of a core for each row, at a time
    BLOCK_P: tl.constexpr,  # of t · core
    BLOCK_U: tl.constexpr,  # columns of u made at a time
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # of u · upᵀ
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    rows, offs_p = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, PAD_P)[None, :]
    ticket = tl.atomic_add(arrivals_ptr + TICKETS, 1, sem="relaxed")
    if ticket < lows:  # partial sums of x·downᵀ lie as (lows, BLOCK_M, PAD_P)
        first_k = ticket * low_depth * BLOCK_K
        low = low_sums(
            x_ptr, down_ptr, first_k, min(K, first_k + low_depth * BLOCK_K), M, K,
            stride_xm, stride_xk, P, PAD_P, TRANSPOSED, EVEN_K, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        tl.store(partial_low_ptr + (ticket * BLOCK_M + rows) * PAD_P + offs_p, low)
        arrive(arrivals_ptr + LOW)
    elif ticket < lows + makers:
        wait_for(arrivals_ptr + LOW, lows)
        first_m = (ticket - lows) * BLOCK_T
        own = first_m + tl.arange(0, BLOCK_T)[:, None]
        low = tl.zeros((BLOCK_T, PAD_P), accumulator(dtype))
        for i in range(0, lows):
            low_ptrs = partial_low_ptr + (i * BLOCK_M + own) * PAD_P + offs_p
            low += tl.load(low_ptrs, cache_modifier=".cg")
        bank = handles_ptr, weights_ptr, scales_ptr, generations_ptr, refused_ptr, repeat, slots
        store_t_and_u(
            low, t_ptr, u_ptr, left_ptr, right_ptr, first_m, M, scale, 1.0,
            P, Q, R, PAD_P, PAD_Q, PAD_R, TRANSPOSED, STORE_T, True, False,
            BLOCK_T, BLOCK_P, BLOCK_U, BLOCK_R, MIX, BLOCK_ROWS, bank,
        )  # fmt: skip
        arrive(arrivals_ptr + PUBLISHED)
    else:
        place = ticket - lows - makers
        tile, tiles = place // splits, (tl.num_programs(0) - lows - makers) // splits
        split, first_n = place % splits, tile * BLOCK_N
        first_k = split * depth * BLOCK_K
        acc = slice_sums(
            x_ptr, w_ptr, first_n, first_k, min(K, first_k + depth * BLOCK_K), M, N, K,
            stride_xm, stride_xk, stride_wn, stride_wk, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        whole = True
        if SPLIT:  # those of y lie as (column tiles, splits, BLOCK_M, BLOCK_N)
            size: tl.constexpr = BLOCK_M * BLOCK_N
            in_tile = rows * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            acc, whole = gathered(
                acc, partial_ptr + tile * splits * size + in_tile, split, splits, size,
                arrivals_ptr + TILES + tile,
            )  # fmt: skip
        if whole:
            # They come meanwhile.
            bias = load_columns(bias_ptr, first_n, N, BLOCK_N) if HAS_BIAS else None
            gain = load_columns(gain_ptr, first_n, N, BLOCK_N) if HAS_GAIN else None
            wait_for(arrivals_ptr + PUBLISHED, makers)
            # Nothing of this program is handed on by it, and its last look at a counter is behind
            # it, by having acquired: so it need not be ordered with anything else. As a vector, of
            # as many as there are threads, it is not handed round: nobody waits for what it finds
            # until the tail has been added.
            threads = tl.arange(0, THREADS)
            flags_ptr = arrivals_ptr + tl.zeros_like(threads)
            done = tl.atomic_add(flags_ptr + DONE, 1, threads == 0, sem="relaxed")
            acc = add_tail(
                acc, u_ptr, up_ptr, bias_ptr, gain_ptr, x_ptr, 0, first_n, M, N,
                Q, PAD_Q, TRANSPOSED, HAS_BIAS, HAS_GAIN, False, BLOCK_M, BLOCK_N, BLOCK_Q,
                bias=bias, gain=gain,
            )  # fmt: skip
            offs_n = first_n + tl.arange(0, BLOCK_N)[None, :]
            tl.store(y_ptr + offset(rows, N) + offs_n, cast(acc, dtype), (rows < M) & (offs_n < N))
            last = (threads == 0) & (done == tiles - 1)
            # Nobody draws a ticket or waits any more.
            tl.store(flags_ptr + TICKETS, 0, last)
            tl.store(flags_ptr + LOW, 0, last)
            tl.store(flags_ptr + PUBLISHED, 0, last)
            tl.store(flags_ptr + DONE, 0, last)


SHARES = ["lows", "low_depth", "makers", "splits", "depth"]
KERNELS = variants(decode_kernel, runtime=["M", *SHARES, *RUNTIME])


def constants(
    p: int,
    q: int,
    r: int,
    k: int,
    transposed: bool,
    bias: bool,
    gain: bool,
    store_t: bool,
    mix: int,
    config: TileConfig,
) -> dict[str, int]:
    """The compile-time arguments of a launch."""
    block_p = padded(p) if padded(p) <= WHOLE else 64
    own = row_blocks(p, q, r, config.own_cores) if mix else (1, block_p, 16)
    return {
        **rank_constants(p, q, r),
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias,
        "HAS_GAIN": gain,
        "STORE_T": store_t,
        "EVEN_K": k % config.block_k == 0,
        "MIX": mix,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        # A product takes 16 rows at least; of rows with cores of their own there may be fewer.
        "BLOCK_T": min(16, max(own[0], config.block_m // MAKERS)) if mix else 16,
        **dict(zip(("BLOCK_ROWS", "BLOCK_P", "BLOCK_U"), own, strict=True)),
        "BLOCK_R": min(padded(max(r, 1)), 32),
        # Rows of up that no vector load fetches take a pointer for each element: few at a time.
        "BLOCK_Q": min(padded(q), config.block_k if transposed or q % 16 == 0 else 16),
    }


INPUTS = "x_ptr", "w_ptr", "down_ptr", "left_ptr", "right_ptr", "up_ptr", "bias_ptr", "gain_ptr"


def decode(
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
    """(y, t): what `gemm_tail` gives for the u of `shrink`; t, (M, P), is None if not wanted.

    The operands are as `shrink` and `gemm_tail` take them, with the one `transposed`; M is at most
    the rows of a tile.
    """
    left, right = sides(down, core, transposed)
    tensors, bank = (x, weight, down, left, right, up, bias, gain), pointers(core)
    flags = kind(core), transposed, want_t, choose
    key, addresses = key_of("decode", tensors, *flags, plain=bank)
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
    """The launch of a call of `decode`."""
    (m, k), n = x.shape, weight.shape[0]
    left, right, p, q, r = unpacked(down, core, transposed)
    is_aligned = gemm_aligned(x, weight, (down, left, right, up, bias, gain))
    factor_itemsize = max(tensor.element_size() for tensor in (down, left, right, up))
    itemsizes, ranks = (x.element_size(), factor_itemsize), (padded(p), padded(q))
    by_row = mix(core)
    config = choose(Spec("decode", *itemsizes, is_aligned, *ranks, by_row=by_row > 0), m)
    if m > config.block_m:
        raise ValueError(f"x has {m} rows: a tile of {config} holds {config.block_m}")
    tiles, blocks = cdiv(n, config.block_n), cdiv(k, config.block_k)
    low_depth = cdiv(blocks, lows(tiles, blocks, x.device))
    low_parts = cdiv(blocks, low_depth)  # none without a block
    store_t = want_t or by_row > 0 or (r >= 0 and padded(p) > WHOLE)
    new_t = (m, p), x.dtype
    has = bias is not None, gain is not None
    values = constants(p, q, r, k, transposed, *has, store_t, by_row, config)
    makers = cdiv(m, values["BLOCK_T"])
    depth = cdiv(blocks, splits(tiles, blocks, low_parts + makers, x.device))
    parts = cdiv(blocks, depth)
    if by_row:
        room = 2 * multiprocessors(x.device) - low_parts - tiles * parts
        values["BLOCK_T"] = rows_each(m, values["BLOCK_T"], values["BLOCK_ROWS"], room)
        makers = cdiv(m, values["BLOCK_T"])
    partial = (tiles, parts, config.block_m, config.block_n), sum_dtype(x.dtype)
    partial_low = (low_parts, config.block_m, padded(p)), sum_dtype(x.dtype)
    return Launch(
        KERNELS[is_aligned],
        (low_parts + makers + tiles * parts,),
        (*INPUTS, *POINTERS) if by_row else INPUTS,
        results={"y_ptr": ((m, n), x.dtype), "t_ptr": new_t if want_t else None},
        scratch={
            **({"t_ptr": new_t} if store_t and not want_t else {}),
            "u_ptr": ((m, padded(q)), x.dtype),
            "partial_ptr": partial if parts > 1 else None,
            "partial_low_ptr": partial_low,
        },
        numbers={
            **sizes(core),
            "lows": low_parts,
            "low_depth": low_depth,
            "makers": makers,
            "splits": parts,
            "depth": depth,
            "M": m,
            "N": n,
            "K": k,
            "stride_xm": x.stride(0),
            "stride_xk": x.stride(1),
            "stride_wn": weight.stride(0),
            "stride_wk": weight.stride(1),
        },
        constants={**values, "SPLIT": parts > 1, **config.options()},
        varying=("scale",),
        meets=True,
        device=x.device,
    )
