"""The contents of an adapter's file: its config and its tensors, as they lie there."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..compute.base import kinds
from ..methods import METHODS, LowRankLinear, row_of
from ..methods.accept import WEIGHT_DTYPES
from ..methods.initial.values import needs
from ..methods.variants import variant
from ..models.adapt import Plan
from ..models.targets import modules_by_name
from . import peft_folder

FORMAT, VERSION = "fused_lowrank", "1"
LATER = {"init"}  # keywords that older files lack, which mean their defaults
ANY_SIDE = 2**20  # of a layer, for checks that ask for no model


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end and is gone if that fails."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{os.fspath(path)}.{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def entry_of(layer: LowRankLinear) -> dict[str, Any]:
    """The entry of a layer in a file: its method, its settings and the form that its base is stored
    in; and the sizes of one whose factors do not tell them.
    """
    method, settings = layer.method, layer.settings()
    entry: dict[str, Any] = {"method": method, "settings": settings, "base": form_of(layer)}
    if layer.row.parts is not None:
        entry["sizes"] = [layer.in_features, layer.out_features]
    return entry


def form_of(layer: LowRankLinear) -> str | None:
    """The form that the base of a layer is stored in; None for a plain matrix."""
    return kinds.form_of(layer.base_weight)


def require_path(path: Any, call: str) -> None:
    """Raise TypeError for what is no path, as where arguments were swapped; `call` says how."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is a {type(path).__name__}: it must be a path; call {call}")


def opened(
    path: str | os.PathLike[str],
    kind: str,
    form: str,
    version: str,
    only: Collection[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors, or some of them, as they lie in the file.

    Raises ValueError for a file of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = [key for key in file.keys() if only is None or key in only]  # noqa: SIM118
            tensors = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, or no safetensors file: {error}") from error
    if metadata.get("format") != form:
        raise ValueError(f"{path} is no {kind} of this library: its metadata do not say so")
    if metadata.get("version") != version:
        raise ValueError(
            f"{path} is of format version {metadata.get('version')}; this library reads {version}"
        )
    try:
        config = json.loads(metadata["config"])
        for entry in config["layers"].values():
            cls = METHODS[entry["method"]][0]
            checked = cls(ANY_SIDE, ANY_SIDE, device="meta", **entry["settings"]).settings()
            if missing := checked.keys() - entry["settings"].keys() - LATER:
                raise TypeError(f"no {', '.join(sorted(missing))}")
            entry["settings"] = checked
        if not config["layers"]:
            raise TypeError("no layers")
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise unreadable(path, error) from error
    return config, tensors


def unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """The error of a config that this library did not write."""
    return ValueError(f"{path}: its config cannot be read ({error!r})")


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of an adapter's file, or a ValueError that says what is wrong.

    Of a folder of PEFT's, or the file with the tensors in one, those of its LoRA-XS or LoRA-Mini.
    """
    if peft_folder.is_folder(path):
        return peft_folder.read(path)
    config, tensors = opened(path, "adapter", FORMAT, VERSION)
    try:
        if config["bases"] not in (True, False):
            raise TypeError("bases is neither true nor false")
        config["modules_to_save"] = [str(name) for name in config["modules_to_save"]]
        tied = config.get("tied")  # of files before there were ties: none
        for name, source in ({} if tied is None else tied).items():
            if not isinstance(source, str) or source not in tensors or name == source:
                raise TypeError(f"{name} is tied to {source}, which is not there")
    except (KeyError, TypeError, AttributeError) as error:
        raise unreadable(path, error) from error
    return config, tensors


def plan_of(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], fused: bool, path: Any
) -> Plan:
    """The layers that a file asks for, as modules of this model."""
    modules = modules_by_name(model)
    plan: Plan = {}
    for name, entry in config["layers"].items():
        if name not in modules:
            raise ValueError(f"{path} adapts {name}, but this model has no such module")
        cls, settings = METHODS[entry["method"]][fused], entry["settings"]
        row = row_of(entry)
        keys = [row.key(name, f) for f in row.factors if f in settings["train"]]
        trained = [tensors.get(key) for key in keys]
        dtypes = [tensor.dtype for tensor in trained if tensor is not None]
        dtype = dtypes[0] if dtypes and dtypes[0] in WEIGHT_DTYPES else None
        plan[name] = cls, {**settings, "dtype": dtype}
    return plan


def holds_factors(
    config: dict[str, Any], plan: Plan, tensors: Mapping[str, Tensor], path: Any
) -> bool:
    """Whether a file has all factors that its layers save, so that none needs to be made.

    Raises ValueError if it lacks some that only data would make again.
    """
    lacking = [
        keywords.get("init", "")
        for name, (cls, keywords) in plan.items()
        for row in [variant(cls.row, keywords)]
        for factor, own in row.factors.items()
        if own.saved and row.key(name, factor) not in tensors
    ]
    if config["bases"] or not lacking:
        return True
    if init := next((init for init in lacking if needs(init)), None):
        of = "the weights of before" if needs(init) == "original" else "a model's inputs"
        raise ValueError(
            f"{path} was saved without its frozen factors, which init={init!r} made of {of}: save "
            "it with bases=True"
        )
    return False
