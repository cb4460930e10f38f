"""The layers that are disabled in the calling thread or asyncio task."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch

from .recomputed import OUTSIDE, Entered, again, graph_task, may_recompute, note, noted


class Switch:
    """A layer's `disabled` while some context has it disabled: true in those contexts alone.

    What a checkpoint computes again is disabled if it was so before, or is within the checkpoint. A
    compiled graph cannot ask whose call it is; while it is made, the switch is true.
    """

    def __init__(self) -> None:
        self.count = 0  # of the contexts
        self.checkpoints: weakref.WeakSet[Any] = weakref.WeakSet()  # that may compute it again

    def __bool__(self) -> bool:
        if torch.compiler.is_compiling():
            return True
        task = graph_task()
        if task >= 0 and again() is not None:
            within = OFF.get().get(self, ())
            return any(entered.task == task for entered in within) or noted(self) is not None
        return self in OFF.get()

    def note(self) -> None:
        """Note for the checkpoints around the running call that it is disabled."""
        if may_recompute():
            self.checkpoints.update(note(self, True, OFF.get().get(self, (OUTSIDE,))[0]))

    def __reduce__(self) -> Any:
        """A copy's switch is on in every context; so a copy is refused where this one is off."""
        if self in OFF.get():
            raise RuntimeError(
                "a copy of the model, made within disable_adapters, would not be disabled: copy or "
                "pickle it outside, and unload(copy) gives its base model"
            )
        return Switch, ()


# Those that are, with where each `with` was entered, the outermost first.
OFF: ContextVar[Mapping[Switch, tuple[Entered, ...]]] = ContextVar(
    "fused_lowrank_disabled", default=MappingProxyType({})
)
_lock = threading.Lock()


@contextmanager
def disabled(layers: Sequence[Any]) -> Iterator[None]:
    """A context within which the layers are disabled, for its own calls."""
    switches = []
    with _lock:
        for layer in layers:
            if layer.disabled is not True:
                if not isinstance(layer.disabled, Switch):
                    layer.disabled = Switch()
                layer.disabled.count += 1
                switches.append((layer, layer.disabled))
    before, entered = OFF.get(), Entered.now()
    token = OFF.set({**before, **{s: (*before.get(s, ()), entered) for _, s in switches}})
    try:
        yield
    finally:
        OFF.reset(token)
        with _lock:
            for layer, switch in switches:
                switch.count -= 1
                kept = switch.count or switch.checkpoints  # for as long as it may be asked
                if not kept and layer.disabled is switch:
                    layer.disabled = False
