"""A way past a refusal: an adapter that carries its frozen factors, over a base that differs.

`on_other_base="warn"` says so, for one call. What that call does asks `refuse_other_base` where a
weight is not the one that the adapter was made for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from ..context.called import shown

WAYS = ("refuse", "warn")
NOTED: ContextVar[list[str] | None] = ContextVar("noted", default=None)  # None: refuse


def on_other_base(way: str | None, what: Any) -> Any:
    """A context in which bases that differ are refused or, with "warn", named in one UserWarning.

    None leaves it as it is. Raises ValueError for another word.
    """
    if way is None:
        return nullcontext()
    if way not in WAYS:
        raise ValueError(f"on_other_base is {way!r}: it must be {' or '.join(map(repr, WAYS))}")
    return noting([] if way == "warn" else None, what)


@contextmanager
def noting(noted: list[str] | None, what: Any) -> Iterator[None]:
    token = NOTED.set(noted)
    try:
        yield
    finally:
        NOTED.reset(token)
    if noted:
        warnings.warn(
            f"{what} was made for another base model: the weights of "
            f"{shown(list(dict.fromkeys(noted)))} differ from those it was trained on. It is "
            "loaded all the same, as on_other_base='warn' asks",
            stacklevel=4,
        )


def refuse_other_base(layer: str, message: str, carries: bool = True) -> None:
    """Raise ValueError with the message, or note the layer where that was asked for.

    It always raises where the adapter does not carry its frozen factors (`carries`): made from
    another weight they would be others.
    """
    if not carries:
        raise ValueError(f"{message}, and the adapter comes without its frozen factors")
    noted = NOTED.get()
    if noted is None:
        raise ValueError(f"{message}; on_other_base='warn' takes it all the same")
    noted.append(layer)
