"""Plain values among the attributes of a model's modules, by which its code may choose what to do.

A model that is followed once runs other code after `model.mode = 1`, and no argument shows it. Only
attributes of instances are seen, not those of classes, nor what a config or a list holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any

from torch import nn

PLAIN = (bool, int, str, Enum, type(None))
LIBRARIES = ("torch.", "peft.", "fused_lowrank.")  # of modules that have no code of the model
Seen = list[tuple[Callable[[], nn.Module | None], int, list[str]]]


class Flags:
    """The attributes of a module, and of those within it, that may choose."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.seen: Seen = [
            (weakref.ref(own), *names_of(own))
            for own in module.modules()
            if not f"{type(own).__module__}.".startswith(LIBRARIES)
        ]

    def values(self, choice: Callable[[Any], Any]) -> tuple[Any, ...]:
        """The result of `choice` for each of them now."""
        found: list[Any] = []
        for place, (ref, size, names) in enumerate(self.seen):
            module = ref()
            if module is None:
                continue
            own = vars(module)
            if len(own) != size:  # one has come, as over a class's, or gone
                size, names = names_of(module)
                self.seen[place] = ref, size, names
            found += [choice(own.get(name)) for name in names]
        return tuple(found)


def names_of(module: nn.Module) -> tuple[int, list[str]]:
    """How many attributes a module has, and the names of those that are plain."""
    own = vars(module)
    return len(own), sorted(name for name, value in own.items() if isinstance(value, PLAIN))
