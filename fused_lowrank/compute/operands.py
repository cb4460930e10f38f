"""The operands of a pass as one object, and what its plan is chosen by."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.tiles import SMALL_M, is_bulk
from .base.protocol import BASES
from .devices import has_kernels
from .dropout import Dropout
from .reference import AnyCore, RowCores, is_diagonal


class Operands(NamedTuple):
    """The operands of y = gain ⊙ (x·Wᵀ + scale · ((x·downᵀ) · core) · upᵀ) + bias, for one pass.

    x (M, K), weight (N, K) or a `Base` in its place, down (P, K), core (P, Q), or a diagonal (r,),
    or the pair (P, r), (r, Q), or `RowCores`, or None, up (N, Q), bias (N,) or None, scale a
    number. `dropout` is None, or says where its mask comes from. gain is (N,), or None for 1.

    The backward is the same pass with other operands: x is then dy, weight its transpose, down and
    up have changed places, and `transposed` says that the three factors lie the other way round:
    down (K, P), up (Q, N), and the core transposed. Dropout is then of u·upᵀ in place of x. It has
    no gain: its x is dy ⊙ gain.

    What a pass does not need is None: x and weight of a backward that wants no gradient of theirs.
    """

    x: Any
    weight: Any
    down: Tensor
    core: AnyCore
    up: Tensor
    bias: Tensor | None
    scale: float
    dropout: Dropout | None = None
    transposed: bool = False
    gain: Tensor | None = None

    @property
    def ranks(self) -> tuple[int, int]:
        """(P, Q) of this pass."""
        if self.transposed:
            return self.down.shape[1], self.up.shape[0]
        return self.down.shape[0], self.up.shape[1]

    def of_backward(self, dy: Tensor) -> Operands:
        """The operands of the pass from dy to dx: dx = dy·W + scale · ((dy·up) · coreᵀ) · down.

        Where there is a gain dy has been multiplied by it.

        Where there was dropout t has been divided by 1 - p; here the scale is.
        """
        dropped = 1.0 if self.dropout is None else 1.0 - self.dropout.p
        weight = None if self.weight is None else self.weight.t()
        scale = self.scale / dropped
        return Operands(
            dy, weight, self.up, self.core, self.down, None, scale, self.dropout, transposed=True
        )


class Problem(NamedTuple):
    """A pass, as far as the choice of its plan depends on it."""

    device: torch.device
    dtype: torch.dtype
    m: int  # the bucket: rows, rounded up to a power of two
    k: int  # of this pass: in a backward k and n, and p and q, have changed places
    n: int
    p: int
    q: int
    transposed: bool  # W is read along its other side
    regular: bool  # x and W are multiples of 16 in sizes, strides and addresses
    dropout: bool
    want_u: bool  # u is wanted outside, as it is where down is trained
    by_row: bool = False  # a core for each row, not one for all
    bulk: bool = False  # of many rows: bulk copies can move x, W, down, up and y: `is_bulk`
    doubles: bool = False  # a factor is in float64, and x is not
    diagonal: bool = False  # the core, or that of each row
    gain: bool = False  # y is multiplied by a gain
    base: str = ""  # the kind of W, where it is no plain matrix
    called: bool = False  # such a W has no product but that of its own library

    @property
    def core_size(self) -> int:
        """The numbers of a core."""
        return self.p if self.diagonal else self.p * self.q


def bucket(rows: int) -> int:
    """The numbers of rows that share a plan: up to a power of two."""
    return 1 << max(0, int(rows) - 1).bit_length()  # a traced size is no int


def problem_of(operands: Operands, want_u: bool) -> Problem:
    """The problem that these operands pose."""
    x, weight = operands.x, operands.weight
    based = isinstance(weight, BASES)
    (m, k), n, device = x.shape, weight.shape[0], x.device
    regular = bulk = doubles = False
    if has_kernels(device):
        strides = weight.stride()
        regular = (
            (k | n | x.stride(0) | max(strides)) % 16 == 0
            and x.stride(1) == 1
            and 1 in strides
            and (x.data_ptr() | weight.data_ptr()) % 16 == 0
        )
        like = weight if not based else weight.like(x.dtype)
        bulk = m > SMALL_M and is_bulk(x, like, operands.down, operands.up)
        doubles = has_doubles(operands)
    return Problem(
        device,
        x.dtype,
        bucket(m),
        k,
        n,
        *operands.ranks,
        operands.transposed,
        regular,
        operands.dropout is not None,
        want_u,
        isinstance(operands.core, RowCores),
        bulk,
        doubles,
        is_diagonal(operands.core),
        operands.gain is not None,
        weight.kind if based else "",
        based and weight.is_only_called(),
    )


def has_doubles(operands: Operands) -> bool:
    """Whether a factor is in float64, and x is not."""
    core, double = operands.core, torch.float64
    if isinstance(core, RowCores):
        core = core.table
    a, b = core if isinstance(core, tuple) else (core, None)
    return operands.x.dtype is not double and (
        operands.down.dtype is double
        or operands.up.dtype is double
        or (a is not None and a.dtype is double)
        or (b is not None and b.dtype is double)
    )
