"""PEFT's own LoRA through the fused kernels: `fuse_lora(model)` and back, `unfuse_lora(model)`.

A fused layer is PEFT's layer of another class: Parameters, state_dict, adapters and files are the
same. Each call is computed by `lowrank_linear` where that is the same computation, and by PEFT's
own forward everywhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import peft
import torch
from torch import nn

from ...context.calls import Learned
from ...context.readers import leave_fast_paths, restore_fast_paths
from ...methods.accept import is_replaced
from .lora_layers import Fused, fused_of, why_not_fused
from .mixed import hooked
from .registry import TESTED

try:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from peft.tuners.lora.layer import Linear, LoraLayer
except ImportError as error:
    raise ImportError(f"{error}: fuse_lora was tested with peft {TESTED}") from error

Model = TypeVar("Model", bound=nn.Module)
USED = (
    *("_disable_adapters", "active_adapters", "base_layer", "lora_A", "lora_B", "lora_dropout"),
    *("lora_magnitude_vector", "lora_variant", "merged_adapters", "scaling", "unmerge"),
    "update_layer",
)


def check_peft() -> None:
    """Raise ImportError, naming what is missing, if PEFT's LoRA layer is not as it is used here."""
    try:
        with torch.device("meta"):  # draws nothing from anybody's generator
            layer = Linear(nn.Linear(1, 1), "probe", config=LoraConfig(), r=1)
        missing = [name for name in USED if not hasattr(layer, name)]
    except Exception as error:
        missing = [f"Linear(base_layer, adapter_name, config=, r=) ({error})"]
    if missing:
        raise ImportError(
            f"PEFT {peft.__version__} is not as fuse_lora needs it; it was tested with {TESTED}. "
            f"Missing in peft.tuners.lora.layer: {', '.join(missing)}"
        )


check_peft()


class FusedLoraModel(LoraModel):
    """PEFT's tuner, whose `adapter_names` are of the calling thread or task, and follow the rows.

    PEFT itself gives every layer one name for each of its x's first dimension, by hooks that other
    threads' calls meet as well.
    """

    learned: Learned  # of where the sequences are in the layers' inputs

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None or kwargs.get("alora_offsets") is not None or self.training:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        if "learned" not in vars(self):
            self.learned = Learned()
        layers = [layer for layer in self.modules() if isinstance(layer, LoraLayer)]
        there = {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
        with hooked(self, names, there, LoraLayer):
            yield


def fuse_lora(model: Model) -> Model:
    """Compute the model's PEFT LoRA layers by the fused kernels, in place; returns the model.

    For a PeftModel, and for any model with layers by `inject_adapter_in_model`:

        model = fuse_lora(get_peft_model(model, LoraConfig(…)))

    Layers around nn.Linear and transformers' Conv1D are fused, and those over bitsandbytes' 4-bit
    and 8-bit layers and torchao's weights (QLoRA), with any r, alpha, rsLoRA, initial values, bias,
    lora_bias and dropout, and with DoRA. All else is left to PEFT's own forward:
    other kinds of layers and of LoRA, hooks inside a layer, several active adapters at once, merged
    and disabled ones. Mixed batches are left to it as well, which refuses them with DoRA, but the
    rows of each adapter are found as with the methods of this library: `adapter_names` belong to
    the calling thread or task, and are followed to each layer's rows. One UserWarning names the
    layers that are left, and why. Adapters may be added, changed and deleted afterwards; if one
    brings new layers, call this again. Call it before `fully_shard`.

    torch's encoder layers with a fused layer are kept off their fast path, which PEFT's own layers
    leave reading the base weights: in eval mode their adapters act, too.

    Outputs and gradients are PEFT's but for rounding, and in the same dtypes: factors wider than x
    are used in x's dtype, as under autocast. Dropout draws another mask of the same distribution,
    from a seed; calls of few elements on a CPU have torch's own, and are computed by library
    operations then, whatever plan is asked for: a checkpoint finds the same mask under another one.
    A second differentiation raises: `unfuse_lora` first. So does a backward with DoRA in training
    if the layer's output was written to in place: the magnitude's gradient is computed from it.

    Raises:
        ValueError: the model has no LoRA layers of PEFT's.
        ImportError: PEFT's LoRA layer is not as it is used here; raised by the import.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    if not layers:
        raise ValueError(
            "the model has no LoRA layers of PEFT's: get_peft_model(model, LoraConfig(…)) first "
            "(for layers of this library there is adapt(model, method='lora'))"
        )
    left: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if (kind := fused_of(type(layer))) is not None:
            change_class(layer, kind)
        for reason in reasons(layer):
            left.setdefault(reason, []).append(name or "the model")
    for tuner in model.modules():
        if type(tuner) is LoraModel:
            tuner.__class__ = FusedLoraModel
    leave_fast_paths(model, Fused)
    if left:
        said = "; ".join(f"{', '.join(names)}: a layer {reason}" for reason, names in left.items())
        warnings.warn(f"left to PEFT's own forward: {said}", stacklevel=2)
    return model


def unfuse_lora(model: Model) -> Model:
    """Undo `fuse_lora`, in place; returns the model.

    Raises:
        ValueError: the model has no fused LoRA layers, or one whose class was changed since.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Fused)}
    if not layers:
        raise ValueError("the model has no fused LoRA layers: fuse_lora(model) first")
    for name, layer in layers.items():
        if type(layer) is not fused_of(layer.plain):
            raise ValueError(f"{name} is a {type(layer).__name__} by now: unfuse before sharding")
    for layer in layers.values():
        change_class(layer, layer.plain)
    for tuner in model.modules():
        if type(tuner) is FusedLoraModel:
            tuner.__class__ = LoraModel
    restore_fast_paths(model)
    return model


def reasons(layer: Any) -> list[str]:
    """The reasons why calls of a layer are left to PEFT."""
    if not isinstance(layer, Fused) or type(layer) is not fused_of(layer.plain):
        return [f"of another kind ({type(layer).__name__})"]
    if is_replaced(layer) and "_old_forward" not in vars(layer):
        return ["whose forward has been replaced"]
    return list(filter(None, dict.fromkeys(why_not_fused(layer, name) for name in layer.lora_A)))


def change_class(layer: Any, kind: type[nn.Module]) -> None:
    """Make the layer one of that class, also where accelerate's hooks have kept its forward."""
    for name in "forward", "_old_forward":
        bound = vars(layer).get(name)
        if getattr(bound, "__func__", None) is type(layer).forward:
            vars(layer)[name] = kind.forward.__get__(layer)
    layer.__class__ = kind
