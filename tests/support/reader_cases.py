"""Models adapted by `adapt` or by PEFT, and one whose head a patched forward reads."""

from typing import Any

import pytest
from peft_cases import CONFIGS, peft
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lowrank import adapt

D = 12
SETTINGS: dict[str, dict[str, Any]] = {"lora_xs": {"r": 3}, "lora_mini": {"r": 2, "a": 4, "b": 4}}


def native(model: nn.Module, method: str, targets: Any, **rest: Any) -> nn.Module:
    """By `adapt`."""
    settings = {**SETTINGS[method], **rest}
    return adapt(model, method, target_modules=targets, progress=False, **settings)


def in_peft(model: nn.Module, method: str, targets: Any, **rest: Any) -> nn.Module:
    """By PEFT."""
    settings = {**SETTINGS[method], **rest}
    return peft.get_peft_model(model, CONFIGS[method](target_modules=targets, **settings))


WAYS = {"native": native, "peft": in_peft}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def randomise(model: nn.Module) -> nn.Module:
    """Give what is trained values that show."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


class Head(nn.Module):
    """Calls its head, until somebody replaces the forward by one that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def fused_loss_forward(self: Any, x: Tensor) -> Tensor:
    """As Liger's patches have it."""
    hidden = self.body(x)
    return F.linear(hidden, self.head.weight) if self.training else self.head(hidden)
