"""The cost of a plan on paper: operations, bytes and launches, against what a device can do.

Each plan is a few steps, one after the other. A step takes the longest of three, its operations at
the matrix rate, its bytes at the bandwidth, and its tiles in waves of as many as a GPU has
multiprocessors; then what starting it takes, and what its programs wait for each other. This
decides only where nothing has been measured on the device (`measured`).

The constants of GPUs are from one NVIDIA H200 with torch 2.11.0 and triton 3.6.0, at commit
1cd22e1, and for `RELAY` and `GLUON` from prototypes measured on it. Other GPUs start from them,
with their own peaks. `tests/compute/test_planner_measured.py` holds what is chosen against that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..kernels.tiles import TileConfig

if TYPE_CHECKING:
    from .operands import Problem

Sides = tuple[int, int]  # rows and columns of a tile


@dataclass(frozen=True)
class Peaks:
    """The peaks of a device: its rates, bandwidth, price of a launch and processors."""

    wide: float  # operations per second, float32
    narrow: float  # 16 bits, on matrix units
    bandwidth: float  # bytes per second
    start: float  # seconds from the end of one launch to the work of the next
    processors: int = 0  # that make a tile each at a time; 0 on a CPU, where tiles do not count

    def rate(self, dtype: torch.dtype) -> float:
        """Operations per second in a dtype."""
        return self.narrow if dtype.itemsize == 2 else self.wide


# From the makers' data sheets: dense rates and bandwidth, by a part of the device's name. The
# first that fits counts.
LISTED = {
    "GH200": (67e12, 989e12, 4.0e12),
    "H200": (67e12, 989e12, 4.8e12),
    "H100 PCIe": (51e12, 756e12, 2.0e12),
    "H100 NVL": (60e12, 835e12, 3.9e12),
    "H100": (67e12, 989e12, 3.35e12),
    "H20": (44e12, 148e12, 4.0e12),
    "B200": (75e12, 2250e12, 8.0e12),
    "B300": (75e12, 2250e12, 8.0e12),
    "A100": (19.5e12, 312e12, 2.0e12),
    "A10": (31e12, 125e12, 0.6e12),
    "L40S": (92e12, 362e12, 0.86e12),
    "L4": (30e12, 121e12, 0.3e12),
    "RTX 4090": (83e12, 165e12, 1.0e12),
    "RTX 5090": (105e12, 210e12, 1.8e12),
    "MI300X": (163e12, 1307e12, 5.3e12),
}
# Operations per multiprocessor and cycle, (float32, 16 bits), by compute capability's major: what
# a GPU that is not listed is taken for.
PER_CYCLE = {8: (256, 1024), 9: (256, 4096), 10: (256, 8192), 12: (256, 1024)}
CLOCK, BANDWIDTH = 1.5e9, 1.0e12
CPU_RATES = {"AVX512": (100e9, 300e9), "AVX2": (50e9, 50e9)}  # of one thread
CPU_BANDWIDTH, CPU_START = 25e9, 5e-6
# On a CPU a GEMM that adds to what is there is slow in 16 bits: as many bytes more, for each of y.
ADDED = 8

# What a GPU reaches of its peaks: in float32, in 16 bits, and of the bandwidth.
WIDE, NARROW, FILLED = 0.76, 0.83, 0.89
GPU_START = 4e-6
FEED = 75e9  # bytes per second that a multiprocessor takes from the cache for its tile
# The library takes the best of these tiles, and splits K where they are few.
LIBRARY_TILES = ((128, 256), (256, 128), (128, 128), (128, 64), (64, 64))
ADDED_TO = 0.3  # of the bandwidth, where it adds to a y in float32, after its products
SKINNY = 0.7  # of the bandwidth, by its products with a side as small as a rank
# Its calls on the way through a core of another dtype (there, the product, the scale, back), and
# through a core for each row, which are looked up and checked.
CORE_CALLS, ROWS_CALLS = 4, 16

# Of the rate that the tile allows: our GEMM by pointers, and that of `relay`.
POINTERS, GLUON = 0.7, 0.99
FFMA, FFMA_SHRINK = 0.25, 0.04  # of the rate, by our kernels in float32
UNHIDDEN = 0.55  # of the bandwidth, by a GEMM that reads for most of its time
MIN_BLOCKS = 4  # of K for a program of `shrink`, at least
IN_FLIGHT = 20 << 10  # bytes on their way to a program with which it reads at half the bandwidth
MEETING = 3.5e-6  # seconds that programs of one launch wait for each other
# Neither are a tail's operands fetched ahead nor a tile of y stored beside the next one's products:
# a column of u takes the time of so many of x, and the storing that of so many.
TAIL, STORED = 2, 100
# The tiles of a relay's first column make t as well, and all others wait for them: this share of a
# tile's time, and as much again for so many columns of t.
RELAY, RELAY_COLUMNS = 0.2, 128
# Where each row has a core of its own, they read them before others have u: so many bytes are on
# their way at a time, from the second-level cache in so many seconds. Reckoned, not measured.
CORES_IN_FLIGHT, CORES_TURN = 32 << 10, 0.4e-6
OWN_CORE = 0.03e-6  # seconds for a row's u by its core, in `decode`: 24.0 µs at 64 rows of 4096²
# Bytes of a value of a quantised W as it is stored. Of 4 bits with a maximum for each 64, which is
# of 8 bits itself: what makes the maxima is two launches before the values'.
STORED_AS, MAXIMA_CALLS = {"4bit": 0.5 + 1 / 64}, 2
# Rows up to which bitsandbytes (0.50) takes a 4-bit W as it is stored on every GPU. Above, up to
# 1,536, it does for some shapes of some GPUs, on a Hopper for few of them.
FUSED_ROWS = 4
DRAWN = 1.2e12  # elements of a dropout's mask that are drawn in a second


@functools.cache
def peaks(device: torch.device) -> Peaks:
    """The peaks of a device: listed, or from what it says of itself."""
    if device.type != "cuda":
        wide, narrow = CPU_RATES.get(torch.backends.cpu.get_cpu_capability(), (10e9, 10e9))
        threads = torch.get_num_threads()
        return Peaks(wide * threads, narrow * threads, CPU_BANDWIDTH, CPU_START)
    properties = torch.cuda.get_device_properties(device)
    return of_gpu(properties.name, properties.major, properties.multi_processor_count)


def of_gpu(name: str, major: int, processors: int) -> Peaks:
    """The peaks of a GPU of that name, compute capability and number of multiprocessors."""
    per_cycle = PER_CYCLE.get(major, PER_CYCLE[8])
    wide, narrow = (rate * processors * CLOCK for rate in per_cycle)
    bandwidth = BANDWIDTH
    for part, listed in LISTED.items():
        if part in name:
            wide, narrow, bandwidth = listed
            break
    return Peaks(wide * WIDE, narrow * NARROW, bandwidth * FILLED, GPU_START, processors)


class Work(NamedTuple):
    """A launch, or a library's call."""

    operations: float
    bytes: float
    share: float = 1.0  # of the bandwidth that it reaches
    waits: float = 0.0  # seconds
    tiles: float = 0.0  # seconds that its tiles take in their waves


