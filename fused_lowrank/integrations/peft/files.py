"""The contents of an adapter's file, and the checks on loading it.

<module>.{method}_{factor}       the trained factors, those that all layers share with the first
<module>.basis_{factor}          the frozen factors, of cores as far as the adapter uses them
<module>.basis_fingerprint       of cores: of these and of the weight (`fingerprint.fingerprint`)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...compute.base.protocol import Base
from ...context.elsewhere import FSDP1, ZERO, here, sharder_in, value_of
from ...files.fingerprint import WEIGHT_PROBES, alike, differing, fingerprint
from ...files.other_base import refuse_other_base
from ...methods.accept import special_tensor
from ...models.targets import named_modules
from ...models.whole_modules import warn_of_names
from .layer import PeftCoreLinear, PeftLowRankLinear, PeftOwnLinear, share_unsaved

FINGERPRINT = "basis_fingerprint"


def named_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter, by the name that their tensors have in a state_dict."""
    for name, module in named_modules(model):
        if isinstance(module, PeftLowRankLinear) and adapter in module.scaling:
            yield name, module


def why_no_values(weight: Any) -> str | None:
    """The type's name of a W that nobody can take a fingerprint of."""
    return None if isinstance(weight, Base) else special_tensor(weight)


def is_here(tensor: Tensor, shape: tuple[int, int] | None = None) -> bool:
    """Whether this process has all of its values; of a tensor of this shape."""
    if isinstance(tensor, DTensor) or tensor.is_meta:
        return False
    return shape is None or tuple(tensor.shape) == shape


def require_whole(
    key: str, tensors: dict[str, Tensor], layer: PeftLowRankLinear, dims: int = 2
) -> None:
    """Raise ValueError where a factor of a layer is but a part of it, by FSDP or ZeRO-3."""
    tensor = tensors.get(key)
    if tensor is None or (tensor.dim() == dims and tensor.numel()):
        return
    sharder, how = FSDP1, "FullyShardedDataParallel.summon_full_params(model)"
    if sharder_in(layer) == ZERO:
        sharder, how = ZERO, "deepspeed.zero.GatheredParameters(list(model.parameters()))"
    raise ValueError(
        f"{key} is sharded by {sharder}: give save_pretrained the gathered state_dict, of frozen "
        f"factors too (as accelerator.get_state_dict gives it), or call it within {how}"
    )


def own_tensors(
    model: nn.Module, adapter: str, state: dict[str, Tensor], bias: str
) -> dict[str, Tensor]:
    """The tensors of a state_dict that are an adapter's: trained and frozen factors, biases."""
    found = {}
    for name, layer in named_layers(model, adapter):
        own = [f"{name}.{factor}.{adapter}" for factor in layer.factor_names]
        own += [f"{name}.{base}" for base in layer.base_names]
        own += [f"{name}.base_layer.bias"] if bias.endswith("_only") else []
        found.update({key: state[key] for key in own if key in state})
    return found


def dropped(model: nn.Module, tensors: dict[str, Tensor], others: list[str]) -> dict[str, Tensor]:
    """The tensors that PEFT left out of a state_dict as others', by a part of the name alone.

    A module may be called as an adapter is: `x.q_proj.basis_down` is not of the adapter "q_proj".
    """
    parts, theirs = set[str](), set[str]()
    for name, module in model.named_modules():
        name = name.removeprefix("_fsdp_wrapped_module.")
        parts.update(name.split("."))
        if not isinstance(module, nn.ParameterDict):
            parts.update(own for own, _ in module.named_parameters(recurse=False))
            parts.update(own for own, _ in module.named_buffers(recurse=False))
        if isinstance(module, PeftLowRankLinear):
            theirs |= {f"{name}.{f}.{o}." for f in module.factor_names for o in others}
        elif isinstance(module, ModulesToSaveWrapper):
            theirs |= {f"{name}.modules_to_save.{other}." for other in others}
    if parts.isdisjoint(others):
        return {}
    infixes, prefixes = [f".{other}." for other in others], tuple(theirs)
    return {
        key: tensor
        for key, tensor in model.state_dict().items()
        if any(infix in f"{key}." for infix in infixes)
        and key not in tensors
        and not f"{key}.".startswith(prefixes)
    }


