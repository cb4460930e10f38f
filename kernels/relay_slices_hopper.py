"""`relay` for Hopper, in Gluon, with t made by several columns: each multiplies a slice of K.

    t = x·downᵀ    u = scale · t · core    y = gain ⊙ (x·Wᵀ + u·upᵀ) + bias

    x (M, K)   W (N, K)   down (P, K)   core (P, Q), or left (P, R)·right (R, Q), or 1   up (N, Q)
    or a diagonal (P,)

In `relay_hopper` the first column makes t over its whole K-loop, and in the first wave all others
wait for it. Here a row of tiles has MAKERS makers, the tiles of its first columns. The K-loop of
each begins with its own slice of K, one of MAKERS, and for these steps multiplies x by down too;
then it stores these sums, in float32, and adds one to the flag of these 64 rows. So t can be had
after a part of a K-loop, and the rest of the loop hides what is made of it.

That is done by `hand_out`, a warp, for every tile: it waits until all makers of the rows have been
counted, adds their sums, the first maker's first, so that the bits are the same whoever came when,
rounds t, multiplies it by the core, and lays u into shared memory, up to a tile ahead of those who
multiply. In the tiles of the first column it stores t as well, where t is wanted.

Nobody waits for ever. Tiles have numbers and are dealt out in turn: tile i comes after tile
i - programs of the same program. A row's makers have numbers in a row, before all other tiles. So
tile i waits for none beyond i + MAKERS - 1, and that one has published once the tile before it in
its program is done. With MAKERS programs at least, that is a tile before i. So the lowest tile that
is not done waits only for sums that do come. All programs run at the same time, or none: the launch
is a cooperative one.

The flags lie in `arrivals`, two for a row of tiles. MAKERS additions raise one; each tile that has
seen them adds one more, and the last of them sets it to zero.
"""

from __future__ import annotations

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
    copy,
    copy_step,
    describe,
    here,
    in_place_of,
    job_barrier,
    right,
    store,
    sums_layout,
    tile_order,
)
from .launch import Launch
from .relay_hopper import INPUTS, Core, multiply_both
from .relay_warps_hopper import count_reader, seen
from .tiles import TileConfig, padded
from .warp_core_hopper import PIECE, WARP, lay_core, through_piece


