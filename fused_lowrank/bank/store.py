"""The adapters of a bank: names, slots, and who may still read them.

A handle is a slot and its generation, which rises when the slot is freed: a handle from before is
refused and never reads what another adapter left there.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compute.reference import NONE, SLOT_BITS
from ..context.calls import Learned
from ..context.elsewhere import device_of
from ..methods import LowRankLinear
from .assignment import ACTIVE, Assignment, find
from .inputs import (
    HandleCache,
    Names,
    check_distinct,
    check_handles,
    check_weights,
    entries_of,
    flattened,
)
from .recompute import purge
from .shared import SharedFactors
from .tables import Cores, CoreTable, Tables, index_of, new_table

_keys = itertools.count(1)


class AdapterStore:
    """Names, the slots that they have in the tables of a model's layers, and what is in those.

    It may be changed beside calls on other threads. A slot that a name has left is freed when no
    older `Assignment` lives: each call reads to its end, and its backward's, what it began with.
    """

    tables: dict[str, CoreTable]
    generations: Tensor  # int32 (slots,): of each slot, those of the handles that are valid
    refused: Tensor  # int32 (1,): whether a call met a handle that is not
    trained: Tables | None  # those of the adapters in training

    def __init__(
        self, layers: Mapping[str, LowRankLinear], slots: int, dtype: torch.dtype | None
    ) -> None:
        self.layers, self.slots, self.key = layers, slots, next(_keys)
        self.device = device_of(next(iter(layers.values())))
        with torch.inference_mode(False):  # written to outside it, too
            self.tables = {
                name: new_table(layer, slots, dtype or layer.base_weight.dtype)
                for name, layer in layers.items()
            }
            self.generations = torch.zeros(slots, dtype=torch.int32, device=self.device)
            self.refused = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.shared = SharedFactors(layers)
        self.trained = None
        self.learned = Learned()  # of the model's calls
        self.owner: weakref.ref[Any] | None = None  # the bank that users have
        self.lock = threading.RLock()  # held: no name changes hands, and no call starts
        self._generation = np.zeros(slots, np.int64)  # of each slot, as `generations` has it
        self._slots: dict[str, int] = {}
        self._free: deque[int] = deque(range(slots))
        self._retired: deque[tuple[int, int]] = deque()  # (slot, serial)
        self._serials = itertools.count()
        self._running: weakref.WeakValueDictionary[int, Assignment] = weakref.WeakValueDictionary()
        self._cache = HandleCache(self.device)

    # --- what is in it ---

    @property
    def names(self) -> list[str]:
        """The names, in the order in which they came."""
        with self.lock:
            return list(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of all tables, full or not."""
        parts = [part for table in self.tables.values() for part in table if part is not None]
        return sum(part.nbytes for part in (*parts, self.generations, self.refused))

    def slots_of(self, names: Sequence[str]) -> list[int]:
        """The slots of names; raises ValueError for one that is not there."""
        try:
            return [self._slots[name] for name in names]
        except (KeyError, TypeError):
            unknown = next(n for n in names if not isinstance(n, str) or n not in self._slots)
            raise ValueError(
                f"{unknown!r} is not in the bank, or is there no more; it holds {len(self)} "
                "adapters: bank.names"
            ) from None

    def handles(self, names: Names) -> Tensor:
        """Handles of names, int64 (entries, k) on the store's device."""
        count, flat = flattened(names)
        with self.lock:
            try:
                look_up: Any = self._slots.get
                slots = np.fromiter(map(look_up, flat, itertools.repeat(NONE)), np.int64, len(flat))
            except TypeError:  # one that cannot be looked up
                slots = np.full(len(flat), NONE)
            absent = int((slots == NONE).sum())
            if absent and flat.count(None) < absent:
                self.slots_of([name for name in flat if name is not None])  # says which is not
            handles = self._generation[slots] << SLOT_BITS | slots  # NONE, all bits set, stays NONE
        return torch.from_numpy(handles.reshape(count, -1)).to(self.device)

    @property
    def is_open(self) -> bool:
        """Whether calls may ask for adapters: somebody has the bank, or is in a `use` of it."""
        owned = self.owner is not None and self.owner() is not None
        return owned or find(ACTIVE.get(), self.key) is not None

    # --- changing it ---

    def put(self, names: Sequence[str], cores: Cores, new: bool = True) -> None:
        """Put many adapters in at once, or none of them; if not `new`, in the place of others.

        Raises ValueError for names that are there, or that are not; RuntimeError where slots lack.
        """
        if not names:
            return
        with self.lock:
            self._replaced(names, new)
            slots = self._take(len(names))
        try:
            self._write(slots, cores)  # nobody sees them yet: calls need not wait
            with self.lock:
                old = self._replaced(names, new)  # another thread may have come first
                self._slots.update(zip(names, slots, strict=True))
                if old:  # a new name was not remembered, and changes no other
                    self._cache.forget()
        except BaseException:
            with self.lock:
                self._free.extendleft(reversed(slots))
            raise
        with self.lock:
            self._retire(old)

    def replace_in_turn(self, names: Sequence[str], cores: Cores) -> None:
        """Replace adapters by as many at a time as there are slots for, all before a call starts.

        While there are calls under way it needs a free slot for each adapter, otherwise one.
        """
        with self.lock:
            self._release()
            purge()
            count = len(names)
            at_once = count if self._running else max(1, min(count, len(self._free)))
            for start in range(0, count, at_once):
                part = slice(start, start + at_once)
                values: Any = {
                    layer: tuple(None if side is None else side[part] for side in sides)
                    for layer, sides in cores.items()
                }
                self.put(names[part], values, new=False)

    def remove(self, name: str) -> None:
        """Take an adapter out; raises ValueError for a name that is not there."""
        with self.lock:
            self.slots_of([name])
            self._cache.forget()
            self._retire([self._slots.pop(name)])

    def _replaced(self, names: Sequence[str], new: bool) -> list[int]:
        """The slots of the names, which must be there; or none, where they must be new."""
        if not new:
            return self.slots_of(names)
        for name in names:
            if not isinstance(name, str) or not name:
                raise ValueError(f"{name!r} is no name: it must be a string that is not empty")
            if name in self._slots:
                raise ValueError(f"{name!r} is in the bank already: replace it, or remove it first")
        check_distinct(names)
        return []

    def _take(self, count: int) -> list[int]:
        self._release()
        if len(self._free) < count:
            waiting = len(self._retired)
            still = f", and {waiting} are kept by calls under way" if waiting else ""
            needed = "1 slot is" if count == 1 else f"{count} slots are"
            raise RuntimeError(
                f"the bank is full: {needed} needed and {len(self._free)} of {self.slots} "
                f"are free{still}. Make it with slots={self.slots - len(self._free) + count} or "
                "more, or remove adapters"
            )
        return [self._free.popleft() for _ in range(count)]

    @torch.no_grad()
    def _write(self, slots: list[int], cores: Cores) -> None:
        where = index_of(slots, self.device)
        for name, table in self.tables.items():
            for part, values in zip(table, cores[name], strict=True):
                if part is not None and values is not None:
                    # By .data: autograd is not to refuse a backward that reads other slots.
                    part.data[where] = values.to(part.device, part.dtype)
        if self.device.type == "cuda":  # whoever learns of them may be on another stream
            torch.cuda.current_stream(self.device).synchronize()

    def _retire(self, slots: Sequence[int]) -> None:
        serial = next(self._serials)
        self._retired.extend((slot, serial) for slot in slots)
        self._release()

    def _release(self) -> None:
        """Free the retired slots that no call can read any more."""
        if not self._retired:
            return
        purge()
        running: Any = self._running.valuerefs()  # its keys() may fail beside a call that ends
        oldest = min((ref.key for ref in running if ref() is not None), default=None)
        freed = []
        while self._retired and (oldest is None or self._retired[0][1] < oldest):
            freed.append(self._retired.popleft()[0])
        if freed:
            if self.device.type == "cuda":  # what was launched may still be running
                torch.cuda.synchronize(self.device)
            self._generation[freed] += 1
            self.generations[torch.tensor(freed, device=self.device)] += 1
            self._free.extend(freed)

    # --- reading it ---

    def assign(self, names: Names, weights: Tensor | None = None) -> Assignment:
        """The assignment of a `use` that is entered now; slots stay as they are while it lives."""
        self.shared.check(thorough=False)
        with self.lock:
            if isinstance(names, Tensor):
                handles = check_handles(names, self.device)
                made = Assignment(self.key, self, (), handles, own=(handles,), learned=self.learned)
            elif isinstance(names, str):
                (slot,) = self.slots_of([names])
                made = Assignment(self.key, self, (names,), slot=slot, learned=self.learned)
            else:
                entries = entries_of(names)
                empty = entries == ()
                handles, slots = self._cache.of((None,) if empty else entries, self.handles)
                made = Assignment(
                    self.key,
                    self,
                    entries,
                    handles,
                    base_only=names is None or empty,
                    empty=empty,
                    resolved_slots=slots,
                    learned=self.learned,
                )
            if weights is not None:
                made.weights = check_weights(weights, made.handles)
                made.own = *made.own, made.weights
            self._running[next(self._serials)] = made
        return made

    @contextmanager
    def holding(self, names: Sequence[str] | None) -> Iterator[dict[str, int]]:
        """Names, or all, and their slots, which stay as they are within it, as under a call."""
        with self.lock:
            names = list(self._slots) if names is None else names
            slots, serial = dict(zip(names, self.slots_of(names), strict=True)), next(self._serials)
            self._running[serial] = reader = Assignment(self.key, self, ())
        try:
            yield slots
        finally:
            del self._running[serial], reader

    def check(self) -> None:
        """Raise RuntimeError if a call since the last check met a handle that is not valid."""
        if int(self.refused):
            self.refused.zero_()
            raise RuntimeError(
                "a handle was not of this bank, or its adapter had been replaced or removed: its "
                "rows were computed without an adapter"
            )
