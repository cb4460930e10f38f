"""Banks in files: one safetensors file with all adapters, a tensor of them for each layer's core.

{layer}.core         (n, P, Q), or .left (n, P, r) and .right (n, r, Q), as the bank stores them
{layer}.scales       float32 (n,)
{layer}.fingerprint  as in an adapter's file
{layer}.<factor>     what else all adapters have in common, VeRA's b
names                uint8: all names in UTF-8, one after the other
names.offsets        int64 (n + 1,): where in it each begins, and where the last one ends
metadata             {"format": "fused_lowrank bank", "version": "1", "config": JSON}
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from ..files.contents import form_of, opened, replacing
from ..files.fingerprint import FINGERPRINT
from ..methods import METHODS
from .sources import Found, check_core, check_names, checked, joined, others_of
from .store import AdapterStore
from .tables import index_of

FORMAT, VERSION = "fused_lowrank bank", "1"
TYPES = {  # the widest first: written in this order, every tensor is aligned
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}


def save(store: AdapterStore, path: str | os.PathLike[str], names: Sequence[str] | None) -> None:
    """Write the named adapters, or all, as they are when it begins."""
    store.shared.check()
    with store.holding(names) as slots:
        encoded = [name.encode("utf-8", "surrogatepass") for name in slots]
        whole = {
            "names": torch.tensor(bytearray(b"".join(encoded)), dtype=torch.uint8),
            "names.offsets": torch.tensor([0, *itertools.accumulate(map(len, encoded))]),
        }
        tables = {}
        for layer, table in store.tables.items():
            whole[f"{layer}.{FINGERPRINT}"] = store.shared.fingerprints[layer]
            own = store.layers[layer]
            whole |= {f"{layer}.{label}": getattr(own, label) for label in others_of(own)}
            held = [values for values in table if values is not None]
            for part, values in zip(parts(table.right is not None), held, strict=True):
                tables[f"{layer}.{part}"] = values
        config = {
            "layers": {
                name: {
                    "method": layer.method,
                    "settings": layer.settings(),
                    "base": form_of(layer),
                }
                for name, layer in store.layers.items()
            }
        }
        metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(config)}
        with replacing(path) as unfinished, open(unfinished, "wb") as file:
            write(file, metadata, whole, tables, list(slots.values()), store.device)


def parts(pairs: bool) -> tuple[str, ...]:
    """The names of a layer's tensors, in the order of `CoreTable`."""
    return ("left", "right", "scales") if pairs else ("core", "scales")


def write(
    file: BinaryIO,
    metadata: Mapping[str, str],
    whole: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
    slots: list[int],
    device: torch.device,
) -> None:
    """The safetensors format: the length of the header, the header, the tensors.

    Of the tables only the slots are written, one table gathered after the other: safetensors' own
    writer wants all of them at once, a second bank.
    """
    tensors = {**whole, **tables}
    order = sorted(tensors, key=lambda key: list(TYPES).index(tensors[key].dtype))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key in order:
        tensor = tensors[key]
        shape = [len(slots), *tensor.shape[1:]] if key in tables else list(tensor.shape)
        begin, end = end, end + tensor.itemsize * math.prod(shape)
        header[key] = {"dtype": TYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    where = index_of(slots, device)
    for key in order:
        tensor = tensors[key][where] if key in tables else tensors[key]
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def load(store: AdapterStore, path: str | os.PathLike[str], progress: bool) -> None:
    """Put the adapters of a file into the bank, after all checks; it is read while they run."""
    store.shared.check()
    config, tensors = opened(path, "bank", FORMAT, VERSION)
    check_names(store, {n: entry["method"] for n, entry in config["layers"].items()}, str(path))
    pairs = {name: f"{name}.left" in tensors for name in store.layers}
    expected = {f"{n}.{part}" for n in pairs for part in (*parts(pairs[n]), FINGERPRINT)}
    expected |= {f"{n}.{label}" for n, layer in store.layers.items() for label in others_of(layer)}
    expected |= {"names", "names.offsets"}
    for key in sorted(expected ^ tensors.keys()):
        what = "lacks" if key in expected else "holds an unexpected"
        raise ValueError(f"{path} {what} {key}: it is damaged")
    names = decoded(tensors["names"], tensors["names.offsets"], path)
    cores = {}
    for name in tqdm(store.layers, "load", disable=not progress, unit="layer"):
        *values, scales = (tensors[f"{name}.{part}"] for part in parts(pairs[name]))
        core = joined(values)
        check_core(store.layers[name], core, len(names), name, str(path))
        if scales.shape != (len(names),) or scales.dtype != torch.float32:
            raise ValueError(f"{path} is damaged: {name}.scales are not one for each adapter")
        others: dict[str, Tensor | None] = {
            label: tensors[f"{name}.{label}"] for label in others_of(store.layers[name])
        }
        part = Found(core, scales, fingerprint=tensors[f"{name}.{FINGERPRINT}"], others=others)
        part.entry = config["layers"][name]
        cores[name] = checked(store, name, part, str(path))
    store.put(names, cores)


def contents(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """The config and the names of a file, without reading what is in it for them."""
    listed = ("names", "names.offsets")
    config, found = opened(path, "bank", FORMAT, VERSION, listed)
    for key in listed:
        if key not in found:
            raise ValueError(f"{path} lacks {key}: it is damaged")
    return config, decoded(found["names"], found["names.offsets"], path)


def one(path: str | os.PathLike[str], name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter of a file, as `contents.read` has one that was saved without frozen factors.

    Reads no other adapter. Raises ValueError for a name that is not there, and for LoRA-Mini, whose
    frozen factors are in no file of a bank and in no base model.
    """
    config, names = contents(path)
    if name not in names:
        raise ValueError(f"{path} has no adapter called {name!r}, but {len(names)} others")
    layers, tensors, where = {}, {}, slice(names.index(name), names.index(name) + 1)
    with safe_open(path, "pt") as file:
        for layer, entry in config["layers"].items():
            if "svd" not in METHODS[entry["method"]][0].row.options:
                raise ValueError(
                    f"{path} is of {entry['method']}, whose frozen factors are random and in no "
                    "file of a bank: load it into the model it was saved from"
                )
            try:
                scale = float(file.get_slice(f"{layer}.scales")[where])
                settings = {**entry["settings"], "alpha": scale * entry["settings"]["r"]}
                tensors[f"{layer}.core"] = file.get_slice(f"{layer}.core")[where][0]
                tensors[f"{layer}.{FINGERPRINT}"] = file.get_tensor(f"{layer}.{FINGERPRINT}")
            except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
                raise ValueError(f"{path} is damaged: {layer} cannot be read ({error})") from error
            layers[layer] = {**entry, "settings": settings}
    return {"layers": layers, "modules_to_save": [], "bases": False}, tensors


def decoded(names: Tensor, offsets: Tensor, path: str | os.PathLike[str]) -> list[str]:
    """The names of a file."""
    try:
        if offsets.dtype != torch.int64 or offsets.dim() != 1 or names.dtype != torch.uint8:
            raise ValueError("they are of another dtype")
        text, ends = names.numpy().tobytes(), offsets.tolist()
        spans = list(itertools.pairwise(ends))
        if ends[:1] != [0] or ends[-1] != len(text) or any(a > b for a, b in spans):
            raise ValueError("their offsets are wrong")
        return [text[a:b].decode("utf-8", "surrogatepass") for a, b in spans]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: the names cannot be read ({error})") from error
