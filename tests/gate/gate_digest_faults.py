"""What test_gate.py runs of the seals of the gate's table: each change shows, and no other.

Every function named check_… is run, where Triton compiles; these compile nothing.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import gate
import gate_digest
import gate_read
import triton
from gate_cases import Case, cases
from gate_faults import GEMM, SHRINK, SM_80, SM_90
from gate_read import Figures

from fused_lowrank.kernels.tiles import Target, TileConfig

FIGURES = Figures(100, 1024, 0, "", 0, 0, 0, 0, 0)
JOB = (SHRINK, "sm_90", True)


def check_what_differs_from_the_table_is_found() -> None:
    old = gate.table([gate.row(JOB, FIGURES, "digest")])
    new = gate.table([gate.row(JOB, replace(FIGURES, registers=101), "digest")])
    assert len(gate.stale(new, old, ["sm_90"])) == 2
    assert not gate.stale(new, new, ["sm_90"])
    assert not gate.stale(new, old, ["sm_80"])
    assert len(gate.stale(new, "", ["sm_90"])) == 1


def check_a_row_is_taken_while_its_seal_holds() -> None:
    entry = gate.row(JOB, FIGURES, "digest")
    there = gate.table([entry])
    assert gate.unchanged({JOB: "digest"}, there) == {JOB: entry}
    unsealed = gate.table([[*entry[:-1], ""]])
    for todo, text in (
        ({JOB: "another"}, there),
        ({(replace(SHRINK, p=48), "sm_90", True): "digest"}, there),
        ({(SHRINK, "sm_80", True): "digest"}, there),
        ({JOB: "digest"}, there.replace(",100,", ",99,")),  # by hand
        ({JOB: "digest"}, there.replace(f"triton {triton.__version__}", "triton 3.0.0")),
        ({JOB: "digest"}, unsealed),  # what failed
        ({JOB: "digest"}, ""),
    ):
        assert text == "" or text != there or todo != {JOB: "digest"}
        assert not gate.unchanged(todo, text), (todo, text)


def check_what_is_compiled_again_is_compared() -> None:
    """A part of the rows that have not changed; one that comes out otherwise is a failure."""
    small = [case for case in cases() if case.kernel in ("dropped", "drawn", "decode")]
    compiled: list[int] = []

    def gated(registers: int, *options: str) -> int:
        def rows(todo: dict[gate.Job, str], _: int) -> tuple[dict, dict]:
            compiled.append(len(todo))
            figures = replace(FIGURES, registers=registers)
            return {job: gate.row(job, figures, todo[job]) for job in todo}, {}

        argv = mock.patch.object(sys, "argv", ["gate.py", "--target", "sm_90", *options])
        with argv, mock.patch.object(gate, "compiled_rows", rows):
            return gate.main()

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(gate, "TABLE", Path(folder, "gate.csv")),
        mock.patch.object(gate, "cases", return_value=small),
        mock.patch.object(gate, "AGAIN", 2),
    ):
        assert gated(100, "--write") == 0
        assert gated(100, "--changed") == 0
        assert gated(101, "--changed") == 1
        assert gated(100) == 0
        assert gated(101) == 1
        text = gate.TABLE.read_text()
        gate.TABLE.write_text(text.replace(",100,", ",99,", 1))
        assert gated(100, "--changed") == 1  # the table is stale
        assert gated(100, "--changed", "--write") == 0
        assert gate.TABLE.read_text() == text
    many = compiled[0]
    assert compiled == [many, 2, 2, many, many, 3, 3], compiled


def digest(case: Case, target: Target, tile: TileConfig) -> str:
    source, options = gate.source(gate.tiled(case, tile), target)
    return gate_digest.launch_digest(source, options, target)


def check_a_launch_has_a_digest_of_its_own() -> None:
    """Another one for each thing in which launches differ, and the same for the same."""
    tile = TileConfig(64, 64, 32, 4, 2)
    launches = [
        (SHRINK, SM_90, tile),
        (SHRINK, SM_90, replace(tile, num_warps=8)),
        (SHRINK, SM_90, replace(tile, num_stages=3)),
        (SHRINK, SM_90, replace(tile, max_registers=128)),
        (SHRINK, SM_90, replace(tile, block_k=64)),
        (replace(SHRINK, p=48), SM_90, tile),
        (replace(SHRINK, core="bf16"), SM_90, tile),
        (replace(SHRINK, aligned=False), SM_90, tile),
        (replace(SHRINK, flags="t"), SM_90, tile),
        (SHRINK, SM_80, tile),
        (SHRINK, replace(SM_90, shared=SM_90.shared - 1), tile),
        (GEMM, SM_90, tile),
    ]
    digests = [digest(*launch) for launch in launches]
    assert len(set(digests)) == len(launches), digests
    assert digests == [digest(*launch) for launch in launches]


CODE = """
import triton
import triton.language as tl
import {folder}_other as other