@gluon.jit
def makers_first(tile, tiles_m, tiles_n, MAKERS: gl.constexpr, GROUP_M: gl.constexpr):
    """Number → (tile row, tile column): the first MAKERS columns row by row, then `tile_order`."""
    rest = gl.maximum(tile - MAKERS * tiles_m, 0)
    m, n = tile_order(rest, tiles_m, gl.maximum(tiles_n - MAKERS, 1), GROUP_M)
    first = tile < MAKERS * tiles_m
    return gl.where(first, tile // MAKERS, m), gl.where(first, tile % MAKERS, n + MAKERS)


@gluon.jit
def slice_of(pid_n, steps, MAKERS: gl.constexpr):
    """(the step that a tile's K-loop begins with, how many steps from there are its slice)."""
    making = pid_n < MAKERS
    first = gl.where(making, pid_n * steps // MAKERS, 0)
    return first, gl.where(making, (pid_n + 1) * steps // MAKERS - first, 0)


@gluon.jit
def bring(
    x_desc, w_desc, down_desc, up_desc, x_bufs, w_bufs, down_bufs, ready, empty, M, N, K,
    MAKERS: gl.constexpr, W_ROWS_ARE_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """The job of one warp: start the copies of every step of every tile, a maker's slice first."""
    M, N, K = here(M), here(N), here(K)
    first_tile, programs = here(gl.program_id(0)), here(gl.num_programs(0))
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    BYTES: gl.constexpr = GROUPS * x_desc.block_type.nbytes + w_desc.block_type.nbytes
    index = 0
    phase = 0
    for tile in range(first_tile, tiles_m * tiles_n, programs):
        pid_m, pid_n = makers_first(tile, tiles_m, tiles_n, MAKERS, GROUP_M)
        m, n = pid_m * BLOCK_M, pid_n * BLOCK_N
        first, count = slice_of(pid_n, steps, MAKERS)
        for turn in range(steps):
            step = gl.where(first + turn < steps, first + turn, first + turn - steps)
            bar = ready.index(index)
            mbarrier.wait(empty.index(index), phase ^ 1)
            # One of the two is what is expected; the copies come after it.
            mbarrier.expect(bar, BYTES + down_desc.block_type.nbytes, pred=turn < count)
            mbarrier.expect(bar, BYTES, pred=turn >= count)
            k = step * BLOCK_K
            copy(down_desc, 0, k, TRANSPOSED, bar, down_bufs.index(index), turn < count)
            copy_step(x_desc, w_desc, m, n, k, W_ROWS_ARE_K, bar, x_bufs, w_bufs, index)
            index, phase = advance(index, phase, STAGES)
        bar = ready.index(index)
        mbarrier.wait(empty.index(index), phase ^ 1)
        mbarrier.expect(bar, up_desc.block_type.nbytes)
        copy(up_desc, n, 0, TRANSPOSED, bar, in_place_of(w_bufs.index(index), up_desc))
        index, phase = advance(index, phase, STAGES)


@gluon.jit
def hand_out(
    left_ptr, right_ptr, sums_ptr, t_ptr, flags_ptr, core_bufs, u_bufs, u_ready, u_empty, scale,
    M, N, MAKERS: gl.constexpr, P: gl.constexpr, Q: gl.constexpr, R: gl.constexpr,
    PAD_P: gl.constexpr, SPLIT: gl.constexpr, TRANSPOSED: gl.constexpr, STORE_T: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The job of one warp: for each tile, t and u of its rows, of what their makers have summed."""
    M, N = here(M), here(N)
    first_tile, programs = here(gl.program_id(0)), here(gl.num_programs(0))
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    rows: gl.constexpr = u_bufs.shape[1]
    PAD_Q: gl.constexpr = u_bufs.shape[2]
    dtype: gl.constexpr = u_bufs.dtype
    PIECES: gl.constexpr = PAD_P // PIECE
    # A core of 1, or a diagonal, leaves the sums where they are: then they are taken as a whole.
    TAKEN: gl.constexpr = 1 if R < 0 else PIECES
    COLUMNS: gl.constexpr = PAD_P // TAKEN
    offs_m = gl.arange(0, rows, layout=gl.SliceLayout(1, WARP))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, WARP))
    offs_q = gl.arange(0, PAD_Q, layout=gl.SliceLayout(0, WARP))
    if R >= 0:
        lay_core(left_ptr, right_ptr, core_bufs, P, Q, R, SPLIT, PIECES, TRANSPOSED)
    phase = 0
    for tile in range(first_tile, tiles_m * tiles_n, programs):
        pid_m, pid_n = makers_first(tile, tiles_m, tiles_n, MAKERS, GROUP_M)
        for group in gl.static_range(GROUPS):
            flag_ptr = flags_ptr + GROUPS * pid_m + group
            mbarrier.wait(u_empty.index(group), phase ^ 1)
            while seen(flag_ptr) < MAKERS:
                pass
            job_barrier()
            first = (GROUPS * pid_m + group) * (MAKERS * ROWS)
            for chunk in range(ROWS // rows * gl.num_programs(1)):
                m = pid_m * BLOCK_M + group * ROWS + chunk * rows
                at = here((first + chunk * rows) * PAD_P) + offs_m * PAD_P
                u = gl.zeros([rows, PAD_Q], gl.float32, WARP)
                for part in gl.static_range(TAKEN):
                    offs_p = part * COLUMNS + columns
                    ptrs = sums_ptr + (at[:, None] + offs_p[None, :])
                    low = gl.load(ptrs, cache_modifier=".cg")
                    for maker in gl.static_range(1, MAKERS):  # in this order, always
                        low += gl.load(ptrs + maker * (ROWS * PAD_P), cache_modifier=".cg")
                    if P < PAD_P:  # x may hold Inf, and Inf · 0 is NaN
                        low = gl.where((offs_p < P)[None, :], low, 0.0)
                    t = low.to(dtype)
                    if STORE_T:  # noqa: SIM102 (known when compiled)
                        if pid_n == 0:
                            t_ptrs = t_ptr + m.to(gl.int64) * P + offs_m[:, None] * P
                            mask = (m + offs_m < M)[:, None] & (offs_p < P)[None, :]
                            gl.store(t_ptrs + offs_p[None, :], t, mask=mask)
                    u = low if R < 0 else through_piece(t, u, core_bufs, part, SPLIT, PIECES)
                u *= scale
                if R == -2:
                    diagonal = gl.load(left_ptr + offs_q, mask=offs_q < Q, other=0.0)
                    u *= diagonal.to(gl.float32)[None, :]
                if Q < PAD_Q:
                    u = gl.where((offs_q < Q)[None, :], u, 0.0)
                u_bufs.index(group * (ROWS // rows) + chunk).store(u.to(dtype))
            fence_async_shared()  # by every thread, for what it has stored
            job_barrier()
            count_reader(flag_ptr, MAKERS + tiles_n - 1)
            mbarrier.arrive(u_ready.index(group), count=1)
        phase = phase ^ 1


@gluon.jit
def multiply_on(
    acc, x_bufs, w_bufs, ready, empty, index, phase, done, steps,
    GROUP: gl.constexpr, W_ROWS_ARE_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(x·Wᵀ of a tile of which `done` steps are in acc, the stage after it, its phase).

    There is at least one step to be done. The last is still under way, and its stage, `behind` the
    one that is returned, still to be set free.
    """
    for turn in range(done, steps):
        mbarrier.wait(ready.index(index), phase)
        x, w = x_bufs.index(index * GROUPS + GROUP), right(w_bufs.index(index), W_ROWS_ARE_K)
        acc = warpgroup_mma(x, w, acc, use_acc=turn > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # the step before has been multiplied
        mbarrier.arrive(empty.index(behind(index, STAGES)), count=1, pred=turn > done)
        index, phase = advance(index, phase, STAGES)
    return acc, index, phase


@gluon.jit
def make(
    up_desc, y_desc, bias_ptr, gain_ptr, sums_ptr, flags_ptr, x_bufs, w_bufs, down_bufs, u_bufs,
    y_bufs, ready, empty, u_ready, u_empty, M, N, K, GROUP: gl.constexpr, MAKERS: gl.constexpr,
    PAD_P: gl.constexpr, W_ROWS_ARE_K: gl.constexpr, TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_GAIN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The job of a group of warps: their 64 rows of every tile, and a maker's part of t."""
    M, N, K = here(M), here(N), here(K)
    first_tile, programs = here(gl.program_id(0)), here(gl.num_programs(0))
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    dtype: gl.constexpr = up_desc.dtype
    shape: gl.constexpr = [ROWS, u_bufs.shape[2]]
    whole: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    layout_t: gl.constexpr = sums_layout(PAD_P)
    acc = gl.zeros([ROWS, BLOCK_N], gl.float32, sums_layout(BLOCK_N))
    index = 0
    phase = 0
    u_phase = 0
    for tile in range(first_tile, tiles_m * tiles_n, programs):
        pid_m, pid_n = makers_first(tile, tiles_m, tiles_n, MAKERS, GROUP_M)
        _, count = slice_of(pid_n, steps, MAKERS)
        if pid_n < MAKERS:
            acc, low, index, phase = multiply_both(
                acc, x_bufs, w_bufs, down_bufs, ready, empty, index, phase, count,
                GROUP, W_ROWS_ARE_K, TRANSPOSED, PAD_P, STAGES,
            )  # fmt: skip
            rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout_t))
            offs_p = gl.arange(0, PAD_P, layout=gl.SliceLayout(0, layout_t))
            place = (GROUPS * pid_m + GROUP) * MAKERS + pid_n
            sums_ptrs = sums_ptr + place * (ROWS * PAD_P) + rows[:, None] * PAD_P
            gl.store(sums_ptrs + offs_p[None, :], low)
            job_barrier()  # all of the group's sums are stored
            gl.atomic_add(flags_ptr + GROUPS * pid_m + GROUP, 1, sem="release", scope="gpu")
        acc, index, phase = multiply_on(
            acc, x_bufs, w_bufs, ready, empty, index, phase, count, steps,
            GROUP, W_ROWS_ARE_K, STAGES,
        )  # fmt: skip
        mbarrier.wait(ready.index(index), phase)
        mbarrier.wait(u_ready.index(GROUP), u_phase)
        u = u_bufs.index(GROUP * (ROWS // u_bufs.shape[1]))._reinterpret(dtype, shape, whole)
        up = right(in_place_of(w_bufs.index(index), up_desc), TRANSPOSED)
        acc = warpgroup_mma(u, up, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(behind(index, STAGES)), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(index), count=1)
        mbarrier.arrive(u_empty.index(GROUP), count=1)
        u_phase = u_phase ^ 1
        index, phase = advance(index, phase, STAGES)
        m, n = pid_m * BLOCK_M + GROUP * ROWS, pid_n * BLOCK_N
        store(acc, y_desc, bias_ptr, gain_ptr, y_bufs, m, n, N, GROUP, HAS_BIAS, HAS_GAIN, 0, PARTS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K"])
def relay_slices_hopper_kernel(
    x_desc,
    w_desc,
    down_desc,
    left_ptr,
    right_ptr,
    up_desc,
    bias_ptr,
    gain_ptr,
    t_ptr,
    sums_ptr,
    y_desc,
    arrivals_ptr,
    scale,
    M,
    N,
    K,
    MAKERS: gl.constexpr,  # columns of tiles that make t, a slice of K each: at least 2
    P: gl.constexpr,
    Q: gl.constexpr,
    R: gl.constexpr,  # of the pair; 0: the core is the matrix `left`; -1: it is 1; -2: a diagonal
    PAD_P: gl.constexpr,
    PAD_Q: gl.constexpr,
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
    U_ROWS: gl.constexpr,  # of u at a time
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
    PIECES: gl.constexpr = PAD_P // PIECE
    core_dtype: gl.constexpr = gl.bfloat16 if SPLIT else dtype
    if R < 0:
        core_bufs = u_bufs
    else:
        core_bufs = gl.allocate_shared_memory(
            core_dtype, [2 * PIECES if SPLIT else PIECES, PIECE, PAD_Q],
            gl.NVMMASharedLayout.get_default_for([PIECE, PAD_Q], core_dtype),
        )  # fmt: skip
    ready, empty = barriers(STAGES, 1), barriers(STAGES, GROUPS)
    u_ready, u_empty = barriers(GROUPS, 1), barriers(GROUPS, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (make, (
                up_desc, y_desc, bias_ptr, gain_ptr, sums_ptr, arrivals_ptr, x_bufs, w_bufs,
                down_bufs, u_bufs, y_bufs, ready, empty, u_ready, u_empty, M, N, K, 0, MAKERS,
                PAD_P, W_ROWS_ARE_K, TRANSPOSED, HAS_BIAS, HAS_GAIN, BLOCK_M, BLOCK_N, BLOCK_K,
                STAGES, PARTS, GROUP_M,
            )),
            (make, (
                up_desc, y_desc, bias_ptr, gain_ptr, sums_ptr, arrivals_ptr, x_bufs, w_bufs,
                down_bufs, u_bufs, y_bufs, ready, empty, u_ready, u_empty, M, N, K, 1, MAKERS,
                PAD_P, W_ROWS_ARE_K, TRANSPOSED, HAS_BIAS, HAS_GAIN, BLOCK_M, BLOCK_N, BLOCK_K,
                STAGES, PARTS, GROUP_M,
            )),
            (bring, (
                x_desc, w_desc, down_desc, up_desc, x_bufs, w_bufs, down_bufs, ready, empty, M,
                N, K, MAKERS, W_ROWS_ARE_K, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP_M,
            )),
            (hand_out, (
                left_ptr, right_ptr, sums_ptr, t_ptr, arrivals_ptr, core_bufs, u_bufs, u_ready,
                u_empty, scale, M, N, MAKERS, P, Q, R, PAD_P, SPLIT, TRANSPOSED, STORE_T,
                BLOCK_M, BLOCK_N, GROUP_M,
            )),
        ],
        [4, 1, 1],
        [MAKER_REGISTERS, BRINGER_REGISTERS, BRINGER_REGISTERS],
    )  # fmt: skip


WIDEST = {"MAKER_REGISTERS": 208, "BRINGER_REGISTERS": 88}  # of a thread
OTHERS = {"MAKER_REGISTERS": 192, "BRINGER_REGISTERS": 120}  # of tiles of fewer columns


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
    """The launch of a call of `relay`, its operands `is_bulk`, by a tile that has makers.

    Raises ValueError where they would wait for each other for ever: where the columns of tiles, the
    steps of K or the programs are fewer than they.
    """
    (m, k), n, way, makers = x.shape, weight.shape[0], -1 if transposed else 1, config.makers
    _, _, p, q, r = unpacked(down, core, transposed)
    rows, pad_p, pad_q = ROWS.value, padded(p), padded(q)
    tiles_m, tiles_n = cdiv(m, config.block_m), cdiv(n, config.block_n)
    programs = min(tiles_m * tiles_n, multiprocessors(x.device))
    if not 2 <= makers <= min(tiles_n, cdiv(k, config.block_k), programs):
        raise ValueError(
            f"{makers} makers of t are too many for {programs} programs and {tiles_n} columns of "
            f"tiles, K = {k}: take a tile of fewer makers, or of one"
        )
    return Launch(
        relay_slices_hopper_kernel,
        (programs,),
        INPUTS,
        results={"y_desc": ((m, n), x.dtype), "t_ptr": ((m, p), x.dtype) if want_t else None},
        scratch={"sums_ptr": ((tiles_m, GROUPS.value, makers, rows, pad_p), torch.float32)},
        numbers={"M": m, "N": n, "K": k},
        constants={
            "MAKERS": makers,
            "P": p,
            "Q": q,
            "R": r,
            "PAD_P": pad_p,
            "PAD_Q": pad_q,
            "SPLIT": split,
            "W_ROWS_ARE_K": weight.stride(1) != 1,
            "TRANSPOSED": transposed,
            "STORE_T": want_t,
            "HAS_BIAS": bias is not None,
            "HAS_GAIN": gain is not None,
            "U_ROWS": 32 if max(pad_p, pad_q) == 16 else 16,
            **constants(config),
            **(WIDEST if config.block_n == 256 else OTHERS),
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
