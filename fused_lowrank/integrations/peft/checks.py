"""Checks of the modules that adapters come into or are merged into, and the warnings about them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...compute.base.kinds import sizes_of
from ...context.called import refuse_passed_over, shown
from ...context.elsewhere import sharder_of
from ...context.learns import warn_of_narrow, warn_of_scales, warn_of_zeros
from ...methods.accept import ADAPT_FIRST, why_no_base, why_no_weight
from ...models.adapt import adapted_layers
from ...models.targets import never_called, places_of, unmatched
from .config import LowRankConfig
from .layer import PeftCoreLinear, PeftLowRankLinear, PeftOverBase, has_matrix, layers_of

LEAVE = (
    "Leave it out of target_modules (exclude_modules does), or train it whole by modules_to_save"
)


def check_target(model: nn.Module, target: nn.Module, key: str, read: dict[int, str]) -> None:
    """Raise ValueError, naming the module, unless it can have adapters.

    `read` is what `readers` found in the model.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if has_matrix(base) and (by := sharder_of(base.weight)):
        raise ValueError(f"Target module {key} has its weight sharded by {by}: {ADAPT_FIRST[by]}")
    check_base(base, key)
    if (places := places_of(model)[id(target)]) > 1:
        raise ValueError(
            f"Target module {key} stands in {places} places of the model, of which PEFT would "
            f"adapt one, and merging would change all; adapt(model, …) takes them all. {LEAVE}"
        )
    if reason := never_called(dict(model.named_modules()), key, read):
        raise ValueError(f"Target module {key} {reason}. {LEAVE}")


def refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError for a model with layers of `adapt`, whose factors PEFT would freeze."""
    for name, _ in adapted_layers(model):
        raise ValueError(
            f"the model is adapted already: {name} has an adapter that PEFT would freeze, and not "
            "save. Add the other one by adapt(model, …) as well; or unload(model, merge=True), or "
            "save_adapter and unload(model), first"
        )


def check_base(base: nn.Module, key: str) -> None:
    """Raise ValueError, naming the module, unless it has a W: an ordinary matrix, or a `Base`."""
    kind = type(base).__name__
    weight: Any = getattr(base, "weight", None)
    if has_matrix(base):
        reason = "" if weight.dim() == 2 else f"is a {kind} with a weight of {tuple(weight.shape)}"
    elif isinstance(base, Conv1D):
        reason = f"is a {kind} with {why_no_weight(weight)}"
    elif sizes_of(base) is None:
        reason = (
            f"is a {kind}: it is not supported, only nn.Linear and transformers' Conv1D are, and "
            "modules that say their in_features and out_features as nn.Linear does"
        )
    else:
        reason = why_no_base(base) or ""
    if reason:
        raise ValueError(f"Target module {key} {reason}. {LEAVE}")


def warn_of_unmatched(config: LowRankConfig, names: Collection[str]) -> None:
    """Name the entries of exclude_modules that match nothing; PEFT does where none matches."""
    missing = unmatched(config.exclude_modules or (), names)
    if missing and len(missing) < len(config.exclude_modules or ()):
        warnings.warn(
            f"exclude_modules: {', '.join(map(repr, missing))} matches no module", stacklevel=6
        )


def warn_of_training(model: nn.Module, adapter: str) -> None:
    """Say in which layers a new adapter would learn nothing, and what is trained in 16 bits."""
    layers = {layer.key: layer for layer in layers_of(model, adapter)}
    scales = {key: layer.scaling[adapter] for key, layer in layers.items()}
    warn_of_scales(scales, stacklevel=8, word="lora_alpha")
    cores = {key: layer for key, layer in layers.items() if isinstance(layer, PeftCoreLinear)}
    there = {key: layer for key, layer in cores.items() if layer.pending_seed is None}
    warn_of_zeros({key: layer.bases(*layer.sides[adapter]) for key, layer in there.items()}, 8)
    factors = {
        id(own) for m in layers_of(model) for name in m.scaling for own in m.trained_factors(name)
    }
    others = (pair for pair in model.named_parameters() if id(pair[1]) not in factors)
    inside = re.compile(rf"\.base_layer|\.modules_to_save\.{re.escape(adapter)}")
    trained = ((inside.sub("", name), own) for name, own in others if own.requires_grad)
    warn_of_narrow(trained, stacklevel=8)


def stored_turned(config: LowRankConfig, target: nn.Module) -> bool:
    """Whether the weight of a target is (in, out); warns where fan_in_fan_out says otherwise."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    turned = isinstance(base, Conv1D)
    if config.fan_in_fan_out != turned:
        warnings.warn(
            f"fan_in_fan_out is {config.fan_in_fan_out} but the target module is a "
            f"{type(base).__name__}. Setting fan_in_fan_out to {turned}.",
            stacklevel=2,
        )
        config.fan_in_fan_out = turned
    return turned


def check_merge(
    layers: Iterable[PeftLowRankLinear], adapters: list[str] | None, safe: bool
) -> None:
    """Raise ValueError, naming it, if one of the layers cannot be merged into.

    Where it is to be `safe`, or the weight is quantised, also if a merged one would not be finite.
    """
    layers = list(layers)
    refuse_passed_over({layer.key: layer for layer in layers})
    for layer in layers:
        if reason := layer.why_not_merged():
            raise ValueError(f"cannot merge into {layer.key}, which {reason}")
        if safe or isinstance(layer, PeftOverBase):
            layer.check_safe(adapters)


def warn_of_loss(layers: Any) -> None:
    """Warn once for all layers, of the one that lost most of its ΔW to rounding; or of those whose
    merged weights are not finite.
    """
    found = list(layers_of(layers) if isinstance(layers, nn.Module) else layers)
    if broken := [layer.key for layer in found if layer.lost == math.inf]:
        warnings.warn(
            f"the merged weights of {shown(broken)} hold NaN or Inf, by a broken adapter or as "
            "the sum is more than their dtype can hold: unmerge; safe_merge=True refuses such",
            stacklevel=3,
        )
        return
    worst = max(found, key=lambda layer: layer.lost, default=None)
    if worst is not None and worst.lost:
        warnings.warn(
            f"merging lost up to {worst.lost:.2%} of ΔW to rounding (in {worst.key}); "
            f"{worst.how_to_keep()}",
            stacklevel=3,
        )
