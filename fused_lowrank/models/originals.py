"""The weights that a model's were quantised from, as init="loftq" takes them from adapt's `data`.

They are those of a model whose modules have the same names, of a mapping such as its state_dict, or
of safetensors: a file, or a folder of them, of which one tensor is read at a time. Names may begin
with transformers' base_model_prefix in the one and not in the other.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..context.elsewhere import hook_of, value_of
from ..methods.accept import WEIGHT_DTYPES, is_dense, special_tensor
from ..methods.initial.values import Inputs
from .targets import modules_by_name

INDEX = "*.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls WEIGHT_DTYPES
HOW = (
    "data is the model that was quantised, a mapping of its weights by name (its state_dict, say), "
    "or the path of its safetensors, a file or a folder"
)


class Source(NamedTuple):
    """Tensors by key, each read when it is asked for."""

    keys: list[str]
    facts: Callable[[str], tuple[tuple[int, ...], str | None]]  # (shape, why it is no weight)
    read: Callable[[str], Tensor]


class Originals(Mapping[str, Inputs]):
    """The originals of the layers of a plan, each read when its layer is made.

    Raises ValueError, naming the layer, for one that is not quantised, not in `data`, of another
    shape, or quantised there as well; FileNotFoundError for a path where nothing is.
    """

    def __init__(self, model: nn.Module, plan: Iterable[str], data: Any) -> None:
        self.source = source_of(data)
        modules, there = modules_by_name(model), set(self.source.keys)
        prefixes = {getattr(own, "base_model_prefix", "") for own in (model, data)} - {""}
        self.keys_of: dict[str, tuple[str, bool]] = {}
        if dense := [name for name in plan if is_dense(modules[name])]:
            raise ValueError(
                f"{', '.join(dense)}: init='loftq' makes up for what quantising took from a "
                "weight, and nothing was taken here, where it is a plain matrix: leave such layers "
                "out by exclude_modules, or take another init"
            )
        for name in plan:
            module: Any = modules[name]
            key = next((key for key in spelled(name, prefixes) if key in there), None)
            if key is None:
                raise ValueError(missing(name, self.source.keys))
            turned = getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"
            shape, reason = self.source.facts(key)
            if reason:
                raise ValueError(f"{name}: {key} in data {reason}: give what it was quantised from")
            own = (module.out_features, module.in_features)
            if shape != (own[::-1] if turned else own):
                raise ValueError(
                    f"{name}: {key} in data is {shape}, and the layer's weight {own}: {HOW}"
                )
            self.keys_of[name] = key, turned

    def __getitem__(self, name: str) -> Inputs:
        key, turned = self.keys_of[name]
        original = self.source.read(key)
        return Inputs(original=original.t() if turned else original)

    def __contains__(self, name: object) -> bool:
        return name in self.keys_of  # Mapping's own would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


def require_original(data: Any) -> None:
    """Raise TypeError unless data may have the weights of a model."""
    if not isinstance(data, nn.Module | Mapping | str | os.PathLike):
        raise TypeError(f"data is a {type(data).__name__}, and init='loftq' takes none: {HOW}")


def spelled(name: str, prefixes: set[str]) -> Iterator[str]:
    """The keys that a layer's weight may have."""
    yield f"{name}.weight"
    for prefix in prefixes:
        yield f"{prefix}.{name}.weight"
        if name.startswith(f"{prefix}."):
            yield f"{name.removeprefix(f'{prefix}.')}.weight"


def missing(name: str, keys: list[str]) -> str:
    """The message for a layer whose weight is not there."""
    close = difflib.get_close_matches(f"{name}.weight", keys, 3, 0.0)
    has = f"it has {', '.join(close)}, …" if close else "it has none"
    return (
        f"{name}: data has no {name}.weight: {has} The names must be the model's: a model of the "
        "same class, loaded in 16 bits, has them"
    )


def source_of(data: Any) -> Source:
    """The tensors of a model, of a mapping, or of files."""
    if isinstance(data, nn.Module):
        return of_model(data)
    if isinstance(data, Mapping):
        return Source([str(key) for key in data], lambda key: facts_of(data[key]), data.__getitem__)
    return of_files(Path(data))


def facts_of(tensor: Any) -> tuple[tuple[int, ...], str | None]:
    """(the shape of a tensor, the reason why it is no weight in full)."""
    if kind := special_tensor(tensor):
        return (), f"is a {kind}"
    if tensor.dtype not in WEIGHT_DTYPES:
        return (), f"is of {tensor.dtype}"
    return tuple(tensor.shape), None


def of_model(model: nn.Module) -> Source:
    """The weights of a model's modules, wherever they are between calls."""
    modules = {
        f"{name}.weight": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(getattr(module, "weight", None), Tensor)
    }

    def read(key: str) -> Tensor:
        return value_of(modules[key], "weight").detach()

    def facts(key: str) -> tuple[tuple[int, ...], str | None]:
        own, reason = facts_of(modules[key].weight)
        return own, reason or ("is on the meta device" if value_is_lost(modules[key]) else None)

    return Source(list(modules), facts, read)


def value_is_lost(module: Any) -> bool:
    """Whether the weight of a module has no values, here or elsewhere."""
    return module.weight.is_meta and hook_of(module) is None


def of_files(path: Path) -> Source:
    """The tensors of a file of safetensors, or of those in a folder, or that an index names."""
    if not path.exists():
        raise FileNotFoundError(
            f"data is {str(path)!r}, where there is nothing: {HOW}; "
            "huggingface_hub.snapshot_download(name) gives the folder of a model on the Hub"
        )
    where = files_of(path)

    def opened(file: Path) -> Any:
        try:
            return safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"data: {file} is no file of safetensors ({error})") from None

    if not isinstance(where, dict):
        found: dict[str, Path] = {}
        for file in where:
            with opened(file) as tensors:
                for key in tensors.keys():  # noqa: SIM118, it is no mapping
                    if key in found:
                        raise ValueError(
                            f"data: {key} is in {found[key].name} and in {file.name}: give one file"
                        )
                    found[key] = file
        where = found

    def facts(key: str) -> tuple[tuple[int, ...], str | None]:
        with opened(where[key]) as tensors:
            own = tensors.get_slice(key)
            dtype = own.get_dtype()
            return tuple(own.get_shape()), None if dtype in FLOATS else f"is of {dtype}"

    def read(key: str) -> Tensor:
        with opened(where[key]) as tensors:
            found: Tensor = tensors.get_tensor(key)
            return found

    return Source(list(where), facts, read)


def files_of(path: Path) -> list[Path] | dict[str, Path]:
    """The files at a path or, by an index of shards, the file of each key."""
    index = path if path.name.endswith(INDEX.removeprefix("*")) else None
    if path.is_dir():
        whole = path / "model.safetensors"
        indices = [] if whole.exists() else sorted(path.glob(INDEX))
        if len(indices) > 1:
            raise ValueError(f"data: {path} has {len(indices)} indices of shards: give one of them")
        if not indices:
            files = [whole] if whole.exists() else sorted(path.glob("*.safetensors"))
            if not files:
                raise ValueError(
                    f"data: {path} has no safetensors: load the model in 16 bits and give it, or "
                    "save it by save_pretrained"
                )
            return files
        index = indices[0]
    if index is None:
        return [path]
    try:
        shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: {index} is no index of shards ({error!r})") from None
    return {key: index.parent / file for key, file in shards.items()}
