"""What adapters are put into a bank from: a file, a state_dict or a model, checked against it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapt import adapted_layers
from .adapter_file import (
    BASES_TOLERANCE,
    FINGERPRINT,
    WEIGHT_PROBES,
    WEIGHT_TOLERANCE,
    read,
)
from .layers import LowRankLinear

if TYPE_CHECKING:
    from .bank import AdapterBank

Cores = Mapping[str, tuple[Tensor, Tensor | None, Tensor]]  # by layer: left, right, scales


@dataclass
class Found:
    """One layer's part of a source; what it does not have is None."""

    core: Any  # (p, q), or the pair (p, r), (r, q)
    scale: float
    down: Tensor | None = None  # (p, K)
    up: Tensor | None = None  # (N, q)
    weight: Tensor | None = None  # (N, K)
    fingerprint: Tensor | None = None


def cores_of(bank: AdapterBank, source: Any) -> Cores:
    """The adapter of a source as the bank's tables hold it, with a first dimension of 1."""
    if isinstance(source, nn.Module):
        what, found = "the model", of_model(bank, source)
    elif isinstance(source, Mapping):
        what, found = "the state_dict", of_state(bank, source)
    elif isinstance(source, str | os.PathLike):
        what, found = str(source), of_file(bank, source)
    else:
        raise ValueError(
            f"source is a {type(source).__name__}: it must be a path, a state_dict or a model"
        )
    cores = {}
    for name, part in found.items():
        left, right = fitted(bank, name, part, what)
        check_bases(bank, name, part, what)
        cores[name] = single(left, right, part.scale)
    check_finite(cores, what)
    return cores


def fresh_cores(bank: AdapterBank) -> Cores:
    """A new adapter, as the method starts one, at the model's own alpha."""
    cores = {}
    for name, layer in bank.layers.items():
        core = layer.core_factors
        with torch.no_grad():
            new: Any = tuple(map(torch.empty_like, core)) if isinstance(core, tuple) else None
            new = torch.empty_like(core) if new is None else new  # type: ignore[arg-type]
            layer.fill_core(new)
        left, right = stored(bank, name, new)
        cores[name] = single(left, right, layer.scale)
    return cores


