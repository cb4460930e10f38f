"""Weights that are elsewhere between calls: in RAM or on disk, by the hooks of accelerate.

Such a hook takes a module's own tensors away: what is left of them is on the meta device. It brings
them before the module's forward, from its `weights_map`, as new Parameters, and takes those away
after it. So whoever reads a weight at another time asks for it here, and whoever replaces one says
so here. What is trained cannot be brought as a new Parameter for each call, for the gradient would
be lost with it: `take_over` leaves it in its place.
"""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn


def hook_of(module: nn.Module) -> Any:
    """The hook that takes the module's own tensors away between calls, or None."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # accelerate's SequentialHook has several
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            return each
    return None


@contextmanager
def here(*modules: nn.Module) -> Iterator[None]:
    """A context within which the modules' own tensors are where the modules compute."""
    with ExitStack() as stack:
        for module in modules:
            hook = hook_of(module)
            if hook is not None and any(own.is_meta for own in tensors_of(module)):
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The module's own parameters and buffers."""
    for own in (*module._parameters.values(), *module._buffers.values()):
        if own is not None:
            yield own


def value_of(module: nn.Module, name: str) -> Tensor:
    """The value of a module's own tensor, from where it is."""
    own: Tensor = getattr(module, name)
    hook = hook_of(module)
    if not own.is_meta or hook is None:
        return own
    return hook.weights_map[name].to(hook.execution_device, own.dtype)


def device_of(module: nn.Module, name: str = "weight") -> torch.device:
    """The device of a module's own tensor when the module computes."""
    own: Tensor = getattr(module, name)
    hook = hook_of(module)
    if not own.is_meta or hook is None:
        return own.device
    device = hook.execution_device
    return torch.empty(0, device=device).device


def kept(module: nn.Module, name: str) -> nn.Parameter:
    """A Parameter to be kept for later: the module's own or, of one that is brought for each call,
    its value where it is brought from.
    """
    own: nn.Parameter = getattr(module, name)
    hook = hook_of(module)
    if hook is None or name not in names_of(hook, module):
        return own
    return nn.Parameter(hook.weights_map[name].to(own.dtype), requires_grad=own.requires_grad)


