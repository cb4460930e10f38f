"""A base is the same before its first call and after it, copied, in eval, read and written."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from base_cases import KINDS, H, adapted, four_bit, inputs, layers_of, model_of, needs, shifted
from torch import Tensor, nn

from fused_lowrank import AdapterBank, adapt
from fused_lowrank.files.fingerprint import fingerprint_of

QUANTISED = ["nf4", "fp4", "int8", "torchao-int8", "torchao-fp8"]
quantised = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs(KINDS[kind][1])) for kind in QUANTISED]
)


def called_by_itself(model: Any, dtype: torch.dtype) -> Any:
    """The model, after its modules have had a call of their own, as before they were adapted."""
    with torch.no_grad():
        for module, width in ((model.first, 64), (model.second, H)):
            module = getattr(module, "base_layer", module)
            if type(module) is not nn.Linear or module.weight.dtype == dtype:
                module(torch.ones(2, width, dtype=dtype))
    return model


def copied(model: Any) -> Any:
    """A copy, and not what it is of."""
    return copy.deepcopy(model)


def read_and_written(model: Any) -> Any:
    """The model, with its own state_dict."""
    model.load_state_dict(model.state_dict())
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "float32": lambda model: called_by_itself(model, torch.float32),
    "float16": lambda model: called_by_itself(model, torch.float16),
    "bfloat16": lambda model: called_by_itself(model, torch.bfloat16),
    "adapted": lambda model: (model(inputs()), model)[1],
    "eval": lambda model: (model.eval()(inputs()), model.train())[1],
    "copied": copied,
    "copied after a call": lambda model: copied(called_by_itself(model, torch.float32)),
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "read": read_and_written,
    "read after a call": lambda model: read_and_written(called_by_itself(model, torch.float32)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@quantised
def test_the_same(kind: str, dtype: torch.dtype, way: str) -> None:
    """Its dtype and its fingerprint, of which nothing is rounded."""
    if kind.startswith("torchao") and way == "pickled":
        pytest.skip("torchao puts methods that cannot be pickled on its modules")
    model = adapted(kind, "lora_xs", dtype)
    before = [(own.base_weight.dtype, fingerprint_of(own)) for own in layers_of(model)]
    model = WAYS[way](model)
    for layer, (was, print_) in zip(layers_of(model), before, strict=True):
        assert layer.base_weight.dtype == was
        assert torch.equal(fingerprint_of(layer), print_)


@quantised
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_adapted_before_the_first_call_and_after_it(kind: str, first: torch.dtype) -> None:
    """They are one base: LoRA-XS takes the same factors from it, and a bank holds both."""
    early, late = model_of(kind), called_by_itself(model_of(kind), first)
    own: dict[str, Any] = {"target_modules": ["first", "second"], "r": 4, "progress": False}
    bank = AdapterBank.from_model(adapt(early, "lora_xs", **own), slots=4)
    late = shifted(adapt(late, "lora_xs", **own))
    for one, other in zip(layers_of(early), layers_of(late), strict=True):
        for a, b in zip(one.bases, other.bases, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=4e-3)  # of bfloat16
        assert torch.equal(one.base_weight.values(), other.base_weight.values())
    bank.add("late", late)
    called_by_itself(early, first)
    bank.add("late again", late)
    with bank.use("late"):
        torch.testing.assert_close(early(inputs()), late(inputs()), rtol=0.02, atol=0.02)


@quantised
def test_another_state_is_taken(kind: str) -> None:
    """After a call, and by a copy, which computes with what it was given."""
    torch.manual_seed(3)
    other, x = KINDS[kind][0](torch.float32), inputs()
    other = shifted(adapt(other, "lora", target_modules=["first", "second"], r=4, progress=False))
    state = other.state_dict()
    for prepare in (lambda m: m, lambda m: called_by_itself(m, torch.float32), copied):
        model = prepare(adapted(kind, alpha=4.0))
        assert not torch.equal(model(x), other(x))
        model.load_state_dict(state)
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_state_of_other_blocks(kind: str) -> None:
    """4-bit weights of the same bytes: what their maxima are comes with them."""
    pytest.importorskip("bitsandbytes")
    model = adapted(kind, fused=False)
    state: dict[str, Tensor] = adapted("fp4" if kind == "nf4" else "nf4").state_dict()
    y = adapted("fp4" if kind == "nf4" else "nf4")(inputs())
    model.load_state_dict(state)
    torch.testing.assert_close(model(inputs()), y, rtol=1e-4, atol=1e-4)
    again = model.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_a_compute_dtype_that_the_first_call_sets() -> None:
    """bitsandbytes takes x's where none was given; W stays that which was quantised."""
    pytest.importorskip("bitsandbytes")
    own: dict[str, Any] = {"target_modules": ["first", "second"], "r": 4, "progress": False}
    found = []
    for prepare in (lambda m: m, lambda m: called_by_itself(m, torch.bfloat16)):
        torch.manual_seed(0)
        model = four_bit("nf4", compute_dtype=None)(torch.float32)
        adapt(prepare(model), "lora_xs", **own)
        before = [(own.base_weight.dtype, fingerprint_of(own)) for own in layers_of(model)]
        called_by_itself(model, torch.bfloat16)
        for layer, (dtype, fingerprint) in zip(layers_of(model), before, strict=True):
            assert layer.base_weight.dtype == dtype
            assert torch.equal(fingerprint_of(layer), fingerprint)
        found.append([fingerprint_of(layer)[-4:] for layer in layers_of(model)])
    torch.testing.assert_close(*found, rtol=0, atol=0)