class Cost(NamedTuple):
    """A plan's cost, or the least that any can have."""

    operations: float
    bytes: float
    launches: int
    seconds: float


def total(parts: Sequence[Work], problem: Problem) -> Cost:
    """The cost of the parts of a plan together, one after the other."""
    peak = peaks(problem.device)
    rate = peak.rate(problem.dtype)
    seconds = sum(
        max(part.operations / rate, part.bytes / (peak.bandwidth * part.share), part.tiles)
        + part.waits
        + peak.start
        for part in parts
    )
    operations, moved = (sum(part[i] for part in parts) for i in (0, 1))
    return Cost(operations, moved, len(parts), seconds)


def of_tile(problem: Problem, sides: Sides, k: int) -> float:
    """Seconds in which a multiprocessor makes a tile of those sides by a sum of length k."""
    peak, (rows, columns) = peaks(problem.device), sides
    products = 2.0 * rows * columns * k * peak.processors / peak.rate(problem.dtype)
    return max(products, (rows + columns) * k * problem.dtype.itemsize / FEED)


def waves(problem: Problem, sides: Sides, k: int) -> float:
    """Seconds of an (M, k) · (k, N) by such tiles; 0 where they do not count."""
    processors = peaks(problem.device).processors
    if not processors:
        return 0.0
    tiles = math.ceil(problem.m / sides[0]) * math.ceil(problem.n / sides[1])
    return math.ceil(tiles / processors) * of_tile(problem, sides, k)


