"""Which modules of a model `adapt` replaces, and which it leaves alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Patterns = str | list[str] | tuple[str, ...] | set[str]


# How modules that wrap another call it: torch.compile, checkpoint_wrapper, FSDP1; and, where many
# a module has a child of that name, by the wrapper's class.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
}


def wrapped_in(module: nn.Module, child: str) -> bool:
    """Whether the child of a module, by its name, is what the module wraps."""
    if child in WRAPPED:
        return True
    kinds = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return any(WRAPPERS.get(kind) == child for kind in kinds)


def named_modules(model: nn.Module, every: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all modules, without the parts of names that wrappers add.

    A wrapper comes before what it wraps, under the same name. With `every`, a module that stands in
    several places comes for each of them.
    """
    inside: dict[str, tuple[str, nn.Module]] = {}
    for full, module in model.named_modules(remove_duplicate=not every):
        holder, _, child = full.rpartition(".")
        name = ""
        if full:
            name, parent = inside[holder]
            if not wrapped_in(parent, child):
                name = f"{name}.{child}" if name else child
        inside[full] = name, module
        yield name, module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers around it."""
    return [module for name, module in named_modules(model) if not name][-1]


def modules_by_name(model: nn.Module) -> dict[str, Any]:
    """Every module under each of its names; a wrapper hides the module in it."""
    modules: dict[str, Any] = {}
    for name, module in named_modules(model, every=True):
        modules.setdefault(name, module)
    return modules


def check_patterns(argument: str, patterns: Any) -> None:
    """Raise unless these are strings, or one that is a regular expression."""
    if isinstance(patterns, str):
        try:
            re.compile(patterns)
        except re.error as error:
            raise ValueError(
                f"{argument} is {patterns!r}: as a string it must be a regular expression ({error})"
            ) from None
    elif not isinstance(patterns, list | tuple | set) or not all(
        isinstance(entry, str) for entry in patterns
    ):
        raise TypeError(
            f"{argument} is {patterns!r}: it must be a list of names or a regular expression"
        )


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a name matches: a regular expression whole, an entry of a list also as its end."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in patterns)


def match_saved(model: nn.Module, patterns: list[str] | tuple[str, ...]) -> list[str]:
    """The modules to train whole, by name; each pattern must match."""
    names = [name for name in dict.fromkeys(name for name, _ in named_modules(model)) if name]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"modules_to_save: no module is called {pattern!r}")
    return [name for name in names if matches(name, patterns)]


def match_targets(
    model: nn.Module, patterns: Patterns, exclude: Patterns | None, saved: list[str]
) -> list[str]:
    """The names of the modules to adapt; raises where one cannot be, or a pattern matches none."""
    modules = modules_by_name(model)
    modules.pop("")
    inside_saved = tuple(name + "." for name in saved)

    def left_alone(name: str) -> bool:
        return (
            (exclude is not None and matches(name, exclude))
            or name in saved
            or name.startswith(inside_saved)
        )

    if patterns == "all-linear":
        output = output_layer(model)
        found = [
            name
            for name, module in modules.items()
            if isinstance(module, nn.Linear)
            and module is not output
            and not left_alone(name)
            and not never_called(modules, name)
        ]
        warn_of_experts(model, found)
    else:
        refuse_experts(model, patterns, left_alone)
        entries = [patterns] if isinstance(patterns, str) else [[entry] for entry in patterns]
        for entry in entries:
            if not any(matches(name, entry) for name in modules):
                shown = entry if isinstance(entry, str) else entry[0]
                raise ValueError(
                    f"target_modules: {shown!r} matches no module; "
                    f"the linear layers are called {', '.join(linear_names(modules))}"
                )
        found = [name for name in modules if matches(name, patterns) and not left_alone(name)]
        for name in found:
            if reason := never_called(modules, name):
                raise ValueError(f"{name}: {reason}")
    if not found:
        raise ValueError(
            f"target_modules={patterns!r} leaves no module to adapt; "
            f"the linear layers are called {', '.join(linear_names(modules))}"
        )
    once = {id(modules[name]): name for name in reversed(found)}  # a module with several names
    return list(reversed(once.values()))


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that "all-linear" leaves out."""
    if hasattr(model, "get_output_embeddings"):
        return model.get_output_embeddings()  # type: ignore[operator]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else None


def linear_names(modules: dict[str, nn.Module]) -> list[str]:
    """The distinct last parts of the linear layers' names."""
    names = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)}
    return sorted(names) or ["(there are none)"]


def never_called(modules: dict[str, nn.Module], name: str) -> str | None:
    """Why a replacement of this module would never be called, or None."""
    if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
        return (
            "nn.MultiheadAttention reads the weight of this layer and never calls it, so an "
            "adapter would do nothing; exclude it"
        )
    return None


def refuse_experts(model: nn.Module, patterns: Patterns, left_alone: Callable[[str], bool]) -> None:
    """Raise if a pattern names a Parameter of MoE experts, or the module that holds them."""
    for holder, module in named_modules(model):
        for child, parameter in module.named_parameters(recurse=False):
            name = f"{holder}.{child}" if holder else child
            named = matches(name, patterns) or (holder and matches(holder, patterns))
            if parameter.dim() == 3 and named and not (left_alone(name) or left_alone(holder)):
                raise ValueError(
                    f"target_modules: {name} is a Parameter of shape {tuple(parameter.shape)}, the "
                    "experts of a mixture; only nn.Linear can be adapted: leave it out"
                )


def warn_of_experts(model: nn.Module, found: list[str]) -> None:
    """Say which experts "all-linear" does not reach."""
    experts = [name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name]
    if experts:
        warnings.warn(
            f"'all-linear' reaches nn.Linear alone; {len(experts)} Parameters of MoE experts stay "
            f"frozen, {experts[0]} the first",
            stacklevel=4,
        )
