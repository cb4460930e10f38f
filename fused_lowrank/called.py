"""Adapted layers that are passed over: somebody reads their weights and does not call them.

An adapter does nothing there, and merging it would change the model. A layer knows whether it has
been called, from its first call on, and who has read its weight since. Calls in compiled graphs are
not known; nor are they needed, for a layer that nobody reads is never held against anybody.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from .readers import method_of

# What reads weights without computing with them, or is asked to read them by somebody else.
MACHINERY = (
    *("fused_lowrank.", "torch.", "peft.", "accelerate.", "safetensors.", "deepspeed."),
    *("transformers.modeling_utils", "transformers.initialization", "transformers.integrations"),
)
PASSING = ("get_parameter", "__getattr__", "<listcomp>", "<genexpr>", "<dictcomp>")


class Reader(NamedTuple):
    """Who has read the weight of a layer, since it was called last or at all."""

    where: str
    holds: bool  # whether it is a method of the module that holds the layer: the model's own code


def note_call(layer: Any) -> None:
    """Remember that an adapted layer has been called; at its first call and after a reading."""
    if not torch.compiler.is_compiling():
        vars(layer).update(uncalled=False, reader=None)


def note_reading(layer: Any) -> None:
    """Remember who reads the weight of an adapted layer, if anybody computes with it there."""
    if torch.compiler.is_compiling():
        return
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in PASSING:
        frame = frame.f_back
    if frame is None or f"{frame.f_globals.get('__name__')}.".startswith(MACHINERY):
        return
    code = frame.f_code
    if not method_of(code).uses_weights:
        return
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


def warn_of_passed_over(layers: Mapping[str, Any], stacklevel: int) -> None:
    """One UserWarning that names the layers that are passed over, if there are any."""
    if found := passed_over(layers):
        warnings.warn(
            f"{described(found)}: what is trained there has no effect", stacklevel=stacklevel
        )


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
    said = "; ".join(f"{', '.join(names)} by {where}" for where, names in by_reader.items())
    return f"the weights of adapted layers are read where the layers are not called ({said})"
