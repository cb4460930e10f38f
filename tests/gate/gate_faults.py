"""What tests/kernels/test_gate.py runs in a process of its own: a sample of the gate, and faults.

Every function named check_… is run; most compile for GPUs that are not here.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise, product
from types import SimpleNamespace
from unittest import mock

import gate
import torch
import triton
import triton.language as tl
from gate_cases import DTYPES, Case, cases
from gate_launches import empty, launch
from gate_read import Figures, problems, problems_of_decode, problems_of_hopper, read
from triton.backends.compiler import GPUTarget

from fused_lowrank.kernels import core_grad, decode, gemm_tail, shrink
from fused_lowrank.kernels.tile_choice import EXPERIMENTAL_TILES
from fused_lowrank.kernels.tiles import TARGETS, Target, TileConfig

SM_90, SM_80 = TARGETS["sm_90"], TARGETS["sm_80"]
GEMM = Case("gemm_tail", "bf16", "bf16", "", "forward", True, 0, 48, 0, "b", False, False)
UNALIGNED = replace(GEMM, aligned=False)
SHRINK = Case("shrink", "bf16", "bf16", "fp32", "forward", True, 64, 64, 8, "tu", True, False)
DECODE = replace(SHRINK, kernel="decode", flags="tbs", small=True)
CORE_GRAD = Case("core_grad", "bf16", "bf16", "fp32", "forward", True, 16, 16, 0, "ab", True, False)


def found(case: Case, target: Target, tile: TileConfig, sass: bool = False) -> str:
    """What the gate says of a case with a tile of our own."""
    figures = gate.compiled(lambda: launch(case, lambda *_: tile), target, sass)
    itemsize = DTYPES[case.x].itemsize
    wrong = problems(figures, target, case.kernel, tile, itemsize, case.aligned)
    return "; ".join(wrong)


def check_a_sample_passes() -> None:
    for case, target in (
        (replace(GEMM, x="fp32"), "sm_100"),
        (GEMM, "sm_90"),
        (UNALIGNED, "sm_90"),
        (SHRINK, "sm_80"),
        (SHRINK, "sm_100"),
        (SHRINK, "gfx942"),
        (CORE_GRAD, "sm_89"),
        (DECODE, "sm_90"),
        (DECODE, "gfx942"),
    ):
        _, wrong = gate.examine((case, target, True))
        assert not wrong, (case, target, wrong)


def check_spills_are_found() -> None:
    tile = TileConfig(128, 256, 64, 8, 3)
    assert "spills" in found(UNALIGNED, SM_90, tile)
    assert "spills" not in found(GEMM, SM_90, tile)
    assert "spills" in found(UNALIGNED, TARGETS["gfx942"], replace(tile, num_stages=2))


def check_shared_memory_is_found() -> None:
    tile = TileConfig(128, 256, 64, 8, 6)
    assert "shared memory" in found(GEMM, SM_90, tile)


def check_a_tail_leaves_the_main_loop_as_it_was() -> None:
    """On Hopper: the bare GEMM's loop and bulk copies, and a step more of HGMMA for 16 of Q."""
    tiles = [TileConfig(128, 256, 64, 8, 3, max_registers=255, persistent=True)]
    tiles += [tile for name in ("deep", "narrow") for tile in EXPERIMENTAL_TILES[name].values()]
    for tile, layout in product(tiles, ("forward", "transposed")):
        figures = []
        for rank in (0, 16, 64):
            case = replace(GEMM, layout=layout, q=rank, even_k=True)
            figures.append(gate.compiled(partial(launch, case, lambda *_, t=tile: t), SM_90, True))
        counts = [dict(part.split(":") for part in f.sass.split()) for f in figures]
        loops = [f.loop for f in figures]
        assert 40 < min(loops) <= max(loops) <= min(loops) + 2, figures  # of addresses
        assert all(c["UTMALDG"] == counts[0]["UTMALDG"] for c in counts), counts
        assert all(int(c["UTMASTG"]) == 2 for c in counts), counts
        steps = [int(c["HGMMA"]) - int(counts[0]["HGMMA"]) for c in counts]
        per_step = int(counts[0]["HGMMA"]) // (tile.block_k // 16)
        assert steps == [0, per_step, 4 * per_step], counts


