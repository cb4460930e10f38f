"""PeftModels over bases that are no plain linear layers, and the formula that they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from base_cases import against, gradients, kinds, model_of, shifted
from peft_cases import CONFIGS, SETTINGS, peft
from torch import Tensor

from fused_lowrank.compute.reference import lowrank_linear_reference

ONE_OF_EACH = ["nf4", "int8", "torchao-int8", "opaque"]
some_kinds = pytest.mark.parametrize(
    "kind", [mark for mark in kinds.args[1] if mark.values[0] in ONE_OF_EACH]
)
TARGETS = ["first", "second"]


def config(method: str, **settings: Any) -> Any:
    """A configuration whose adapter is far from none, for both layers."""
    own = {"target_modules": TARGETS, "init_weights": False, "lora_alpha": 3.0}
    return CONFIGS[method](**{**own, **SETTINGS[method], **settings})


def tuned(kind: str, method: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A PeftModel over the same base at every call."""
    model = peft.get_peft_model(model_of(kind, dtype), config(method, **settings))
    return shifted(model)


def layers_of(model: Any) -> list[Any]:
    """The two layers."""
    return [model.base_model.model.first, model.base_model.model.second]


def formula(model: Any, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """(the model by the equation on dequantised W in a dtype, its trained factors as leaves)."""
    copies: dict[int, Tensor] = {}

    def leaf(own: Tensor) -> Tensor:
        if not own.requires_grad:
            return own.detach().to(dtype if dtype == torch.float64 else own.dtype)
        wide = own.detach().to(dtype if dtype == torch.float64 else own.dtype)
        return copies.setdefault(id(own), wide.clone().requires_grad_())

    made = []
    for layer in layers_of(model):
        factors = {name: leaf(own) for name, own in layer.factors_of("default").items()}
        weight, bias = layer.base_weight.values(torch.float64), layer.base_layer.bias
        made.append((layer, weight, factors, None if bias is None else leaf(bias)))

    def call(x: Tensor) -> Tensor:
        for i, (layer, weight, factors, bias) in enumerate(made):
            scale = layer.scaling["default"]
            down, core, up, _ = layer.row.made(factors, weight.to(dtype), scale)
            bias = None if bias is None else bias.to(dtype)
            own = {"bias": bias, "scale": scale}
            x = lowrank_linear_reference(x, weight.to(dtype), down, core, up, **own)
            x = model.base_model.model.act(x) if i == 0 else x
        return x

    return call, list(copies.values())


def trained(model: Any) -> list[Tensor]:
    """What is trained, in the order of `formula`'s leaves; each once."""
    own = []
    for layer in layers_of(model):
        own += [*layer.factors_of("default").values(), layer.base_layer.bias]
    return list(dict.fromkeys(f for f in own if f is not None and f.requires_grad))


def check(model: Any, x: Tensor) -> None:
    """The model's results and gradients are as near to float64 as the formula in x's dtype is."""
    found = gradients(model, trained(model), x)
    (truth, wide), (same, own) = formula(model, torch.float64), formula(model, x.dtype)
    against(found, gradients(truth, wide, x.double()), gradients(same, own, x))
