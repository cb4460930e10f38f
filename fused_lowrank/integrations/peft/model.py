"""The tuners of LoRA-XS and LoRA-Mini: how PEFT puts the layers into a model, and keeps them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...adapt import require_not_fsdp
from ...calls import Learned
from ...layers.base import WEIGHT_DTYPES
from ...targets import never_called
from . import files
from .config import LowRankConfig
from .layer import PeftLowRankLinear
from .methods import PeftLoraMiniLinear, PeftLoraXSLinear
from .mixed import BASE, Hooks, Lines


class LowRankModel(BaseTuner):
    """A model with adapters of one of the methods."""

    tuner_layer_cls: type[PeftLowRankLinear]
    learned: Learned  # of where the sequences of mixed batches are in the layers' inputs
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # --- injection ---

    def _create_and_replace(
        self,
        peft_config: LowRankConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, PeftLowRankLinear):
            with onload_layer(target):
                target.update_layer(adapter_name, peft_config)
            return
        check_target(self.model, target, current_key)
        layer = self.tuner_layer_cls(target, current_key, stored_turned(peft_config, target))
        with onload_layer(layer):
            layer.update_layer(adapter_name, peft_config)
            self._replace_module(parent, target_name, layer, target)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's, and one warning for all layers in which a rank did not fit."""
        self.learned = Learned()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        reduced = [
            layer.key
            for layer in layers_of(model, adapter_name)
            if not layer.fits(adapter_name, config)
        ]
        if reduced:
            ranks = ", ".join(f"{name}={getattr(config, name)}" for name in config.ranks)
            warnings.warn(
                f"{ranks} is more than {len(reduced)} layers have room for ({reduced[0]}, …): they "
                "take what they have, and the scaling stays that of the rank asked for",
                stacklevel=2,
            )

    # --- mixed batches ---

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if not isinstance(names, list | tuple):
            raise TypeError(
                f"adapter_names is a {type(names).__name__}: it must be a list of names"
            )
        there = {name for layer in layers_of(self) for name in layer.scaling}
        if None in names:
            raise ValueError(f"adapter_names has a None: {BASE!r} is the name of no adapter")
        if unknown := sorted({str(name) for name in names} - there - {BASE}):
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are "
                f"{', '.join(sorted(there))}, and {BASE} for none"
            )
        layers = [
            module
            for module in self.modules()
            if isinstance(module, PeftLowRankLinear | AuxiliaryTrainingWrapper)
        ]
        roots = [self, self.model]
        get_encoder = getattr(self.model, "get_encoder", None)
        if get_encoder is not None:  # generate calls it by itself, before it repeats the sequences
            roots += [encoder for encoder in [get_encoder()] if isinstance(encoder, nn.Module)]
        with Hooks(Lines(names, self)).entered(list(dict.fromkeys(roots)), layers):
            yield

    # --- mixing adapters ---

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter that is Σ weights[i] · adapters[i], exactly, for their bases are the same.

        Its scaling is 1. A core of LoRA-XS is the sum of theirs, as wide as the widest; the factors
        of LoRA-Mini are theirs side by side: its rank is the sum of theirs, and at most a and b.

        Raises:
            ValueError: an adapter that does not exist, or is there already; not one weight for
                each; a combination_type other than "linear"; adapters with biases or
                modules_to_save, which have no sum.
        """
        if combination_type != "linear":
            raise ValueError(
                f"combination_type is {combination_type!r}: it must be 'linear', which is exact"
            )
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(
                f"there are {len(adapters)} adapters and {len(weights)} weights: give one for each"
            )
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} does not exist")
            if self.peft_config[name].bias != "none" or self.peft_config[name].modules_to_save:
                raise ValueError(f"{name} has biases or modules_to_save: these cannot be mixed")
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} exists already: choose another name")
        shares = list(zip(adapters, weights, strict=True))
        mixed = {}
        for layer in layers_of(self.model):
            if own := [(name, weight) for name, weight in shares if name in layer.scaling]:
                mixed[layer.key] = layer.mix(own)
        self.peft_config[adapter_name] = self._config_of_mix(adapters, mixed)
        self.inject_adapter(self.model, adapter_name)
        self._cast_adapter_dtype(adapter_name)
        for layer in layers_of(self.model, adapter_name):
            for name, value in zip(layer.adapter_layer_names, mixed[layer.key], strict=True):
                getattr(layer, name)[adapter_name].copy_(value)

    def _config_of_mix(
        self, adapters: Sequence[str], mixed: dict[str, tuple[Tensor, ...]]
    ) -> LowRankConfig:
        """The configuration that gives a new adapter the mixture's shapes and scaling 1."""
        sources = [self.peft_config[name] for name in adapters]
        config = copy.deepcopy(sources[0])
        ranks = {key: factors[0].shape[1] for key, factors in mixed.items()}
        config.r, config.lora_alpha, config.use_rslora = max(ranks.values()), None, False
        config.rank_pattern = {re.escape(k): r for k, r in ranks.items() if r != config.r}
        config.alpha_pattern = {}
        for name in config.ranks[1:]:
            setattr(config, name, max(getattr(source, name) for source in sources))
        config.target_modules = set(mixed)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        return config

    # --- files ---

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, **rest: Any
    ) -> dict[str, Tensor]:
        tensors = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, **rest
        )
        return files.to_save(model, adapter_name, tensors, config.save_projection)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        with files.still_pending(layers_of(model)):  # PEFT asks for the keys of model.state_dict()
            tensors = super()._remap_adapter_state_dict_for_load(
                model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
            )
        return files.to_load(model, adapter_name, tensors)

    def _check_new_adapter_config(self, config: LowRankConfig) -> None:
        super()._check_new_adapter_config(config)
        for other in self.peft_config.values():
            if other.projection_seed != config.projection_seed:
                raise ValueError(
                    f"projection_seed is {config.projection_seed}, but {other.projection_seed} of "
                    "the adapters that are there, and all of a layer share its frozen factors"
                )

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """PEFT's; one warning says how much of ΔW was lost to rounding, below float32.

        Raises RuntimeError under fully_shard, which would put back the weights that it knows.
        """
        require_not_fsdp(self.model, "merge")
        super().merge_adapter(adapter_names, safe_merge)
        warn_of_loss(self.model)

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        require_not_fsdp(self.model, "merge or unload")
        layers = list(layers_of(self.model))
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge:
            warn_of_loss(layers)
        return model


