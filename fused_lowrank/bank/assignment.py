"""The adapters that the rows of a call go to.

An `Assignment` belongs to the calling context: a thread or an asyncio task. Layers ask for theirs
when they run (`recompute.current`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ContextDecorator
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..compute.reference import RowCores
from ..context.calls import Call, Learned, Spread
from ..context.declared import Owners, Said, place_of
from ..context.recomputed import graph_task
from ..context.whose_rows import not_known, spread
from .inputs import ResolvedSlots
from .tables import Tables

LOST = (
    "a checkpoint recomputes a layer of a bank, and its adapters are not known any more. "
    "Checkpoint whole modules, called with the hidden states as their first tensor; or pass "
    "use_reentrant=False, context_fn=bank.checkpoint_context"
)


@dataclass(eq=False)
class Assignment:
    """The adapters of a call: an entry of handles for each sequence, or one for all of it."""

    key: int  # of the bank
    store: Tables
    names: Sequence[str | None]  # its entries, or the one; empty: the handles are the caller's
    handles: Tensor | None = None  # int64 (entries, k)
    weights: Tensor | None = None  # float32 (entries, k)
    slot: int = -1  # where there are no handles
    base_only: bool = False  # all of the call is declared to be the base model's
    empty: bool = False  # whether it is of an empty batch
    outer: Assignment | None = None
    task: int = -1  # the backward within which it was entered; -1: none
    served: bool = False  # whether a layer has asked for it, or for one inside it
    resolved_slots: ResolvedSlots | None = None  # of the handles, where they are known
    own: tuple[Tensor, ...] = ()  # what the caller may write to, of the handles and the weights
    learned: Learned = field(default_factory=Learned)  # of the bank's model
    _single_cores: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    spreads: dict[tuple[str, tuple[int, ...]], Spread | Owners | None] = field(default_factory=dict)
    # By layer and x's dimensions, for what is computed again in the backward; None: of two calls.

    @property
    def version(self) -> int:
        """A number that rises each time the caller writes to the handles or the weights."""
        version = 0
        for tensor in self.own:
            if not tensor.is_inference():
                version += tensor._version
        return version

    def row_cores(
        self,
        layer: str,
        lead: Sequence[int],
        call: Call | None,
        x: Tensor | None = None,
        said: Said | None = None,
    ) -> RowCores:
        """The cores for the rows of a layer's x, (*lead, K).

        Which rows are whose is as `said` declares or, without that, as `whose_rows.spread` finds
        it. Raises ValueError where it is not known.
        """
        handles, weights, resolved = self.handles, self.weights, self.resolved_slots
        assert handles is not None
        place = self._spread(handles.shape[0], layer, lead, call, x, said)
        if place.outer != 1:  # the entries come again and again, or in another order
            handles = place.laid(handles)
            weights = None if weights is None else place.laid(weights)
            if resolved is not None:
                slots, valid = resolved
                resolved = place.laid(slots, 1), None if valid is None else place.laid(valid, 1)
        store = self.store
        left, right, scales = store.tables[layer]
        return RowCores(
            left,
            right,
            handles,
            weights,
            scales,
            store.generations,
            store.refused,
            place.repeat,
            self,
            resolved,
        )

    def _spread(
        self,
        entries: int,
        layer: str,
        lead: Sequence[int],
        call: Call | None,
        x: Tensor | None,
        said: Said | None,
    ) -> Spread | Owners:
        key = layer, tuple(lead)
        if self.empty:
            self.require_rows(layer, lead)
        task = graph_task()
        again = task >= 0 and (x is None or task != self.task)
        if said is None and again and entries > 1:  # what is computed again, as it was
            before = self.spreads.get(key)
            if before is None:
                raise RuntimeError(LOST)
            return before
        sizes, last = None, self.learned.found.get(layer)
        if call is not None and call.follower is None and x is not None:
            sizes = lead, entries, call.n, call.axis
        found: Spread | Owners
        if said is not None:
            found = place_of(said, layer, lead, entries, call, self.learned, x)
        elif sizes is not None and last is not None and last[0] == sizes:
            found = last[1]
        else:
            new = spread(layer, lead, entries, call, self.learned, x)
            if isinstance(new, str):
                raise not_known(layer, lead, entries, "bank.use", new)
            found = new
            if sizes is not None:
                self.learned.found[layer] = sizes, found
        if self.spreads.setdefault(key, found) != found:
            self.spreads[key] = None
        return found

    def require_rows(self, layer: str, lead: Sequence[int]) -> None:
        """Raise ValueError if there are rows and no names."""
        if self.empty and 0 not in lead:
            raise not_known(layer, lead, 0, "bank.use", "no name was given")

    def single_core(self, layer: str) -> tuple[Tensor, Tensor | None]:
        """The core of the one adapter, times its scale: copies, whatever becomes of its slot."""
        found = self._single_cores.get(layer)
        if found is None:
            left, right, scales = self.store.tables[layer]
            wide = torch.promote_types(left.dtype, torch.float32)
            with torch.inference_mode(False):  # on the device: nobody waits for the scale
                core = left[self.slot].to(wide) * scales[self.slot].to(wide)
                found = core, None if right is None else right[self.slot].clone()
            self._single_cores[layer] = found
        return found


ACTIVE: ContextVar[Assignment | None] = ContextVar("fused_lowrank_assignment", default=None)


def find(head: Assignment | None, key: int) -> Assignment | None:
    """The innermost assignment of a bank among those that were entered."""
    while head is not None and head.key != key:
        head = head.outer
    return head


class Use(ContextDecorator, AbstractContextManager[None]):
    """A context in which calls have the assignment that `assign` gives; it can be entered again.

    A class, for a generator costs more at each call of a model.
    """

    def __init__(self, assign: Callable[..., Assignment], *given: Any) -> None:
        self._assign, self._given = assign, given
        self._entered: tuple[Assignment, Token[Assignment | None]] | None = None

    def _recreate_cm(self) -> Use:  # a decorated function may be called within itself
        return Use(self._assign, *self._given)

    def __enter__(self) -> None:
        if self._entered is not None:
            raise RuntimeError("this use was entered already: make another by bank.use(names)")
        assignment = self._assign(*self._given)
        learned, handles = assignment.learned, assignment.handles
        if learned.fresh and handles is not None and len(handles) > 1:
            learned.first_use()
        assignment.outer, assignment.task = ACTIVE.get(), graph_task()
        self._entered = assignment, ACTIVE.set(assignment)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._entered is not None
        (assignment, token), self._entered = self._entered, None  # who keeps this keeps no slot
        ACTIVE.reset(token)
        if assignment.learned.eager:
            assignment.learned.used()
        if kind is None and assignment.names and not assignment.served:
            raise RuntimeError(
                "no layer of this bank's model was called inside bank.use: was it another model? "
                "Or on another thread, which has no part in it? "
                "contextvars.copy_context().run(call) takes it there"
            )
