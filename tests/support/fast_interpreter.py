"""`speed_up` takes repeated work out of Triton's interpreter; what it computes stays the same."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np


def speed_up() -> None:
    """Have the interpreter do once what it does again and again for tiles of a few elements.

    Of a launch of small tiles this leaves less than half of the time.
    """
    from triton.runtime import interpreter

    patch_once(interpreter)
    leave_out_unread_checks(interpreter)
    remember_types(interpreter)
    convert_by_shifts(interpreter)


def patch_once(interpreter: Any) -> None:
    """Have a launch put the interpreter's functions into Triton's language once.

    Triton does it again at each call that a kernel makes of another function, by a look at every
    member of the language; for small tiles that is 0.4 of a launch's time. The first of these calls
    has changed all that there is to change, and the launch takes it back at its end.
    """
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


def leave_out_unread_checks(interpreter: Any) -> None:
    """Do not compute whether an operation on integers overflows, as nothing looks at it.

    `device_assert` drops the condition that comes of it, unless the options say debug, which the
    interpreter's never do.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def remember_types(interpreter: Any) -> None:
    """Make what depends on a type alone once for each: blocks, shapes and numpy's dtypes."""
    core, dtype_of = interpreter.tl.core, interpreter._get_np_dtype
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value
    blocks: dict[tuple, tuple] = {}
    shapes: dict[tuple, Any] = {}
    sizes: dict[str, tuple] = {}
    dtypes: dict[str, np.dtype] = {}

    @functools.wraps(make_block)
    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sides = [side.value if isinstance(side, core.constexpr) else side for side in shape]
        key = element_ty.name, *sides
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = shapes.setdefault(key[1:], self.shape), self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    @functools.wraps(make_tensor)
    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in sizes:
            make_tensor(self, handle, type)
            sizes[type.name] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sizes[type.name]

    @functools.wraps(broadcast)
    def alike(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if getattr(lhs.type, "shape", None) is getattr(rhs.type, "shape", None):
            return lhs, rhs  # two numbers, or two blocks of one shape
        return broadcast(self, lhs, rhs)

    @functools.wraps(dtype_of)
    def np_dtype(kind: Any) -> np.dtype:
        if kind.name not in dtypes:
            dtypes[kind.name] = dtype_of(kind)
        return dtypes[kind.name]

    core.block_type.__init__, core.tensor.__init__ = block, tensor
    semantic.broadcast_impl_value = alike
    interpreter._get_np_dtype = np_dtype


def convert_by_shifts(interpreter: Any) -> None:
    """Convert between bfloat16 and float32 by a shift of the bits, but where some are subnormal."""
    original = interpreter._convert_float

    @functools.wraps(original)
    def convert(values: np.ndarray, given: Any, wanted: Any, rounding_mode: Any) -> np.ndarray:
        if rounding_mode is None and {given.name, wanted.name} == {"bf16", "fp32"}:
            wide = given.name == "fp32"
            bits = np.ascontiguousarray(values).view(np.uint32 if wide else np.uint16)
            exponents, digits = (0x7F800000, 0x007FFFFF) if wide else (0x7F80, 0x007F)
            if not (((bits & exponents) == 0) & ((bits & digits) != 0)).any():
                bits = (bits >> 16).astype(np.uint16) if wide else bits.astype(np.uint32) << 16
                return bits.reshape(values.shape)
        return original(values, given, wanted, rounding_mode)

    interpreter._convert_float = convert
