"""The names, handles and weights that calls give a bank: checked, and resolved to slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..compute.reference import NONE, SLOT_BITS

Names = str | None | Sequence[str | None] | Sequence[Sequence[str | None]] | Tensor
Entries = tuple[Any, ...]  # of names, or of lists of them
ResolvedSlots = tuple[Tensor, Tensor | None]  # as `RowCores.slots` has it
PLAIN = {str, type(None)}
CACHED = 64  # that are remembered at most
CACHED_NAMES = 1 << 18  # of all of them at most


class Resolved(NamedTuple):
    """The handles of names. Uses share the tensors, and nobody writes to them."""

    handles: Tensor  # int64 (entries, k), on the device
    slots: ResolvedSlots | None  # of them, on a CPU


class HandleCache:
    """The handles of the names that calls had last, for calls that have the same names again.

    Its owner calls it under a lock, and forgets all when a name comes to stand for something else.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._found: dict[Any, Resolved] = {}
        self._size = 0  # the names of all

    def __len__(self) -> int:
        return len(self._found)

    def of(self, entries: Entries, make: Callable[[Any], Tensor]) -> Resolved:
        """The remembered handles of these entries, or else those that `make` makes of them."""
        stream = 0
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return self._made(entries, make)  # a graph's memory is its own
            # Memory is given back to the stream that it was made on, which must be the reader's.
            stream = torch.cuda.current_stream(self.device).cuda_stream
        key: Any = entries, stream
        try:
            found = self._found.get(key)
        except TypeError:  # lists are entries as tuples are, but cannot be looked up
            key = tuple([tuple(x) if isinstance(x, list) else x for x in entries]), stream
            try:
                found = self._found.get(key)
            except TypeError:  # nor can these: the error is `make`'s
                return self._made(entries, make)
        if found is None:
            found = self._made(entries, make)
            self._keep(key, found)
        return found

    def _made(self, entries: Entries, make: Callable[[Any], Tensor]) -> Resolved:
        with torch.inference_mode(False):  # a later use may want gradients
            handles = make(entries)
            # On a GPU the kernels look, in the same launch.
            return Resolved(handles, resolve_slots(handles) if self.device.type == "cpu" else None)

    def _keep(self, key: Any, found: Resolved) -> None:
        size = found.handles.numel()
        if size > CACHED_NAMES:
            return
        while len(self._found) >= CACHED or self._size + size > CACHED_NAMES:
            oldest = next(iter(self._found))
            self._size -= self._found.pop(oldest).handles.numel()
        self._found[key] = found
        self._size += size

    def forget(self) -> None:
        """Forget all."""
        self._found.clear()
        self._size = 0


def entries_of(names: Any) -> Entries:
    """The names that `use` is given, as a tuple with an entry for each sequence."""
    if names is None or isinstance(names, str):
        return (names,)
    try:
        return tuple(names)
    except TypeError:
        raise TypeError(
            f"names is {names!r}: it must be a name, None, a list with one of them for each "
            "sequence, or a tensor of bank.handles"
        ) from None


def flattened(names: Names) -> tuple[int, list[str | None]]:
    """(number of entries, the names of all of them in a row)."""
    given: Any = tuple(names or ())
    if given and PLAIN.issuperset(map(type, given)):
        return len(given), list(given)
    entries = [entry if isinstance(entry, list | tuple) else (entry,) for entry in given]
    if not entries or len({len(entry) for entry in entries}) != 1 or not entries[0]:
        raise ValueError(
            "names must be a list with a name or None for each sequence, or as many for each"
        )
    return len(entries), [name for entry in entries for name in entry]


def resolve_slots(handles: Tensor) -> ResolvedSlots:
    """The result of `RowCores.slots` for valid handles, each either a slot's or NONE."""
    numbers = handles.numpy().T  # by numpy, which costs less for so few
    valid, slots = numbers != NONE, numbers & (1 << SLOT_BITS) - 1
    if valid.all():
        return torch.from_numpy(slots), None
    return torch.from_numpy(np.where(valid, slots, 0)), torch.from_numpy(valid)


def check_handles(handles: Tensor, device: torch.device) -> Tensor:
    """Handles of the caller's as (entries, k), the same storage."""
    if handles.dtype != torch.int64:
        raise TypeError(f"handles are {handles.dtype}: they must be int64, as bank.handles gives")
    if handles.device != device:
        raise ValueError(f"handles are on {handles.device}, but the bank on {device}")
    if handles.dim() not in (1, 2) or handles.numel() == 0:
        raise ValueError(f"handles are {tuple(handles.shape)}: they must be (lines,) or (lines, k)")
    entries = handles if handles.dim() == 2 else handles[:, None]
    if not entries.is_contiguous():
        raise ValueError("handles must be contiguous")
    return entries


def check_weights(weights: Any, handles: Tensor | None) -> Tensor:
    """The weights of mixtures as float32, contiguous."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights are a {type(weights).__name__}: they must be a tensor")
    if handles is None or weights.shape != handles.shape:
        there = None if handles is None else tuple(handles.shape)
        raise ValueError(f"weights are {tuple(weights.shape)}: they must be as the names, {there}")
    if weights.requires_grad:
        raise TypeError("weights require a gradient, which they do not get: detach them")
    if not weights.is_floating_point() or weights.device != handles.device:
        raise TypeError(f"weights are {weights.dtype} on {weights.device}: float, on the bank's")
    return weights.to(torch.float32).contiguous()


def check_distinct(names: Sequence[str]) -> None:
    """Raise if a name comes twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name!r} comes twice")
        seen.add(name)
