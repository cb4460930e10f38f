"""A layer in a bank: with the adapters that the call's routing names, or as it was without a bank.

Eagerly the routing is read in Python. A compiled graph reads it when it runs, by the op `route`,
whose result, a token, stands for the routing in the forward and in the backward: one graph serves
every routing, and none.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor

from .. import config
from ..called import note_call
from ..calls import call_of
from ..compute import autograd, choose, isolation
from ..compute.autograd import (
    chain,
    connect,
    dropout_of,
    fake_gradients,
    fake_results,
    fold,
    gradients_of_op,
    join,
    places,
    run_op,
    there,
)
from ..compute.dropout import Dropout
from ..compute.operands import Operands
from ..compute.reference import AnyCore
from ..disabling import OFF
from ..elsewhere import here
from ..fingerprint import BASES_TOLERANCE, WEIGHT_TOLERANCE, alike
from ..following import Follower
from ..functional import compute, draw_seed, prepared
from ..layers.base import LowRankLinear
from .assignment import WRITTEN, Routing, current, graph_task, remember_storage

if TYPE_CHECKING:
    from .bank import AdapterBank

OptTensor = Optional[Tensor]  # noqa: UP045 - torch.library reads these annotations


class Place:
    """Where a layer stands in a bank; called by the layer instead of its own forward."""

    def __init__(self, bank: AdapterBank, name: str, layer: LowRankLinear) -> None:
        self.bank, self.name = bank, name
        BANKS[bank.key] = bank
        self.sizes = *layer.down.shape, *layer.up.shape  # of products, forward and backward

    def look_again(self) -> None:
        """Have the bank compare the layers' tensors, of which some may be others from now on."""
        self.bank.seen = None

    def refuse_other(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError if values to be loaded are not those that the bank's adapters share."""
        layer = self.bank.layers[self.name]
        tolerances = {"down": BASES_TOLERANCE, "up": BASES_TOLERANCE, "weight": WEIGHT_TOLERANCE}
        for name, tolerance in tolerances.items():
            value = values.get(name)
            if value is None:
                continue
            with here(layer):
                own = layer.base_weight if name == "weight" else getattr(layer, name)
                same = value is own or alike(own, value, tolerance)
            if not same:
                raise ValueError(
                    f"{self.name} is in a bank, whose adapters share its weight, down and up, and "
                    f"{name} is to be another: close() the bank first"
                )

    def __call__(self, layer: LowRankLinear, x: Tensor) -> Tensor:
        if layer.uncalled:
            note_call(layer)
        if torch.compiler.is_compiling():
            return layer.own(x) if layer.disabled is True else self.compiled(layer, x)
        if layer.disabled:
            if graph_task() < 0:
                current(self.bank.key)  # the bank's model was called
            return layer.own(x)
        wants_grad = torch.is_grad_enabled()
        if wants_grad or layer.training:
            remember_storage(x)
        routing = current(self.bank.key)
        isolated = isolation.is_needed(x, self.sizes) and layer.impl != "triton"
        core: AnyCore
        if layer._original is not None and layer.merged:
            if routing is not None:
                raise RuntimeError(f"{self.name} is merged: unmerge(model) before bank.use")
            return layer.own(x)
        if routing is None:
            if not isolated:
                return layer.own(x)
            core, scale = layer.core_factors, layer.scale
        elif routing.bare and not config.current().batch_invariance:
            if routing.empty:
                routing.require_rows(self.name, x.shape[:-1])
            return isolation.linear(x, layer.weight, layer.bias)
        elif routing.handles is None:
            core, scale = join(*routing.one(self.name)), 1.0
        else:
            call = call_of(self.bank.key)
            if call is not None and call.follower is not None and not call.follower.paused:
                return self.followed(layer, x, call.follower)
            core, scale = routing.rows(self.name, x.shape[:-1], call, x), 1.0
        weight, down, up, bias = layer.own_tensors()
        dropout = Dropout(None, layer.dropout) if layer.dropout and layer.training else None
        operands = Operands(x, weight, down, core, up, bias, scale, dropout)
        if not (wants_grad or isolated or dropout) and layer.impl == "auto" and choose.small(x):
            try:  # only x can be wrong, and PyTorch sees that
                return chain(operands)
            except (AttributeError, IndexError, RuntimeError):
                pass  # the checks say it better
        return compute(prepared(operands), layer.impl, isolated)

    def followed(self, layer: LowRankLinear, x: Tensor, follower: Follower) -> Tensor:
        """The same, with a follower that is told where the sequences of the result are."""
        state = follower.where(x)
        with follower.pause():
            y = self(layer, x)
        follower.mark(y, state)
        return y

    def compiled(self, layer: LowRankLinear, x: Tensor) -> Tensor:
        """The same as library ops, whatever the routing will be."""
        dropout_p = layer.dropout if layer.training else 0.0
        a, b = places(layer.core_factors)
        given = x, layer.weight, layer.down, layer.core_factors, layer.up, layer.bias, layer.scale
        x, weight, down, _, up, bias, scale, *_ = prepared(Operands(*given))
        lead = x.shape[:-1]
        trained = self.bank.training
        shelf = None if trained is None else trained.shelves[self.name]
        tables = (None, None) if shelf is None else shelf[:2]
        factors = a, b, *tables
        seed = draw_seed(x) if dropout_p else None
        impl = "aten" if layer.impl == "reference" else layer.impl
        want_t = torch.is_grad_enabled() and any(f is not None and f.requires_grad for f in factors)
        token = route(self.bank.key)
        rest = token, self.name, lead, seed, scale, dropout_p, impl
        y, _ = banked(fold(x), weight, down, *factors, up, bias, *rest, want_t)
        return y.view(*lead, y.shape[-1])


# --- the ops of a compiled graph ---

_tokens = itertools.count(1)
TICKETS: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()
OUTSIDE = 0  # the token of a call outside `bank.use`, with no layer disabled


class Ticket:
    """What a token stands for: the routing of a call, if any, and that of its disabled layers."""

    def __init__(self, routing: Routing | None) -> None:
        self.routing = routing
        self.disabled: dict[str, Routing] = {}


BANKS: weakref.WeakValueDictionary[int, AdapterBank] = weakref.WeakValueDictionary()


class Banked(NamedTuple):
    """What the rows of a layer in a compiled graph go through."""

    core: AnyCore
    scale: float
    factors: str  # whose gradient the core's is: "own", "trained" or "" for nobody's


@torch.library.custom_op("fused_lowrank::route", mutates_args=())
def route(key: int) -> Tensor:
    """A token, int64 (2,) on the CPU, that stands for the routing of the running call.

    It is the routing's number and its version.
    """
    ticket = Ticket(routing := current(key))
    if OFF.get():
        bank = BANKS[key]
        bare = bank.use(None).routing()
        ticket.disabled = {name: bare for name, layer in bank.layers.items() if layer.disabled}
    if routing is None and not ticket.disabled:
        return torch.tensor([OUTSIDE, 0])
    TICKETS[number := next(_tokens)] = ticket
    token = torch.tensor([number, 0 if routing is None else routing.version])
    token.ticket = ticket  # type: ignore[attr-defined]  # lives as long as the token
    return token


@route.register_fake
def _(key):  # type: ignore[no-untyped-def]
    return torch.empty(2, dtype=torch.int64, device="cpu")


def resolve(
    token: Tensor,
    name: str,
    lead: Sequence[int],
    a: OptTensor,
    b: OptTensor,
    trained_a: OptTensor,
    trained_b: OptTensor,
    scale: float,
) -> Banked:
    """What a token stands for, at one layer."""
    number, version = token.tolist()
    if number == OUTSIDE:
        return Banked(join(a, b), scale, "own")
    ticket = TICKETS[number]
    routing = ticket.routing
    if name in ticket.disabled:
        return Banked(ticket.disabled[name].rows(name, lead, None), 1.0, "")
    if routing is None:
        return Banked(join(a, b), scale, "own")
    if routing.version != version:
        raise RuntimeError(WRITTEN)
    if routing.handles is None:
        return Banked(join(*routing.one(name)), 1.0, "")
    rows = routing.rows(name, lead, call_of(routing.key))
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
    """(y, t), as `fused_lowrank::forward` gives them, by the routing that the token stands for."""
    what = resolve(token, name, lead, a, b, trained_a, trained_b, scale)
    factors = down, what.core, up, bias, what.scale, dropout_of(seed, dropout_p)
    if choose.isolates(impl, x, down, up):
        impl = "isolated"
    return run_op(Operands(x, weight, *factors), impl, want_t)


@banked.register_fake
def _(x, weight, down, *others):  # type: ignore[no-untyped-def]
    return fake_results(x, weight, down, others[-1])


class Needs(NamedTuple):
    """Which operands of `banked` require a gradient, in the order of `banked_backward`'s result."""

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
    what = resolve(token, name, lead, a, b, trained_a, trained_b, scale)
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
