"""Calls of the equation over a `Base`: its product, or its module's y0, and the low-rank term.

    known      one autograd function: y by passes, as over a plain matrix; nothing of W is saved
    opaque     y0 by the module, which autograd differentiates; then the term, added to a copy
    compiled   y0 by the module and the term by plain torch, as far as the module can be compiled

`impl="reference"` is as compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropped
from torch.nn.functional import linear

from ... import config
from .. import choose
from ..autograd import (
    Call,
    Needs,
    backward,
    dropout_of,
    fold,
    join,
    places,
    refuse_double_backward,
    saved_tensors,
    unsafe_view,
)
from ..dropout import is_no_bits, kept, no_bits
from ..gain import Ratio, loses_z, widened
from ..operands import Operands
from ..reference import RowCores, like, through_core, wide_dtype
from ..run import no_autocast, run, under_autocast
from .protocol import Base, Given


def over_base(operands: Operands, impl: str, isolated: bool | None = None) -> Tensor:
    """y (..., N) of operands whose weight is a `Base`, in the dtype of x (..., K), or of y0.

    It is computed in the dtype that the base computes an x of this one in, or in autocast's.
    `isolated` is as `functional.compute` has it.
    """
    lost = impl == "auto" and loses_z(operands.gain, operands.bias)
    if isinstance(operands.gain, Ratio):
        operands = operands._replace(gain=operands.gain.tensor())
    x, base, down, core, up, bias, scale, dropout, _, gain = operands
    own = base.computes_in(x.dtype)
    if under_autocast(x) and x.dtype != torch.float64:
        own = torch.get_autocast_dtype(x.device.type)
    impl = choose.implementation(impl, x, down.shape[0], up.shape[1])
    rows = core if isinstance(core, RowCores) else None
    if isolated is None:
        isolated = rows is not None and choose.isolates(impl, x, down, up)
    if isolated and impl != "reference":
        impl = "isolated"
    if impl == "reference" or lost or torch.compiler.is_compiling():
        return by_torch(operands, own)
    y0 = fold(called(base, x)) if base.is_called() else None
    dtype = x.dtype if y0 is None else y0.dtype
    if y0 is not None and gain is not None and bias is not None and bias.requires_grad:
        y0 = y0 + like(bias.detach() - bias, dtype)  # its gradient is past the gain, not of y0
    x, bias = like(x, own), None if bias is None else like(bias, own)
    seed, dropout_p = (None, 0.0) if dropout is None else dropout[:2]
    if dropout is not None and seed is None:
        seed = torch.randint(2**62, (1,), device=x.device)
    tensors = x, y0, down, *places(core), up, bias, gain
    wants = (own is not None and own.requires_grad for own in tensors)
    if torch.is_grad_enabled() and any(wants):
        call = Call(scale, dropout_p, impl, config.current(), rows)
        y = OverBase.apply(call, base, *tensors, seed)
    else:
        weight = base if y0 is None else Given(base, y0, bias)
        dropout = dropout_of(seed, dropout_p)
        operands = operands._replace(x=fold(x), weight=weight, bias=bias, dropout=dropout)
        y = run(operands, impl, config.current(), False, False).y
    return like(y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1]), dtype)


def called(base: Base, x: Tensor) -> Tensor:
    """y0 (..., N) of x (..., K) by the module, which need not take an x of this dtype."""
    own = base.computes_in(x.dtype)
    y0: Tensor = base.module(x) if own == x.dtype else base.module(x.to(own)).to(x.dtype)
    if y0.shape != (expected := (*x.shape[:-1], base.shape[0])):
        kind, found = type(base.module).__name__, tuple(y0.shape)
        raise ValueError(f"{kind} gave {found} where a linear layer gives {tuple(expected)}")
    return y0


def by_torch(operands: Operands, dtype: torch.dtype) -> Tensor:
    """y by the module and the equation in plain torch, the term in this dtype."""
    x, base, down, core, up, bias, scale, dropout, _, gain = operands
    y0, x = alone(base, x), like(x, dtype)
    low = x
    if dropout is not None and dropout.seed is None:
        low = dropped(x, dropout.p)
    elif dropout is not None:
        low = x * kept(x, dropout.seed, dropout.p) / (1.0 - dropout.p)
    with no_autocast(x):
        u = through_core(linear(low, like(down, x.dtype)), core, scale)
        y = y0 + linear(u, like(up, x.dtype))
        if gain is not None:
            wide = like(gain, wide_dtype(x.dtype))
            y = like(y, wide.dtype) * wide
            y = y if bias is None else y + (1.0 - wide) * bias
        return like(y, y0.dtype)


class OverBase(torch.autograd.Function):
    """The eager call, of a `Call`, the base and x, y0, down, a, b, up, bias, gain, seed.

    y0 (M, N) is there if the base is opaque. Leading dimensions of x are folded here.
    """

    @staticmethod
    def forward(ctx, call, base, *tensors):  # type: ignore[no-untyped-def]
        x, y0, down, a, b, up, bias, gain, seed = tensors
        of_x, ctx.of_y0, *others = ctx.needs_input_grad[2:10]
        needs, lead, rows = Needs(of_x, False, *others), x.shape[:-1], call.rows
        x = fold(x)
        dropout, core = dropout_of(seed, call.dropout_p), join(a, b, rows)
        weight = base if y0 is None else Given(base, y0, bias)
        operands = Operands(x, weight, down, core, up, bias, call.scale, dropout, gain=gain)
        want_t = needs.a or needs.b or needs.up
        masked = dropout is not None and (needs.x or needs.down)
        want_bits = masked and not call.config.redraw_dropout
        done = run(operands, call.impl, call.config, want_t, False, want_bits)
        bits = done.bits
        if bits is None and masked and done.drawn:
            bits = no_bits(seed, *x.shape)
        y = done.y
        y = y if len(lead) == 1 else unsafe_view(y, (*lead, y.shape[-1]))
        by_row = (None, None) if rows is None else (rows.handles, rows.weights)
        t, x = done.t if want_t else None, x if needs.down else None
        of_gain = gain, *((y, bias) if needs.gain else (None, None)), *by_row
        ctx.save_for_backward(seed, bits, t, x, down, a, b, up, *of_gain)
        ctx.needs, ctx.call, ctx.lead, ctx.given = needs, call, lead, y0 is not None
        ctx.base = base
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        call, needs = ctx.call, ctx.needs
        seed, bits, t, x, down, a, b, up, gain, y, bias, *_ = saved_tensors(ctx)
        if call.config.redraw_dropout or is_no_bits(bits):
            bits = None
        core, dropout = join(a, b, call.rows), dropout_of(seed, call.dropout_p, bits)
        weight = Given(ctx.base, None) if ctx.given else ctx.base
        operands = Operands(x, weight, down, core, up, bias, call.scale, dropout, gain=gain)
        y, dy = None if y is None else fold(y), fold(dy)
        grads: list[Any] = [None] * len(needs)
        dy0 = None
        with torch.no_grad():
            if any(needs):
                grads = backward(dy, t, operands, call.impl, call.config, needs, y)
            if ctx.of_y0:
                dy0 = dy if gain is None else like(dy * widened(gain, dy.dtype), dy.dtype)
        if grads[0] is not None:
            grads[0] = grads[0].view(*ctx.lead, grads[0].shape[-1])
        if torch.is_grad_enabled():  # create_graph=True
            dy0, *grads = refuse_double_backward([dy0, *grads])
        of_x, _, *others = grads
        return (None, None, of_x, dy0, *others, None)


class Product(torch.autograd.Function):
    """x·Wᵀ + bias of a known base alone, as where the adapter is disabled."""

    @staticmethod
    def forward(ctx, base, x, bias):  # type: ignore[no-untyped-def]
        ctx.base = base
        return base.product(fold(x), bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        of_x, of_bias = ctx.needs_input_grad[1:]
        dx = ctx.base.back(fold(dy)).view(*dy.shape[:-1], -1) if of_x else None
        return None, dx, fold(dy).sum(0) if of_bias else None


def alone(base: Base, x: Tensor) -> Tensor:
    """The base's own y (..., N) of x (..., K), in x's dtype."""
    if base.is_called() or torch.compiler.is_compiling():
        return called(base, x)
    own, bias = x.to(base.computes_in(x.dtype)), base.bias
    with no_autocast(x):
        bias = None if bias is None else like(bias, own.dtype)
        return Product.apply(base, own, bias).to(x.dtype)
