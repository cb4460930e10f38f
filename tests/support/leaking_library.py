"""A stand-in for a CPU's library whose products read beyond the rows of their left operand."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_lowrank.compute import isolation


def behind(left: Tensor, unit: int) -> Tensor | float:
    """Zero times the sum of what is read behind each row, (M, 1); behind the last one is NaN."""
    rows, size = left.shape
    read = -size % unit
    if left.dtype != torch.bfloat16 or not read:
        return 0.0
    memory = torch.cat([left.flatten(), left.new_full((read,), torch.nan)])
    memory = torch.cat([memory, memory[-1:].expand(read)])
    ends = size * torch.arange(1, rows + 1)
    return (0.0 * memory[ends[:, None] + torch.arange(read)].float()).sum(1, True).to(left.dtype)


@contextmanager
def leaking_library(unit: int = 32) -> Iterator[None]:
    """Products in bfloat16 add 0 · (what lies behind a row) to it, as oneDNN's do on AMX.

    That is where the inner size is no multiple of `unit`. It holds in every thread and within ops;
    the probes are made anew, before and after.
    """

    def addmm(y: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)  # whose bmm is made of no mm
        own = torch.bmm(a.to(wide).contiguous()[None], b.to(wide).contiguous()[None])[0]
        return (beta * y + alpha * own).to(a.dtype) + behind(a, unit)

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return addmm(a.new_zeros(()), a, b)

    def addmm_(y: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        return y.copy_(addmm(y, a, b, beta, alpha))

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which says that torch's own are overridden
        for product in (mm, addmm, addmm_):
            library.impl(product.__name__, product, "CPU")
    forget()
    try:
        yield
    finally:
        library._destroy()
        forget()


def forget() -> None:
    """Have what was probed probed again."""
    isolation.readable.cache_clear()
    isolation.mixes.cache_clear()
