"""A model in a bank and one of PEFT's, called with an adapter for each sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_lowrank import AdapterBank, adapt

K = 8
NAMES = ["a", "b", "c", "d"]


class Native:
    """A model in a bank."""

    def __init__(self, model: nn.Module, targets: list[str]) -> None:
        self.model = adapt(model, target_modules=targets, r=3, progress=False).eval()
        self.bank = AdapterBank.from_model(self.model, slots=4, dtype=torch.float64)
        cores = {name: (torch.randn(4, 3, 3), None, torch.ones(4)) for name in self.bank.layers}
        self.bank.put(NAMES, cores)

    def __call__(self, names: Any, *args: Any, **kwargs: Any) -> Tensor:
        with self.bank.use(names):
            return self.model(*args, **kwargs)

    alone = __call__


class Peft:
    """A PeftModel."""

    def __init__(self, model: nn.Module, targets: list[str]) -> None:
        peft = pytest.importorskip("peft")
        from fused_lowrank.integrations.peft import LoraXSConfig

        def config() -> Any:
            return LoraXSConfig(r=3, target_modules=targets, init_weights=False)

        self.model = peft.get_peft_model(model, config(), adapter_name="a").double()
        for name in NAMES[1:]:
            self.model.add_adapter(name, config())
        self.model.eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_xs" in name:
                    parameter.normal_()

    def __call__(self, names: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.model(*args, adapter_names=list(names), **kwargs)

    def alone(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        self.model.set_adapter(name)
        return self.model(*args, **kwargs)


ways = pytest.mark.parametrize("way", [Native, Peft])


class Model(nn.Module):
    """Layers around a function of the one in the middle."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.lin, self.last = (nn.Linear(K, K, dtype=torch.float64) for _ in range(3))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x + self.call(self.lin, x))


def experts(lin: nn.Module, x: Tensor) -> Tensor:
    flat, out = x.reshape(-1, K), torch.zeros_like(x.reshape(-1, K))
    (chosen,) = torch.where(flat[:, 0] > 0)
    out.index_add_(0, chosen, lin(flat[chosen]))
    return out.view_as(x)
