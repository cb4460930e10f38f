"""The methods in PEFT as plain LoRA: exact, of the smallest rank that holds them.

PEFT's own functions of these names approximate ΔW by a singular value decomposition of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ...context.elsewhere import each_here, require_matrices
from ...files.adapter import own_copy
from ...files.contents import require_path
from ...files.lora_export import as_lora, write
from ...files.lora_parts import Adapter, Part, check_dora, own_part
from ...methods.method import MAGNITUDE
from ...models.targets import named_modules
from .layer import PeftLowRankLinear
from .registry import METHODS


def convert_to_lora(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    dora: bool = False,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter as PEFT's LoRA: its config, and its state_dict with PEFT's keys.

    ΔW = scaling · up·coreᵀ·down is exactly alpha / r · B·A, with A (r, in) and B (out, r). All
    methods give rank r, LoRA-Mini too, whatever a and b are, but MELoRA n · r. The factors are
    multiplied in float64 and rounded once. The model is left as it is.

    Args:
        model: a PeftModel, or a model that transformers has put adapters into, of one of this
            package's configurations.
        adapter_name: the adapter, active or not.
        dtype: of A and B; None: the widest of the factors that they are made of.
        dora: convert an adapter with use_dora to PEFT's LoRA with use_dora; plain LoRA cannot
            hold it.

    Returns:
        (config, tensors): a `peft.LoraConfig`, and A and B of each layer on the CPU, with the
        modules trained whole and trained biases.

    Raises:
        ValueError: no such adapter, or one that trains biases of other layers; one with use_dora
            where `dora` is False, or the other way round.
    """
    adapter = adapter_of(model, adapter_name)
    check_dora(adapter, dora)
    config, tensors = as_lora(adapter, dtype)
    del config["peft_type"], config["revision"]
    return LoraConfig(**config), tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    dora: bool = False,
) -> None:
    """Write what `convert_to_lora` gives to a folder that `PeftModel.from_pretrained` loads.

    The folder gets adapter_config.json and adapter_model.safetensors, both or neither; PEFT and the
    serving engines need nothing of this library to load them.

    Args:
        path: the folder, which may be there already; it is made where it is not.
        model, adapter_name, dtype, dora: as `convert_to_lora` takes them.

    Raises:
        TypeError: `path` is no path, or `model` no module, as when they are swapped.
        ValueError: as `convert_to_lora`, and for values that `dtype` cannot hold.
    """
    require_path(path, call := "save_as_lora(folder, model)")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: it must be a module; call {call}")
    write(adapter_of(model, adapter_name), path, dtype, dora)


def adapter_of(model: nn.Module, name: str) -> Adapter:
    """An adapter of a PeftModel, or of a model that transformers has put adapters into."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {
        key: layer
        for key, layer in named_modules(base)
        if isinstance(layer, PeftLowRankLinear) and name in layer.scaling
    }
    if not layers:
        there = ", ".join(getattr(model, "peft_config", None) or {}) or "none"
        raise ValueError(
            f"the model has no adapter {name!r} of {', '.join(METHODS)}: its adapters are {there}"
        )
    bias = model.peft_config[name].bias  # type: ignore[index, union-attr]
    if bias == "all":
        raise ValueError("the adapter trains all biases: LoRA holds those of its layers alone")
    parts = {}
    for key, layer in each_here(base, layers):
        require_matrices(key, layer.unmerged_weight, *layer.matrices_of(name))
        down, core, up, scale = layer.joined([name])
        own_bias = None if bias == "none" else layer.get_base_layer().bias
        magnitude = layer.factors_of(name).get(MAGNITUDE)
        part = Part(down, core, up, scale, 1, layer.lora_dropout[name], own_bias, magnitude)
        parts[key] = own_part(part)
    whole = {
        key: module.modules_to_save[name]
        for key, module in named_modules(base)
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
    }
    modules: dict[str, Mapping[str, Tensor]] = {
        key: {part: own_copy(value) for part, value in module.state_dict().items()}
        for key, module in each_here(base, whole)
    }
    turned = all(layer.fan_in_fan_out for layer in layers.values())
    return Adapter(parts, modules, base, turned)
