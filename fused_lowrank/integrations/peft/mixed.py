"""The adapters of a mixed batch, as layers read them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...compute.reference import NONE, RowCores
from ...context.calls import SAID, Call, Learned, Spread, begin, call_of, end
from ...context.declared import ANYWHERE, REASON, Owners, place_of, said_of
from ...context.recomputed import (
    OUTSIDE,
    Entered,
    again,
    around,
    graph_task,
    may_recompute,
    note,
    noted,
)
from ...context.whose_rows import not_known, spread

BASE = "__base__"  # PEFT's name for no adapter


class Entries(list[str]):
    """The name of each sequence's adapter; what layers make of it is made once for all of them."""

    def __init__(self, names: Sequence[str], model: Any = None) -> None:
        super().__init__(names)
        self.different = list(dict.fromkeys(self))  # names may be read once only
        self.model = model  # that is called with them; None: a layer is
        self.entered = OUTSIDE if model is None else Entered.now()
        self.learned: Learned = Learned() if model is None else model.learned
        self.places: dict[
            tuple[str, tuple[int, ...]], Spread | Owners | None
        ] = {}  # None: of two calls
        self._made: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    @property
    def call(self) -> Call | None:
        """The model's call that is running."""
        return None if self.model is None else call_of(self.model)

    def spread(self, module: nn.Module, layer: str, x: Tensor) -> Spread | Owners:
        """The spread of a layer's x; raises ValueError where it is not known whose its rows are."""
        lead, entries = x.shape[:-1], len(self)
        compiling = torch.compiler.is_compiling()
        said = None if compiling or SAID.get() is None else said_of(module, layer, x)
        task = graph_task()
        if said is None and task >= 0 and self.entered.task != task:  # computed again, as it was
            if (before := self.places.get((layer, tuple(lead)))) is not None:
                return before
            raise RuntimeError(LOST.format(layer))
        call = None if compiling else self.call
        seen = x if call is not None or self.model is None else None
        found: Spread | Owners | str
        if entries == 0:  # an empty batch
            found = Spread(1, 1) if x.numel() == 0 else "no name is given"
        elif said is not None:
            found = place_of(said, layer, lead, entries, call, self.learned, seen)
        else:
            found = spread(layer, lead, entries, call, self.learned, seen)
        if not isinstance(found, str):
            if may_recompute() and self.places.setdefault((layer, tuple(lead)), found) != found:
                self.places[layer, tuple(lead)] = None
            return found
        error = not_known(layer, lead, entries, "`adapter_names`", found)
        if entries == 0 or call is None or not call.fits:
            error.args = (
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{entries} and x of {tuple(x.shape)}. {error}",
            )
        raise error

    def rows(self, adapters: Sequence[str], table: Tensor, place: Spread | Owners) -> RowCores:
        """The rows of a layer that has these adapters, whose cores (adapters, P, Q) are `table`."""
        outer = place.outer
        key = (table.device, outer, *adapters)
        if key not in self._made:
            slot = {name: number for number, name in enumerate(adapters)}
            entries = [[slot.get(name, NONE)] for name in self] * max(outer, 1)
            self._made[key] = (
                torch.tensor(entries, device=table.device),
                torch.ones(len(adapters), device=table.device),
                torch.zeros(len(adapters), dtype=torch.int32, device=table.device),
                torch.zeros(1, dtype=torch.int32, device=table.device),
            )
        handles, scales, generations, refused = self._made[key]
        if outer == 0:
            handles = place.laid(handles)
        return RowCores(table, None, handles, None, scales, generations, refused, place.repeat)


LOST = (
    "a checkpoint recomputes {}, and whose rows were whose in its call with `adapter_names` is not "
    "known any more: call the model with one adapter at a time, or without the checkpoint"
)


