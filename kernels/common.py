"""Functions that the kernels share: the one `dot`, the one `cast`, offsets, variants.

Triton's interpreter differs from its compiler in two ways that would make a test on a CPU
meaningless: its bf16 dot is garbage (triton issue 5424) and its fp32 → bf16 conversion truncates.
`dot` and `cast` do in the interpreter what the compiled kernel does; no kernel calls `tl.dot`, nor
`.to` on a value that it goes on to store or multiply.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl

N_ARRIVALS = 4096  # counters of `arrivals`: more than any device has multiprocessors
Dropout = tuple[torch.Tensor, float] | None  # the seed, int64 (1,), and the probability
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def accumulator(dtype):
    """fp64 for fp64 (gradcheck in the interpreter), fp32 for everything else."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.constexpr_function
def promote(a, b):
    """torch.promote_types of two float dtypes."""
    if a == b:
        return a
    return tl.float64 if tl.float64 in (a, b) else tl.float32


@triton.jit
def dot(a, b, acc, TF32X3: tl.constexpr = False):
    """acc + a·b in acc's dtype. fp32 is multiplied as such or, if TF32X3, by three TF32 products.

    A product of fp32 is summed from zero, and its sum is added to acc: so a loop over K has a chain
    of sums for each block and one of blocks, not one along all of K, whose error is several times
    that. `max_num_imprecise_acc`, which concerns fp8 alone, is not 0 because that keeps Triton from
    folding the sum back into the product.
    """
    if INTERPRETED or (a.dtype == tl.float32 and not TF32X3):
        a, b = a.to(acc.dtype), b.to(acc.dtype)
        return acc + tl.dot(
            a, b, max_num_imprecise_acc=1, out_dtype=acc.dtype, input_precision="ieee"
        )
    else:
        kind: tl.constexpr = "tf32x3" if TF32X3 else "ieee"
        return tl.dot(a, b, acc, input_precision=kind, out_dtype=acc.dtype)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x, a matrix, in dtype, rounded to nearest even; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
        wide = x.to(tl.float32)
        bits = wide.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(wide != wide, bits | 0x00400000, nearest) & 0xFFFF0000
        x = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    y = x.to(dtype)
    if dtype == tl.float32 and x.dtype != tl.float32:
        # On sm_100 Triton 3.7 takes a product of fp32 for one of TF32, whatever it is told, where
        # it can see that either operand was loaded in 16 bits. It does not see through a sum.
        y = tl.sum(y[:, :, None], 2)
    return y


@triton.jit
def halves(x):
    """Two bf16 values whose sum is x to 2⁻¹⁷ of it: the larger first."""
    wide = x.to(tl.float32)
    high = cast(wide, tl.bfloat16)
    return high, cast(wide - high.to(tl.float32), tl.bfloat16)


@triton.jit
def dot_mixed(a, b):
    """a·b for a 16-bit a and an fp32 b, by bf16 dots: to 2⁻¹⁷ of each product.

    Where a small term is not finite, a or b holds an Inf or a NaN: the small terms are left out
    there, and the product of the larger halves gives the Inf or NaN that is due.
    """
    b_high, b_low = halves(b)
    small = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    if a.dtype == tl.bfloat16:
        a_high = a
    else:
        a_high, a_low = halves(a)
        small = dot(a_low, b_high, small)
    small = dot(a_high, b_low, small)
    return dot(a_high, b_high, tl.where(tl.abs(small) < float("inf"), small, 0.0))


