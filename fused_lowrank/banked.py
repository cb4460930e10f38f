"""A layer in a bank: with the adapters that the call's routing names, or as it was without a bank.

Eagerly the routing is read in Python. A compiled graph reads it when it runs, by the op `route`,
whose result, a token, stands for the routing in the forward and in the backward: one graph serves
every routing, and none.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Optional

import torch
from torch import Tensor

from . import isolation, ops, planner
from .functional import compute, prepared
from .layers.base import LowRankLinear
from .reference import AnyCore
from .routing import WRITTEN, Routing, current, remember_storage

if TYPE_CHECKING:
    from .bank import AdapterBank

OptTensor = Optional[Tensor]  # noqa: UP045 - torch.library reads these annotations


class Place:
    """Where a layer stands in a bank; called by the layer instead of its own forward."""

    def __init__(self, bank: AdapterBank, name: str) -> None:
        self.bank, self.name = bank, name

    def __call__(self, layer: LowRankLinear, x: Tensor) -> Tensor:
        if layer.disabled:
            return layer.own(x)
        if torch.compiler.is_compiling():
            return self.compiled(layer, x)
        if layer.training or torch.is_grad_enabled():
            remember_storage(x)
        routing = current(self.bank.key)
        apart = planner.isolates(layer.impl, x, layer.down, layer.up)
        if routing is None and (layer.merged or not apart):
            return layer.own(x)
        if layer.merged:
            raise RuntimeError(f"{self.name} is merged: unmerge(model) before bank.use")
        dropout_p, scale = layer.dropout if layer.training else 0.0, 1.0
        rows = None
        if routing is None:
            a, b = first = factors_of(layer)
            scale = layer.scale
        elif routing.bare and not planner.INVARIANT[0]:
            return isolation.linear(x, layer.weight, layer.bias)
        elif routing.handles is None:
            a, b = first = routing.one(self.name)
        else:
            rows = routing.rows(self.name, x.shape[:-1])
            a, b = rows.table, rows.right
            first = a[0], None if b is None else b[0]
        quick = layer.impl == "auto" and not dropout_p and not torch.is_grad_enabled()
        if quick and not apart and planner.small(x):
            try:  # only x can be wrong, and PyTorch sees that
                factors = layer.down, ops.join(a, b, rows), layer.up
                return ops.small(x, layer.weight, *factors, layer.bias, 1.0)
            except (AttributeError, IndexError, RuntimeError):
                pass  # the checks say it better
        given = x, layer.weight, layer.down, *first, layer.up, layer.bias
        x, w, bias = prepared(*given, scale, dropout_p)
        rest = rows, scale, dropout_p, layer.impl
        return compute(x, w, layer.down, a, b, layer.up, bias, *rest, apart=True)

    def compiled(self, layer: LowRankLinear, x: Tensor) -> Tensor:
        """The same as library ops, whatever the routing will be."""
        dropout_p = layer.dropout if layer.training else 0.0
        a, b = factors_of(layer)
        operands = x, layer.weight, layer.down, a, b, layer.up, layer.bias
        x, weight, bias = prepared(*operands, layer.scale, dropout_p)
        lead = x.shape[:-1]
        trained = self.bank.training
        shelf = None if trained is None else trained.shelves[self.name]
        tables = (None, None) if shelf is None else shelf[:2]
        factors = a, b, *tables
        seed = torch.randint(2**62, (1,), device=x.device) if dropout_p else None
        impl = "aten" if layer.impl == "reference" else layer.impl
        want_t = torch.is_grad_enabled() and any(f is not None and f.requires_grad for f in factors)
        token = route(self.bank.key)
        rest = token, self.name, lead, seed, layer.scale, dropout_p, impl
        folded = ops.fold(x)
        y, _ = banked(folded, weight, layer.down, *factors, layer.up, bias, *rest, want_t)
        return y.view(*lead, y.shape[-1])


def factors_of(layer: LowRankLinear) -> tuple[OptTensor, OptTensor]:
    """The layer's own core in its two places."""
    own = layer.core_factors
    return own if isinstance(own, tuple) else (own, None)


