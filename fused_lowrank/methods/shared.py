"""Factors that all layers of a model have in common: one Parameter, of the largest sides there are.

A layer uses the first rows and columns of it, as many as it has room for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..context.elsewhere import hook_of
from .accept import matrix_of, sides_of
from .initial.starts import DRAWS, FILLS
from .keywords import chosen, signature_of, sized
from .method import Method
from .tensors import is_sharded


@torch.no_grad()
def fill_shared(row: Method, factors: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
    """Give a row's shared factors, by name, their first values; a seed's are drawn on the CPU."""
    generator = torch.Generator().manual_seed(options.get("seed", 0))
    inits = row.inits(options.get("init"))
    for name in row.shared:
        factor = factors[name]
        if factor.is_meta:
            continue
        if inits[name] in DRAWS:
            factor.copy_(DRAWS[inits[name]](tuple(factor.shape), generator))
        else:
            FILLS[inits[name]](factor, options)


@torch.no_grad()
def fill_unsaved(layer: Any) -> None:
    """Give a layer the factors that no state_dict has, of its seeds."""
    row = layer.row
    names = [name for name in row.shared if not row.factors[name].saved]
    if not names:
        return
    drawn = {name: torch.empty(getattr(layer, name).shape) for name in row.shared}
    fill_shared(row, drawn, layer.options)
    for name in names:
        own: Any = getattr(layer, name)
        value = drawn[name].to(own.device, own.dtype)
        if is_sharded(own):  # every rank has drawn the same
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
        own.copy_(value)


def shared_by(
    row: Method, linears: Iterable[nn.Linear], keywords: Mapping[str, Any], defer: bool = False
) -> dict[str, nn.Parameter]:
    """The shared factors of the layers that are to be made around these, with first values.

    Raises ValueError if the linears' weights are on several devices, or brought by hooks.
    """
    linears = list(linears)
    if not row.shared:
        return {}
    weights = [matrix_of(linear) for linear in linears]
    devices = {weight.device for weight in weights}
    if len(devices) > 1 or any(hook_of(linear) is not None for linear in linears):
        raise ValueError(
            f"{row.name} has one pair of factors for all layers, and their weights are "
            f"{'on several devices' if len(devices) > 1 else 'brought by hooks of accelerate'}: "
            "adapt the model where it is on one device, before it is dispatched"
        )
    defaults = {p.name: p.default for p in signature_of(row).parameters.values()}
    given = {**defaults, **keywords}
    k, n = map(max, zip(*(sides_of(linear) for linear in linears), strict=True))
    sizes, options = sized(row, k, n, given), chosen(row, given)
    weight, found = weights[0], {}
    for name in row.shared:
        trained = name in given["train"]
        wide = given["dtype"] or torch.promote_types(weight.dtype, torch.float32)
        kind = wide if trained else weight.dtype
        value = torch.empty(row.shape(name, sizes), dtype=kind, device=weight.device)
        found[name] = nn.Parameter(value, requires_grad=trained)
    if not defer or any(not row.factors[name].saved for name in row.shared):
        fill_shared(row, found, options)
    return found


def tie(layers: Iterable[Any]) -> None:
    """Give all layers the shared factors of the first: after loading, or leaving the meta device,
    each may have got its own.
    """
    first: dict[tuple[str, torch.Size], nn.Parameter] = {}
    for layer in layers:
        for name in layer.row.shared:
            own = getattr(layer, name)
            one = first.setdefault((name, own.shape), own)  # layers built alone have their own
            if one is not own:
                layer._parameters[name] = one


def leave_to_others(layer: Any, state: dict[str, Any], prefix: str) -> None:
    """Take out of a state_dict what is not saved, and shared factors that it has already."""
    for name, factor in layer.row.factors.items():
        key = prefix + name
        own = state.get(key)
        if own is None or not (factor.shared or not factor.saved):
            continue
        others = (k for k in state if k.endswith(f".{name}") and k != key)
        if not factor.saved or any(is_one(own, state[k]) for k in others):
            del state[key]


def is_one(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same memory."""
    return a is b or (a.shape == b.shape and not a.is_meta and a.data_ptr() == b.data_ptr())


def tie_within(module: nn.Module, _: Any) -> None:
    """A `load_state_dict` post-hook: the layers have one set of shared factors again."""
    tie(layer for layer in module.modules() if isinstance(getattr(layer, "row", None), Method))


def spread(layers: Mapping[str, Any], state: Any, prefix: str) -> None:
    """Put the shared factors, which a state_dict has with one layer, in for the others as well."""
    names = {name for layer in layers.values() for name in layer.row.shared}
    for name in names:
        keys = [f"{prefix}{layer}.{name}" if layer else prefix + name for layer in layers]
        there = next((state[key] for key in keys if key in state), None)
        for key in keys if there is not None else ():
            state.setdefault(key, there)
