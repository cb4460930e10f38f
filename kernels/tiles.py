"""Tile sizes: what they are, which are valid, which one a launch takes.

`is_valid` is the one statement of what a configuration must satisfy; `select` gives the default for
a shape and a device kind; everything it can give is compiled by the compile gate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

KERNELS = ("shrink", "gemm_tail", "core_grad", "decode", "relay", "dropped")
MAX_RANK = 256  # P and Q at most: one shrink program holds whole rows of t
SMALL_M = 64  # up to here a launch takes the tile for few rows
MAKERS = 8  # of t at most, in a relay
RELAY_RANK = 64  # padded(P) and padded(Q) at most: relay holds t and the core beside its tiles
FEW_M = 32  # up to here one of decode does, which has at most SMALL_M
FULL = 96  # tiles that about fill an sm_90, which has 114 to 132 multiprocessors
MANY = 1 << 20  # rows or columns, as many as fill any device


@dataclass(frozen=True)
class Target:
    """A device kind that the kernels are proven for."""

    name: str
    backend: str  # "cuda" or "hip"
    arch: int | str
    warp_size: int
    shared: int  # bytes of shared memory that one program may use
    gluon: bool = False  # the kernels for Hopper can be had


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166_912),
        Target("sm_89", "cuda", 89, 32, 101_376),
        Target("sm_90", "cuda", 90, 32, 232_448, gluon=True),
        Target("sm_100", "cuda", 100, 32, 232_448),
        Target("gfx942", "hip", "gfx942", 64, 65_536),
    )
}

AMPERE = ("sm_80", "sm_89")  # mma.sync: operands and sums share the registers
TENSOR = ("sm_90", "sm_100")  # wgmma, tcgen05: operands stay in shared memory
CUDA = AMPERE + TENSOR
CDNA = ("gfx942",)
HOPPER = ("sm_90",)


@dataclass(frozen=True)
class TileConfig:
    """One program's tile: `block_m` rows of the output (of the reduction in `core_grad`).

    `gemm_tail` makes block_m × block_n of y, block_k of K at a time, by pointers, by descriptors
    (`persistent`) or by the kernel for Hopper (`hopper`). `shrink` holds all of P and
    makes block_n columns of u at a time. `core_grad` makes block_n × block_n of dcore. `relay`
    makes tiles as `gemm_tail` does, and holds all of P beside those of the first column. `decode`
    makes block_m × block_n of y, and in some programs all of t, with all rows in the one tile.
    `dropped` makes block_m × block_k.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    max_registers: int | None = None  # of a thread; CUDA only
    persistent: bool = False  # by tensor descriptors, one program per multiprocessor
    hopper: bool = False  # by warps with jobs of their own, one program per multiprocessor
    makers: int = 1  # of t in such a relay: columns of tiles, of which each sums a slice of K
    parts: int = 2  # in which such a tile is stored, of equal columns
    whole_k: bool = False  # shrink does not split K: the partial sums would spill
    tf32x3: bool = False  # fp32 is multiplied by tensor cores, in three products of TF32
    own_cores: int = 4096  # numbers of them at a time, where each row has a core of its own

    def __str__(self) -> str:
        sides = f"{self.block_m}x{self.block_n}x{self.block_k}"
        kinds = [name for name in ("persistent", "hopper", "tf32x3") if getattr(self, name)]
        kinds += [f"m{self.makers}"] if self.makers > 1 else []
        return " ".join([sides, f"w{self.num_warps}", f"s{self.num_stages}", *kinds])

    def options(self) -> dict[str, int]:
        """The compiler's options of a launch."""
        chosen = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return chosen if self.max_registers is None else {**chosen, "maxnreg": self.max_registers}


@dataclass(frozen=True)
class Spec:
    """What a launch is, as far as its tile depends on it."""

    kernel: str  # "shrink", "gemm_tail", "core_grad", "decode", "relay" or "dropped"
    itemsize: int  # of x, in bytes
    factor_itemsize: int  # of the widest of down, core and up that count for the tile
    aligned: bool  # addresses, strides and sizes of the big operands are multiples of 16
    pad_p: int  # padded(P)
    pad_q: int
    dropout: bool = False  # by the kernel itself
    by_row: bool = False  # a core for each row
    n: int = 0  # columns of y, where tiles depend on them; 0: many
    bulk: bool = False  # bulk copies can move all big operands, and down and up: `is_bulk`
    k: int = 0  # columns of x, where tiles depend on them; 0: many

    @property
    def wide(self) -> bool:
        """Whether a factor is wider than x, as an fp32 core beside bf16 is."""
        return self.factor_itemsize > self.itemsize


# (what is launched, M) → its tile, the same in every call: launches are kept under this object.
Choice = Callable[[Spec, int], TileConfig]


def padded(rank: int) -> int:
    """P, Q or r as the kernels tile it: a power of two, at least 16 (the smallest dot)."""
    return max(16, 1 << (rank - 1).bit_length())


