"""The equation in plain torch, on any device and in any float dtype: the truth that the rest is
measured against.

    y = gain ⊙ (x·Wᵀ + scale · ((x·downᵀ) · core) · upᵀ) + bias

The gain is 1 where there is none. The core is one for all rows or, in a bank of adapters, one for
each (`RowCores`). A diagonal is given as its r numbers, and is never made a matrix:
(t · core)[m, p] = t[m, p] · core[p].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import linear

SLOT_BITS = 32  # of a handle; above them lies the generation
NONE = -1  # the handle of no adapter


class RowCores(NamedTuple):
    """A core for each row: row m has those of line m // repeat of `handles`, k of them, summed.

    core[m] = Σ over j of weights[i, j] · scales[slot] · table[slot],   i = m // repeat,
    slot = handles[i, j] mod 2³²

    A handle is generation · 2³² + slot, or NONE: no adapter, and nothing of the table is read. One
    whose slot is not in the table, or is of another generation there, counts as NONE and sets
    `refused`.
    """

    table: torch.Tensor  # (slots, P, Q); (slots, r), diagonals; (slots, P, r) beside a `right`
    right: torch.Tensor | None  # (slots, r, Q): a core is the product of the two
    handles: torch.Tensor  # int64 (lines, k)
    weights: torch.Tensor | None  # float32 (lines, k); None: 1
    scales: torch.Tensor  # float32 (slots,)
    generations: torch.Tensor  # int32 (slots,)
    refused: torch.Tensor  # int32 (1,)
    repeat: int  # rows to a line
    owner: object = None  # what must live as long as these are to be read
    resolved_slots: tuple[torch.Tensor, torch.Tensor | None] | None = None  # `slots`, if known

    def slots(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(slot, valid), both (k, lines): the slot is 0 where the handle is NONE or refused.

        `valid` is None where all are known to be.
        """
        if self.resolved_slots is not None:
            return self.resolved_slots
        slot, generation = self.handles & (1 << SLOT_BITS) - 1, self.handles >> SLOT_BITS
        valid = slot < len(self.generations)
        slot = slot.where(valid, 0)
        valid &= self.generations[slot] == generation
        self.refused.logical_or_((~valid & (self.handles != NONE)).any())
        return slot.where(valid, 0).t(), valid.t()

    def turned(self) -> RowCores:
        """The row cores with every core transposed."""
        if self.right is None:
            return self if is_diagonal(self) else self._replace(table=self.table.mT)
        return self._replace(table=self.right.mT, right=self.table.mT)


Core = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
AnyCore = Core | RowCores


class Products(NamedTuple):
    """The library products that the equation is made of."""

    linear: Callable[..., torch.Tensor]  # (x, weight, bias) → x·weightᵀ + bias
    matmul: Callable[..., torch.Tensor]  # (a, b) → a·b
    add_matmul: Callable[..., torch.Tensor]  # (y, a, b) → y + a·b, in place


TORCH = Products(linear, torch.matmul, torch.Tensor.addmm_)


def like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in this dtype. `.to` costs the host, also where there is nothing to convert."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def is_diagonal(core: AnyCore) -> bool:
    """Whether the core, or that of each row, is a diagonal, given as its numbers."""
    if isinstance(core, RowCores):
        return core.table.dim() == 2
    return isinstance(core, torch.Tensor) and core.dim() == 1


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gain is used beside an x of this one: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_meta(core: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | RowCores) -> bool:
    """Whether a core has no values."""
    if isinstance(core, torch.Tensor):
        return core.is_meta
    return core[0].is_meta or (core[1] is not None and core[1].is_meta)  # a pair's, or the tables


def product(core: Core) -> torch.Tensor | None:
    """The core as one tensor: itself, or a·b in the wider of their dtypes."""
    if not isinstance(core, tuple):
        return core
    a, b = core
    if a.dtype == b.dtype:
        return a @ b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype) @ b.to(dtype)


def through_product(
    t: torch.Tensor, core: torch.Tensor, products: Products = TORCH
) -> torch.Tensor:
    """t · core, of a matrix (P, Q) or a diagonal (r,), in core's dtype."""
    t = like(t, core.dtype)
    return t * core if core.dim() == 1 else products.matmul(t, core)


def factors(rows: RowCores, slots: torch.Tensor, j: int, scale: float) -> torch.Tensor:
    """scale · weights[:, j] · scales[slots], (lines, 1, 1), in float32 or wider."""
    wide = torch.promote_types(rows.table.dtype, torch.float32)
    factor = like(rows.scales.index_select(0, slots), wide)
    if rows.weights is not None:
        factor = factor * rows.weights[:, j]
    return (factor if scale == 1.0 else factor * scale).view(-1, 1, 1)


