"""Quantised models that PEFT's configurations refuse, before anything is changed."""

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from base_cases import KINDS, D, Net, Opaque, inputs, model_of, needs
from peft_base_cases import config, some_kinds, tuned
from peft_cases import CONFIGS, integration, peft
from torch import nn

from fused_lowrank.methods import accept

bits4 = pytest.mark.parametrize("kind", [pytest.param("nf4", marks=needs("bitsandbytes"))])


@some_kinds
def test_bad_input(kind: str) -> None:
    """An x of another size or kind is named, with the adapter and without."""
    model = tuned(kind, "lora_xs")
    for off in (False, True):
        for x, error, said in (
            (inputs()[..., :5], ValueError, r"x is \(3, 7, 5\)"),
            (torch.zeros(2, D, dtype=torch.int64), TypeError, "x is torch.int64"),
        ):
            around = model.disable_adapter() if off else nullcontext()
            with around, pytest.raises(error, match=said):
                model(x)


def refused(model: Any, said: str, **settings: Any) -> None:
    """An adapter is refused, and the model as it was."""
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=said):
        peft.get_peft_model(model, config("lora_xs", **settings))
    assert dict(model.named_modules()) == before


@bits4
def test_a_base_that_is_not_quantised_yet(kind: str) -> None:
    """Its weight would change under the adapter."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for made in (Linear4bit, lambda k, n: Linear8bitLt(k, n, has_fp16_weights=False)):
        model = Net(lambda k, n, made=made: made(k, n))
        refused(model, "Target module first .*not quantised yet: move it to its device first")


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        pytest.param("nf4", "bitsandbytes", marks=needs("bitsandbytes")),
        pytest.param("int8", "bitsandbytes", marks=needs("bitsandbytes")),
    ],
)
def test_a_library_that_is_missing(
    kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It and the extra are named before anything is changed."""
    model = model_of(kind)
    monkeypatch.setitem(sys.modules, package, None)
    refused(model, rf"Target module first .*{package}.*fused-lowrank\[quant\]")


@some_kinds
def test_a_library_that_cannot_run_here(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too old, or without kernels for the device: as its own error says."""
    model = model_of(kind)
    base = accept.base_of(model.second)

    def product(self: Any, *args: Any) -> Any:
        if self.module is model.second:
            raise NotImplementedError("no kernel image is available")
        return real(self, *args)

    if kind == "opaque":
        monkeypatch.setattr(model.second, "forward", lambda x: product(base, x))
    else:
        real = type(base).product
        monkeypatch.setattr(type(base), "product", product)
    refused(model, "Target module second .*cannot compute on cpu .*no kernel image is available")


def test_a_module_that_is_no_linear_layer() -> None:
    """Without sizes, without a gradient of x, or not linear where a W is asked for."""

    class Detached(Opaque):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.detach())

    class Bent(Opaque):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu()

    refused(Net(Detached), "Target module first .*that can be differentiated")
    refused(Net(Bent), "not linear")
    refused(nn.ModuleDict({"first": nn.Embedding(3, 4)}), "first is a Embedding: it is not supp")


def test_every_kind_is_covered() -> None:
    """A new kind of base comes to these tests too."""
    assert {*KINDS} >= {"nf4", "fp4", "int8", "torchao-int8", "torchao-int4", "torchao-fp8"}
    assert {*CONFIGS} == {row.name for row in integration.registry.ROWS}
