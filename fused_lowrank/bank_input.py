"""What calls give a bank: names, handles and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .reference import NONE, SLOT_BITS

Names = str | None | Sequence[str | None] | Sequence[Sequence[str | None]] | Tensor


def flattened(names: Names) -> tuple[int, list[str | None]]:
    """(lines, the names of all lines in a row)."""
    lines = [line if isinstance(line, list | tuple) else (line,) for line in names or ()]
    if not lines or len({len(line) for line in lines}) != 1 or not lines[0]:
        raise ValueError(
            "names must be a list with a name or None for each sequence, or as many for each"
        )
    return len(lines), [name for line in lines for name in line]


def known_slots(handles: Tensor) -> tuple[Tensor, Tensor | None]:
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
