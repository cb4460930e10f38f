"""Folders of adapters in PEFT's format, read without PEFT.

`peft_others` reads those of PEFT's own VeRA and AdaLoRA, `dora_parsed` its DoRA, `peft_own` those
of methods whose adapters are more than cores. Of the others:

adapter_config.json       the config of the method
adapter_model.safetensors or .bin, or a whole state_dict in model.safetensors, pytorch_model.bin:
  base_model.model.<module>.lora_xs_core         of `LoraXSConfig`
  base_model.model.<module>.lora_mini_a_train    and _b_train, of `LoraMiniConfig`
  base_model.model.<module>.lora_xs_magnitude    or lora_mini_magnitude, with use_dora
  base_model.model.<module>.basis_down           and _up, _fingerprint, of both
  base_model.model.<module>.base_layer.bias      where it is trained
  base_model.model.<module>.base_layer.weight    of an adapted head: the base's, and left out
  base_model.model.<module>.<tensor>             of each module trained whole
  base_model.model.<module>.bias                 of any module, with bias="all"
  base_model.model.<module>.weight, .bias        of embeddings and a head that PEFT saves with it
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..methods import METHODS, LowRankLinear
from ..methods.initial.bases import Bases, Source
from ..methods.method import MAGNITUDE
from ..methods.variants import variant
from ..models.adapt import adapted_layers
from ..models.patterns import pattern_of
from ..models.targets import check_places, modules_by_name
from ..models.ties import ties_of
from . import peft_others, peft_own
from .fingerprint import FINGERPRINT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's keys
FILES = WEIGHTS, "adapter_model.bin", "model.safetensors", "pytorch_model.bin"
HEADS = ["classifier", "score"]  # what PEFT trains whole where the config does not say
DORA = {  # the ends of PEFT's keys
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".base_layer.bias": "bias",
    ".base_layer.weight": "weight",
}
UNREAD = "fan_in_fan_out", "lora_bias", "use_qalora", "layer_replication", "target_parameters"
TYPES = {name.upper(): name for name, (cls, _) in METHODS.items() if cls.row.bases}  # in PEFT


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder of PEFT's, whatever is in it, or the tensors in one."""
    path = Path(path)
    return path.is_dir() or (path.name in FILES and (path.parent / CONFIG).is_file())


def file_of(path: str | os.PathLike[str]) -> Path:
    """The file with the tensors, where `path` is its folder or the file itself."""
    path = Path(path)
    if not path.is_dir():
        return path
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"{path} has none of {', '.join(FILES)}: it is no adapter")
    return file


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU and less PEFT's prefix; no code in it is run."""
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{file} is truncated, or holds no tensors alone: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file} holds no state_dict")
    return {str(key).removeprefix(PREFIX): value for key, value in state.items()}


def config_of(file: Path) -> dict[str, Any]:
    """The contents of adapter_config.json beside a file."""
    place = file.parent / CONFIG
    if not place.is_file():
        raise ValueError(
            f"{file} has no {CONFIG} beside it: r and alpha are in there. A model's own "
            "weights, merged or not, are no adapter"
        )
    return json_of(place)


