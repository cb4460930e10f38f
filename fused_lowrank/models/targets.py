"""The modules of a model that `adapt` replaces, and those that it leaves alone."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..compute.base.kinds import is_from_known
from ..context.readers import readers
from ..methods.accept import has_product, is_parametrized, sides_of, why_no_weight
from ..methods.method import Method
from .patterns import Layers, in_layers

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
    model: nn.Module,
    patterns: Patterns,
    exclude: Patterns | None,
    saved: list[str],
    layers: Layers | None = None,
) -> list[str]:
    """The names of the modules to adapt, in some layers or in all; raises where one cannot be, or a
    pattern matches none.
    """
    modules = modules_by_name(model)
    modules.pop("")
    inside_saved = tuple(name + "." for name in saved)

    def left_alone(name: str) -> bool:
        return (
            (exclude is not None and matches(name, exclude))
            or name in saved
            or name.startswith(inside_saved)
        )

    if exclude is not None:
        check_excluded(model, exclude, modules)
    read = readers(model)
    if patterns == "all-linear":
        output = output_layer(model)
        linears = [
            name
            for name, module in modules.items()
            if (isinstance(module, nn.Linear) or is_from_known(module))
            and module is not output
            and not left_alone(name)
        ]
        left = left_out(modules, linears, read)
        found = [name for name in linears if name not in left]
        warn_of_experts(model, found)
        warn_of_left_out(left, stacklevel=4)
    else:
        refuse_experts(model, patterns, left_alone)
        entries = [patterns] if isinstance(patterns, str) else [[entry] for entry in patterns]
        for entry in entries:
            if not any(matches(name, entry) for name in modules):
                shown = entry if isinstance(entry, str) else entry[0]
                raise ValueError(
                    f"target_modules: {shown!r} matches no module; "
                    f"the linear layers are called {', '.join(linear_names(modules))}"
                    f"{turned(modules)}"
                )
        found = [name for name in modules if matches(name, patterns) and not left_alone(name)]
        found = in_layers(found, patterns, layers)
        for name in found:
            if reason := never_called(modules, name, read):
                raise ValueError(f"{name}: {reason}")
    if not found:
        raise ValueError(
            f"target_modules={patterns!r} leaves no module to adapt; "
            f"the linear layers are called {', '.join(linear_names(modules))}{turned(modules)}"
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


def turned(modules: dict[str, nn.Module]) -> str:
    """A message about transformers' Conv1D layers, if there are any."""
    names = {n.rpartition(".")[2] for n, m in modules.items() if type(m).__name__ == "Conv1D"}
    if not names:
        return ""
    return (
        f"; {', '.join(sorted(names))} are transformers' Conv1D, which have adapters through PEFT "
        "alone: see fused_lowrank.integrations.peft"
    )


def check_excluded(model: nn.Module, exclude: Patterns, modules: dict[str, nn.Module]) -> None:
    """Raise ValueError for a pattern that matches no module and no Parameter."""
    holders = [(name, held) for name, held in named_modules(model) if held._parameters]
    names = [*modules, *(f"{name}.{own}" for name, held in holders for own in held._parameters)]
    for entry in unmatched(exclude, names):
        raise ValueError(
            f"exclude_modules: {entry!r} matches no module; "
            f"the linear layers are called {', '.join(linear_names(modules))}"
        )


def unmatched(patterns: Patterns, names: Collection[str]) -> list[str]:
    """The patterns that match none of the names."""
    entries = [patterns] if isinstance(patterns, str) else [[entry] for entry in patterns]
    left = [entry for entry in entries if not any(matches(name, entry) for name in names)]
    return [entry if isinstance(entry, str) else entry[0] for entry in left]


# --- what "all-linear" leaves out ---


def left_out(
    modules: Mapping[str, nn.Module], linears: Iterable[str], read: Mapping[int, str]
) -> dict[str, str]:
    """The linear layers that "all-linear" leaves out, and why; "" where nobody has to know."""
    left: dict[str, str] = {}
    for name in linears:
        module: Any = modules[name]
        if isinstance(modules.get(holder_of(name)), nn.MultiheadAttention):
            left[name] = ""  # as torch's own layers have it
        elif never_called(modules, name, read):
            left[name] = "weights that the model reads instead of calling the layer"
        elif isinstance(module, nn.Linear) and is_parametrized(module):
            left[name] = "parametrised layers"
        elif not is_base(module):
            left[name] = "layers with a forward of their own"
        elif sides_of(module)[1] == 1:
            left[name] = "layers of one output"
        elif is_router(modules, name):
            left[name] = "routers of experts"
    return left