def least(at: Problem, adapted: bool = True) -> Cost:
    """The floor: everything computed and moved once, in one step; or so much for the bare layer."""
    size, rank = at.dtype.itemsize, at.p + at.q if adapted else 0
    operations = 2.0 * at.m * at.n * at.k
    moved = float((at.m * at.k + at.m * at.n) * size + at.n * at.k * stored(at))
    if adapted:
        operations += 2.0 * at.m * (at.k * at.p + at.core_size + at.q * at.n)
        moved += (at.p * at.k + at.n * at.q + at.m * rank) * size
    peak = peaks(at.device)
    seconds = max(operations / peak.rate(at.dtype), moved / peak.bandwidth) + peak.start
    return Cost(operations, moved, 1, seconds)


def base(problem: Problem, adds: bool = False) -> Work:
    """The layer's GEMM by the library; if it `adds`, to what is there."""
    (m, k, n), size = problem[2:5], problem.dtype.itemsize
    operations, peak = 2.0 * m * n * k, peaks(problem.device)
    processors = peak.processors
    moved = float((m * k + n * k + (2 if adds else 1) * m * n) * size)
    if not processors:
        return Work(operations, moved)
    waits = m * n * size / (peak.bandwidth * ADDED_TO) if adds and size == 4 else 0.0
    several = []
    for sides in LIBRARY_TILES:
        tiles = math.ceil(m / sides[0]) * math.ceil(n / sides[1])
        several.append(waves(problem, sides, k) * min(1.0, tiles / processors))
    return Work(operations, moved, UNHIDDEN, waits, min(several))


def stored(problem: Problem) -> float:
    """Bytes of a value of W as it is stored: of a quantised one that is not of 4 bits, one."""
    if problem.base in ("", "opaque"):
        return problem.dtype.itemsize
    return STORED_AS.get(problem.base, 1.0)


def dequantised(problem: Problem) -> Work:
    """The values of a quantised W, read as they are stored and written; maxima come before them."""
    calls = MAXIMA_CALLS if problem.base == "4bit" and peaks(problem.device).processors else 0
    moved = problem.n * problem.k * (stored(problem) + problem.dtype.itemsize)
    return Work(0.0, moved, waits=calls * peaks(problem.device).start)


def of_base(problem: Problem) -> list[Work]:
    """The layer's GEMM as the plan "called" has it: by the library of a W that is quantised.

    Few rows go through a 4-bit W as it is stored; for an 8-bit one x is quantised as well, and the
    product is taken for one of 16 bits, as an opaque one is. All else, and dy·W, is by the values.
    """
    if not problem.base:
        return [base(problem)]
    (m, k, n), size, gpu = problem[2:5], problem.dtype.itemsize, peaks(problem.device).processors
    if problem.called:
        rounded = [Work(0.0, float(m * k * (size + 1)))] if problem.base == "8bit" else []
        return [*rounded, base(problem)]
    if gpu and problem.base == "4bit" and m <= FUSED_ROWS and not problem.transposed:
        moved = (m * k + m * n) * size + n * k * stored(problem)
        return [Work(2.0 * m * n * k, moved, UNHIDDEN)]
    return [dequantised(problem), base(problem)]


