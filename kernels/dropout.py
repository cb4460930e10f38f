"""dropped: x where a dropout keeps it, and 0 elsewhere, by the bits that a forward has kept.

    dropped[m, k] = x[m, k] if bit k % 8 of bits[m, k // 8] else 0

The gradient of a trained down takes it: nothing else needs x under its mask as a whole.
`drawn_bits` draws the bits again where the forward has not saved them.
"""

from __future__ import annotations

import torch
import triton.language as tl

from .common import (
    aligned,
    byte_ptrs,
    cdiv,
    drawn,
    kept,
    load_bits,
    mask_width,
    offset,
    threshold,
    variants,
)
from .launch import LAUNCHES, Launch, key_of
from .tiles import Choice, Spec


def dropped_kernel(
    x_ptr,
    bits_ptr,
    y_ptr,
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
    bits = load_bits(bits_ptr, first_m, first_k, M, K, BLOCK_M, BLOCK_K)
    x = tl.load(x_ptr + offset(offs_m, stride_xm) + offset(offs_k, stride_xk), inside, other=0.0)
    tl.store(y_ptr + offset(offs_m, K) + offs_k, tl.where(kept(bits), x, 0.0), inside)


def drawn_kernel(
    seed_ptr,
    bits_ptr,
    threshold,
    M,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_m, first_k = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    bytes_at, there = byte_ptrs(bits_ptr, first_m, first_k, M, K, BLOCK_M, BLOCK_K)
    _, bits = drawn(tl.load(seed_ptr), first_m, first_k, threshold, BLOCK_M, BLOCK_K)
    tl.store(bytes_at, bits, there)


KERNELS = variants(dropped_kernel, runtime=["M"])
DRAWING = variants(drawn_kernel, runtime=["M", "K", "threshold", "seed_ptr", "bits_ptr"])[False]


def dropped(x: torch.Tensor, bits: torch.Tensor, choose: Choice) -> torch.Tensor:
    """x (M, K), of any strides, with zeros where it is dropped; not scaled by 1 / (1 - p).

    bits, uint8 (M, mask_width(K)), contiguous, are those of a `shrink` of x, or `drawn_bits`.
    """
    tensors = x, bits
    key, addresses = key_of("dropped", tensors, choose)
    launch = LAUNCHES.get(key) or planned(x, bits, choose)
    (y,) = launch(key, tensors, addresses)
    return y


def planned(x: torch.Tensor, bits: torch.Tensor, choose: Choice) -> Launch:
    """The launch of a call of `dropped`."""
    (m, k), size = x.shape, x.element_size()
    is_aligned = x.stride(1) == 1 and aligned((x, bits), (k, x.stride(0)))
    config = choose(Spec("dropped", size, size, is_aligned, 16, 16, True), m)
    return Launch(
        KERNELS[is_aligned],
        (cdiv(m, config.block_m), cdiv(k, config.block_k)),
        ("x_ptr", "bits_ptr"),
        results={"y_ptr": ((m, k), x.dtype)},
        numbers={"M": m, "K": k, "stride_xm": x.stride(0), "stride_xk": x.stride(1)},
        constants={"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, **config.options()},
        device=x.device,
    )


def drawn_bits(
    seed: torch.Tensor, dropout_p: float, m: int, k: int, choose: Choice
) -> torch.Tensor:
    """The mask that `shrink` draws from the seed for an x (m, k): uint8 (m, mask_width(k)).

    Bit i of the byte [m, j] says whether x[m, 8·j + i] is kept; beyond k the bits mean nothing.
    """
    key, addresses = key_of("drawn", (seed,), dropout_p, m, k, choose)
    launch = LAUNCHES.get(key) or planned_draw(seed.device, dropout_p, m, k, choose)
    (bits,) = launch(key, (seed,), addresses)
    return bits


def planned_draw(device: torch.device, dropout_p: float, m: int, k: int, choose: Choice) -> Launch:
    """The launch of a call of `drawn_bits`; it takes the tile of `dropped`."""
    config = choose(Spec("dropped", 1, 1, False, 16, 16, True), m)
    return Launch(
        DRAWING,
        (cdiv(m, config.block_m), cdiv(k, config.block_k)),
        ("seed_ptr",),
        results={"bits_ptr": ((m, mask_width(k)), torch.uint8)},
        numbers={"threshold": threshold(dropout_p), "M": m, "K": k},
        constants={"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, **config.options()},
        device=device,
    )
