"""AdapterBank: many adapters over one base, each row of a batch with its own.

Adapters that share down and up differ in their cores alone, so an adapter is a slot of each layer's
table of cores. Names are what users see; `AdapterStore` holds them, and the tables.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..files.other_base import on_other_base as asked
from ..methods.accept import WEIGHT_DTYPES
from ..methods.keywords import integer
from ..models.adapt import require_adapted
from .assignment import Use
from .attach import attach, check_layers, detach
from .file import load, save
from .inputs import Names
from .recompute import checkpoint_context
from .sources import cores_of, source_name
from .store import AdapterStore
from .tables import Cores
from .training import Trainable


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

    def __init__(self, model: nn.Module, slots: int, dtype: torch.dtype | None = None) -> None:
        layers = require_adapted(model)
        check_layers(layers)
        slots = integer("slots", slots)
        if not 1 <= slots < 1 << 31:
            raise ValueError(f"slots is {slots!r}: it must be at least 1 and below 2³¹")
        if dtype not in (None, *WEIGHT_DTYPES):
            raise ValueError(f"dtype is {dtype}: it must be one of {WEIGHT_DTYPES}")
        self.model, self.layers, self.slots = model, layers, slots
        self.store = AdapterStore(layers, slots, dtype)
        self.store.owner = weakref.ref(self)  # layers hold the store alone
        self.device = self.store.device
        self._hooks = attach(model, self.store)

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
        return self.store.names

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, name: object) -> bool:
        return name in self.store

    @property
    def nbytes(self) -> int:
        """Bytes of all tables, full or not."""
        return self.store.nbytes

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
            cores = cores_of(self.store, self.model, source)
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
            cores = cores_of(self.store, self.model, source)
        self.put([name], cores, new=False)

    def remove(self, name: str) -> None:
        """Take an adapter out. Calls under way keep it; its slot is free after them.

        Raises ValueError for a name that is not there.
        """
        self.store.remove(name)

    def put(self, names: Sequence[str], cores: Cores, new: bool = True) -> None:
        """Put many adapters in at once, or none of them.

        `cores` has for each layer (left (n, P, Q), right None, scales (n,)), or left (n, P, r) and
        right (n, r, Q) where the bank holds pairs, checked. Without `new` they take the places of
        adapters that are there.

        Raises ValueError for names that are there, or without `new` are not, and RuntimeError where
        there are too few slots.
        """
        self.store.put(names, cores, new)

    # --- using it ---

    def handles(self, names: Names) -> Tensor:
        """Handles of names, int64 (lines, k) on the bank's device: for a buffer that `use` reads.

        They are valid until the name is replaced or removed, and calls that began before are over;
        after that they act as None, and `check` says so.

        Raises ValueError for a name that is not there, or entries of different lengths.
        """
        return self.store.handles(names)

    def use(self, names: Names, weights: Tensor | None = None) -> Use:
        """A context within which calls of the model use the named adapters.

        Args:
            names: a name or None (the base model) for each sequence; or for each row of packed
                input; or, for mixtures, a list of k of them for each. One name or None for the
                whole batch is computed as a single adapter is. Or `handles` of them, int64
                (lines,) or (lines, k) on the bank's device: these are read when the kernels run,
                so that a captured graph serves whatever the buffer holds then. Where gradients are
                wanted, nothing may be written to it before the backward: that is an error.
            weights: (lines, k), float, without gradient: each row uses the weighted sum of its k
                adapters.

        A line is the entry of one sequence in `names`, of k adapters. The sequences are counted in
        the first dimension of the model's inputs, which must be as many as the lines; or, within
        transformers' `generate`, as many times that as it makes of each (beams,
        num_return_sequences); or the inputs are (1, lines, …), packed. Where they are in what a
        layer gets is found by following them in the first call of each kind: in any dimension,
        flattened with positions, repeated. A layer that is called by itself must get (lines, …, K).
        The first use of a bank runs compiled models as they were written.

        Raises:
            ValueError: an unknown name; handles or weights of another shape; inputs of another
                number of sequences; a layer of whose rows it is not known whose they are, as of
                experts or image patches, until `declare_rows` says it. It names the layer.
            TypeError: names that are no list; handles that are not int64; weights that require a
                gradient.
            RuntimeError: the layers' down and up are not those that the bank was made over;
                or, at the end, no layer of the model was called: it was another model.
        """
        return Use(self.store.assign, names, weights)

    def check(self) -> None:
        """Raise RuntimeError if a call since the last check met a handle that is not valid.

        Such rows were computed as the base model's. Waits for the device.
        """
        self.store.check()

    checkpoint_context = staticmethod(checkpoint_context)

    def close(self) -> None:
        """Take the bank off its model, which then is as before; the bank is of no more use."""
        detach(self.store, self._hooks)

    # --- training ---

    def trainable(self, names: Sequence[str]) -> Trainable:
        """The named adapters as Parameters, to be trained in common batches; one such at a time.

        Raises:
            ValueError: a name that is not in the bank, or comes twice; no name.
            RuntimeError: adapters are in training already.
        """
        if isinstance(names, str) or not names:
            raise ValueError(f"names is {names!r}: it must be a list of names, at least one")
        with self.store.lock:
            if len(set(self.store.slots_of(names))) < len(names):
                raise ValueError("a name comes twice: each adapter is trained once")
            if self.store.trained is not None:
                raise RuntimeError("adapters of this bank are in training: close() that first")
            self.store.trained = trainable = Trainable(self.store, names)
            trainable.bank = self
        return trainable

    # --- files ---

    def save(self, path: str | os.PathLike[str], names: Sequence[str] | None = None) -> None:
        """Write the adapters, or those named, to one safetensors file, whole or not at all.

        Calls and changes go on beside it, and the file has what was there when it began. Needs
        the memory of one layer's table. Raises ValueError for a name that is not there.
        """
        save(self.store, path, names)

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
        with asked(on_other_base, path):
            load(self.store, path, progress)
