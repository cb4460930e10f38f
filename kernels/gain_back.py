"""gain_back: the way back through a gain over outputs, in one pass over dy and y.

    dz[m, n] = dy[m, n] · gain[n]
    dgain[n] = Σ over m of dy[m, n] · (y[m, n] - bias[n]) / gain[n]

y is the result of the forward: y = gain ⊙ z + bias, and z is nowhere else. The rows are split over
programs; the last of a block of columns to arrive adds their sums in the order of their index, so
the result is bitwise reproducible. Where gain is 0, dgain is NaN.
"""

from __future__ import annotations

import torch
import triton.language as tl

from .common import (
    N_ARRIVALS,
    accumulator,
    aligned,
    cast,
    cdiv,
    gathered,
    multiprocessors,
    offset,
    sum_dtype,
    variants,
)
from .launch import LAUNCHES, Launch, key_of
from .tiles import Choice, Spec

PROGRAMS = 4  # for each multiprocessor, about, as far as there are rows
MAX_SPLITS = 64


def gain_back_kernel(
    dy_ptr,
    y_ptr,
    gain_ptr,
    bias_ptr,
    dz_ptr,
    dgain_ptr,
    partial_ptr,
    arrivals_ptr,
    rows,
    M,
    N,
    stride_dm,
    stride_dn,
    HAS_BIAS: tl.constexpr,
    WANT_GAIN: tl.constexpr,
    SPLIT: tl.constexpr,  # the rows, over programs
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    split, splits, block = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    there = offs_n < N
    gain = tl.load(gain_ptr + offs_n, there, other=1.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, there, other=0.0).to(gain.dtype)
    sums = tl.zeros((BLOCK_M, BLOCK_N), accumulator(dtype))
    end = min(M, (split + 1) * rows)
    for m in range(split * rows, end, BLOCK_M):
        offs_m = (m + tl.arange(0, BLOCK_M))[:, None]
        inside = (offs_m < end) & there[None, :]
        dy_ptrs = dy_ptr + offset(offs_m, stride_dm) + offset(offs_n[None, :], stride_dn)
        dy = tl.load(dy_ptrs, inside, other=0.0).to(gain.dtype)
        flat = offset(offs_m, N) + offs_n[None, :]
        tl.store(dz_ptr + flat, cast(dy * gain[None, :], dtype), inside)
        if WANT_GAIN:
            z = tl.load(y_ptr + flat, inside, other=0.0).to(gain.dtype)
            if HAS_BIAS:
                z -= bias[None, :]
            sums += dy * z
    if WANT_GAIN:
        dgain, whole = tl.sum(sums, 0), True
        if SPLIT:  # the sums lie as (splits, blocks of columns, BLOCK_N)
            width = tl.num_programs(1) * BLOCK_N
            dgain, whole = gathered(
                dgain, partial_ptr + offs_n, split, splits, width, arrivals_ptr + block
            )
        if whole:
            tl.store(dgain_ptr + offs_n, dgain / gain, there)


KERNELS = variants(gain_back_kernel, runtime=["M", "rows"])


def gain_back(
    dy: torch.Tensor,
    y: torch.Tensor | None,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
    choose: Choice,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dz (M, N), contiguous, in dy's dtype; dgain (N,), in gain's): the latter None without y.

    dy (M, N) of any strides; y (M, N), of dy's dtype; gain (N,), of the sums' dtype: float32, or
    float64 beside a dy of it; bias (N,) or None. All but dy contiguous; M and N at least 1.
    """
    tensors = dy, y, gain, bias
    key, addresses = key_of("gain_back", tensors, choose)
    launch = LAUNCHES.get(key) or planned(dy, y, gain, bias, choose)
    dz, dgain = launch(key, tensors, addresses)
    return dz, dgain


def planned(
    dy: torch.Tensor,
    y: torch.Tensor | None,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
    choose: Choice,
) -> Launch:
    """The launch of a call of `gain_back`."""
    (m, n), size = dy.shape, dy.element_size()
    is_aligned = dy.stride(1) == 1 and aligned((dy, y, gain, bias), (n, dy.stride(0)))
    config = choose(Spec("gain_back", size, gain.element_size(), is_aligned, 16, 16), m)
    blocks, most = cdiv(n, config.block_k), cdiv(m, config.block_m)
    wanted = cdiv(PROGRAMS * multiprocessors(dy.device), blocks)
    splits = max(1, min(most, MAX_SPLITS, wanted)) if y is not None else most
    rows = cdiv(most, splits) * config.block_m
    splits = cdiv(m, rows)
    if blocks > N_ARRIVALS and y is not None:  # no counter for each of them
        splits, rows = 1, most * config.block_m
    split = y is not None and splits > 1
    partial = (splits, blocks, config.block_k), sum_dtype(dy.dtype)
    return Launch(
        KERNELS[is_aligned],
        (splits, blocks),
        ("dy_ptr", "y_ptr", "gain_ptr", "bias_ptr"),
        results={
            "dz_ptr": ((m, n), dy.dtype),
            "dgain_ptr": ((n,), gain.dtype) if y is not None else None,
        },
        scratch={"partial_ptr": partial if split else None},
        numbers={
            "rows": rows,
            "M": m,
            "N": n,
            "stride_dm": dy.stride(0),
            "stride_dn": dy.stride(1),
        },
        constants={
            "HAS_BIAS": bias is not None,
            "WANT_GAIN": y is not None,
            "SPLIT": split,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_k,
            **config.options(),
        },
        meets=True,
        device=dy.device,
    )
