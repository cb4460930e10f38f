"""`gemm_tail` for Hopper, in Gluon: the rank tail goes through the same ring of stages as K.

    y = gain ⊙ (x·Wᵀ + u·upᵀ) + bias        x (M, K)   W (N, K)   u (M, Q)   up (N, Q)   y (M, N)
                                            bias (N,)   gain (N,), or 1

A tile is as many steps as BLOCK_K goes into K, and then as many as BLOCK_Q goes into PAD_Q, in
which u and up lie where x and W did. So for the warps that multiply, the tail is only a few more
steps, and the copies of the next tile start while this one is being stored.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import cdiv, multiprocessors, rows_of
from .hopper import (
    BUFFERS,
    GROUPS,
    ROWS,
    advance,
    barriers,
    behind,
    buffers,
    constants,
    copy,
    copy_step,
    describe,
    here,
    in_place_of,
    multiply,
    right,
    store,
    sums_layout,
    tile_order,
)
from .launch import Launch
from .tiles import TileConfig, padded


@gluon.jit
def bring(
    x_desc, w_desc, u_desc, up_desc, x_bufs, w_bufs, ready, empty, M, N, K,
    TAIL: gl.constexpr, W_ROWS_ARE_K: gl.constexpr, TRANSPOSED: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """The job of one warp: start the copies of every step of every tile."""
    M, N, K = here(M), here(N), here(K)
    first_tile, programs = here(gl.program_id(0)), here(gl.num_programs(0))
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    index = 0
    phase = 0
    for tile in range(first_tile, tiles_m * tiles_n, programs):
        pid_m, pid_n = tile_order(tile, tiles_m, tiles_n, GROUP_M)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        for step in range(steps):
            bar = ready.index(index)
            mbarrier.wait(empty.index(index), phase ^ 1)
            mbarrier.expect(bar, GROUPS * x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            k = step * BLOCK_K
            copy_step(x_desc, w_desc, m, n, k, W_ROWS_ARE_K, bar, x_bufs, w_bufs, index)
            index, phase = advance(index, phase, STAGES)
        for step in gl.static_range(TAIL):
            bar = ready.index(index)
            mbarrier.wait(empty.index(index), phase ^ 1)
            mbarrier.expect(bar, GROUPS * u_desc.block_type.nbytes + up_desc.block_type.nbytes)
            for group in gl.static_range(GROUPS):
                u_buf = in_place_of(x_bufs.index(index * GROUPS + group), u_desc)
                copy(u_desc, m + group * ROWS, step * BLOCK_Q, False, bar, u_buf)
            up_buf = in_place_of(w_bufs.index(index), up_desc)
            copy(up_desc, n, step * BLOCK_Q, TRANSPOSED, bar, up_buf)
            index, phase = advance(index, phase, STAGES)


@gluon.jit
def make(
    u_desc, up_desc, y_desc, bias_ptr, gain_ptr, x_bufs, w_bufs, y_bufs, ready, empty, M, N, K,
    GROUP: gl.constexpr, TAIL: gl.constexpr, W_ROWS_ARE_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_GAIN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The job of a group of warps: their 64 rows of every tile."""
    M, N, K = here(M), here(N), here(K)
    first_tile, programs = here(gl.program_id(0)), here(gl.num_programs(0))
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, sums_layout(BLOCK_N))
    index = 0
    phase = 0
    for tile in range(first_tile, tiles_m * tiles_n, programs):
        pid_m, pid_n = tile_order(tile, tiles_m, tiles_n, GROUP_M)
        acc, index, phase = multiply(
            acc, x_bufs, w_bufs, ready, empty, index, phase, steps, GROUP, W_ROWS_ARE_K, STAGES
        )
        for _ in gl.static_range(TAIL):
            mbarrier.wait(ready.index(index), phase)
            u = in_place_of(x_bufs.index(index * GROUPS + GROUP), u_desc)
            up = right(in_place_of(w_bufs.index(index), up_desc), TRANSPOSED)
            acc = warpgroup_mma(u, up, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(behind(index, STAGES)), count=1)
            index, phase = advance(index, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(behind(index, STAGES)), count=1)
        m, n = pid_m * BLOCK_M + GROUP * ROWS, pid_n * BLOCK_N
        store(acc, y_desc, bias_ptr, gain_ptr, y_bufs, m, n, N, GROUP, HAS_BIAS, HAS_GAIN, 0, PARTS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K"])
def gemm_tail_hopper_kernel(
    x_desc,
    w_desc,
    u_desc,  # None, as up_desc, where there is no tail
    up_desc,
    bias_ptr,
    gain_ptr,
    y_desc,
    M,
    N,
    K,
    TAIL: gl.constexpr,  # steps of it
    W_ROWS_ARE_K: gl.constexpr,  # W lies as (K, N): its rows are what is summed over
    TRANSPOSED: gl.constexpr,  # up lies as (Q, N)
    HAS_BIAS: gl.constexpr,
    HAS_GAIN: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,  # of a tile of y, as it is stored
    GROUP_M: gl.constexpr,
    MAKER_REGISTERS: gl.constexpr,
    BRINGER_REGISTERS: gl.constexpr,
):
    x_bufs, w_bufs = buffers(STAGES * GROUPS, x_desc), buffers(STAGES, w_desc)
    y_bufs = buffers(GROUPS * BUFFERS, y_desc)
    ready, empty = barriers(STAGES, 1), barriers(STAGES, GROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (make, (
                u_desc, up_desc, y_desc, bias_ptr, gain_ptr, x_bufs, w_bufs, y_bufs, ready, empty,
                M, N, K, 0, TAIL, W_ROWS_ARE_K, TRANSPOSED, HAS_BIAS, HAS_GAIN, BLOCK_M, BLOCK_N,
                BLOCK_K, STAGES, PARTS, GROUP_M,
            )),
            (make, (
                u_desc, up_desc, y_desc, bias_ptr, gain_ptr, x_bufs, w_bufs, y_bufs, ready, empty,
                M, N, K, 1, TAIL, W_ROWS_ARE_K, TRANSPOSED, HAS_BIAS, HAS_GAIN, BLOCK_M, BLOCK_N,
                BLOCK_K, STAGES, PARTS, GROUP_M,
            )),
            (bring, (
                x_desc, w_desc, u_desc, up_desc, x_bufs, w_bufs, ready, empty, M, N, K, TAIL,
                W_ROWS_ARE_K, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_Q, STAGES, GROUP_M,
            )),
        ],
        [4, 1],
        [MAKER_REGISTERS, BRINGER_REGISTERS],
    )  # fmt: skip


