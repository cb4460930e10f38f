"""A stand-in for a CPU's library whose products read beyond the rows of their left operand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lowrank import isolation

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_)


class LeakingLibrary(TorchDispatchMode):
    """Adds 0 · (what lies behind each row) to products in bfloat16, as oneDNN does on AMX.

    That is where the inner size is no multiple of `unit`. Behind the last row there is NaN.
    """

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit = unit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The product, spoiled."""
        left = args[-2] if func.overloadpacket in PRODUCTS else None
        behind = None if left is None else self.behind(left)  # before y is written, in place
        y = func(*args, **(kwargs or {}))
        return y if behind is None else y.add_(behind)

    def behind(self, left: Tensor) -> Tensor | None:
        """Zero times the sum of what is read behind each row, (…, M, 1); None where nothing is."""
        read = -left.shape[-1] % self.unit
        if left.dtype != torch.bfloat16 or not read:
            return None
        ends = left.shape[-1] * torch.arange(1, left[..., 0].numel() + 1)
        memory = torch.cat([left.flatten(), left.new_full((read,), torch.nan)])
        memory = torch.cat([memory, memory[-1:].expand(read)])
        there = memory[ends[:, None] + torch.arange(read)]
        return (0.0 * there.float()).sum(-1).view(*left.shape[:-1], 1).to(left.dtype)


@contextmanager
def leaking_library(unit: int = 32) -> Iterator[None]:
    """Products in bfloat16 leak within it; the probes are made anew, before and after."""
    isolation.readable.cache_clear()
    try:
        with LeakingLibrary(unit):
            yield
    finally:
        isolation.readable.cache_clear()
