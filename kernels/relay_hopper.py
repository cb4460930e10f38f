"""`relay` for Hopper, in Gluon: the whole layer in one launch, for many rows.

    t = x·downᵀ    u = scale · t · core    y = gain ⊙ (x·Wᵀ + u·upᵀ) + bias

    x (M, K)   W (N, K)   down (P, K)   core (P, Q), or left (P, R)·right (R, Q), or 1   up (N, Q)
    or a diagonal (P,), or a core for each row (`relay_rows_hopper`)

The tiles of y's first column, which come before all others, multiply x by down as well, from the x
that they have brought anyway. Each group of warps rounds its 64 rows of t, forms u of them, stores
both, and raises a flag; every other tile needs u only for its tail, after the K-loop. So x is read
no more often than by the bare GEMM.

Besides those of `hopper`, one more warp has a job: `hand_out` puts the core into shared memory, and
for each tile of another column waits for the flags and brings u, up to a tile ahead, so that those
who multiply never poll. u is read by ordinary loads: bulk copies are not ordered by the flag.

Nobody waits for ever. Tiles of the first column wait for nobody, and a program makes its own of
them before it makes others. All programs run at the same time, or the launch is refused.

Two flags for a row of tiles lie in `arrivals`. A group that has made u adds one to its own, each
tile that has seen it one more; the last sets it to zero.
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
from .factors import unpacked
from .hopper import (
    BUFFERS,
    GROUPS,
    ROWS,
    advance,
    barriers,
    behind,
    buffers,
    constants,
    describe,
    here,
    in_place_of,
    job_barrier,
    multiply,
    right,
    store,
    sums_layout,
)
from .launch import Launch
from .relay_rows_hopper import store_u_of_rows
from .relay_warps_hopper import bring, first_column_first, halves, hand_out
from .rows import POINTERS, RUNTIME, mix, sizes
from .tiles import TileConfig, padded

Core = Any  # a matrix, a pair of them, or None; or rows as `rows` takes them


@gluon.jit
def now(x):
    """The same 16-bit numbers, rounded here.

    What is rounded later reads the sums while other products run, and these then wait each time.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
    )


