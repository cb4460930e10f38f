"""Small adapted models, and their states."""

import copy
from typing import Any

import torch
from tiny_model import SETTINGS, Tiny
from torch import nn

from fused_lowrank import (
    adapt,
)

D = 16


QUIET = {"progress": False}


def tiny(seed: int = 0, tied: bool = False) -> Tiny:
    """The same model at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny(tied).eval()


def adapted(method: str = "lora_xs", seed: int = 0, base: Any = None, **more: Any) -> Any:
    """A model with an adapter that shows, of a base that is the same at every call."""
    model = tiny() if base is None else base
    torch.manual_seed(seed)
    settings = {"target_modules": ["up", "down"], **SETTINGS[method], **more, **QUIET}
    adapt(model, method, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state_dict."""
    return copy.deepcopy(dict(model.state_dict()))
