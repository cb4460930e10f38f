"""Deliberate faults: each, put into a copy of the sources, turns the test named beside it red."""

import compileall
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest

ROOT = Path(__file__).parents[2]
NUMERICS = "tests/compute/test_numerics.py::test_error_budget"
GAIN = "tests/compute/test_gain.py::test_error_budget"
DORA = "tests/methods/test_dora.py"
GATE = "tests/kernels/test_gate.py::test_check"

# what is broken → file, text, what it becomes, the test that must fail
FAULTS = {
    "mask on K dropped": (
        "kernels/gemm_tail.py",
        "mask_m & (offs_k[None, :] < K - k)",
        "mask_m",
        f"{NUMERICS}[triton]",
    ),
    "scale dropped in the backward": (
        "fused_lowrank/compute/operands.py",
        "scale = self.scale / dropped",
        "scale = 1.0",
        f"{NUMERICS}[aten]",
    ),
    "core not transposed in the backward": (
        "kernels/shrink.py",
        "core_ptrs = left_ptr + offs_q[None, :] * P + offs_c[:, None]",
        "core_ptrs = left_ptr + offs_c[:, None] * Q + offs_q[None, :]",
        f"{NUMERICS}[triton]",
    ),
    "bias added twice": (
        "kernels/gemm_tail.py",
        "acc += bias[None, :].to(acc.dtype)",
        "acc += 2 * bias[None, :].to(acc.dtype)",
        f"{NUMERICS}[triton]",
    ),
    "gain after the bias": (
        "kernels/gemm_tail.py",
        "        acc += bias[None, :].to(acc.dtype)\n    return acc",
        "        acc += bias[None, :].to(acc.dtype)\n        if HAS_GAIN:\n"
        "            acc *= gain[None, :]\n    return acc",
        f"{GAIN}[split]",
    ),
    "bias left in the way back through the gain": (
        "kernels/gain_back.py",
        "                z -= bias[None, :]",
        "                z -= 0 * bias[None, :]",
        f"{GAIN}[triton]",
    ),
    "a program's rows counted twice in the gain's gradient": (
        "kernels/gain_back.py",
        "for m in range(split * rows, end, BLOCK_M):",
        "for m in range(0, end, BLOCK_M):",
        "tests/compute/test_gain.py::test_gain_back",
    ),
    "gain left out of dy": (
        "fused_lowrank/compute/gain.py",
        "dy if y is None else y, gain, zeros if",
        "dy if y is None else y, torch.ones_like(gain), zeros if",
        f"{GAIN}[aten]",
    ),
    "the mixed term of DoRA's norm once": (
        "fused_lowrank/methods/dora.py",
        "beta=2.0 * scale",
        "beta=scale",
        f"{DORA}::test_row_norms",
    ),
    "a negative square under a root": (
        "fused_lowrank/methods/dora.py",
        "torch.maximum(square, fixed.least).sqrt_()",
        "square.sqrt_()",
        f"{DORA}::test_a_norm_that_cancels_is_a_number",
    ),
    "a gain's gradient without the norm": (
        "fused_lowrank/compute/gain.py",
        "dgain * (gain / off_zero(magnitude, gain.dtype))",
        "dgain * gain",
        f"{DORA}::test_peft",
    ),
    "bare bf16 cast": (
        "kernels/common.py",
        "if INTERPRETED and dtype == tl.bfloat16 and x.dtype != tl.bfloat16:",
        "if False:",
        "tests/compute/test_numerics.py::test_rounds_once_and_to_nearest",
    ),
    "the default precision of fp32": (
        "kernels/common.py",
        ', input_precision="ieee"',
        "",
        f"{GATE}[check_a_sample_passes]",
    ),
    "a chain of float32 along all of K": (
        "kernels/common.py",
        "max_num_imprecise_acc=1",
        "max_num_imprecise_acc=0",
        f"{GATE}[check_float32_is_summed_in_blocks]",
    ),
    "TF32 where a factor is loaded in 16 bits": (
        "kernels/common.py",
        "y = tl.sum(y[:, :, None], 2)",
        "pass",
        f"{GATE}[check_a_sample_passes]",
    ),
    "the tail of the backward not masked": (
        "kernels/gemm_tail.py",
        "acc += tl.where(kept(bits), tail, 0.0)",
        "acc += tail",
        "tests/compute/test_dropout.py::test_a_call_is_the_equation_under_the_mask",
    ),
    "the mask of another tile": (
        "kernels/gemm_tail.py",
        "load_bits(bits_ptr, pid_m * BLOCK_M, pid_n * BLOCK_N, M, N, BLOCK_M, BLOCK_N)",
        "load_bits(bits_ptr, pid_m * BLOCK_M, 0, M, N, BLOCK_M, BLOCK_N)",
        "tests/kernels/test_dropout_bits.py::test_the_tail_is_added_where_the_bits_say",
    ),
    "a quarter of a tile under the mask of another": (
        "kernels/gemm_tail.py",
        "split_columns(bits_of[i])",
        "split_columns(bits_of[0])",
        "tests/kernels/test_dropout_bits.py::test_the_tail_is_added_where_the_bits_say",
    ),
    "bits shifted by one": (
        "kernels/common.py",
        ">> tl.arange(0, 8)[None, None, :]",
        ">> (tl.arange(0, 8)[None, None, :] + 1)",
        "tests/kernels/test_dropout_bits.py::test_the_mask_is_philox",
    ),
    "bits kept by the first of those that share K alone": (
        "kernels/shrink.py",
        "if STORE_BITS:  #",
        "if STORE_BITS and split == 0:  #",
        "tests/kernels/test_dropout_bits.py::test_shrink_keeps_the_mask_that_it_has_drawn",
    ),
    "bits kept where they are to be drawn again": (
        "fused_lowrank/compute/autograd.py",
        "masked and not call.config.redraw_dropout",
        "masked",
        "tests/kernels/test_dropout_bits.py::test_kept_or_drawn_again_gives_the_same_bits",
    ),
    "padding of t left as the dot gave it": (
        "kernels/shrink.py",
        "acc = tl.where(mask_p, acc, 0.0)",
        "acc = acc",
        "tests/compute/test_ops.py::test_nan_and_inf_go_where_the_reference_puts_them",
    ),
    "arrival counters not zeroed": (
        "kernels/common.py",
        "tl.store(counter_ptr, 0)",
        "pass",
        "tests/compute/test_ops.py::test_gradcheck_through_the_kernels",
    ),
    "the count of core_grad's tiles not zeroed": (
        "kernels/core_grad.py",
        "tl.store(arrivals_ptr + DONE, 0)",
        "pass",
        "tests/kernels/test_core_grad.py::test_the_gradients_and_the_counters",
    ),
    "W by narrow loads in decode": (
        "kernels/decode.py",
        "w_ptrs += offset(first_k, stride_wk)",
        "w_ptrs += offset(first_k, stride_wk) + (offs_k[:, None] >= BLOCK_K)",
        f"{GATE}[check_narrow_loads_of_decode_are_found]",
    ),
    "decode's flag left set": (
        "kernels/decode.py",
        "tl.store(flags_ptr + PUBLISHED, 0, last)",
        "pass",
        "tests/kernels/test_decode.py::test_error_budget",
    ),
    "32-bit offsets": (
        "kernels/common.py",
        "return index.to(tl.int64) * stride",
        "return index * stride",
        "tests/compute/test_ops.py::test_offsets_beyond_int32",
    ),
    "an address's alignment not in the key of a launch": (
        "kernels/launch.py",
        "parts.append(odd)",
        "pass",
        "tests/kernels/test_prepared.py::test_check[arguments-check_nothing_else_is_taken_for_it]",
    ),
    "a tensor map kept for another address": (
        "kernels/launch.py",
        "(filled := filled_before.get(address)) is None",
        "(filled := next(iter(filled_before.values()), None)) is None",
        "tests/kernels/test_prepared.py::test_check[arguments-check_nothing_else_is_taken_for_it]",
    ),
    "the counters of another stream": (
        "kernels/launch.py",
        "counters = arrivals(device, stream)",
        "counters = arrivals(device, 0)",
        "tests/kernels/test_prepared.py::test_check[arguments-"
        "check_the_stream_and_its_counters_are_those_of_the_moment]",
    ),
    "x saved for the backward": (
        "fused_lowrank/compute/autograd.py",
        "(x if needs[1] or needs[2] else None)",
        "x",
        "tests/compute/test_ops.py::test_saves_t_and_nothing_else_of_m",
    ),
}


