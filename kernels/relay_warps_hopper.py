"""The two single warps of `relay` for Hopper: `bring` starts the copies, `hand_out` the rest.

`hand_out` puts the core into shared memory, and u of each tile once its flags are raised;
`relay_hopper` says how.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .hopper import (
    GROUPS,
    ROWS,
    advance,
    copy,
    copy_step,
    here,
    in_place_of,
    job_barrier,
    tile_order,
)
from .relay_rows_hopper import fetch_rows


@gluon.jit
def first_column_first(tile, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Number → (tile row, tile column): the first column top to bottom, then as `tile_order`."""
    rest = gl.maximum(tile - tiles_m, 0)
    m, n = tile_order(rest, tiles_m, gl.maximum(tiles_n - 1, 1), GROUP_M)
    first = tile < tiles_m
    return gl.where(first, tile, m), gl.where(first, 0, n + 1)


@gluon.jit
def seen(flag_ptr):
    """The flag, acquired at the scope of the GPU by every thread for itself."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l", [flag_ptr.to(gl.int64)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def count_reader(flag_ptr, last):
    """Add 1 to the flag, or set it to zero where it is `last`: one thread of a warp does."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 lane;
        mov.u32 lane, %laneid;
        setp.eq.u32 p, lane, 0;
        @p red.relaxed.gpu.global.inc.u32 [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [flag_ptr.to(gl.int64), last], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def halves(x):
    """Two bf16 values whose sum is x, of fp32, to 2⁻¹⁷ of it: the larger first."""
    high = x.to(gl.bfloat16)
    return high, (x - high.to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def bring(
    x_desc, w_desc, down_desc, up_desc, x_bufs, w_bufs, down_bufs, ready, empty, M, N, K,
    W_ROWS_ARE_K: gl.constexpr, TRANSPOSED: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The job of one warp: start the copies of every step of every tile."""
    M, N, K = here(M), here(N), here(K)
    first_tile, programs = here(gl.program_id(0)), here(gl.num_programs(0))
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    BYTES: gl.constexpr = GROUPS * x_desc.block_type.nbytes + w_desc.block_type.nbytes
    index = 0
    phase = 0
    for tile in range(first_tile, tiles_m * tiles_n, programs):
        pid_m, pid_n = first_column_first(tile, tiles_m, tiles_n, GROUP_M)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        first = pid_n == 0
        for step in range(steps):
            bar = ready.index(index)
            mbarrier.wait(empty.index(index), phase ^ 1)
            # One of the two is what is expected; the copies come after it.
            mbarrier.expect(bar, BYTES + down_desc.block_type.nbytes, pred=first)
            mbarrier.expect(bar, BYTES, pred=pid_n > 0)
            k = step * BLOCK_K
            copy(down_desc, 0, k, TRANSPOSED, bar, down_bufs.index(index), first)
            copy_step(x_desc, w_desc, m, n, k, W_ROWS_ARE_K, bar, x_bufs, w_bufs, index)
            index, phase = advance(index, phase, STAGES)
        bar = ready.index(index)
        mbarrier.wait(empty.index(index), phase ^ 1)
        mbarrier.expect(bar, up_desc.block_type.nbytes)
        copy(up_desc, n, 0, TRANSPOSED, bar, in_place_of(w_bufs.index(index), up_desc))
        index, phase = advance(index, phase, STAGES)


@gluon.jit
def hand_out_core(
    left_ptr, right_ptr, core_bufs, core_ready, R: gl.constexpr, HEIGHT: gl.constexpr,
    WIDTH: gl.constexpr, SPLIT: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    """Put the core, as it lies, (HEIGHT, WIDTH), into shared memory, padded with zeros.

    It is `left`, or left (HEIGHT, R)·right (R, WIDTH). With SPLIT it becomes two bf16 matrices:
    CHUNKS chunks of rows of the larger halves, then those of the smaller.
    """
    rows: gl.constexpr = core_bufs.shape[1]
    columns: gl.constexpr = core_bufs.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [1, 1], [1, 0])
    offs_n = gl.arange(0, columns, layout=gl.SliceLayout(0, layout))
    mask_n = offs_n < WIDTH
    for chunk in range(CHUNKS * gl.num_programs(1)):  # 1: a loop, which takes few registers
        offs_m = here(chunk * rows) + gl.arange(0, rows, layout=gl.SliceLayout(1, layout))
        mask_m = offs_m < HEIGHT
        if R == 0:
            core_ptrs = left_ptr + offs_m[:, None] * WIDTH + offs_n[None, :]
            core = gl.load(core_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        else:
            core = gl.zeros([rows, columns], gl.float32, layout)
            for r in range(R * gl.num_programs(1)):
                left = gl.load(left_ptr + offs_m * R + r, mask=mask_m, other=0.0)
                beside = gl.load(right_ptr + r * WIDTH + offs_n, mask=mask_n, other=0.0)
                core += left.to(gl.float32)[:, None] * beside.to(gl.float32)[None, :]
        if SPLIT:
            large, small = halves(core.to(gl.float32))
            core_bufs.index(chunk).store(large)
            core_bufs.index(CHUNKS + chunk).store(small)
        else:
            core_bufs.index(chunk).store(core.to(core_bufs.dtype))
    fence_async_shared()  # by every thread, for what it has stored
    job_barrier()
    mbarrier.arrive(core_ready.index(0), count=1)


@gluon.jit
def hand_out(
    left_ptr, right_ptr, bank, u_ptr, flags_ptr, core_bufs, u_bufs, core_ready, u_ready, u_empty,
    M, N, P: gl.constexpr, Q: gl.constexpr, R: gl.constexpr, MIX: gl.constexpr,
    HEIGHT: gl.constexpr, WIDTH: gl.constexpr, SPLIT: gl.constexpr, CHUNKS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The job of one warp: the core, and then, for each tile of another column, u of its rows.

    A tile of the first column needs none: there those who multiply have made it. Where each row has
    a core of its own, this has them fetched.
    """
    M, N = here(M), here(N)
    first_tile, programs = here(gl.program_id(0)), here(gl.num_programs(0))
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    rows: gl.constexpr = u_bufs.shape[1]
    PAD_Q: gl.constexpr = u_bufs.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PAD_Q, PAD_Q // 8], [1, 1], [1, 0])
    offs_m = gl.arange(0, rows, layout=gl.SliceLayout(1, layout))
    offs_q = gl.arange(0, PAD_Q, layout=gl.SliceLayout(0, layout))
    offs = offs_m[:, None] * PAD_Q + offs_q[None, :]
    if R >= 0 and MIX == 0:  # noqa: SIM102 (known when compiled)
        if first_tile < tiles_m:  # others have no tile of the first column
            hand_out_core(
                left_ptr, right_ptr, core_bufs, core_ready, R, HEIGHT, WIDTH, SPLIT, CHUNKS
            )
    phase = 0
    for tile in range(first_tile, tiles_m * tiles_n, programs):
        pid_m, pid_n = first_column_first(tile, tiles_m, tiles_n, GROUP_M)
        if pid_n > 0:
            for group in gl.static_range(GROUPS):
                flag_ptr = flags_ptr + GROUPS * pid_m + group
                mbarrier.wait(u_empty.index(group), phase ^ 1)
                while seen(flag_ptr) == 0:
                    pass
                job_barrier()
                for chunk in gl.static_range(ROWS // rows):
                    m = pid_m * BLOCK_M + group * ROWS + chunk * rows
                    u_ptrs = u_ptr + m.to(gl.int64) * PAD_Q + offs
                    mask = (m + offs_m < M)[:, None]
                    u = gl.load(u_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
                    u_bufs.index(group * (ROWS // rows) + chunk).store(u)
                fence_async_shared()
                job_barrier()
                count_reader(flag_ptr, tiles_n - 1)
                mbarrier.arrive(u_ready.index(group), count=1)
            phase = phase ^ 1
        elif MIX > 0:
            first_m = pid_m * BLOCK_M
            fetch_rows(left_ptr, right_ptr, bank, first_m, M, programs, P, Q, R, MIX, BLOCK_M)
