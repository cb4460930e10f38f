"""Modules trained whole: where they stand, and what the model was before they were trained.

Such a module is known by its place, that is by its parent and its name there, so that it stays
known when somebody puts another module in that place, as resizing a vocabulary does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..context.elsewhere import bring_back, is_away, settle_within
from ..methods import LowRankLinear
from .targets import modules_by_name, named_modules, unwrapped

PLACES = "_lowrank_places"  # in the adapted model's: [(parent, name there)] of them
KEPT = "_lowrank_kept"  # in a parent's __dict__: {a child's name: Kept}
SLOTS = "_lowrank_slots"  # in a module's __dict__: {a Parameter's name: the one that was there}
CONFIG = "_lowrank_config"  # likewise, of its config: {a setting's name: the value that was there}


@dataclass
class Kept:
    """A module as it was when it began to be trained whole."""

    module: nn.Module
    tensors: dict[str, Tensor]  # copies of its values


@dataclass
class Base:
    """The values and modules to put back for the model to be what it was."""

    values: dict[Tensor, Tensor] = field(default_factory=dict)  # tensor → its value as it was
    places: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)  # dict, key, value
    grown: list[str] = field(default_factory=list)  # tensors with rows that the base does not have
    unknown: str = ""  # a module that cannot be what it was

    def check(self, stacklevel: int) -> None:
        """Raise if there is no way back, and warn of tensors for which the base has no values."""
        if self.unknown:
            raise ValueError(
                f"{self.unknown} is trained whole, and what it was is not known: it has tensors of "
                "other names or sizes now, or was on the meta device (init_bases keeps its values "
                "once they are loaded); put its old parts back, or load the base model anew"
            )
        if self.grown:
            warnings.warn(
                f"the vocabulary has grown since the model was adapted: of {', '.join(self.grown)} "
                "the base has no values for new tokens; they are given the mean of the others",
                stacklevel=stacklevel,
            )


def keep(model: nn.Module, names: list[str], copies: dict[Tensor, Tensor]) -> None:
    """Train modules whole, and keep copies of them for `disable_adapters` and `unload`.

    `copies` are those that there are already, of tensors that are tied to others.
    """
    modules = modules_by_name(model)
    kept = {}
    for name in names:
        settle_within(model, modules[name])
        tensors = state_of(modules[name])
        for tensor in tensors.values():
            if tensor not in copies:
                copies[tensor] = tensor.detach().clone()
        kept[id(modules[name])] = Kept(
            modules[name], {key: copies[tensor] for key, tensor in tensors.items()}
        )
        modules[name].requires_grad_(True)
    vars(model).setdefault(KEPT, {})  # `forgotten` knows by it which model was adapted
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if id(module) in kept:
                vars(parent).setdefault(KEPT, {})[child] = kept[id(module)]
                vars(model).setdefault(PLACES, []).append((parent, child))
    for own in {id(own): own for own in (model, *(modules[name] for name in names))}.values():
        if names and not watched(own):
            own.register_forward_pre_hook(stay)


def stay(module: nn.Module, args: Any) -> None:
    """A forward pre-hook of an adapted model, and of its modules trained whole: these stay here,
    also if they were offloaded since.

    Only the model knows what a module is tied to: called without it, that is an error in training.
    """
    if torch.compiler.is_compiling():
        return
    wholes = [module]
    if PLACES in vars(module):
        found = (parent._modules.get(child) for parent, child in vars(module)[PLACES])
        wholes = [whole for whole in found if whole is not None]
        for whole in wholes:
            if is_away(whole):
                bring_back(module, whole)
    if module.training and torch.is_grad_enabled():
        for whole in wholes:
            require_here(whole)


def require_here(whole: nn.Module) -> None:
    """Raise RuntimeError if what is trained of a module is brought anew for each call."""
    if is_away(whole) and any(own.requires_grad for own in whole.parameters()):
        raise RuntimeError(
            f"a {type(whole).__name__} that is trained whole was offloaded since, and is brought "
            "anew for each call: it would learn nothing. Adapt after offloading; or, if it was not "
            "offloaded with a block around it, call the adapted model itself, which takes it back"
        )


def watched(module: nn.Module) -> bool:
    """Whether a module has the hook `stay`."""
    return stay in module._forward_pre_hooks.values()


def keep_loaded(model: nn.Module) -> None:
    """Keep copies of modules that were on the meta device when they began to be trained whole."""
    wholes = places(model)
    keep(model, [n for n, *_, kept in wholes if any(t.is_meta for t in kept.tensors.values())], {})


def state_of(module: nn.Module) -> dict[str, Any]:
    """The tensors of a module themselves, by name, wrappers around it left out."""
    return unwrapped(module).state_dict(keep_vars=True)


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Kept]]:
    """(name, parent, name there, what was there) of the modules trained whole, each of them once.

    Raises ValueError if nothing is in the place any more.
    """
    seen = set()
    for name, parent in named_modules(model):
        for child, kept in vars(parent).get(KEPT, {}).items():
            module = parent._modules.get(child)
            full = f"{name}.{child}" if name else child
            if module is None:
                raise ValueError(f"{full} is trained whole, but is gone: put a module in its place")
            if id(module) not in seen:
                yield full, parent, child, kept
            seen.add(id(module))


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules trained whole, by name."""
    return {
        name: unwrapped(parent._modules[child])  # type: ignore[arg-type]
        for name, parent, child, _ in places(model)
    }


