"""Tile sizes: what they are, and which are valid. `tile_choice` has the one that a launch takes.

`is_valid` is the one statement of what a configuration must satisfy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KERNELS = ("shrink", "gemm_tail", "core_grad", "decode", "relay", "dropped", "gain_back")
MAX_RANK = 256  # P and Q at most: one shrink program holds whole rows of t
SMALL_M = 64  # up to here a launch takes the tile for few rows
MAKERS = 8  # of t at most, in a relay
RELAY_RANK = 64  # padded(P) and padded(Q) at most: relay holds t and the core beside its tiles
FEW_M = 32  # up to here one of decode does, which has at most SMALL_M
MANY = 1 << 20  # rows or columns, as many as fill any device


@dataclass(frozen=True)
class Target:
    """A kind of device for which the compile gate compiles every kernel."""

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
HOPPER_SHARED = TARGETS["sm_90"].shared
BARRIERS = 1024  # bytes of a launch for Hopper, with what is lost between buffers


@dataclass(frozen=True)
class TileConfig:
    """One program's tile: `block_m` rows of the output (of the reduction in `core_grad`).

    `gemm_tail` makes block_m × block_n of y, block_k of K at a time, by pointers, by descriptors
    (`persistent`) or by the kernel for Hopper (`hopper`). `shrink` holds all of P and
    makes block_n columns of u at a time. `core_grad` makes block_n × block_n of dcore. `relay`
    makes tiles as `gemm_tail` does, and holds all of P beside those of the first column. `decode`
    makes block_m × block_n of y, and in some programs all of t, with all rows in the one tile.
    `dropped` makes block_m × block_k, `gain_back` so much at a time.
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
    """A launch, as far as its tile depends on it."""

    kernel: str  # one of KERNELS
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
    """The constants for a kernel's ranks; r is 0 of a matrix, -1 of no core, -2 of a diagonal."""
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
    """The number of sums that a thread may hold.

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
    loaded |= {"decode": (m + n + spec.pad_p) * k, "dropped": m * k, "gain_back": m * k}
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
    """Whether a launch can go through tensor descriptors, and gains by it."""
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
    """The most columns of such tiles that may make t: each has a slice of K, a step at least."""
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
