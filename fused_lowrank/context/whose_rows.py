"""The rows of a layer's input: which are whose, by the call that is running and what is remembered.

`spread` says it, or why it is not known; `learn` remembers where the sequences were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .calls import VARIES, Call, Layout, Layouts, Learned, Spread, expansion
from .following_rules import MIXED, NOBODY, State, Where


def spread(
    layer: str,
    lead: Sequence[int],
    entries: int,
    call: Call | None,
    learned: Learned,
    x: Tensor | None,
) -> Spread | str:
    """The `Spread` of a layer's x, (*lead, K), or the reason why it is not known.

    Args:
        layer: its name.
        lead: x's dimensions before K.
        entries: how many there are: adapters, or mixtures of some, that the call names.
        call: the model's; None: the layer is called by itself, or from a compiled graph.
        learned: what is remembered of the model.
        x: None in a compiled graph.
    """
    rows = math.prod(lead)
    if entries == 1 or rows == 0:
        return Spread(1, rows // entries)
    layouts = learned.layouts.setdefault(layer, {})
    if call is None:
        return uncalled(lead, entries, layouts, x is not None)
    if not call.fits:
        return f"the model was called with another number of sequences: {call.given}"
    key = call.axis, len(lead)
    if call.follower is None or x is None:
        layout = layouts.get(key)
        if layout is None:
            return by_size(lead, entries, call.n, call.axis)
        found = by_layout(layout, lead, entries, call.n)
        if isinstance(found, str):  # it is called in another way now: so be it followed
            learned.varies = True
            return f"{found}; from the next call on every call is followed, so call it again"
        return found
    state = call.follower.where(x)
    if why := nowhere(state, lead):
        return why
    if not isinstance(state, Where):
        found = by_size(lead, entries, call.n, call.axis)
        return f"it {state.why}, and {found}" if isinstance(found, str) else found
    learn(layouts, key, lead, state, call)
    return by_state(state, lead, entries, call.n)


def followed(
    layer: str,
    lead: Sequence[int],
    entries: int,
    call: Call | None,
    learned: Learned,
    x: Tensor | None,
) -> Spread | None:
    """The spread that following has found of a layer's x, now or before; arguments as `spread`'s.

    That it has found nothing there is remembered as well: later calls may not go by sizes.
    """
    if x is not None and (call is None or not call.fits):
        return None
    axis, n = (0, entries) if call is None else (call.axis, call.n)
    layouts, key = learned.layouts.setdefault(layer, {}), (axis, len(lead))
    if call is not None and call.follower is not None and x is not None:
        state = call.follower.where(x)
        if why := nowhere(state, lead):
            layouts[key] = why if isinstance(layouts.get(key, why), str) else VARIES
            learned.varies |= layouts[key] is VARIES
            learned.found.clear()
        elif isinstance(state, Where):
            learn(layouts, key, lead, state, call)
            return by_state(state, lead, entries, n)
        return None
    layout = layouts.get(key)
    found = "" if layout is None or n == 0 else by_layout(layout, lead, entries, n)
    return found if isinstance(found, Spread) else None


def nowhere(state: State, lead: Sequence[int]) -> str:
    """The reason why a layer's rows are of no one sequence, where that is known."""
    if state == MIXED or (isinstance(state, Where) and state.dim == len(lead)):
        return f"it {MIXED.why}"
    return f"it {NOBODY.why}" if state == NOBODY and len(lead) < 2 else ""


def by_state(state: Where, lead: Sequence[int], entries: int, n: int) -> Spread:
    """The spread by the place at which following found the sequences."""
    repeat = state.inner * math.prod(lead[state.dim + 1 :]) * (n // entries)
    return Spread(math.prod(lead) // (entries * repeat), repeat)


def uncalled(lead: Sequence[int], entries: int, layouts: Layouts, own: bool) -> Spread | str:
    """`spread` outside a model's call: the caller calls the layer, or a compiled graph does."""
    if not lead:
        return "it has one row"
    n, rows = entries, math.prod(lead)
    if lead[0] != entries and lead[0] % entries == 0:
        n *= expansion()
    axis = int(len(lead) > 1 and lead[0] == 1 and lead[1] == entries)
    if own:
        fits = lead[0] == n or rows == entries
        return Spread(1, rows // entries) if fits else f"its first dimension is not {entries}"
    layout = layouts.get((axis, len(lead)))
    if layout is not None:
        return by_layout(layout, lead, entries, n)
    return by_size(lead, entries, n, axis)


def learn(
    layouts: Layouts, key: tuple[int, int], lead: Sequence[int], state: Where, call: Call
) -> None:
    """Remember where the sequences were."""
    around = lead[state.dim] // (call.n * state.inner)
    layout, before = Layout(state.dim, state.inner > 1, around > 1), layouts.get(key)
    if isinstance(before, str):
        layout = VARIES
    elif before is not None and before != layout:
        layout = Layout(layout.dim, layout.inner or before.inner, layout.outer or before.outer)
        if before.dim != layout.dim:
            layout = VARIES
    if layout.inner and layout.outer:
        layout = VARIES
    layouts[key] = layout
    call.learned.found.clear()
    call.learned.varies |= layout is VARIES


def by_layout(layout: Layout | str, lead: Sequence[int], entries: int, n: int) -> Spread | str:
    """The spread by the dimension in which the sequences were before."""
    if isinstance(layout, str):
        return layout
    if layout is VARIES:
        return "it is called in several ways"
    size = lead[layout.dim]
    if size % n or (size != n and not (layout.inner or layout.outer)):
        return f"dimension {layout.dim} of x, in which the sequences were before, is not {n}"
    inner = size // n if layout.inner else 1
    repeat = inner * math.prod(lead[layout.dim + 1 :]) * (n // entries)
    return Spread(math.prod(lead) // (entries * repeat), repeat)


def by_size(lead: Sequence[int], entries: int, n: int, axis: int) -> Spread | str:
    """The spread by sizes alone, where all else is unknown: no other dimension may be as many."""
    if len(lead) <= axis or lead[axis] != n or any(size != 1 for size in lead[:axis]):
        return f"dimension {axis} of x is not {n}"
    if n in lead[axis + 1 :]:
        return f"two dimensions of x are {n}"
    return Spread(1, math.prod(lead) // entries)


def not_known(layer: str, lead: Sequence[int], entries: int, who: str, why: str) -> ValueError:
    """The error of a layer of whose input it is not known which rows are whose."""
    return ValueError(
        f"{layer} was called with x of {shown(lead)}, but {who} was given {entries} adapters, and "
        f"which rows are whose is not known: {why}. Name an adapter for each row of the model's "
        "inputs, whose first dimension is the batch (also where a batch is doubled); or say whose "
        "the rows of this layer are: declare_rows(layer, rows); or leave it out (exclude_modules); "
        "or call the model with one adapter at a time"
    )


def shown(lead: Sequence[int]) -> str:
    """The shape of a layer's x."""
    return f"({', '.join(map(str, (*lead, 'K')))})"
