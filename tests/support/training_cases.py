"""A model of two blocks, a bank on it, and adapters of it in training."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fused_lowrank import AdapterBank, adapt
from fused_lowrank.bank.training import Trainable

K, POSITIONS = 16, 3
SETTINGS = {"lora_xs": {"r": 4}, "lora_mini": {"r": 2, "a": 6, "b": 7}}
NAMES = ["ann", "ben", "cat", "dan", "eve"]
methods = pytest.mark.parametrize("method", SETTINGS)


class Block(nn.Module):
    """Two adapted layers, called with hidden states (lines, positions, K)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(K, K + 4), nn.Linear(K + 4, K)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.tanh(self.wide(x)))


class Setting(NamedTuple):
    """A bank on a model of two blocks, the same model without one, and the bank's training."""

    model: nn.Module
    single: nn.Module
    bank: AdapterBank
    trainable: Trainable

    def alone(self, name: str) -> nn.Module:
        """The model with one adapter of the training in its own cores, as they are now."""
        model = copy.deepcopy(self.single)
        index, own = self.trainable.names.index(name), dict(model.named_parameters())
        with torch.no_grad():
            for layer, parameter in self.trainable.named_parameters():
                own[layer].copy_(parameter[index])
            for layer, stored in self.bank.store.tables.items():
                scale = stored.scales[self.bank.store._slots[name]]
                model.get_submodule(layer).scale = float(scale)
        return model


def setting(
    method: str,
    device: torch.device,
    names: list[str] = NAMES,
    dtype: torch.dtype = torch.float64,
    fused: bool = True,
    spare: int = 1,
    table: torch.dtype | None = None,
) -> Setting:
    """Adapters whose cores are random and not small."""
    torch.manual_seed(1)
    base = nn.Sequential(Block(), Block()).to(device, torch.float64)
    options: Any = {"target_modules": "all-linear", "exclude_modules": r"1\.narrow", "fused": fused}
    single = adapt(base.to(dtype), method, progress=False, **options, **SETTINGS[method])
    model = copy.deepcopy(single)
    bank = AdapterBank.from_model(model, slots=len(names) + spare, dtype=table)
    cores = {
        layer: (
            torch.randn(len(names), *stored.left.shape[1:], dtype=torch.float64) / 2,
            None
            if stored.right is None
            else torch.randn(len(names), *stored.right.shape[1:]).double(),
            torch.linspace(0.5, 2.0, len(names)),
        )
        for layer, stored in bank.store.tables.items()
    }
    bank.put(names, cores)
    return Setting(model, single, bank, bank.trainable(names))


def losses_of(y: Tensor) -> Tensor:
    """A number for each sequence."""
    return (
        (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype, device=y.device)).sin().mean((1, 2))
    )


def inputs(lines: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(lines, POSITIONS, K, dtype=torch.float64).to(device, dtype)


def rows_of(name: str, lines: list[str | None]) -> list[int]:
    return [i for i, line in enumerate(lines) if line == name]