def as_before(layer: Any, off: bool, names: Any) -> tuple[bool, Any]:
    """(disabled, adapter_names) of a layer's call.

    A call that a checkpoint computes again has those of its forward, which were noted if it was
    disabled or had names, unless a `with` within the checkpoint says it anew.
    """
    if off and torch.compiler.is_compiling() and not layer.noted:
        torch.ops.fused_lowrank.note_off(layer.number)
        return off, names
    if torch.compiler.is_compiling():
        return uncompiled(as_before, layer, off, names)
    entered = layer.switched if off else getattr(names, "entered", OUTSIDE)
    task = graph_task()
    if task >= 0 and entered.task != task and again() is not None:
        before = noted(layer)
        if before is not None and may_recompute():
            note(layer, before)  # for checkpoints within it, which are new
        return before is OFF, before if isinstance(before, Entries) else None
    if (off or isinstance(names, Entries)) and may_recompute():
        layer.noted |= bool(note(layer, OFF if off else names, entered))
    return off, names


class Switched:
    """A layer of PEFT that knows where it was disabled, as checkpoints ask."""

    switched = OUTSIDE
    number = -1  # by which a compiled graph knows it

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the adapters, as PEFT does, and note where that was done."""
        off = self.disable_adapters  # type: ignore[attr-defined]
        super().enable_adapters(enabled)  # type: ignore[misc]
        before = vars(self).pop("switched", OUTSIDE)
        if not enabled:
            if DISABLED.get(self.number) is not self:  # a copy has its original's
                self.number = next(_numbers)
                DISABLED[self.number] = self
            now = Entered.now()
            entered = now._replace(around=before.around) if off else now
            if entered != OUTSIDE:
                self.switched = entered


OFF = object()  # noted for a layer that was disabled
DISABLED: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # once, by number
_numbers = itertools.count()


@torch.library.custom_op("fused_lowrank::note_off", mutates_args=())
def note_off(number: int) -> None:
    """Note in a compiled graph that a layer is disabled, for the checkpoints around it.

    From then on the layer asks at each call, for which the graph is broken.
    """
    layer = DISABLED[number]
    if may_recompute():
        found = map(type, note(layer, OFF, layer.switched))
        layer.noted |= any(not kind.__name__.startswith("CompiledFunction") for kind in found)


@note_off.register_fake
def _(number):  # type: ignore[no-untyped-def]
    return None


torch.fx.node.has_side_effect(torch.ops.fused_lowrank.note_off.default)
# The entries by model, of the calls with adapter_names that the calling thread or task is in.
ACTIVE: ContextVar[Mapping[Any, Entries] | None] = ContextVar("fused_lowrank_names", default=None)
UNDER_WAY: dict[int, Entries] = {}  # of all threads, by identity


def refuse_under_way(model: Any, what: str, adapter: str | None = None) -> None:
    """Raise RuntimeError if a mixed batch that is under way names the adapter; or any, if None."""
    for entries in list(UNDER_WAY.values()):
        names = [name for name in entries.different if adapter in (None, name)]
        if entries.model is model and names:
            raise RuntimeError(
                f"cannot {what}: a call with adapter_names that is under way names "
                f"{', '.join(names)}; do it when the call is over"
            )


@torch.compiler.disable(reason=REASON)
def uncompiled(call: Callable[..., Any], *args: Any) -> Any:
    """Make a call as it is written: what is said of a call's rows is not to become a graph's."""
    return call(*args)


class Hooks:
    """The hooks of one call of a model with adapter_names; in other contexts they do nothing."""

    def __init__(self, entries: Entries) -> None:
        self.model, self.entries = entries.model, entries

    @contextmanager
    def entered(self, roots: Sequence[nn.Module], layers: Sequence[nn.Module]) -> Iterator[None]:
        """A context within which calls of `roots` are the model's, and `layers` get their names."""
        token = ACTIVE.set({**(ACTIVE.get() or {}), self.model: self.entries})
        UNDER_WAY[id(self.entries)] = self.entries
        handles: list[Any] = []
        try:
            for module in roots:
                handles.append(module.register_forward_pre_hook(self.begin, with_kwargs=True))
                handles.append(module.register_forward_hook(self.end, always_call=True))
            for module in layers:
                handles.append(module.register_forward_pre_hook(self.give, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            del UNDER_WAY[id(self.entries)]
            ACTIVE.reset(token)

    @property
    def here(self) -> bool:
        """Whether these are the names of the running context."""
        return (ACTIVE.get() or {}).get(self.model) is self.entries

    # PyTorch tells a hook of keywords after it has listed it, and lists it a moment longer: without
    # them it is called by another thread, for which it does nothing.

    def begin(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Note that a model's call begins."""
        if not torch.compiler.is_compiling() and self.here and len(self.entries) > 1:
            begin(self.model, len(self.entries), module, args, kwargs, self.entries.learned)

    def end(self, module: nn.Module, args: Any, result: Any) -> None:
        """Note that a model's call is over."""
        if not torch.compiler.is_compiling() and self.here:
            end(self.model, module, result)

    def give(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        """Give a layer's call the adapter of each sequence."""
        if not torch.compiler.is_compiling() and not self.here:
            return None  # another thread's hook
        if not self.entries and args and len(args[0]) == 0:
            return None  # an empty batch: its adapter does not matter
        names: list[str] = self.entries
        # What is not one of our layers gets a name for each row.
        if not getattr(module, "takes_entries", False) and args:
            compiled = torch.compiler.is_compiling() and ANYWHERE[0]
            names = (
                uncompiled(self.each, module, args[0]) if compiled else self.each(module, args[0])
            )
        assert kwargs is not None
        return args, {**kwargs, "adapter_names": names}

    def each(self, module: nn.Module, x: Tensor) -> list[str]:
        """The name for each index of x's first dimension."""
        if may_recompute() and any(True for _ in around()):
            raise RuntimeError(LOST.format(f"a {type(module).__name__}"))
        place = self.entries.spread(module, f"{type(module).__name__} {id(module):x}", x)
        if isinstance(place, Owners) and place.numbers.host.dim() == 1:
            return [self.entries[number] for number in place.numbers.host.tolist()]
        times, left = divmod(len(x), len(self.entries))
        if place.outer != 1 or left:
            raise ValueError(
                f"a {type(module).__name__} was called with x of {tuple(x.shape)}, whose first "
                f"dimension is not that of the {len(self.entries)} sequences of `adapter_names`: "
                "call the model with one adapter at a time"
            )
        return [name for name in self.entries for _ in range(times)]


@contextmanager
def hooked(tuner: Any, names: Any, there: set[str], kind: type[nn.Module]) -> Iterator[None]:
    """A context within which calls of a tuner's model are with adapter_names.

    Args:
        tuner: with `model`, and the `learned` of it.
        names: of an adapter for each sequence.
        there: the names of adapters that layers have.
        kind: the class of those layers.

    Raises ValueError for a name that is none of those, TypeError where names are no list.
    """
    if not isinstance(names, list | tuple):
        raise TypeError(f"adapter_names is a {type(names).__name__}: it must be a list of names")
    if None in names:
        raise ValueError(f"adapter_names has a None: {BASE!r} is the name of no adapter")
    if unknown := sorted({str(name) for name in names} - there - {BASE}):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are "
            f"{', '.join(sorted(there))}, and {BASE} for none"
        )
    layers = [m for m in tuner.modules() if isinstance(m, (kind, AuxiliaryTrainingWrapper))]
    roots = [tuner, tuner.model]
    get_encoder = getattr(tuner.model, "get_encoder", None)
    if get_encoder is not None:  # generate calls it by itself, before it repeats the sequences
        roots += [encoder for encoder in [get_encoder()] if isinstance(encoder, nn.Module)]
    with Hooks(Entries(names, tuner)).entered(list(dict.fromkeys(roots)), layers):
        yield
