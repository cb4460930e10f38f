"""The tile that a launch takes by itself, and sets of others to be measured beside it.

`select` gives the default for a shape and a kind of device, `experimental_tile` the one of a named
set. The compile gate compiles everything that the two can give.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from .tiles import (
    AMPERE,
    CDNA,
    CUDA,
    FEW_M,
    HOPPER,
    HOPPER_SHARED,
    MAKERS,
    MANY,
    MAX_RANK,
    SMALL_M,
    TENSOR,
    Spec,
    Target,
    TileConfig,
    has_hopper,
    hopper_bytes,
    most_makers,
    padded,
    shared_bytes,
    widths,
)

FULL = 96  # tiles that about fill an sm_90, which has 114 to 132 multiprocessors


def fills(tile: TileConfig, spec: Spec, m: int) -> bool:
    """Whether y (m, N) has at least FULL such tiles."""
    return -(-m // tile.block_m) * -(-(spec.n or MANY) // tile.block_n) >= FULL


@dataclass(frozen=True)
class Default:
    """A tile, and the launches that it is for; a field that is None leaves them open."""

    kernel: str
    tile: TileConfig
    targets: tuple[str, ...] | None = None
    itemsize: int | None = None
    aligned: bool | None = None
    wide: bool | None = None
    rank: int = MAX_RANK  # padded(P) at most
    small: bool | None = None  # at most SMALL_M rows; of decode, FEW_M
    dropout: bool | None = None
    by_row: bool | None = None
    fills: bool = False  # and only where y has as many such tiles as about fill the device

    def covers(self, target: str, spec: Spec, m: int) -> bool:
        """Whether a launch of `m` rows on a device of that kind may take the tile."""
        if self.kernel != spec.kernel or spec.pad_p > self.rank:
            return False
        small = m <= (FEW_M if spec.kernel == "decode" else SMALL_M)
        asked = (self.itemsize, self.aligned, self.wide, self.small, self.dropout, self.by_row)
        given = (spec.itemsize, spec.aligned, spec.wide, small, spec.dropout, spec.by_row)
        return (
            (self.targets is None or target in self.targets)
            and all(a is None or a == g for a, g in zip(asked, given, strict=True))
            and (not self.fills or fills(self.tile, spec, m))
        )


PERSISTENT = TileConfig(128, 256, 64, 8, 3, max_registers=255, persistent=True)
SPLIT = replace(PERSISTENT, block_n=128, num_stages=4)  # leaves registers to the tail, or to t
HALF = replace(SPLIT, num_stages=5)
QUARTER = TileConfig(128, 64, 128, 4, 4, persistent=True)
FP32 = TileConfig(64, 32, 32, 8, 4)  # of decode: 16 bytes of W to a thread

# The first line that covers a launch is its default. Tiles are (M, N, K, warps, stages).
DEFAULTS = (
    Default("gemm_tail", TileConfig(64, 32, 128, 4, 4), TENSOR, 2, True, small=True),
    Default("gemm_tail", SPLIT, ("sm_100",), 2, True, True),
    Default("gemm_tail", PERSISTENT, ("sm_100",), 2, True),
    Default("gemm_tail", PERSISTENT, HOPPER, 2, True, fills=True),
    Default("gemm_tail", HALF, HOPPER, 2, True, fills=True),
    Default("gemm_tail", QUARTER, HOPPER, 2, True, fills=True),
    Default("gemm_tail", TileConfig(64, 64, 128, 4, 4), HOPPER, 2, True),
    Default("gemm_tail", TileConfig(64, 32, 64, 4, 4), AMPERE, 2, True, small=True),
    Default("gemm_tail", TileConfig(128, 128, 32, 8, 4), AMPERE, 2, True),
    Default("gemm_tail", TileConfig(64, 32, 64, 4, 2), CDNA, 2, True, small=True),
    Default("gemm_tail", TileConfig(128, 128, 64, 8, 2), CDNA, 2, True, True),
    Default("gemm_tail", TileConfig(128, 256, 64, 8, 2), CDNA, 2, True),
    Default("gemm_tail", TileConfig(64, 32, 32, 4, 2), None, 2, False, small=True),
    Default("gemm_tail", TileConfig(64, 128, 32, 8, 2), None, 2, False),
    Default("gemm_tail", TileConfig(32, 32, 16, 4, 2), small=True),
    Default("gemm_tail", TileConfig(64, 64, 16, 8, 2), CUDA, aligned=False),
    Default("gemm_tail", TileConfig(64, 64, 16, 4, 2)),
    Default("shrink", TileConfig(64, 16, 32, 4, 2), CDNA, 2, True, rank=64, dropout=True),
    Default("shrink", TileConfig(64, 16, 32, 4, 2, whole_k=True), CDNA, 2, True, dropout=True),
    Default("shrink", TileConfig(16, 16, 64, 4, 4), None, 2, True, rank=64, small=True),
    Default("shrink", TileConfig(64, 16, 64, 8, 4), TENSOR, 2, True, rank=64, dropout=True),
    Default("shrink", TileConfig(64, 16, 128, 4, 4), HOPPER, 2, True, rank=32, dropout=False),
    Default("shrink", TileConfig(32, 16, 128, 4, 4), HOPPER, 2, True, rank=64, dropout=False),
    Default("shrink", TileConfig(64, 32, 64, 4, 4), CUDA, 2, True, False, rank=64),
    Default("shrink", TileConfig(64, 16, 64, 4, 4), CUDA, 2, True, rank=64),
    Default("shrink", TileConfig(64, 16, 64, 8, 3), TENSOR, 2, True, rank=128),
    Default("shrink", TileConfig(64, 16, 64, 8, 2), TENSOR, 2, True),
    Default("shrink", TileConfig(64, 16, 32, 8, 3), AMPERE, 2, True, rank=128),
    Default("shrink", TileConfig(64, 16, 32, 8, 2), AMPERE, 2, True),
    Default("shrink", TileConfig(64, 16, 64, 4, 2), CDNA, 2, True, rank=64),
    Default("shrink", TileConfig(64, 16, 64, 4, 2, whole_k=True), CDNA, 2, True, rank=128),
    Default("shrink", TileConfig(64, 16, 32, 4, 2, whole_k=True), CDNA, 2, True),
    Default("shrink", TileConfig(64, 16, 32, 8, 2), None, 2, False, rank=128),
    Default("shrink", TileConfig(16, 16, 16, 8, 2), CUDA, 2, False, True),
    Default("shrink", TileConfig(32, 16, 16, 8, 2), None, 2, False),
    Default("shrink", TileConfig(32, 16, 16, 8, 2), rank=64),
    Default("shrink", TileConfig(16, 16, 16, 8, 2)),
    Default("decode", TileConfig(64, 32, 64, 4, 4), ("sm_100",), 2, True, True, rank=64),
    Default("decode", TileConfig(64, 64, 64, 4, 5), TENSOR, 2, True, rank=64, small=True),
    Default("decode", TileConfig(64, 64, 64, 4, 4), TENSOR, 2, True, rank=64),
    Default("decode", TileConfig(64, 64, 64, 4, 3), AMPERE, 2, True, rank=64, small=True),
    Default("decode", TileConfig(64, 64, 64, 8, 3), AMPERE, 2, True, rank=64),
    Default("decode", TileConfig(64, 64, 64, 8, 2), CUDA, 2, True, rank=128),
    Default("decode", TileConfig(64, 64, 16, 8, 2), CDNA, 2, True, True),
    Default("decode", replace(FP32, num_stages=6), CUDA, 4, True, rank=64, small=True),
    Default("decode", FP32, ("sm_89",), 4, True, rank=32, by_row=False),  # else it spills
    Default("decode", replace(FP32, max_registers=128), CUDA, 4, True, rank=32, by_row=False),
    Default("decode", FP32, CUDA, 4, True),
    Default("decode", TileConfig(64, 32, 32, 8, 2), CDNA, 2, False),
    Default("decode", TileConfig(64, 64, 32, 8, 2), None, 2),
    Default("decode", TileConfig(64, 32, 16, 8, 2)),
    Default("dropped", TileConfig(16, 16, 256, 4, 1)),
    Default("gain_back", TileConfig(32, 16, 128, 4, 2)),
    Default("core_grad", TileConfig(128, 32, 16, 4, 3), CUDA, 2, True, rank=64, by_row=False),
    Default("core_grad", TileConfig(64, 64, 16, 4, 3), None, 2, True),
    Default("core_grad", TileConfig(32, 64, 16, 4, 2), None, 2, False),
    Default("core_grad", TileConfig(16, 64, 16, 8, 2)),
)  # fmt: skip

# Tile sets to be measured beside the defaults, by kernel, for operands that are aligned: of 16 bits
# on sm_90 and sm_100 and, for "tf32x3", of fp32 on CUDA.
EXPERIMENTAL_TILES: dict[str, dict[str, TileConfig]] = {
    "pointers": {"gemm_tail": replace(PERSISTENT, persistent=False)},
    "deep": {"gemm_tail": replace(PERSISTENT, num_stages=4)},
    "narrow": {"gemm_tail": replace(PERSISTENT, block_n=128, num_warps=4, num_stages=4)},
    "tf32x3": {
        "gemm_tail": TileConfig(128, 64, 32, 8, 3, max_registers=255, tf32x3=True),
        "shrink": TileConfig(64, 16, 32, 4, 3, max_registers=255, tf32x3=True),
    },
}

# Further sets: those in which so many columns of tiles make t, or as many as there can be, where
# `relay` otherwise has one.
SLICES = {"slices4": 4, "slices8": MAKERS}

# The tile for Hopper, and what of the matrix rate it reaches where it is so wide: on an H200 the
# middle one took 1.06 of the time of the widest where both filled the device. The last is a guess.
RING = TileConfig(128, 256, 64, 4, 4, max_registers=168, hopper=True, parts=4)
REACHED = {256: 1.0, 128: 0.94, 64: 0.7}
DEEPEST = {256: 4, 128: 5, 64: 6}  # stages
PROCESSORS = 132  # of an H100 and an H200: what a width is chosen by
MANY_TILES = 4 * PROCESSORS  # from here on a stage less, and larger parts of y, were faster


@functools.cache
def hopper_tile(spec: Spec, m: int) -> TileConfig:
    """The tile for a launch on Hopper of `m` rows: of the width with the least time on paper.

    That time is the number of tiles that a multiprocessor makes, times what one takes.
    """
    there, n = widths(spec)[::-1], spec.n or MANY
    tiles = {w: -(-m // RING.block_m) * -(-n // w) for w in there}
    width = min(there, key=lambda w: -(-tiles[w] // PROCESSORS) * w / REACHED[w])
    stages, group_m = DEEPEST[width], RING.group_m
    if spec.kernel == "relay" or (width == 256 and tiles[width] >= MANY_TILES):
        stages = min(stages - 1, 4)
    if spec.kernel == "relay":
        group_m = 16
    tile = replace(RING, block_n=width, num_stages=stages, group_m=group_m)
    tiles_of_parts = (replace(tile, parts=parts) for parts in (2, 4, 8))
    return next(t for t in tiles_of_parts if hopper_bytes(t, spec) <= HOPPER_SHARED)


def experimental_tile(name: str, target: Target, spec: Spec, m: int) -> TileConfig | None:
    """The tile for this launch in the set of that name, None where it has none for the kernel.

    The tile need not be valid. Where `relay` can have only one maker of t it is the default one.
    """
    if name not in SLICES:
        return EXPERIMENTAL_TILES.get(name, {}).get(spec.kernel)
    if spec.kernel != "relay" or not has_hopper(target, spec):
        return None
    tile = hopper_tile(spec, m)
    return replace(tile, makers=min(SLICES[name], most_makers(tile, spec)))


def _default(target: Target, spec: Spec, m: int) -> TileConfig:
    tile = next(line.tile for line in DEFAULTS if line.covers(target.name, spec, m))
    # A device with less shared memory than its kind: fewer stages, then less of K at a time.
    while shared_bytes(tile, target, spec) > target.shared and tile.num_stages * tile.block_k > 16:
        if tile.num_stages > 1:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        else:
            tile = replace(tile, block_k=tile.block_k // 2)
    if target.backend == "hip":  # masks take scalar registers, which are few: too few in decode
        return replace(tile, own_cores=1024)
    # ptxas otherwise spills now and then, to run more programs side by side.
    return replace(tile, max_registers=tile.max_registers or 255)


def select(target: Target, spec: Spec, m: int) -> TileConfig:
    """The default tile for a launch of `m` rows.

    For `decode` it has as few rows as hold all of them. It need not be valid: for a large P no tile
    is. `relay` has one only where `has_hopper` says so.
    """
    if has_hopper(target, spec) and (spec.kernel == "relay" or fills(RING, spec, m)):
        return hopper_tile(spec, m)
    if spec.kernel != "decode":
        return _default(target, spec, m)
    return replace(_default(target, spec, m), block_m=min(padded(m), SMALL_M))