def is_base(module: Any) -> bool:
    """Whether a layer is a linear one, or quantised by a library that is known."""
    return is_from_known(module) or has_product(module) or bool(why_no_weight(module.weight))


def warn_of_left_out(left: Mapping[str, str], stacklevel: int) -> None:
    """Say what "all-linear" leaves out, by kind, with the last parts of the names."""
    kinds: dict[str, dict[str, None]] = {}
    for name, reason in left.items():
        if reason:
            kinds.setdefault(reason, {})[name.rpartition(".")[2]] = None
    if kinds:
        said = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in kinds.items())
        warnings.warn(
            f"'all-linear' leaves out {said}; modules_to_save trains a layer whole",
            stacklevel=stacklevel,
        )


def fitted(
    model: nn.Module, plan: dict[str, dict[str, Any]], row: Method
) -> dict[str, dict[str, Any]]:
    """The keywords of each of these layers, with ranks taken down to what it has room for.

    Their scale stays that of the rank asked for; one warning says which they are.
    """
    modules, own_plan, reduced = modules_by_name(model), {}, []
    for name, keywords in plan.items():
        ranks = {rank: keywords.get(rank, default) for rank, default in row.ranks.items()}
        sizes = row.fitted(*sides_of(modules[name]), ranks)
        small = {n: sizes[n] for n in ranks if ranks[n] > sizes[n]}
        own = {**keywords, **small}
        if "r" in small and keywords.get("alpha") is not None:
            own["alpha"] = keywords["alpha"] * small["r"] / ranks["r"]
        reduced += [(name, ranks)] if small else []
        own_plan[name] = own
    if reduced:
        first, ranks = reduced[0]
        asked = ", ".join(f"{name}={value}" for name, value in ranks.items())
        warnings.warn(
            f"{asked} is more than {len(reduced)} layers have room for ({first}, …): they "
            "take what they have, and the scale stays that of the rank asked for",
            stacklevel=3,
        )
    return own_plan


def is_router(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a linear layer chooses among experts: it is in a router, or beside as many experts
    as it has outputs.
    """
    module: Any = modules[name]
    holder = holder_of(name)
    if "router" in type(modules.get(holder)).__name__.lower() or "router" in name.lower().split(
        "."
    ):
        return True
    while holder:
        for child, experts in modules[holder].named_children():
            if "expert" in child.lower() and sides_of(module)[1] in sizes(experts):
                return True
        holder = holder_of(holder) if isinstance(modules[holder], nn.ModuleList) else ""
    return False


def sizes(experts: nn.Module) -> set[int]:
    """The numbers of experts a module may hold: its length, or that of its own Parameters."""
    count = {len(experts)} if isinstance(experts, nn.ModuleList | nn.ModuleDict) else set()
    return count | {p.shape[0] for p in experts.parameters(recurse=False) if p.dim() == 3}


def holder_of(name: str) -> str:
    """The name of the module that holds the one of this name."""
    return name.rpartition(".")[0]


def never_called(
    modules: Mapping[str, nn.Module], name: str, read: Mapping[int, str]
) -> str | None:
    """The reason why a replacement of this module would never be called, or not always, or None.

    `read` is what `readers` found in the model.
    """
    where = read.get(id(modules[name]))
    if isinstance(modules.get(holder_of(name)), nn.MultiheadAttention):
        where = "nn.MultiheadAttention"
    if where is None:
        return None
    return (
        f"{where} reads the weight of this layer and never calls it, or not always, so an "
        "adapter would do nothing there; leave it out by exclude_modules"
    )


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


def places_of(model: nn.Module) -> Counter[int]:
    """In how many places of a model each module stands, by its id; in a part that stands in
    several, once.
    """
    return Counter(id(child) for module in model.modules() for child in module._modules.values())


def check_places(names: list[str], model: nn.Module) -> None:
    """Raise ValueError for a module that stands in several places: PEFT changes one of them."""
    modules = modules_by_name(model)
    places = places_of(model)
    for name in names:
        if (count := places[id(modules[name])]) > 1:
            raise ValueError(f"{name} stands in {count} places, and PEFT trains only one of them")


def replace_modules(model: nn.Module, new: dict[int, Any]) -> None:
    """Put new[id(module)] wherever that module stands, also where it stands more than once."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                setattr(parent, name, new[id(child)])