def check_what_is_wrong_with_a_kernel_for_hopper_is_found() -> None:
    """Copies that are not there, and products that wait for each other."""
    case = replace(GEMM, q=64, even_k=True)
    tile, spec = gate.tile_of(case, SM_90)
    assert tile.hopper
    assert spec.bulk
    kernel = gate.built(lambda: launch(case, lambda *_: tile), SM_90)
    figures = read(kernel, SM_90, False)
    assert not problems_of_hopper(kernel, figures, case, tile)
    fewer = replace(figures, n_bulk_load=figures.n_bulk_load - 1, n_bulk_store=0)
    wrong = "; ".join(problems_of_hopper(kernel, fewer, case, tile))
    assert "bulk loads" in wrong
    assert "bulk stores" in wrong
    asm = {**kernel.asm, "ptx": kernel.asm["ptx"].replace("wgmma.wait_group", "")}
    wrong = problems_of_hopper(SimpleNamespace(asm=asm), figures, case, tile)
    assert "serialised" in "; ".join(wrong)


def check_narrow_loads_of_decode_are_found() -> None:
    """Copies of less than 16 bytes, of a tile with too little for each thread; ordinary loads."""
    fp32 = replace(DECODE, x="fp32", down="fp32", p=16, q=16, r=0)
    for case, tile in (
        (DECODE, TileConfig(32, 64, 64, 4, 5)),
        (DECODE, TileConfig(32, 64, 64, 4, 1)),
        (fp32, TileConfig(32, 32, 32, 8, 6)),
        (fp32, TileConfig(32, 32, 16, 8, 2)),
    ):
        kernel = gate.built(gate.tiled(case, tile), SM_90)
        wrong = "; ".join(problems_of_decode(kernel, case, tile))
        expected = {1: "w comes by {0:", 2: "w comes by {8:"}.get(tile.num_stages, "")
        assert wrong.startswith(expected), wrong
        assert bool(wrong) == bool(expected), wrong


def check_missing_instructions_are_found() -> None:
    fp32 = replace(GEMM, x="fp32", down="fp32")
    tile = TileConfig(64, 64, 16, 4, 2)
    figures = gate.compiled(lambda: launch(fp32, lambda *_: tile), SM_90, sass=True)
    assert "FFMA" in figures.sass
    assert not figures.n_mma
    wrong = "; ".join(problems(figures, SM_90, "gemm_tail", tile, 2, True))
    assert "no wgmma" in wrong
    assert "no HGMMA in SASS" in wrong
    assert "no wgmma" in "; ".join(problems(figures, SM_90, "shrink", tile, 2, True))
    assert "no tensor core" in "; ".join(problems(figures, SM_90, "core_grad", tile, 2, True))
    persistent = replace(tile, persistent=True)
    assert "bulk" in "; ".join(problems(figures, SM_90, "gemm_tail", persistent, 2, True))
    one_stage = TileConfig(64, 64, 32, 4, 1)
    assert "no asynchronous copies" in found(GEMM, SM_80, one_stage)


@triton.jit
def squared(x_ptr, y_ptr, PRECISION: tl.constexpr):
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x, input_precision=PRECISION))


def check_tf32_is_found() -> None:
    x = empty(64, 64, dtype="fp32")
    tile = TileConfig(64, 64, 64, 4, 1)
    asked = [(target, precision) for target in TARGETS.values() for precision in ("tf32", "ieee")]
    for target, precision in [*asked, (SM_90, None)]:  # None: what a dot takes that is told nothing
        call = partial(squared[(1,)], x, x, precision)
        figures = gate.compiled(call, target, sass=target is SM_90)
        wrong = "; ".join(problems(figures, target, "gemm_tail", tile, 4, True))
        assert ("TF32" in wrong) == (precision != "ieee"), (target.name, precision, figures)


