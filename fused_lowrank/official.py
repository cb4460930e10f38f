"""Checkpoints of the LoRA-XS authors' repository (MohammadrezaBanaei/LoRA-XS).

It writes a folder as PEFT does for LoRA, and for each layer a third matrix:

adapter_config.json       PEFT's LoraConfig
adapter_model.safetensors or .bin, or pytorch_model.bin:
  base_model.model.<module>.lora_A.weight                  down (r, in), with Σ wholly in it
  base_model.model.<module>.lora_B.weight                  up (out, r)
  base_model.model.<module>_lora_latent_mapping.weight     coreᵀ (r, r)
  base_model.model.<module>.<tensor>                       of each module trained whole
reconstr_config.json      here or one folder up: how A and B were made

A state_dict of the whole model has `.default` in these keys, and the base model's tensors.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .adapt import adapted_layers
from .adapter_file import WEIGHT_TOLERANCE, alike, install
from .export import CONFIG, PREFIX
from .layers import LowRankLinear
from .targets import matches

FILES = "adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin"
MADE = "reconstr_config.json"
LATENT = "_lora_latent_mapping.weight"
FACTOR = re.compile(
    r"(.+?)(?:\.lora_([AB])(?:\.default)?|(?:\.default)?_lora_latent_mapping)\.weight"
)
FACTORS = {"A": "down", "B": "up", None: "core"}
HEADS = ["classifier", "score"]  # what PEFT trains whole where the config does not say
UNSUPPORTED = "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layer_replication"


def load_official_lora_xs(
    model: nn.Module, path: str | os.PathLike[str], *, fused: bool = True, progress: bool = True
) -> nn.Module:
    """Load a checkpoint of the LoRA-XS authors' code into `model`, in place; return the model.

    A plain model is adapted first. An adapted one must have the same layers, of the same rank and
    alpha, training the core alone, and the same modules to save; it keeps its classes. down and up
    are the checkpoint's A and B, core the transpose of its latent mapping.

    Args:
        model: the base model, plain or adapted by "lora_xs".
        path: the folder, or the file with the tensors, adapter_config.json beside it.
        fused: the fused layers, or their plain references.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: a file that is truncated or not of that kind, or that belongs to another model:
            other module names, sizes, ranks or weights. The model is as it was.
    """
    config, tensors, base = read(path)
    from_weights = config.pop("from_weights")
    check_base(model, base, path)

    def check(name: str, layer: LowRankLinear) -> None:
        if from_weights:
            check_factors(name, layer, tensors, path)

    return install(model, config, tensors, path, check, fused=fused, progress=progress)


def read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint as `adapter_file.read` has ours, fingerprints aside, and the base's tensors.

    The config says besides whether A and B are of the weights ("from_weights"), or random.
    """
    file = file_of(Path(path))
    state, settings = tensors_of(file), settings_of(file)
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in state.items():
        key = key.removeprefix(PREFIX)
        if match := FACTOR.fullmatch(key):
            factor = FACTORS[match[2]]
            turn = factor == "core" and tensor.dim() == 2
            factors.setdefault(match[1], {})[factor] = tensor.t() if turn else tensor
        else:
            others[key] = tensor
    if not any("core" in found for found in factors.values()):
        raise ValueError(f"{path} is no LoRA-XS checkpoint: no key ends in {LATENT}")
    for name, found in factors.items():
        for factor, key in (("down", ".lora_A.weight"), ("up", ".lora_B.weight"), ("core", LATENT)):
            if factor not in found:
                raise ValueError(f"{path} lacks {name}{key}: it is damaged")
    saved, trained, base = sorted_out(others, factors.keys(), settings["modules_to_save"], path)
    config = {
        "layers": {
            name: {"method": "lora_xs", "settings": dict(settings["layer"])} for name in factors
        },
        "modules_to_save": saved,
        "bases": True,
        "from_weights": settings["from_weights"],
    }
    tensors = {f"{n}.{factor}": t for n, found in factors.items() for factor, t in found.items()}
    return config, {**tensors, **trained}, base