def json_of(file: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no settings")
    return found


def refuse(config: dict[str, Any], names: Iterable[str], path: Any) -> None:
    """Raise for settings that must not be on."""
    for name in names:
        if config.get(name):
            raise ValueError(f"{path}: {name} is {config[name]!r}, which cannot be read here")


@contextmanager
def reading(path: Any) -> Iterator[None]:
    """A context within which any error of a config of other types than PEFT's is a ValueError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        if str(path) in str(error):  # it says already what is wrong
            raise
        raise ValueError(f"{path}: its {CONFIG} cannot be read ({error!r})") from error


def scaling(config: dict[str, Any], name: str, path: Any) -> tuple[int, float]:
    """(r, alpha) of a layer, as the config has them; alpha is such that the scale is alpha / r."""
    with reading(path):
        r = int(pattern_of(config.get("rank_pattern"), name, config["r"]))
        alpha = pattern_of(config.get("alpha_pattern"), name, config["lora_alpha"])
        alpha = float(r if alpha is None else alpha)
        if r < 1:
            raise ValueError(f"{path}: r is {r} for {name}: its {CONFIG} cannot be read")
        return r, alpha * math.sqrt(r) if config.get("use_rslora") else alpha


def heads_of(config: dict[str, Any]) -> tuple[str, ...]:
    """The ends of the names of modules trained whole."""
    heads = config.get("modules_to_save") or HEADS
    if not isinstance(heads, list | set | tuple) or not all(isinstance(h, str) for h in heads):
        raise ValueError(f"modules_to_save is {heads!r} in {CONFIG}: it must be a list of names")
    return tuple(heads)


def is_matrix(key: str, tensor: Tensor) -> bool:
    """Whether this is the weight of an embedding or of a linear layer."""
    return key.endswith(".weight") and tensor.dim() == 2


def whole_modules(
    tensors: dict[str, Tensor], config: dict[str, Any], path: Any
) -> tuple[list[str], dict[str, Tensor]]:
    """The modules trained whole, and their tensors: all that is left of a file.

    PEFT takes every module whose name ends with an entry of modules_to_save, without a dot before.
    """
    heads = heads_of(config)
    tensors = {
        re.sub(r"\.modules_to_save(\.default)?\.", ".", key): tensor
        for key, tensor in tensors.items()
        if ".original_module." not in key
    }
    embeddings = {key[: -len(".weight")] for key in tensors if is_matrix(key, tensors[key])}
    biases = config.get("bias") == "all"
    saved: dict[str, None] = {}
    for key in tensors:
        holder, _, part = key.rpartition(".")
        names = itertools.accumulate(key.split(".")[:-1], "{}.{}".format)
        module = next((name for name in names if name.endswith(heads)), None)
        if module is None and (holder in embeddings or (biases and part == "bias")):
            module = holder
        if not module:
            raise ValueError(
                f"{path} holds an unexpected {key}, which is of no module in modules_to_save"
            )
        saved[module] = None
    return list(saved), tensors


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of LoRA-XS or LoRA-Mini, as `contents.read` has ours.

    The config says besides: `seed`, of the frozen factors; `partial`, the modules of which the file
    has some tensors, and the base model the others.

    Raises ValueError for another method, for settings that only PEFT can load, and for a file that
    is truncated.
    """
    file = file_of(path)
    with reading(path):
        return parsed(config_of(file), tensors_of(file), path)


def is_model(model: Any) -> bool:
    """Whether this is a model of PEFT's."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def of_model(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The result of `read` for the folder that a model of PEFT's would save: its active adapter.

    Raises ValueError where several are active.
    """
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"the model has {len(active)} active adapters: set_adapter(name) first")
    state = sys.modules["peft"].get_peft_model_state_dict(model, adapter_name=active[0])
    tensors = {key.removeprefix(PREFIX): value.detach() for key, value in state.items()}
    return parsed(model.peft_config[active[0]].to_dict(), tensors, "the model")


