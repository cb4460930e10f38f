"""Parts that the kernels for Hopper share. They are written in Gluon, Triton's lower language.

A program runs on a multiprocessor for itself and makes tile after tile of y, 128 rows each. Its
warps have jobs: two groups of four multiply, 64 rows of the tile each; one warp starts bulk copies
(TMA) of what they will need, tile after tile, as far ahead as there are stages.

The stages are a ring. A stage holds a step: BLOCK_K of the sum, for x and for W, or BLOCK_Q of the
rank tail, for u and for up. Of its two barriers `ready` completes when a step's bytes have come,
`empty` when both groups have multiplied it. All jobs go round the ring in the same order. `phase`
is the number of rounds, modulo 2, which a wait for a barrier is given.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .tiles import TileConfig

GROUPS = gl.constexpr(2)  # of warps that multiply
ROWS = gl.constexpr(64)  # of a tile, for each of them: what one wgmma takes
BUFFERS = gl.constexpr(2)  # for parts of y, for each group
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# All threads of a job meet. Triton 3.6 has the one name, 3.7 the other.
job_barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.jit
def here(value):
    """The same int32, as a value of which the compiler knows nothing.

    Otherwise it computes all that follows from the value before the jobs begin, and spills.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def tile_order(tile, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Number → (tile row, tile column): GROUP_M rows at a time, so that x and W stay in cache."""
    per_group = GROUP_M * tiles_n
    first_m = (tile // per_group) * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    return first_m + (tile % per_group) % rows, (tile % per_group) // rows


@gluon.jit
def advance(index, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and its phase."""
    wrapped = index == STAGES - 1
    return gl.where(wrapped, 0, index + 1), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def behind(index, STAGES: gl.constexpr):
    """The stage before this one.

    It is computed each time. A name of its own would not do: Triton takes a name that is set to
    `index` before a loop, and to `index` again in it, for one that never changes.
    """
    return gl.where(index == 0, STAGES - 1, index - 1)


@gluon.jit
def buffers(COUNT: gl.constexpr, desc):
    """Shared memory for COUNT blocks of the tensor that `desc` describes."""
    shape: gl.constexpr = [COUNT] + desc.block_type.shape  # noqa: RUF005 (Triton unpacks none)
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which completes when ARRIVALS have arrived at it."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def copy(desc, outer, summed, SUMMED_FIRST: gl.constexpr, bar, buf, pred=True):
    """Start a bulk copy of a tensor's block at (outer, summed), whose bytes count at `bar`.

    The tensor lies as (outer, summed) or, with SUMMED_FIRST, as (summed, outer).
    """
    if SUMMED_FIRST:
        tma.async_copy_global_to_shared(desc, [summed, outer], bar, buf, pred)
    else:
        tma.async_copy_global_to_shared(desc, [outer, summed], bar, buf, pred)


@gluon.jit
def copy_step(x_desc, w_desc, m, n, k, W_ROWS_ARE_K: gl.constexpr, bar, x_bufs, w_bufs, index):
    """Start the copies of x and W for a step of a tile."""
    for group in gl.static_range(GROUPS):
        copy(x_desc, m + group * ROWS, k, False, bar, x_bufs.index(index * GROUPS + group))
    copy(w_desc, n, k, W_ROWS_ARE_K, bar, w_bufs.index(index))


@gluon.jit
def in_place_of(buf, desc):
    """The beginning of a buffer, as room for a block of another tensor."""
    return buf._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def right(buf, SUMMED_FIRST: gl.constexpr):
    """A buffer as the right side of a product, (summed, columns), whichever way it lies."""
    if SUMMED_FIRST:
        return buf
    else:
        return buf.permute((1, 0))


@triton.constexpr_function
def sums_layout(columns):
    """The layout in which a group holds the sums of its 64 rows and so many columns."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


@gluon.jit
def multiply(
    acc, x_bufs, w_bufs, ready, empty, index, phase, steps,
    GROUP: gl.constexpr, W_ROWS_ARE_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Returns (x·Wᵀ of a tile, the next stage, its phase); the last step is still under way.

    The caller waits for that step and then sets its stage free: the one `behind` the next stage.
    """
    mbarrier.wait(ready.index(index), phase)
    x, w = x_bufs.index(index * GROUPS + GROUP), right(w_bufs.index(index), W_ROWS_ARE_K)
    acc = warpgroup_mma(x, w, acc, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    index, phase = advance(index, phase, STAGES)
    for _ in range(1, steps):
        mbarrier.wait(ready.index(index), phase)
        x, w = x_bufs.index(index * GROUPS + GROUP), right(w_bufs.index(index), W_ROWS_ARE_K)
        acc = warpgroup_mma(x, w, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # the step before has been multiplied
        mbarrier.arrive(empty.index(behind(index, STAGES)), count=1)
        index, phase = advance(index, phase, STAGES)
    return acc, index, phase


@gluon.jit
def store(
    acc, y_desc, bias_ptr, gain_ptr, y_bufs, m, n, N, GROUP: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_GAIN: gl.constexpr, FIRST: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Store gain ⊙ acc + bias as PARTS parts of y, of equal columns, the first of number FIRST.

    They go through the group's buffers in turn: a tile as a whole would take a stage's room. Gain
    and bias are read for a part: for a whole tile each took a quarter of a thread's registers.
    """
    if PARTS == 1:
        columns: gl.constexpr = acc.shape[1]
        first_n = n + FIRST * columns
        if HAS_GAIN:
            gain_n = first_n + gl.arange(0, columns, layout=gl.SliceLayout(0, acc.type.layout))
            gain = gl.load(gain_ptr + gain_n, mask=gain_n < N, other=0.0)
            acc *= gain[None, :]
        if HAS_BIAS:
            offs_n = first_n + gl.arange(0, columns, layout=gl.SliceLayout(0, acc.type.layout))
            bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
            acc += bias.to(gl.float32)[None, :]
        buf = y_bufs.index(GROUP * BUFFERS + FIRST % BUFFERS)
        tma.store_wait(BUFFERS - 1)  # the part before last has left this buffer
        buf.store(acc.to(y_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [m, first_n], buf)
    else:
        half: gl.constexpr = PARTS // 2
        halves = acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute([0, 2, 1])
        low, high = gl.split(halves)
        store(
            low, y_desc, bias_ptr, gain_ptr, y_bufs, m, n, N, GROUP, HAS_BIAS, HAS_GAIN,
            FIRST, half,
        )  # fmt: skip
        store(
            high, y_desc, bias_ptr, gain_ptr, y_bufs, m, n, N, GROUP, HAS_BIAS, HAS_GAIN,
            FIRST + half, half,
        )  # fmt: skip


def describe(base: Any, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """The descriptor of a tensor whose blocks lie in shared memory as wgmma takes them."""
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[base.dtype])
    return TensorDescriptor(base, shape, strides, block, layout)


def constants(config: TileConfig) -> dict[str, int]:
    """The compile-time arguments that say what a tile is."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.num_stages,
        "PARTS": config.parts,
        "GROUP_M": config.group_m,
    }