class LoraXSModel(LowRankModel):
    """A model with adapters of LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604)."""

    prefix = PeftLoraXSLinear.prefix
    tuner_layer_cls = PeftLoraXSLinear


class LoraMiniModel(LowRankModel):
    """A model with adapters of LoRA-Mini (Singh et al. 2024, arXiv 2411.15804)."""

    prefix = PeftLoraMiniLinear.prefix
    tuner_layer_cls = PeftLoraMiniLinear


def layers_of(model: nn.Module, adapter: str | None = None) -> Iterator[PeftLowRankLinear]:
    """The layers of a model, or those of one adapter."""
    for module in model.modules():
        if isinstance(module, PeftLowRankLinear) and (adapter is None or adapter in module.scaling):
            yield module


def check_target(model: nn.Module, target: nn.Module, key: str) -> None:
    """Raise ValueError, naming the module, unless it can have adapters."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    kind = type(base).__name__
    weight = getattr(base, "weight", None)
    if not isinstance(base, nn.Linear | Conv1D):
        reason = f"is a {kind}: it is not supported, only nn.Linear and transformers' Conv1D are"
    elif not isinstance(weight, Tensor) or weight.dtype not in WEIGHT_DTYPES or weight.dim() != 2:
        reason = f"is a {kind} with a quantised weight: it is not supported; dequantise it first"
    else:
        reason = never_called(dict(model.named_modules()), key) or ""
    if reason:
        raise ValueError(f"Target module {key} {reason}. Leave it out of target_modules")


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


def warn_of_loss(layers: Any) -> None:
    """One UserWarning for all layers, of the one that lost most of its ΔW to rounding."""
    found = layers_of(layers) if isinstance(layers, nn.Module) else layers
    worst = max(found, key=lambda layer: layer.lost, default=None)
    if worst is not None and worst.lost:
        warnings.warn(
            f"merging lost up to {worst.lost:.2%} of ΔW to rounding (in {worst.key}); "
            "float32 weights would keep it",
            stacklevel=3,
        )
