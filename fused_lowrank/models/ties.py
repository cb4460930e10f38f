"""Tied tensors: what is trained in one place of a model is trained in all that share it.

A file says which of a model's tensors were tied to those it holds: {"lm_head.weight":
"model.embed_tokens.weight"}. A model that ties others than the file did is changed on loading, so
that it computes what the one computed that was saved; `unload` undoes that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..context.elsewhere import hold
from ..methods import LowRankLinear
from .targets import modules_by_name, named_modules
from .whole_modules import CONFIG, SLOTS, base_of, state_of

Ties = dict[str, str]  # name of a tensor → name of the one, in the file, that it was tied to


def tensors_by_name(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """(holder, its name there) of each Parameter and buffer of the model by its name."""
    return {
        f"{name}.{part}" if name else part: (module, part)
        for name, module in named_modules(model)
        for slot in (module._parameters, module._buffers)
        for part, tensor in slot.items()
        if tensor is not None and part not in shared_in(module)
    }


def shared_in(module: nn.Module) -> tuple[str, ...]:
    """The names of the factors that an adapted layer shares with others by itself."""
    return module.row.shared if isinstance(module, LowRankLinear) else ()


def present(holder: nn.Module, part: str) -> Any:
    """A tensor of a module; of an adapted layer that is merged, the weight as it was."""
    if part == "weight" and isinstance(holder, LowRankLinear):
        return holder.base_weight
    return holder._parameters.get(part, holder._buffers.get(part))


def memory(tensor: Tensor) -> Any:
    """A key that two tensors have in common if and only if they are one: their place in memory."""
    with suppress(RuntimeError, NotImplementedError):  # of subclasses
        if tensor.data_ptr():
            return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
    return id(tensor)


def tied_layers(layers: dict[str, LowRankLinear], model: nn.Module) -> list[str]:
    """The names of the layers, not merged yet, whose weights other modules have as well."""
    shared = Counter(
        memory(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return [name for name, m in layers.items() if not m.merged and shared[memory(m.weight)] > 1]


def trained_names(saved: Mapping[str, nn.Module], layers: Mapping[str, LowRankLinear]) -> list[str]:
    """The names of the tensors of a base model that are trained, and so in a file."""
    names = [f"{name}.{key}" for name, module in saved.items() for key in state_of(module)]
    return names + [
        f"{name}.{part}"
        for name, layer in layers.items()
        for part in ("weight", "bias")
        if part in layer.train_names and getattr(layer, part) is not None
    ]


def ties_of(model: nn.Module, names: Iterable[str]) -> Ties:
    """The tensors that are tied to those of these names, or these to each other."""
    there, first = tensors_by_name(model), dict[Any, str]()
    found = [name for name in names if name in there]
    for name in found:
        first.setdefault(memory(present(*there[name])), name)
    tied = {}
    for name, place in there.items():
        source = first.get(memory(present(*place)), name)
        if source != name:
            tied[name] = source
    return tied


def holders_in_part(model: nn.Module, tied: Ties, held: Container[str]) -> list[str]:
    """The modules with a tied tensor that have others as well, which a file does not hold."""
    rest = [name for name in tensors_by_name(model) if name not in tied and name not in held]
    holders = dict.fromkeys(name.rpartition(".")[0] for name in tied)
    return [h for h in holders if any(name.startswith(f"{h}.") for name in rest)]


def refuse_views(
    model: nn.Module, saved: Iterable[str], layers: Mapping[str, LowRankLinear]
) -> None:
    """Raise if a tensor that would be trained lies in the memory of another in another shape."""
    whole: dict[Any, set[str]] = {}
    there, modules = tensors_by_name(model), modules_by_name(model)
    for name, place in there.items():
        tensor = present(*place)
        with suppress(RuntimeError, NotImplementedError):
            if tensor.data_ptr() and tensor.numel() > 1:
                whole.setdefault((tensor.device, tensor.data_ptr(), tensor.numel()), set()).add(
                    name
                )
    names = set(trained_names({name: modules[name] for name in saved}, layers))
    for group in whole.values():
        if len({memory(present(*there[name])) for name in group}) > 1 and group & names:
            one, other = sorted(group, key=lambda name: name not in names)[:2]
            raise ValueError(
                f"{one} would be trained, and lies in the memory of {other} in another shape or "
                "layout, which would change with it unseen: make them one Parameter, or clone one"
            )


@dataclass
class Changes:
    """The changes to the ties of a model by which it can hold what a file holds."""

    apart: list[list[str]] = field(default_factory=list)  # names that are to share a new Parameter
    together: Ties = field(default_factory=dict)

    def refuse(self, path: Any) -> None:
        """Raise if there is anything to do, in a model whose tensors must stay what they are."""
        for name in (*(names[0] for names in self.apart), *self.together):
            raise ValueError(
                f"{path} does not fit this adapted model: {name} is tied to another tensor in one "
                "of them and not in the other; unload(model) first"
            )


def changes_for(
    model: nn.Module, tied: Ties | None, tensors: Mapping[str, Tensor], path: Any
) -> Changes:
    """The changes by which a model's ties become those of a file, where that makes a difference.

    Raises ValueError if the model has not the tensors that were tied.
    """
    changes, there = Changes(), tensors_by_name(model)
    if tied is None:  # a file that does not say
        return changes
    originals = base_of(model).values
    groups: dict[Any, list[str]] = {}
    for name, place in there.items():
        groups.setdefault(memory(present(*place)), []).append(name)
    for names in groups.values():
        by_source: dict[str | None, list[str]] = {}
        for name in names:
            source = tied.get(name, name if name in tensors else None)
            by_source.setdefault(source, []).append(name)
        own = present(*there[names[0]])
        own = originals.get(own, own)
        values = [own if source is None else tensors[source] for source in by_source]
        if len(values) > 1 and not all(same(values[0], value) for value in values[1:]):
            ordered = sorted(by_source.items(), key=lambda item: item[0] is None)
            changes.apart += [shared for _, shared in ordered[1:]]
    for name, source in tied.items():
        if name not in there or source not in there:
            raise ValueError(
                f"{path} was trained with {name} tied to {source}, and this model has not both"
            )
        ours = [present(*there[one]) for one in (name, source)]
        if name not in tensors and memory(ours[0]) != memory(ours[1]):
            if ours[0].shape != ours[1].shape:
                raise ValueError(
                    f"{path} was trained with {name} tied to {source}; in this model they are "
                    f"{tuple(ours[0].shape)} and {tuple(ours[1].shape)}"
                )
            changes.together[name] = source
    return changes


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same, wherever they lie."""
    return a.shape == b.shape and not a.is_meta and torch.equal(a.to(b), b)


