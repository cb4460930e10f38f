"""t·core by a single warp, on Hopper: the core in shared memory, t in registers, 16 of P at a time.

Beside a K-loop that holds nearly all registers a warp has few: neither the core nor t fit whole.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .hopper import here, job_barrier
from .relay_warps_hopper import halves

PIECE = gl.constexpr(16)  # of P: what one product takes
# How a warp holds the sums of a product.
WARP = gl.constexpr(
    gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
)


@gluon.jit
def lay_core(
    left_ptr, right_ptr, core_bufs, P: gl.constexpr, Q: gl.constexpr, R: gl.constexpr,
    SPLIT: gl.constexpr, PIECES: gl.constexpr, TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Put the core into shared memory as (P, Q), whichever way it lies, padded with zeros.

    It is `left`, or left·right of so many R; TRANSPOSED these are (Q, P), or (Q, R)·(R, P). With
    SPLIT it becomes two bf16 matrices: PIECES pieces of rows of the larger halves, then those of
    the smaller.
    """
    rows: gl.constexpr = core_bufs.shape[1]
    columns: gl.constexpr = core_bufs.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [1, 1], [1, 0])
    offs_q = gl.arange(0, columns, layout=gl.SliceLayout(0, layout))
    mask_q = offs_q < Q
    for piece in range(PIECES * gl.num_programs(1)):  # 1: a loop, which takes few registers
        offs_p = here(piece * rows) + gl.arange(0, rows, layout=gl.SliceLayout(1, layout))
        mask_p = offs_p < P
        if R == 0:
            if TRANSPOSED:
                ptrs = left_ptr + offs_p[:, None] + offs_q[None, :] * P
            else:
                ptrs = left_ptr + offs_p[:, None] * Q + offs_q[None, :]
            core = gl.load(ptrs, mask=mask_p[:, None] & mask_q[None, :], other=0.0)
        else:
            core = gl.zeros([rows, columns], gl.float32, layout)
            for r in range(R * gl.num_programs(1)):
                if TRANSPOSED:
                    ptrs_p, ptrs_q = right_ptr + r * P + offs_p, left_ptr + offs_q * R + r
                else:
                    ptrs_p, ptrs_q = left_ptr + offs_p * R + r, right_ptr + r * Q + offs_q
                of_p = gl.load(ptrs_p, mask=mask_p, other=0.0).to(gl.float32)
                of_q = gl.load(ptrs_q, mask=mask_q, other=0.0).to(gl.float32)
                core += of_p[:, None] * of_q[None, :]
        if SPLIT:
            large, small = halves(core.to(gl.float32))
            core_bufs.index(piece).store(large)
            core_bufs.index(PIECES + piece).store(small)
        else:
            core_bufs.index(piece).store(core.to(core_bufs.dtype))
    job_barrier()


@gluon.jit
def finite(x):
    """x, with zeros where it is not finite."""
    return gl.where(gl.abs(x.to(gl.float32)) < float("inf"), x, 0.0)


@gluon.jit
def through_piece(
    t, sums, core_bufs, PART: gl.constexpr, SPLIT: gl.constexpr, PIECES: gl.constexpr
):
    """sums + t·core of a piece of P, by one warp. A core that is no matrix of t's dtype is two.

    As `through_core` of relay_hopper: to 2⁻¹⁷ of each product, of which the small ones are of
    finite numbers alone; of others the product of the large ones says what comes of them.
    """
    left: gl.constexpr = gl.DotOperandLayout(0, WARP, 2)
    beside: gl.constexpr = gl.DotOperandLayout(1, WARP, 2)
    core = core_bufs.index(PART).load(beside)
    if SPLIT:
        core_small = core_bufs.index(PIECES + PART).load(beside)
        if t.dtype == gl.bfloat16:
            large = gl.convert_layout(t, left)
        else:
            t_large, t_small = halves(t.to(gl.float32))
            large = gl.convert_layout(t_large, left)
            sums = mma_v2(finite(gl.convert_layout(t_small, left)), finite(core), sums)
        sums = mma_v2(finite(large), finite(core_small), sums)
        return mma_v2(large, core, sums)
    else:
        return mma_v2(gl.convert_layout(t, left), core, sums)