def through_rows(t: torch.Tensor, rows: RowCores, scale: float) -> torch.Tensor:
    """u[m] = scale · t[m] · core[m], in float32 or wider and returned in t's dtype.

    A row without an adapter is zero by selection: its t may be NaN, and so may the core in its
    place; so where this is to be differentiated both are selected as well.
    """
    wide, diagonal = torch.promote_types(rows.table.dtype, torch.float32), is_diagonal(rows)
    all_slots, valid = rows.slots()
    lines = like(t, wide).reshape(all_slots.shape[1], rows.repeat, t.shape[-1])
    parts = []
    for j, slots in enumerate(all_slots):
        part = lines
        for table in (rows.table, rows.right):
            if table is not None:
                cores = like(table.index_select(0, slots), wide)
                if diagonal:
                    cores = cores.unsqueeze(1)
                if valid is not None and torch.is_grad_enabled():
                    there = valid[j].view(-1, 1, 1)
                    part, cores = part.where(there, 0.0), cores.where(there, 0.0)
                part = part * cores if diagonal else torch.bmm(part, cores)
        part = part.mul_(factors(rows, slots, j, scale))
        parts.append(part if valid is None else part.where(valid[j].view(-1, 1, 1), 0.0))
    u = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    return like(u.reshape(*t.shape[:-1], u.shape[-1]), t.dtype)


def rows_grad(t: torch.Tensor, g: torch.Tensor, rows: RowCores, scale: float) -> torch.Tensor:
    """dcore of each slot, (slots, P, Q): scale · Σ over its rows of factor[m] · t[m]ᵀ·g[m].

    Of diagonals it is (slots, r), the diagonal of that alone. In float32 or wider. A slot's rows
    are added in their order, and no other row reaches it.
    """
    wide = torch.promote_types(rows.table.dtype, torch.float32)
    all_slots, valid = rows.slots()
    t_lines, g_lines = (
        like(side, wide).reshape(all_slots.shape[1], rows.repeat, side.shape[1]) for side in (t, g)
    )
    by_line = (t_lines * g_lines).sum(1) if is_diagonal(rows) else torch.bmm(t_lines.mT, g_lines)
    each = (-1,) + (1,) * (by_line.dim() - 1)
    grad = by_line.new_zeros(len(rows.scales), *by_line.shape[1:])
    for j, slots in enumerate(all_slots):
        part = by_line * factors(rows, slots, j, scale).view(each)
        part = part if valid is None else part.where(valid[j].view(each), 0.0)
        grad.index_add_(0, slots, part)
    return grad


def through_core(
    t: torch.Tensor, core: AnyCore, scale: float, products: Products = TORCH
) -> torch.Tensor:
    """u = scale · t · core, computed in core's dtype and returned in t's."""
    if isinstance(core, RowCores):
        return through_rows(t, core, scale)
    matrix = product(core)
    if matrix is None:
        return t * scale
    return like(through_product(t, matrix, products) * scale, t.dtype)


def lowrank_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    core: AnyCore,
    up: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    low: torch.Tensor | None = None,
    products: Products = TORCH,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = gain ⊙ (x·Wᵀ + scale · ((low·downᵀ) · core) · upᵀ) + bias; low is x, or x after dropout.

    x (..., K), weight (N, K), down (P, K), core (P, Q) or a diagonal (r,) or the pair (P, r),
    (r, Q) or None, up (N, Q), bias (N,), gain (N,) or None for 1 → (..., N); or a core for each row
    (`RowCores`). down and up are used in x's dtype; the product with core is taken in core's, that
    with gain in float32 or wider. Differentiable any number of times. `products` are torch's own by
    default.
    """
    t = products.linear(x if low is None else low, like(down, x.dtype))
    u = through_core(t, core, scale, products)
    tail = products.linear(u, like(up, x.dtype))
    if gain is None:
        return products.linear(x, weight, bias) + tail
    wide = wide_dtype(x.dtype)
    y = like(products.linear(x, weight, None) + tail, wide) * like(gain, wide)
    return like(y if bias is None else y + bias, x.dtype)


def chain(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    core: AnyCore,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    gain: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
) -> torch.Tensor:
    """y, by library operations that autograd itself differentiates: the least work for the host.

    x may have any leading dimensions. `low`, if given, is what the low-rank term is of instead of
    x: x after a dropout.

    t is all that it saves of size M where down, up and weight are frozen, as `autograd.py`
    does; its backward makes dx in two parts and adds them, which costs another pass over M × K.
    """
    # A product of a tensor that is here and one on the meta device gives memory of no meaning.
    if weight.is_meta or down.is_meta or up.is_meta or (core is not None and on_meta(core)):
        raise RuntimeError("an operand is on the meta device")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    t = linear(rows if low is None else low.reshape(-1, low.shape[-1]), like(down, x.dtype))
    if isinstance(core, RowCores):
        u = through_rows(t, core, 1.0)
    else:
        matrix = product(core)
        u = t if matrix is None else like(through_product(t, matrix), x.dtype)
    base = linear(rows, weight, bias if gain is None else None)
    y = base.addmm_(u, like(up, x.dtype).t(), alpha=scale)
    if gain is not None:
        y = like(y, wide_dtype(x.dtype)).mul_(gain)
        y = like(y if bias is None else y + bias, x.dtype)
    return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])
