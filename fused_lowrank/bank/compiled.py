"""A bank's layers in a compiled graph, as library ops.

The graph reads the assignment when it runs, by the op `route`, whose result, a token, stands for it
in the forward and in the backward: one graph serves every assignment, and none.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..compute import autograd, choose
from ..compute.autograd import (
    connect,
    dropout_of,
    fake_gradients,
    fake_results,
    gradients_of_op,
    join,
    run_op,
    there,
)
from ..compute.operands import Operands
from ..compute.reference import AnyCore
from ..context.calls import SAID, call_of
from ..context.declared import declaration_of, said_in
from ..context.disabling import OFF, Switch
from ..context.recomputed import NOTES, around, graph_task, may_recompute, noted
from ..methods.layer import LowRankLinear
from .assignment import ACTIVE, LOST, Assignment, find
from .recompute import WRITTEN, current
from .store import AdapterStore

OptTensor = Optional[Tensor]  # noqa: UP045 - torch.library reads these annotations

_tokens = itertools.count(1)
TICKETS: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()
OUTSIDE = 0  # the token of a call outside `bank.use`, with no layer disabled


class Ticket:
    """A call as a token stands for it: its assignment, if any, and its declarations.

    `disabled` has the assignment to no adapter for the layers that are disabled, by name.
    """

    def __init__(self, key: int, assignment: Assignment | None) -> None:
        self.key, self.assignment, self.said = key, assignment, SAID.get()
        self.disabled: dict[str, Assignment] = {}

    @property
    def version(self) -> int:
        """The version of the assignment."""
        return 0 if self.assignment is None else self.assignment.version

    def disable(self, layers: Mapping[str, LowRankLinear], base: Assignment) -> None:
        """Note the layers that are disabled here, for the checkpoints around the call as well."""
        for name, layer in layers.items():
            if layer.disabled:
                self.disabled[name] = base
                if isinstance(layer.disabled, Switch):
                    layer.disabled.note()

    def note(self) -> None:
        """Note this for the checkpoints around the running call; None where they had another."""
        for checkpoint in around():
            notes = NOTES.setdefault(checkpoint, {})
            before, _ = notes.get(self.key, (self, 0))
            alike = before is not None and before.assignment is self.assignment
            notes[self.key] = self if alike else None, self.version


STORES: weakref.WeakValueDictionary[int, AdapterStore] = weakref.WeakValueDictionary()


class Banked(NamedTuple):
    """The core that the rows of a layer in a compiled graph go through."""

    core: AnyCore
    scale: float
    factors: str  # whose gradient the core's is: "own", "trained" or "" for nobody's


@torch.library.custom_op("fused_lowrank::route", mutates_args=())
def route(key: int) -> Tensor:
    """A token, int64 (2,) on the CPU, that stands for the assignment of the running call.

    It is the assignment's number and its version.
    """
    task, own = graph_task(), find(ACTIVE.get(), key)
    before = noted(key) if task >= 0 else None  # of a checkpoint around the graph
    within = own is not None and own.task == task  # whether that enters `bank.use` itself
    ticket = Ticket(key, current(key) if before is None or within else None)
    if before is not None and before[0] is not None:
        if before[0].version != before[1]:
            raise RuntimeError(WRITTEN)
        ticket.assignment = before[0].assignment
        if ticket.said is None or ticket.said.task != task:
            ticket.said = before[0].said
    elif before is not None and not within:
        raise RuntimeError(LOST)
    if OFF.get() or task >= 0:
        ticket.disable(STORES[key].layers, STORES[key].assign(None))
    if may_recompute():
        ticket.note()
    if ticket.assignment is None and not ticket.disabled:
        return torch.tensor([OUTSIDE, 0])
    TICKETS[number := next(_tokens)] = ticket
    token = torch.tensor([number, ticket.version])
    token.ticket = ticket  # type: ignore[attr-defined]  # lives as long as the token
    return token


@route.register_fake
def _(key):  # type: ignore[no-untyped-def]
    return torch.empty(2, dtype=torch.int64, device="cpu")


def resolve(
    token: Tensor,
    name: str,
    lead: Sequence[int],
    x: OptTensor,
    a: OptTensor,
    b: OptTensor,
    trained_a: OptTensor,
    trained_b: OptTensor,
    scale: float,
) -> Banked:
    """The core for which a token stands, at one layer."""
    number, version = token.tolist()
    if number == OUTSIDE:
        return Banked(join(a, b), scale, "own")
    ticket = TICKETS[number]
    assignment = ticket.assignment
    if name in ticket.disabled:
        return Banked(ticket.disabled[name].row_cores(name, lead, None), 1.0, "")
    if assignment is None:
        return Banked(join(a, b), scale, "own")
    if assignment.version != version:
        raise RuntimeError(WRITTEN)
    if assignment.handles is None:
        return Banked(join(*assignment.single_core(name)), 1.0, "")
    said = None
    if ticket.said is not None:
        last = declaration_of(ticket.said, STORES[assignment.key].layers[name])
        if graph_task() < 0 or not callable(last and last.rows):  # else what the forward found
            said = said_in(last, name, None if x is None else x.view(*lead, x.shape[-1]))
    rows = assignment.row_cores(name, lead, call_of(assignment.key), None, said)
    if not rows.table.requires_grad:
        return Banked(rows, 1.0, "")
    if trained_a is None:
        raise RuntimeError(f"{name}: compile the model again, now that adapters are trained")
    return Banked(rows._replace(table=trained_a, right=trained_b), 1.0, "trained")


@torch.library.custom_op("fused_lowrank::banked", mutates_args=())
def banked(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    a: OptTensor,
    b: OptTensor,
    trained_a: OptTensor,
    trained_b: OptTensor,
    up: Tensor,
    bias: OptTensor,
    token: Tensor,
    name: str,
    lead: Sequence[int],
    seed: OptTensor,
    scale: float,
    dropout_p: float,
    impl: str,
    want_t: bool,
) -> tuple[Tensor, Tensor]:
    """(y, t), as `fused_lowrank::forward` gives them, by the token's assignment."""
    what = resolve(token, name, lead, x, a, b, trained_a, trained_b, scale)
    factors = down, what.core, up, bias, what.scale, dropout_of(seed, dropout_p)
    if choose.isolates(impl, x, down, up):
        impl = "isolated"
    return run_op(Operands(x, weight, *factors), impl, want_t)


