"""What the compile gate compiles: launches that stand for every kernel the library can launch.

P, Q and r are compile-time constants, so these are too many to name. The table has `cases`: a flag
that only takes code away, or that changes no register, has one representative, and each such
reduction is said where it is made. `sampled` puts the reductions to the test, at random.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from fused_lowrank.kernels.tile_choice import EXPERIMENTAL_TILES, SLICES
from fused_lowrank.kernels.tiles import RELAY_RANK, SMALL_M

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

FEW_TILES = {"h": 1024, "q": 512, "e": 256}  # rows, by a case's flags, beside 2048 columns
ROWS = {"s": 2 * SMALL_M, "v": 2176, **FEW_TILES}


@dataclass(frozen=True, order=True)
class Case:
    """One launch. Equal field order and column order of the table."""

    kernel: str
    x: str  # dtype of x; of t and g in core_grad
    down: str  # dtype of down or up
    core: str  # dtype of the core's factors
    layout: str  # "forward", "transposed", or "strided": forward with no stride of 1
    aligned: bool
    p: int
    q: int
    r: int  # of the pair; 0: one matrix; -1: no core; -2: a diagonal
    flags: str  # stored: t and u; b(ias), g(ain), d(ropout), s(plit over K); gradients a and b;
    # h(alf), q(uarter), e(ighth of the rows that fill a device with gemm_tail's largest tile), or
    # v: some more than fill it; m(any cores): one for each row or, w(eighted), two
    even_k: bool
    small: bool  # the tile for few rows; for fewer still in decode
    variant: str = ""  # the tile set of that name instead of the default


Layouts = list[tuple[str, bool]]
Ranks = list[tuple[int, int, int, bool]]  # P, Q, r as a case has it, K even

ALIGNED: Layouts = [("forward", True), ("transposed", True)]
UNALIGNED: Layouts = [("forward", False), ("transposed", False)]
STRIDED: Layouts = [("strided", False)]
# An odd K only adds masks: partial ranks have it, full ones do not.
FULL: Ranks = [(16, 16, 0, True), (64, 64, 8, True), (128, 32, 0, True), (256, 256, 0, True)]
FULL += [(256, 256, 64, True), (32, 256, -1, True)]
PARTIAL: Ranks = [(8, 8, 0, False), (25, 48, 4, False), (200, 200, 48, False)]
ODD: Ranks = [(48, 25, 4, False), (100, 100, 0, False), (200, 200, 0, False), (200, 200, 63, True)]
DIAGONAL: Ranks = [(64, 64, -2, True), (200, 200, -2, False)]
# Beside x: every factor like it; an fp32 core (the usual mixture); every factor fp32.
SAME, CORE, ALL = ("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")
SAME_16, CORE_16 = ("fp16", "fp16"), ("fp16", "fp32")


def combinations(
    kernel: str,
    x: str,
    factors: list[tuple[str, str]],
    layouts: Layouts,
    ranks: Ranks,
    smalls: Iterable[bool] = (False,),
    *,
    flags: str,
) -> Iterator[Case]:
    """Launches of `shrink` or `decode`: one for every combination of what is listed."""
    product = itertools.product(factors, layouts, ranks, smalls)
    for (down, core), (layout, aligned), (p, q, r, even), small in product:
        yield Case(kernel, x, down, core, layout, aligned, p, q, r, flags, even, small)


def shrink_cases() -> Iterator[Case]:
    some = functools.partial(combinations, "shrink", flags="tu")
    # Storing t and u is the most a launch can do: it stands for all.
    yield from some("bf16", [SAME], ALIGNED, FULL + PARTIAL)
    yield from some("bf16", [CORE], ALIGNED, FULL[:5] + PARTIAL[1:])
    yield from some("bf16", [SAME, CORE], UNALIGNED, ODD)
    # No stride of 1 takes more pointers than one: with one kind of factor it stands for all.
    yield from some("bf16", [SAME], STRIDED, ODD)
    yield from some("bf16", [ALL], ALIGNED, [FULL[0], FULL[3], FULL[4]])
    yield from some("bf16", [ALL], UNALIGNED, ODD[2:])
    # Few row tiles share K among programs, which only adds to a launch.
    yield from some("bf16", [CORE], ALIGNED, [FULL[1], FULL[4], PARTIAL[1]], flags="tus")
    yield from some("bf16", [CORE], UNALIGNED[:1] + STRIDED, ODD[1:3], flags="tus")
    yield from some("fp32", [ALL], ALIGNED, [FULL[1], FULL[4]], flags="tus")
    yield from some("bf16", [CORE], ALIGNED[:1], [FULL[1]], flags="tuds")
    # The tile for few rows differs for P up to 64 alone; it shares K.
    yield from some("bf16", [SAME, ALL], ALIGNED, [FULL[1], PARTIAL[1]], (True,))
    # fp16 is laid out as bf16 is; fp32 factors beside it take one more product.
    yield from some("fp16", [SAME_16, CORE_16], ALIGNED, [FULL[1], FULL[4]])
    yield from some("fp16", [SAME_16, CORE_16], UNALIGNED, [ODD[0], ODD[3]])
    yield from some("fp16", [ALL], ALIGNED, FULL[3:5])
    yield from some("fp16", [ALL], UNALIGNED, ODD[2:])
    yield from some("fp32", [ALL], ALIGNED, [FULL[1], FULL[4], (234, 234, 0, False)])
    yield from some("fp32", [ALL], UNALIGNED + STRIDED, [ODD[0], ODD[3]])
    yield from some("fp32", [ALL], STRIDED, [(64, 256, 64, True)], (False, True))
    # Factors narrower than x are widened as they are loaded.
    yield from some("fp32", [SAME], ALIGNED + UNALIGNED, [ODD[0], ODD[3]])
    # Dropout of x is in the forward alone; to store its bits only adds to a launch.
    for layouts, ranks in ((ALIGNED[:1], FULL[:5] + PARTIAL), (UNALIGNED[:1] + STRIDED, ODD)):
        yield from some("bf16", [CORE], layouts, ranks, flags="tud")
    yield from some("bf16", [SAME], ALIGNED[:1], [FULL[1]], (True,), flags="tud")
    yield from some("fp16", [CORE_16], ALIGNED[:1], [FULL[1], FULL[4]], flags="tud")
    yield from some("fp32", [ALL], ALIGNED[:1], [FULL[1], FULL[4]], flags="tud")
    yield from some("fp32", [ALL], STRIDED, [ODD[0], ODD[3]], flags="tud")
    # A core for each row is read where t lies, whatever made t; two, weighted, are the most.
    yield from some("bf16", [CORE], ALIGNED, [FULL[0], FULL[1], FULL[4]], flags="tumw")
    yield from some("bf16", [CORE], UNALIGNED[1:] + STRIDED, [ODD[0], ODD[3]], flags="tumw")
    yield from some("bf16", [SAME], ALIGNED[:1], [FULL[4]], flags="tumw")
    yield from some("bf16", [CORE], ALIGNED[:1], [FULL[1]], flags="tum")
    yield from some("bf16", [CORE], ALIGNED[:1], [FULL[1]], flags="tudsm")
    yield from some("fp16", [CORE_16], STRIDED, [ODD[0]], flags="tumw")
    yield from some("fp32", [ALL], STRIDED, [ODD[3]], flags="tumw")
    # A diagonal is loaded where t's sums are, or with t, and nothing is multiplied by a matrix.
    yield from some("bf16", [CORE], ALIGNED, DIAGONAL)
    yield from some("bf16", [SAME], UNALIGNED[:1], DIAGONAL[1:])
    yield from some("fp32", [ALL], ALIGNED[:1], DIAGONAL[:1])
    yield from some("bf16", [CORE], ALIGNED[:1], DIAGONAL, flags="tumw")
    for flags in ("t", "u"):  # the backward where the core alone is trained, and inference
        yield from some("bf16", [SAME], ALIGNED[:1], [FULL[1]], flags=flags)


def gemm_cases() -> Iterator[Case]:
    def some(
        x: str,
        up: str,
        layouts: Layouts,
        ranks: list[tuple[int, bool]],
        smalls: Iterable[bool] = (False, True),
        flags: str = "b",
    ) -> Iterator[Case]:
        product = itertools.product(layouts, ranks, smalls)
        for (layout, aligned), (q, even), small in product:
            yield Case("gemm_tail", x, up, "", layout, aligned, 0, q, 0, flags, even, small)

    # A bias only adds to a launch, so it is there; up in another dtype only changes the tail.
    yield from some("bf16", "bf16", ALIGNED, [(16, True), (79, False), (256, True), (200, False)])
    yield from some("bf16", "bf16", UNALIGNED + STRIDED, [(200, False)])
    yield from some("bf16", "bf16", UNALIGNED, [(64, True), (142, True)], (False,))
    yield from some("bf16", "fp32", ALIGNED + UNALIGNED, [(200, False)])
    yield from some("bf16", "fp32", ALIGNED, [(64, True)], (False,))
    yield from some("fp16", "fp16", ALIGNED, [(64, True), (200, False)])
    yield from some("fp16", "fp16", UNALIGNED, [(100, False)])
    yield from some("fp16", "fp32", ALIGNED, [(64, True)], (False,))
    yield from some("fp32", "fp32", ALIGNED + UNALIGNED, [(189, False), (200, False)])
    yield from some("fp32", "bf16", ALIGNED + UNALIGNED, [(200, False)], (False,))
    yield from some("fp32", "fp32", STRIDED, [(200, False)], (False,))
    yield from some("bf16", "bf16", ALIGNED, [(0, True), (16, True)], (False,), flags="")
    for flag in FEW_TILES:
        ranks = [(16, True), (79, False), (256, True)]
        yield from some("bf16", "bf16", ALIGNED, ranks, (False,), flags="b" + flag)
        yield from some("bf16", "fp32", ALIGNED, [(64, True)], (False,), flags="b" + flag)
        yield from some("fp16", "fp32", ALIGNED, [(200, False)], (False,), flags="b" + flag)
    # A gain is of the forward alone; it only adds to what follows the loop.
    ahead, odd = ALIGNED[:1], UNALIGNED[:1] + STRIDED
    yield from some("bf16", "bf16", ahead, [(16, True), (256, True)], flags="bg")
    yield from some("bf16", "fp32", ahead + odd, [(200, False)], flags="bg")
    yield from some("bf16", "bf16", ahead, [(64, True)], (False,), flags="g")
    for flag in FEW_TILES:
        yield from some("bf16", "bf16", ahead, [(64, True)], (False,), flags="bg" + flag)
    yield from some("fp16", "fp16", ahead, [(64, True)], flags="bg")
    yield from some("fp32", "fp32", ahead + odd, [(200, False)], flags="bg")
    # Dropout masks the tail of the backward alone.
    aligned, unaligned = ALIGNED[1:], UNALIGNED[1:]
    yield from some("bf16", "bf16", aligned, [(16, True), (64, True), (256, True)], flags="d")
    yield from some("bf16", "bf16", aligned + unaligned, [(200, False)], flags="d")
    yield from some("fp16", "fp16", aligned + unaligned, [(79, False)], flags="d")
    yield from some("bf16", "fp32", aligned, [(200, False)], flags="d")
    yield from some("fp32", "fp32", aligned + unaligned, [(64, True), (189, False)], flags="d")


def core_grad_cases() -> Iterator[Case]:
    def some(
        x: str, core: str, ranks: list[tuple[int, int, int]], wants: Iterable[str] = ("ab",)
    ) -> Iterator[Case]:
        for (p, q, r), wanted in itertools.product(ranks, wants):
            is_aligned = p % 16 == q % 16 == 0
            layout, even, small = "forward", True, False  # it has no such choices
            yield Case("core_grad", x, x, core, layout, is_aligned, p, q, r, wanted, even, small)

    full = [(16, 16, 0), (64, 64, 8), (256, 256, 0), (256, 256, 64), (256, 128, 149)]
    odd = [(8, 8, 0), (25, 48, 4), (200, 200, 0), (200, 16, 63)]
    for x, core in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
        yield from some(x, core, full + odd)
    for core in ("fp16", "fp32"):
        yield from some("fp16", core, [full[3], odd[3]])
    yield from some("fp32", "bf16", [full[3], odd[3]])
    yield from some("bf16", "fp32", [full[1]], ("a", "b"))
    yield from some("bf16", "fp32", [(64, 64, -2), (200, 200, -2)])
    yield from some("fp32", "fp32", [(256, 256, -2)])
    yield from some("bf16", "fp32", [(64, 64, -2)], ("m", "mws"))
    # By adapter the core is not read, nor is there anything to do for a pair.
    yield from some("bf16", "fp32", [(64, 64, 0)], ("m", "mw", "mws"))
    yield from some("bf16", "fp32", [full[2], odd[2]], ("mw",))
    yield from some("fp16", "fp32", [odd[0]], ("mw",))
    yield from some("fp32", "fp32", [full[2]], ("mw",))


def hopper_cases() -> Iterator[Case]:
    """For sm_90 alone, in place of other launches of `gemm_tail` and of all of `relay`.

    Each way, every kind of core, and each width of tiles; with several makers of t, whose K-loops
    are alike both ways, each way for the smallest ranks and the largest.
    """

    def gemm(x: str, q: int, flags: str, layouts: Layouts = ALIGNED) -> Iterator[Case]:
        for layout, aligned in layouts:
            yield Case("gemm_tail", x, x, "", layout, aligned, 0, q, 0, flags, True, False)

    def relay(
        x: str,
        core: str,
        p: int,
        q: int,
        r: int,
        flags: str = "tb",
        tiles: str = "",
        layouts: Layouts = ALIGNED,
    ) -> Iterator[Case]:
        for layout, aligned in layouts:
            yield Case("relay", x, x, core, layout, aligned, p, q, r, flags, True, False, tiles)

    yield from gemm("bf16", 0, "v")
    yield from gemm("bf16", 64, "bv")
    yield from gemm("fp16", 256, "b")
    yield from relay("bf16", "fp32", 16, 16, 0)
    yield from relay("bf16", "fp32", 64, 64, 0)
    yield from relay("bf16", "bf16", 64, 64, 0, "t")
    yield from relay("bf16", "fp32", 64, 64, 8)
    yield from relay("bf16", "bf16", 40, 24, 64, "b")
    yield from relay("bf16", "", 64, 64, -1)
    yield from relay("bf16", "fp32", 64, 64, -2)
    yield from relay("bf16", "fp32", 16, 16, 0, "tbh")
    yield from relay("bf16", "fp32", 64, 16, 0, "tbq")
    yield from relay("fp16", "fp32", 64, 64, 0)
    yield from relay("fp16", "fp16", 32, 64, 32)
    four, eight = SLICES
    yield from relay("bf16", "fp32", 16, 16, 0, "tb", four)
    yield from relay("bf16", "fp32", 64, 64, 0, "tb", eight)
    yield from relay("bf16", "bf16", 40, 24, 64, "b", four, ALIGNED[1:])
    yield from relay("bf16", "", 64, 64, -1, "tb", eight, ALIGNED[:1])
    yield from relay("bf16", "fp32", 64, 64, -2, "tb", eight, ALIGNED[:1])
    yield from relay("bf16", "fp32", 16, 16, 0, "tbh", eight, ALIGNED[:1])
    yield from relay("bf16", "fp32", 64, 16, 8, "tbq", four, ALIGNED[1:])
    yield from relay("fp16", "fp32", 64, 64, 0, "tb", eight, ALIGNED[:1])
    # A core for each row: two, weighted, are the most; each width of tiles, t wanted or not.
    yield from relay("bf16", "fp32", 16, 16, 0, "tbm")
    yield from relay("bf16", "fp32", 64, 64, 0, "tbmw")
    yield from relay("bf16", "bf16", 40, 24, 64, "mw")
    yield from relay("bf16", "fp32", 64, 64, 160, "tmw")
    yield from relay("bf16", "fp32", 16, 16, 0, "tbmwh")
    yield from relay("bf16", "fp32", 64, 32, 0, "tbmq")
    yield from relay("fp16", "fp16", 64, 64, 8, "tbmw")
    yield from relay("bf16", "fp32", 64, 64, -2, "tbmw")
    # A gain, of the forward alone: each kernel, each width of tiles.
    ahead = ALIGNED[:1]
    yield from gemm("bf16", 64, "bgv", ahead)
    yield from gemm("bf16", 64, "gv", ahead)
    yield from gemm("fp16", 256, "bg", ahead)
    yield from relay("bf16", "fp32", 64, 64, 0, "tbg", layouts=ahead)
    yield from relay("bf16", "fp32", 16, 16, 0, "tbgh", layouts=ahead)
    yield from relay("bf16", "fp32", 64, 16, 0, "tbgq", layouts=ahead)
    yield from relay("fp16", "fp32", 64, 64, 0, "tbg", layouts=ahead)
    yield from relay("bf16", "fp32", 64, 64, 0, "tbgmw", layouts=ahead)
    yield from relay("bf16", "fp32", 64, 64, 0, "tbg", eight, ahead)
    yield from relay("bf16", "fp32", 16, 16, 0, "tbgh", eight, ahead)
    yield from relay("fp16", "fp32", 64, 64, 0, "tbg", eight, ahead)


def decode_cases() -> Iterator[Case]:
    some = functools.partial(combinations, "decode", flags="tbs")
    # Sharing K adds to a launch; so do t and a bias. P has what every target holds.
    both, few = (False, True), (True,)
    yield from some("bf16", [CORE], ALIGNED, [FULL[1], PARTIAL[1]], both)
    yield from some("bf16", [CORE], ALIGNED[:1], [FULL[2]], few)
    yield from some("bf16", [SAME], ALIGNED[1:], [FULL[5]], both)
    yield from some("bf16", [ALL], ALIGNED[:1], [FULL[1]], few)
    yield from some("bf16", [CORE], UNALIGNED + STRIDED, [ODD[0]], few)
    yield from some("fp16", [CORE_16], ALIGNED[1:], [FULL[1]], both)
    yield from some("fp32", [ALL], ALIGNED, [FULL[0]], both)
    yield from some("fp32", [ALL], STRIDED, [ODD[0]], few)
    yield from some("bf16", [CORE], ALIGNED[:1], [FULL[1]], few, flags="b")
    yield from some("bf16", [CORE], ALIGNED[:1], DIAGONAL[:1], both)
    yield from some("bf16", [CORE], ALIGNED[:1], DIAGONAL[:1], flags="tbsmw")
    yield from some("bf16", [CORE], ALIGNED[:1], [FULL[1]], both, flags="tbgs")
    yield from some("bf16", [CORE], STRIDED, [ODD[0]], few, flags="tbgs")
    yield from some("fp32", [ALL], ALIGNED[:1] + STRIDED, [FULL[0]], few, flags="tbgs")
    # With many cores, on CUDA alone.
    yield from some("bf16", [CORE], ALIGNED, [FULL[1]], flags="tbsmw")
    yield from some("bf16", [CORE], STRIDED, [ODD[0]], few, flags="tbsmw")
    yield from some("fp32", [ALL], ALIGNED[:1], [FULL[0]], few, flags="tbsmw")


def dropped_cases() -> Iterator[Case]:
    for (x, even), (layout, aligned) in itertools.product(
        (("bf16", True), ("fp32", False)), (*ALIGNED[:1], *STRIDED)
    ):
        yield Case("dropped", x, x, "", layout, aligned, 0, 0, 0, "d", even, False)
    # The mask depends on nothing but its size.
    yield Case("drawn", "bf16", "bf16", "", "forward", False, 0, 0, 0, "d", True, False)


def gain_back_cases() -> Iterator[Case]:
    # A bias, and rows that are split, only add to a launch; dy ⊙ gain alone is the least of it.
    for x, (layout, aligned) in itertools.product(DTYPES, (*ALIGNED[:1], *STRIDED)):
        yield Case("gain_back", x, x, "", layout, aligned, 0, 0, 0, "abs", True, False)
    yield Case("gain_back", "bf16", "bf16", "", "forward", True, 0, 0, 0, "", True, False)


def variant_cases() -> Iterator[Case]:
    for variant, tiles in EXPERIMENTAL_TILES.items():
        dtypes = ("fp32",) if variant == "tf32x3" else ("bf16", "fp16")
        for (layout, aligned), rank, dtype in itertools.product(ALIGNED, (16, 48, 64), dtypes):
            if rank == 64 or dtype != "fp16":
                common = (layout, aligned)
                gemm = Case("gemm_tail", dtype, dtype, "", *common, 0, rank, 0, "b", True, False)
                shrink = Case(
                    "shrink", dtype, dtype, "fp32", *common, rank, rank, 0, "tu", True, False
                )
                for case in (gemm, shrink):
                    if case.kernel in tiles:
                        yield replace(case, variant=variant)


def cases() -> list[Case]:
    """What is compiled for each target."""
    made = (shrink_cases(), gemm_cases(), core_grad_cases(), decode_cases(), hopper_cases())
    made = (*made, dropped_cases(), gain_back_cases(), variant_cases())
    return sorted(set(itertools.chain(*made)))


def sampled(count: int, seed: int) -> list[Case]:
    """Launches of any rank, dtypes, layout and flags, at random."""
    rng = random.Random(seed)

    def rank() -> int:
        return rng.choice((16, 32, 64, 128, 256, rng.randint(1, 256), rng.randint(1, 256)))

    def many(r: int) -> str:
        return rng.choice(("", "", "m", "mw")) if r != -1 else ""

    def one() -> Case:
        kernels = "shrink", "shrink", "gemm_tail", "core_grad", "decode", "relay"
        kernel = rng.choice(kernels)
        x, down, core = rng.choices(list(DTYPES), k=3)
        p, q, r = rank(), rank(), rng.choice((-2, -1, 0, 8, 16, rng.randint(1, 256)))
        layout, aligned = rng.choice((*ALIGNED, *UNALIGNED, *STRIDED))
        even, small = rng.random() < 0.5, rng.random() < 0.3
        if kernel == "gemm_tail":
            bias = rng.choice(("", "b", "d"))
            layout = "transposed" if bias == "d" and aligned else layout
            return Case(kernel, x, down, "", layout, aligned, 0, q, 0, bias, even, small)
        if kernel == "core_grad":
            wanted = rng.choice(("a", "b", "ab", "m", "mw", "mws"))
            q, r = (p, r) if r == -2 else (q, max(0, r))
            is_aligned = p % 16 == q % 16 == 0
            return Case(kernel, x, x, core, "forward", is_aligned, p, q, r, wanted, True, False)
        if kernel == "relay":
            layout, aligned = rng.choice(ALIGNED)
            x, flags = rng.choice(("bf16", "fp16")), rng.choice(("", "t", "b", "tb"))
            p = rng.choice((16, 32, RELAY_RANK, rng.randint(1, RELAY_RANK)))
            most = RELAY_RANK // 2 if x == "fp16" and r > 0 else RELAY_RANK
            p, r = min(p, most), min(r, most)
            p, q, r = (-rank // 8 * -8 if rank > 0 else rank for rank in (p, q, r))
            q, tiles = p if r < 0 else q, rng.choice(("", *SLICES))
            return Case(kernel, x, down, core, layout, aligned, p, q, r, flags, even, False, tiles)
        if kernel == "decode":
            p = min(p, 32)  # what every target holds, for any dtype
            flags, q = rng.choice(("b", "t", "tb")) + rng.choice(("", "s")), p if r < 0 else q
            flags += many(r)
            return Case(kernel, x, down, core, layout, aligned, p, q, r, flags, even, True)
        flags = rng.choice(("tu", "tud", "u", "ud", "t")) + rng.choice(("", "s"))
        flags += many(r)
        q = p if r < 0 else q
        return Case(kernel, x, down, core, layout, aligned, p, q, r, flags, even, small)

    return [one() for _ in range(count)]