def forgotten(model: nn.Module) -> list[str]:
    """The Parameters trained in a model after `adapt` that no file would hold.

    Those of modules around that model do not count, nor those of a model that was built of adapted
    layers: these are trained as their owner likes.
    """
    inside = {id(p) for m in model.modules() if KEPT in vars(m) for p in m.parameters()}
    inside -= {id(tensor) for m in saved_modules(model).values() for tensor in m.parameters()}
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    inside -= {id(layer._parameters[name]) for layer in layers for name in layer.train_names}
    return [
        f"{holder}.{name}" if holder else name
        for holder, module in named_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad and id(parameter) in inside
    ]


def warn_of_forgotten(model: nn.Module, stacklevel: int) -> None:
    """Warn once of Parameters that are trained and would not be saved."""
    warn_of_names(forgotten(model), stacklevel + 1)


def warn_of_names(names: list[str], stacklevel: int) -> None:
    """The warning, of parameters by these names, if there are any."""
    if names:
        more = f", … ({len(names)} in all)" if len(names) > 3 else ""
        warnings.warn(
            f"{', '.join(names[:3])}{more} can be trained, and would not be in the file: name such "
            "modules in modules_to_save, or save them yourself; requires_grad_(False) if they are "
            "not trained",
            stacklevel=stacklevel + 1,
        )


# --- what the model was ---


def base_of(model: nn.Module) -> Base:
    """The base of the modules trained whole, whatever stands in their places now."""
    base, wholes = Base(), list(places(model))
    rows = vocabularies(model) if wholes else set()
    for name, parent, child, kept in wholes:
        present: Any = parent._modules[child]
        tensors = state_of(present)
        values = {key: fitted(v, tensors.get(key), rows) for key, v in kept.tensors.items()}
        if tensors.keys() != values.keys() or any(value is None for value in values.values()):
            if present is kept.module or any(v.is_meta for v in kept.tensors.values()):
                base.unknown = name
                continue
            old = kept.module.to(next(iter(tensors.values())).device if tensors else None)
            base.places.append((parent._modules, child, old.train(present.training)))
            tensors = state_of(old)
            values = {k: fitted(v, tensors[k], rows, v) for k, v in kept.tensors.items()}
        for key, value in values.items():
            base.values.setdefault(tensors[key], value)
            if value.dim() and len(value) > len(kept.tensors[key]):
                base.grown.append(f"{name}.{key}")
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            for tensor, value in module.originals():
                base.values.setdefault(tensor, value)
        for name, before in vars(module).get(SLOTS, {}).items():
            base.places.append((module._parameters, name, before))
        for name, before in vars(module).get(CONFIG, {}).items():
            base.places.append((vars(module.config), name, before))
    return base