def rank_constants(p: int, q: int, r: int) -> dict[str, int]:
    """What a kernel is told of the ranks; r is 0 where there is no pair, and -1 without a core."""
    return {
        "P": p,
        "Q": q,
        "R": r,
        "PAD_P": padded(p),
        "PAD_Q": padded(q),
        "PAD_R": padded(max(r, 1)),
    }


def shared_bytes(config: TileConfig, target: Target, spec: Spec) -> int:
    """Shared memory of the pipelined operands, an estimate: the compile gate reads the true one."""
    m, n, k = config.block_m, config.block_n, config.block_k
    if config.hopper:
        return hopper_bytes(config, spec)
    if spec.kernel == "gemm_tail":
        stage = (m + n) * k * spec.itemsize
    elif spec.kernel in ("shrink", "decode"):
        rows = m if spec.kernel == "shrink" else m + n
        stage = (rows * spec.itemsize + spec.pad_p * max(spec.itemsize, spec.factor_itemsize)) * k
    else:
        stage = (min(n, spec.pad_p) + min(n, spec.pad_q)) * m * spec.itemsize
    buffers = config.num_stages if target.backend == "cuda" else max(1, config.num_stages - 1)
    stored = m * (n // 2) * spec.itemsize if config.persistent else 0
    return buffers * stage + stored


def room(target: Target, spec: Spec) -> int:
    """How many sums a thread may hold.

    In `decode` those of t beside those of y leave room for the pointers of all three operands, and
    for the operands themselves where products are not on tensor cores.
    """
    if spec.kernel != "decode":
        return 128
    if target.backend == "hip":
        return 16 if spec.itemsize == 2 and spec.aligned else 8
    return 64 if spec.itemsize == 2 else 16


def is_valid(config: TileConfig, target: Target, spec: Spec) -> bool:
    """Whether `config` can be launched for `spec` on `target` and keeps its sums in registers."""
    m, n, k = config.block_m, config.block_n, config.block_k
    if config.hopper or spec.kernel == "relay":
        return is_valid_hopper(config, target, spec)
    threads = config.num_warps * target.warp_size
    held = {"gemm_tail": m * n, "core_grad": n * n}.get(spec.kernel, m * (spec.pad_p + n))
    # One pointer and one mask per element of an operand that no vector load fetches.
    loaded = {"gemm_tail": (m + n) * k, "shrink": (m + spec.pad_p) * k, "core_grad": 2 * m * n}
    loaded |= {"decode": (m + n + spec.pad_p) * k, "dropped": m * k}
    return (
        all(side >= 16 and side & (side - 1) == 0 for side in (m, n, k))
        and config.num_warps in (1, 2, 4, 8)
        and config.num_stages >= 1
        and spec.pad_p <= MAX_RANK
        and spec.pad_q <= MAX_RANK
        and (not config.persistent or has_descriptors(target, spec))
        and (not config.tf32x3 or has_tf32(target, spec))
        and (spec.kernel != "decode" or not spec.by_row or target.backend == "cuda")
        and held <= room(target, spec) * threads
        and (spec.aligned or loaded[spec.kernel] <= 64 * threads)
        and shared_bytes(config, target, spec) <= target.shared
    )


def has_descriptors(target: Target, spec: Spec) -> bool:
    """Whether a launch can go through tensor descriptors, and pays for it."""
    there = target.name in TENSOR and spec.kernel == "gemm_tail"
    return there and spec.itemsize == 2 and spec.aligned


def has_tf32(target: Target, spec: Spec) -> bool:
    """Whether a launch of fp32 can go through TF32 on tensor cores."""
    there = target.backend == "cuda" and spec.kernel in ("shrink", "gemm_tail") and spec.pad_p <= 64
    return (
        there and spec.itemsize == 4 >= spec.factor_itemsize and spec.aligned and not spec.dropout
    )


def is_bulk(x: Any, weight: Any, *factors: Any) -> bool:
    """Whether bulk copies can move x (M, K), W (N, K), y and the factors, which lie contiguous.

    They are of one dtype of 16 bits, and their rows are multiples of 16 bytes, as are addresses.
    """
    dtype, (rows, columns) = x.dtype, weight.stride()
    if (
        dtype.itemsize != 2
        or weight.dtype is not dtype
        or (x.stride(1), min(rows, columns)) != (1, 1)
    ):
        return False
    sizes, addresses = weight.shape[0] | x.stride(0) | max(rows, columns), x.data_ptr()
    addresses |= weight.data_ptr()
    for factor in factors:
        if factor.dtype is not dtype:
            return False
        sizes |= factor.shape[1]
        if factor.is_contiguous():  # others are made so first
            addresses |= factor.data_ptr()
    return sizes % 8 == 0 and addresses % 16 == 0 < x.stride(0)


def has_hopper(target: Target, spec: Spec) -> bool:
    """Whether the kernels for Hopper can make this launch, as far as its operands go."""
    relay = spec.kernel == "relay" and max(spec.pad_p, spec.pad_q) <= RELAY_RANK
    return (
        target.gluon
        and target.shared >= HOPPER_SHARED
        and (relay or spec.kernel == "gemm_tail")
        and spec.bulk
        and not spec.dropout
        and (relay or not spec.by_row)
    )


def is_valid_hopper(config: TileConfig, target: Target, spec: Spec) -> bool:
    """`is_valid` of a tile for Hopper: two groups of warps hold 64 rows of it each."""
    return (
        config.hopper
        and has_hopper(target, spec)
        and (config.block_m, config.block_k, config.num_warps) == (128, 64, 4)
        and config.block_n in widths(spec)
        and config.parts in (2, 4, 8)  # one alone would always go through the same buffer
        and config.block_n // config.parts in (32, 64, 128)
        and config.num_stages >= 2
        and 1 <= config.makers <= most_makers(config, spec)
        and shared_bytes(config, target, spec) <= target.shared
    )


def most_makers(config: TileConfig, spec: Spec) -> int:
    """How many columns of such tiles may make t: each has a slice of K, of one step at least."""
    if spec.kernel != "relay" or spec.by_row:
        return 1
    columns, steps = -(-(spec.n or MANY) // config.block_n), -(-(spec.k or MANY) // config.block_k)
    return min(MAKERS, columns, steps)


def widths(spec: Spec) -> tuple[int, ...]:
    """Columns that a tile for Hopper can have.

    The widest leaves few registers: not enough for t·core where that is three products of 64 × 64.
    """
    full = max(spec.pad_p, spec.pad_q) == RELAY_RANK and spec.factor_itemsize > 2 * spec.itemsize
    return (64, 128) if spec.kernel == "relay" and full else (64, 128, 256)


def hopper_bytes(config: TileConfig, spec: Spec) -> int:
    """Shared memory of a launch for Hopper, all of it."""
    m, n, k = config.block_m, config.block_n, config.block_k
    numbers = config.num_stages * (m + n) * k  # the ring
    numbers += 2 * m * (n // config.parts)  # two buffers for parts of y
    if spec.kernel == "relay":
        numbers += config.num_stages * spec.pad_p * k  # down, beside x and W
        numbers += m * spec.pad_q  # u
        numbers += 0 if spec.by_row else (1 + spec.wide) * spec.pad_p * spec.pad_q  # the core
    return 2 * numbers + BARRIERS


def fills(tile: TileConfig, spec: Spec, m: int) -> bool:
    """Whether y (m, N) has at least FULL such tiles."""
    return -(-m // tile.block_m) * -(-(spec.n or MANY) // tile.block_n) >= FULL


@dataclass(frozen=True)
class Default:
    """A tile and what it is for; None is anything."""

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
    Default("core_grad", TileConfig(128, 32, 16, 4, 3), CUDA, 2, True, rank=64, by_row=False),
    Default("core_grad", TileConfig(64, 64, 16, 4, 3), None, 2, True),
    Default("core_grad", TileConfig(32, 64, 16, 4, 2), None, 2, False),
    Default("core_grad", TileConfig(16, 64, 16, 8, 2)),
)  # fmt: skip

# Tile sets to be measured beside the defaults, by kernel, for operands that are aligned: of 16 bits
# on sm_90 and sm_100 and, for "tf32x3", of fp32 on CUDA.
VARIANTS: dict[str, dict[str, TileConfig]] = {
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
HOPPER_SHARED = TARGETS["sm_90"].shared
PROCESSORS = 132  # of an H100 and an H200: what a width is chosen by
MANY_TILES = 4 * PROCESSORS  # from here on a stage less, and larger parts of y, were faster
BARRIERS = 1024  # bytes, with what is lost between buffers


@functools.cache
def hopper_tile(spec: Spec, m: int) -> TileConfig:
    """The tile for a launch on Hopper of `m` rows: of the width with the least time on paper.

    That is the number of tiles that a multiprocessor makes, of the time that one takes.
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


def variant(name: str, target: Target, spec: Spec, m: int) -> TileConfig | None:
    """The tile for this launch in the set of that name, None where it has none for the kernel.

    It need not be valid, and is the default one where `relay` can have but one maker of t.
    """
    if name not in SLICES:
        return VARIANTS.get(name, {}).get(spec.kernel)
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

    That of `decode` has as few rows as hold them. It need not be valid: for a large P it cannot be.
    `relay` has one where `has_hopper` says so.
    """
    if has_hopper(target, spec) and (spec.kernel == "relay" or fills(RING, spec, m)):
        return hopper_tile(spec, m)
    if spec.kernel != "decode":
        return _default(target, spec, m)
    return replace(_default(target, spec, m), block_m=min(padded(m), SMALL_M))