def single(
    left: Tensor, right: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One adapter's part of one layer, with a first dimension of 1."""
    return left[None], None if right is None else right[None], torch.tensor([scale])


def stored(bank: AdapterBank, name: str, core: Any) -> tuple[Tensor, Tensor | None]:
    """A core as the bank stores it: as the pair or as its product."""
    if bank.shelves[name].right is not None:
        return core
    if not isinstance(core, tuple):
        return core, None
    return core[0].detach().float() @ core[1].detach().float(), None


def fitted(bank: AdapterBank, name: str, part: Found, what: str) -> tuple[Tensor, Tensor | None]:
    """A core as the bank stores it, in its size: a smaller one is its first rows and columns."""
    left, right = stored(bank, name, part.core)
    fits: list[Tensor | None] = []
    for ours, theirs in zip(bank.shelves[name][:2], (left, right), strict=True):
        if ours is None or theirs is None:
            fits.append(None)
            continue
        size = ours.shape[1:]
        if theirs.dim() != 2 or any(a > b for a, b in zip(theirs.shape, size, strict=True)):
            raise ValueError(
                f"{what} does not fit the bank: the core of {name} is {tuple(theirs.shape)} there "
                f"and at most {tuple(size)} here"
            )
        whole = theirs.new_zeros(size)
        whole[: theirs.shape[0], : theirs.shape[1]] = theirs.detach()
        fits.append(whole)
    p, q = sides(part.core)
    if (p, q) != (bank.layers[name].down.shape[0], bank.layers[name].up.shape[1]):
        has = part.fingerprint is not None or (part.down is not None and part.up is not None)
        if not has:
            raise ValueError(
                f"{what}: the core of {name} is of a smaller rank than the bank's, and without its "
                "down and up nobody can say whether they are the first of the bank's"
            )
    assert fits[0] is not None
    return fits[0], fits[1]


def sides(core: Any) -> tuple[int, int]:
    """(P, Q) of a core."""
    first, last = core if isinstance(core, tuple) else (core, core)
    return first.shape[0], last.shape[1]


def check_bases(bank: AdapterBank, name: str, part: Found, what: str) -> None:
    """Raise unless the source's frozen factors are the bank's, or the first ones of them."""
    layer, (p, q) = bank.layers[name], sides(part.core)
    another = f"{what} was made for another base: "
    for label, ours, theirs in (
        ("down", layer.down[:p], part.down),
        ("up", layer.up[:, :q], part.up),
    ):
        if theirs is not None and not alike(ours, theirs, BASES_TOLERANCE):
            raise ValueError(f"{another}{label} of {name} is not the bank's, nor the first of it")
    if part.weight is not None and not alike(layer.base_weight, part.weight, WEIGHT_TOLERANCE):
        raise ValueError(f"{another}the weight of {name} differs")
    if part.fingerprint is None:
        return
    ours = bank.fingerprint(name)
    down, up, weight = ours.split([layer.down.shape[0], layer.up.shape[1], 1 + WEIGHT_PROBES])
    if part.fingerprint.shape != (p + q + 1 + WEIGHT_PROBES,):
        raise ValueError(f"{what} is damaged: the fingerprint of {name} is not of its ranks")
    their_down, their_up, their_weight = part.fingerprint.split([p, q, 1 + WEIGHT_PROBES])
    if not (weight - their_weight).abs().max() <= WEIGHT_TOLERANCE * their_weight[0]:
        raise ValueError(f"{another}the weight of {name} differs")
    pairs = (down[:p], their_down), (up[:q], their_up)
    if not all(alike(mine, other, BASES_TOLERANCE) for mine, other in pairs):
        raise ValueError(f"{another}down and up of {name} are not the bank's, nor the first of it")


def alike(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether two tensors are of one shape and differ by no more than rounding."""
    if ours.shape != theirs.shape:
        return False
    a, b = ours.detach().double(), theirs.detach().to(ours.device).double()
    return bool((a - b).norm() <= tolerance * b.norm())


def check_finite(cores: Cores, what: str) -> None:
    """Raise if a core or a scale is NaN or Inf."""
    for name, parts in cores.items():
        for part in parts:
            if part is not None and not bool(torch.isfinite(part).all()):
                raise ValueError(f"{what}: the core of {name} holds NaN or Inf")


# --- the three kinds of sources ---


def of_model(bank: AdapterBank, model: nn.Module) -> dict[str, Found]:
    """The adapter that a model carries."""
    there = dict(adapted_layers(model))
    check_names(bank, {name: layer.method for name, layer in there.items()}, "the model")
    return {
        name: Found(layer.core_factors, layer.scale, layer.down, layer.up, layer.base_weight)
        for name, layer in there.items()
    }


def of_file(bank: AdapterBank, path: Any) -> dict[str, Found]:
    """The adapter in a file of `save_adapter`."""
    config, tensors = read(path)
    methods = {name: entry["method"] for name, entry in config["layers"].items()}
    check_names(bank, methods, str(path))
    if config["modules_to_save"]:
        modules = ", ".join(config["modules_to_save"])
        raise ValueError(f"{path} trains {modules} whole: a bank holds cores alone")
    found = {}
    for name, layer in bank.layers.items():
        settings = config["layers"][name]["settings"]
        if {"down", "up", "weight", "bias"} & set(settings["train"]):
            raise ValueError(f"{path} trains more of {name} than its core: {settings['train']}")
        part = of_tensors(layer, name, tensors.get, str(path))
        part.scale = settings["alpha"] / settings["r"]
        part.fingerprint = tensors.get(f"{name}.{FINGERPRINT}")
        if part.fingerprint is None:
            raise ValueError(f"{path} lacks {name}.{FINGERPRINT}: it is damaged")
        part.down = part.up = part.weight = None  # the fingerprint is of them
        found[name] = part
    return found


def of_state(bank: AdapterBank, state: Mapping[str, Any]) -> dict[str, Found]:
    """The adapter in a state_dict, of the model or of its trained parameters alone."""
    return {
        name: of_tensors(layer, name, state.get, "the state_dict")
        for name, layer in bank.layers.items()
    }


def of_tensors(
    layer: LowRankLinear, name: str, get: Callable[[str], Tensor | None], what: str
) -> Found:
    """A layer's part, its tensors got by their names."""
    values = [get(f"{name}.{factor}") for factor in layer.factors if factor not in ("down", "up")]
    if any(value is None for value in values):
        names = [factor for factor in layer.factors if factor not in ("down", "up")]
        raise ValueError(f"{what} lacks {' or '.join(f'{name}.{factor}' for factor in names)}")
    core: Any = values[0] if len(values) == 1 else tuple(values)
    pair = core if isinstance(core, tuple) else (core,)
    chained = all(part.dim() == 2 for part in pair) and (
        len(pair) == 1 or pair[0].shape[1] == pair[1].shape[0]
    )
    if not chained or not all(part.is_floating_point() for part in pair):
        raise ValueError(f"{what}: the core of {name} is damaged")
    rest = (get(f"{name}.{part}") for part in ("down", "up", "weight"))
    return Found(core, layer.scale, *rest)


def check_names(bank: AdapterBank, methods: Mapping[str, str], what: str) -> None:
    """Raise unless the source adapts the layers of the bank, by the same methods."""
    ours = {name: layer.method for name, layer in bank.layers.items()}
    if ours != methods:
        name = next(n for n in [*ours, *methods] if ours.get(n) != methods.get(n))
        raise ValueError(
            f"{what} does not fit the bank: {name} is {methods.get(name, 'not adapted')} there and "
            f"{ours.get(name, 'not adapted')} here"
        )