SIZE = tl.constexpr(16)

@triton.constexpr_function
def doubled(n):
    return 2 * n

@triton.jit
def helper(x, FACTOR: tl.constexpr = 3):
    'A text.'
    return x * FACTOR

@triton.jit
def kernel(x_ptr, N: tl.constexpr):
    at = tl.arange(0, SIZE)  # where
    x = other.called(helper(tl.load(x_ptr + at)))
    tl.store(x_ptr + at, x + other.ADDED + doubled(N))
"""
OTHER = """
import triton
import triton.language as tl

ADDED = tl.constexpr(1)

def plain(n):
    return n + 1

@triton.constexpr_function
def reckoned(n):
    return plain(n)

@triton.jit
def called(x):
    return x + reckoned(2)
"""


def check_a_digest_is_of_the_code() -> None:
    """Of all that a kernel names, wherever it is, and of nothing that is no code."""

    def of(code: str, other: str) -> str:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "path", [*sys.path]):
            name = Path(folder).name
            sys.path.insert(0, folder)
            Path(folder, f"{name}_other.py").write_text(other)
            Path(folder, f"{name}_kernel.py").write_text(code.format(folder=name))
            return gate_digest.said(importlib.import_module(f"{name}_kernel").kernel)

    sound = of(CODE, OTHER)
    for old, new in (
        ("# where", "# elsewhere"),
        ("\nSIZE", "\n\n\nSIZE"),
        ("A text.", "Another."),
        ("x * FACTOR", "(x  *  FACTOR)"),
    ):
        assert CODE.count(old) == 1
        assert of(CODE.replace(old, new), OTHER) == sound, old
    for old, new in (
        ("constexpr(16)", "constexpr(32)"),
        ("2 * n", "3 * n"),
        ("= 3", "= 4"),
        ("x * FACTOR", "x + FACTOR"),
        ("N: tl.constexpr", "N"),
        ("@triton.jit\ndef helper", "@triton.jit(noinline=True)\ndef helper"),
        ("helper(tl.load(x_ptr + at))", "tl.load(x_ptr + at)"),
        ("x + other.ADDED", "x - other.ADDED"),
    ):
        assert CODE.count(old) == 1, old
        assert of(CODE.replace(old, new), OTHER) != sound, old
    for old, new in (
        ("constexpr(1)", "constexpr(2)"),
        ("n + 1", "n + 2"),
        ("plain(n)\n", "plain(n) + 1\n"),
        ("x + reckoned", "x * reckoned"),
    ):
        assert OTHER.count(old) == 1, old
        assert of(CODE, OTHER.replace(old, new)) != sound, old


def check_a_digest_is_the_same_wherever_triton_lies() -> None:
    """The code that judges finds Triton's own programs by its path."""
    sound = gate_digest.said(gate_read.judged)
    gate_digest.code_digest.cache_clear()
    with mock.patch.object(triton, "__file__", "/elsewhere/triton/__init__.py"):
        assert gate_digest.said(gate_read.judged) == sound
    gate_digest.code_digest.cache_clear()
