"""gemm_tail: a GEMM whose K-loop gets a few more steps, the rank tail.

    y = gain ⊙ (x·Wᵀ + u·upᵀ) + bias        x (M, K)   W (N, K)   u (M, Q)   up (N, Q)   y (M, N)
                                            bias (N,)   gain (N,), or 1

One fp32 accumulator, one rounding; y is written once and never read. The backward is the same
kernel: dx = dy·W + v·down is gemm_tail(dy, Wᵀ, v, down, transposed).

It exists three times: with a program per tile that reads and writes by pointers, for any strides;
persistent, for Hopper and later, where x, W and y go through tensor descriptors (bulk copies by the
tensor memory accelerator) and rows and columns beyond the edge need no masks; and for Hopper alone,
where it can, in Gluon (`gemm_tail_hopper`). u and up are read by pointers in the first two. The
tile says which one it is.
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
    gemm_aligned,
    kept,
    load_bits,
    multiprocessors,
    offset,
    rows_of,
    runtime,
    step,
    tile_order,
    variants,
)
from .launch import LAUNCHES, Launch, key_of
from .tiles import Choice, Spec, TileConfig, is_bulk, padded


@triton.jit
def load_columns(ptr, first_n, N, BLOCK_N: tl.constexpr):
    """The bias or the gain, (BLOCK_N,), from column first_n on, zero beyond N."""
    offs_n = first_n + tl.arange(0, BLOCK_N)
    return tl.load(ptr + offs_n, offs_n < N, other=0.0)


@triton.jit
def add_tail(
    acc,
    u_ptr,
    up_ptr,
    bias_ptr,
    gain_ptr,
    bits,
    first_m,
    first_n,
    M,
    N,
    Q: tl.constexpr,
    PAD_Q: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TF32X3: tl.constexpr = False,
    bias=None,
    gain=None,
):
    """gain ⊙ (acc + u·upᵀ) + bias of one tile; with DROPOUT u·upᵀ only where `bits` keep y's place.

    u is PAD_Q wide and zero beyond Q, so only up needs a mask on Q. Q may be 0: no tail at all. A
    caller that has to wait for u can load `bias` and `gain` before and pass them.
    """
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m[:, None] < M, offs_n[None, :] < N
    tail = tl.zeros((BLOCK_M, BLOCK_N), acc.dtype) if DROPOUT else acc
    end = PAD_Q if PAD_Q <= BLOCK_Q else runtime(PAD_Q)
    for q in tl.range(0, end, BLOCK_Q, num_stages=1):
        offs_q = q + tl.arange(0, BLOCK_Q)
        if TRANSPOSED:
            up_ptrs = up_ptr + offset(offs_q[:, None], N) + offs_n[None, :]
        else:
            up_ptrs = up_ptr + offset(offs_n[None, :], Q) + offs_q[:, None]
        u = tl.load(u_ptr + offset(offs_m[:, None], PAD_Q) + offs_q[None, :], mask_m, other=0.0)
        up = tl.load(up_ptrs, mask_n & (offs_q[:, None] < Q), other=0.0)
        tail = dot(u, cast(up, dtype), tail, TF32X3)
    if DROPOUT:
        acc += tl.where(kept(bits), tail, 0.0)
    else:
        acc = tail
    if HAS_GAIN:
        if gain is None:
            gain = load_columns(gain_ptr, first_n, N, BLOCK_N)
        acc *= gain[None, :].to(acc.dtype)
    if HAS_BIAS:
        if bias is None:
            bias = load_columns(bias_ptr, first_n, N, BLOCK_N)
        acc += bias[None, :].to(acc.dtype)
    return acc


def gemm_tail_kernel(
    x_ptr,
    w_ptr,
    u_ptr,
    up_ptr,
    bias_ptr,
    gain_ptr,
    bits_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    Q: tl.constexpr,
    PAD_Q: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # up lies as (Q, N)
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    DROPOUT: tl.constexpr,  # of what is added to x·Wᵀ, by bits
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    GROUP_M: tl.constexpr,
    TF32X3: tl.constexpr,  # how fp32 is multiplied (`dot`)
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_order(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m[:, None] < M
    mask_n = offs_n[None, :] < N

    x_ptrs = x_ptr + offset(offs_m[:, None], stride_xm) + offset(offs_k[None, :], stride_xk)
    w_ptrs = w_ptr + offset(offs_n[None, :], stride_wn) + offset(offs_k[:, None], stride_wk)
    bits = 0
    if DROPOUT:  # of this tile: there by the time that the loop is done
        bits = load_bits(bits_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), accumulator(dtype))
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask_m, other=0.0)
            w = tl.load(w_ptrs, mask_n, other=0.0)
        else:
            x = tl.load(x_ptrs, mask_m & (offs_k[None, :] < K - k), other=0.0)
            w = tl.load(w_ptrs, mask_n & (offs_k[:, None] < K - k), other=0.0)
        acc = dot(x, w, acc, TF32X3)
        x_ptrs += step(BLOCK_K, stride_xk)
        w_ptrs += step(BLOCK_K, stride_wk)

    acc = add_tail(
        acc, u_ptr, up_ptr, bias_ptr, gain_ptr, bits, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N,
        Q, PAD_Q, TRANSPOSED, HAS_BIAS, HAS_GAIN, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_Q, TF32X3,
    )  # fmt: skip
    y_ptrs = y_ptr + offset(offs_m[:, None], N) + offs_n[None, :]
    tl.store(y_ptrs, cast(acc, dtype), mask_m & mask_n)


KERNELS = variants(gemm_tail_kernel, runtime=["M"])


@triton.jit
def split_columns(x):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def scaled(acc, bias_ptr, gain_ptr, first_n, N, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr):
    """gain ⊙ acc + bias of columns from first_n on."""
    acc *= load_columns(gain_ptr, first_n, N, BLOCK_N)[None, :].to(acc.dtype)
    if HAS_BIAS:
        acc += load_columns(bias_ptr, first_n, N, BLOCK_N)[None, :].to(acc.dtype)
    return acc


@triton.jit(do_not_specialize=["M"])
def gemm_tail_persistent_kernel(
    x_desc,
    w_desc,
    u_ptr,
    up_ptr,
    bias_ptr,
    gain_ptr,
    bits_ptr,
    y_desc,
    M,
    N,
    K,
    Q: tl.constexpr,
    PAD_Q: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # up lies as (Q, N)
    W_ROWS_ARE_K: tl.constexpr,  # W lies as (K, N): its rows are what is summed over
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = tile_order(tile, tiles_m, tiles_n, GROUP_M)
        first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        if DROPOUT:
            bits = load_bits(bits_ptr, first_m, first_n, M, N, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), accumulator(dtype))
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([first_m, k])
            w = w_desc.load([k, first_n]) if W_ROWS_ARE_K else w_desc.load([first_n, k]).T
            acc = dot(x, w, acc)

        # y is stored in parts: the tile as a whole would take the shared memory of a stage. With
        # dropout the tail has sums of its own, and those of a quarter are all that fits.
        # A gain beside a whole tile's sums takes registers that sm_100 lacks.
        LATE: tl.constexpr = HAS_GAIN and not DROPOUT
        if not DROPOUT:
            acc = add_tail(
                acc, u_ptr, up_ptr, bias_ptr, gain_ptr, 0, first_m, first_n, M, N,
                Q, PAD_Q, TRANSPOSED, HAS_BIAS and not LATE, False, False, BLOCK_M, BLOCK_N,
                BLOCK_Q,
            )  # fmt: skip
        halves = split_columns(acc)
        if DROPOUT:
            bits_of = split_columns(bits)
        for i in tl.static_range(2):
            column = first_n + i * (BLOCK_N // 2)
            if DROPOUT:
                quarters, parts = split_columns(halves[i]), split_columns(bits_of[i])
                for j in tl.static_range(2):
                    part = add_tail(
                        quarters[j], u_ptr, up_ptr, bias_ptr, gain_ptr, parts[j],
                        first_m, column + j * (BLOCK_N // 4), M, N, Q, PAD_Q, TRANSPOSED,
                        HAS_BIAS, HAS_GAIN, True, BLOCK_M, BLOCK_N // 4, BLOCK_Q,
                    )  # fmt: skip
                    y_desc.store([first_m, column + j * (BLOCK_N // 4)], cast(part, dtype))
            elif LATE:
                part = scaled(halves[i], bias_ptr, gain_ptr, column, N, HAS_BIAS, BLOCK_N // 2)
                y_desc.store([first_m, column], cast(part, dtype))
            else:
                y_desc.store([first_m, column], cast(halves[i], dtype))


def constants(
    q: int, k: int, transposed: bool, bias: bool, gain: bool, dropout: bool, config: TileConfig
) -> dict[str, int]:
    """The compile-time arguments of a launch."""
    # Rows of up that no vector load fetches take a pointer for each element: few at a time. Beside
    # many sums there are registers for 64, and of a masked tail in a loop over Q for half as many.
    block_q = min(config.block_k, 64 if config.persistent else config.block_k)
    block_q = block_q if transposed or q % 16 == 0 else 16
    if dropout and config.persistent and padded(q) > block_q:
        block_q //= 2
    return {
        "Q": q,
        "PAD_Q": padded(q) if q else 0,
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias,
        "HAS_GAIN": gain,
        "DROPOUT": dropout,
        "EVEN_K": k % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_Q": min(padded(q), block_q),
        "GROUP_M": config.group_m,
        "TF32X3": config.tf32x3,
    }


INPUTS = ("x_ptr", "w_ptr", "u_ptr", "up_ptr", "bias_ptr", "bits_ptr", "gain_ptr")
INPUTS_PERSISTENT = ("x_desc", "w_desc", *INPUTS[2:])


def gemm_tail(
    x: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor | None,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    transposed: bool,
    bits: torch.Tensor | None,
    choose: Choice,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = gain ⊙ (x·weightᵀ + u·upᵀ) + bias, of shape (M, N), contiguous, in x's dtype.

    x (M, K) and weight (N, K) of one dtype and any strides; u (M, padded(Q)), zero beyond Q; up
    (N, Q), or (Q, N) if `transposed`, of any float dtype; bias (N,) or None; gain (N,), of the
    sums' dtype, or None for 1; M, N, K at least 1.
    All but x and weight contiguous. With `bits`, the mask of a `shrink` of an x of y's shape, uint8
    (M, mask_width(N)), u·upᵀ is added only where that x is kept. Without u and up it is the base
    GEMM by itself, which the rest of the layer is measured by.
    """
    if u is None or up is None:
        u = up = None
    tensors = x, weight, u, up, bias, bits, gain
    key, addresses = key_of("gemm_tail", tensors, transposed, choose)
    launch = LAUNCHES.get(key) or planned(x, weight, u, up, bias, transposed, bits, choose, gain)
    (y,) = launch(key, tensors, addresses)
    return y


