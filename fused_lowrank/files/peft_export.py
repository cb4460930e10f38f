"""Adapters in the format of PEFT's own methods: VeRA and AdaLoRA, which PEFT loads and trains on.

A row's `peft` says what PEFT calls its factors and settings; `peft_others` reads the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bank import AdapterBank
from ..bank.sources import holds
from ..compute.autograd import places
from ..methods import LowRankLinear
from ..methods.method import Method, PeftNames
from .adapter import own_copy
from .contents import require_path
from .lora_export import adapter_of, base_name, targets, write_folder
from .lora_parts import Adapter
from .peft_folder import PREFIX
from .peft_others import OTHERS

TITLES = " and ".join(row.title for row in OTHERS.values())


@dataclass
class Own:
    """The factors of one layer, and what its config says of them."""

    row: Method
    factors: dict[str, Tensor]
    settings: Mapping[str, Any]
    scale: float
    bias: Tensor | None = None  # where it is trained


def export_peft(
    source: nn.Module | AdapterBank | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
) -> None:
    """Write an adapter in the format of PEFT's own VeRA or AdaLoRA, as its method is.

    The folder gets adapter_config.json and adapter_model.safetensors, both or neither:
    `peft.PeftModel.from_pretrained` loads it, and so does `load_adapter`. Modules trained whole and
    trained biases are in it. Tensors keep their dtypes. Of AdaLoRA the ranks that a budget took
    away are left out, and the config's rank_pattern says which; while all are at zero, as at the
    start, none is. PEFT has one scale for all layers: where others differ from it, lora_E takes
    the rest, and vera_lambda_b all of it.

    Args:
        source: an adapted model; or a bank, of which `name` is exported; or a file of
            `save_adapter` that has its frozen factors.
        path: the folder, which may be there already.
        name: of an adapter in a bank.

    Raises as `export_lora` does, and ValueError for a method that PEFT does not have.
    """
    require_path(path, "export_peft(model, folder)")
    write_own(adapter_of(source, name, taken_by({})), path)


def taken_by(shared: dict[str, Tensor]) -> Any:
    """A function that takes layers' factors; what all layers have in common comes into `shared`."""

    def take(name: str, layer: LowRankLinear, core: Any = None, scale: Any = None) -> Own:
        row = layer.row
        if row.peft is None:
            raise ValueError(
                f"{name} is of {row.label}, and PEFT's own methods that are written are {TITLES}: "
                f"export_lora(…{', dora=True' if row.dora else ''}), convert --to "
                f"peft-{'dora' if row.dora else 'lora'}, write it as PEFT's LoRA"
            )
        if "weight" in layer.train_names:
            raise ValueError(f"{name} trains its weight, which PEFT cannot hold: merge instead")
        factors = layer.factors_now()
        if core is not None:
            factors.update(zip(row.core, places(core), strict=False))
        for factor in row.peft.shared:
            if factor not in shared:
                shared[factor] = own_copy(factors[factor])
        own = {factor: own_copy(factors[factor]) for factor in row.peft.factors}
        trained = layer.bias if "bias" in layer.train_names and core is None else None
        bias = None if trained is None else own_copy(trained)
        own_scale = layer.scale if scale is None else scale
        return Own(row, {**own, **shared}, layer.settings(), own_scale, bias)

    return take


def write_own(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write the folder."""
    write_folder(path, *as_peft(adapter))


@torch.no_grad()
def as_peft(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config and tensors."""
    parts: dict[str, Own] = adapter.parts
    first = next(iter(parts.values()))
    if other := next((name for name, part in parts.items() if part.row is not first.row), None):
        raise ValueError(f"{other} is of {parts[other].row.name}, others of {first.row.name}")
    names = first.row.peft
    assert names is not None
    scale = names.scale
    if scale is None:
        scale = next((part.scale for part in parts.values() if part.scale > 0), 1.0)
    most = max(int(part.settings["r"]) for part in parts.values())
    left = ranks_left(names, parts)
    state = {names.shared[factor]: first.factors[factor] for factor in names.shared}
    for name, part in parts.items():
        for factor, theirs in names.factors.items():
            value, sides = part.factors[factor], part.row.factors[factor].sides
            if factor == names.scaled and part.scale != scale:
                value = (value.double() * (part.scale / scale)).to(value.dtype)
            if not holds(value.dtype, value):
                raise ValueError(f"{factor} of {name} holds NaN or Inf, or would with its scale")
            if name in left and "r" in sides:
                value = value.index_select(sides.index("r"), left[name].nonzero().flatten())
            state[f"{PREFIX}{name}.{theirs}"] = value[:, None] if factor in names.columns else value
        if part.bias is not None:
            state[f"{PREFIX}{name}.base_layer.bias"] = part.bias
    for name, values in adapter.modules.items():
        state.update({f"{PREFIX}{name}.{key}": value for key, value in values.items()})
    ranks = [int(left[name].sum()) if name in left else most for name in parts]
    config = config_of(adapter, names)
    config |= names.config(first.settings, most, max(1, sum(ranks) // len(ranks)), scale)
    if min(ranks) < most:
        config["rank_pattern"] = {
            f"{name}.{names.factors[names.masked]}": [*own.tolist(), *[False] * (most - len(own))]
            for name, own in left.items()
        }
    return config, {key: own_copy(value) for key, value in state.items()}


def ranks_left(names: PeftNames, parts: Mapping[str, Own]) -> dict[str, Tensor]:
    """bool (r,) by layer: the ranks that a budget has left, of a method that has one."""
    if not names.masked:
        return {}
    masks = {name: part.factors[names.masked] != 0 for name, part in parts.items()}
    if any(bool(mask.any()) for mask in masks.values()):
        return masks
    return {name: torch.ones_like(mask) for name, mask in masks.items()}


def config_of(adapter: Adapter, names: PeftNames) -> dict[str, Any]:
    """PEFT's config, less what is the method's own."""
    parts = adapter.parts
    dropouts = {part.settings["dropout"] for part in parts.values()}
    biased = any(part.bias is not None for part in parts.values())
    return {
        "peft_type": names.kind,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": base_name(adapter.model),
        "revision": None,
        "target_modules": targets(list(parts), adapter),
        "modules_to_save": list(adapter.modules) or None,
        "bias": f"{names.prefix}_only" if biased else "none",
        "fan_in_fan_out": False,
        f"{names.prefix}_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
    }
