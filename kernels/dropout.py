"""dropped: x where dropout keeps it, and 0 elsewhere, by the mask that `shrink` sees (`kept`).

    dropped[m, k] = x[m, k] if kept(seed, m, k) else 0

For the gradient of a trained down, the one thing that needs x under its mask as a whole.
"""

from __future__ import annotations

import torch
import triton.language as tl

from .common import aligned, cdiv, kept, offset, threshold, variants
from .launch import LAUNCHES, Launch, key_of
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
    tensors = x, seed
    key, addresses = key_of("dropped", tensors, dropout_p, choose)
    launch = LAUNCHES.get(key) or planned(x, dropout_p, choose)
    (y,) = launch(key, tensors, addresses)
    return y


def planned(x: torch.Tensor, dropout_p: float, choose: Choice) -> Launch:
    """The launch of a call of `dropped`."""
    (m, k), size = x.shape, x.element_size()
    is_aligned = x.stride(1) == 1 and aligned((x,), (k, x.stride(0)))
    config = choose(Spec("dropped", size, size, is_aligned, 16, 16, True), m)
    return Launch(
        KERNELS[is_aligned],
        (cdiv(m, config.block_m), cdiv(k, config.block_k)),
        ("x_ptr", "seed_ptr"),
        results={"y_ptr": ((m, k), x.dtype)},
        numbers={
            "threshold": threshold(dropout_p),
            "M": m,
            "K": k,
            "stride_xm": x.stride(0),
            "stride_xk": x.stride(1),
        },
        constants={"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, **config.options()},
        device=x.device,
    )
