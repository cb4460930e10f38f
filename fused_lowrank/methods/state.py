"""The meaning of a layer's state_dict: its weight is W or, of a merged layer, W + ΔW."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..compute.base.protocol import Base, dense
from . import dora
from .method import MAGNITUDE

MERGED = "merged"  # a key of a merged layer's state_dict, which says that the weight is W + ΔW


EXTRA = "_extra_state"  # torch's name for what a state_dict has beside tensors


def seeds_of(layer: Any) -> dict[str, int]:
    """The seeds, by name, of factors that no state_dict has."""
    return {name: value for name, value in layer.options.items() if isinstance(value, int)}


def seeds_state(layer: Any) -> Tensor:
    """The part of a state_dict in place of the factors that seeds determine: JSON, in bytes."""
    return torch.tensor(list(json.dumps(seeds_of(layer)).encode()), dtype=torch.uint8)


def refuse_other_seeds(layer: Any, state: Mapping[str, Any], prefix: str) -> None:
    """Raise RuntimeError if a state_dict is of a layer whose factors were drawn from other seeds.

    One without seeds, of before they were in it, or with the factors themselves is taken.
    """
    unsaved = [prefix + name for name, factor in layer.row.factors.items() if not factor.saved]
    found = state.get(prefix + EXTRA)
    if not unsaved or found is None or found.is_meta or all(key in state for key in unsaved):
        return
    own, theirs = seeds_of(layer), json.loads(bytes(found.tolist()))
    if theirs != own:
        said, wanted = (
            ", ".join(f"{name}={value}" for name, value in seeds.items()) for seeds in (own, theirs)
        )
        raise RuntimeError(
            f"{prefix[:-1] or layer.method} has {said}, and the state_dict is of {wanted}: the "
            f"random factors, which it has not, would be others. Adapt with {wanted}"
        )


def refuse_wrong(layer: Any, state: Mapping[str, Any], prefix: str) -> None:
    """Raise RuntimeError if `load_state_dict` must not give a layer these values."""
    dora.forget()
    names = (*layer.factors, "weight")
    present = {name: state[prefix + name] for name in names if prefix + name in state}
    refuse_other_seeds(layer, state, prefix)
    over = isinstance(layer.base_weight, Base)
    if layer.merged and (present or (over and any(key.startswith(prefix) for key in state))):
        raise RuntimeError(f"{prefix[:-1]} is merged: unmerge it before loading a state_dict")
    if over and prefix + MERGED in state:
        raise RuntimeError(
            f"the state_dict's {prefix[:-1]} is merged, and what is stored of a quantised weight "
            "does not tell W: unmerge(model) before its state_dict is taken"
        )
    if layer.computed_by is not None:
        if prefix + MERGED in state:
            present.pop("weight", None)
        layer.computed_by.refuse_other(present)


@torch.no_grad()
def unmerged(
    layer: Any, state: Mapping[str, Any], prefix: str, errors: list[str]
) -> dict[str, Any]:
    """The state_dict of a merged layer with W in place of W + ΔW.

    W is the layer's own where that is the one which was merged, and otherwise the difference: W
    but for the rounding of the sum. What cannot be told is added to `errors`.
    """
    state = {key: value for key, value in state.items() if key != prefix + MERGED}
    merged, own = state.get(prefix + "weight"), layer.weight
    factors: dict[str, Any] = {name: state.get(prefix + name) for name in layer.factors}
    for name in layer.row.elsewhere:  # another layer has it, and it is loaded already
        if factors[name] is None:
            factors[name] = getattr(layer, name).detach()
    if merged is None:
        return state
    if any(factor is None for factor in factors.values()):
        errors.append(
            f"{prefix}weight is W + ΔW of a merged layer, and the factors of ΔW are not all there: "
            "unmerge(model) before its state_dict is taken"
        )
        return state
    dtype = torch.promote_types(merged.dtype, torch.float32)
    here = {name: factor.to(merged.device) for name, factor in factors.items()}
    if own.dtype == merged.dtype and own.shape == merged.shape and not own.is_meta:
        before = own.detach().to(merged.device)
        if is_sum(before, delta_of(layer, here, before, dtype), merged):
            state[prefix + "weight"] = before.clone()
            return state
    if layer.row.dora:
        errors.append(
            f"{prefix}weight is the merged one of another base model's layer, and from what DoRA "
            "makes of W nobody can tell W: unmerge(model) before its state_dict is taken"
        )
    else:
        delta = delta_of(layer, here, merged, dtype)
        state[prefix + "weight"] = (merged - delta).to(merged.dtype)
    return state


def is_sum(weight: Tensor, delta: Tensor, merged: Tensor) -> bool:
    """Whether each element of a merged weight is W + ΔW, rounded once."""
    error = (merged.to(delta.dtype) - weight.to(delta.dtype) - delta).abs()
    unit = torch.finfo(merged.dtype).eps / 2 + 4 * torch.finfo(delta.dtype).eps
    return bool((error <= unit * (merged.abs() + delta.abs())).all())


def is_other(value: Any, own: Any) -> bool:
    """Whether a value to be loaded is there, and not the parameter itself: what
    torch.distributed.checkpoint loads into a model has the model's own tensors for what it lacks.
    """
    value, own = (getattr(tensor, "_local_tensor", tensor) for tensor in (value, own))
    return value is not None and (not own.numel() or value.data_ptr() != own.data_ptr())


def delta_of(
    layer: Any, factors: Mapping[str, Tensor], weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """The matrix that a layer with these factors adds to this weight, computed in a dtype.

    That is scale · up·coreᵀ·down or, where there is a gain, gain ⊙ (W + that) - W.
    """
    weight = dense(weight) if layer.row.dora else weight
    low, gain = low_rank_of(layer, factors, weight, dtype)
    if gain is None:
        return low
    weight = dense(weight)
    return gain[:, None] * (weight.to(dtype) + low) - weight


def sum_of(
    layer: Any, factors: Mapping[str, Tensor], weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(W + ΔW, ΔW), computed in a dtype: where there is a gain the sum comes first."""
    low, gain = low_rank_of(layer, factors, weight, dtype)
    weight = weight.to(dtype)
    whole = weight + low if gain is None else gain[:, None] * (weight + low)
    return whole, low if gain is None else whole - weight


def low_rank_of(
    layer: Any, factors: Mapping[str, Tensor], weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(scale · up·coreᵀ·down, the row's gain or DoRA's) of a layer, computed in a dtype."""
    wide = {name: factor.to(dtype) for name, factor in factors.items()}
    down, core, up, gain = layer.row.made(wide, weight, layer.scale)
    cores = () if core is None else core if isinstance(core, tuple) else (core,)
    low = layer.scale * product_of([down, *cores, up], dtype)
    if layer.row.dora:
        norm = (weight.to(dtype) + low).norm(dim=1)
        gain = dora.gain(factors[MAGNITUDE].to(dtype), norm)
    return low, gain


def product_of(factors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """up·coreᵀ·down of (down, up), (down, core, up) or (down, a, b, up), computed in a dtype."""
    down, *core, up = (factor.to(dtype) for factor in factors)
    if len(core) == 1 and core[0].dim() == 1:
        up = up * core[0]
    elif core:
        up = up @ (core[0] if len(core) == 1 else core[0] @ core[1]).t()
    return up @ down
