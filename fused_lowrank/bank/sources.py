"""Sources of a bank's adapters: a file, a state_dict or a model, checked against the bank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.base.protocol import Base, dense
from ..compute.reference import is_diagonal
from ..context.elsewhere import here, is_known, tensors_of
from ..files import peft_folder
from ..files.contents import form_of, read
from ..files.fingerprint import (
    FINGERPRINT,
    NEAR,
    WEIGHT_PROBES,
    WEIGHT_TOLERANCE,
    alike,
    fingerprint_of,
    is_near,
)
from ..files.other_base import refuse_other_base, refuse_other_form
from ..methods import LowRankLinear, row_of
from ..methods.accept import WEIGHT_DTYPES
from ..methods.method import MAGNITUDE
from ..models.adapt import adapted_layers
from ..models.targets import check_places
from ..models.whole_modules import saved_modules
from .store import AdapterStore
from .tables import Cores


@dataclass
class Found:
    """One layer's part of a source of n adapters; what it does not have is None."""

    core: Any  # (n, p, q), or diagonals (n, p), or the pair (n, p, r), (n, r, q)
    scales: Tensor  # float32 (n,)
    down: Tensor | None = None  # (p, K)
    up: Tensor | None = None  # (N, q)
    weight: Tensor | None = None  # (N, K)
    fingerprint: Tensor | None = None
    others: dict[str, Tensor | None] = field(default_factory=dict)  # factors beside these
    entry: Mapping[str, Any] = field(default_factory=dict)  # what its file says of the layer


def cores_of(store: AdapterStore, model: nn.Module, source: Any) -> Cores:
    """The adapter of a source as the tables of a model's bank hold it, with a first dimension of 1.

    None: a fresh one. Raises ValueError where it does not fit, and RuntimeError where what the
    adapters share is not what it was.
    """
    store.shared.check()
    if source is None:
        return fresh_cores(store)
    if peft_folder.is_model(source):
        what, found = (
            "the model",
            of_contents(store, model, *peft_folder.of_model(source), "the model"),
        )
    elif isinstance(source, nn.Module):
        what, found = "the model", of_model(store, source)
    elif isinstance(source, Mapping):
        what, found = "the state_dict", of_state(store, source)
    elif isinstance(source, str | os.PathLike):
        what, found = str(source), of_contents(store, model, *read(source), str(source))
    else:
        raise ValueError(
            f"source is a {type(source).__name__}: it must be a path, a state_dict or a model"
        )
    return {name: checked(store, name, part, what) for name, part in found.items()}


def source_name(source: Any) -> str:
    """A source in a message."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    return "the state_dict" if isinstance(source, Mapping) else "the model"


def fresh_cores(store: AdapterStore) -> Cores:
    """A new adapter, as the method starts one, at the model's own alpha."""
    cores = {}
    for name, layer in store.layers.items():
        core = layer.core_factors
        with torch.no_grad():
            new: Any = tuple(map(torch.empty_like, core)) if isinstance(core, tuple) else None
            new = torch.empty_like(core) if new is None else new  # type: ignore[arg-type]
            layer.fill_core(new)
        cores[name] = (*stored(store, name, single(new), ""), torch.tensor([layer.scale]))
    return cores


