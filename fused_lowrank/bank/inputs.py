"""What calls give a bank: names, handles and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..compute.reference import NONE, SLOT_BITS

Names = str | None | Sequence[str | None] | Sequence[Sequence[str | None]] | Tensor
Lines = tuple[Any, ...]  # of names, or of lines of them
Known = tuple[Tensor, Tensor | None]  # as `Rows.slots` has it
PLAIN = {str, type(None)}
ASSIGNMENTS = 64  # that are remembered at most
ASSIGNED = 1 << 18  # names of all of them at most


class Assigned(NamedTuple):
    """What lines of names stand for. Uses share the tensors, and nobody writes to them."""

    handles: Tensor  # int64 (lines, k), on the device
    known: Known | None  # their slots, on a CPU


class Assignments:
    """What the last lines of names stood for: the same again need neither look-ups nor a copy.

    Its owner calls it under a lock, and forgets all when a name comes to stand for something else.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._found: dict[Any, Assigned] = {}
        self._size = 0  # the names of all

    def __len__(self) -> int:
        return len(self._found)

    def of(self, lines: Lines, make: Callable[[Any], Tensor]) -> Assigned:
        """What is remembered of these lines, or else what `make` makes of them."""
        stream = 0
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return self._made(lines, make)  # a graph's memory is its own
            # Memory is given back to the stream that it was made on, which must be the reader's.
            stream = torch.cuda.current_stream(self.device).cuda_stream
        key: Any = lines, stream
        try:
            found = self._found.get(key)
        except TypeError:  # lists are lines as tuples are, but cannot be looked up
            key = tuple([tuple(x) if isinstance(x, list) else x for x in lines]), stream
            try:
                found = self._found.get(key)
            except TypeError:  # nor can these: the error is `make`'s
                return self._made(lines, make)
        if found is None:
            found = self._made(lines, make)
            self._keep(key, found)
        return found

    def _made(self, lines: Lines, make: Callable[[Any], Tensor]) -> Assigned:
        with torch.inference_mode(False):  # a later use may want gradients
            handles = make(lines)
            # On a GPU the kernels look, in the same launch.
            return Assigned(handles, known_slots(handles) if self.device.type == "cpu" else None)

    def _keep(self, key: Any, found: Assigned) -> None:
        size = found.handles.numel()
        if size > ASSIGNED:
            return
        while len(self._found) >= ASSIGNMENTS or self._size + size > ASSIGNED:
            oldest = next(iter(self._found))
            self._size -= self._found.pop(oldest).handles.numel()
        self._found[key] = found
        self._size += size

    def forget(self) -> None:
        """Forget all."""
        self._found.clear()
        self._size = 0


def lines_of(names: Any) -> Lines:
    """What `use` is given, as a tuple with something for each line."""
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
    """(lines, the names of all lines in a row)."""
    given: Any = tuple(names or ())
    if given and PLAIN.issuperset(map(type, given)):
        return len(given), list(given)
    lines = [line if isinstance(line, list | tuple) else (line,) for line in given]
    if not lines or len({len(line) for line in lines}) != 1 or not lines[0]:
        raise ValueError(
            "names must be a list with a name or None for each sequence, or as many for each"
        )
    return len(lines), [name for line in lines for name in line]


def known_slots(handles: Tensor) -> Known:
    """What `Rows.slots` would find of handles that are valid, each either a slot's or NONE."""
    numbers = handles.numpy().T  # by numpy, which costs less for so few
    valid, slots = numbers != NONE, numbers & (1 << SLOT_BITS) - 1
    if valid.all():
        return torch.from_numpy(slots), None
    return torch.from_numpy(np.where(valid, slots, 0)), torch.from_numpy(valid)


def check_handles(handles: Tensor, device: torch.device) -> Tensor:
    """Handles of the caller's as (lines, k), the same storage."""
    if handles.dtype != torch.int64:
        raise TypeError(f"handles are {handles.dtype}: they must be int64, as bank.handles gives")
    if handles.device != device:
        raise ValueError(f"handles are on {handles.device}, but the bank on {device}")
    if handles.dim() not in (1, 2) or handles.numel() == 0:
        raise ValueError(f"handles are {tuple(handles.shape)}: they must be (lines,) or (lines, k)")
    lines = handles if handles.dim() == 2 else handles[:, None]
    if not lines.is_contiguous():
        raise ValueError("handles must be contiguous")
    return lines


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
