"""Ways to offload models by accelerate, and models to be offloaded, of `adapt` and of PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import config, mlp, peft
from recycler import Recycler

from fused_lowrank import adapt, save_adapter

accelerate = pytest.importorskip("accelerate")
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
Q: dict[str, Any] = {"progress": False}
NATIVE: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora_xs": {"r": 4},
    "lora_mini": {"r": 2, "a": 5, "b": 4},
}
Offload = Callable[[torch.nn.Module], torch.nn.Module]


def to_ram(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu")


def to_disk(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def dispatched(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The first layer is on disk, the others are not."""
    prefix = "base_model.model" if hasattr(model, "peft_config") else ""
    names = [name for name, _ in model.get_submodule(prefix).named_children()]
    places = {f"{prefix}.{name}".strip("."): "cpu" for name in names}
    places[next(iter(places))] = "disk"
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


@pytest.fixture(params=[to_ram, to_disk, dispatched], ids=lambda way: way.__name__)
def offload(request, tmp_path, monkeypatch) -> Offload:
    """A way to offload a model, in place; what is read from disk is recycled."""
    from accelerate.utils import offload as reading

    recycled, load = Recycler(), reading.load_offloaded_weight
    monkeypatch.setattr(reading, "load_offloaded_weight", lambda *given: recycled(load(*given)))
    return lambda model: request.param(model, tmp_path / "offloaded")


def adapted(method: str, **settings: Any) -> torch.nn.Module:
    """An `Mlp` with random trained factors in its first two layers."""
    keywords = {**NATIVE[method], "target_modules": ["lin0", "lin1"], **settings}
    model = adapt(mlp(), method, **keywords, **Q)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def saved(model: torch.nn.Module, path: Path) -> Path:
    save_adapter(model, path)
    return path


def losses(model: torch.nn.Module, x: torch.Tensor) -> list[float]:
    """Of three steps by an optimiser that is made now."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.SGD(trained, 1e-3), []
    for _ in range(3):
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


class Tied(torch.nn.Module):
    """A head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lin = torch.nn.Embedding(11, 12), torch.nn.Linear(12, 12)
        self.head = torch.nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.lin(self.embed(tokens)).tanh())
        return out


def peft_model(method: str, **settings: Any) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(mlp(), config(method, **settings)).eval()
