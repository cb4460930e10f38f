"""The interpreter with less repeated work computes what it does without, and leaves as little."""

import dataclasses

import numpy as np
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
    y = tl.sum(x, 1) + tl.max(tl.cumsum(x, 1), 1) + (row * 2 - 2 * row)
    tl.store(y_ptr + row, y.to(tl.bfloat16).to(tl.float32))


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
    for of, name in (
        (interpreter, "_patch_lang"),
        (interpreter, "_get_np_dtype"),
        (interpreter, "_convert_float"),
        (interpreter._LangPatchScope, "restore"),
        (tl.core.block_type, "__init__"),
        (tl.core.tensor, "__init__"),
        (type(interpreter.interpreter_semantic), "broadcast_impl_value"),
    ):
        monkeypatch.setattr(of, name, getattr(of, name).__wrapped__)
    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=True)
    monkeypatch.setattr(builder, "options", options)
    torch.testing.assert_close(fast, launched(), rtol=0, atol=0)
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    x = torch.where(x > 0, x / 2, 0.0)
    x += x / 2 * (x > 0)
    torch.testing.assert_close(fast, x.sum(1) + x.cumsum(1).amax(1), rtol=2**-7, atol=0)


def test_conversions_give_the_same_bits() -> None:
    """Of all numbers in bfloat16 and of some in float32, NaN, infinities and subnormals too."""
    some = np.random.default_rng(0).integers(0, 2**32, 10**5, dtype=np.uint32)
    every = np.arange(2**16, dtype=np.uint16)
    ends = np.concatenate([every.astype(np.uint32) << 16, (every.astype(np.uint32) << 16) + 0x8001])
    with np.errstate(all="ignore"):
        for bits, given, wanted in (
            (every, tl.bfloat16, tl.float32),
            (np.concatenate([some, ends]), tl.float32, tl.bfloat16),
        ):
            wide = given == tl.float32
            subnormal = (bits & (0x7F800000 if wide else 0x7F80)) == 0
            for part in (bits[~subnormal], bits[subnormal], bits[:1], bits[:0], bits[-1:][0]):
                values = part.view(np.float32) if wide else part
                found, expected = (
                    convert(np.asarray(values), given, wanted, None)
                    for convert in (
                        interpreter._convert_float,
                        interpreter._convert_float.__wrapped__,
                    )
                )
                assert found.dtype == expected.dtype
                assert found.shape == expected.shape
                assert (found == expected).all()


def test_a_type_is_that_of_its_own_element_and_shape() -> None:
    """Whatever has been made before it, and broadcast where it must be."""
    for element in (tl.float32, tl.int32, tl.pointer_type(tl.float32), tl.bfloat16):
        for shape in ([4], [8, 4], [4, 8], [tl.constexpr(4), 8]):
            made = tl.block_type(element, shape)
            made_again = tl.block_type(element, shape)
            assert made.scalar == made_again.scalar == element
            assert list(made.shape) == [getattr(side, "value", side) for side in shape]
            assert made == made_again
            assert str(made) == f"<{made.shape}, {element}>"
    assert tl.block_type(tl.int32, [4]) != tl.block_type(tl.int32, [8])
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.int32, [3])


@triton.jit
def sums_of_shapes(x_ptr, y_ptr):
    rows, columns = tl.arange(0, 4)[:, None], tl.arange(0, 4)[None, :]
    x = tl.load(x_ptr + rows * 4 + columns)
    tl.store(y_ptr + rows * 4 + columns, rows + x + columns + 1)


def test_blocks_of_other_shapes_are_broadcast() -> None:
    x, y = torch.randint(100, (4, 4), dtype=torch.int32), torch.empty(4, 4, dtype=torch.int32)
    sums_of_shapes[(1,)](x, y)
    assert torch.equal(y, torch.arange(4)[:, None] + x + torch.arange(4) + 1)


def test_a_launch_changes_each_language_once_and_takes_it_back(monkeypatch) -> None:
    calls = []
    change = interpreter._patch_lang.__wrapped__
    monkeypatch.setattr(interpreter, "_patch_lang", lambda f: calls.append(f) or change(f))
    scope = interpreter._LangPatchScope
    monkeypatch.setattr(scope, "restore", scope.restore.__wrapped__)
    fast_interpreter.patch_once(interpreter)
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
