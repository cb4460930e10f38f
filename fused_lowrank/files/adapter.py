"""Adapters in files: one safetensors file, which says in its metadata what it is.

<module>.<factor>     the factors; the frozen ones unless saved with bases=False
<module>.weight       and .bias, where they are trained
*.<factor>            a factor that all layers have in common
<module>.fingerprint  of the frozen factors and of the weight, (P + Q + 4,) float64
<module>.<tensor>     of each module trained whole
metadata              {"format": "fused_lowrank", "version": "1", "config": JSON}

The config has the layers' settings and what their bases are stored as, the names of the modules
trained whole, and of tensors that were `tied` to some that the file holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..context.called import warn_of_passed_over
from ..context.elsewhere import (
    ZERO,
    each_here,
    fill_in,
    here,
    is_known,
    load_state,
    require_matrices,
    sharder_in,
)
from ..context.learns import warn_of_broken
from ..methods import LowRankLinear, row_of
from ..methods.accept import WEIGHT_DTYPES
from ..methods.tensors import is_sharded, whole
from ..models.adapt import adapted_layers, build, place, require_adapted
from ..models.refusals import refuse_peft
from ..models.targets import modules_by_name, unwrapped
from ..models.ties import apply, changes_for, holders_in_part, refuse_views, ties_of, trained_names
from ..models.unchanged import unchanged_on_error, values_unchanged_on_error
from ..models.whole_modules import base_of, saved_modules, state_of, warn_of_forgotten
from . import peft_folder
from .contents import (
    FORMAT,
    VERSION,
    entry_of,
    holds_factors,
    plan_of,
    read,
    replacing,
    require_path,
)
from .fingerprint import FINGERPRINT, fingerprint, fingerprint_of
from .other_base import check_base
from .other_base import on_other_base as asked


def parts(layer: LowRankLinear, train: Iterable[str], bases: bool) -> dict[str, Tensor]:
    """The tensors of a layer that a file holds, by name: what is trained and, with bases, more."""
    known = ((name, factor) for name, factor in layer.row.factors.items() if factor.saved)
    names = [name for name, factor in known if bases or factor.like or name in train]
    own = {name: getattr(layer, name) for name in names}
    if "weight" in train:
        own["weight"] = layer.base_weight
    if "bias" in train and layer.bias is not None:
        own["bias"] = layer.bias
    return own


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, bases: bool = True) -> None:
    """Write the adapters of `model`, and its modules trained whole, to a safetensors file.

    The file is written whole or not at all; its folder is made. Without `bases` the frozen factors
    are left out. Those of LoRA-XS `load_adapter` computes again from the weights and checks against
    a fingerprint; those of the other methods are random, so that such a file can only be loaded
    into a model that has them. Tensors keep their dtypes.

    Of a sharded model (fully_shard, parallelize_module) every rank must call this: tensors are
    gathered, and every rank writes the same file, under its own name until it is whole.

    A UserWarning names what can be trained in the model and is not in the file.

    Raises TypeError if `path` is no path, and ValueError if the model has no adapted layers, or has
    them uninitialised or disabled; if a module trained whole is gone; if `path` is a folder.
    """
    require_path(path, "save_adapter(model, path)")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: path is the file to write, adapter.safetensors say")
    layers = complete_layers(model)
    warn_of_forgotten(model, 3)
    originals = base_of(model).values  # a weight may be trained, by a tie
    tensors: dict[str, Tensor] = {}
    for name, layer in each_here(model, layers):
        require_whole(name, layer)
        for part, tensor in parts(layer, layer.train_names, bases).items():
            key = layer.row.key(name, part)
            tensors[key] = tensors[key] if key in tensors else own_copy(tensor)
        tensors[f"{name}.{FINGERPRINT}"] = fingerprint_of(layer, originals)
    saved = saved_modules(model)
    for name, module in each_here(model, saved):
        for key, value in module.state_dict().items():
            tensors[f"{name}.{key}"] = own_copy(value)
    tied = ties_of(model, trained_names(saved, layers))
    config = {
        "layers": {name: entry_of(layer) for name, layer in layers.items()},
        "modules_to_save": list(saved),
        "tied": tied,
        "partly": holders_in_part(model, tied, tensors),
        "bases": bases,
    }
    metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(config)}
    warn_of_broken(tensors, stacklevel=3)
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata)


def complete_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The adapted layers by name; ValueError if there are none, or one cannot be saved as it is."""
    layers = require_adapted(model)
    for name, layer in layers.items():
        if layer.bases_pending:
            raise ValueError(f"{name} is not initialised: load its weights and call init_bases")
        if not is_known(layer):
            raise ValueError(
                f"{name}.weight is on the meta device: load the weights, or, if accelerate brings "
                "whole blocks, accelerate.hooks.remove_hook_from_submodules(model) first"
            )
        if layer.disabled:
            raise ValueError(f"{name} is disabled: save outside disable_adapters")
        if reason := layer.why_not_saved():
            raise TypeError(f"{name} {reason}")
    pairs = {name: (layer, layer.trained_factors) for name, layer in layers.items()}
    warn_of_passed_over(pairs, stacklevel=4)
    return layers


