"""Steps by library products, on any device.

    t, u = shrink                     t = x·downᵀ   u = scale · t · core
    y = tail_last or tail_first       y = x·Wᵀ + bias + u·upᵀ, in either order; the former with gain
    dcore = core_grad                 dcore = scale · tᵀ·g
    dz, dgain = gain_back             dz = dy ⊙ gain

A step has `run`, which computes it; `why_not`, which says why a problem is none for it, or None;
and `work`, which says what it does, for `costs`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base.protocol import BASES
from ..costs import ADDED, CORE_CALLS, ROWS_CALLS, Work, base, of_base, skinny
from ..dropout import Dropout, dropped, mask
from ..gain import add_tail_, gain_back, widened
from ..operands import Operands, Problem
from ..reference import (
    TORCH,
    AnyCore,
    Products,
    RowCores,
    is_diagonal,
    like,
    product,
    rows_grad,
    through_product,
    through_rows,
)

Wanted = Any  # a Tensor, or None where it was not wanted


class Step:
    """A part of a pass. What a subclass does not say holds: nothing stands against it."""

    kernels: tuple[str, ...] = ()  # those of this library that it launches

    def why_not(self, problem: Problem) -> str | None:
        """The reason why this step cannot be a part of the pass, or None if it can."""
        return None

    def work(self, problem: Problem) -> list[Work]:
        """The work of the step, in the order in which it is done."""
        raise NotImplementedError


class Shrink(Step):
    """The way down and through the core, by `products`."""

    def __init__(self, products: Products = TORCH) -> None:
        self.products = products

    def run(
        self, operands: Operands, choose: Any, want_t: bool, want_u: bool, want_bits: bool = False
    ) -> tuple[Wanted, Wanted, None]:
        """(t, u, None): t (M, P), divided by 1 - p where there is dropout, and u (M, Q).

        This mask is made again where it is needed: no bits of it are kept.
        """
        x, _, down, core, _, _, scale, dropout, transposed, _ = operands
        if transposed:  # dropout is of the tail then
            dropout = None
        down = like(down, x.dtype)
        t = self.products.matmul(dropped(x, dropout), down if transposed else down.t())
        if dropout is not None:
            t.div_(1.0 - dropout.p)
        if not want_u:
            return t, None, None
        if isinstance(core, RowCores):
            return t, through_rows(t, core.turned() if transposed else core, scale), None
        matrix = product(core)
        if matrix is None:
            return t, (t if scale == 1.0 else t * scale), None
        u = through_product(t, matrix.t() if transposed else matrix, self.products)
        return t, like(u if scale == 1.0 else u.mul_(scale), x.dtype), None

    def work(self, problem: Problem) -> list[Work]:
        """The work of two products."""
        size, m = problem.dtype.itemsize, problem.m
        x, t, u = m * problem.k * size, m * problem.p * size, m * problem.q * size
        cores = m * problem.core_size * size if problem.by_row else 0
        down = problem.p * problem.k * size
        calls = ROWS_CALLS if problem.by_row else CORE_CALLS
        return [
            skinny(problem, 2.0 * m * problem.k * problem.p, x + down + t),
            skinny(problem, 2.0 * m * problem.core_size, t + u + 3 * cores, calls),
        ]


class TailLast(Step):
    """The base, x·Wᵀ + bias, then u·upᵀ added to it in place."""

    def __init__(self, products: Products = TORCH) -> None:
        self.products = products

    def run(self, operands: Operands, choose: Any, u: Tensor) -> Tensor:
        """y (M, N); in a backward with dropout u·upᵀ is added where y's place is kept."""
        x, weight, _, _, up, bias, _, dropout, transposed, gain = operands
        up = like(up, x.dtype) if transposed else like(up, x.dtype).t()
        u = narrow(u, up)
        own = bias if gain is None else None
        based = isinstance(weight, BASES)
        y = weight.product(x, own) if based else self.products.linear(x, weight, own)
        if gain is not None:
            return add_tail_(y, u, up, widened(gain, x.dtype), bias, self.products)
        if dropout is None or not transposed:
            return self.products.add_matmul(y, u, up)
        return y.add_(mask(y, dropout).mul_(self.products.matmul(u, up)))

    def work(self, problem: Problem) -> list[Work]:
        """The base, and a product that reads and writes y again."""
        size, m, n, q = problem.dtype.itemsize, problem.m, problem.n, problem.q
        moved = (2 * m * n + m * q + n * q) * size
        if problem.gain and problem.device.type != "cpu":  # in float32, written and read again
            moved += 16 * m * n
        return [*of_base(problem), skinny(problem, 2.0 * m * n * q, moved)]