@triton.jit
def drawn(seed, first_m, first_k, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mask of a dropout for a tile of x, in two forms; it follows from the seed, m and k alone.

    Returns (keep_mask, bits): keep_mask (BLOCK_M, BLOCK_K) is true where x[m, k] is kept; bits,
    uint8 (BLOCK_M, BLOCK_K // 8), has the same for x[m, 8·j + i] in bit i of the byte [m, j], as
    `kept` reads it. One Philox call, 128 bits, decides a byte:
    each element is dropped if its 16 bits, as a number, are below `threshold`. first_k and BLOCK_K
    are multiples of 8.
    """
    rows = (first_m + tl.arange(0, BLOCK_M)).to(tl.uint32)[:, None]
    eighths = (first_k // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)[None, :]
    rows, eighths = tl.broadcast(rows, eighths)
    zero = tl.zeros_like(rows)
    a, b, c, d = tl.philox(seed, rows, eighths, zero, zero)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    draws = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_M, BLOCK_K))
    bits = two_bits(a, threshold) | (two_bits(c, threshold) << 2)
    bits |= (two_bits(b, threshold) << 4) | (two_bits(d, threshold) << 6)
    return draws >= threshold, bits.to(tl.uint8)


@triton.jit
def two_bits(words, threshold):
    """Two bits for a word of 32: whether its lower half, and its upper, is at least `threshold`."""
    low = ((words & 0xFFFF) >= threshold).to(tl.int32)
    return low | (((words >> 16) >= threshold).to(tl.int32) << 1)


@triton.jit
def byte_ptrs(bits_ptr, first_m, first_k, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """(pointers, mask) of the bytes that hold the dropout's mask for a tile of x (M, K).

    The bytes of all of x lie row by row, `mask_width(K)` to a row. first_k is a multiple of
    BLOCK_K, which is one of 8.
    """
    offs_m = (first_m + tl.arange(0, BLOCK_M))[:, None]
    first = tl.multiple_of(first_k // 8, BLOCK_K // 8)
    bytes_k = (first + tl.arange(0, BLOCK_K // 8))[None, :]
    width = tl.cdiv(K, 128) * 16
    return bits_ptr + offset(offs_m, width) + bytes_k, (offs_m < M) & (bytes_k < width)


@triton.jit
def load_bits(bits_ptr, first_m, first_k, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The bytes with the dropout's mask for a tile of x, (BLOCK_M, BLOCK_K // 8); zero beyond x."""
    ptrs, there = byte_ptrs(bits_ptr, first_m, first_k, M, K, BLOCK_M, BLOCK_K)
    return tl.load(ptrs, there, other=0)


@triton.jit
def kept(bits):
    """The mask (BLOCK_M, BLOCK_K) that a tile's bytes hold: true where an element of x is kept."""
    each = (bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(each, (bits.shape[0], 8 * bits.shape[1])) != 0


@triton.jit
def offset(index, stride):
    """index · stride as int64: tensors of 2³¹ elements and more are addressed in full."""
    return index.to(tl.int64) * stride


@triton.jit
def step(count: tl.constexpr, stride):
    """The distance, as int64, that a pointer moves when its index moves by `count`."""
    return tl.full((), count, tl.int64) * stride


@triton.jit
def runtime(bound: tl.constexpr):
    """The bound of a loop, unknown to the compiler, which would unroll the loop and then spill.

    Every grid here has one or two dimensions, so it is multiplied by 1.
    """
    return bound * tl.num_programs(2)


@triton.jit
def tile_order(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Program → (tile row, tile column): GROUP_M rows at a time, so that x and W stay in cache."""
    per_group = GROUP_M * tiles_n
    first_m = (pid // per_group) * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    return first_m + (pid % per_group) % rows, (pid % per_group) // rows


@triton.jit
def gathered(acc, ptrs, index, count, stride, counter_ptr, AHEAD: tl.constexpr = 4):
    """Sum acc over `count` programs; returns (acc, is_last). Only the last to arrive has the sum.

    Each program stores its part at ptrs + index·stride, then arrives at the counter. The last to
    arrive adds the parts in the order of their index, so that the sum is bitwise reproducible, and
    sets the counter back to zero. In every other program the acc that is returned is its own part.
    """
    tl.store(ptrs + index * stride, acc)
    tl.debug_barrier()  # every thread's part is stored before the arrival is counted
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == count - 1
    if last:
        acc = tl.zeros_like(acc)
        for i in tl.range(0, count, loop_unroll_factor=AHEAD):  # loads under way at a time
            acc += tl.load(ptrs + i * stride, cache_modifier=".cg")
        tl.store(counter_ptr, 0)
    return acc, last


def variants(kernel: Callable, runtime: list[str]) -> dict[bool, Any]:
    """The kernel, compiled in exactly two specialisations of its integers and pointers.

    `[True]` is for launches in which all of them are multiples of 16; `[False]` assumes nothing.
    Both know a stride of 1 as a constant. Arguments named in `runtime` are never specialised. So
    what the compile gate compiles is what a launch runs.
    """
    code = kernel.__code__
    arguments = [a for a in code.co_varnames[: code.co_argcount] if a not in kernel.__annotations__]
    strides = [a for a in arguments if a.startswith("stride_")]
    others = [a for a in arguments if a not in strides]
    return {
        True: triton.jit(kernel, do_not_specialize=runtime),
        False: triton.jit(kernel, do_not_specialize=others, do_not_specialize_on_alignment=strides),
    }


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of a device's multiprocessors: a persistent launch has as many programs."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    # The interpreter: few, for several tiles to a program. The compile gate: as many as a GPU has.
    return 4 if device.type == "cpu" else 128


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def rows_of(weight: torch.Tensor, block: list[int]) -> tuple[Any, Any, list[int]]:
    """(shape, strides, block) of the descriptor of W, or of Wᵀ where W's columns are contiguous."""
    if weight.stride(1) == 1:
        return weight.shape, weight.stride(), block
    return weight.shape[::-1], weight.stride()[::-1], block[::-1]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial sums in memory: that of `accumulator`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def capturing(device: torch.device) -> bool:
    """Whether the current stream's launches go into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _counters(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(N_ARRIVALS, dtype=torch.int32, device=device)


def arrivals(device: torch.device, stream: int | None = None) -> torch.Tensor:
    """Counters for programs of one launch to meet at, int32 (N_ARRIVALS,): zero, one set a stream.

    Whatever a launch counts in them it sets to zero again before it ends. In a graph that is being
    captured they are the graph's own, zeroed in it: two graphs may run side by side. `stream` is
    the handle of the current stream, for a caller that has it at hand.
    """
    if capturing(device):
        return torch.zeros(N_ARRIVALS, dtype=torch.int32, device=device)
    if stream is None:
        on_gpu = device.type == "cuda"
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    return _counters(device, stream)


def mask_width(k: int) -> int:
    """The bytes of a row of x (M, k) in a mask of bits: an eighth of k, in whole 16s."""
    return 16 * cdiv(k, 128)


def threshold(dropout_p: float) -> int:
    """The number below which 16 random bits drop an element (`drawn`): dropout_p to 2⁻¹⁷."""
    return round(dropout_p * 65536)


def gemm_aligned(
    x: torch.Tensor, weight: torch.Tensor, others: Iterable[torch.Tensor | None]
) -> bool:
    """`aligned` for a launch of x·weightᵀ: each of the two has a stride of 1 as well."""
    sizes = *weight.shape, x.stride(0), max(weight.stride())
    return (
        x.stride(1) == 1
        and 1 in weight.stride()
        and x.stride(0) > 0 < min(weight.stride())
        and aligned((x, weight, *others), sizes)
    )


def aligned(tensors: Iterable[torch.Tensor | None], sizes: Iterable[int]) -> bool:
    """Whether a launch may take the variant for multiples of 16 (addresses in bytes)."""
    return all(size % 16 == 0 for size in sizes) and all(
        tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors
    )
