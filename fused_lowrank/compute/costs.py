"""What a plan costs on paper: operations, bytes and launches, against what a device can do.

Each plan is a few steps, one after the other; a step takes the longer of its operations at the
matrix rate and its bytes at the bandwidth, and what starting it takes. The constants decide only
where nothing has been measured (`tuning`): those of GPUs are predictions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .operands import Problem


@dataclass(frozen=True)
class Peaks:
    """What a device can do."""

    wide: float  # operations per second, float32
    narrow: float  # 16 bits, on matrix units
    bandwidth: float  # bytes per second
    start: float  # seconds from the end of one launch to the work of the next

    def rate(self, dtype: torch.dtype) -> float:
        """Operations per second in a dtype."""
        return self.narrow if dtype.itemsize == 2 else self.wide


# From the makers' data sheets: dense rates and bandwidth, by a part of the device's name. The
# first that fits counts.
LISTED = {
    "H200": (67e12, 989e12, 4.8e12),
    "GH200": (67e12, 989e12, 4.0e12),
    "H100 PCIe": (51e12, 756e12, 2.0e12),
    "H100 NVL": (60e12, 835e12, 3.9e12),
    "H100": (67e12, 989e12, 3.35e12),
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
REACHED, FILLED = 0.75, 0.9  # of the matrix rate and of the bandwidth, by good kernels
CPU_RATES = {"AVX512": (100e9, 300e9), "AVX2": (50e9, 50e9)}  # of one thread
CPU_BANDWIDTH, CPU_START = 25e9, 5e-6
GPU_START = 3e-6

# Shares of the library's rate. Of the GEMM with a tail, persistent by descriptors and not:
PERSISTENT, POINTERS = 0.95, 0.85
FEW_ROWS, DECODE = 0.7, 0.85  # of the bandwidth
MEETING = 2e-6  # seconds for which programs of one launch wait for each other
# A relay's first column makes t as well, and the others wait for it: this, over N, is lost.
RELAY = 85.0
# On a CPU a GEMM that adds to what is there is slow in 16 bits: as many bytes more, for each of y.
ADDED = 8


@functools.cache
def peaks(device: torch.device) -> Peaks:
    """The peaks of a device: listed, or from what it says of itself."""
    if device.type != "cuda":
        wide, narrow = CPU_RATES.get(torch.backends.cpu.get_cpu_capability(), (10e9, 10e9))
        threads = torch.get_num_threads()
        return Peaks(wide * threads, narrow * threads, CPU_BANDWIDTH, CPU_START)
    properties = torch.cuda.get_device_properties(device)
    for name, (wide, narrow, bandwidth) in LISTED.items():
        if name in properties.name:
            return Peaks(wide * REACHED, narrow * REACHED, bandwidth * FILLED, GPU_START)
    wide, narrow = PER_CYCLE.get(properties.major, PER_CYCLE[8])
    cycles = properties.multi_processor_count * CLOCK * REACHED
    return Peaks(wide * cycles, narrow * cycles, BANDWIDTH * FILLED, GPU_START)


class Work(NamedTuple):
    """A launch, or a library's call."""

    operations: float
    bytes: float
    share: float = 1.0  # of the device's peaks that it reaches
    waits: float = 0.0  # seconds


class Cost(NamedTuple):
    """A plan's cost, or the least that any can have."""

    operations: float
    bytes: float
    launches: int
    seconds: float


def total(parts: Sequence[Work], problem: Problem) -> Cost:
    """What the parts of a plan cost together, one after the other."""
    peak = peaks(problem.device)
    rate = peak.rate(problem.dtype)
    seconds = sum(
        max(part.operations / rate, part.bytes / peak.bandwidth) / part.share
        + part.waits
        + peak.start
        for part in parts
    )
    operations, moved = (sum(part[i] for part in parts) for i in (0, 1))
    return Cost(operations, moved, len(parts), seconds)


def least(at: Problem, adapted: bool = True) -> Cost:
    """The floor: everything computed and moved once, in one step; or so much for the bare layer."""
    size, rank = at.dtype.itemsize, at.p + at.q if adapted else 0
    operations = 2.0 * at.m * at.n * at.k
    moved = float((at.m * at.k + at.n * at.k + at.m * at.n) * size)
    if adapted:
        operations += 2.0 * at.m * (at.k * at.p + at.p * at.q + at.q * at.n)
        moved += (at.p * at.k + at.n * at.q + at.m * rank) * size
    peak = peaks(at.device)
    seconds = max(operations / peak.rate(at.dtype), moved / peak.bandwidth) + peak.start
    return Cost(operations, moved, 1, seconds)