def file_of(path: Path) -> Path:
    """The file with the tensors."""
    if not path.is_dir():
        return path
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"{path} has none of {', '.join(FILES)}: it is no checkpoint")
    return file


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; no code in it is run."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{file} is truncated, or holds no tensors alone: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file} holds no state_dict")
    return {str(key): value for key, value in state.items()}


def json_of(file: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no settings")
    return found


def settings_of(file: Path) -> dict[str, Any]:
    """The layers' keywords ("layer"), "modules_to_save" and "from_weights"."""
    if not (place := file.parent / CONFIG).is_file():
        raise ValueError(f"{file} has no {CONFIG} beside it: alpha and r are in there")
    config = json_of(place)
    for name in UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{place}: {name} is {config[name]!r}, which LoRA-XS does not have")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{place}: bias is {config['bias']!r}: only 'none' is supported")
    try:
        r, alpha = int(config["r"]), float(config["lora_alpha"])
        alpha = alpha * math.sqrt(r) if config.get("use_rslora") else alpha
        dropout = float(config.get("lora_dropout") or 0.0)
        heads = [str(name) for name in config.get("modules_to_save") or HEADS]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} cannot be read ({error!r})") from error
    layer = {"r": r, "alpha": alpha, "dropout": dropout, "train": ("core",)}
    folders = file.absolute().parents[:2]
    made = next((f / MADE for f in folders if (f / MADE).is_file()), None)
    how = json_of(made) if made else {}
    random = how.get("replacement_module_random_init") or how.get("half_init_dec")
    return {"layer": layer, "modules_to_save": heads, "from_weights": not random}


def sorted_out(
    others: dict[str, Tensor], layers: Collection[str], heads: list[str], path: Any
) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """What is no factor: the modules trained whole, their tensors, and the base model's."""
    whole = any(f"{n}.base_layer.weight" in others or f"{n}.weight" in others for n in layers)
    trained: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    saved: dict[str, None] = {}
    for key, tensor in others.items():
        if ".original_module." in key:
            continue
        module, marked, rest = key.partition(".modules_to_save.default.")
        if whole and not marked:
            base[key.replace(".base_layer.", ".")] = tensor
            continue
        if not marked:
            names = itertools.accumulate(key.split(".")[:-1], "{}.{}".format)
            module = next((name for name in names if matches(name, heads)), "")
            rest = key.removeprefix(f"{module}.")
        if not module:
            raise ValueError(
                f"{path} holds an unexpected {key}, which is of no module in modules_to_save"
            )
        saved[module] = None
        trained[f"{module}.{rest}"] = tensor
    return list(saved), trained, base


def check_base(model: nn.Module, base: dict[str, Tensor], path: Any) -> None:
    """Raise if the checkpoint holds other values of the base model's tensors."""
    layers = {f"{name}.weight": layer.base_weight for name, layer in adapted_layers(model)}
    present = {**model.state_dict(), **layers}
    for key, theirs in base.items():
        ours = present.get(key)
        if ours is not None and not ours.is_meta and not alike(ours, theirs, WEIGHT_TOLERANCE):
            raise ValueError(f"{path} was made for another base model: {key} differs")


def check_factors(name: str, layer: LowRankLinear, tensors: dict[str, Tensor], path: Any) -> None:
    """Raise unless down = upᵀ·W, as the authors' code makes it, whatever its SVD came to."""
    weight = layer.base_weight.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    down, up = (tensors[f"{name}.{factor}"].to(weight) for factor in ("down", "up"))
    if not alike(up.t() @ weight, down):
        raise ValueError(
            f"{path} was made for another base model: lora_A and lora_B of {name} are not of its "
            f"weight (were they random, {MADE} beside the checkpoint would say so)"
        )