def apply(model: nn.Module, changes: Changes, trained: Iterable[str]) -> None:
    """Change the ties of the model; what is not among the trained ones is frozen."""
    there, trained = tensors_by_name(model), set(trained)

    def put(name: str, new: Any) -> None:
        holder, part = there[name]
        hold(holder)  # what brings it would bring another
        vars(holder).setdefault(SLOTS, {}).setdefault(part, holder._parameters[part])
        holder._parameters[part] = new

    for names in changes.apart:
        own = present(*there[names[0]])
        new = nn.Parameter(own.detach().clone(), requires_grad=not trained.isdisjoint(names))
        for name in names:
            put(name, new)
    for name, source in changes.together.items():
        put(name, present(*there[source]))
    if changes.apart:
        note_untied(model)


def note_untied(model: nn.Module) -> None:
    """Have a transformers model whose ties are gone written so that it is read as it is.

    Its config must not say that embeddings are tied if none is; in encoder-decoders it stays, for
    some scale the head's input by it, and what files hold in two values is not tied on reading. A
    tensor that is not tied to what its class says, but to another, gets a Parameter of its own.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        expanded = getattr(module, "get_expanded_tied_weights_keys", None)
        if expanded is None or not getattr(config, "tie_word_embeddings", False):
            continue
        there = tensors_by_name(module)
        pairs = [
            pair
            for pair in expanded(all_submodels=True).items()
            if all(name in there for name in pair)
        ]
        memories = {name: memory(present(*there[name])) for pair in pairs for name in pair}
        apart = [target for target, source in pairs if memories[target] != memories[source]]
        alone = {memories[source] for _, source in pairs}
        for target in apart:
            holder, part = there[target]
            if memories[target] in alone and holder._parameters.get(part) is not None:
                own = present(holder, part)
                holder._parameters[part] = nn.Parameter(own.detach().clone(), own.requires_grad)
            alone.add(memories[target])
        if pairs and len(apart) == len(pairs) and not getattr(config, "is_encoder_decoder", False):
            vars(module).setdefault(CONFIG, {})["tie_word_embeddings"] = True
            config.tie_word_embeddings = False
