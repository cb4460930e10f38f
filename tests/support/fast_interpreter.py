"""`speed_up` takes repeated work out of Triton's interpreter; what it computes stays the same."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any


def speed_up() -> None:
    """Have a launch put the interpreter's functions into Triton's language once.

    Triton does it again at each call that a kernel makes of another function, by a look at every
    member of the language; for small tiles that is 0.4 of a launch's time. The first of these calls
    has changed all that there is to change, and the launch takes it back at its end.
    """
    from triton.runtime import interpreter

    tl = interpreter.tl
    change, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    changed: set[ModuleType] = set()  # in the launch that is under way

    @functools.cache
    def languages(function: Callable) -> set[ModuleType]:
        modules = filter(inspect.ismodule, function.__globals__.values())
        return {module for module in modules if module in (tl, tl.core)}

    @functools.wraps(change)
    def change_once(function: Callable) -> Any:
        needed = languages(function)
        if needed and needed <= changed:
            return interpreter._LangPatchScope()
        scope = change(function)
        changed.update(needed)
        return scope

    @functools.wraps(restore)
    def restore_all(scope: Any) -> None:
        restore(scope)
        changed.clear()

    interpreter._patch_lang = change_once
    interpreter._LangPatchScope.restore = restore_all