def replace(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Give a module another Parameter, which its hook then brings in place of the old one.

    What the hook brought until now is left alone, whether it lies in RAM or on disk.
    """
    hook = hook_of(module)
    if hook is None or name not in names_of(hook, module):
        setattr(module, name, value)
        return
    if not isinstance(hook.weights_map, ChainMap):
        hook.weights_map = ChainMap({}, hook.weights_map)
    hook.weights_map.maps[0][name] = value.detach().cpu()
    if not getattr(module, name).is_meta:  # brought for now: `here` takes it away again
        module._parameters[name] = value


def fill_in(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module's own tensor another value: in place or, where it is away, where it is."""
    own: Tensor = getattr(module, name)
    if not own.is_meta or hook_of(module) is None:
        own.copy_(value)
    else:
        replace(module, name, nn.Parameter(value.to("cpu", own.dtype), own.requires_grad))


def valued(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a model's state_dict, with values for what is elsewhere."""
    found = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            owner, _, name = key.rpartition(".")
            tensor = value_of(model.get_submodule(owner), name)
        found[key] = tensor
    return found


def load_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict`, and the tensors that are elsewhere, which that leaves alone."""
    away = [key for key, own in module.state_dict().items() if own.is_meta]
    for key in away:
        owner, _, name = key.rpartition(".")
        fill_in(module.get_submodule(owner), name, state[key])
    rest = {key: value for key, value in state.items() if key not in away}
    module.load_state_dict(rest, strict=not away)


def is_known(module: Any) -> bool:
    """Whether the module's weight has values, here or elsewhere."""
    return not module.base_weight.is_meta or hook_of(module) is not None


def names_of(hook: Any, module: nn.Module) -> list[str]:
    """The module's own tensors that the hook takes away."""
    names = getattr(hook, "names", None)
    return [name for name in module._parameters if names is None or name in names]


def brings_blocks(model: nn.Module) -> bool:
    """Whether a hook has weights of modules within its own (accelerate's preload_module_classes),
    which nobody else can bring or replace.
    """
    return any(
        getattr(hook_of(module), "place_submodules", False) and any(True for _ in module.children())
        for module in model.modules()
    )


# --- shards ---

FSDP1, ZERO = "FullyShardedDataParallel", "DeepSpeed's ZeRO-3"
GATHER = {
    FSDP1: "give the wrapped model, and call this on every rank",
    ZERO: "call this within deepspeed.zero.GatheredParameters(list(model.parameters()))",
}


def sharder_of(matrix: Any) -> str | None:
    """The library that has sharded a matrix: what this process has is of another dimension then.

    None for a matrix that is whole, and for a DTensor, which says itself that it is sharded.
    """
    if not isinstance(matrix, Tensor) or matrix.dim() == 2:
        return None
    return ZERO if hasattr(matrix, "ds_id") else FSDP1


def require_matrices(name: str, *tensors: Tensor) -> None:
    """Raise ValueError, naming the layer, where this process has but a part of its matrices."""
    for tensor in tensors:
        if sharder := sharder_of(tensor):
            raise ValueError(f"{name} is sharded by {sharder}: {GATHER[sharder]}")


def sharder_in(model: nn.Module) -> str | None:
    """The library that shards a model, and would put back its own: FSDP, ZeRO-3, or None."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            return "fully_shard"
        if isinstance(module, fsdp.FullyShardedDataParallel):  # type: ignore[union-attr]
            return FSDP1
    return ZERO if any(hasattr(p, "ds_id") for p in model.parameters()) else None


def units_of(model: nn.Module) -> dict[int, Any]:
    """The FullyShardedDataParallel units that have the modules' parameters, by module id."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    found: dict[int, Any] = {}

    def visit(module: nn.Module, unit: Any) -> None:
        if isinstance(module, fsdp.FullyShardedDataParallel):  # type: ignore[union-attr]
            unit = module
        if unit is not None:
            found[id(module)] = unit
        for child in module.children():
            visit(child, unit)

    if fsdp:
        visit(model, None)
    return found


@contextmanager
def gathered(unit: Any) -> Iterator[None]:
    """A context in which a unit of FullyShardedDataParallel has its parameters whole, on every
    rank; all ranks must come here. Changes are lost.
    """
    if unit is None:
        yield
    else:
        with unit.summon_full_params(unit, recurse=False, writeback=False):
            yield


def each_here(model: nn.Module, modules: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, module) of modules of a model, each with all its values here while it is the one.

    Where parameters are sharded by FullyShardedDataParallel, all ranks must go through them.
    """
    units = units_of(model)
    with gathered(units.get(id(model))):  # the outermost unit comes first: it prepares the others
        pass
    for _, group in groupby(modules.items(), lambda item: id(units.get(id(item[1])))):
        some = dict(group)
        with gathered(units.get(id(next(iter(some.values()))))):
            for name, module in some.items():
                with here(*module.modules()):
                    yield name, module


# --- modules of which a hook may take some tensors only ---


class HookSlot:
    """The attribute `_hf_hook`, by which accelerate gives a module its hook.

    For a class with a method `stays`, the names of what is not to be taken away: what a hook has
    just taken of these is given back, and the hook kept from them.
    """

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        try:
            return vars(module)["_hf_hook"]
        except KeyError:
            raise AttributeError("_hf_hook") from None

    def __set__(self, module: Any, hook: Any) -> None:
        vars(module)["_hf_hook"] = take_over(hook, module, frozenset(module.stays()))

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)["_hf_hook"]


def take_over(hook: Any, module: nn.Module, stay: frozenset[str]) -> Any:
    """The hook, or one in its place that takes all of the module's tensors but those."""
    if hasattr(hook, "hooks"):
        hook.hooks = tuple(take_over(each, module, stay) for each in hook.hooks)
    if not getattr(hook, "offload", False) or stay.isdisjoint(getattr(hook, "names", stay)):
        return hook
    from .offload_hook import PartHook

    return PartHook.in_place_of(hook, module, stay)


def settle(model: nn.Module) -> None:
    """Bring the tensors of a module, and of those in it, here for good, for it is to be trained."""
    for module in model.modules():
        hold(module)


def hold(module: nn.Module, *names: str) -> None:
    """Bring a module's own tensors here for good, or those of these names."""
    if hook_of(module) is not None:
        own = frozenset(names or (*module._parameters, *module._buffers))
        vars(module)["_hf_hook"] = take_over(vars(module)["_hf_hook"], module, own)


def settle_within(model: nn.Module, module: nn.Module) -> None:
    """`settle` a module of a model and what it is tied to, for brought apart they would differ.

    What is read from disk is tied to nothing: each reading of it lies in memory of its own.
    """
    # These are kept until all are compared: memory that is free again is given to other readings.
    sources = [(s, part, name) for part in module.modules() for name, s in sources_of(part)]
    own = {lies(source): (part, name) for source, part, name in sources}
    shapes = {source.shape for source, *_ in sources}
    tied = [
        (other, name, own[place])
        for other in model.modules()
        for name, source in sources_of(other, shapes)
        if (place := lies(source)) in own
    ]
    del sources
    settle(module)
    for other, name, (part, theirs) in tied:
        hold(other)
        other._parameters[name] = part._parameters[theirs]


def lies(source: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Where a tensor lies and how; true of no other for as long as somebody has the tensor."""
    return source.data_ptr(), source.shape, source.stride()


def is_away(module: nn.Module) -> bool:
    """Whether own Parameters of a module, or of those in it, are not here between calls."""
    return any(
        own is not None and own.is_meta
        for part in module.modules()
        for own in part._parameters.values()
    )


def bring_back(model: nn.Module, module: nn.Module, *names: str) -> None:
    """`settle_within` for a module that was offloaded after it began to be trained, or `hold` of
    these names: its Parameters stay the objects that they are, for an optimiser may have them.

    What somebody else brings, with the block that it is in, stays away.
    """
    away = [
        (part, name, own)
        for part in ([module] if names else module.modules())
        for name, own in part._parameters.items()
        if own is not None and own.is_meta and (not names or name in names)
    ]
    if names:
        hold(module, *names)
    else:
        settle_within(model, module)
    here: dict[Tensor | None, nn.Parameter] = {}
    for part, name, own in away:
        new: Any = part._parameters[name]
        if not new.is_meta:
            torch.utils.swap_tensors(own, new)
            here[new] = own
    for other in model.modules() if here else ():
        for name, parameter in other._parameters.items():
            if parameter in here:
                other._parameters[name] = here[parameter]


def sources_of(
    module: nn.Module, shapes: Container[torch.Size] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, value where it is brought from) of a module's Parameters that a hook brings."""
    hook = hook_of(module)
    for name in () if hook is None else names_of(hook, module):
        own = module._parameters[name]
        if own is not None and own.is_meta and (shapes is None or own.shape in shapes):
            yield name, hook.weights_map[name]


def hand_over(old: nn.Module, new: nn.Module) -> None:
    """Make the hook of the old module bring the tensors of the same names to the new one.

    The new module has them now. Where there is no such hook nothing is done.
    """
    hook = hook_of(old)
    if hook is None:
        return
    from .offload_hook import PartHook

    PartHook.carried(hook, new, frozenset(names_of(hook, old)))
