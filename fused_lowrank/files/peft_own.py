"""Adapters of PEFT whose layers have factors of their own, as `integrations.peft` writes them.

<module>.{method}_{factor}    the trained factors, and
<module>.basis_{factor}       the frozen ones, as far as they are saved

One that all layers share is with one of these.

Such files have no fingerprint of their base model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..methods import METHODS
from ..methods.method import SHARED, Method
from ..methods.variants import variant

# PEFT has LoRA itself, and those with `peft`; those with `bases` are read by `peft_folder`.
OWN: dict[str, Method] = {
    name.upper(): cls.row
    for name, (cls, _) in METHODS.items()
    if name != "lora" and cls.row.peft is None and cls.row.bases is None
}


def name_of(row: Method, factor: str) -> str:
    """The name of a factor in PEFT's layers, and in the keys of files."""
    return f"{row.name if row.factors[factor].trained else 'basis'}_{factor}"


def parsed(
    config: dict[str, Any],
    state: dict[str, Tensor],
    path: Any,
    scaling: Callable[[dict[str, Any], str, Any], tuple[int, float]],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(config, tensors) as `peft_folder.parsed` has them, and the tensors that are no adapter's.

    `scaling` gives (r, alpha) of a layer. Raises ValueError for a file that lacks factors.
    """
    row = variant(OWN[config["peft_type"]], {"dora": bool(config.get("use_dora"))})
    saved = {name: factor for name, factor in row.factors.items() if factor.saved}
    names = {f".{name_of(row, name)}": name for name in saved} | {".base_layer.bias": "bias"}
    ends = (*names, ".base_layer.weight")  # of an adapted head: the base's, and left out
    layers: dict[str, dict[str, Tensor]] = {}
    tensors, rest = {}, {}
    for key, tensor in state.items():
        end = next((end for end in ends if key.endswith(end)), None)
        if end is None:
            rest[key] = tensor
        elif end in names:
            layer, part = key.removesuffix(end), names[end]
            layers.setdefault(layer, {})[part] = tensor
            tensors[row.key(layer, part)] = tensor
    entries = {}
    for layer, parts in layers.items():
        sizes: dict[str, int] = {}
        for name, factor in saved.items():
            own = parts.get(name) if not factor.shared else tensors.get(f"{SHARED}.{name}")
            if own is None or own.dim() != len(factor.sides):
                raise ValueError(f"{path} lacks {name} of {layer}: it is damaged")
            sizes.update(zip(factor.sides, own.shape, strict=True))
        asked, alpha = scaling(config, layer, path)
        r = sizes.get("r", asked)
        numbers = (n for n, values in row.options.items() if not isinstance(values, tuple))
        entries[layer] = {
            "method": row.name,
            "settings": {
                **{name: sizes[name] if name in sizes else int(config[name]) for name in row.ranks},
                **{name: int(config[name]) for name in numbers},
                "r": r,
                "alpha": alpha if r == asked else alpha / asked * r,
                "dropout": float(config.get("lora_dropout") or 0.0),
                "train": (*row.trained, *(["bias"] if "bias" in parts else [])),
                **({"dora": True} if row.dora else {}),
            },
        }
    if not entries:
        raise ValueError(f"{path} adapts no layers: it is damaged")
    return {"layers": entries, "bases": True, "unprinted": True}, tensors, rest
