"""Models, adapters and banks for the tests of AdapterBank."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_lowrank import adapt
from fused_lowrank.bank import AdapterBank

D = 16
KINDS: dict[str, dict[str, Any]] = {  # how the bank stores them: cores, pairs, products of pairs
    "cores": {"method": "lora_xs", "r": 4},
    "pairs": {"method": "lora_mini", "r": 2, "a": 8, "b": 8},
    "products": {"method": "lora_mini", "r": 4, "a": 4, "b": 4},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str, seed: int | None = None, /, **keywords: Any) -> Any:
    """The same base, frozen factors too; with a seed, another adapter, whose alpha is 3."""
    dtype = keywords.pop("of", torch.float64)
    torch.manual_seed(7)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(D, D + 4))
    model.add_module("second", nn.Linear(D + 4, D))
    model.add_module("head", nn.Linear(D, 5))
    settings = {"target_modules": ["first", "second"], **KINDS[kind], **keywords}
    if seed is not None:
        settings.setdefault("alpha", 3.0)
    adapt(model.to(dtype).eval(), progress=False, **settings)
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    return model


def bank_of(kind: str = "cores", slots: int = 4, /, names: str = "", **keywords: Any) -> Any:
    """(model, bank), with an adapter for each letter: "a" is `model_of(kind, 1)`'s."""
    model = model_of(kind, **keywords)
    bank = AdapterBank.from_model(model, slots=slots)
    for i, name in enumerate(names, 1):
        bank.add(name, model_of(kind, i))
    return model, bank


def parts_of_model(model: nn.Module) -> list[Any]:
    """The modules and parameters of a model, and which of these are trained."""
    own = list(model.parameters())
    return [*model.modules(), *own, [parameter.requires_grad for parameter in own]]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What is trained of a model."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def picture(bank: AdapterBank) -> list[object]:
    """All of a bank that a failure could change."""
    store = bank.store
    parts = [part for table in store.tables.values() for part in table if part is not None]
    held = {name: [part[slot].tolist() for part in parts] for name, slot in store._slots.items()}
    state = list(store._free), list(store._retired), list(store._generation)
    return [held, list(held), dict(store._slots), state, store.generations.tolist()]


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of additions in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def x_of(*lead: int) -> Tensor:
    """An input; not the same at each call."""
    return torch.randn(*lead, D, dtype=torch.float64)


def plain(x: Tensor) -> Tensor:
    """The base model."""
    model = model_of("cores")
    for layer in (model.first, model.second):
        layer.disabled = True
    return model(x)
