"""The meaning of a state_dict for a layer: whose its frozen factors are, and W or W + ΔW."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ....compute.base.protocol import Base
from ....files.fingerprint import alike
from ....methods.state import MERGED, is_sum
from ....methods.tensors import is_sharded


def save_merged(layer: Any, state: dict[str, Any], prefix: str) -> None:
    """Write into a state_dict which adapters are in the weight, if any are: as JSON, in bytes."""
    if layer.merged:
        names = json.dumps(layer.merged_adapters).encode()
        state[prefix + MERGED] = torch.tensor(list(names), dtype=torch.uint8)


def check_shared(layer: Any, name: str, value: Tensor, adapters: list[str]) -> None:
    """Raise ValueError if a frozen factor is to be another than the one that adapters share."""
    own = layer._parameters.get(name)
    if (
        own is None
        or not adapters
        or own.is_meta
        or value.is_meta
        or layer.pending_seed is not None
    ):
        return
    if is_sharded(own) or is_sharded(value):
        return
    p, q = layer.common_sides(adapters)
    used = (own[:p], value[:p]) if name == "basis_down" else (own[:, :q], value[:, :q])
    if not alike(*used):
        raise ValueError(
            f"{layer.key} would get another {name} than that which {', '.join(adapters)} share: "
            "load the adapter into a model of its own"
        )


def before_loading(layer: Any, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
    """Check a state_dict against a layer, and take ΔW out of the weight in it, in place.

    Raises:
        RuntimeError: the layer is merged, and its weight is to be loaded.
        ValueError: other frozen factors than those of adapters that are not in the state_dict.
    """
    weight = f"{prefix}base_layer.weight"
    if layer.merged and weight in state:
        raise RuntimeError(f"{prefix[:-1]} is merged: unmerge it before loading its weight")
    if prefix + MERGED in state and isinstance(layer.unmerged_weight, Base):
        raise RuntimeError(
            f"the state_dict's {prefix[:-1]} is merged, and what is stored of a quantised weight "
            "does not tell W: unmerge before its state_dict is taken"
        )
    missing = [
        name for name in layer.scaling if any(k not in state for k in own_keys(layer, prefix, name))
    ]
    for name in layer.base_names:
        if (value := state.get(prefix + name)) is not None:
            check_shared(layer, name, value, missing)
    marker = state.pop(prefix + MERGED, None)
    if marker is None or weight not in state:
        return
    names = json.loads(bytes(marker.tolist()))
    needed = [key for name in names for key in layer.keys(prefix, name).values()]
    if any(key not in state for key in needed) or any(name not in layer.scaling for name in names):
        errors.append(
            f"{weight} has {', '.join(names)} merged into it, which are not all here and there: "
            "unmerge before the state_dict is taken"
        )
        return
    state[weight] = unmerged(layer, state, prefix, names, errors)


def own_keys(layer: Any, prefix: str, adapter: str) -> list[str]:
    """The keys of what no other adapter of a layer has."""
    return [f"{prefix}{factor}.{adapter}" for factor in layer.trained_names(adapter)]


@torch.no_grad()
def unmerged(
    layer: Any, state: dict[str, Any], prefix: str, names: list[str], errors: list[str]
) -> Tensor:
    """W of a weight with adapters merged into it: the layer's own if that makes the same sum.

    What cannot be told is added to `errors`.
    """
    merged, own = state[f"{prefix}base_layer.weight"], layer.get_base_layer().weight
    dtype = torch.promote_types(merged.dtype, torch.float32)
    delta = torch.zeros_like(merged, dtype=dtype)
    for name in names:
        keys = layer.keys(prefix, name).items()
        there = {factor: state[key].to(merged.device) for factor, key in keys}
        delta += layer.delta(name, layer.used(name, there), dtype)
    if own.shape == merged.shape and own.dtype == merged.dtype and not own.is_meta:
        before = own.detach().to(merged.device)
        if is_sum(before, delta, merged):
            return before.clone()
    if any(layer.row_of(name).dora for name in names):
        errors.append(
            f"{prefix}base_layer.weight is the merged one of another base model's layer, and from "
            "what DoRA makes of W nobody can tell W: unmerge before the state_dict is taken"
        )
    return (merged - delta).to(merged.dtype)
