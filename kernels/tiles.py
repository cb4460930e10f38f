"""Tile sizes: what they are, which are valid, which one a launch takes.

`is_valid` is the one statement of what a configuration must satisfy; `select` gives the default for
a shape and a device kind; everything it can give is compiled by the compile gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

MAX_RANK = 256  # P and Q at most: one shrink program holds whole rows of t
SMALL_M = 64  # up to here a launch takes the tile for few rows
RELAY_RANK = 64  # padded(P) at most: relay holds rows of t beside its tile of y
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


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 166_912),
        Target("sm_89", "cuda", 89, 32, 101_376),
        Target("sm_90", "cuda", 90, 32, 232_448),
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

    `gemm_tail` makes block_m × block_n of y, block_k of K at a time. `shrink` holds all of P and
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
    overlap: bool = False  # shrink lets the next launch start; gemm_tail starts beside a shrink
    whole_k: bool = False  # shrink does not split K: the partial sums would spill
    tf32x3: bool = False  # fp32 is multiplied by tensor cores, in three products of TF32
    own_cores: int = 4096  # numbers of them at a time, where each row has a core of its own

    def __str__(self) -> str:
        sides = f"{self.block_m}x{self.block_n}x{self.block_k}"
        kinds = [name for name in ("persistent", "overlap", "tf32x3") if getattr(self, name)]
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
    n: int = 0  # columns of y, in gemm_tail

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
    if spec.kernel == "gemm_tail":
        stage = (m + n) * k * spec.itemsize
    elif spec.kernel == "relay":
        stage = ((m + n) * spec.itemsize + spec.pad_p * spec.factor_itemsize) * k
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
        return 160 if spec.kernel == "relay" else 128
    if target.backend == "hip":
        return 16 if spec.itemsize == 2 and spec.aligned else 8
    return 64 if spec.itemsize == 2 else 16


def is_valid(config: TileConfig, target: Target, spec: Spec) -> bool:
    """Whether `config` can be launched for `spec` on `target` and keeps its sums in registers."""
    m, n, k = config.block_m, config.block_n, config.block_k
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
        and (not config.persistent or has_descriptors(target, spec) or has_relay(target, spec))
        and (spec.kernel != "relay" or (config.persistent and has_relay(target, spec)))
        and (not config.overlap or target.name in TENSOR)
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


def has_relay(target: Target, spec: Spec) -> bool:
    """Whether the whole layer can be one launch, as far as its operands go."""
    there = target.name in TENSOR and spec.kernel == "relay" and not spec.dropout
    there = there and not spec.by_row
    return there and spec.itemsize == 2 and spec.aligned and spec.pad_p <= RELAY_RANK


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
    tiles: int = 0  # at least so many of them in y

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
            and self.tiles <= -(-m // self.tile.block_m) * -(-spec.n // self.tile.block_n)
        )


PERSISTENT = TileConfig(128, 256, 64, 8, 3, max_registers=255, persistent=True)
SPLIT = replace(PERSISTENT, block_n=128, num_stages=4)  # leaves registers to the tail, or to t
HALF = replace(SPLIT, num_stages=5)
QUARTER = TileConfig(128, 64, 128, 4, 4, persistent=True)

# The first line that covers a launch is its default. Tiles are (M, N, K, warps, stages).
DEFAULTS = (
    Default("gemm_tail", TileConfig(64, 32, 128, 4, 4), TENSOR, 2, True, small=True),
    Default("gemm_tail", SPLIT, ("sm_100",), 2, True, True),
    Default("gemm_tail", PERSISTENT, ("sm_100",), 2, True),
    Default("gemm_tail", PERSISTENT, HOPPER, 2, True, tiles=FULL),
    Default("gemm_tail", HALF, HOPPER, 2, True, tiles=FULL),
    Default("gemm_tail", QUARTER, HOPPER, 2, True, tiles=FULL),
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
    Default("decode", TileConfig(64, 32, 32, 8, 2), CDNA, 2, False),
    Default("decode", TileConfig(64, 64, 32, 8, 2), None, 2),
    Default("decode", TileConfig(64, 32, 16, 8, 2)),
    Default("dropped", TileConfig(16, 16, 256, 4, 1)),
    Default("core_grad", TileConfig(128, 32, 16, 4, 3), CUDA, 2, True, rank=64, by_row=False),
    Default("core_grad", TileConfig(64, 64, 16, 4, 3), None, 2, True),
    Default("core_grad", TileConfig(32, 64, 16, 4, 2), None, 2, False),
    Default("core_grad", TileConfig(16, 64, 16, 8, 2)),
    Default("relay", SPLIT, ("sm_100",), 2, True, rank=RELAY_RANK, dropout=False),
    Default("relay", SPLIT, ("sm_90",), 2, True, True, rank=RELAY_RANK, dropout=False),
    Default("relay", PERSISTENT, ("sm_90",), 2, True, rank=RELAY_RANK, dropout=False),
)  # fmt: skip

# Tile sets to be measured beside the defaults, by kernel, for operands that are aligned: of 16 bits
# on sm_90 and sm_100 and, for "tf32x3", of fp32 on CUDA. With "overlap" both kernels fit on one
# multiprocessor, for P up to 64.
VARIANTS: dict[str, dict[str, TileConfig]] = {
    "pointers": {"gemm_tail": replace(PERSISTENT, persistent=False)},
    "deep": {"gemm_tail": replace(PERSISTENT, num_stages=4)},
    "narrow": {"gemm_tail": replace(PERSISTENT, block_n=128, num_warps=4, num_stages=4)},
    "overlap": {
        "gemm_tail": replace(PERSISTENT, overlap=True),
        "shrink": TileConfig(64, 16, 64, 4, 3, max_registers=128, overlap=True),
    },
    "tf32x3": {
        "gemm_tail": TileConfig(128, 64, 32, 8, 3, max_registers=255, tf32x3=True),
        "shrink": TileConfig(64, 16, 32, 4, 3, max_registers=255, tf32x3=True),
    },
}


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
    return replace(tile, max_registers=255)


def select(target: Target, spec: Spec, m: int) -> TileConfig:
    """The default tile for a launch of `m` rows.

    That of `decode` has as few rows as hold them. It need not be valid: for a large P it cannot be.
    """
    if spec.kernel != "decode":
        return _default(target, spec, m)
    return replace(_default(target, spec, m), block_m=min(padded(m), SMALL_M))
