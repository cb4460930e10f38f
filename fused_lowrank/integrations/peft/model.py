"""The tuners of LoRA-XS and LoRA-Mini: how PEFT puts the layers into a model, and keeps them."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from ...adapt import require_not_fsdp
from ...called import refuse_passed_over, shown, warn_of_passed_over, watch_gradients
from ...calls import Learned
from ...elsewhere import here, sharder_of, valued
from ...layers.accept import is_parametrized, why_no_weight
from ...layers.base import ADAPT_FIRST
from ...learns import warn_of_broken, warn_of_narrow, warn_of_scales, warn_of_zeros
from ...readers import leave_fast_paths, readers, restore_fast_paths
from ...saved import forget
from ...targets import left_out, matches, never_called, unmatched, warn_of_left_out
from ...ties import note_untied
from ...unchanged import unchanged_on_error
from . import files
from .biases import Biases
from .config import LowRankConfig
from .layer import PeftLowRankLinear
from .methods import PeftLoraMiniLinear, PeftLoraXSLinear
from .mixed import BASE, Hooks, Lines, refuse_under_way
from .whole import check_name

LEAVE = (
    "Leave it out of target_modules (exclude_modules does), or train it whole by modules_to_save"
)


class LowRankModel(BaseTuner):
    """A model with adapters of one of the methods."""

    tuner_layer_cls: type[PeftLowRankLinear]
    read: dict[int, str]  # the layers whose weights the model's code reads, by id, and where
    biases: Biases
    learned: Learned  # of where the sequences of mixed batches are in the layers' inputs
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie  # for ensure_weight_tying

    # --- injection ---

    def _prepare_model(self, peft_config: LowRankConfig, model: nn.Module) -> None:
        """Find the layers of "all-linear", and check all targets before the first is replaced."""
        self.read = readers(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        warn_of_unmatched(peft_config, modules)
        if str(peft_config.target_modules).lower() == "all-linear":
            peft_config.target_modules = self._all_linear(peft_config, model, modules)
        adapted = tuple(f"{n}." for n, m in modules.items() if isinstance(m, BaseTunerLayer))
        for name, module in model.named_modules():
            if not name or name.startswith(adapted):
                continue
            if self._check_target_module_exists(peft_config, name):
                self._check_target(module, name)

    def _check_target(self, target: nn.Module, key: str) -> None:
        """Raise ValueError, naming the module, unless it can have an adapter, or one more."""
        if isinstance(target, PeftLowRankLinear):
            target.require_whole("add or load an adapter")
            check_weight(target.get_base_layer(), key)
        else:
            check_target(self.model, target, key, self.read)

    def _all_linear(
        self, peft_config: LowRankConfig, model: nn.Module, modules: dict[str, nn.Module]
    ) -> set[str] | str:
        """What PEFT means by "all-linear", less what has no use for an adapter."""
        config = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        linears = [
            name
            for name in sorted(config.target_modules)
            if self._check_target_module_exists(config, name)
            and isinstance(modules[name], nn.Linear)
            and not is_parametrized(modules[name])
        ]
        left = left_out(modules, linears, self.read)
        warn_of_left_out(left, stacklevel=6)
        names = set(config.target_modules) - left.keys()
        if any(matches(name, sorted(names)) for name in left):
            return "|".join(map(re.escape, sorted(names)))
        return names

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
        self._check_target(target, current_key)
        if isinstance(target, PeftLowRankLinear):
            with here(target, target.get_base_layer()):
                target.update_layer(adapter_name, peft_config)
            return
        layer = self.tuner_layer_cls(target, current_key, stored_turned(peft_config, target))
        layer.train(target.training)
        with here(layer.get_base_layer()):
            layer.update_layer(adapter_name, peft_config)
            self._replace_module(parent, target_name, layer, target)

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        check_name(adapter_name)
        self.biases = Biases()
        with unchanged_on_error(model):
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's, and one warning for all layers in which a rank did not fit.

        What is trained of other adapters stays trained. If anything is raised, the model is as it
        was; a name that an adapter cannot have is a ValueError.
        """
        check_name(adapter_name)
        before = [p for layer in layers_of(model) for p in layer.others(adapter_name)]
        trained = [(parameter, parameter.requires_grad) for parameter in before]
        with unchanged_on_error(self):
            self.learned = Learned()
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self.biases.keep(model, self.peft_config[adapter_name].bias)
                leave_fast_paths(model, PeftLowRankLinear)
            finally:
                for layer in layers_of(model):
                    layer.closed = False
        for parameter, required in trained:
            parameter.requires_grad_(required)
        for layer in layers_of(model, adapter_name):
            watch_gradients(layer.trained_factors(adapter_name))
        config = self.peft_config[adapter_name]
        if not config.inference_mode:
            warn_of_training(model, adapter_name)
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

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for layer in layers_of(model):  # PEFT looks for modules_to_save next, by ends of names
            layer.closed = True

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's; ValueError for a name that is not there, before anything is changed."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(
                f"Adapter {', '.join(map(str, unknown))} not found: there are "
                f"{', '.join(self.peft_config)}"
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        if enabled:
            self.biases.enable()
        else:
            self.biases.disable(self.model)

    def disable_adapter_layers(self) -> None:
        """PEFT's, with the base model's biases; its warning that they are not is for others."""
        with warnings.catch_warnings():
            if self.biases.are_known(self.model):
                warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
            super().disable_adapter_layers()

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
                modules_to_save, which have no sum; a name that an adapter cannot have. Whatever
                is raised, the model is as it was.
        """
        check_name(adapter_name)
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
        if not mixed:
            raise ValueError(f"{', '.join(adapters)} are in no layer: there is nothing to mix")
        with unchanged_on_error(self):
            self.peft_config[adapter_name] = self._config_of_mix(adapters, mixed)
            self.inject_adapter(self.model, adapter_name)
            self._cast_adapter_dtype(adapter_name)
            for layer in layers_of(self.model, adapter_name):
                for name, value in zip(layer.adapter_layer_names, mixed[layer.key], strict=True):
                    own = getattr(layer, name)[adapter_name]
                    rows, columns = (a - b for a, b in zip(own.shape, value.shape, strict=True))
                    own.copy_(pad(value, (0, columns, 0, rows)))

    def _config_of_mix(
        self, adapters: Sequence[str], mixed: dict[str, tuple[Tensor, ...]]
    ) -> LowRankConfig:
        """The configuration that gives a new adapter the mixture's shapes and scaling 1."""
        sources = [self.peft_config[name] for name in adapters]
        config = copy.deepcopy(sources[0])
        ranks = {key: factors[0].shape[1] for key, factors in mixed.items()}
        config.r, config.lora_alpha, config.use_rslora = max(ranks.values()), None, False
        # From its beginning, for a pattern matches the end of a longer name as well.
        config.rank_pattern = {f"^{re.escape(k)}": r for k, r in ranks.items() if r != config.r}
        config.alpha_pattern = {}
        for name in config.ranks[1:]:
            setattr(config, name, max(getattr(source, name) for source in sources))
        config.target_modules = set(mixed)
        keys = [key for key, _ in self.model.named_modules() if key not in mixed]
        if any(matches(key, config.target_modules) for key in keys):
            config.target_modules = "|".join(map(re.escape, mixed))
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        return config

    # --- files ---

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT's, of our factors alone: the name may be a module's or a parameter's as well."""
        rest, _, last = key.rpartition(".")
        factor = rest.rpartition(".")[2]
        ours = factor in cls.tuner_layer_cls.adapter_layer_names
        return rest if ours and last == adapter_name else key

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Any, **rest: Any
    ) -> dict[str, Tensor]:
        # In place: PEFT takes modules_to_save from it afterwards.
        state_dict.update(files.dropped(model, state_dict, rest["unwanted_adapter_names"]))
        whole = {key: value for key, value in state_dict.items() if ".modules_to_save." in key}
        state_dict.update(valued(model, whole))
        tensors = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **rest
        )
        # Within a model PEFT does not know FSDP's part of a module's name.
        tensors.update(files.own_tensors(model, adapter_name, state_dict, config.bias))
        tensors = valued(model, tensors)
        layers = layers_of(model, adapter_name)
        pairs = {m.key: (m, m.trained_factors(adapter_name)) for m in layers}
        warn_of_passed_over(pairs, stacklevel=5)
        files.warn_of_forgotten(model, tensors)
        save = config.save_projection
        tensors = files.to_save(model, adapter_name, tensors, state_dict, save)
        there = {key: value for key, value in tensors.items() if files.is_here(value)}
        warn_of_broken(there, stacklevel=5)
        return tensors

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

        Another says if merged weights are not finite; with `safe_merge` that is a ValueError, and
        the model as it was. Raises RuntimeError under fully_shard, which would put back the weights
        that it knows.
        """
        require_not_fsdp(self.model, "merge")
        check_merge(layers_of(self.model), adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)
        warn_of_loss(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; raises RuntimeError while a mixed batch with the adapter is under way."""
        refuse_under_way(self, f"delete {adapter_name}", adapter_name)
        super().delete_adapter(adapter_name)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        refuse_under_way(self, "merge or unload")
        require_not_fsdp(self.model, "merge or unload")
        layers = list(layers_of(self.model))
        for layer in layers:
            layer.require_whole("merge or unload")
        config: Any = getattr(self.model, "config", None)
        tied = getattr(config, "tie_word_embeddings", False)
        kept = tied and getattr(config, "is_encoder_decoder", False)
        if merge:
            check_merge(layers, adapter_names, safe_merge)
            self.biases.enable()
        else:
            self.biases.restore()
        with warnings.catch_warnings():
            if kept:
                warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
            model = super()._unload_and_optionally_merge(
                merge, progressbar, safe_merge, adapter_names
            )
        restore_fast_paths(self.model)
        if merge:
            warn_of_loss(layers)
            if kept:  # PEFT has changed it, by which such models scale and tie other things as well
                config.tie_word_embeddings = tied
            note_untied(model)
            forget(model)
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