def require_whole(name: str, layer: LowRankLinear) -> None:
    """Raise ValueError where this process has but a part of a layer's values."""
    factors = layer.row.factors.items()
    matrices = (getattr(layer, name) for name, factor in factors if len(factor.sides) == 2)
    require_matrices(name, layer.base_weight, *matrices)


def own_copy(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, on the CPU, sharing memory with nothing."""
    return whole(tensor.detach()).cpu().contiguous().clone()


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    fused: bool = True,
    progress: bool = True,
    on_other_base: Literal["refuse", "warn"] = "refuse",
) -> nn.Module:
    """Load what `save_adapter` wrote, or a folder of PEFT's with LoRA-XS or LoRA-Mini, in place.

    A plain model is adapted first, as the file says. An adapted one must have the same layers, of
    the same ranks, alpha and train, and the same modules to save, and not be merged; it keeps its
    classes and takes the file's values. Returns the model. Tensors that the file has in two values
    are tied no more, and those that it had tied are; `unload` undoes that.

    Args:
        model: a plain model, or one adapted alike.
        path: the file, or the folder of PEFT's.
        fused: of a plain model, whether its layers become the fused ones, or their references.
        progress: show a progress bar on stderr while layers are made.
        on_other_base: with "warn" weights that differ are no error but a UserWarning, for a base
            that was trained further or merged since, if the adapter comes with its frozen factors.

    Raises:
        TypeError: `path` is no path.
        ValueError: a file that is truncated or none of ours, or that belongs to another model:
            other module names, sizes, ranks, weights or frozen factors. The model is as it was.
    """
    config, tensors = read(path)
    with asked(on_other_base, path):
        return load_contents(model, config, tensors, path, fused=fused, progress=progress)


def load_contents(
    model: nn.Module,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    path: Any,
    *,
    fused: bool = True,
    progress: bool = True,
) -> nn.Module:
    """`load_adapter` of what `read` returns."""
    prints, originals = pop_fingerprints(config, tensors), base_of(model).values
    peft_folder.complete(model, config, tensors)

    def check(name: str, layer: LowRankLinear) -> None:
        bases = layer.bases
        if seeded := not config["bases"] and "seed" in config:
            bases = peft_folder.frozen_factors(layer, name, config["seed"])
        if "unprinted" in config:  # of PEFT's own methods
            return
        weight = originals.get(layer.base_weight, layer.base_weight)
        ours = fingerprint(weight, *bases)
        check_base(name, layer, config["layers"][name], ours, prints[name], tensors, path)
        if seeded:
            tensors[f"{name}.down"], tensors[f"{name}.up"] = bases

    return install(model, config, tensors, path, check, fused=fused, progress=progress)


def install(
    model: nn.Module,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    path: Any,
    check: Callable[[str, LowRankLinear], None],
    *,
    fused: bool,
    progress: bool,
) -> nn.Module:
    """Put an adapter into a model, plain or adapted alike; if it raises, the model is as it was.

    `check` raises for a layer, not yet in the model, whose weight is not the one it was made for.
    """
    saved = config["modules_to_save"]
    present = dict(adapted_layers(model))
    if not present:
        refuse_peft(model)
    sharder = sharder_in(model)
    if sharder == ZERO and not present:
        sharder = None  # `build` looks at the weights that it needs
    if sharder or any(map(is_sharded, model.parameters())):
        raise ValueError(
            "the model is sharded: load an adapter before "
            f"{sharder or 'fully_shard or parallelize_module'}"
        )
    if present:
        layers = present
        check_same_layers(layers, config, path)
        check_same_modules_to_save(model, saved, path)
    with unchanged_on_error(model):
        if not present:
            plan = plan_of(model, config, tensors, fused, path)
            later = "seed" in config or holds_factors(config, plan, tensors, path)
            try:
                layers = build(model, plan, progress=progress, defer_bases=later)
            except TypeError as error:
                raise ValueError(f"{path} does not fit this model: {error}") from error
        check_tensors(model, layers, tensors, config, path)
        refuse_views(model, saved, layers)
        changes = changes_for(model, config.get("tied"), tensors, path)
        if present:
            changes.refuse(path)
        for name, layer in layers.items():
            if not is_known(layer):
                raise ValueError(f"{name}.weight is on the meta device: load the weights first")
            with here(layer):
                check(name, layer)
                if layer.computed_by is not None:
                    common = [f for f in layer.factors if f not in layer.row.core]
                    own = {part: tensors.get(layer.row.key(name, part)) for part in common}
                    layer.computed_by.refuse_other(own)
                if layer.bases_pending:  # its weight and bias are the base model's
                    layer.keep_base()
        if not present:
            place(model, layers, saved)
            apply(model, changes, trained_names(saved_modules(model), layers))
        fill(model, layers, tensors, saved)
    return model


def check_same_layers(layers: dict[str, LowRankLinear], config: dict[str, Any], path: Any) -> None:
    """Raise unless the adapted model has the layers of the file, of the same methods and alpha."""
    there = {name: layer.row.label for name, layer in layers.items()}
    asked = {name: row_of(entry).label for name, entry in config["layers"].items()}
    if there != asked:
        name = next(n for n in [*there, *asked] if there.get(n) != asked.get(n))
        raise ValueError(
            f"{path} does not fit this adapted model: {name} is "
            f"{there.get(name, 'not adapted')} here and {asked.get(name, 'not adapted')} there; "
            "unload(model) to take the file's own layers"
        )
    for name, layer in layers.items():
        settings = config["layers"][name]["settings"]
        alpha, train = settings["alpha"], settings["train"]
        if layer.alpha != alpha or set(layer.train_names) != set(train):
            raise ValueError(
                f"{path} does not fit this adapted model: alpha and train of {name} are "
                f"{layer.alpha}, {layer.train_names} here and {alpha}, {train} there; "
                "unload(model) to take the file's own layers"
            )
        unsaved = any(not factor.saved for factor in layer.row.factors.values())
        if unsaved and settings["seed"] != layer.options["seed"]:
            raise ValueError(
                f"{path} does not fit this adapted model: seed of {name} is "
                f"{layer.options['seed']} here and {settings['seed']} there, and so are its random "
                "factors; unload(model) to take the file's own layers"
            )
        if layer.merged:
            raise ValueError(f"{name} is merged: unmerge(model) before loading an adapter")


def check_same_modules_to_save(model: nn.Module, saved: list[str], path: Any) -> None:
    """Raise unless the adapted model trains the modules whole that the file holds."""
    if set(saved_modules(model)) != set(saved):
        raise ValueError(
            f"{path} does not fit this adapted model: modules_to_save are "
            f"{list(saved_modules(model))} here and {saved} there"
        )


def check_tensors(
    model: nn.Module,
    layers: dict[str, LowRankLinear],
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    path: Any,
) -> None:
    """Raise unless the file holds exactly the tensors, in the shapes, that the layers need."""
    expected, modules = shapes_of(layers, config), modules_by_name(model)
    for name in config["modules_to_save"]:
        if name not in modules:
            raise ValueError(f"{path} holds {name}, but this model has no such module")
        state = state_of(modules[name])
        expected.update({f"{name}.{key}": value.shape for key, value in state.items()})
    check_shapes(expected, layers, tensors, path)


def shapes_of(layers: Mapping[str, LowRankLinear], config: dict[str, Any]) -> dict[str, torch.Size]:
    """The shapes of the tensors that a file has of these layers, fingerprints aside."""
    expected = {}
    for name, layer in layers.items():
        trained = config["layers"][name]["settings"]["train"]
        for part, tensor in parts(layer, trained, config["bases"]).items():
            expected[layer.row.key(name, part)] = tensor.shape
    return expected


def check_shapes(
    expected: Mapping[str, torch.Size],
    layers: Mapping[str, LowRankLinear],
    tensors: dict[str, Tensor],
    path: Any,
) -> None:
    """Raise unless the tensors are those expected."""
    for key in sorted(expected.keys() ^ tensors.keys()):
        what = "lacks" if key in expected else "holds an unexpected"
        raise ValueError(f"{path} {what} {key}: it is damaged, or belongs to another model")
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise ValueError(
                f"{path} does not fit this model: {key} is {tuple(tensors[key].shape)} there and "
                f"{tuple(shape)} here"
            )
        if key.rpartition(".")[0] in layers and tensors[key].dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{path}: {key} is of {tensors[key].dtype}: it is damaged")


def pop_fingerprints(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Take the layers' fingerprints out of the tensors of a file; None where there is none."""
    return {name: tensors.pop(f"{name}.{FINGERPRINT}", None) for name in config["layers"]}


@torch.no_grad()
def fill(
    model: nn.Module,
    layers: dict[str, LowRankLinear],
    tensors: dict[str, Tensor],
    saved: list[str],
) -> None:
    """Copy the values, checked before, into the model; all of them or none."""
    changed = []
    for name, layer in layers.items():
        own = {*layer.factors} - {*layer.row.core}
        frozen = own if layer.in_bank else ()  # a bank's, and alike
        for part in (*layer.factors, "weight", "bias"):
            if (key := layer.row.key(name, part)) in tensors and part not in frozen:
                changed.append((layer, part, tensors[key]))
    modules = modules_by_name(model)
    before = [getattr(layer, part) for layer, part, _ in changed]
    for name in saved:
        before += modules[name].state_dict(keep_vars=True).values()
    with values_unchanged_on_error(before):
        for layer, part, value in changed:
            fill_in(layer, part, value)
        for name in saved:
            prefix = name + "."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            load_state(unwrapped(modules[name]), state)
    for layer in layers.values():
        layer.bases_pending = False