def parsed(
    config: dict[str, Any], state: dict[str, Tensor], path: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`read` of what a folder holds."""
    if (kind := config.get("peft_type")) == "LORA" and config.get("use_dora"):
        return dora_parsed(config, state, path)
    if kind == "LORA":
        raise ValueError(
            f"{path} is plain LoRA, which is no adapter of {' or '.join(TYPES)}: load it by "
            "peft.PeftModel.from_pretrained, and fused_lowrank.integrations.peft.fuse_lora runs it "
            "through the kernels here; a checkpoint of the LoRA-XS authors' code is loaded by "
            "load_official_lora_xs"
        )
    if kind in peft_others.OTHERS or kind in peft_own.OWN:
        refuse(config, ["fan_in_fan_out"], path)
        if kind in peft_own.OWN:
            contents, tensors, rest = peft_own.parsed(config, state, path, scaling)
        else:
            contents, tensors, rest = peft_others.parsed(config, state, path)
        saved, found = whole_modules(rest, config, path)
        partial = [name for name in saved if not name.endswith(heads_of(config))]
        contents |= {"modules_to_save": saved, "tied": {}, "partial": partial}
        return contents, {**tensors, **found}
    if kind not in TYPES:
        raise ValueError(
            f"{path} is an adapter of {kind}: it must be "
            f"{' or '.join([*TYPES, *peft_own.OWN, *peft_others.OTHERS])}; PEFT loads the others, "
            "and load_official_lora_xs those of the LoRA-XS authors' code"
        )
    refuse(config, ["fan_in_fan_out"], path)
    method = TYPES[kind]
    frozen = ("down", "up", FINGERPRINT)
    trained = (*METHODS[method][0].row.core, *([MAGNITUDE] if config.get("use_dora") else []))
    suffixes = {f".{method}_{part}": part for part in trained}
    suffixes |= {f".basis_{part}": part for part in frozen}
    suffixes |= {".base_layer.bias": "bias", ".base_layer.weight": "weight"}
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in state.items():
        suffix = next((s for s in suffixes if key.endswith(s)), None)
        if suffix is None:
            rest[key] = tensor
        else:
            layers.setdefault(key.removesuffix(suffix), {})[suffixes[suffix]] = tensor
    for parts in layers.values():
        parts.pop("weight", None)  # the fingerprint says whether it is the base's
    saved, found = whole_modules(rest, config, path)
    bases = all("down" in parts and "up" in parts for parts in layers.values())
    entries = {
        name: {"method": method, "settings": settings_of(parts, method, config, name, path)}
        for name, parts in layers.items()
    }
    if not entries:
        raise ValueError(f"{path} adapts no layers: it is damaged")
    tensors = {f"{name}.{part}": t for name, parts in layers.items() for part, t in parts.items()}
    contents = {"layers": entries, "modules_to_save": saved, "bases": bases}
    contents["tied"] = {}  # PEFT trains copies of modules, tied to nothing
    contents["seed"] = config.get("projection_seed", 42)
    contents["partial"] = [name for name in saved if not name.endswith(heads_of(config))]
    return contents, {**tensors, **found}


def dora_parsed(
    config: dict[str, Any], state: dict[str, Tensor], path: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`read` of what a folder of PEFT's LoRA with use_dora holds, which has no fingerprint."""
    refuse(config, UNREAD, path)
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in state.items():
        suffix = next((s for s in DORA if key.endswith(s)), None)
        if suffix is None:
            rest[key] = tensor
        elif DORA[suffix] != "weight":  # of an adapted head: the base's
            layers.setdefault(key.removesuffix(suffix), {})[DORA[suffix]] = tensor
    if not layers:
        raise ValueError(f"{path} adapts no layers: it is damaged")
    entries = {}
    for name, parts in layers.items():
        for factor, dims in ("down", 2), ("up", 2), ("magnitude", 1):
            if factor not in parts or parts[factor].dim() != dims:
                raise ValueError(f"{path} lacks {factor} of {name}, or it is of no linear layer")
        asked, alpha = scaling(config, name, path)
        r, biased = len(parts["down"]), ("bias",) if "bias" in parts else ()
        settings = {
            "r": r,
            "alpha": alpha / asked * r,
            "dropout": float(config.get("lora_dropout") or 0.0),
            "train": ("down", "up", "magnitude", *biased),
            "dora": True,
        }
        entries[name] = {"method": "lora", "settings": settings}
    saved, found = whole_modules(rest, config, path)
    tensors = {f"{name}.{part}": t for name, parts in layers.items() for part, t in parts.items()}
    contents = {"layers": entries, "modules_to_save": saved, "bases": True, "unprinted": True}
    contents |= {"tied": {}, "partial": [n for n in saved if not n.endswith(heads_of(config))]}
    return contents, {**tensors, **found}


def complete(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Add what a folder leaves to the base model: ties, and of modules in part the other tensors.

    PEFT trains copies of modules, tied to nothing; biases of adapted layers it trains where they
    are, and so in all that share them. Raises ValueError for what stands in several places, of
    which PEFT changes one.
    """
    modules = modules_by_name(model)
    if "partial" in config:
        whole = config["modules_to_save"]
        check_places([name for name in (*config["layers"], *whole) if name in modules], model)
        biases = [f"{name}.bias" for name in config["layers"] if f"{name}.bias" in tensors]
        tied = ties_of(model, biases).items()
        config["tied"] = {name: source for name, source in tied if name not in tensors}
    for name in config.get("partial", ()):
        module = modules.get(name)
        if module is None or any(True for _ in adapted_layers(module)):
            continue  # who loads says what is wrong
        for key, value in module.state_dict().items():
            tensors.setdefault(f"{name}.{key}", value)


def frozen_factors(layer: LowRankLinear, name: str, seed: int) -> tuple[Tensor, Tensor]:
    """(down, up) of a layer as the PEFT integration makes them, in the weight's dtype."""
    weight, (down, up) = layer.base_weight, layer.bases
    made: Bases = layer.row.bases
    down, up = made.new(Source(weight, name, seed), len(down), up.shape[1])
    return down.to(weight), up.to(weight)


def settings_of(
    parts: dict[str, Tensor], method: str, config: dict[str, Any], name: str, path: Any
) -> dict[str, Any]:
    """The keywords of a layer. Its rank is that of its tensors, which PEFT may have reduced."""
    asked, alpha = scaling(config, name, path)
    row = variant(METHODS[method][0].row, {"dora": bool(config.get("use_dora"))})
    trained, sizes = (*row.core, *([MAGNITUDE] if row.dora else [])), dict[str, int]()
    for factor in trained:
        sides = row.factors[factor].sides
        if factor not in parts or parts[factor].dim() != len(sides):
            raise ValueError(f"{path} lacks {factor} of {name}: it is damaged")
        sizes.update(zip(sides, parts[factor].shape, strict=True))
    r = sizes["r"]
    sizes.pop("N", None)
    return {
        "r": r,
        "alpha": alpha if r == asked else alpha / asked * r,
        "dropout": float(config.get("lora_dropout") or 0.0),
        "train": (*trained, *(["bias"] if "bias" in parts else [])),
        **sizes,
        **({"dora": True} if row.dora else {}),
        **({"svd": "randomized"} if "svd" in row.options else {}),  # as the integration's are
    }
