"""Folders of adapters in PEFT's format, read without PEFT.

adapter_config.json       the config of the method
adapter_model.safetensors or .bin, or a whole state_dict in model.safetensors, pytorch_model.bin:
  base_model.model.<module>.lora_xs_core         of `LoraXSConfig`
  base_model.model.<module>.lora_mini_a_train    and _b_train, of `LoraMiniConfig`
  base_model.model.<module>.basis_down           and _up, _fingerprint, of both
  base_model.model.<module>.base_layer.bias      where it is trained
  base_model.model.<module>.<tensor>             of each module trained whole
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .export import CONFIG, PREFIX, WEIGHTS
from .fingerprint import FINGERPRINT
from .layers import METHODS
from .targets import matches

FILES = WEIGHTS, "adapter_model.bin", "model.safetensors", "pytorch_model.bin"
HEADS = ["classifier", "score"]  # what PEFT trains whole where the config does not say
TYPES = {"LORA_XS": "lora_xs", "LORA_MINI": "lora_mini"}


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
    """What adapter_config.json beside a file says."""
    place = file.parent / CONFIG
    if not place.is_file():
        raise ValueError(f"{file} has no {CONFIG} beside it: r and alpha are in there")
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


def scaling(config: dict[str, Any], name: str, path: Any) -> tuple[int, float]:
    """(r, alpha) of a layer, as the config has them; alpha is such that the scale is alpha / r."""
    try:
        r = int(pattern_of(config.get("rank_pattern"), name, config["r"]))
        alpha = pattern_of(config.get("alpha_pattern"), name, config["lora_alpha"])
        alpha = float(r if alpha is None else alpha)
        return r, alpha * math.sqrt(r) if config.get("use_rslora") else alpha
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"{path}: its {CONFIG} cannot be read ({error!r})") from error


def pattern_of(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """What a rank_pattern or an alpha_pattern says of a layer; the first that matches counts."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def whole_modules(
    tensors: dict[str, Tensor], config: dict[str, Any], path: Any
) -> tuple[list[str], dict[str, Tensor]]:
    """The modules trained whole, and their tensors: all that is left of a file."""
    heads = config.get("modules_to_save") or HEADS
    saved: dict[str, None] = {}
    found = {}
    for key, tensor in tensors.items():
        key = key.replace(".modules_to_save.default.", ".")
        names = itertools.accumulate(key.split(".")[:-1], "{}.{}".format)
        module = next((name for name in names if matches(name, heads)), None)
        if module is None:
            raise ValueError(
                f"{path} holds an unexpected {key}, which is of no module in modules_to_save"
            )
        saved[module], found[key] = None, tensor
    return list(saved), found


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of LoRA-XS or LoRA-Mini, as `adapter_file.read` has ours.

    Raises ValueError for another method, for settings that only PEFT can load, and for a file that
    is truncated.
    """
    file = file_of(path)
    config = config_of(file)
    if (kind := config.get("peft_type")) not in TYPES:
        raise ValueError(f"{path} is an adapter of {kind}: it must be {' or '.join(TYPES)}")
    refuse(config, ["fan_in_fan_out"], path)
    method = TYPES[kind]
    frozen = ("down", "up", FINGERPRINT)
    trained = (part for part in METHODS[method][0].factors if part not in frozen)
    suffixes = {f".{method}_{part}": part for part in trained}
    suffixes |= {f".basis_{part}": part for part in frozen}
    suffixes[".base_layer.bias"] = "bias"
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors_of(file).items():
        suffix = next((s for s in suffixes if key.endswith(s)), None)
        if suffix is None:
            rest[key] = tensor
        else:
            layers.setdefault(key.removesuffix(suffix), {})[suffixes[suffix]] = tensor
    saved, found = whole_modules(rest, config, path)
    bases = all("down" in parts and "up" in parts for parts in layers.values())
    entries = {
        name: {"method": method, "settings": settings_of(parts, method, config, name, path)}
        for name, parts in layers.items()
    }
    if not entries:
        raise ValueError(f"{path} adapts no layers: it is damaged")
    tensors = {f"{name}.{part}": t for name, parts in layers.items() for part, t in parts.items()}
    return {"layers": entries, "modules_to_save": saved, "bases": bases}, {**tensors, **found}


def settings_of(
    parts: dict[str, Tensor], method: str, config: dict[str, Any], name: str, path: Any
) -> dict[str, Any]:
    """The keywords of a layer. Its rank is that of its tensors, which PEFT may have reduced."""
    asked, alpha = scaling(config, name, path)
    trained = [f for f in METHODS[method][0].factors if f not in ("down", "up")]
    for factor in trained:
        if factor not in parts or parts[factor].dim() != 2:
            raise ValueError(f"{path} lacks {factor} of {name}: it is damaged")
    first, last = parts[trained[0]], parts[trained[-1]]
    r = first.shape[1]
    settings = {
        "r": r,
        "alpha": alpha if r == asked else alpha / asked * r,
        "dropout": float(config.get("lora_dropout") or 0.0),
        "train": (*trained, *(["bias"] if "bias" in parts else [])),
    }
    return settings if method == "lora_xs" else {**settings, "a": len(first), "b": last.shape[1]}
