"""Where the tests run: Triton's interpreter on the CPU or, with FUSED_LOWRANK_TEST_DEVICE=cuda, the
compiled kernels on a GPU. Every empty tensor is poisoned, so that what is not written shows.

On a CPU PyTorch's bfloat16 products are those of AVX512_CORE_BF16 at most, unless
ONEDNN_MAX_CPU_ISA says otherwise (DEFAULT: all that the CPU has). On AMX they read what lies behind
their operands (`fused_lowrank.compute.isolation`), and a reference that does is no measure of
anything. test_isolation.py has the test of the CPU as it is."""

import multiprocessing
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

DEVICE = os.environ.get("FUSED_LOWRANK_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # as oneDNN does, of torch
os.environ["FUSED_LOWRANK_TUNE"] = "off"  # no file of the user's decides what is tested
# Inductor would compile a program for each instruction set, in each process, to see that it can.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import _pytest.python
import pytest
import torch
from hypothesis import Phase, settings

if DEVICE == "cpu" and find_spec("triton"):
    import fast_interpreter

    fast_interpreter.speed_up()

# torch.manual_seed asks devices that are not there to be seeded later, and keeps the stack, a text,
# for each: within pytest, where stacks are high, that is all of its time.
for kind in (torch.cuda, torch.xpu, torch.mtia):
    if not kind.is_available():
        kind.manual_seed_all = lambda seed: None

# Stops at the first failing example: for when it is only asked whether there is one.
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])

# A call whose frame has room for many more below it. Python keeps frames in chunks of 16 KB and
# gives one back to the system as soon as a call returns across its edge: where the interpreter's
# hottest calls lie on such an edge, that is half of a test's time.
_locals = " = ".join(f"local{i}" for i in range(60_000))
exec(f"def _roomy(call):\n    if call is None:\n        {_locals} = None\n    return call()\n")


def pytest_report_header() -> list[str]:
    """Which machine, instruction sets and libraries the results are of."""
    try:
        named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    cpu = named[1] if named else platform.processor() or platform.machine()
    product = "import torch; x = torch.ones(64, 64, dtype=torch.bfloat16); x @ x"
    asked = subprocess.run(  # oneDNN says it on its first line, to who asks for all of them
        [sys.executable, "-c", product],
        env={**os.environ, "ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
    )
    isa = re.search(r"info,cpu,isa:(.*)", asked.stdout)
    config = torch.__config__.show()
    blas = re.search(r"BLAS_INFO=(\w+)", config)
    versions = re.findall(r"(?:Math Kernel Library Version|MKL-DNN v)\s*([\d.]+)", config)
    gpu = f"; {torch.cuda.get_device_name()}" if DEVICE == "cuda" else ""
    return [
        f"machine: {cpu}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads{gpu}",
        f"instructions: ATen {torch.backends.cpu.get_cpu_capability()}, "
        f"oneDNN {isa[1] if isa else 'unknown'} "
        f"(ONEDNN_MAX_CPU_ISA={os.environ.get('ONEDNN_MAX_CPU_ISA', '')})",
        f"libraries: torch {torch.__version__}, BLAS {blas[1] if blas else 'unknown'} "
        f"({', '.join(versions)}: MKL, oneDNN)",
    ]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu(reason): what is promised on a CPU alone")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU what a CPU alone promises is left out, and the summary says what it was."""
    for item in items if DEVICE != "cpu" else ():
        if mark := item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason=f"of a CPU alone: {mark.args[0]}"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """The test is called below a roomy frame. Float64 is of the interpreter's kernels alone."""
    try:
        return _roomy(lambda: _pytest.python.pytest_pyfunc_call(pyfuncitem))  # noqa: F821
    except RuntimeError as error:
        if DEVICE == "cpu" or "x is torch.float64: the kernels take" not in str(error):
            raise
        pytest.skip("of a CPU alone: kernels in float64, which the interpreter takes")


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    """torch.empty gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _forget_launches():
    """A test may change what launches follow from, so those of other tests are not remembered."""
    if module := sys.modules.get("fused_lowrank.kernels.launch"):
        module.LAUNCHES.clear()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """The device under test."""
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def beside() -> Iterator[ProcessPoolExecutor]:
    """A process that does not interpret: what is compiled in it is what a GPU would get."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with mock.patch.dict(os.environ, threads):
        os.environ.pop("TRITON_INTERPRET", None)
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result(600)  # it has started, in this environment
    yield pool
    pool.shutdown(cancel_futures=True)


@contextmanager
def _counted_launches() -> Iterator[Counter]:
    """How often each kernel is launched."""
    import triton

    counts: Counter = Counter()
    if triton.knobs.runtime.interpret:
        from triton.runtime import interpreter

        original = interpreter.GridExecutor.__call__

        def call(self, *args, **kwargs):
            counts[self.fn.__name__] += 1
            return original(self, *args, **kwargs)

        interpreter.GridExecutor.__call__ = call
        try:
            yield counts
        finally:
            interpreter.GridExecutor.__call__ = original
    else:

        def hook(metadata):
            counts[metadata.get()["name"]] += 1

        triton.knobs.runtime.launch_enter_hook.add(hook)
        try:
            yield counts
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(hook)


@pytest.fixture
def counted_launches():
    """A context manager: how often each kernel is launched in it, by the kernels' names."""
    return _counted_launches