def to_save(
    model: nn.Module,
    adapter: str,
    tensors: dict[str, Tensor],
    state: dict[str, Tensor],
    bases: bool,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file, from those of its layers; the frozen ones where asked.

    `state` is the whole model's, gathered where its parameters are sharded.

    Raises:
        ValueError: tensors of which this process has but a part.
    """
    for name, layer in named_layers(model, adapter):
        keys = [f"{name}.{factor}.{adapter}" for factor in layer.trained_names(adapter)]
        frozen = down_key, up_key = [f"{name}.{base}" for base in layer.base_names]
        if not any(key in tensors for key in (*keys, *frozen)):
            continue
        if down_key not in tensors:  # the state_dict is of trained parameters alone
            if layer.pending_seed is not None:
                layer.bases(0, 0)  # which makes them
            tensors.update({key: value_of(layer, key.rpartition(".")[2]) for key in frozen})
        for key in (*keys, *frozen):
            require_whole(key, tensors, layer, 2 - key.endswith(f".{layer.magnitude}.{adapter}"))
        p, q = layer.sides[adapter]
        down, up = tensors.pop(down_key)[:p], tensors.pop(up_key)[:, :q]
        with here(layer.get_base_layer()):
            weight = layer.unmerged_weight
            kind = why_no_values(weight)
            if kind and not bases:
                raise ValueError(
                    f"the weight of {name} has become a {kind}, which has no fingerprint to check "
                    "the frozen factors by: save with save_projection=True"
                )
            shape = layer.out_features, layer.in_features
            if not kind and not is_here(weight, shape):
                weight = state.get(f"{name}.base_layer.weight", weight)
                weight = weight.t() if layer.fan_in_fan_out else weight
            if not kind and is_here(weight, shape) and is_here(down):
                key = f"{name}.{FINGERPRINT}"
                if not isinstance(weight, Base):
                    weight = weight.to(down.device)
                tensors[key] = fingerprint(weight, down, up)
        if bases:
            tensors[down_key], tensors[up_key] = down.contiguous(), up.contiguous()
    return tensors


def warn_of_forgotten(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Warn once of trained Parameters among neither the tensors of a file nor an adapter's."""
    saved = set()
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            saved |= {id(parameter) for parameter in module.parameters()}
        elif isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                own = getattr(module, name, None)
                saved |= {id(p) for p in own.parameters()} if isinstance(own, nn.Module) else set()
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.replace("_fsdp_wrapped_module.", "")
        if name in tensors:
            saved.add(id(parameter))
        names[name] = parameter
    warn_of_names([n for n, p in names.items() if p.requires_grad and id(p) not in saved], 6)


@contextmanager
def still_pending(layers: Iterable[PeftLowRankLinear]) -> Iterator[None]:
    """A context within which a state_dict makes no frozen factors that are to be made later."""
    seeds = [(m, m.pending_seed) for m in layers if isinstance(m, PeftCoreLinear)]
    try:
        for layer, _ in seeds:
            layer.pending_seed = None
        yield
    finally:
        for layer, seed in seeds:
            layer.pending_seed = seed


@torch.no_grad()
def to_load(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to load into the model, of those that an adapter's file holds.

    Raises:
        ValueError: the file is of another base model, of other ranks, or of other frozen factors
            than those of adapters that are there; or lacks them, and they cannot be made again.
    """
    for name, layer in named_layers(model, adapter):
        parts = [f"{name}.{factor}.{adapter}" for factor in layer.trained_names(adapter)]
        keys = [f"{name}.{base}" for base in layer.base_names]
        printed = f"{name}.{FINGERPRINT}"
        expected = tensors.pop(printed, tensors.pop(f"base_model.model.{printed}", None))
        if not any(key in tensors for key in (*parts, *keys)):
            continue  # PEFT says what is missing
        for part in parts:
            wanted = getattr(layer, part.split(".")[-2])[adapter].shape
            if part in tensors and tensors[part].shape != wanted:
                raise ValueError(
                    f"the adapter in the file is of another rank: {part} is "
                    f"{tuple(tensors[part].shape)} there and {tuple(wanted)} here"
                )
        own = tuple(tensors.pop(key, None) for key in keys)
        with here(layer, layer.get_base_layer()):
            new = bases_to_load(name, layer, adapter, own, expected)
        tensors.update(dict(zip(keys, new, strict=True)) if new else {})
    return tensors


def bases_to_load(
    name: str, layer: PeftCoreLinear, adapter: str, own: Any, expected: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The frozen factors that the layer is to have, or None if it has them.

    `own` are those in the adapter's file, or (None, None); `expected` is their fingerprint.
    """
    p, q = layer.sides[adapter]
    there = [other for other in layer.scaling if other != adapter]
    used_p, used_q = layer.common_sides(there)
    weight, made = layer.unmerged_weight, cast(Any, None)
    if (own[0] is None) != (own[1] is None):
        raise ValueError(
            f"the file has basis_{'up' if own[0] is None else 'down'} of {name} and not "
            f"basis_{'down' if own[0] is None else 'up'}: it is damaged"
        )
    carries = own[0] is not None
    if not carries:
        if expected is None:
            raise ValueError(
                f"the file has neither the frozen factors of {name} nor their fingerprint: it is "
                "damaged, or was not written by save_pretrained"
            )
        if layer.basis_down.is_meta:
            new = layer.new_bases(p, q, layer.projection_seed[adapter])
            made = tuple(factor.to(weight.dtype).contiguous() for factor in new)
        own = made or layer.bases(p, q)
    elif own[0].shape != (p, layer.in_features) or own[1].shape != (layer.out_features, q):
        raise ValueError(
            f"the adapter is for another base model, or of another rank: the frozen factors of "
            f"{name} are {tuple(own[0].shape)} and {tuple(own[1].shape)} in the file, and here "
            f"{(p, layer.in_features)} and {(layer.out_features, q)}"
        )
    else:
        made = own
    there_is = why_no_values(weight) is None and all(map(is_here, (weight, *own)))
    if expected is not None and there_is:
        if expected.shape != (p + q + 1 + WEIGHT_PROBES,):
            raise ValueError(f"the fingerprint of {name} is not of its ranks: the file is damaged")
        weight_device = [factor.to(weight.device) for factor in own]
        found = differing(fingerprint(weight, *weight_device), expected.cpu(), p, q)
        if "weight" in found:
            refuse_other_base(
                name,
                f"the adapter was trained on another base model: the weight of {name} differs",
                carries,
            )
        if found and found != ["weight"]:
            raise ValueError(
                f"the frozen factors of {name} are not those that the adapter was trained with; "
                "save it with save_projection=True"
            )
    if made is not None and not there:
        layer.pending_seed = None
    if made is None or not there:
        return made
    p0, q0 = min(p, used_p), min(q, used_q)
    in_use = layer.bases(p0, q0)
    if not alike(in_use[0], own[0][:p0]) or not alike(in_use[1], own[1][:, :q0]):
        raise ValueError(
            f"the adapter has other frozen factors in {name} than {', '.join(there)}, with which "
            "it would share them: load it into a model of its own"
        )
    if (p0, q0) == (p, q):
        return None
    down, up = (factor.clone() for factor in (layer.basis_down, layer.basis_up))
    down[p0:p], up[:, q0:q] = own[0][p0:], own[1][:, q0:]
    return down, up


def own_to_save(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file of an adapter with factors of its own: a shared one once, and none
    that a seed determines.

    Raises ValueError for tensors of which this process has but a part.
    """
    found = set[str]()
    for name, layer in named_layers(model, adapter):
        for factor, key in layer.keys(f"{name}.", adapter).items():
            kind = layer.row_of(adapter).factors[factor]
            require_whole(key, tensors, layer, len(kind.sides))
            if not kind.saved or (kind.shared and factor in found):
                tensors.pop(key, None)
            elif key in tensors:
                found.add(factor)
    return tensors


def own_to_load(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to load, of those in the file of an adapter with factors of its own.

    Raises ValueError for a file of other ranks, of a model of other sizes, or without its frozen
    factors; PEFT says which trained ones are missing.
    """
    shared: dict[str, nn.Parameter] = {}
    layers: dict[str, PeftOwnLinear] = dict(named_layers(model, adapter))
    keys = {name: layer.keys(f"{name}.", adapter) for name, layer in layers.items()}
    for name, layer in layers.items():
        for factor, own in layer.factors_of(adapter).items():
            key, kind = keys[name][factor], layer.row_of(adapter).factors[factor]
            value = tensors.get(key)
            if value is None:
                if kind.saved and not (kind.trained or kind.shared):
                    raise ValueError(f"the file lacks {key}, which is frozen: it is damaged")
            elif value.shape != own.shape:
                raise ValueError(
                    f"the adapter in the file is of another rank, or for another base model: {key} "
                    f"is {tuple(value.shape)} there and {tuple(own.shape)} here"
                )
            elif kind.shared:  # the same object for all layers, where it is assigned
                shared.setdefault(factor, nn.Parameter(value, requires_grad=False))
    for own_keys in keys.values():
        tensors.update({own_keys[factor]: value for factor, value in shared.items()})
    configs: Any = model.peft_config
    share_unsaved(layers.values(), adapter, configs[adapter])
    return tensors
