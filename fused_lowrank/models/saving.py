"""A model whose adapters would be lost by save_pretrained: a warning that says what to do."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any

from torch import nn

LIBRARIES = ("transformers.", "diffusers.")


def watch_saving(model: nn.Module) -> None:
    """Have `warn_of_saving` called when the model's state_dict is asked for."""
    if warn_of_saving not in model._state_dict_pre_hooks.values():
        model.register_state_dict_pre_hook(warn_of_saving)


def forget_saving(model: nn.Module) -> None:
    """Undo `watch_saving`, in all of the model."""
    for module in model.modules():
        hooks: dict[int, Any] = module._state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is warn_of_saving]:
            del hooks[key]


def warn_of_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A UserWarning if it is save_pretrained that asks, and not a Trainer for a checkpoint."""
    frame: FrameType | None = sys._getframe(1)
    depth, at, saves = 1, 0, False
    while frame is not None:
        of = f"{frame.f_globals.get('__name__')}."
        if of.startswith(LIBRARIES) and frame.f_code.co_name == "save_pretrained":
            saves, at = True, depth
        if of.startswith("transformers.trainer.") and frame.f_code.co_name == "_save_checkpoint":
            return
        frame, depth = frame.f_back, depth + 1
    if saves:
        warnings.warn(
            "save_pretrained writes adapted layers by names that from_pretrained does not know: it "
            "would load the base model. Use save_adapter(model, path) and load_adapter, or "
            "unload(model, merge=True) first",
            stacklevel=at + 2,
        )