# No dropout, so no seed.
INPUTS = ("x_desc", "w_desc", "u_desc", "up_desc", "bias_ptr", "", "gain_ptr")
REGISTERS = {"MAKER_REGISTERS": 240, "BRINGER_REGISTERS": 24}  # of a thread


def planned(
    x: torch.Tensor,
    weight: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    transposed: bool,
    config: TileConfig,
    gain: torch.Tensor | None = None,
) -> Launch:
    """The launch of a call of `gemm_tail` without dropout, its operands `is_bulk`."""
    (m, k), n = x.shape, weight.shape[0]
    q = 0 if up is None else up.shape[0 if transposed else 1]
    block_q = min(padded(q), config.block_k)
    rows, way = ROWS.value, -1 if transposed else 1
    blocks: dict[str, Any] = {
        "x_desc": (x.shape, x.stride(), [rows, config.block_k]),
        "w_desc": rows_of(weight, [config.block_n, config.block_k]),
        "y_desc": ((m, n), (n, 1), [rows, config.block_n // config.parts]),
    }
    if up is not None:
        wide = padded(q)
        blocks["u_desc"] = (m, wide), (wide, 1), [rows, block_q]
        blocks["up_desc"] = up.shape, (up.shape[1], 1), [config.block_n, block_q][::way]
    return Launch(
        gemm_tail_hopper_kernel,
        (min(cdiv(m, config.block_m) * cdiv(n, config.block_n), multiprocessors(x.device)),),
        INPUTS,
        results={"y_desc": ((m, n), x.dtype)},
        numbers={"M": m, "N": n, "K": k},
        constants={
            "TAIL": 0 if up is None else padded(q) // block_q,
            "W_ROWS_ARE_K": weight.stride(1) != 1,
            "TRANSPOSED": transposed,
            "HAS_BIAS": bias is not None,
            "HAS_GAIN": gain is not None,
            "BLOCK_Q": block_q,
            **constants(config),
            **REGISTERS,
            **config.options(),
        },
        blocks=blocks,
        describe=describe,
        device=x.device,
    )