def vocabularies(model: nn.Module) -> set[int]:
    """The numbers of tokens that the model knows: sizes that resizing gave to tensors."""
    tables = list(saved_modules(model).values())
    for module in model.modules():
        with suppress(AttributeError, NotImplementedError):
            tables.append(module.get_input_embeddings())  # type: ignore[operator]
    return {len(table.weight) for table in tables if isinstance(table, nn.Embedding)}


def fitted(value: Tensor, present: Any, rows: set[int], otherwise: Any = None) -> Any:
    """A kept value in the shape and kind of the tensor that is there now.

    Of a vocabulary that was resized, the tokens that are new have the mean of the others, which is
    what transformers gives to new tokens. Tensors that differ in another way give `otherwise`.
    """
    if present is None or value.is_meta != present.is_meta:
        return otherwise
    value = value.to(present.device, present.dtype)
    if value.shape == present.shape:
        return value
    if not value.dim() or value.shape[1:] != present.shape[1:] or len(present) not in rows:
        return otherwise
    mean = value.to(torch.promote_types(value.dtype, torch.float32)).mean(0).to(value.dtype)
    new = mean.expand(max(0, len(present) - len(value)), *mean.shape)
    return torch.cat([value[: len(present)], new])


@contextmanager
def base_in_place(model: nn.Module) -> Iterator[None]:
    """A context in which the modules trained whole, and their tied tensors, are as they were.

    So a state_dict would not hold what they have learned; taking one is an error.
    """
    base = base_of(model)
    base.check(6)
    if not (base.values or base.places):
        yield
        return
    undo: list[tuple[Any, str, Any]] = []

    def put(slot: Any, name: str, new: Any) -> None:
        undo.append((slot, name, slot[name]))
        slot[name] = new

    exchange: dict[Tensor, Any] = {
        tensor: nn.Parameter(value, requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else value.clone()
        for tensor, value in base.values.items()
    }
    refused = [model.register_state_dict_pre_hook(refuse_state)]
    try:
        for slot, name, old in base.places:
            put(slot, name, old)
        for module in model.modules():
            before = len(undo)
            for slot in (module._parameters, module._buffers):
                for name, tensor in slot.items():
                    if tensor is not None and tensor in exchange:
                        put(slot, name, exchange[tensor])
            if isinstance(module, LowRankLinear) and module.merged:
                original = module.base_weight
                put(vars(module), "_original", (exchange.get(original, original),))
            if len(undo) > before and module is not model:
                refused.append(module.register_state_dict_pre_hook(refuse_state))
        yield
    finally:
        for hook in refused:
            hook.remove()
        for slot, name, old in reversed(undo):
            slot[name] = old


def refuse_state(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A `state_dict` pre-hook while the base model's values are in the trained ones' places."""
    if keep_vars:  # the tensors themselves, as `state_of` wants them
        return
    raise RuntimeError(
        "within disable_adapters a state_dict would hold the base model's values in place of those "
        "that were trained: take it outside"
    )


@torch.no_grad()
def put_back(base: Base) -> None:
    """Make the modules trained whole, and whatever is tied to them, what they were."""
    for tensor, value in base.values.items():
        if tensor.shape == value.shape:
            tensor.copy_(value)
        else:
            tensor.data = value
    for slot, name, old in base.places:
        slot[name] = old


def forget(model: nn.Module) -> None:
    """The modules trained whole are no longer known as such; what is frozen stays frozen."""
    for module in model.modules():
        for record in (PLACES, KEPT, SLOTS, CONFIG):
            vars(module).pop(record, None)
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is stay:
                del module._forward_pre_hooks[key]