def checked(
    store: AdapterStore, name: str, part: Found, what: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A layer's cores as the bank stores them and the scales; ValueError if they do not fit it."""
    left, right = fitted(store, name, part, what)
    with here(store.layers[name]):
        check_bases(store, name, part, what)
    cores = left, right, part.scales
    for ours, values in zip(store.tables[name], cores, strict=True):
        if ours is not None and values is not None and not holds(ours.dtype, values):
            raise ValueError(
                f"{what}: the core of {name} holds NaN, Inf, or more than {ours.dtype} can hold"
            )
    return cores


def single(core: Any) -> Any:
    """The core of one adapter as that of n."""
    return tuple(part[None] for part in core) if isinstance(core, tuple) else core[None]


def joined(values: Sequence[Any]) -> Any:
    """A core of one tensor, or of two."""
    return values[0] if len(values) == 1 else tuple(values)


def stored(store: AdapterStore, name: str, core: Any, what: str) -> tuple[Tensor, Tensor | None]:
    """Cores as the bank stores them: as pairs or as their products."""
    if store.tables[name].right is not None:
        if not isinstance(core, tuple):
            raise ValueError(f"{what} holds cores of {name}, where the bank holds pairs")
        return core
    if not isinstance(core, tuple):
        return core, None
    left, right = (part.detach() for part in core)
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return left.to(dtype) @ right.to(dtype), None


def fitted(store: AdapterStore, name: str, part: Found, what: str) -> tuple[Tensor, Tensor | None]:
    """Cores as the bank stores them, in its size: a smaller one is its first rows and columns."""
    pair = stored(store, name, part.core, what)
    left, right = (
        None if theirs is None or ours is None else padded(theirs, ours, name, what)
        for theirs, ours in zip(pair, store.tables[name], strict=False)
    )
    if sides(part.core) != whole_sides(store, name):
        has = part.fingerprint is not None or (part.down is not None and part.up is not None)
        if not has:
            raise ValueError(
                f"{what}: the core of {name} is of a smaller rank than the bank's, and without its "
                "down and up nobody can say whether they are the first of the bank's"
            )
    assert left is not None
    return left, right


def padded(theirs: Tensor, ours: Tensor, name: str, what: str) -> Tensor:
    """Matrices (n, p, q) as the first rows and columns of such as the bank's, (…, P, Q).

    Or diagonals (n, p) as the first numbers of such as the bank's, (…, P).
    """
    size = ours.shape[1:]
    if theirs.shape[1:] == size:
        return theirs.detach()
    same = theirs.dim() == ours.dim()
    if not same or any(a > b for a, b in zip(theirs.shape[1:], size, strict=True)):
        raise ValueError(
            f"{what} does not fit the bank: the core of {name} is {tuple(theirs.shape[1:])} there "
            f"and at most {tuple(size)} here"
        )
    whole = theirs.new_zeros(len(theirs), *size)
    whole[tuple(map(slice, theirs.shape))] = theirs.detach()
    return whole


def sides(core: Any) -> tuple[int, int]:
    """(p, q) of cores."""
    first, last = core if isinstance(core, tuple) else (core, core)
    return first.shape[1], last.shape[-1]


def whole_sides(store: AdapterStore, name: str) -> tuple[int, int]:
    """(P, Q) of a layer's cores in the bank."""
    table = store.tables[name]
    return table.left.shape[1], (table.left if table.right is None else table.right).shape[-1]


def check_bases(store: AdapterStore, name: str, part: Found, what: str) -> None:
    """Raise unless the source's frozen factors are the bank's, or the first ones of them."""
    layer, (p, q) = store.layers[name], sides(part.core)
    down, up = layer.bases
    another = f"{what} was made for another base: "
    for label, ours, theirs in (
        ("down", down[:p], part.down),
        ("up", up[:, :q], part.up),
    ):
        if theirs is not None and not alike(ours, theirs):
            raise ValueError(f"{another}{label} of {name} is not the bank's, nor the first of it")
    for label, theirs in part.others.items():
        if theirs is None or not alike(getattr(layer, label), theirs):
            raise ValueError(
                f"{what} has another {label} of {name} than the bank, whose adapters share it, or "
                f"does not say which: a bank of {layer.method} holds adapters that train the core, "
                f"{', '.join(layer.row.core)}, alone"
            )
    if part.weight is not None:
        ours = dense(layer.base_weight)
        near = partial(alike, ours, part.weight, NEAR)
        refuse_other_form(name, part.entry, form_of(layer), what, near)
        if not alike(ours, part.weight, WEIGHT_TOLERANCE):
            refuse_other_base(name, f"{another}the weight of {name} differs")
    if part.fingerprint is None:
        return
    ours = store.shared.fingerprints[name]
    down, up, weight = ours.split([len(down), up.shape[1], 1 + WEIGHT_PROBES])
    if part.fingerprint.shape != (p + q + 1 + WEIGHT_PROBES,):
        raise ValueError(f"{what} is damaged: the fingerprint of {name} is not of its ranks")
    their_down, their_up, their_weight = part.fingerprint.split([p, q, 1 + WEIGHT_PROBES])
    near = partial(is_near, weight, their_weight)
    refuse_other_form(name, part.entry, form_of(layer), what, near)
    if not (weight - their_weight).abs().max() <= WEIGHT_TOLERANCE * their_weight[0]:
        refuse_other_base(name, f"{another}the weight of {name} differs")
    pairs = (down[:p], their_down), (up[:q], their_up)
    if not all(alike(mine, other) for mine, other in pairs):
        raise ValueError(f"{another}down and up of {name} are not the bank's, nor the first of it")


def holds(dtype: torch.dtype, values: Tensor) -> bool:
    """Whether a dtype can hold the values, which are no NaN either."""
    if not values.numel():
        return True
    low, high = values.detach().aminmax()
    return -torch.finfo(dtype).max <= float(low) and float(high) <= torch.finfo(dtype).max


def check_core(layer: LowRankLinear, core: Any, count: int, name: str, what: str) -> None:
    """Raise unless these are cores of `count` adapters, diagonals where the layer's is one."""
    pair = core if isinstance(core, tuple) else (core,)
    dim = 2 if is_diagonal(layer.core_factors) else 3
    sound = all(part.dim() == dim and len(part) == count for part in pair)
    if not sound or any(part.dtype not in WEIGHT_DTYPES for part in pair):
        raise ValueError(f"{what}: the core of {name} is damaged")
    if len(pair) == 2 and pair[0].shape[2] != pair[1].shape[1]:
        raise ValueError(f"{what}: the two parts of the core of {name} are not of one rank")


# --- the three kinds of sources ---


def of_model(store: AdapterStore, model: nn.Module) -> dict[str, Found]:
    """The adapter that a model carries."""
    there, what = dict(adapted_layers(model)), "the model"
    check_names(store, {name: layer.row.label for name, layer in there.items()}, what)
    trained = {n: layer.train_names for n, layer in there.items()}
    check_trained(store, trained, saved_modules(model), what)
    found = {}
    for name, layer in there.items():
        if layer.bases_pending or not is_known(layer):
            raise ValueError(f"{what}: {name} is not initialised: load its weights and init_bases")
        core, scales = single(layer.core_factors), torch.tensor([layer.scale])
        others = {label: getattr(layer, label) for label in others_of(layer)}
        found[name] = Found(core, scales, others=others)
        away = any(own.is_meta for own in tensors_of(layer))
        if away or isinstance(layer.base_weight, Base):  # what is away stays: one layer at a time
            found[name].fingerprint = fingerprint_of(layer)
        else:
            weight = layer.base_weight
            found[name] = Found(core, scales, *layer.bases, weight, others=others)
        found[name].entry = {"base": form_of(layer)}
    return found


def of_contents(
    store: AdapterStore,
    model: nn.Module,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    path: str,
) -> dict[str, Found]:
    """The adapter in a file of `save_adapter`, or in a folder of PEFT's."""
    methods = {name: row_of(entry).label for name, entry in config["layers"].items()}
    check_names(store, methods, path)
    trained = {name: entry["settings"]["train"] for name, entry in config["layers"].items()}
    check_trained(store, trained, config["modules_to_save"], path)
    if "partial" in config:  # of PEFT's
        check_places(list(store.layers), model)
    found = {}
    for name, layer in store.layers.items():
        settings = config["layers"][name]["settings"]
        part = of_tensors(layer, name, tensors.get, path)
        part.scales = torch.tensor([settings["alpha"] / settings["r"]])
        part.fingerprint = tensors.get(f"{name}.{FINGERPRINT}")
        if part.fingerprint is None:
            raise ValueError(f"{path} lacks {name}.{FINGERPRINT}: it is damaged")
        part.down = part.up = part.weight = None  # the fingerprint is of them
        part.entry = config["layers"][name]
        found[name] = part
    return found


def of_state(store: AdapterStore, state: Mapping[str, Any]) -> dict[str, Found]:
    """The adapter in a state_dict, of the model or of its trained parameters alone."""
    return {
        name: of_tensors(layer, name, state.get, "the state_dict")
        for name, layer in store.layers.items()
    }


def of_tensors(
    layer: LowRankLinear, name: str, get: Callable[[str], Tensor | None], what: str
) -> Found:
    """A layer's part, its tensors got by their names."""
    names = layer.row.core
    values: Any = {factor: get(f"{name}.{factor}") for factor in names}
    if not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError(f"{what} lacks {' or '.join(f'{name}.{factor}' for factor in names)}")
    if get(f"{name}.{MAGNITUDE}") is not None:
        raise ValueError(f"{what} has a magnitude of {name}: a bank holds no adapters with dora")
    core = single(layer.row.core_of(values))
    check_core(layer, core, 1, name, what)
    down, up, weight = (get(f"{name}.{part}") for part in ("down", "up", "weight"))
    others = {label: get(f"{name}.{label}") for label in others_of(layer)}
    return Found(core, torch.tensor([layer.scale]), down, up, weight, others=others)


def others_of(layer: LowRankLinear) -> list[str]:
    """The factors of a layer that are neither its core's, nor down or up."""
    return [name for name in layer.factors if name not in (*layer.row.core, "down", "up")]


def check_trained(
    store: AdapterStore, trained: Mapping[str, Iterable[str]], modules: Iterable[str], what: str
) -> None:
    """Raise if a source trains more than cores: whole modules, or other factors."""
    if modules := list(modules):
        raise ValueError(f"{what} trains {', '.join(modules)} whole: a bank holds cores alone")
    for name, train in trained.items():
        common = store.layers[name].row.common
        if common & set(train):
            raise ValueError(f"{what} trains more of {name} than its core: {', '.join(train)}")


def check_names(store: AdapterStore, methods: Mapping[str, str], what: str) -> None:
    """Raise unless the source adapts the layers of the bank, by the same methods."""
    ours = {name: layer.row.label for name, layer in store.layers.items()}
    if ours != methods:
        name = next(n for n in [*ours, *methods] if ours.get(n) != methods.get(n))
        raise ValueError(
            f"{what} does not fit the bank: {name} is {methods.get(name, 'not adapted')} there and "
            f"{ours.get(name, 'not adapted')} here"
        )
