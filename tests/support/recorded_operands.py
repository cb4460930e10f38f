"""The operands of small calls: integers times powers of two, whose sums are exact (recorded.py)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
Made = dict[str, Any]


def words(seed: int, count: int) -> np.ndarray:
    """Random 64-bit words: splitmix64 (Steele, Lea and Flood, OOPSLA 2014) from a seed."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = z + np.uint64(seed * 0x1234567)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def integers(seed: int, *size: int, limit: int) -> Tensor:
    """Random integers from -limit to limit, in float64."""
    drawn = words(seed, math.prod(size)) % np.uint64(2 * limit + 1)
    return torch.from_numpy(drawn.astype(np.int64) - limit).double().view(size)


def selection(seed: int, rows: int, columns: int, scale: float = 1.0) -> Tensor:
    """In each row one number that is not zero: a power of two, up to 64, of either sign."""
    drawn = torch.from_numpy(words(seed, rows).astype(np.int64))
    values = scale * 2.0 ** ((drawn >> 8 & 0xFFFF) % 7).double() * (1 - 2 * (drawn & 1))
    where = torch.arange(rows) % columns
    return torch.zeros(rows, columns, dtype=F64).index_put_((torch.arange(rows), where), values)


def laid_out(rows: Tensor, layout: str) -> Tensor:
    """The same values behind other strides."""
    if layout == "turned":
        return rows.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((rows.shape[0], rows.shape[1] + 3), torch.nan, dtype=rows.dtype)
        wide[:, 1:-2] = rows
        return wide[:, 1:-2]
    return rows


def operands(
    dtype: torch.dtype,
    core: str = "core",
    *,
    m: int = 37,
    k: int = 45,
    n: int = 38,
    p: int = 5,
    q: int = 7,
    r: int = 4,
    lead: tuple[int, ...] | None = None,
    bias: bool = True,
    dense: bool = False,
    core_dtype: torch.dtype | None = None,
    factor_dtype: torch.dtype | None = None,
    layouts: dict[str, str] | None = None,
) -> tuple[Made, Tensor]:
    """Operands of `lowrank_linear`, and dy. The core is one "core", a "pair" or "none"."""
    q = p if core == "none" else q
    core_dtype = core_dtype or dtype
    wide = core_dtype.itemsize > dtype.itemsize  # then its numbers need more than 16 bits
    x, dy = integers(1, m, k, limit=3), integers(2, m, n, limit=3)
    if dtype == F16:  # more bits than it has, but in few rows, whose sums would else have too many
        rows = torch.arange(m)[:, None] % 32
        x = torch.where(rows < 2, 23 * x, x.sign()) / 16
        dy = torch.where((rows == 4) | (rows == 5), 23 * dy, dy.sign()) / 16
    if dense:
        limit = 7 if dtype == F32 else 13 if dtype == F16 else 23 if core == "pair" else 31
        weight, down = integers(3, n, k, limit=7), integers(4, p, k, limit=limit)
        up = integers(5, n, q, limit=limit) / 64
    else:
        weight, down = integers(3, n, k, limit=1), selection(4, k, p).t()
        up = selection(5, n, q, 2.0**-6)
    if core == "core":
        limit = 3 if not wide else 7 if dense else 31 if dtype == F16 else 1023
        cores: Any = [integers(6, p, q, limit=limit)]
        if wide:  # from 1 to 2 and of either sign, so that each has about as many bits
            cores[0] = cores[0] / (limit + 1) + torch.where(cores[0] < 0, -1.0, 1.0).double()
        if wide and dense:  # and more of them than one number of bfloat16 holds
            cores[0] += integers(10, p, q, limit=7) * 2.0**-12
    else:
        limit = 15 if dtype == BF16 else 1
        sizes = [(p, r), (r, q)] if core == "pair" else []
        cores = [integers(7 + i, *size, limit=limit) for i, size in enumerate(sizes)]
    cores = [part.to(core_dtype) for part in cores]
    made = {
        "x": x.to(dtype),
        "weight": weight.to(dtype),
        "down": down.contiguous().to(factor_dtype or dtype),
        "core": tuple(cores) if core == "pair" else cores[0] if cores else None,
        "up": up.to(factor_dtype or dtype),
        "bias": integers(9, n, limit=15).to(dtype) if bias else None,
    }
    for name, layout in (layouts or {}).items():
        made[name] = laid_out(made[name], layout)
    dy = dy.to(dtype)
    if lead is not None:
        made["x"], dy = made["x"].reshape(*lead, k), dy.reshape(*lead, n)
    return made, dy