def check_float32_is_summed_in_blocks() -> None:
    """Each product of float32 begins from zero: K has no chain of sums from end to end.

    Triton folds such a sum into a product from zero, if nothing keeps it from that.
    """
    fp32 = {"x": "fp32", "down": "fp32", "core": "fp32"}
    for case in (replace(case, **fp32) for case in (GEMM, SHRINK, DECODE)):
        for target in (SM_90, TARGETS["gfx942"]):
            tile, _ = gate.tile_of(case, target)
            ast, options = gate.source(gate.tiled(case, tile), target)
            gpu = GPUTarget(target.backend, target.arch, target.warp_size)
            text = triton.compile(ast, target=gpu, options=options).asm["ttgir"]
            zeros = set(re.findall(r"(%\S+) = arith.constant dense<0.000000e\+00>", text))
            begun = re.findall(r"= tt.dot \S+, \S+, (%[^\s,]+)", text)
            assert len(begun) >= 2, text
            assert set(begun) <= zeros, (case, target.name, begun)


def check_an_empty_kernel_is_found() -> None:
    figures = Figures(4, 0, 0, "", 0, 0, 0, 0, 0)
    wrong = problems(figures, SM_90, "shrink", TileConfig(64, 16, 64, 4, 2), 4, True)
    assert "empty" in "; ".join(wrong)


def check_variants() -> None:
    """A launch's attributes are those of its variant: 16 for all integers and pointers, or none."""
    for module, launches in (
        (gemm_tail, (GEMM, UNALIGNED)),
        (shrink, (SHRINK, replace(SHRINK, aligned=False, even_k=False))),
        (core_grad, (CORE_GRAD, replace(CORE_GRAD, aligned=False, p=25))),
        (decode, (DECODE, replace(DECODE, aligned=False, even_k=False))),
    ):
        for case in launches:
            tile = TileConfig(64, 64, 32, 4, 2)
            call = lambda c=case, t=tile: launch(c, lambda *_: t)  # noqa: E731
            kernel, _, _ = gate.captured(call)
            assert kernel is module.KERNELS[case.aligned]
            for target in (SM_90, TARGETS["gfx942"]):
                ast, _ = gate.source(call, target)
                assert list(ast.signature) == kernel.arg_names
                attrs = {kernel.arg_names[i]: said for (i,), said in ast.attrs.items() if said}
                free = {name for name, kind in ast.signature.items() if kind != "constexpr"}
                never = {
                    "M",
                    "rows",
                    "lows",
                    "low_depth",
                    "makers",
                    "splits",
                    "depth",
                    "threshold",
                    "seed_ptr",
                    *(["bits_ptr"] if module is shrink else []),
                    "scale",
                    "low_scale",
                }
                assert set(attrs) == (free - never if case.aligned else set()), (case, attrs)
                assert all(["tt.divisibility", 16] in said for said in attrs.values())
                for (i,), value in ast.constants.items():
                    assert value == 1 or not kernel.arg_names[i].startswith("stride_")


def check_sizes_of_one_are_not_specialised() -> None:
    x, u = (torch.empty(5, k, dtype=torch.bfloat16, device="meta") for k in (1, 16))
    tile = TileConfig(64, 64, 32, 4, 2)

    def call() -> None:
        gemm_tail.gemm_tail(x, x[:1], u, x[:1], None, False, None, lambda *_: tile)

    ast, _ = gate.source(call, SM_90)
    assert all(ast.signature[name] == "i32" for name in ("M", "N", "K"))


def check_the_cases_are_distinct_and_sorted() -> None:
    assert all(one < other for one, other in pairwise(cases()))
    header = gate.table([]).splitlines()[1].split(",")
    assert len(header) == len(fields(Case)) + len(fields(Figures)) + 3  # target, tile and seal


def run(check: Callable[[], None]) -> None:
    """Make a check of this file's kind, nothing compiled before it being at hand."""
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}),
    ):
        check()
