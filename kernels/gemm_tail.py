"""gemm_tail: a GEMM whose K-loop gets a few more steps, the rank tail.

    y = x·Wᵀ + bias + u·upᵀ        x (M, K)   W (N, K)   bias (N,)   u (M, Q)   up (N, Q)   y (M, N)

One fp32 accumulator, one rounding; y is written once and never read. The backward is the same
kernel: dx = dy·W + v·down is gemm_tail(dy, Wᵀ, v, down, transposed).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import accumulator, aligned, cast, dot, offset, runtime, step, tile_order, variants
from .tiles import Choice, Spec, TileConfig, padded


def gemm_tail_kernel(
    x_ptr,
    w_ptr,
    u_ptr,
    up_ptr,
    bias_ptr,
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
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    GROUP_M: tl.constexpr,
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
    acc = tl.zeros((BLOCK_M, BLOCK_N), accumulator(dtype))
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask_m, other=0.0)
            w = tl.load(w_ptrs, mask_n, other=0.0)
        else:
            x = tl.load(x_ptrs, mask_m & (offs_k[None, :] < K - k), other=0.0)
            w = tl.load(w_ptrs, mask_n & (offs_k[:, None] < K - k), other=0.0)
        acc = dot(x, w, acc)
        x_ptrs += step(BLOCK_K, stride_xk)
        w_ptrs += step(BLOCK_K, stride_wk)

    # The rank tail. u is PAD_Q wide and zero beyond Q, so only up needs a mask on Q.
    end = PAD_Q if PAD_Q == BLOCK_Q else runtime(PAD_Q)
    for q in tl.range(0, end, BLOCK_Q, num_stages=1):
        offs_q = q + tl.arange(0, BLOCK_Q)
        if TRANSPOSED:
            up_ptrs = up_ptr + offset(offs_q[:, None], N) + offs_n[None, :]
        else:
            up_ptrs = up_ptr + offset(offs_n[None, :], Q) + offs_q[:, None]
        u = tl.load(u_ptr + offset(offs_m[:, None], PAD_Q) + offs_q[None, :], mask_m, other=0.0)
        up = tl.load(up_ptrs, mask_n & (offs_q[:, None] < Q), other=0.0)
        acc = dot(u, cast(up, dtype), acc)

    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, offs_n < N, other=0.0)
        acc += bias[None, :].to(acc.dtype)
    y_ptrs = y_ptr + offset(offs_m[:, None], N) + offs_n[None, :]
    tl.store(y_ptrs, cast(acc, dtype), mask_m & mask_n)


KERNELS = variants(gemm_tail_kernel, runtime=["M"])


def constants(q: int, k: int, transposed: bool, bias: bool, config: TileConfig) -> dict[str, int]:
    """The compile-time arguments of a launch."""
    return {
        "Q": q,
        "PAD_Q": padded(q),
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias,
        "EVEN_K": k % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        # Rows of up that no vector load fetches take a pointer for each element: few at a time.
        "BLOCK_Q": min(padded(q), config.block_k if transposed or q % 16 == 0 else 16),
        "GROUP_M": config.group_m,
    }


def gemm_tail(
    x: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    choose: Choice,
) -> torch.Tensor:
    """y = x·weightᵀ + bias + u·upᵀ, of shape (M, N), contiguous, in x's dtype.

    x (M, K) and weight (N, K) of one dtype and any strides; u (M, padded(Q)), zero beyond Q; up
    (N, Q), or (Q, N) if `transposed`, of any float dtype; bias (N,) or None; M, N, K at least 1.
    All but x and weight contiguous.
    """
    m, k = x.shape
    n = weight.shape[0]
    q = up.shape[0 if transposed else 1]
    is_aligned = (
        x.stride(1) == 1
        and 1 in weight.stride()
        and aligned((x, weight, u, up, bias), (n, k, x.stride(0), max(weight.stride())))
    )
    spec = Spec("gemm_tail", x.element_size(), up.element_size(), is_aligned, 16, padded(q))
    config = choose(spec, m)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    KERNELS[is_aligned][grid](
        x,
        weight,
        u,
        up,
        bias,
        y,
        m,
        n,
        k,
        *x.stride(),
        *weight.stride(),
        **constants(q, k, transposed, bias is not None, config),
        **config.options(),
    )
    return y
