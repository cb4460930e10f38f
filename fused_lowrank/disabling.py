"""Which layers are disabled in the calling thread or asyncio task."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class Switch:
    """A layer's `disabled` while some context has it disabled: true in those contexts alone.

    A compiled graph cannot ask whose call it is; while it is made, the switch is true.
    """

    def __init__(self) -> None:
        self.count = 0  # of the contexts

    def __bool__(self) -> bool:
        return torch.compiler.is_compiling() or self in OFF.get()

    def __reduce__(self) -> Any:
        """Copies are on, for no context knows them; so none is made where this one is off."""
        if self in OFF.get():
            raise RuntimeError(
                "a copy of the model, made within disable_adapters, would not be disabled: copy or "
                "pickle it outside, and unload(copy) gives its base model"
            )
        return Switch, ()


OFF: ContextVar[frozenset[Switch]] = ContextVar("fused_lowrank_disabled", default=frozenset())
_lock = threading.Lock()


@contextmanager
def disabled(layers: Sequence[Any]) -> Iterator[None]:
    """Within it the layers are disabled, for calls of this context."""
    switches = []
    with _lock:
        for layer in layers:
            if layer.disabled is not True:
                if not isinstance(layer.disabled, Switch):
                    layer.disabled = Switch()
                layer.disabled.count += 1
                switches.append((layer, layer.disabled))
    token = OFF.set(OFF.get() | {switch for _, switch in switches})
    try:
        yield
    finally:
        OFF.reset(token)
        with _lock:
            for layer, switch in switches:
                switch.count -= 1
                if switch.count == 0 and layer.disabled is switch:
                    layer.disabled = False
