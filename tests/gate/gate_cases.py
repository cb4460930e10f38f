"""What the compile gate compiles: launches that stand for every kernel the library can launch.

P, Q and r are compile-time constants, so these are too many to name. The table has `cases`: a flag
that only takes code away, or that changes no register, has one representative, and each such
reduction is said where it is made. `sampled` puts the reductions to the test, at random.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from fused_lowrank.compute.reference import RowCores
from fused_lowrank.kernels.common import mask_width
from fused_lowrank.kernels.core_grad import core_grad
from fused_lowrank.kernels.core_grad_rows import core_grad_rows
from fused_lowrank.kernels.decode import decode
from fused_lowrank.kernels.dropout import drawn_bits, dropped
from fused_lowrank.kernels.gemm_tail import gemm_tail
from fused_lowrank.kernels.relay import relay
from fused_lowrank.kernels.shrink import shrink
from fused_lowrank.kernels.tiles import (
    FEW_M,
    RELAY_RANK,
    SLICES,
    SMALL_M,
    VARIANTS,
    Spec,
    TileConfig,
    padded,
)

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
    r: int  # of the pair; 0: one matrix; -1: no core
    flags: str  # stored: t and u; b(ias), d(ropout), s(plit over K); gradients a and b;
    # h(alf), q(uarter), e(ighth of the rows that fill a device with gemm_tail's largest tile), or
    # v: some more than fill it; m(any cores): one for each row or, w(eighted), two
    even_k: bool
    small: bool  # the tile for few rows; for fewer still in decode
    variant: str = ""  # the tile set of that name instead of the default


def empty(*shape: int, dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def bits(m: int, k: int) -> torch.Tensor:
    """A dropout's mask of an (M, K)."""
    return torch.empty(m, mask_width(k), dtype=torch.uint8, device="meta")


def rows(m: int, k: int, dtype: str, case: Case) -> torch.Tensor:
    """(M, K) as the case has it: aligned, one element out of step, or with no stride of 1."""
    if case.aligned:
        return empty(m, k, dtype=dtype)
    if case.layout == "strided":
        return empty(m, 2 * k + 1, dtype=dtype)[:, : 2 * k : 2]
    return empty(m, k + 3, dtype=dtype)[:, :k]


def bank(core: torch.Tensor | tuple[torch.Tensor, torch.Tensor], m: int, flags: str) -> RowCores:
    """A core like this one for each of m rows, or two; with so few that rows are split, one."""
    k, slots = 2 if "w" in flags else 1, 1 if "s" in flags else 4096
    factors = core if isinstance(core, tuple) else (core,)
    table, right = (*(part.new_empty(slots, *part.shape) for part in factors), None)[:2]
    handles = torch.empty(m, k, dtype=torch.int64, device="meta")
    weights = empty(m, k, dtype="fp32") if "w" in flags else None
    generations, refused = (torch.empty(n, dtype=torch.int32, device="meta") for n in (slots, 1))
    scales = empty(slots, dtype="fp32")
    return RowCores(table, right, handles, weights, scales, generations, refused, 1)


def launch(case: Case, choose: Callable[[Spec, int], TileConfig]) -> None:
    """Make the case's call of its launcher."""
    transposed = case.layout == "transposed"
    m = next((rows for flag, rows in ROWS.items() if flag in case.flags), 8192)
    n, k = 2048, 4096 if case.even_k else 4096 + 16
    if case.kernel == "decode":
        m, n = FEW_M if case.small else SMALL_M, n if "s" in case.flags else 2**16
    elif case.small:
        m = SMALL_M
    k += 0 if case.even_k or case.aligned else 3
    p, q, r = case.p, case.q, case.r
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    dropout = (seed, 0.1) if "d" in case.flags else None
    if case.kernel == "gemm_tail":
        x = rows(m, k, case.x, case)
        weight = rows(k, n, case.x, case).t() if transposed else rows(n, k, case.x, case)
        up = empty(*((q, n) if transposed else (n, q)), dtype=case.down) if q else None
        bias = empty(n, dtype=case.x) if "b" in case.flags else None
        u = empty(m, padded(q), dtype=case.x) if q else None
        mask = bits(m, n) if "d" in case.flags else None
        gemm_tail(x, weight, u, up, bias, transposed, mask, choose)
        return
    if case.kernel == "dropped":
        dropped(rows(m, k, case.x, case), bits(m, k), choose)
        return
    if case.kernel == "drawn":
        drawn_bits(seed, 0.1, m, k, choose)
        return
    pair = (empty(p, r, dtype=case.core), empty(r, q, dtype=case.core)) if r > 0 else None
    if case.kernel == "core_grad":
        t, g = empty(m, p, dtype=case.x), empty(m, q, dtype=case.x)
        core = pair or empty(p, q, dtype=case.core)
        if "m" in case.flags:
            core_grad_rows(t, g, bank(core, m, case.flags), 0.5, choose)
            return
        core_grad(t, g, core, 0.5, ("a" in case.flags, "b" in case.flags), choose)
        return
    if transposed:  # the way back: p is what x is multiplied down to
        pair = pair and (empty(q, r, dtype=case.core), empty(r, p, dtype=case.core))
    one = empty(*((q, p) if transposed else (p, q)), dtype=case.core) if r == 0 else None
    core = pair or one
    if "m" in case.flags:
        core = bank(core, m, case.flags)
    x, down = rows(m, k, case.x, case), empty(*((k, p) if transposed else (p, k)), dtype=case.down)
    if case.kernel in ("decode", "relay"):
        weight = rows(k, n, case.x, case).t() if transposed else rows(n, k, case.x, case)
        up = empty(*((q, n) if transposed else (n, q)), dtype=case.down)
        bias = empty(n, dtype=case.x) if "b" in case.flags else None
        factors, whole = (down, core, up), decode if case.kernel == "decode" else relay
        whole(x, weight, *factors, bias, 0.5, transposed, "t" in case.flags, choose)
        return
    shrink(
        x,
        down,
        core,
        0.5,
        transposed,
        "t" in case.flags,
        "u" in case.flags,
        dropout,
        choose,
        want_bits=dropout is not None,
    )