def skinny(problem: Problem, operations: float, moved: float, calls: int = 1) -> Work:
    """A product of the library with a side as small as a rank; on a GPU one of so many calls."""
    peak = peaks(problem.device)
    if not peak.processors:
        return Work(operations, moved)
    return Work(operations, moved, SKINNY, (calls - 1) * peak.start)


def shrink(problem: Problem, tile: TileConfig | None) -> Work:
    """The work of `shrink`: x is read once, by as many programs as there are for it."""
    (m, k, _, p, q), size = problem[2:7], problem.dtype.itemsize
    cores = m * problem.core_size if problem.by_row else 0
    moved = (m * k + p * k + m * p + m * q + cores) * size
    operations = 2.0 * m * k * p + 2.0 * m * problem.core_size
    peak = peaks(problem.device)
    if tile is None:
        return Work(operations, moved)
    tiles, blocks = math.ceil(m / tile.block_m), math.ceil(k / tile.block_k)
    parts = 1 if tile.whole_k else max(1, min(peak.processors // tiles, blocks // MIN_BLOCKS))
    here = min(2.0, tiles * parts / peak.processors)  # programs of a multiprocessor at a time
    flying = here * tile.num_stages * tile.block_m * tile.block_k * size
    waits = MEETING if parts > 1 else 0.0
    if problem.dropout and not problem.transposed:
        waits += m * k / DRAWN
    wide = operations / (peak.wide * FFMA_SHRINK) if size == 4 else 0.0
    return Work(operations, moved, flying / (flying + IN_FLIGHT), waits, wide)


def gemm_tail(problem: Problem, tile: TileConfig | None) -> Work:
    """The work of `gemm_tail`: a GEMM with some more steps of its loop."""
    (m, k, n, _, q), size = problem[2:7], problem.dtype.itemsize
    moved = float((m * k + n * k + m * n + m * q + n * q) * size)
    if problem.dropout and problem.transposed:
        moved += m * n / 8  # the mask
    operations = 2.0 * m * n * k + 2.0 * m * n * q
    if tile is None:
        return Work(operations, moved)
    sides = tile.block_m, tile.block_n
    if tile.hopper:  # the tail goes through the same ring as K, and y is stored beside products
        return Work(operations, moved, UNHIDDEN, tiles=waves(problem, sides, k + q) / GLUON)
    share = FFMA if size == 4 else 1.0 if problem.regular else POINTERS
    seconds = waves(problem, sides, k + TAIL * q + STORED)
    return Work(operations, moved, UNHIDDEN, tiles=seconds / share)


def relay(problem: Problem, tile: TileConfig | None) -> Work:
    """The work of `relay`: everything once, by a GEMM whose other columns wait for the first."""
    p, tail = problem.p, TAIL * problem.q
    operations, moved = together(problem)
    if tile is None:
        return Work(operations, moved, 1.0, MEETING)
    sides = tile.block_m, tile.block_n
    waits = RELAY * (1.0 + p / RELAY_COLUMNS) * of_tile(problem, sides, problem.k)
    if problem.by_row:  # of float32
        first = math.ceil(math.ceil(problem.m / sides[0]) / peaks(problem.device).processors)
        turns = 1 + 4 * sides[0] * problem.core_size / CORES_IN_FLIGHT
        waits += first * turns * CORES_TURN
    return Work(operations, moved, UNHIDDEN, waits, waves(problem, sides, problem.k + tail) / GLUON)


def decode(problem: Problem) -> Work:
    """The work of `decode`: everything once, by programs that meet: K is split over them."""
    own = problem.m * OWN_CORE if problem.by_row else 0.0
    return Work(*together(problem), UNHIDDEN, MEETING + own)


def together(problem: Problem) -> tuple[float, float]:
    """The operations and the bytes of a pass in one launch."""
    m, k, n, p, q = problem[2:7]
    moved = m * k + n * k + m * n + p * k + n * q + m * p + 2 * m * q
    moved += m * problem.core_size if problem.by_row else 0
    operations = 2.0 * m * (n * k + n * q + k * p + problem.core_size)
    return operations, float(moved * problem.dtype.itemsize)
