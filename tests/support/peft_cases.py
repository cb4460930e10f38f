"""Small models with adapters of the methods, shared by the tests of PEFT's integration."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
integration = pytest.importorskip("fused_lowrank.integrations.peft", exc_type=ImportError)

CONFIGS = {
    "lora_xs": integration.LoraXSConfig,
    "lora_mini": integration.LoraMiniConfig,
    "lora_fa": integration.LoraFAConfig,
    "tied_lora": integration.TiedLoraConfig,
    "melora": integration.MeloraConfig,
    "nola": integration.NolaConfig,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora_xs": {"r": 4},
    "lora_mini": {"r": 2, "a": 5, "b": 4},
    "lora_fa": {"r": 4},
    "tied_lora": {"r": 4},
    "melora": {"r": 2, "n": 2},
    "nola": {"r": 4, "m": 6},
}
SHARING = ("tied_lora", "nola")  # whose layers have factors in common, of one rank
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
methods = pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])  # whose adapters are cores
own_methods = pytest.mark.parametrize("method", ["lora_fa", "tied_lora", "melora", "nola"])
every_method = pytest.mark.parametrize("method", CONFIGS)


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
    delta = DELTAS[layer.prefix](layer, adapter, *weight.shape)
    return nn.functional.linear(x, weight + layer.scaling[adapter] * delta, bias)


def of_core(layer: Any, core: torch.Tensor) -> torch.Tensor:
    """up·coreᵀ·down of a layer's frozen pair."""
    p, q = core.shape
    return layer.basis_up[:, :q] @ core.t() @ layer.basis_down[:p]


def of_tied(layer: Any, name: str, n: int, k: int) -> torch.Tensor:
    """diag(v)·up·diag(u)·down, of as much as the layer has room for."""
    down, up = layer.tied_lora_down[name][:, :k], layer.tied_lora_up[name][:n]
    u, v = layer.tied_lora_u[name], layer.tied_lora_v[name]
    return torch.diag(v) @ up @ torch.diag(u) @ down


def of_blocks(layer: Any, name: str, n: int, k: int) -> torch.Tensor:
    """The products of the small LoRAs, each from its features to its outputs."""
    down, up = layer.melora_down[name], layer.melora_up[name]
    delta, count = torch.zeros(n, k, dtype=down.dtype), k // down.shape[1]
    for b in range(count):
        rows, columns = slice(b * n // count, (b + 1) * n // count), slice(b * k // count, None)
        rank = slice(b * len(down) // count, (b + 1) * len(down) // count)
        delta[rows, columns][:, : k // count] = up[rows] @ down[rank]
    return delta


def of_mixtures(layer: Any, name: str, n: int, k: int) -> torch.Tensor:
    """(Σ bᵢ·Bᵢ)·(Σ aᵢ·Aᵢ), of as much as the layer has room for."""
    downs, ups = layer.basis_down_bases[name][:, :, :k], layer.basis_up_bases[name][:, :n]
    down = sum(a * one for a, one in zip(layer.nola_a[name], downs, strict=True))
    return sum(b * one for b, one in zip(layer.nola_b[name], ups, strict=True)) @ down


DELTAS: dict[str, Callable[[Any, str, int, int], torch.Tensor]] = {
    "lora_xs_": lambda layer, name, n, k: of_core(layer, layer.lora_xs_core[name]),
    "lora_mini_": lambda layer, name, n, k: of_core(
        layer, layer.lora_mini_a_train[name] @ layer.lora_mini_b_train[name]
    ),
    "lora_fa_": lambda layer, name, n, k: layer.lora_fa_up[name] @ layer.basis_down[name],
    "tied_lora_": of_tied,
    "melora_": of_blocks,
    "nola_": of_mixtures,
}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state_dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state_dicts are alike bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by name."""
    kind = integration.model.PeftLowRankLinear
    return {n: m for n, m in model.named_modules() if isinstance(m, kind)}
