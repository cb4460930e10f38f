"""The tuner that those of the methods share: how PEFT puts layers into a model, and keeps them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
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
from torch import Tensor, nn

from ...context.called import warn_of_passed_over, watch_gradients
from ...context.calls import Learned
from ...context.elsewhere import bring_back, here, is_away, settle, valued
from ...context.learns import warn_of_broken
from ...context.readers import leave_fast_paths, readers, restore_fast_paths
from ...methods.accept import is_parametrized
from ...models.refusals import require_not_fsdp
from ...models.targets import left_out, matches, places_of, warn_of_left_out
from ...models.ties import note_untied
from ...models.unchanged import unchanged_on_error
from ...models.whole_modules import forget, require_here
from . import files
from .biases import Biases
from .checks import (
    check_base,
    check_merge,
    check_target,
    refuse_adapted,
    stored_turned,
    warn_of_loss,
    warn_of_training,
    warn_of_unmatched,
)
from .config import LowRankConfig
from .layer import PeftLowRankLinear, PeftOverBase, layer_for, layers_of, of_base, share
from .mixed import hooked, refuse_under_way
from .whole import check_name

Tensors = dict[str, Tensor]


class LowRankModel(BaseTuner):
    """A model with adapters of one of the methods, whose layers are of the class `layer`."""

    prefix: str
    tuner_layer_cls: type[PeftLowRankLinear]
    read: dict[int, str]  # the layers whose weights the model's code reads, by id, and where
    checked: set[int]  # the targets of an injection that are known to be good, by id
    biases: Biases
    wholes: list[Any]  # PEFT's wrappers of modules that are trained whole
    learned: Learned  # of where the sequences of mixed batches are in the layers' inputs
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie  # for ensure_weight_tying

    def __init_subclass__(
        cls, layer: type[PeftLowRankLinear] | None = None, **keywords: Any
    ) -> None:
        super().__init_subclass__(**keywords)
        if layer is not None:
            cls.prefix, cls.tuner_layer_cls = layer.prefix, layer

    # --- injection ---

    def _prepare_model(self, peft_config: LowRankConfig, model: nn.Module) -> None:
        """Find the layers of "all-linear", and check all targets before the first is replaced."""
        refuse_adapted(model)
        self.read, self.checked = readers(model), set()
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
                self.checked.add(id(module))

    def _check_target(self, target: nn.Module, key: str) -> None:
        """Raise ValueError, naming the module, unless it can have an adapter, or one more."""
        if isinstance(target, PeftLowRankLinear):
            target.require_whole("add or load an adapter")
            check_base(target.get_base_layer(), key)
        else:
            check_target(self.model, target, key, self.read)

    def _all_linear(
        self, peft_config: LowRankConfig, model: nn.Module, modules: dict[str, nn.Module]
    ) -> set[str] | str:
        """The layers that PEFT means by "all-linear", less those without a use for an adapter."""
        config = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        linears = [
            name
            for name in sorted(config.target_modules)
            if self._check_target_module_exists(config, name)
            and isinstance(modules[name], nn.Linear)
            and not is_parametrized(modules[name])
        ]
        left = left_out(modules, linears, self.read)
        places = places_of(model)
        several = [name for name in linears if places[id(modules[name])] > 1]
        left |= dict.fromkeys(several, "layers that stand in several places")
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
        if id(target) not in self.checked:  # a base is tried by a call, which takes time
            self._check_target(target, current_key)
        if isinstance(target, PeftLowRankLinear):
            of_base(target)
            with here(target, target.get_base_layer()):
                target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = layer_for(self.tuner_layer_cls, base)
        layer = kind(target, current_key, stored_turned(peft_config, target))
        if isinstance(layer, PeftOverBase):
            layer.take_backend(self.model)
        layer.train(target.training)
        with here(layer.get_base_layer()):
            layer.update_layer(adapter_name, peft_config)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT would give and take weights, which a module that is no plain linear layer may not
        # have; what is put in comes with all that it needs.
        if isinstance(new_module, PeftOverBase) or isinstance(child, PeftOverBase):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        check_name(adapter_name)
        refuse_adapted(model)
        self.biases, self.wholes = Biases(), []
        with unchanged_on_error(model):
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject an adapter as PEFT does, with one warning for all layers whose rank did not fit.

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
            share(layers_of(model, adapter_name), adapter_name, self.peft_config[adapter_name])
            self._keep_here(adapter_name)
        for parameter, required in trained:
            parameter.requires_grad_(required)
        for layer in layers_of(model, adapter_name):
            watch_gradients(layer.trained_factors(adapter_name))
        config = self.peft_config[adapter_name]
        if not config.inference_mode:
            warn_of_training(model, adapter_name)
        layers = layers_of(model, adapter_name)
        reduced = [layer.key for layer in layers if not layer.room[adapter_name]]
        if reduced:
            ranks = ", ".join(f"{name}={getattr(config, name)}" for name in config.ranks)
            warnings.warn(
                f"{ranks} is more than {len(reduced)} layers have room for ({reduced[0]}, …): they "
                "take what they have, and the scaling stays that of the rank asked for",
                stacklevel=2,
            )

    def _keep_here(self, adapter_name: str) -> None:
        """Have what an adapter trains whole stay where the model computes, now and from now on."""
        self.wholes = [m for m in self.modules() if hasattr(m, "modules_to_save")]
        for wrapper in self.wholes:
            if adapter_name in wrapper.modules_to_save:
                settle(wrapper.modules_to_save[adapter_name])
        self._stop_taking_back()
        if self.wholes or self.biases.before:
            for module in (self, self.model):  # PEFT calls the one or the other
                module.register_forward_pre_hook(self.take_back)

    def _stop_taking_back(self) -> None:
        for module in (self, self.model):
            for key, hook in list(module._forward_pre_hooks.items()):
                if hook == self.take_back:
                    del module._forward_pre_hooks[key]

    def take_back(self, *_: Any) -> None:
        """Have modules trained whole, and biases, here for good, if they were offloaded since."""
        if torch.compiler.is_compiling():
            return
        self.biases.take_back(self)
        wholes = [copy for wrapper in self.wholes for copy in wrapper.modules_to_save.values()]
        for whole in wholes:
            if is_away(whole):
                bring_back(self, whole)
                if self.training and torch.is_grad_enabled():
                    require_here(whole)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for layer in layers_of(model):  # PEFT looks for modules_to_save next, by ends of names
            layer.closed = True

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, as PEFT's; ValueError before any change for a name not there."""
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
            self.biases.take_back(self)
            self.biases.disable(self.model)

    def disable_adapter_layers(self) -> None:
        """Disable the adapters, as PEFT's, with the base's biases; silence its warning of them."""
        self.take_back()
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
        there = {name for layer in layers_of(self) for name in layer.scaling}
        with hooked(self, names, there, PeftLowRankLinear):
            yield

    # --- files ---

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The key as PEFT gives it, for our factors alone: the name may be a module's as well."""
        rest, _, last = key.rpartition(".")
        factor = rest.rpartition(".")[2]
        ours = factor in cls.tuner_layer_cls.factor_names
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
        tensors = cls.to_file(model, config, adapter_name, tensors, state_dict)
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
        return cls.from_file(model, adapter_name, tensors)

    @classmethod
    def to_file(
        cls, model: nn.Module, config: Any, adapter: str, tensors: Tensors, state: Tensors
    ) -> Tensors:
        """The tensors of an adapter's file, of those that are its own; `state` is the model's."""
        raise NotImplementedError

    @classmethod
    def from_file(cls, model: nn.Module, adapter: str, tensors: Tensors) -> Tensors:
        """The tensors to load, by the model's keys, of those that an adapter's file holds."""
        raise NotImplementedError

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters; one warning says how much of ΔW was lost to rounding, below float32.

        Another says if merged weights are not finite; with `safe_merge` that is a ValueError, and
        the model as it was. Raises RuntimeError under fully_shard, which would put back the weights
        that it knows.
        """
        require_not_fsdp(self.model, "merge")
        check_merge(layers_of(self.model), adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)
        warn_of_loss(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as PEFT's; RuntimeError while a mixed batch with it is under way."""
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
        self.take_back()
        self._stop_taking_back()
        config: Any = getattr(self.model, "config", None)
        tied = getattr(config, "tie_word_embeddings", False)
        stays_tied = tied and getattr(config, "is_encoder_decoder", False)
        if merge:
            check_merge(layers, adapter_names, safe_merge)
            self.biases.enable()
        else:
            self.biases.restore()
        with warnings.catch_warnings():
            if stays_tied:
                warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
            model = super()._unload_and_optionally_merge(
                merge, progressbar, safe_merge, adapter_names
            )
        restore_fast_paths(self.model)
        if merge:
            warn_of_loss(layers)
            if stays_tied:  # PEFT has changed what such models scale and tie other things by too
                config.tie_word_embeddings = tied
            note_untied(model)
            forget(model)
        return model
