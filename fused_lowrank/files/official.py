"""Checkpoints of the LoRA-XS authors' repository (MohammadrezaBanaei/LoRA-XS).

It writes a folder as PEFT does for LoRA, and for each layer a third matrix:

  base_model.model.<module>.lora_A.weight                  down (r, in), with Σ wholly in it
  base_model.model.<module>.lora_B.weight                  up (out, r)
  base_model.model.<module>_lora_latent_mapping.weight     coreᵀ (r, r)

reconstr_config.json, there or one folder up, says how A and B were made. A state_dict of the whole
model has `.default` in these keys, and the base model's tensors.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import LowRankLinear
from ..models.adapt import adapted_layers
from .adapter import install
from .fingerprint import WEIGHT_TOLERANCE, alike
from .peft_folder import (
    config_of,
    file_of,
    json_of,
    reading,
    refuse,
    scaling,
    tensors_of,
    whole_modules,
)

MADE = "reconstr_config.json"
LATENT = "_lora_latent_mapping.weight"
FACTOR = re.compile(
    r"(.+?)(?:\.lora_([AB])(?:\.default)?|(?:\.default)?_lora_latent_mapping)\.weight"
)
FACTORS = {"A": "down", "B": "up", None: "core"}
WHOLE = ".modules_to_save.default."  # in a whole state_dict
UNSUPPORTED = "use_dora", "fan_in_fan_out", "layer_replication"


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
    check_base(model, base, path)
    random = bases_are_random(file_of(path))

    def check(name: str, layer: LowRankLinear) -> None:
        if not random:
            check_factors(name, layer, tensors, path)

    return install(model, config, tensors, path, check, fused=fused, progress=progress)


def read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint as `contents.read` has ours, less fingerprints, and the base's tensors."""
    file = file_of(path)
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors_of(file).items():
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
    settings = config_of(file)
    refuse(settings, UNSUPPORTED, path)
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {settings['bias']!r}: only 'none' can be read here")
    base: dict[str, Tensor] = {}
    if any(f"{n}.base_layer.weight" in others or f"{n}.weight" in others for n in factors):
        base = {k.replace(".base_layer.", "."): t for k, t in others.items() if WHOLE not in k}
        others = {key: tensor for key, tensor in others.items() if WHOLE in key}
    saved, trained = whole_modules(others, settings, path)
    with reading(path):
        dropout = float(settings.get("lora_dropout") or 0.0)
    layers = {}
    for name in factors:
        r, alpha = scaling(settings, name, path)
        own = {"r": r, "alpha": alpha, "dropout": dropout, "train": ("core",), "svd": "randomized"}
        layers[name] = {"method": "lora_xs", "settings": own}
    tensors = {f"{n}.{factor}": t for n, found in factors.items() for factor, t in found.items()}
    config = {"layers": layers, "modules_to_save": saved, "tied": {}, "bases": True}
    return config, {**tensors, **trained}, base


def bases_are_random(file: Path) -> bool:
    """Whether A or B were drawn, and not computed from the weights."""
    for folder in file.absolute().parents[:2]:
        if (folder / MADE).is_file():
            how = json_of(folder / MADE)
            return bool(how.get("replacement_module_random_init") or how.get("half_init_dec"))
    return False


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
