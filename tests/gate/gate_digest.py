"""`launch_digest` is a hash of all that decides what the compile gate finds in a launch.

A row of tests/gate/gate.csv bears a seal of its launch's digest and its own figures. While the seal
holds, the row is what compiling the launch again would give, so the gate need not do it.

A digest is of the kernel's code and of all code and values that it names, of the same of the
functions that read what was compiled, and of the launch: its types, attributes, constants, options
and target. Code is taken as its syntax tree, without docstrings: neither comments, nor lines, nor
files' names count, nor which Python reads it. Triton's own code is told by its version, in the
table's first line. What it does not see: the environment, and Triton's files changed by hand.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import triton.language as tl
from triton.compiler import ASTSource
from triton.runtime.jit import JITCallable

from fused_lowrank.kernels.tiles import Target

LENGTH = 16  # of a digest, in hexadecimal digits
THEIRS = (*sys.stdlib_module_names, "torch", "triton", "numpy")  # these have versions, not digests


def hashed(*parts: Any) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:LENGTH]


def is_theirs(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "builtins").partition(".")[0] in THEIRS


def outline(node: Any) -> Any:
    """A syntax tree as nested lists, the same in every version of Python.

    Places, docstrings and empty fields, of which some versions have more, are left out.
    """
    if isinstance(node, ast.AST):
        children = [
            (name, value) for name, value in ast.iter_fields(node) if value not in (None, [])
        ]
        return [type(node).__name__, *((name, outline(value)) for name, value in children)]
    if isinstance(node, list):
        return [outline(part) for part in node if not is_docstring(part)]
    return repr(node)


def is_docstring(node: Any) -> bool:
    """Whether this is a text that stands alone: nothing is done with it."""
    alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return alone and isinstance(node.value.value, str)


def named(tree: ast.AST) -> Iterator[list[str]]:
    """Every name in the code with the attributes asked of it: ["tl", "float32"]."""
    for node in ast.walk(tree):
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            yield [node.id, *reversed(attributes)]


@functools.cache
def code_digest(function: FunctionType) -> str:
    """The digest of a function of ours and of all that it names, past modules."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    enclosed = inspect.getclosurevars(function).nonlocals
    scope = {**vars(builtins), **function.__globals__, **enclosed}
    told = set()
    for first, *attributes in named(tree):
        value = scope.get(first)  # None: a name of its own
        for name in attributes:
            if isinstance(value, ModuleType):  # where a module lies is another on each machine
                value = None if name == "__file__" else getattr(value, name, None)
        itself = getattr(value, "fn", value) is function
        told.add((".".join([first, *attributes]), "itself" if itself else said(value)))
    return hashed(outline(tree), sorted(told))


def said(value: Any) -> str:
    """The digest of a function of ours, the name of another and of a class, or the value itself."""
    if isinstance(value, tl.constexpr):
        return said(value.value)
    if isinstance(value, ModuleType):
        return "a module"  # what is asked of it is told beside it
    function = value.fn if isinstance(value, JITCallable) else inspect.unwrap(value)
    if isinstance(function, FunctionType) and not is_theirs(function):
        return code_digest(function)
    if callable(function) and hasattr(function, "__qualname__"):
        return function.__qualname__
    if isinstance(value, (list, tuple)):
        return str([said(part) for part in value])
    if isinstance(value, dict):
        return str([(said(key), said(part)) for key, part in value.items()])
    if " at 0x" in repr(value):
        raise TypeError(f"{value!r} is another in each process, so a digest cannot tell of it")
    return repr(value)


def launch_digest(source: ASTSource, options: dict[str, Any], target: Target) -> str:
    """The digest of what Triton is given to compile, for this target."""
    told = {name: value for name, value in options.items() if name != "extern_libs"}  # Triton's own
    constants, types = sorted(source.constants.items()), list(source.signature.items())
    launch = (types, source.attrs, constants, sorted(told.items()))
    return hashed(said(source.fn), source.language, said(launch), target)
