"""AdapterBank: many adapters over one base, each row of a batch with its own.

Adapters that share down and up differ in their cores alone, so an adapter is a slot of each layer's
table of cores. Names are what users see. A handle is a slot and its generation, which rises when
the slot is freed: a handle from before is refused and never reads what another adapter left there.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..adapt import require_adapted
from ..calls import Learned
from ..compute.reference import NONE, SLOT_BITS
from ..elsewhere import device_of
from ..fingerprint import differing, fingerprint_of
from ..layers.base import WEIGHT_DTYPES
from ..layers.keywords import integer
from ..other_base import on_other_base as asked
from .assignment import Routing, Shelf, Use, checkpoint_context, purge
from .attach import Stamp, attach, check_layers, index_of, new_shelf, versions
from .inputs import (
    Assigned,
    Assignments,
    Lines,
    Names,
    check_distinct,
    check_handles,
    check_weights,
    flattened,
    lines_of,
)
from .layer import Place
from .sources import Cores, cores_of, fresh_cores, source_name

if TYPE_CHECKING:
    from .training import Trainable

_keys = itertools.count(1)


class AdapterBank:
    """Up to `slots` adapters of one adapted model, resident on its device.

    Made by `from_model`. For each adapted layer it holds one table, (slots, P, Q), at a fixed
    address; or (slots, P, r) and (slots, r, Q) for LoRA-Mini where that is smaller.

        bank = AdapterBank.from_model(model, slots=10_000)
        bank.add("alice", "alice.safetensors")
        with bank.use(["alice", None, "bob"]):  # one for each sequence; None: the base model
            model(x)

    Changing the bank is safe beside calls on other threads: what a call has started with stays in
    place until it, and the backward of it, are over.
    """

    shelves: dict[str, Shelf]
    generations: Tensor  # int32 (slots,): of each slot, those of the handles that are valid
    refused: Tensor  # int32 (1,): whether a call met a handle that is not

    def __init__(self, model: nn.Module, slots: int, dtype: torch.dtype | None = None) -> None:
        self.model, self.layers = model, require_adapted(model)
        check_layers(self.layers)
        slots = integer("slots", slots)
        if not 1 <= slots < 1 << 31:
            raise ValueError(f"slots is {slots!r}: it must be at least 1 and below 2³¹")
        if dtype not in (None, *WEIGHT_DTYPES):
            raise ValueError(f"dtype is {dtype}: it must be one of {WEIGHT_DTYPES}")
        self.slots, self.key = slots, next(_keys)
        self.device = device_of(next(iter(self.layers.values())))
        self.shelves = {
            name: new_shelf(layer, slots, dtype or layer.weight.dtype)
            for name, layer in self.layers.items()
        }
        self.generations = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self.refused = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.training: Trainable | None = None  # what `trainable` has given out
        self._generation = np.zeros(slots, np.int64)  # of each slot, as `generations` has it
        self._slot: dict[str, int] = {}
        self._free: deque[int] = deque(range(slots))
        self._retired: deque[tuple[int, int]] = deque()  # (slot, serial)
        self._serials = itertools.count()
        self._running: weakref.WeakValueDictionary[int, Routing] = weakref.WeakValueDictionary()
        self._assignments = Assignments(self.device)
        self._fingerprints = {name: fingerprint_of(layer) for name, layer in self.layers.items()}
        self.seen: list[int] | None = None  # versions of `_watched`; None: look again
        self._stamps = {name: Stamp.of(layer) for name, layer in self.layers.items()}
        self._watch()
        self._lock = threading.RLock()
        self._learned = Learned()
        self._hooks = attach(model, self)

    @classmethod
    def from_model(
        cls, adapted_model: nn.Module, *, slots: int, dtype: torch.dtype | None = None
    ) -> AdapterBank:
        """An empty bank for an adapted model, whose layers it routes from now on.

        Outside `use` the model computes what it did before.

        Args:
            adapted_model: a model after `adapt` or `load_adapter`, by "lora_xs" or "lora_mini", of
                which nothing but the core is trained.
            slots: how many adapters it can hold.
            dtype: of the tables; None: each layer's weight's.

        Raises:
            ValueError: no adapted layers; layers that train their frozen factors, their weight or
                bias; merged or uninitialised ones; a model that has a bank already; slots below 1.
        """
        return cls(adapted_model, slots, dtype)

    # --- what is in it ---

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they came."""
        with self._lock:
            return list(self._slot)

    def __len__(self) -> int:
        return len(self._slot)

    def __contains__(self, name: object) -> bool:
        return name in self._slot

    @property
    def nbytes(self) -> int:
        """Bytes of all tables, full or not."""
        parts = [part for shelf in self.shelves.values() for part in shelf if part is not None]
        return sum(part.nbytes for part in (*parts, self.generations, self.refused))

    def __repr__(self) -> str:
        each = self.nbytes // self.slots
        return (
            f"AdapterBank({len(self)} of {self.slots} slots, {len(self.layers)} layers, "
            f"{each:,} bytes an adapter)"
        )

    # --- changing it ---

    def add(
        self,
        name: str,
        source: Any = None,
        *,
        on_other_base: Literal["refuse", "warn"] = "refuse",
    ) -> None:
        """Put an adapter in, under a new name.

        `source` is a file of `save_adapter`, a folder of PEFT's, a state_dict ({layer}.core, or
        {layer}.a_train and .b_train, with whatever else), a model adapted alike, a PeftModel with
        one active adapter, or None for a fresh adapter as the method starts one. Its frozen
        factors, or their fingerprint, must be those of the bank; a state_dict without them is taken
        at its word, at the model's own alpha. Ranks below the bank's fit where its factors are the
        first ones of the bank's. With on_other_base="warn" a source for other weights, of the same
        frozen factors, is no error but a UserWarning.

        Raises:
            ValueError: a name that is there, or is no string; a source that does not fit, holds
                NaN or Inf, or was made for another base. The bank is as it was.
            RuntimeError: the bank is full.
        """
        with asked(on_other_base, source_name(source)):
            cores = self._cores(source)
        self.put([name], cores)

    def replace(
        self,
        name: str,
        source: Any = None,
        *,
        on_other_base: Literal["refuse", "warn"] = "refuse",
    ) -> None:
        """Give a name another adapter. Calls under way keep the old one; needs one free slot.

        Raises as `add`, and ValueError for a name that is not there.
        """
        with asked(on_other_base, source_name(source)):
            cores = self._cores(source)
        self.put([name], cores, new=False)

    def remove(self, name: str) -> None:
        """Take an adapter out. Calls under way keep it; its slot is free after them."""
        with self._lock:
            self._known([name])
            self._assignments.forget()
            self._retire([self._slot.pop(name)])

    def put(self, names: Sequence[str], cores: Cores, new: bool = True) -> None:
        """Put many adapters in at once, or none of them.

        `cores` has for each layer (left (n, P, Q), right None, scales (n,)), or left (n, P, r) and
        right (n, r, Q) where the bank holds pairs, checked.
        """
        if not names:
            return
        with self._lock:
            self._replaced(names, new)
            slots = self._take(len(names))
        try:
            self._write(slots, cores)  # nobody sees them yet: calls need not wait
            with self._lock:
                old = self._replaced(names, new)  # another thread may have come first
                self._slot.update(zip(names, slots, strict=True))
                if old:  # a new name was not remembered, and changes no other
                    self._assignments.forget()
        except BaseException:
            with self._lock:
                self._free.extendleft(reversed(slots))
            raise
        with self._lock:
            self._retire(old)

    def _cores(self, source: Any) -> Cores:
        self.check_frozen()
        return fresh_cores(self) if source is None else cores_of(self, source)

    def fingerprint(self, layer: str) -> Tensor:
        """That of `fingerprint.fingerprint_of`, of the layer as the bank was made over it."""
        return self._fingerprints[layer]

    def check_frozen(self, thorough: bool = True) -> None:
        """Raise RuntimeError if what the adapters share was replaced, or written to, since.

        Values are compared where tensors are others, lie elsewhere or were written to, as PyTorch
        counts it: by `.data` it does not. If not `thorough`, it is asked of down and up alone, and
        not where they lie, which costs the host less.
        """
        if not thorough and versions(self._watched) == self.seen:
            return
        with self._lock:
            for name, layer in self.layers.items():
                stamp = Stamp.of(layer)
                if stamp.same(self._stamps[name]):
                    continue
                sides = layer.down.shape[0], layer.up.shape[1]
                found = differing(fingerprint_of(layer), self._fingerprints[name], *sides)
                if not thorough and found == ["weight"]:
                    continue  # somebody has pruned the base, say; who adds an adapter is told
                if found:
                    raise RuntimeError(
                        f"{name} has another {' and another '.join(found)} than the bank was made "
                        "over, to which its adapters belong: put those back; or close() the bank, "
                        "and make another with adapters of the model as it is now"
                    )
                self._stamps[name] = stamp
            self._watch()

    def _watch(self) -> None:
        tensors = [tensor for stamp in self._stamps.values() for tensor in stamp.tensors[:2]]
        self._watched = [tensor for tensor in tensors if not tensor.is_inference()]
        self.seen = versions(self._watched)

    def _replaced(self, names: Sequence[str], new: bool) -> list[int]:
        """The slots of the names, which must be there; or none, where they must be new."""
        if not new:
            return self._known(names)
        for name in names:
            if not isinstance(name, str) or not name:
                raise ValueError(f"{name!r} is no name: it must be a string that is not empty")
            if name in self._slot:
                raise ValueError(f"{name!r} is in the bank already: replace it, or remove it first")
        check_distinct(names)
        return []

    def _known(self, names: Sequence[str]) -> list[int]:
        try:
            return [self._slot[name] for name in names]
        except (KeyError, TypeError):
            unknown = next(n for n in names if not isinstance(n, str) or n not in self._slot)
            raise ValueError(
                f"{unknown!r} is not in the bank, or is there no more; it holds {len(self)} "
                "adapters: bank.names"
            ) from None

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
        for name, shelf in self.shelves.items():
            for part, values in zip(shelf, cores[name], strict=True):
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

    # --- using it ---

    def handles(self, names: Names) -> Tensor:
        """Handles of names, int64 (lines, k) on the bank's device: for a buffer that `use` reads.

        They are valid until the name is replaced or removed, and calls that began before are over;
        after that they act as None, and `check` says so.
        """
        lines, flat = flattened(names)
        with self._lock:
            try:
                look_up: Any = self._slot.get
                slots = np.fromiter(map(look_up, flat, itertools.repeat(NONE)), np.int64, len(flat))
            except TypeError:  # one that cannot be looked up
                slots = np.full(len(flat), NONE)
            absent = int((slots == NONE).sum())
            if absent and flat.count(None) < absent:
                self._known([name for name in flat if name is not None])  # says which is not
            handles = self._generation[slots] << SLOT_BITS | slots  # NONE, all bits set, stays NONE
        return torch.from_numpy(handles.reshape(lines, -1)).to(self.device)

    def use(self, names: Names, weights: Tensor | None = None) -> Use:
        """Within it, calls of the model in this context use the named adapters.

        Args:
            names: a name or None (the base model) for each sequence; or for each row of packed
                input; or, for mixtures, a list of k of them for each. One name or None for the
                whole batch is computed as a single adapter is. Or `handles` of them, int64
                (lines,) or (lines, k) on the bank's device: these are read when the kernels run,
                so that a captured graph serves whatever the buffer holds then. Where gradients are
                wanted, nothing may be written to it before the backward: that is an error.
            weights: (lines, k), float, without gradient: each row uses the weighted sum of its k
                adapters.

        The sequences are counted in the first dimension of the model's inputs, which must be as
        many as the lines; or, within transformers' `generate`, as many times that as it makes of
        each (beams, num_return_sequences); or the inputs are (1, lines, …), packed. Where they are
        in what a layer gets is found by following them in the first call of each kind: in any
        dimension, flattened with positions, repeated. A layer that is called by itself must get
        (lines, …, K). The first use of a bank runs compiled models as they were written.

        Raises:
            ValueError: an unknown name; handles or weights of another shape; inputs of another
                number of sequences; a layer of whose rows it is not known whose they are, as of
                experts or image patches. It names the layer.
            TypeError: names that are no list; handles that are not int64; weights that require a
                gradient.
            RuntimeError: the layers' down and up are not those that the bank was made over;
                or, at the end, no layer of the model was called: it was another model.
        """
        return Use(self._begin, self, names, weights)

    def _begin(self, store: Any, names: Names, weights: Tensor | None) -> Routing:
        """What a `use` that is entered now routes by."""
        self.check_frozen(thorough=False)
        with self._lock:
            routing = self._routing(store, names, weights)
            if store is self:
                self._running[next(self._serials)] = routing
        return routing

    def _routing(self, store: Any, names: Names, weights: Tensor | None) -> Routing:
        if isinstance(names, Tensor):
            handles = check_handles(names, self.device)
            routing = Routing(self.key, store, (), handles, own=(handles,))
        elif isinstance(names, str) and store is self:
            (slot,) = self._known([names])
            routing = Routing(self.key, store, (names,), slot=slot)
        else:
            lines: Any = lines_of(names)
            empty = lines == () and store is self
            handles, known = store.assigned((None,) if empty else lines)
            bare = names is None or empty
            routing = Routing(self.key, store, lines, handles, bare=bare, empty=empty, known=known)
        routing.learned = self._learned
        if weights is not None:
            routing.weights = check_weights(weights, routing.handles)
            routing.own = *routing.own, routing.weights
        return routing

    def assigned(self, lines: Lines) -> Assigned:
        """The handles of names for `use`, remembered; to be called under the lock."""
        return self._assignments.of(lines, self.handles)

    def check(self) -> None:
        """Raise RuntimeError if a call since the last check met a handle that is not valid.

        Such rows were computed as the base model's. Waits for the device.
        """
        if int(self.refused):
            self.refused.zero_()
            raise RuntimeError(
                "a handle was not of this bank, or its adapter had been replaced or removed: its "
                "rows were computed without an adapter"
            )

    checkpoint_context = staticmethod(checkpoint_context)

    def close(self) -> None:
        """Take the bank off its model, which then is as before; the bank is of no more use."""
        for layer in self.layers.values():
            if isinstance(layer.routed, Place) and layer.routed.bank is self:
                layer.routed = None
        for hook in self._hooks:
            hook.remove()

    # --- training ---

    def trainable(self, names: Sequence[str]) -> Trainable:
        """The named adapters as Parameters, to be trained in common batches; one such at a time.

        Raises:
            ValueError: a name that is not in the bank, or comes twice; no name.
            RuntimeError: adapters are in training already.
        """
        from .training import Trainable

        if isinstance(names, str) or not names:
            raise ValueError(f"names is {names!r}: it must be a list of names, at least one")
        with self._lock:
            if len(set(self._known(names))) < len(names):
                raise ValueError("a name comes twice: each adapter is trained once")
            if self.training is not None:
                raise RuntimeError("adapters of this bank are in training: close() that first")
            self.training = Trainable(self, names)
        return self.training

    # --- files ---

    @contextmanager
    def kept(self, names: Sequence[str] | None) -> Iterator[dict[str, int]]:
        """Names, or all, and their slots, which stay as they are within it, as under a call."""
        with self._lock:
            names = list(self._slot) if names is None else names
            slots, serial = dict(zip(names, self._known(names), strict=True)), next(self._serials)
            self._running[serial] = reader = Routing(self.key, self, ())
        try:
            yield slots
        finally:
            del self._running[serial], reader

    def save(self, path: str | os.PathLike[str], names: Sequence[str] | None = None) -> None:
        """Write the adapters, or those named, to one safetensors file, whole or not at all.

        Calls and changes go on beside it, and the file has what was there when it began. Needs
        the memory of one layer's table. Raises ValueError for a name that is not there.
        """
        from .file import save

        save(self, path, names)

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        progress: bool = True,
        on_other_base: Literal["refuse", "warn"] = "refuse",
    ) -> None:
        """Put in all adapters of a file that `save` wrote, or none of them.

        Raises ValueError for a file that is truncated, from another base, holds NaN or a name that
        is there already, and RuntimeError where there are too few slots. on_other_base: as `add`.
        """
        from .file import load

        with asked(on_other_base, path):
            load(self, path, progress)
