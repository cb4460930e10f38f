"""Any adapter as plain LoRA in PEFT's format, which PEFT and the serving engines load.

scale · up·coreᵀ·down = alpha / r · B·A, of the smallest rank that holds it:

LoRA        A = down               B = up
LoRA-Mini   A = a_trainᵀ·down      B = up·b_trainᵀ
LoRA-XS     A = down               B = up·coreᵀ
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..bank import AdapterBank
from ..context.elsewhere import each_here
from ..methods import METHODS, LowRankLinear, row_of
from ..methods.accept import WEIGHT_DTYPES
from ..methods.method import MAGNITUDE
from ..methods.shared import shared_by
from ..models.adapt import adapted_layers
from ..models.targets import check_places, matches, named_modules, unwrapped
from ..models.ties import ties_of, trained_names
from ..models.whole_modules import saved_modules, warn_of_forgotten
from .adapter import (
    check_shapes,
    complete_layers,
    own_copy,
    pop_fingerprints,
    require_whole,
    shapes_of,
)
from .contents import read, replacing, require_path
from .lora_parts import Adapter, Part, check_dora, common_scale, factored, number, own_part
from .peft_folder import CONFIG, PREFIX, WEIGHTS


def export_lora(
    source: nn.Module | AdapterBank | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    dora: bool = False,
) -> None:
    """Write an adapter as plain LoRA: a folder that `peft.PeftModel.from_pretrained` loads.

    The folder gets adapter_config.json and adapter_model.safetensors, both or neither. The factors
    are multiplied in float64 and rounded once. Modules trained whole and trained biases (as PEFT's
    bias="lora_only") are in it.

    Args:
        source: an adapted model; or a bank, of which `name` is exported; or a file of
            `save_adapter` that has its frozen factors.
        path: the folder, which may be there already.
        name: of an adapter in a bank.
        dtype: of A and B; None: the widest of the factors they are made of.
        dora: write an adapter with dora as PEFT's DoRA, which PEFT loads, and few engines do.

    Raises:
        TypeError: `path` is no path.
        ValueError: no adapter there, or an uninitialised, disabled or damaged one; a file without
            its frozen factors; one with dora, unless `dora` is True; a trained weight, also by a
            tie, which LoRA cannot hold; a file with a part of a module that is tied to
            it; values that `dtype` cannot hold; a layer that stands in several places, of which
            PEFT would adapt one.
    """
    require_path(path, "export_lora(model, folder)")
    if dtype not in (None, *WEIGHT_DTYPES):
        raise ValueError(f"dtype is {dtype}: it must be one of {WEIGHT_DTYPES}")
    write(adapter_of(source, name, of_layer), path, dtype, dora)


# --- where adapters come from ---

# (name, layer, core, scale) → a copy of the layer's part; core and scale are an adapter's in a
# bank, or None: the layer's own.
Take = Callable[[str, LowRankLinear, Any, Any], Any]


def adapter_of(
    source: nn.Module | AdapterBank | str | os.PathLike[str], name: str | None, take: Take
) -> Adapter:
    """The adapter that a source has, or of a bank the one of that name."""
    if isinstance(source, AdapterBank):
        if name is None:
            raise ValueError("source is a bank: say by name which of its adapters to export")
        return of_bank(source, name, take)
    if name is not None:
        raise ValueError(f"name is {name!r}, but source is no bank: it holds one adapter")
    if isinstance(source, nn.Module):
        return of_model(source, take)
    config, tensors = read(source)
    pop_fingerprints(config, tensors)
    return of_contents(config, tensors, source, take)


def of_layer(name: str, layer: LowRankLinear, core: Any = None, scale: Any = None) -> Part:
    """The part of an adapted layer."""
    if core is not None:
        down, up = layer.shared_parts()
        return own_part(Part(down, core, up, scale, 1, layer.dropout))
    if "weight" in layer.train_names:
        raise ValueError(f"{name} trains its weight, which plain LoRA cannot hold: merge instead")
    bias = layer.bias if "bias" in layer.train_names else None
    factors = layer.factors_now()
    down, core, up, gain = layer.row.made(factors, layer.base_weight, layer.scale)
    if gain is not None:
        raise ValueError(f"{name} scales its outputs, which plain LoRA cannot hold: merge instead")
    magnitude = factors.get(MAGNITUDE)
    return own_part(Part(down, core, up, layer.alpha, layer.r, layer.dropout, bias, magnitude))


def of_model(model: nn.Module, take: Take) -> Adapter:
    """The adapter that a model carries."""
    layers = complete_layers(model)
    warn_of_forgotten(model, 5)
    parts = {}
    for name, layer in each_here(model, layers):
        require_whole(name, layer)
        parts[name] = take(name, layer, None, None)
    return Adapter(parts, whole_modules(model, layers, parts), unwrapped(model))


def whole_modules(
    model: nn.Module, layers: Mapping[str, LowRankLinear], parts: dict[str, Any]
) -> dict[str, Mapping[str, Tensor]]:
    """The states of the modules that PEFT has to train whole; what biases are tied to is added."""
    whole = saved_modules(model)
    tied = ties_of(model, trained_names(whole, layers))
    saved = tuple(with_tied(whole, parts, tied))
    holders = {name.rpartition(".")[0] for name in tied} & parts.keys()
    for name, layer in each_here(model, {name: layers[name] for name in sorted(holders)}):
        parts[name].bias = None if layer.bias is None else own_copy(layer.bias)
    modules: dict[str, nn.Module] = {}
    for name, module in named_modules(model, every=True):
        if saved and name.endswith(saved):  # so PEFT matches them, without a dot before
            if any(True for _ in adapted_layers(module)):
                raise ValueError(f"modules_to_save are {saved}: PEFT would take {name} for one")
            modules[name] = module
    return {
        name: {key: own_copy(value) for key, value in module.state_dict().items()}
        for name, module in each_here(model, modules)
    }


def of_bank(bank: AdapterBank, name: str, take: Take = of_layer) -> Adapter:
    """An adapter of a bank. A product of LoRA-Mini's factors is exported as any core is.

    All adapters of a bank share the modules that its model trains whole, as they are now.
    """
    parts = {}
    bank.store.shared.check()
    with bank.store.holding([name]) as slots:
        for layer_name, layer in each_here(bank.model, bank.layers):
            (left, right, scales), slot = bank.store.tables[layer_name], slots[name]
            core = left[slot] if right is None else (left[slot], right[slot])
            parts[layer_name] = take(layer_name, layer, core, float(scales[slot]))
    return Adapter(parts, whole_modules(bank.model, bank.layers, parts))


def of_contents(
    config: dict[str, Any], tensors: dict[str, Tensor], path: Any, take: Take = of_layer
) -> Adapter:
    """The adapter of a file of `save_adapter`, less its fingerprints."""
    layers = stand_ins(config["layers"], tensors, path)
    saved = tuple(f"{name}." for name in config["modules_to_save"])
    rest = {key: t.shape for key, t in tensors.items() if saved and key.startswith(saved)}
    check_shapes({**shapes_of(layers, config), **rest}, layers, tensors, path)
    for name, layer in layers.items():
        for part in (*layer.factors, "bias"):
            if (value := tensors.get(layer.row.key(name, part))) is not None:
                setattr(layer, part, nn.Parameter(value, requires_grad=False))
    parts = {name: take(name, layer, None, None) for name, layer in layers.items()}
    values = {key: tensors[key] for key in rest}
    tied = config.get("tied") or {}
    values |= {name: tensors[source] for name, source in tied.items()}
    modules: dict[str, Mapping[str, Tensor]] = {}
    for name in with_tied(config["modules_to_save"], parts, tied):
        if name in config.get("partly", ()):
            raise ValueError(
                f"{path} holds what is tied in {name}, and not the rest of it, which PEFT needs: "
                "load it into its base model, and export that"
            )
        own = {k: v for k, v in values.items() if k.startswith(f"{name}.")}
        modules[name] = {key.removeprefix(f"{name}."): value for key, value in own.items()}
    for key, value in values.items():
        if key.rpartition(".")[0] in parts:
            parts[key.rpartition(".")[0]].bias = value
    return Adapter(parts, modules)


def with_tied(saved: Iterable[str], layers: Collection[str], tied: Mapping[str, str]) -> list[str]:
    """The modules that PEFT has to train whole for all to have what is trained through a tie.

    PEFT gives each of them a copy, tied to nothing. What it does not copy it loads in its place, so
    that ties of trained biases stay as they are. Raises ValueError for what PEFT cannot hold.
    """
    names = list(saved)
    for name, source in tied.items():
        holder, _, part = name.rpartition(".")
        if source.rpartition(".")[0] in layers or name.startswith(tuple(f"{n}." for n in names)):
            continue
        if holder in layers and part == "bias":
            continue
        if not holder or any(f"{layer}.".startswith(f"{holder}.") for layer in layers):
            raise ValueError(
                f"{name} is trained through its tie to {source}, which plain LoRA cannot hold: "
                "merge instead"
            )
        names.append(holder)
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def stand_ins(
    entries: Mapping[str, Any], tensors: dict[str, Tensor], path: Any
) -> dict[str, LowRankLinear]:
    """The layers that a file describes, on the meta device."""
    linears = {}
    for name, entry in entries.items():
        k, n = sizes_in(name, entry, tensors, path)
        linears[name] = nn.Linear(k, n, f"{name}.bias" in tensors, device="meta")
    first = next(iter(entries.values()))
    cls, settings = METHODS[first["method"]][0], first["settings"]
    own = {"_shared": shared_by(cls.row, linears.values(), settings)} if cls.row.shared else {}
    layers = {}
    for name, entry in entries.items():
        keywords = {"_linear": linears[name], **entry["settings"], **own}
        linear = linears[name]
        try:
            layers[name] = METHODS[entry["method"]][0](
                linear.in_features, linear.out_features, linear.bias is not None, **keywords
            )
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return layers


def sizes_in(
    name: str, entry: dict[str, Any], tensors: dict[str, Tensor], path: Any
) -> tuple[int, int]:
    """(in_features, out_features) of a layer that a file describes."""
    row = row_of(entry)
    for factor in row.factors:
        if row.key(name, factor) not in tensors:
            raise ValueError(
                f"{path} has no {name}.{factor}: a file saved without its frozen factors has to be "
                "loaded into its base model, and that exported"
            )
    if "sizes" in entry:
        k, n = entry["sizes"]
        return int(k), int(n)
    if row.shared:
        raise ValueError(
            f"{path} does not say how large {name} is: load it into its base model, and export that"
        )
    down, up = tensors[f"{name}.down"], tensors[f"{name}.up"]
    if down.dim() != 2 or up.dim() != 2:
        raise ValueError(f"{path}: down and up of {name} are no matrices: it is damaged")
    return down.shape[1], up.shape[0]


# --- what is written ---


def as_lora(
    adapter: Adapter, dtype: torch.dtype | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config and tensors."""
    scale = common_scale(adapter.parts.values())
    tensors, ranks = {}, {}
    for name, part in adapter.parts.items():
        a, b = factored(part, scale, dtype, name)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
        ranks[name] = a.shape[0]
        if part.bias is not None:
            tensors[f"{PREFIX}{name}.base_layer.bias"] = part.bias
        if part.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = part.magnitude
    for name, state in adapter.modules.items():
        tensors.update({f"{PREFIX}{name}.{key}": value for key, value in state.items()})
    own = {key: own_copy(value) for key, value in tensors.items()}
    return config_of(adapter, ranks, scale), own


