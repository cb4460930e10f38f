"""`bench/host.py --stub` measures what every plan costs the host, and launches what it should."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import report
from bench.support import tables
from bench.support.store import HOST_PREFIX
from bench.support.stub import half_compiled, stub

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"plan", "what", "m", "us", "q1", "q3", "ratio", "launches"}
# Launches in a forward and in a step: shrink and gemm_tail there and back, and core_grad.
PLANS = {
    "eager": (0, 0),
    **({"peft-lora": (0, 0)} if importlib.util.find_spec("peft") else {}),
    "bare": (0, 0),
    "aten": (0, 0),
    "mixed": (1, 3),
    "split": (2, 5),
    "decode": (1, 3),
    "relay": (1, 3),
    "banked:decode": (1, 2),  # nothing of a bank is trained
    "banked:split": (2, 4),
}
KERNELS = ("shrink", "gemm_tail", "core_grad", "decode")


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[dict]:
    """The lines of a short run in a process of its own, where Triton compiles."""
    folder = tmp_path_factory.mktemp("host")
    out, results = folder / "lines.jsonl", folder / "results"
    files = "--out", str(out), "--results", str(results)
    done = subprocess.run(
        [sys.executable, "bench/host.py", "--stub", "--reps", "5", *files],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert out.read_text() == done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    (device,) = tables.load(results, HOST_PREFIX)
    assert len(device.host) == len(lines)
    text = report.host_text(device)
    assert all(f"| {line['plan']} | {line['what']} | {line['m']} |" in text for line in lines)
    return lines


def test_what_is_half_compiled_is_in_nobodys_way():
    """Kernels without a binary are in a cache of their own: none is found where one is launched."""
    compiler, before = triton.backends.nvidia.compiler, triton.knobs.cache.dir
    made = compiler.CUDABackend.make_cubin, compiler.llvm.optimize_module
    with half_compiled():
        assert Path(triton.knobs.cache.dir).parent == Path(before)
        assert compiler.CUDABackend.make_cubin is not made[0]
    assert triton.knobs.cache.dir == before
    assert (compiler.CUDABackend.make_cubin, compiler.llvm.optimize_module) == made


def test_lines_have_all_figures(printed):
    for line in printed:
        assert set(line) == KEYS, line
        assert line["what"] in ("forward", "step", "launch"), line
        figures = [line[name] for name in ("us", "q1", "q3", "ratio")]
        assert all(math.isfinite(value) and value > 0 for value in figures), line
        assert line["q1"] <= line["us"] <= line["q3"], line
    names = [(line["plan"], line["what"], line["m"]) for line in printed]
    assert len(set(names)) == len(names)


def test_every_row_is_there_and_launches_what_its_plan_does(printed):
    launches: dict[tuple[str, str], set[int]] = {}
    for line in printed:
        launches.setdefault((line["plan"], line["what"]), set()).add(line["launches"])
    expected = {("bank.use", "forward"): {0}}
    for plan, (forward, step) in PLANS.items():
        expected |= {(plan, "forward"): {forward}, (plan, "step"): {step}}
    expected |= {(kernel, "launch"): {1} for kernel in KERNELS}
    assert launches == expected


def test_eager_is_what_ratios_are_to(printed):
    ratios = {(line["plan"], line["what"]): line["ratio"] for line in printed}
    assert ratios["eager", "forward"] == ratios["eager", "step"] == 1.0


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled here")
def test_the_interpreter_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), stub():
        pass
