"""dropped: x where dropout keeps it, and 0 elsewhere, by the mask that `shrink` sees (`kept`).

    dropped[m, k] = x[m, k] if kept(seed, m, k) else 0

For the gradient of a trained down, the one thing that needs x under its mask as a whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import aligned, kept, offset, threshold, variants
from .tiles import Choice, Spec


def dropped_kernel(
    x_ptr,
    y_ptr,
    seed_ptr,
    threshold,
    M,
    K,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_m, first_k = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    offs_m = (first_m + tl.arange(0, BLOCK_M))[:, None]
    offs_k = (first_k + tl.arange(0, BLOCK_K))[None, :]
    inside = (offs_m < M) & (offs_k < K)
    x = tl.load(x_ptr + offset(offs_m, stride_xm) + offset(offs_k, stride_xk), inside, other=0.0)
    x = tl.where(kept(seed_ptr, first_m, first_k, threshold, BLOCK_M, BLOCK_K), x, 0.0)
    tl.store(y_ptr + offset(offs_m, K) + offs_k, x, inside)


KERNELS = variants(dropped_kernel, runtime=["M", "threshold", "seed_ptr"])


def dropped(x: torch.Tensor, seed: torch.Tensor, dropout_p: float, choose: Choice) -> torch.Tensor:
    """x (M, K), of any strides, with zeros where it is dropped; not scaled by 1 / (1 - p)."""
    (m, k), y = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    is_aligned = x.stride(1) == 1 and aligned((x, y), (k, x.stride(0)))
    config = choose(
        Spec("dropped", x.element_size(), x.element_size(), is_aligned, 16, 16, True), m
    )
    KERNELS[is_aligned][(triton.cdiv(m, config.block_m), triton.cdiv(k, config.block_k))](
        x,
        y,
        seed,
        threshold(dropout_p),
        m,
        k,
        *x.stride(),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        **config.options(),
    )
    return y