def write(
    adapter: Adapter, path: str | os.PathLike[str], dtype: torch.dtype | None, dora: bool = False
) -> None:
    """Write the folder; an adapter with `dora` as PEFT's DoRA."""
    check_dora(adapter, dora)
    write_folder(path, *as_lora(adapter, dtype))


def write_folder(
    path: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write PEFT's config and tensors, both or neither."""
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path} is a file: path is where a folder is to be")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as weights, replacing(folder / CONFIG) as settings:
        save_file(tensors, weights, {"format": "pt"})
        settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def config_of(adapter: Adapter, ranks: dict[str, int], scale: Fraction) -> dict[str, Any]:
    """PEFT's config; r is the largest rank, for engines reserve memory by it."""
    r = max(ranks.values())
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    dropouts = {part.dropout for part in adapter.parts.values()}
    biased = any(part.bias is not None for part in adapter.parts.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": base_name(adapter.model),
        "revision": None,
        "r": r,
        "lora_alpha": number(scale * r),
        "rank_pattern": others,
        "alpha_pattern": {key: number(scale * rank) for key, rank in others.items()},
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "target_modules": targets(list(ranks), adapter),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(adapter.modules) or None,
        "bias": "lora_only" if biased else "none",
        "init_lora_weights": True,
        "fan_in_fan_out": adapter.turned,
        "use_rslora": False,
        "use_dora": any(part.magnitude is not None for part in adapter.parts.values()),
    }


def base_name(model: nn.Module | None) -> str | None:
    """The origin of the base model, as transformers knows it."""
    return getattr(getattr(model, "config", None), "name_or_path", None) or None


def targets(names: list[str], adapter: Adapter) -> list[str] | str:
    """target_modules that mean these layers and no others of the model.

    That is the last parts of their names, or these whole, or a regular expression.
    """
    model = adapter.model
    if model is None:
        return sorted(names)
    check_places([*names, *adapter.modules], model)
    others = [name for name, _ in named_modules(model) if name not in names]
    for entries in ({name.rpartition(".")[2] for name in names}, set(names)):
        if not any(matches(name, list(entries)) for name in others):
            return sorted(entries)
    return "|".join(re.escape(name) for name in names)
