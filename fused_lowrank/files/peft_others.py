"""Adapters of PEFT's own methods that are methods here as well: VeRA and AdaLoRA.

A row's `peft` says what PEFT calls its factors. Such files have no fingerprint of their base model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..methods import METHODS
from ..methods.method import SHARED, Method

OTHERS: dict[str, Method] = {
    cls.row.peft.kind: cls.row for cls, _ in METHODS.values() if cls.row.peft is not None
}


def parsed(
    config: dict[str, Any], state: dict[str, Tensor], path: Any
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(config, tensors) as `peft_folder.parsed` has them, and the tensors that are no adapter's.

    Layers to which AdaLoRA has given no rank at all are left out.
    """
    row = OTHERS[config["peft_type"]]
    assert row.peft is not None
    names = {f".{theirs}": ours for ours, theirs in row.peft.factors.items()}
    shared = {theirs: ours for ours, theirs in row.peft.shared.items()}
    layers: dict[str, dict[str, Tensor]] = {}
    tensors, rest = {}, {}
    for key, tensor in state.items():
        suffix = next((suffix for suffix in names if key.endswith(suffix)), None)
        if key in shared:
            tensors[f"{SHARED}.{shared[key]}"] = tensor
        elif suffix is not None:
            part = names[suffix]
            flat = len(row.factors[part].sides) == 1
            own = tensor.reshape(-1) if flat else tensor
            layers.setdefault(key.removesuffix(suffix), {})[part] = own
        elif key.endswith(".base_layer.bias"):
            layers.setdefault(key.removesuffix(".base_layer.bias"), {})["bias"] = tensor
        else:
            rest[key] = tensor
    entries = {}
    for name, parts in layers.items():
        for factor in row.peft.factors:
            if factor not in parts:
                raise ValueError(f"{path} lacks {factor} of {name}: it is damaged")
        rank = len(parts[row.core[0]])
        if rank == 0:
            continue
        biased = ["bias"] if "bias" in parts else []
        settings = row.peft.settings(config, rank)
        entries[name] = {
            "method": row.name,
            "settings": {"r": rank, "train": (*row.trained, *biased), **settings},
        }
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    if not entries:
        raise ValueError(f"{path} adapts no layers: it is damaged")
    whole = all(f"{SHARED}.{factor}" in tensors for factor in row.peft.shared)
    return {"layers": entries, "bases": whole, "unprinted": True}, tensors, rest
