"""Adapters that could never learn, or lose what they learn: said before the training, once.

A scale of 0, or a frozen factor that is all zeros, makes every gradient zero. What is trained in
16 bits loses small steps, and GradScaler refuses float16.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .called import shown

NARROW = (torch.float16, torch.bfloat16)


def warn_of_nothing_learned(layers: Mapping[str, Any], stacklevel: int) -> None:
    """Warn once each of layers of scale 0, and of those with a frozen factor of zeros."""
    trained = {name: layer for name, layer in layers.items() if layer.trained_factors}
    frozen = {
        name: [getattr(m, f) for f in m.factors if f not in (*m.train_names, *m.row.core)]
        for name, m in trained.items()
        if not m.bases_pending
    }
    warn_of_scales({name: layer.scale for name, layer in trained.items()}, stacklevel + 1)
    warn_of_zeros({name: own for name, own in frozen.items() if own}, stacklevel + 1)


def warn_of_scales(scales: Mapping[str, float], stacklevel: int, word: str = "alpha") -> None:
    """Warn once, naming the layers whose scale is 0."""
    if zero := [name for name, scale in scales.items() if scale == 0]:
        warnings.warn(
            f"{word} is 0 in {named(zero)}: the scale is 0, so that nothing is ever learned there; "
            f"{word} = r makes it 1",
            stacklevel=stacklevel,
        )


def warn_of_zeros(frozen: Mapping[str, Iterable[Tensor]], stacklevel: int) -> None:
    """Warn once, naming the layers with a frozen factor of zeros alone."""
    if zero := [name for name, own in frozen.items() if not all(map(has_values, own))]:
        warnings.warn(
            f"the frozen factors of {named(zero)} are zero, for the weight that they are taken "
            "from is: nothing is ever learned there. Leave it out by exclude_modules, train it "
            "whole by modules_to_save, or take LoRA or LoRA-Mini",
            stacklevel=stacklevel,
        )


def has_values(factor: Tensor) -> bool:
    """Whether a factor is anything but zeros, as far as this process can say."""
    return factor.is_meta or hasattr(factor, "full_tensor") or bool(factor.detach().any())


def warn_of_narrow(parameters: Iterable[tuple[str, Tensor]], stacklevel: int) -> None:
    """Warn once, naming the parameters, of these to be trained, that are in 16 bits."""
    narrow = [(name, own.dtype) for name, own in parameters if own.dtype in NARROW]
    if not narrow:
        return
    dtypes = ", ".join(dict.fromkeys(str(dtype) for _, dtype in narrow))
    are = "is" if len(narrow) == 1 else "are"
    scaler = "" if narrow[0][1] != torch.float16 else " and GradScaler refuses them"
    warnings.warn(
        f"{shown([name for name, _ in narrow])} {are} trained in {dtypes}, where small steps are "
        f"lost{scaler}: load the model in float32 and train it under autocast, or do not train "
        "them (the factors of adapters are in float32 as they are)",
        stacklevel=stacklevel,
    )


def warn_of_broken(tensors: Mapping[str, Tensor], stacklevel: int) -> None:
    """Warn once, naming the modules whose tensors, to be saved, hold NaN or Inf."""
    there = (key for key, value in tensors.items() if value.is_floating_point())
    bad = [key.rpartition(".")[0] for key in there if not tensors[key].isfinite().all()]
    if bad := list(dict.fromkeys(bad)):
        warnings.warn(
            f"what is saved of {named(bad)} holds NaN or Inf, as the model does; merges, exports "
            "and banks refuse it: go back to a checkpoint from before, with a lower learning rate",
            stacklevel=stacklevel,
        )


def named(names: list[str]) -> str:
    """Layers, or the only one, which may have no name."""
    return shown(names) if any(names) else "this layer"
