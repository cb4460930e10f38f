"""Small models with adapters of both methods, shared by the tests of PEFT's integration."""

from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
integration = pytest.importorskip("fused_lowrank.integrations.peft", exc_type=ImportError)

CONFIGS = {"lora_xs": integration.LoraXSConfig, "lora_mini": integration.LoraMiniConfig}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora_xs": {"r": 4},
    "lora_mini": {"r": 2, "a": 5, "b": 4},
}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
methods = pytest.mark.parametrize("method", CONFIGS)


def config(method: str, **settings: Any) -> Any:
    """A configuration of random cores, for the linear layers of `Mlp`."""
    given = {"target_modules": ["lin0", "lin1"], "init_weights": False, **SETTINGS[method]}
    return CONFIGS[method](**{**given, **settings})


class Mlp(nn.Module):
    """Two linear layers, one transformers' Conv1D and a head; double precision."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.lin0 = nn.Linear(12, 16)
        self.lin1 = nn.Linear(16, 10, bias=False)
        self.conv = Conv1D(14, 10)
        self.head = nn.Linear(14, 3)
        nn.init.normal_(self.conv.weight, std=0.3)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(self.lin1(torch.tanh(self.lin0(x)))))


def mlp(dtype: torch.dtype = torch.float64) -> Mlp:
    """The same `Mlp` at every call, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Mlp(dtype).eval()


def inputs(rows: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """x for an `Mlp`."""
    return torch.randn(rows, 12, dtype=dtype)


def by_hand(layer: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
    """x·(W + scaling · up·coreᵀ·down)ᵀ + bias, in plain torch from the layer's Parameters."""
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    if type(layer.base_layer) is not nn.Linear:
        weight = weight.t()
    if layer.prefix == "lora_xs_":
        core = layer.lora_xs_core[adapter]
    else:
        core = layer.lora_mini_a_train[adapter] @ layer.lora_mini_b_train[adapter]
    p, q = core.shape
    delta = layer.basis_up[:, :q] @ core.t() @ layer.basis_down[:p]
    return nn.functional.linear(x, weight + layer.scaling[adapter] * delta, bias)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state_dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state_dicts are alike bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by name."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "basis_down")}
