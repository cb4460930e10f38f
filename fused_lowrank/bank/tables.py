"""The tables of a bank: for each layer the cores of all adapters, by slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..compute.reference import is_diagonal
from ..context.elsewhere import device_of
from ..methods import LowRankLinear

Cores = Mapping[str, tuple[Tensor, Tensor | None, Tensor]]  # by layer, as `CoreTable` has them


class CoreTable(NamedTuple):
    """The cores of one layer, by slot."""

    left: Tensor  # (slots, P, Q); (slots, r), diagonals; (slots, P, r) beside a `right`
    right: Tensor | None  # (slots, r, Q): a core is the product of the two
    scales: Tensor  # float32 (slots,)


class Tables(Protocol):
    """The tables that calls read: those of a bank, or of the adapters that are in training."""

    tables: dict[str, CoreTable]  # by layer
    generations: Tensor  # int32 (slots,): of each slot, those of the handles that are valid
    refused: Tensor  # int32 (1,): whether a call met a handle that is not


def new_table(layer: LowRankLinear, slots: int, dtype: torch.dtype) -> CoreTable:
    """A table of zeros; of diagonals, or of pairs where those are smaller than cores."""
    (down, up), core = layer.shared_parts(), layer.core_factors
    p, q = down.shape[0], up.shape[1]
    device = device_of(layer)
    scales = torch.zeros(slots, device=device)
    if isinstance(core, tuple) and (p + q) * (r := core[0].shape[1]) < p * q:
        left = torch.zeros(slots, p, r, dtype=dtype, device=device)
        return CoreTable(left, torch.zeros(slots, r, q, dtype=dtype, device=device), scales)
    sizes = (p,) if is_diagonal(core) else (p, q)
    return CoreTable(torch.zeros(slots, *sizes, dtype=dtype, device=device), None, scales)


def index_of(slots: list[int], device: torch.device) -> Any:
    """An index of these slots in a table: a slice where they follow each other, as most do."""
    first, count = slots[0] if slots else 0, len(slots)
    if slots == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(slots, device=device)
