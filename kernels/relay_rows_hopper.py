"""A core for each row, in the relay for Hopper: u of a group's 64 rows, from their t in memory.

    u[m] = scale · sum over j of weights[i, j] · scales[slot] · t[m] · core[slot],   i = m // repeat

What a bank is, and what becomes of a handle that is refused, is as in `rows`. Those who have made
t make u of it, some rows at a time, and the relay publishes it as it does with one core: a core is
read once in a launch, not by every column of tiles. Each thread sums up numbers of one row alone,
always in the same order. With a pair, t·left comes first, and lies in memory too (`v`), in float32.
While t is being made, the warp that hands out u has the cores fetched into the second-level cache.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper import ROWS, here, job_barrier

STEP = gl.constexpr(8)  # numbers of t that a thread multiplies at a time, each by COLUMNS of a core
COLUMNS = gl.constexpr(4)
WIDEST = gl.constexpr(64)  # columns that a group makes at a time
LINE = gl.constexpr(128)  # bytes that are fetched at a time
LINES = gl.constexpr(1 << 18)  # that are fetched ahead, of all programs: 32 MB of that cache's 50


@triton.constexpr_function
def cores_layout(columns, transposed):
    """The layout of (rows, STEP, columns) of a group's cores; a thread has a piece of one."""
    across = columns // COLUMNS.value
    order = [1, 2, 0] if transposed else [2, 1, 0]
    piece = [1, STEP.value, COLUMNS.value]
    return gl.BlockedLayout(piece, [32 // across, 1, across], [4, 1, 1], order)


@gluon.jit
def times(count):
    """The count, which neither Triton nor ptxas knows: what goes round so often is not unrolled.

    A launch's grid has one side, so that the other is 1.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .s32 one;
        mov.s32 one, %nctaid.y;
        mul.lo.s32 $0, one, $1;
        }""",
        "=r,r", [count], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def fetch(ptrs, there):
    """Start to bring what lies there into the second-level cache."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.u32 p, $2, 0;
        @p prefetch.global.L2 [$1];
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [ptrs.to(gl.int64), there.to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def fetch_matrices(matrix_ptr, slot, inside, lines, SIZE: gl.constexpr):
    """Start to bring the matrices of some rows, of SIZE numbers, or so many lines of each."""
    step: gl.constexpr = LINE * 8 // matrix_ptr.dtype.element_ty.primitive_bitwidth
    for line in range(gl.minimum(lines, (SIZE + step - 1) // step)):
        fetch(matrix_ptr + slot * SIZE + line * step, inside)


@gluon.jit
def line_of(offs_m, repeat):
    """offs_m // repeat, which are not negative: a division that knows it takes fewer registers."""
    return (offs_m.to(gl.uint32) // here(repeat).to(gl.uint32)).to(gl.int64)


@gluon.jit
def fetch_rows(
    left_ptr, right_ptr, bank, first_m, M, programs, P: gl.constexpr, Q: gl.constexpr,
    R: gl.constexpr, MIX: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Start to bring what the rows of a tile will take from the bank; one warp does."""
    handles_ptr, _, scales_ptr, generations_ptr, _, repeat, slots = bank
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    shares: gl.constexpr = MIX if R <= 0 else 2 * MIX
    lines = LINES // (gl.minimum(M, programs * BLOCK_M) * shares)
    for chunk in range(times(BLOCK_M // 32)):
        offs_m = first_m + chunk * 32 + gl.arange(0, 32, layout=lanes)
        for j in range(times(MIX)):
            line = line_of(offs_m, repeat) * MIX + j
            handle = gl.load(handles_ptr + line, mask=offs_m < M, other=-1)
            slot = handle & 0xFFFFFFFF
            inside = (handle >= 0) & (slot < slots)
            fetch(generations_ptr + slot, inside)
            fetch(scales_ptr + slot, inside)
            if R <= 0:
                fetch_matrices(left_ptr, slot, inside, lines, P if R == -2 else P * Q)
            else:
                fetch_matrices(left_ptr, slot, inside, lines, P * R)
                fetch_matrices(right_ptr, slot, inside, lines, R * Q)


@gluon.jit
def looked_up(bank, offs_m, mask_m, j, MIX: gl.constexpr):
    """(slot, whether the table has it, whether it is the handle's, line of the handle)."""
    handles_ptr, _, _, generations_ptr, refused_ptr, repeat, slots = bank
    line = line_of(offs_m, repeat) * MIX + j
    handle = gl.load(handles_ptr + line, mask=mask_m, other=-1)
    slot = handle & 0xFFFFFFFF
    inside = (handle >= 0) & (slot < slots)
    generation = gl.load(generations_ptr + slot, mask=inside, other=-1)
    valid = inside & (generation == handle >> 32)
    refused = (valid == 0) & (handle != -1)
    gl.store(refused_ptr + gl.zeros_like(offs_m), 1, mask=refused)
    return slot, inside, valid, line


@gluon.jit
def through(
    source_ptrs, mask_m, matrix_ptr, slot, inside, first_q, P: gl.constexpr, Q: gl.constexpr,
    PAD_P: gl.constexpr, COUNT: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """source[m] · matrix[slot[m]] of some rows and COUNT columns, (P, Q) or transposed (Q, P)."""
    layout: gl.constexpr = cores_layout(COUNT, TRANSPOSED)
    low: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    across: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, layout))
    sums = gl.zeros([slot.shape[0], COUNT], gl.float32, gl.SliceLayout(1, layout))
    offs_q = first_q + gl.arange(0, COUNT, layout=across)
    matrix_ptrs = (matrix_ptr + slot * (P * Q))[:, None]
    mask, source_mask = inside[:, None, None], mask_m[:, None]
    if Q % COUNT > 0:
        mask = mask & gl.expand_dims((offs_q < Q)[None, :], 1)
    for p in range(0, times(PAD_P), STEP):
        offs_p = p + gl.arange(0, STEP, layout=low)
        here_mask, here_source = mask, source_mask
        if P < PAD_P:
            here_source = source_mask & (offs_p < P)[None, :]
            here_mask = mask & (offs_p < P)[None, :][:, :, None]
        source = gl.load(source_ptrs[:, None] + offs_p[None, :], mask=here_source, other=0.0)
        if TRANSPOSED:
            ptrs = (matrix_ptrs + offs_p[None, :])[:, :, None]
            ptrs += gl.expand_dims((offs_q * P)[None, :], 1)
        else:
            ptrs = (matrix_ptrs + (offs_p * Q)[None, :])[:, :, None]
            ptrs += gl.expand_dims(offs_q[None, :], 1)
        matrix = gl.load(ptrs, mask=here_mask, other=0.0)
        sums += gl.sum(source.to(gl.float32)[:, :, None] * matrix.to(gl.float32), 1)
    return sums


@gluon.jit
def rows_of_chunk(first_m, chunk, M, COUNT: gl.constexpr, TRANSPOSED: gl.constexpr):
    """(rows, which of them there are) of a chunk of a group's rows, for COUNT columns of theirs."""
    layout: gl.constexpr = cores_layout(COUNT, TRANSPOSED)
    rows: gl.constexpr = layout.threads_per_warp[0] * 4
    by_row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    offs_m = first_m + chunk * rows + gl.arange(0, rows, layout=by_row)
    return offs_m, offs_m < M


@gluon.jit
def store_u_of_rows(
    t_ptr, v_ptr, u_ptr, left_ptr, right_ptr, bank, first_m, M, scale, P: gl.constexpr,
    Q: gl.constexpr, R: gl.constexpr, PAD_P: gl.constexpr, PAD_Q: gl.constexpr,
    PAD_R: gl.constexpr, TRANSPOSED: gl.constexpr, MIX: gl.constexpr,
):  # fmt: skip
    """u of the group's rows that begin at first_m; their t is stored, and seen by all its threads.

    A row without a valid handle gets zeros by selection.
    """
    if R > 0:
        store_v_of_rows(
            t_ptr, v_ptr, left_ptr, bank, first_m, M, P, R, PAD_P, PAD_R, TRANSPOSED, MIX
        )
        job_barrier()  # it is read by other threads than have made it
    _, weights_ptr, scales_ptr, _, _, _, _ = bank
    COUNT: gl.constexpr = PAD_Q
    layout: gl.constexpr = cores_layout(COUNT, TRANSPOSED)
    by_row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, layout))
    offs_q = gl.arange(0, COUNT, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    CHUNKS: gl.constexpr = ROWS // (layout.threads_per_warp[0] * 4)
    for chunk in range(times(CHUNKS)):
        offs_m, mask_m = rows_of_chunk(first_m, chunk, M, COUNT, TRANSPOSED)
        u = gl.zeros([offs_m.shape[0], COUNT], gl.float32, gl.SliceLayout(1, layout))
        for j in range(times(MIX)):
            slot, inside, valid, line = looked_up(bank, offs_m, mask_m, j, MIX)
            factor = gl.load(scales_ptr + slot, mask=inside, other=0.0).to(gl.float32) * scale
            if weights_ptr is not None:
                factor *= gl.load(weights_ptr + line, mask=mask_m, other=0.0)
            # Masked by `inside` alone, loads of the table need not wait for the generation.
            if R == -2:
                of_t = gl.convert_layout(offs_m.to(gl.int64) * P, by_row)[:, None] + offs_q[None, :]
                of_slot = gl.convert_layout(slot * P, by_row)[:, None] + offs_q[None, :]
                column = (offs_q < P)[None, :]
                mask_t = gl.convert_layout(mask_m, by_row)[:, None] & column
                there = gl.convert_layout(inside, by_row)[:, None] & column
                t = gl.load(t_ptr + of_t, mask=mask_t, other=0.0)
                diagonal = gl.load(left_ptr + of_slot, mask=there, other=0.0)
                part = t.to(gl.float32) * diagonal.to(gl.float32)
            elif R == 0:
                t_ptrs = t_ptr + offs_m.to(gl.int64) * P
                part = through(
                    t_ptrs, mask_m, left_ptr, slot, inside, 0, P, Q, PAD_P, COUNT, TRANSPOSED
                )
            else:
                v_ptrs = v_ptr + (offs_m.to(gl.int64) * MIX + j) * PAD_R
                part = through(
                    v_ptrs, mask_m, right_ptr, slot, inside, 0, R, Q, PAD_R, COUNT, TRANSPOSED
                )
            part *= gl.convert_layout(factor, by_row)[:, None]
            u += gl.where(gl.convert_layout(valid, by_row)[:, None], part, 0.0)
        rows_u, mask_u = gl.convert_layout(offs_m, by_row), gl.convert_layout(mask_m, by_row)
        u = gl.where((offs_q < Q)[None, :], u, 0.0)
        u_ptrs = u_ptr + (rows_u.to(gl.int64) * PAD_Q)[:, None] + offs_q[None, :]
        gl.store(u_ptrs, u.to(u_ptr.dtype.element_ty), mask=mask_u[:, None])


@gluon.jit
def store_v_of_rows(
    t_ptr, v_ptr, left_ptr, bank, first_m, M, P: gl.constexpr, R: gl.constexpr,
    PAD_P: gl.constexpr, PAD_R: gl.constexpr, TRANSPOSED: gl.constexpr, MIX: gl.constexpr,
):  # fmt: skip
    """t · left of the group's rows, (M, MIX, PAD_R) in float32; beyond R it is anything."""
    COUNT: gl.constexpr = PAD_R if PAD_R < WIDEST else WIDEST
    layout: gl.constexpr = cores_layout(COUNT, TRANSPOSED)
    by_row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(1, layout))
    offs_r = gl.arange(0, COUNT, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    CHUNKS: gl.constexpr = ROWS // (layout.threads_per_warp[0] * 4)
    for chunk in range(times(CHUNKS)):
        offs_m, mask_m = rows_of_chunk(first_m, chunk, M, COUNT, TRANSPOSED)
        t_ptrs = t_ptr + offs_m.to(gl.int64) * P
        rows_v, mask_v = gl.convert_layout(offs_m, by_row), gl.convert_layout(mask_m, by_row)
        for j in range(times(MIX)):
            slot, inside, _, _ = looked_up(bank, offs_m, mask_m, j, MIX)
            v_ptrs = v_ptr + ((rows_v.to(gl.int64) * MIX + j) * PAD_R)[:, None] + offs_r[None, :]
            for r in range(0, times(R), COUNT):
                part = through(
                    t_ptrs, mask_m, left_ptr, slot, inside, r, P, R, PAD_P, COUNT, TRANSPOSED
                )
                gl.store(v_ptrs + r, part, mask=mask_v[:, None])