# --- the ops of a compiled graph ---

_tokens = itertools.count(1)
ROUTINGS: weakref.WeakValueDictionary[int, Routing] = weakref.WeakValueDictionary()
OUTSIDE = 0  # the token of a call outside `bank.use`


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
    routing = current(key)
    if routing is None:
        return torch.tensor([OUTSIDE, 0])
    number = next(_tokens)
    ROUTINGS[number], token = routing, torch.tensor([number, routing.version])
    token.routing = routing  # type: ignore[attr-defined]  # lives as long as the token
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
        return Banked(ops.join(a, b), scale, "own")
    routing = ROUTINGS[number]
    if routing.version != version:
        raise RuntimeError(WRITTEN)
    if routing.handles is None:
        return Banked(ops.join(*routing.one(name)), 1.0, "")
    rows = routing.rows(name, lead)
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
    if planner.isolates(impl, x, down, up):
        impl = "isolated"
    operands = x, weight, down, what.core, up, bias, seed, what.scale, dropout_p, impl
    y, t = ops.forward(*operands, want_t)
    return y, x.new_empty(0) if t is None else t


@banked.register_fake
def _(x, weight, down, *rest):  # type: ignore[no-untyped-def]
    want_t = rest[-1]
    t = x.new_empty((x.shape[0], down.shape[0]) if want_t else 0)
    return x.new_empty((x.shape[0], weight.shape[0])), t


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
    inner = ops.Needs(need.x, need.weight, need.down, *wanted, need.up, need.bias)
    if planner.isolates(impl, dy, down, up):
        impl = "isolated"
    operands = dy, t, x, weight, down, what.core, up, seed, what.scale, dropout_p, impl
    dx, dweight, ddown, da, db, dup, dbias = ops.backward(*operands, inner)
    both = {"own": (da, db, None, None), "trained": (None, None, da, db)}
    factors = both.get(what.factors, (None,) * 4)
    for i, (operand, wants) in enumerate(zip((a, b, trained_a, trained_b), need[3:7], strict=True)):
        if wants and factors[i] is None:
            assert operand is not None
            factors = (*factors[:i], torch.zeros_like(operand), *factors[i + 1 :])
    grads = dx, dweight, ddown, *factors, dup, dbias
    return [dy.new_empty(0) if grad is None else grad for grad in grads]


@banked_backward.register_fake
def _(dy, t, x, weight, down, *rest):  # type: ignore[no-untyped-def]
    (*factors, up), needs = rest[:5], rest[-1]
    m, n = dy.shape
    k = down.shape[1]
    dx, dweight, dbias = dy.new_empty((m, k)), dy.new_empty((n, k)), dy.new_empty(n)
    like = dx, dweight, down, *factors, up, dbias
    return [
        torch.empty_like(operand) if need else dy.new_empty(0)
        for need, operand in zip(needs, like, strict=True)
    ]


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, down, a, b, trained_a, trained_b, up, _, token, *rest, want_t = inputs
    needs = Needs(*ctx.needs_input_grad[:9])
    name, lead, seed, *numbers = rest
    kept = ops.saved(needs, output[1] if want_t else None, x, weight)
    ctx.save_for_backward(*kept, down, a, b, trained_a, trained_b, up, token, seed)
    ctx.needs, ctx.rest = needs, (name, lead, numbers)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dy, dt):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 17
    *operands, seed = ctx.saved_tensors
    name, lead, numbers = ctx.rest
    grads = banked_backward(dy, *operands, name, lead, seed, *numbers, list(ctx.needs))
    wanted = [grad if need else None for need, grad in zip(ctx.needs, grads, strict=True)]
    return (*wanted, *[None] * 8)


banked.register_autograd(_op_backward, setup_context=_setup_context)
