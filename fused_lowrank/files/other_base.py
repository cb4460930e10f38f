"""The base that an adapter was made for, compared with a layer's; and a way past the refusal.

`on_other_base="warn"` asks for it, for one call, and an adapter that carries its frozen factors can
take it. What that call does asks `refuse_other_base` where a weight is not the adapter's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor

from ..compute.base.kinds import are_one_form
from ..context.called import shown
from ..methods import LowRankLinear
from . import peft_folder
from .contents import form_of
from .fingerprint import FINGERPRINT, WEIGHT_PROBES, differing, is_near

WAYS = ("refuse", "warn")
# (layer, how its base is stored otherwise or "") of each that differs; None: refuse
NOTED: ContextVar[list[tuple[str, str]] | None] = ContextVar("noted", default=None)


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
def noting(noted: list[tuple[str, str]] | None, what: Any) -> Iterator[None]:
    token = NOTED.set(noted)
    try:
        yield
    finally:
        NOTED.reset(token)
    if noted:
        forms = list(dict.fromkeys(form for _, form in noted if form))
        how = f" ({'; '.join(forms)})" if forms else ""
        warnings.warn(
            f"{what} was made for another base model: the weights of "
            f"{shown(list(dict.fromkeys(name for name, _ in noted)))} differ from those it was "
            f"trained on{how}. It is loaded all the same, as on_other_base='warn' asks",
            stacklevel=4,
        )


def refuse_other_base(layer: str, message: str, carries: bool = True, form: str = "") -> None:
    """Raise ValueError with the message, or note the layer where that was asked for, and how its
    base is stored otherwise.

    It always raises where the adapter does not carry its frozen factors (`carries`): made from
    another weight they would be others.
    """
    if not carries:
        raise ValueError(f"{message}, and the adapter comes without its frozen factors")
    noted = NOTED.get()
    if noted is None:
        raise ValueError(f"{message}; on_other_base='warn' takes it all the same")
    noted.append((layer, form))


def refuse_other_form(
    layer: str,
    entry: Mapping[str, Any],
    here: str | None,
    what: Any,
    near: Callable[[], bool],
    carries: bool = True,
) -> None:
    """As `refuse_other_base`, for a base that is not stored as the file's `entry` says of its own.

    Of 8 bits the values are too near to be told apart by a fingerprint. `near` says whether those
    of these two are; files that do not say what their base was are let through.
    """
    there = entry.get("base", here)
    if are_one_form(there, here):
        return
    form = f"{there or 'a plain matrix'} there, {here or 'a plain matrix'} here"
    one = ", quantised from the same or from each other as it seems" if near() else ""
    refuse_other_base(
        layer,
        f"{what} was made for another base model: the weight of {layer} is {form}{one}",
        carries,
        form,
    )


def check_base(
    name: str,
    layer: LowRankLinear,
    entry: Mapping[str, Any],
    ours: Tensor,
    there: Tensor | None,
    tensors: dict[str, Tensor],
    path: Any,
) -> None:
    """Raise if the file was made for another weight or, being without them, for other bases.

    `entry` is the file's of the layer.
    """
    down, up = layer.bases
    sides = down.shape[0], up.shape[1]
    if there is None or there.shape != (sum(sides) + 1 + WEIGHT_PROBES,):
        raise ValueError(f"{path} lacks {name}.{FINGERPRINT} of the layer's ranks: it is damaged")
    found = differing(ours, there, *sides)
    own = [factor for factor in ("down", "up") if factor in layer.row.factors]  # or of a seed
    carries = all(layer.row.key(name, factor) in tensors for factor in own)
    near = partial(is_near, ours, there)
    refuse_other_form(name, entry, form_of(layer), path, near, carries)
    if "weight" in found and f"{name}.weight" not in tensors:
        refuse_other_base(
            name,
            f"{path} was made for another base model: the weight of {name} differs from the one it "
            "was trained on",
            carries,
        )
    option = "save_projection" if peft_folder.is_folder(path) else "bases"
    for factor in ("down", "up"):
        if factor in found and layer.row.key(name, factor) not in tensors:
            raise ValueError(
                f"{path} was saved without its frozen factors, and {name}.{factor} computed here "
                f"is not the one it was trained with; save it with {option}=True"
            )