Layouts = list[tuple[str, bool]]
Ranks = list[tuple[int, int, int, bool]]  # P, Q, r of the pair (0: one core; -1: none), K even

ALIGNED: Layouts = [("forward", True), ("transposed", True)]
UNALIGNED: Layouts = [("forward", False), ("transposed", False)]
STRIDED: Layouts = [("strided", False)]
# An odd K only adds masks: partial ranks have it, full ones do not.
FULL: Ranks = [(16, 16, 0, True), (64, 64, 8, True), (128, 32, 0, True), (256, 256, 0, True)]
FULL += [(256, 256, 64, True), (32, 256, -1, True)]
PARTIAL: Ranks = [(8, 8, 0, False), (25, 48, 4, False), (200, 200, 48, False)]
ODD: Ranks = [(48, 25, 4, False), (100, 100, 0, False), (200, 200, 0, False), (200, 200, 63, True)]
# Beside x: every factor like it; an fp32 core (the usual mixture); every factor fp32.
SAME, CORE, ALL = ("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")
SAME_16, CORE_16 = ("fp16", "fp16"), ("fp16", "fp32")


def shrink_cases() -> Iterator[Case]:
    def some(
        x: str,
        factors: list[tuple[str, str]],
        layouts: Layouts,
        ranks: Ranks,
        smalls: Iterable[bool] = (False,),
        flags: str = "tu",
    ) -> Iterator[Case]:
        product = itertools.product(factors, layouts, ranks, smalls)
        for (down, core), (layout, aligned), (p, q, r, even), small in product:
            yield Case("shrink", x, down, core, layout, aligned, p, q, r, flags, even, small)

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

    def gemm(x: str, q: int, flags: str) -> Iterator[Case]:
        for layout, aligned in ALIGNED:
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
    yield from relay("bf16", "fp32", 16, 16, 0, "tbh")
    yield from relay("bf16", "fp32", 64, 16, 0, "tbq")
    yield from relay("fp16", "fp32", 64, 64, 0)
    yield from relay("fp16", "fp16", 32, 64, 32)
    four, eight = SLICES
    yield from relay("bf16", "fp32", 16, 16, 0, "tb", four)
    yield from relay("bf16", "fp32", 64, 64, 0, "tb", eight)
    yield from relay("bf16", "bf16", 40, 24, 64, "b", four, ALIGNED[1:])
    yield from relay("bf16", "", 64, 64, -1, "tb", eight, ALIGNED[:1])
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


def decode_cases() -> Iterator[Case]:
    def some(
        x: str,
        factors: list[tuple[str, str]],
        layouts: Layouts,
        ranks: Ranks,
        smalls: Iterable[bool] = (False,),
        flags: str = "tbs",
    ) -> Iterator[Case]:
        product = itertools.product(factors, layouts, ranks, smalls)
        for (down, core), (layout, aligned), (p, q, r, even), small in product:
            yield Case("decode", x, down, core, layout, aligned, p, q, r, flags, even, small)

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


def variant_cases() -> Iterator[Case]:
    for variant, tiles in VARIANTS.items():
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
    made = (*made, dropped_cases(), variant_cases())
    return sorted(set(itertools.chain(*made)))


def sampled(count: int, seed: int) -> list[Case]:
    """Launches of any rank, dtypes, layout and flags, at random."""
    rng = random.Random(seed)

    def rank() -> int:
        return rng.choice((16, 32, 64, 128, 256, rng.randint(1, 256), rng.randint(1, 256)))

    def many(r: int) -> str:
        return rng.choice(("", "", "m", "mw")) if r >= 0 else ""

    def one() -> Case:
        kernels = "shrink", "shrink", "gemm_tail", "core_grad", "decode", "relay"
        kernel = rng.choice(kernels)
        x, down, core = rng.choices(list(DTYPES), k=3)
        p, q, r = rank(), rank(), rng.choice((-1, 0, 8, 16, rng.randint(1, 256)))
        layout, aligned = rng.choice((*ALIGNED, *UNALIGNED, *STRIDED))
        even, small = rng.random() < 0.5, rng.random() < 0.3
        if kernel == "gemm_tail":
            bias = rng.choice(("", "b", "d"))
            layout = "transposed" if bias == "d" and aligned else layout
            return Case(kernel, x, down, "", layout, aligned, 0, q, 0, bias, even, small)
        if kernel == "core_grad":
            wanted = rng.choice(("a", "b", "ab", "m", "mw", "mws"))
            is_aligned = p % 16 == q % 16 == 0
            r = max(0, r)
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
