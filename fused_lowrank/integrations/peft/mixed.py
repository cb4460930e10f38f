"""The adapters of a mixed batch, as layers read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...compute.reference import NONE, Rows

BASE = "__base__"  # PEFT's name for no adapter


class Lines(list[str]):
    """The name of each sequence's adapter; what layers make of it is made once for all of them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.different = list(dict.fromkeys(names))
        self._made: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def rows(self, adapters: Sequence[str], table: Tensor, count: int) -> Rows:
        """The rows of a layer that has these adapters, whose cores (adapters, P, Q) are `table`."""
        key = (table.device, *adapters)
        if key not in self._made:
            slot = {name: number for number, name in enumerate(adapters)}
            self._made[key] = (
                torch.tensor([[slot.get(name, NONE)] for name in self], device=table.device),
                torch.ones(len(adapters), device=table.device),
                torch.zeros(len(adapters), dtype=torch.int32, device=table.device),
                torch.zeros(1, dtype=torch.int32, device=table.device),
            )
        handles, scales, generations, refused = self._made[key]
        return Rows(table, None, handles, None, scales, generations, refused, count // len(self))
