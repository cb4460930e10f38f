"""Descriptions of files and folders with adapters: their kind, and the rows to print of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..bank import file as bank_file
from ..methods import METHODS, row_of
from . import adapter as adapter_file
from . import official, peft_folder
from .peft_others import OTHERS
from .peft_own import OWN

TITLES = " or ".join(METHODS[name][0].row.title for name in peft_folder.TYPES.values())
TITLES += "".join(f" or {row.title}" for row in (OWN | OTHERS).values()) + " or DoRA"
KINDS = {
    "adapter": "adapter of fused_lowrank, by save_adapter",
    "bank": "bank of fused_lowrank, by AdapterBank.save",
    "peft": f"{TITLES} in PEFT's format",
    "official": "LoRA-XS checkpoint of the authors' code",
    "lora": "plain LoRA in PEFT's format",
}
VARIANTS = "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"
SHOWN = 5  # of many names
Rows = list[tuple[str, str]]


def kind_of(path: Path) -> str:
    """The one of KINDS that a path is; ValueError for anything else."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    file = peft_folder.file_of(path)
    if file == path and file.suffix != ".bin":
        try:
            with safe_open(file, "pt") as opened:
                form = (opened.metadata() or {}).get("format")
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated, or no safetensors file: {error}") from error
        for kind, module in (("adapter", adapter_file), ("bank", bank_file)):
            if form == module.FORMAT:
                return kind
    method = str(peft_folder.config_of(file).get("peft_type"))
    if method in peft_folder.TYPES or method in OWN or method in OTHERS:
        return "peft"
    if method != "LORA":
        raise ValueError(f"{path} is an adapter of PEFT's {method}, which is not known here")
    keys = peft_folder.tensors_of(file)
    if peft_folder.config_of(file).get("use_dora") and any(
        ".lora_magnitude" in key for key in keys
    ):
        return "peft"
    return "official" if any(key.endswith(official.LATENT) for key in keys) else "lora"


def describe(path: Path) -> Rows:
    """Names and values of what there is to say."""
    kind = kind_of(path)
    file = peft_folder.file_of(path)
    if kind == "bank":
        rows = of_bank(path)
    elif kind == "lora":
        rows = of_contents(*plain_lora(file))
        config = peft_folder.config_of(file)
        rows.append(
            ("settings", ", ".join(name for name in VARIANTS if config.get(name)) or "none")
        )
    elif kind == "official":
        rows = of_contents(*official.read(path)[:2])
    else:
        rows = of_contents(*(adapter_file if kind == "adapter" else peft_folder).read(path))
    return [("kind", KINDS[kind]), *rows, ("size", f"{file.stat().st_size:,} bytes")]


def of_contents(config: dict[str, Any], tensors: dict[str, Tensor]) -> Rows:
    """The rows to print of one adapter."""
    entries = config["layers"]
    trained: dict[str, None] = {}
    frozen: dict[str, None] = {}
    count = 0
    for name, entry in entries.items():
        row = row_of(entry)
        for part in (*row.factors, "weight", "bias"):
            tensor = tensors.get(row.key(name, part))
            kind = str(tensor.dtype).removeprefix("torch.") if tensor is not None else "not inside"
            if part in entry["settings"]["train"]:
                trained[f"{part} {kind}"] = None
                count += tensor.numel() if tensor is not None else 0
            elif part not in ("weight", "bias"):
                frozen[f"{part} {kind}"] = None
    rows = [*of_layers(entries), ("trained", f"{', '.join(trained)}; {count:,} numbers")]
    rows.append(("frozen", ", ".join(frozen) or "none"))
    if config["modules_to_save"]:
        rows.append(("whole", ", ".join(config["modules_to_save"])))
    if config.get("tied"):
        rows.append(("tied", ", ".join(f"{name} to {to}" for name, to in config["tied"].items())))
    return rows


def of_layers(entries: dict[str, Any]) -> Rows:
    """The rows to print of the layers' settings."""
    settings = [entry["settings"] for entry in entries.values()]
    rows_of = [row_of(entry) for entry in entries.values()]
    ranks = dict.fromkeys(rank for row in rows_of for rank in row.ranks)
    rows = [
        ("method", listed(row.label for row in rows_of)),
        ("layers", shown(list(entries))),
        *((key, listed(own[key] for own in settings if key in own)) for key in ranks),
    ]
    rows.append(("scale", listed(f"{own['alpha'] / own['r']:g}" for own in settings)))
    return [row for row in rows if row[1]]


def of_bank(path: Path) -> Rows:
    """The rows to print of a bank, of whose adapters none is read."""
    config, names = bank_file.contents(path)
    with safe_open(path, "pt") as file:
        keys = [key for key in file.keys() if key.endswith((".core", ".left"))]  # noqa: SIM118
        kinds = listed(file.get_slice(key).get_dtype() for key in keys)
    rows = of_layers(config["layers"])[:-1]  # each adapter has a scale of its own
    return [*rows, ("cores", kinds), ("adapters", shown([repr(name) for name in names]))]


def plain_lora(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A plain LoRA as if it were ours; what belongs to a variant of it is left out."""
    config, entries, tensors = peft_folder.config_of(file), {}, {}
    for key, tensor in peft_folder.tensors_of(file).items():
        if match := official.FACTOR.fullmatch(key):
            name, part = match[1], official.FACTORS[match[2]]
            tensors[f"{name}.{part}"] = tensor
            r, alpha = peft_folder.scaling(config, name, file)
            settings = {"r": r, "alpha": alpha, "train": ("down", "up")}
            entries[name] = {"method": "lora", "settings": settings}
    return {"layers": entries, "modules_to_save": config.get("modules_to_save") or []}, tensors


def listed(values: Iterable[object]) -> str:
    """The different values, in their order."""
    return ", ".join(dict.fromkeys(map(str, values)))


def shown(names: list[str]) -> str:
    """The number of names, and the first of them."""
    more = ", …" if len(names) > SHOWN else ""
    return f"{len(names):,}: {', '.join(name[:80] for name in names[:SHOWN])}{more}"