class TailFirst(Step):
    """u·upᵀ, then the base added to it."""

    def run(self, operands: Operands, choose: Any, u: Tensor) -> Tensor:
        """y (M, N)."""
        x, weight, _, _, up, bias, _, _, transposed, _ = operands
        up = like(up, x.dtype) if transposed else like(up, x.dtype).t()
        u = narrow(u, up)
        y = u @ up if bias is None else torch.addmm(bias, u, up)
        return y.addmm_(x, weight.t())

    def why_not(self, problem: Problem) -> str | None:
        """The reason against a core for each row, a mask on the way back or a gain, or None."""
        if problem.by_row:
            return "it has no core for each row"
        if problem.dropout and problem.transposed:
            return "it has no dropout on the way back"
        if problem.gain:
            return "it has no gain: that is of the sums, and the base is the last of them"
        return None

    def work(self, problem: Problem) -> list[Work]:
        """The tail, and the base, which reads what is there."""
        size, m, n, q = problem.dtype.itemsize, problem.m, problem.n, problem.q
        moved = (m * n + m * q + n * q) * size
        if problem.device.type == "cpu" and size == 2:
            moved += ADDED * m * n
        return [skinny(problem, 2.0 * m * n * q, moved), base(problem, adds=True)]


class CoreGrad(Step):
    """The gradients of the core."""

    def run(
        self, t: Tensor, g: Tensor, core: Any, scale: float, want: tuple[bool, bool], choose: Any
    ) -> tuple[Wanted, Wanted]:
        """(dcore, None), or for a pair (da, db), those that are wanted."""
        if isinstance(core, RowCores):
            return of_tables(rows_grad(t, g, core, scale), core, want)
        if is_diagonal(core):
            wide = torch.promote_types(core.dtype, torch.float32)
            return like((like(t, wide) * like(g, wide)).sum(0).mul_(scale), core.dtype), None
        a, b = core if isinstance(core, tuple) else (core, core)
        dtype = torch.promote_types(a.dtype, b.dtype)
        dcore = t.t().to(dtype) @ g.to(dtype)
        if scale != 1.0:
            dcore.mul_(scale)
        if not isinstance(core, tuple):
            return dcore, None
        da = (dcore @ b.t().to(dtype)).to(a.dtype) if want[0] else None
        db = (a.t().to(dtype) @ dcore).to(b.dtype) if want[1] else None
        return da, db


class GainBack(Step):
    """The way back through the gain, in one pass over dy."""

    def run(
        self, dy: Tensor, y: Wanted, gain: Tensor, bias: Wanted, choose: Any
    ) -> tuple[Tensor, Wanted]:
        """(dy ⊙ gain, dgain), the latter where y is given; gain is `widened`."""
        return gain_back(dy, y, gain, bias)


class Masked(Step):
    """x under a dropout's mask as a whole, for the gradient of a trained down."""

    def run(self, x: Tensor, dropout: Dropout | None, choose: Any) -> Tensor:
        """x as the forward's shrink saw it, but for the factor 1 / (1 - p)."""
        return dropped(x, dropout)


def narrow(u: Tensor, up: Tensor) -> Tensor:
    """u (M, Q) without the padding that the kernels' has; up is (Q, N)."""
    return u if u.shape[1] == up.shape[0] else u[:, : up.shape[0]]


def of_tables(dcore: Tensor, rows: RowCores, want: tuple[bool, bool]) -> tuple[Wanted, Wanted]:
    """The gradients of the tables of `rows`, from those of the cores, (slots, P, Q)."""
    a, b = rows.table, rows.right
    if b is None:
        return like(dcore, a.dtype), None
    da = like(dcore @ like(b, dcore.dtype).mT, a.dtype) if want[0] else None
    db = like(like(a, dcore.dtype).mT @ dcore, b.dtype) if want[1] else None
    return da, db


def contiguous(core: AnyCore) -> Any:
    """The core with each factor contiguous, as the kernels read it."""
    if isinstance(core, RowCores):  # tables that the bank has made
        return core
    if isinstance(core, tuple):
        return core[0].contiguous(), core[1].contiguous()
    return None if core is None else core.contiguous()
