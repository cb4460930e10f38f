"""The factors of a launch: which tensor is to the left and which to the right, and their ranks."""

from __future__ import annotations

from typing import Any

import torch

from .rows import is_rows

# (P, Q), or a diagonal (r,), or the pair (P, r) and (r, Q), or None, or rows as `rows` takes them
Core = Any


def sides(down: torch.Tensor, core: Core, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(left, right) of a launch; in place of a factor that is not there lies another."""
    if core is None:
        return down, down
    if isinstance(core, torch.Tensor):
        return core, core
    if is_rows(core):
        core = core.table, core.table if core.right is None else core.right
    return core[::-1] if transposed else core


def unpacked(
    down: torch.Tensor, core: Core, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor, int, int, int]:
    """(left, right, P, Q, R) of a launch, as `rank_constants` has R.

    In place of a factor that is not there lies another.
    """
    p = down.shape[1 if transposed else 0]
    if core is None:
        return down, down, p, p, -1
    left, right = sides(down, core, transposed)
    of_rows = is_rows(core)
    one = isinstance(core, torch.Tensor) or (of_rows and core.right is None)
    if left.dim() == (2 if of_rows else 1):
        return left, right, p, p, -2
    q = right.shape[-2 if transposed else -1]  # of a table for each row, the last two sides count
    return left, right, p, q, 0 if one else right.shape[-1 if transposed else -2]