def planned(
    x: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor | None,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    transposed: bool,
    bits: torch.Tensor | None,
    choose: Choice,
    gain: torch.Tensor | None,
) -> Launch:
    """The launch of a call of `gemm_tail`."""
    (m, k), n = x.shape, weight.shape[0]
    q = 0 if up is None else up.shape[0 if transposed else 1]
    masked, is_aligned = bits is not None, gemm_aligned(x, weight, (u, up, bias, bits, gain))
    itemsizes = x.element_size(), (weight if up is None else up).element_size()
    bulk = is_bulk(x, weight, *(() if u is None or up is None else (u, up)))
    spec = Spec("gemm_tail", *itemsizes, is_aligned, 16, padded(q), masked, n=n, bulk=bulk)
    config = choose(spec, m)
    if config.hopper:
        from . import gemm_tail_hopper

        return gemm_tail_hopper.planned(x, weight, up, bias, transposed, config, gain)
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    has = bias is not None, gain is not None
    values = constants(q, k, transposed, *has, masked, config)
    unread = *(("u_ptr", "up_ptr") if up is None else ()), *(() if masked else ("bits_ptr",))
    numbers = {"M": m, "N": n, "K": k}
    new_y = (m, n), x.dtype
    if config.persistent:
        del values["EVEN_K"], values["TF32X3"]
        block_x, block_w = [config.block_m, config.block_k], [config.block_n, config.block_k]
        block_y = [config.block_m, config.block_n // (4 if masked else 2)]
        return Launch(
            gemm_tail_persistent_kernel,
            (min(tiles, multiprocessors(x.device)),),
            INPUTS_PERSISTENT,
            results={"y_desc": new_y},
            numbers=numbers,
            constants={
                "W_ROWS_ARE_K": weight.stride(1) != 1,
                **values,
                **config.options(),
            },
            blocks={
                "x_desc": (x.shape, x.stride(), block_x),
                "w_desc": rows_of(weight, block_w),
                "y_desc": ((m, n), (n, 1), block_y),
            },
            unread=unread,
            device=x.device,
        )
    strides = {
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
    }
    return Launch(
        KERNELS[is_aligned],
        (tiles,),
        INPUTS,
        results={"y_ptr": new_y},
        numbers=numbers | strides,
        constants=values | config.options(),
        unread=unread,
        device=x.device,
    )