@banked.register_fake
def _(x, weight, down, *others):  # type: ignore[no-untyped-def]
    return fake_results(x, weight, down, others[-1])


class Needs(NamedTuple):
    """Flags of the operands of `banked` that require a gradient, in `banked_backward`'s order."""

    x: bool
    weight: bool
    down: bool
    a: bool
    b: bool
    trained_a: bool
    trained_b: bool
    up: bool
    bias: bool


@torch.library.custom_op("fused_lowrank::banked_backward", mutates_args=())
def banked_backward(
    dy: Tensor,
    t: OptTensor,
    x: OptTensor,
    weight: OptTensor,
    down: Tensor,
    a: OptTensor,
    b: OptTensor,
    trained_a: OptTensor,
    trained_b: OptTensor,
    up: Tensor,
    token: Tensor,
    name: str,
    lead: Sequence[int],
    seed: OptTensor,
    scale: float,
    dropout_p: float,
    impl: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed; those of factors that the call did not use are zero."""
    need = Needs(*needs)
    what = resolve(token, name, lead, x, a, b, trained_a, trained_b, scale)
    pairs = {"own": (need.a, need.b), "trained": (need.trained_a, need.trained_b)}
    wanted = pairs.get(what.factors, (False, False))
    inner = autograd.Needs(need.x, need.weight, need.down, *wanted, need.up, need.bias)
    if choose.isolates(impl, dy, down, up):
        impl = "isolated"
    rest = down, what.core, up, None, what.scale, dropout_of(seed, dropout_p)
    grads = gradients_of_op(dy, t, Operands(x, weight, *rest), impl, inner)
    dx, dweight, ddown, da, db, dup, dbias = grads
    both = {"own": (da, db, None, None), "trained": (None, None, da, db)}
    factors = both.get(what.factors, (None,) * 4)
    for i, (operand, wants) in enumerate(zip((a, b, trained_a, trained_b), need[3:7], strict=True)):
        if wants and factors[i] is None:
            assert operand is not None
            factors = (*factors[:i], torch.zeros_like(operand), *factors[i + 1 :])
    return there((dx, dweight, ddown, *factors, dup, dbias), dy)


@banked_backward.register_fake
def _(dy, t, x, weight, *others):  # type: ignore[no-untyped-def]
    return fake_gradients(dy, others[:6], others[-1])


connect(banked, banked_backward, count=9)