def check_target(model: nn.Module, target: nn.Module, key: str, read: dict[int, str]) -> None:
    """Raise ValueError, naming the module, unless it can have adapters.

    `read` is what `readers` found in the model.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    kind = type(base).__name__
    weight = getattr(base, "weight", None)
    plain = isinstance(base, nn.Linear | Conv1D) and why_no_weight(weight) is None
    if plain and (by := sharder_of(weight)):
        raise ValueError(f"Target module {key} has its weight sharded by {by}: {ADAPT_FIRST[by]}")
    if not isinstance(base, nn.Linear | Conv1D):
        reason = f"is a {kind}: it is not supported, only nn.Linear and transformers' Conv1D are"
    else:
        check_weight(base, key)
        reason = never_called(dict(model.named_modules()), key, read) or ""
    if reason:
        raise ValueError(f"Target module {key} {reason}. {LEAVE}")


def check_weight(base: nn.Module, key: str) -> None:
    """Raise ValueError, naming the module, unless its weight is an ordinary matrix."""
    weight = getattr(base, "weight", None)
    reason = why_no_weight(weight)
    if reason is None and weight.dim() != 2:  # type: ignore[union-attr]
        reason = f"a weight of {tuple(weight.shape)}"  # type: ignore[union-attr]
    if reason:
        raise ValueError(f"Target module {key} is a {type(base).__name__} with {reason}. {LEAVE}")


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
    there = {key: layer for key, layer in layers.items() if layer.pending_seed is None}
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

    Where it is to be `safe`, also if a merged weight would not be finite.
    """
    layers = list(layers)
    refuse_passed_over({layer.key: layer for layer in layers})
    for layer in layers:
        if reason := why_no_weight(layer.get_base_layer().weight):
            raise ValueError(f"cannot merge into {layer.key}, which has {reason}")
        if safe:
            layer.check_safe(adapters)


def warn_of_loss(layers: Any) -> None:
    """One UserWarning for all layers, of the one that lost most of its ΔW to rounding; or of those
    whose merged weights are not finite.
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
            "float32 weights would keep it",
            stacklevel=3,
        )
