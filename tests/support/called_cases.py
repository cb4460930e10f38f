"""Merging and saving with the warnings that they give."""

from pathlib import Path
from typing import Any

from fused_lowrank import merge, save_adapter


def save(model: Any, path: Path) -> None:
    """In the way of either."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(path)
    else:
        save_adapter(model, path)


def merged(model: Any) -> None:
    """In the way of either."""
    model.merge_adapter() if hasattr(model, "peft_config") else merge(model)
