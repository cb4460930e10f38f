"""PEFT models of each method whose layers are in a checkpoint, with two adapters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model

from fused_lowrank.integrations.peft import LoraMiniConfig, LoraXSConfig, fuse_lora

CONFIGS: dict[str, Callable[..., Any]] = {
    "lora_xs": lambda **more: LoraXSConfig(r=3, init_weights=False, **more),
    "lora_mini": lambda **more: LoraMiniConfig(r=2, a=4, b=4, init_weights=False, **more),
    "fuse_lora": lambda **more: LoraConfig(r=3, init_lora_weights=False, **more),
}


class Model(nn.Module):
    """Two layers in a checkpoint, of which the second sees time first, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head, self.reentrant = nn.Linear(8, 4), None

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)).transpose(0, 1)).transpose(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return self.head(self.block(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


def tuned(method: str, **more: Any) -> Any:
    """With adapters a1 and b1, of which a1 is active."""
    torch.manual_seed(0)
    settings = {"target_modules": ["first", "second"], **more}
    model = get_peft_model(Model().double(), CONFIGS[method](**settings), adapter_name="a1")
    model.add_adapter("b1", CONFIGS[method](**settings))
    if method == "fuse_lora":
        fuse_lora(model)
    return model.eval()