# Reads a file's name and a test's, and runs that test, as often as asked: each time in a process of
# its own, in which all is imported that the faults are not in (torch._inductor is what torch's
# deterministic mode imports), and which need not look through it for garbage. Says with which code
# it ended.
RUNNER = """
import gc, os, sys, traceback
import hypothesis, numpy, pytest, torch, torch._inductor, torch.testing, triton.language

sys.dont_write_bytecode = False
gc.collect()
gc.freeze()
for line in sys.stdin:
    output, test = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    code = 70
    try:
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        import fused_lowrank
        assert fused_lowrank.__file__.startswith(os.getcwd()), fused_lowrank.__file__
        plugin = "_hypothesis_pytestplugin"
        code = pytest.main(["-x", "-q", "-p", plugin, "--hypothesis-profile=unshrunk", test])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, tests and benchmarks."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("fused_lowrank", "kernels", "tests", "bench"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    # By their contents: two faults in a file may be of one size and come within a second.
    by_contents = PycInvalidationMode.CHECKED_HASH
    for name in ("fused_lowrank", "kernels"):
        assert compileall.compile_dir(folder / name, quiet=1, invalidation_mode=by_contents)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture(scope="module")
def run(copy: Path) -> Iterator[Callable[[str], tuple[int, str]]]:
    """A function: the exit code of a test, in the copy and with the copy's package, and its output.

    A negative code is the signal that its process has died of.
    """
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        cwd=copy,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as runner:
        assert runner.stdin
        assert runner.stdout
        output = copy / "output"

        def of(test: str) -> tuple[int, str]:
            print(output, test, sep="\t", file=runner.stdin, flush=True)
            return int(runner.stdout.readline()), output.read_text()

        yield of
        runner.stdin.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault: str, copy: Path, run: Callable[[str], tuple[int, str]]) -> None:
    """The named test fails by what it finds, or its process dies of a wild read."""
    file, text, broken, test = FAULTS[fault]
    source = copy / file
    sound = source.read_text()
    assert sound.count(text) == 1, f"{file} has changed: bring this table up to date"
    source.write_text(sound.replace(text, broken))
    try:
        code, output = run(test)
    finally:
        source.write_text(sound)
    assert code in (1, -signal.SIGSEGV), output
    if code == 1:
        assert "1 failed" in output, output
        assert "SyntaxError" not in output
        assert "NameError" not in output