@gluon.jit
def multiply_both(
    acc, x_bufs, w_bufs, down_bufs, ready, empty, index, phase, steps, GROUP: gl.constexpr,
    W_ROWS_ARE_K: gl.constexpr, TRANSPOSED: gl.constexpr, PAD_P: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(x·Wᵀ, x·downᵀ, the stage after them, its phase), all steps done and their stages free."""
    low = gl.zeros([ROWS, PAD_P], gl.float32, sums_layout(PAD_P))
    mbarrier.wait(ready.index(index), phase)
    x, w = x_bufs.index(index * GROUPS + GROUP), right(w_bufs.index(index), W_ROWS_ARE_K)
    down = right(down_bufs.index(index), TRANSPOSED)
    low = warpgroup_mma(x, down, low, use_acc=False, is_async=True)
    acc = warpgroup_mma(x, w, acc, use_acc=False, is_async=True)
    acc, low = warpgroup_mma_wait(2, deps=[acc, low])
    index, phase = advance(index, phase, STAGES)
    for _ in range(1, steps):
        mbarrier.wait(ready.index(index), phase)
        x, w = x_bufs.index(index * GROUPS + GROUP), right(w_bufs.index(index), W_ROWS_ARE_K)
        down = right(down_bufs.index(index), TRANSPOSED)
        low = warpgroup_mma(x, down, low, is_async=True)
        acc = warpgroup_mma(x, w, acc, is_async=True)
        acc, low = warpgroup_mma_wait(2, deps=[acc, low])  # both of the step before are done
        mbarrier.arrive(empty.index(behind(index, STAGES)), count=1)
        index, phase = advance(index, phase, STAGES)
    acc, low = warpgroup_mma_wait(0, deps=[acc, low])
    mbarrier.arrive(empty.index(behind(index, STAGES)), count=1)
    return acc, low, index, phase


@gluon.jit
def matrix(core_bufs, CHUNKS: gl.constexpr, FIRST: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The core, or one of its halves, as the right side of a product: (P, Q)."""
    dtype: gl.constexpr = core_bufs.dtype
    shape: gl.constexpr = [CHUNKS * core_bufs.shape[1], core_bufs.shape[2]]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    return right(core_bufs.index(FIRST)._reinterpret(dtype, shape, layout), not TRANSPOSED)


@gluon.jit
def through_core(
    t, core_bufs, core_ready, PAD_Q: gl.constexpr, SPLIT: gl.constexpr, CHUNKS: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """t·core in fp32. A core that is no matrix of t's dtype is multiplied as two of bf16.

    As `dot_mixed` of kernels/common.py: to 2⁻¹⁷ of each product. If the small terms are not finite,
    then t or the core is not, and the product of the large ones says what comes of it.
    """
    layout: gl.constexpr = sums_layout(PAD_Q)
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    sums = gl.zeros([ROWS, PAD_Q], gl.float32, layout)
    mbarrier.wait(core_ready.index(0), 0)  # it comes once, and stays
    core = matrix(core_bufs, CHUNKS, 0, TRANSPOSED)
    if SPLIT:
        core_small = matrix(core_bufs, CHUNKS, CHUNKS, TRANSPOSED)
        if t.dtype == gl.bfloat16:
            large = gl.convert_layout(t, operand)
            sums = warpgroup_mma(large, core_small, sums, use_acc=False, is_async=True)
        else:
            t_large, t_small = halves(t.to(gl.float32))
            large, small = gl.convert_layout(t_large, operand), gl.convert_layout(t_small, operand)
            sums = warpgroup_mma(large, core_small, sums, use_acc=False, is_async=True)
            sums = warpgroup_mma(small, core, sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=[sums])
        sums = gl.where(gl.abs(sums) < float("inf"), sums, 0.0)
        sums = warpgroup_mma(large, core, sums, is_async=True)
    else:
        operand_t = gl.convert_layout(t, operand)
        sums = warpgroup_mma(operand_t, core, sums, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[sums])


@gluon.jit
def make(
    up_desc, y_desc, left_ptr, right_ptr, bank, bias_ptr, gain_ptr, t_ptr, v_ptr, u_ptr, flags_ptr,
    x_bufs, w_bufs, down_bufs, core_bufs, u_bufs, y_bufs, ready, empty, core_ready, u_ready,
    u_empty, scale, M, N, K, GROUP: gl.constexpr, P: gl.constexpr, Q: gl.constexpr, R: gl.constexpr,
    PAD_P: gl.constexpr, PAD_Q: gl.constexpr, PAD_R: gl.constexpr, MIX: gl.constexpr,
    SPLIT: gl.constexpr, CHUNKS: gl.constexpr, W_ROWS_ARE_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    STORE_T: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_GAIN: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """The job of a group of warps: their 64 rows of every tile, and in the first column t and u."""
    M, N, K = here(M), here(N), here(K)
    first_tile, programs = here(gl.program_id(0)), here(gl.num_programs(0))
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    dtype: gl.constexpr = up_desc.dtype
    layout: gl.constexpr = sums_layout(BLOCK_N)
    layout_t: gl.constexpr = sums_layout(PAD_P)
    layout_u: gl.constexpr = sums_layout(PAD_Q)
    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    index = 0
    phase = 0
    u_phase = 0
    for tile in range(first_tile, tiles_m * tiles_n, programs):
        pid_m, pid_n = first_column_first(tile, tiles_m, tiles_n, GROUP_M)
        first_m = pid_m * BLOCK_M + GROUP * ROWS
        if pid_n == 0:
            # `here`: of one `index` for both branches ptxas makes wrong code (`gate_sass`).
            acc, low, index, phase = multiply_both(
                acc, x_bufs, w_bufs, down_bufs, ready, empty, here(index), phase, steps,
                GROUP, W_ROWS_ARE_K, TRANSPOSED, PAD_P, STAGES,
            )  # fmt: skip
            rows_t = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout_t))
            offs_p = gl.arange(0, PAD_P, layout=gl.SliceLayout(0, layout_t))
            if P < PAD_P:  # x may hold Inf, and Inf · 0 is NaN
                low = gl.where((offs_p < P)[None, :], low, 0.0)
            t = now(low.to(dtype))
            if STORE_T:
                t_ptrs = t_ptr + first_m.to(gl.int64) * P + rows_t[:, None] * P + offs_p[None, :]
                mask = (first_m + rows_t < M)[:, None] & (offs_p < P)[None, :]
                gl.store(t_ptrs, t, mask=mask)
            rows_u = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout_u))
            offs_q = gl.arange(0, PAD_Q, layout=gl.SliceLayout(0, layout_u))
            u_ptrs = u_ptr + first_m.to(gl.int64) * PAD_Q
            u_ptrs = u_ptrs + rows_u[:, None] * PAD_Q + offs_q[None, :]
            if MIX > 0:
                job_barrier()  # t is stored: it is read again, some rows at a time
                store_u_of_rows(
                    t_ptr, v_ptr, u_ptr, left_ptr, right_ptr, bank, first_m, M, scale,
                    P, Q, R, PAD_P, PAD_Q, PAD_R, TRANSPOSED, MIX,
                )  # fmt: skip
            else:
                if R < 0:
                    u_wide = low * scale
                    if R == -2:
                        diagonal = gl.load(left_ptr + offs_q, mask=offs_q < Q, other=0.0)
                        u_wide = u_wide * diagonal.to(gl.float32)[None, :]
                else:
                    u_wide = scale * through_core(
                        t, core_bufs, core_ready, PAD_Q, SPLIT, CHUNKS, TRANSPOSED
                    )
                if Q < PAD_Q:
                    u_wide = gl.where((offs_q < Q)[None, :], u_wide, 0.0)
                u = u_wide.to(dtype)
                gl.store(u_ptrs, u, mask=(first_m + rows_u < M)[:, None])
            job_barrier()  # all of the group's u is stored
            if tiles_n > 1:  # else nobody would set the flag back
                gl.atomic_add(flags_ptr + GROUPS * pid_m + GROUP, 1, sem="release", scope="gpu")
            if MIX > 0:
                u = gl.load(u_ptrs, mask=(first_m + rows_u < M)[:, None], other=0.0)
            u_operand = gl.convert_layout(u, gl.DotOperandLayout(0, layout, 2))
            mbarrier.wait(ready.index(index), phase)
            up = right(in_place_of(w_bufs.index(index), up_desc), TRANSPOSED)
            acc = warpgroup_mma(u_operand, up, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(index), count=1)
        else:
            acc, index, phase = multiply(
                acc, x_bufs, w_bufs, ready, empty, index, phase, steps, GROUP, W_ROWS_ARE_K, STAGES
            )
            mbarrier.wait(ready.index(index), phase)
            mbarrier.wait(u_ready.index(GROUP), u_phase)
            u_buf = u_bufs.index(GROUP * (ROWS // u_bufs.shape[1]))
            shape: gl.constexpr = [ROWS, PAD_Q]
            whole: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, dtype)
            up = right(in_place_of(w_bufs.index(index), up_desc), TRANSPOSED)
            acc = warpgroup_mma(u_buf._reinterpret(dtype, shape, whole), up, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(behind(index, STAGES)), count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(index), count=1)
            mbarrier.arrive(u_empty.index(GROUP), count=1)
            u_phase = u_phase ^ 1
        index, phase = advance(index, phase, STAGES)
        store(
            acc, y_desc, bias_ptr, gain_ptr, y_bufs, first_m, pid_n * BLOCK_N, N, GROUP, HAS_BIAS,
            HAS_GAIN, 0, PARTS,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", *RUNTIME])
def relay_hopper_kernel(
    x_desc,
    w_desc,
    down_desc,
    left_ptr,
    right_ptr,
    up_desc,
    bias_ptr,
    gain_ptr,
    t_ptr,
    u_ptr,
    y_desc,
    arrivals_ptr,
    v_ptr,
    handles_ptr,
    weights_ptr,
    scales_ptr,
    generations_ptr,
    refused_ptr,
    repeat,
    slots,
    scale,
    M,
    N,
    K,
    P: gl.constexpr,
    Q: gl.constexpr,
    R: gl.constexpr,  # of the pair; 0: the core is the matrix `left`; -1: it is 1; -2: a diagonal
    PAD_P: gl.constexpr,
    PAD_Q: gl.constexpr,
    PAD_R: gl.constexpr,
    MIX: gl.constexpr,  # cores to a row, from the tables `left` and `right`; 0: one for all
    SPLIT: gl.constexpr,  # the core is multiplied as two bf16 matrices
    W_ROWS_ARE_K: gl.constexpr,  # W lies as (K, N): its rows are what is summed over
    TRANSPOSED: gl.constexpr,  # down lies as (K, P), up (Q, N), the core (Q, P) or (Q, R)·(R, P)
    STORE_T: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_GAIN: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,  # of a tile of y, as it is stored
    GROUP_M: gl.constexpr,
    U_ROWS: gl.constexpr,  # of u, and of the core, at a time
    CORE_ROWS: gl.constexpr,
    MAKER_REGISTERS: gl.constexpr,
    BRINGER_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    x_bufs, w_bufs = buffers(STAGES * GROUPS, x_desc), buffers(STAGES, w_desc)
    down_bufs, y_bufs = buffers(STAGES, down_desc), buffers(GROUPS * BUFFERS, y_desc)
    # Chunks of rows, which lie one after the other as the whole would.
    u_bufs = gl.allocate_shared_memory(
        dtype, [BLOCK_M // U_ROWS, U_ROWS, PAD_Q],
        gl.NVMMASharedLayout.get_default_for([U_ROWS, PAD_Q], dtype),
    )  # fmt: skip
    HEIGHT: gl.constexpr = Q if TRANSPOSED else P
    WIDTH: gl.constexpr = P if TRANSPOSED else Q
    CHUNKS: gl.constexpr = (PAD_Q if TRANSPOSED else PAD_P) // CORE_ROWS
    COLUMNS: gl.constexpr = PAD_P if TRANSPOSED else PAD_Q
    core_dtype: gl.constexpr = gl.bfloat16 if SPLIT else dtype
    if R < 0 or MIX > 0:
        core_bufs = u_bufs
    else:
        core_bufs = gl.allocate_shared_memory(
            core_dtype, [2 * CHUNKS if SPLIT else CHUNKS, CORE_ROWS, COLUMNS],
            gl.NVMMASharedLayout.get_default_for([CORE_ROWS, COLUMNS], core_dtype),
        )  # fmt: skip
    ready, empty, core_ready = barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(1, 1)
    u_ready, u_empty = barriers(GROUPS, 1), barriers(GROUPS, 1)
    bank = handles_ptr, weights_ptr, scales_ptr, generations_ptr, refused_ptr, repeat, slots
    fence_async_shared()
    gl.warp_specialize(
        [
            (make, (
                up_desc, y_desc, left_ptr, right_ptr, bank, bias_ptr, gain_ptr, t_ptr, v_ptr,
                u_ptr, arrivals_ptr, x_bufs, w_bufs, down_bufs, core_bufs, u_bufs, y_bufs, ready,
                empty, core_ready, u_ready, u_empty, scale,
                M, N, K, 0, P, Q, R, PAD_P, PAD_Q, PAD_R, MIX, SPLIT, CHUNKS, W_ROWS_ARE_K,
                TRANSPOSED, STORE_T, HAS_BIAS, HAS_GAIN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS,
                GROUP_M,
            )),
            (make, (
                up_desc, y_desc, left_ptr, right_ptr, bank, bias_ptr, gain_ptr, t_ptr, v_ptr,
                u_ptr, arrivals_ptr, x_bufs, w_bufs, down_bufs, core_bufs, u_bufs, y_bufs, ready,
                empty, core_ready, u_ready, u_empty, scale,
                M, N, K, 1, P, Q, R, PAD_P, PAD_Q, PAD_R, MIX, SPLIT, CHUNKS, W_ROWS_ARE_K,
                TRANSPOSED, STORE_T, HAS_BIAS, HAS_GAIN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS,
                GROUP_M,
            )),
            (bring, (
                x_desc, w_desc, down_desc, up_desc, x_bufs, w_bufs, down_bufs, ready, empty, M,
                N, K, W_ROWS_ARE_K, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M,
            )),
            (hand_out, (
                left_ptr, right_ptr, bank, u_ptr, arrivals_ptr, core_bufs, u_bufs, core_ready,
                u_ready, u_empty, M, N, P, Q, R, MIX, HEIGHT, WIDTH, SPLIT, CHUNKS, BLOCK_M,
                BLOCK_N, GROUP_M,
            )),
        ],
        [4, 1, 1],
        [MAKER_REGISTERS, BRINGER_REGISTERS, BRINGER_REGISTERS],
    )  # fmt: skip


INPUTS = "x_desc", "w_desc", "down_desc", "left_ptr", "right_ptr", "up_desc", "bias_ptr", "gain_ptr"
REGISTERS = {"MAKER_REGISTERS": 224, "BRINGER_REGISTERS": 56}  # of a thread


def rows_at_a_time(columns: int, most: int) -> int:
    """The rows of a matrix that one warp moves at a time: 16 numbers to a thread, 32 if narrow."""
    return min(most, 64 if columns == 16 else 512 // columns)


def planned(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    want_t: bool,
    split: bool,
    config: TileConfig,
    gain: torch.Tensor | None = None,
) -> Launch:
    """The launch of a call of `relay`, its operands `is_bulk`."""
    (m, k), n, way = x.shape, weight.shape[0], -1 if transposed else 1
    _, _, p, q, r = unpacked(down, core, transposed)
    rows, pad_p, pad_q = ROWS.value, padded(p), padded(q)
    by_row, new_t = mix(core), ((m, p), x.dtype)
    pair_by_row = by_row > 0 and r > 0
    return Launch(
        relay_hopper_kernel,
        (min(cdiv(m, config.block_m) * cdiv(n, config.block_n), multiprocessors(x.device)),),
        (*INPUTS, *POINTERS) if by_row else INPUTS,
        results={"y_desc": ((m, n), x.dtype), "t_ptr": new_t if want_t else None},
        scratch={
            **({"t_ptr": new_t} if by_row and not want_t else {}),
            **({"v_ptr": ((m, by_row, padded(r)), torch.float32)} if pair_by_row else {}),
            "u_ptr": ((m, pad_q), x.dtype),
        },
        numbers={**({} if pair_by_row else {"v_ptr": None}), **sizes(core), "M": m, "N": n, "K": k},
        constants={
            "P": p,
            "Q": q,
            "R": r,
            "PAD_P": pad_p,
            "PAD_Q": pad_q,
            "PAD_R": padded(max(r, 1)),
            "MIX": by_row,
            "SPLIT": split,
            "W_ROWS_ARE_K": weight.stride(1) != 1,
            "TRANSPOSED": transposed,
            "STORE_T": want_t or by_row > 0,
            "HAS_BIAS": bias is not None,
            "HAS_GAIN": gain is not None,
            "U_ROWS": rows_at_a_time(pad_q, rows),
            "CORE_ROWS": rows_at_a_time(*((pad_p, pad_q) if transposed else (pad_q, pad_p))),
            **constants(config),
            **REGISTERS,
            **config.options(),
            "launch_cooperative_grid": True,  # all programs run at once, or none
        },
        blocks={
            "x_desc": (x.shape, x.stride(), [rows, config.block_k]),
            "w_desc": rows_of(weight, [config.block_n, config.block_k]),
            # The strides of a single row may be any, and are not looked at where it is launched.
            "down_desc": (down.shape, (down.shape[1], 1), [pad_p, config.block_k][::way]),
            "up_desc": (up.shape, (up.shape[1], 1), [config.block_n, pad_q][::way]),
            "y_desc": ((m, n), (n, 1), [rows, config.block_n // config.parts]),
        },
        varying=("scale",),
        meets=True,
        describe=describe,
        device=x.device,
    )
