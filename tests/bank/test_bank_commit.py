"""Commits into banks of 16 bits: what is lost to rounding is said."""

import warnings

import pytest
import torch
from bank_cases import kinds, model_of

from fused_lowrank import AdapterBank

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def training(kind: str, dtype: torch.dtype) -> tuple:
    narrow = AdapterBank.from_model(model_of(kind, of=torch.float32), slots=6, dtype=dtype)
    narrow.add("a", model_of(kind, 1, of=torch.float32))
    narrow.add("b", model_of(kind, 2, of=torch.float32))
    return narrow, narrow.trainable(["a", "b"])


def step(trainable, size: float, index: int) -> None:
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter[index] *= 1 + size


def said(trainable, *names) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainable.commit(*names)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@HALF
@kinds
def test_an_update_that_rounds_to_nothing_is_named(kind, dtype) -> None:
    bank, trainable = training(kind, dtype)
    assert not said(trainable)  # nothing was trained
    trainable.close()
    trainable = bank.trainable(["a", "b"])
    step(trainable, 1e-6, 0)
    step(trainable, 0.3, 1)
    (one,) = said(trainable)
    assert one.startswith("more than half of what a learned is lost to rounding")
    assert "dtype=torch.float32" in one
    step(trainable, 0.5, 0)
    assert not said(trainable, ["a"])
    assert not said(trainable)  # again, with rounding alone to write


@kinds
def test_a_wide_bank_loses_nothing(kind) -> None:
    _, trainable = training(kind, torch.float32)
    step(trainable, 1e-6, 0)
    assert not said(trainable)


@HALF
def test_a_bank_of_a_model_in_16_bits(dtype) -> None:
    model = model_of("cores", of=dtype)
    bank = AdapterBank.from_model(model, slots=2)
    bank.add("a", model_of("cores", 1, of=dtype))
    trainable = bank.trainable(["a"])
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter += 1e-6
    (one,) = said(trainable)
    assert str(dtype) in one
