"""`Bank` is what the rows of a launch have as cores of their own, for `hopper_runs`.

Its handles are drawn: of adapters that are there, one or several to a row; of none; and such as are
refused. What belongs to no valid handle is NaN, so that nothing of it may be read into a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ttgir_memory import Fault

from fused_lowrank.compute.reference import NONE, SLOT_BITS, RowCores

SLOTS = 7
USED = 5  # of them, the first, are named by handles that are valid


class Bank:
    """A core for each of m rows, from the tables `factors`, of `mix` adapters each."""

    def __init__(
        self, m: int, mix: int, weighted: bool, repeat: int, generator: torch.Generator
    ) -> None:
        entries = -(-m // repeat)
        self.repeat = repeat

        def drawn(below: int) -> torch.Tensor:
            return torch.randint(below, (entries, mix), generator=generator)

        self.generations = torch.arange(SLOTS, dtype=torch.int32) + 2**30
        slots, kind = drawn(USED), drawn(10)
        handles = self.generations[slots].long() << SLOT_BITS | slots
        others = drawn(SLOTS)  # of which some are USED
        stale = (self.generations[others].long() + 1) << SLOT_BITS | others
        beyond = handles + SLOTS
        for at, instead in ((6, torch.full_like(handles, NONE)), (7, stale), (8, beyond)):
            handles = torch.where(kind == at, instead, handles)
        self.handles = torch.where(kind == 9, handles | -(2**63), handles)
        self.valid = kind < 6
        self.slots = slots
        weights = torch.rand(entries, mix, generator=generator) + 0.5
        self.weights = weights.where(self.valid, torch.nan) if weighted else None
        self.scales = torch.rand(SLOTS, generator=generator) + 0.5
        self.scales[USED:] = torch.nan
        self.refused = torch.zeros(1, dtype=torch.int32)

    def rows(self, factors: tuple[torch.Tensor, ...]) -> RowCores:
        """As a launch takes it."""
        tables = [factor.clone() for factor in factors]
        for table in tables:
            table[USED:] = torch.nan
        table, right = (*tables, None)[:2]
        parts = self.handles, self.weights, self.scales, self.generations, self.refused
        return RowCores(table, right, *parts, self.repeat)

    def through(self, t: torch.Tensor, cores: torch.Tensor) -> torch.Tensor:
        """Σ over j of weight · scale · t[m] · core, in float64; cores (SLOTS, P, Q)."""
        u = t.new_zeros(len(t), cores.shape[-1])
        entries = torch.arange(len(t)) // self.repeat
        for j in range(self.handles.shape[1]):
            slots, valid = self.slots[entries, j], self.valid[entries, j]
            factor = self.scales[slots].double()
            if self.weights is not None:
                factor = factor * self.weights[entries, j].double()
            part = torch.bmm(t[:, None], cores[slots])[:, 0] * factor[:, None]
            u += part.where(valid[:, None], 0.0)
        return u

    @property
    def refuses(self) -> bool:
        """Whether any of its handles is to be refused."""
        return bool((~self.valid & (self.handles != NONE)).any())


def check_apart(operands: Any, launch: Callable[[Callable[[], Any]], Any]) -> None:
    """Raise Fault where a row's bits depend on the other rows, or on cores that are not its own.

    And where, without an adapter, they are not the base's, or where an Inf of its own makes a NaN.

    `operands` are those of a case with a bank (`hopper_runs`); `launch` makes a call of theirs.
    """
    case, m = operands.case, operands.sizes[0]
    kind = case.mix, case.weighted, case.repeat
    bank = operands.bank = Bank(m, *kind, operands.generator)
    x = operands.draw(m, operands.sizes[2])
    entry = int(bank.valid.all(1).nonzero()[-1])  # all its adapters are there
    own = slice(entry * case.repeat, min(m, (entry + 1) * case.repeat))
    y, t = launch(lambda: operands.relay(x))

    def expect(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        if not torch.equal(found, expected):
            raise Fault(f"{what}: a row has other bits")

    others = torch.arange(len(bank.handles)) != entry
    foreign = torch.ones(SLOTS, dtype=torch.bool).index_fill(0, bank.slots[entry], False)
    factors, scales, handles = operands.factors, bank.scales.clone(), bank.handles.clone()
    for value in (torch.nan, torch.inf):
        spoiled = x.clone()
        spoiled[: own.start], spoiled[own.stop :] = value, value
        bank.scales[foreign] = value
        operands.factors = tuple(factor.clone() for factor in factors)
        for factor in operands.factors:
            factor[foreign] = value
        if bank.weights is not None:
            bank.weights[others] = value
        for handle in (NONE, handles[entry, 0], 2**62, handles[0, 0]):
            bank.handles[others] = handle
            again, t_again = launch(lambda x=spoiled: operands.relay(x))
            expect(f"beside {value} and handles {handle}", again[own], y[own])
            if t is not None:
                expect("t", t_again[own], t[own])
    operands.factors, bank.scales = factors, scales

    bank.handles = handles[entry : entry + 1]
    bank.weights = None if bank.weights is None else bank.weights[entry : entry + 1]
    expect("alone", launch(lambda: operands.relay(x[own]))[0], y[own])

    mine, bank.handles = bank.handles, torch.full_like(bank.handles, NONE)
    operands.factors = tuple(torch.full_like(factor, torch.nan) for factor in factors)
    bank.scales = torch.full_like(scales, torch.inf)
    bank.refused.zero_()
    for value in (0.5, torch.inf):
        x[own.start, 5] = value
        base = launch(lambda: operands.gemm_tail(x[own], None))
        expect("without an adapter", launch(lambda: operands.relay(x[own]))[0], base)
    if bool(bank.refused):
        raise Fault("NONE was refused")

    bank.handles, bank.scales = mine, scales
    operands.factors = tuple(factor.abs() for factor in factors)
    for tensor in (operands.weight, operands.down, operands.up, x):
        tensor.abs_()
    y, _ = launch(lambda: operands.relay(x[own]))
    expect("Inf beside padding", y[0], torch.full_like(y[0], torch.inf))
