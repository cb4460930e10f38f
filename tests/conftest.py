"""Where the tests run: Triton's interpreter on the CPU or, with FUSED_LOWRANK_TEST_DEVICE=cuda, the
compiled kernels on a GPU. Every empty tensor is poisoned, so that what is not written shows."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

DEVICE = os.environ.get("FUSED_LOWRANK_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported
os.environ["FUSED_LOWRANK_TUNE"] = "off"  # no file of the user's decides what is tested

import _pytest.python
import pytest
import torch
from hypothesis import Phase, settings

# Stops at the first failing example: for when it is only asked whether there is one.
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])

# A call whose frame has room for many more below it. Python keeps frames in chunks of 16 KB and
# gives one back to the system as soon as a call returns across its edge: where the interpreter's
# hottest calls lie on such an edge, that is half of a test's time.
_locals = " = ".join(f"local{i}" for i in range(60_000))
exec(f"def _roomy(call):\n    if call is None:\n        {_locals} = None\n    return call()\n")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """The test is called below a roomy frame."""
    return _roomy(lambda: _pytest.python.pytest_pyfunc_call(pyfuncitem))  # noqa: F821


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    """torch.empty gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """The device under test."""
    return torch.device(DEVICE)


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
