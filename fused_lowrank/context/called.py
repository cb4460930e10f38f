"""Adapted layers that are passed over: somebody reads their weights and does not call them.

An adapter does nothing there, and merging it would change the model. A layer knows whether it has
been called, from its first call on, and who has read its weight since. Calls in compiled graphs are
not known; nor are they needed, for a layer that nobody reads is never held against anybody.

A layer that was called in training, and whose factors no gradient reached where others' got theirs,
has learned nothing; the first gradient of a factor is noted, and no other.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .readers import method_of

# What reads weights without computing with them, or is asked to read them by somebody else.
MACHINERY = (
    *("fused_lowrank.", "torch.", "peft.", "accelerate.", "safetensors.", "deepspeed."),
    *("transformers.modeling_utils", "transformers.initialization", "transformers.integrations"),
)
SHOWN = 8  # names in a message
PASSING = ("get_parameter", "__getattr__", "<listcomp>", "<genexpr>", "<dictcomp>")

PRODUCT = nn.Linear.forward.__code__


class Reader(NamedTuple):
    """A place in code that has read a layer's weight since the layer was last called, if ever."""

    where: str
    holds: bool  # whether it is a method of the module that holds the layer: the model's own code


def note_call(layer: Any) -> None:
    """Remember that an adapted layer has been called; at its first call and after a reading."""
    if not torch.compiler.is_compiling():
        asked = layer.asked or (layer.training and torch.is_grad_enabled())
        vars(layer).update(uncalled=False, reader=None, asked=asked)


def note_reading(layer: Any) -> None:
    """Remember who reads the weight of an adapted layer, if anybody computes with it there."""
    if torch.compiler.is_compiling():
        return
    frame: FrameType | None = sys._getframe(2)
    computes = False  # whether it is the layer's own class that does, called past it
    while frame is not None and (frame.f_code is PRODUCT or frame.f_code.co_name in PASSING):
        computes |= frame.f_code is PRODUCT
        frame = frame.f_back
    if frame is None or f"{frame.f_globals.get('__name__')}.".startswith(MACHINERY):
        return
    code = frame.f_code
    if not (computes or method_of(code).uses_weights):
        return
    vars(layer)["asked"] = layer.asked or (layer.training and torch.is_grad_enabled())
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    holds = isinstance(first, nn.Module) and has_child(first, layer) and is_method(code, first)
    if holds or (layer.uncalled and layer.reader is None):
        where = f"{code.co_name} ({code.co_filename}:{frame.f_lineno})"
        vars(layer).update(uncalled=True, reader=Reader(where, holds))


def is_method(code: CodeType, module: nn.Module) -> bool:
    """Whether this is the code of one of the module's methods."""
    own = [getattr(value, "__func__", None) for value in vars(module).values()]
    own += [inspect.getattr_static(type(module), name, None) for name in (code.co_name, "forward")]
    return any(getattr(inspect.unwrap(f), "__code__", None) is code for f in own if callable(f))


def has_child(module: nn.Module, layer: nn.Module) -> bool:
    """Whether the module holds the layer itself or in a list."""
    return any(
        child is layer
        or (isinstance(child, nn.ModuleList | nn.ModuleDict) and layer in child.children())
        for child in module._modules.values()
    )


def passed_over(layers: Mapping[str, Any]) -> dict[str, str]:
    """The layers that are read and not called, with their readers.

    A reading counts if it is in the code of the module that holds the layer, or if other layers
    of the model have been called meanwhile.
    """
    others = any(not layer.uncalled for layer in layers.values())
    return {
        name: layer.reader.where
        for name, layer in layers.items()
        if layer.uncalled and layer.reader is not None and (layer.reader.holds or others)
    }


def watch_gradients(factors: Iterable[nn.Parameter]) -> None:
    """Note the first gradient of each of these."""
    for factor in factors:
        if factor.requires_grad and factor.is_leaf and not waits(factor):
            factor.register_post_accumulate_grad_hook(learns)


def learns(factor: Tensor) -> None:
    """A hook of a factor, which notes its first gradient and then goes.

    In compiled graphs it may be called without a gradient, which does not count.
    """
    if factor.grad is None:
        return
    hooks: dict[int, Any] = factor._post_accumulate_grad_hooks
    for key in [key for key, hook in hooks.items() if hook is learns]:
        del hooks[key]
    factor._lowrank_learned = True  # type: ignore[attr-defined]


def waits(factor: Tensor) -> bool:
    """Whether no gradient of a factor has come yet; False where nobody has watched it."""
    hooks = factor._post_accumulate_grad_hooks or {}
    return any(hook is learns for hook in hooks.values())


def without_gradient(layers: Mapping[str, tuple[Any, Sequence[Tensor]]]) -> list[str]:
    """The layers that were called or read in training and that no gradient has reached.

    `layers` gives each by name with its trained factors.
    """
    factors = [factor for _, own in layers.values() for factor in own]
    if not any(hasattr(factor, "_lowrank_learned") for factor in factors):
        return []
    return [
        name
        for name, (layer, own) in layers.items()
        if layer.asked and own and all(f.requires_grad and waits(f) for f in own)
    ]


def warn_of_passed_over(
    layers: Mapping[str, tuple[Any, Sequence[Tensor]]], stacklevel: int
) -> None:
    """Warn once of layers that are passed over or learn nothing, naming them.

    `layers` gives each by name with its trained factors.
    """
    said = []
    if found := passed_over({name: layer for name, (layer, _) in layers.items()}):
        said.append(f"{described(found)}: what is trained there has no effect")
    if names := [name for name in without_gradient(layers) if name not in found]:
        said.append(f"no gradient reached {shown(names)}, which were called or read in training")
    if said:
        warnings.warn("; ".join(said), stacklevel=stacklevel)


def refuse_passed_over(layers: Mapping[str, Any]) -> None:
    """Raise ValueError if layers to be merged are passed over: that would change the model."""
    there = {name: layer for name, layer in layers.items() if not layer.merged}
    if found := passed_over(there):
        name = next(iter(found))
        raise ValueError(
            f"{described(found)}: merging would change what the model computes. Leave it out by "
            f"exclude_modules; or, if it is to be merged all the same, merge it by its name first: "
            f"model.get_submodule({name!r}).merge()"
        )


def described(found: Mapping[str, str]) -> str:
    """The layers and their readers."""
    by_reader: dict[str, list[str]] = {}
    for name, where in found.items():
        by_reader.setdefault(where, []).append(name)
    said = "; ".join(f"{shown(names)} by {where}" for where, names in by_reader.items())
    return f"the weights of adapted layers are read where the layers are not called ({said})"


def shown(names: Sequence[str]) -> str:
    """Names, not too many of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
