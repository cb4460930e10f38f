"""The interpreter with less repeated work computes what it does without, and leaves as little."""

import pytest
import torch

pytest.importorskip("triton")

import fast_interpreter
import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.cpu("what the interpreter does")


@triton.jit
def halved(x):
    return tl.where(x > 0, x * 0.5, tl.zeros_like(x))


@triton.jit
def sums(x_ptr, y_ptr):
    at = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = halved(tl.load(x_ptr + at))
    for i in tl.static_range(2):
        x += halved(x) * i
    row = tl.arange(0, 4)
    tl.store(y_ptr + row, tl.sum(x, 1) + tl.max(tl.cumsum(x, 1), 1))


@triton.jit
def fails(x_ptr):
    halved(tl.load(x_ptr))
    tl.static_assert(False, "stop")


def launched() -> torch.Tensor:
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    y = torch.empty(4)
    sums[(2,)](x, y)
    return y


def members() -> dict[str, object]:
    """All that a launch may change for its time."""
    return {f"{of}.{name}": value for of in (tl, tl.tensor) for name, value in vars(of).items()}


def test_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = launched()
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.__wrapped__)
    scope = interpreter._LangPatchScope
    monkeypatch.setattr(scope, "restore", scope.restore.__wrapped__)
    torch.testing.assert_close(fast, launched(), rtol=0, atol=0)
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    x = torch.where(x > 0, x / 2, 0.0)
    x += x / 2 * (x > 0)
    torch.testing.assert_close(fast, x.sum(1) + x.cumsum(1).amax(1))


def test_a_launch_changes_each_language_once_and_takes_it_back(monkeypatch) -> None:
    calls = []
    change = interpreter._patch_lang.__wrapped__
    monkeypatch.setattr(interpreter, "_patch_lang", lambda f: calls.append(f) or change(f))
    scope = interpreter._LangPatchScope
    monkeypatch.setattr(scope, "restore", scope.restore.__wrapped__)
    fast_interpreter.speed_up()
    before = members()
    for _ in range(2):
        calls.clear()
        launched()
        assert len(calls) == 2, calls  # for the kernel, and for what lies in Triton's own files
        assert members() == before


def test_a_launch_that_fails_leaves_nothing_behind() -> None:
    before = members()
    with pytest.raises(Exception, match="stop"):
        fails[(1,)](torch.zeros(1))
    assert members() == before
    launched()
