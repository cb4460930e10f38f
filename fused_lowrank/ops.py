"""Forward and backward of the equation, written once over the steps that every plan provides
(`plans`), and the two ways in which they are called:

    eager        a torch.autograd.Function, directly
    compiled     the torch.library ops fused_lowrank::forward and ::backward

    forward      t, u = shrink(x,  down, core,  scale)        y  = gemm_tail(x,  W,  u, up, bias)
    backward     g, v = shrink(dy, upᵀ,  coreᵀ, scale)        dx = gemm_tail(dy, Wᵀ, v, downᵀ)
                 dcore = core_grad(t, g, scale)

Saved for backward is t (M, P), and x only if down or the weight is trained. Operands are 2-D here;
the core is a, or the pair a·b, or None. Dropout is of the low-rank path's input alone; its mask is
made from `seed` wherever it is needed, and never kept.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import plans
from .reference import AnyCore, Rows, like, product, through_core, through_rows

unsafe_view = torch.ops.aten._unsafe_view.default
OptTensor = Optional[Tensor]  # noqa: UP045 - torch.library reads these annotations
Wanted = Any  # a Tensor, or None where it was not wanted


class Needs(NamedTuple):
    """Which of the operands require a gradient, in the order of `backward`'s result."""

    x: bool
    weight: bool
    down: bool
    a: bool
    b: bool
    up: bool
    bias: bool


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The operands have their dtypes by now: autocast must not change them inside."""
    if under_autocast(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """x's GPU is the current one inside: kernels are launched on that, wherever x is."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def fold(x: Tensor) -> Tensor:
    """(..., K) as (M, K), a view wherever the strides allow."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def join(a: OptTensor, b: OptTensor, rows: Rows | None = None) -> Any:
    """The core from its two places in an op's signature; with `rows`, these are its tables."""
    if rows is not None:
        return rows if a is None else rows._replace(table=a, right=b)
    return a if a is None or b is None else (a, b)


def forward(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    core: AnyCore,
    up: Tensor,
    bias: OptTensor,
    seed: OptTensor,
    scale: float,
    dropout_p: float,
    impl: str,
    want_t: bool,
) -> tuple[Tensor, Wanted]:
    """(y, t), t only if wanted."""
    dropout = None if seed is None else (seed, dropout_p)
    with no_autocast(x), on_device(x):
        operands = x, weight, down, core, up, bias, scale
        _, y, t, _ = plans.layer(impl, *operands, False, want_t, False, dropout=dropout)
        return y, (t if want_t else None)


def backward(
    dy: Tensor,
    t: Wanted,
    x: Wanted,
    weight: Wanted,
    down: Tensor,
    core: AnyCore,
    up: Tensor,
    seed: OptTensor,
    scale: float,
    dropout_p: float,
    impl: str,
    needs: Needs,
) -> list[Wanted]:
    """The gradients that are needed, in the order of `Needs`; None for the others.

    t is there if a core factor or up needs a gradient, the weight if x does, x if down or the
    weight does.
    """
    dropout = None if seed is None else (seed, dropout_p)
    p, want_g = down.shape[0], needs.a or needs.b
    grads: dict[str, Wanted] = dict.fromkeys(Needs._fields)
    with no_autocast(dy), on_device(dy):
        # t has been divided by 1 - p where there was dropout; v is here, for dx and ddown.
        back = scale if dropout is None else scale / (1.0 - dropout_p)
        plan = plans.ATEN
        g: Wanted = None
        v: Wanted = None
        if needs.x:
            operands = dy, weight.t(), up, core, down, None, back
            plan, grads["x"], g, v = plans.layer(impl, *operands, True, want_g, needs.down, dropout)
        elif want_g or needs.down:
            plan = plans.steps(impl, dy, down.shape[0], up.shape[1])
            g, v = plan.shrink(dy, up, core, back, True, want_g, needs.down)
        if want_g:
            grads["a"], grads["b"] = plan.core_grad(t, g, core, scale, (needs.a, needs.b))
        if needs.down:
            grads["down"] = (v[:, :p].t() @ plan.dropped(x, dropout)).to(down.dtype)
        if needs.up:
            # Summed over rows with the long side as columns, which CPU libraries do faster.
            dup = through_core(t, core, scale).t() @ dy
            grads["up"] = like(dup.t().contiguous(), up.dtype)
        if needs.weight:
            grads["weight"] = dy.t() @ x
        if needs.bias:
            grads["bias"] = dy.sum(0)
    return list(grads.values())


def saved(needs: Any, t: Wanted, x: Tensor, weight: Tensor) -> tuple[Wanted, Wanted, Wanted]:
    """(t, x, weight): what the backward will read of them, None for the rest."""
    return t, (x if needs.weight or needs.down else None), (weight if needs.x else None)


def small(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    core: AnyCore,
    up: Tensor,
    bias: OptTensor,
    scale: float,
    low: OptTensor = None,
) -> Tensor:
    """y, by library operations that autograd itself differentiates: the least work for the host.

    `low`, if given, is what the low-rank term is of instead of x: x after a dropout.

    t is all that it saves of size M where down, up and weight are frozen, as `LowRankLinear` does;
    its backward makes dx in two parts and adds them, which costs another pass over M × K.
    """
    rows = fold(x)
    t = linear(rows if low is None else fold(low), like(down, x.dtype))
    if isinstance(core, Rows):
        u = through_rows(t, core, 1.0)
    else:
        matrix = product(core)
        u = t if matrix is None else like(like(t, matrix.dtype) @ matrix, x.dtype)
    y = linear(rows, weight, bias).addmm_(u, like(up, x.dtype).t(), alpha=scale)
    return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])


class LowRankLinear(torch.autograd.Function):
    """The eager call. Leading dimensions of x are folded here."""

    @staticmethod
    def forward(ctx, x, weight, down, a, b, up, bias, seed, scale, dropout_p, impl, rows=None):  # type: ignore[no-untyped-def]
        needs = Needs(*ctx.needs_input_grad[:7])
        lead = x.shape[:-1]
        x = fold(x)
        want_t = needs.a or needs.b or needs.up
        rest = seed, scale, dropout_p, impl
        y, t = forward(x, weight, down, join(a, b, rows), up, bias, *rest, want_t)
        by_row = (None, None) if rows is None else (rows.handles, rows.weights)
        # Those of rows are saved for autograd to see that they are not written to meanwhile.
        ctx.save_for_backward(*saved(needs, t, x, weight), down, a, b, up, seed, *by_row)
        ctx.needs, ctx.rest, ctx.lead, ctx.rows = needs, rest[1:], lead, rows
        # A view that autograd does not know for one: a caller may then write to y.
        return y if x.dim() == len(lead) + 1 else unsafe_view(y, (*lead, y.shape[-1]))

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        t, x, weight, down, a, b, up, seed, *_ = ctx.saved_tensors
        core = join(a, b, ctx.rows)
        with torch.no_grad():
            operands = fold(dy), t, x, weight, down, core, up, seed, *ctx.rest, ctx.needs
            grads = backward(*operands)
        if grads[0] is not None:
            grads[0] = grads[0].view(*ctx.lead, grads[0].shape[-1])
        if torch.is_grad_enabled():  # create_graph=True
            grads = refuse_double_backward(grads)
        return (*grads, None, None, None, None, None)


class _Undifferentiable(torch.autograd.Function):
    """The identity on gradients, whose own backward raises."""

    @staticmethod
    def forward(ctx, anchor, *grads):  # type: ignore[no-untyped-def]
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            "lowrank_linear cannot be differentiated twice by impl='triton' or 'aten'; "
            "impl='reference' can"
        )


def refuse_double_backward(grads: list[Wanted]) -> list[Wanted]:
    """The same gradients; differentiating them raises an error that says what to do."""
    anchor = torch.empty(0, requires_grad=True)
    there = [grad for grad in grads if grad is not None]
    marked = iter(_Undifferentiable.apply(anchor, *there)) if there else iter(())
    return [None if grad is None else next(marked) for grad in grads]


# The ops for compile and export. A schema cannot say "maybe a tensor" of a result: what is not
# wanted is an empty tensor there.


@torch.library.custom_op("fused_lowrank::forward", mutates_args=())
def forward_op(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    a: OptTensor,
    b: OptTensor,
    up: Tensor,
    bias: OptTensor,
    seed: OptTensor,
    scale: float,
    dropout_p: float,
    impl: str,
    want_t: bool,
) -> tuple[Tensor, Tensor]:
    rest = seed, scale, dropout_p, impl, want_t
    y, t = forward(x, weight, down, join(a, b), up, bias, *rest)
    return y, x.new_empty(0) if t is None else t


@forward_op.register_fake
def _(x, weight, down, a, b, up, bias, seed, scale, dropout_p, impl, want_t):  # type: ignore[no-untyped-def]
    t = x.new_empty((x.shape[0], down.shape[0]) if want_t else 0)
    return x.new_empty((x.shape[0], weight.shape[0])), t


@torch.library.custom_op("fused_lowrank::backward", mutates_args=())
def backward_op(
    dy: Tensor,
    t: OptTensor,
    x: OptTensor,
    weight: OptTensor,
    down: Tensor,
    a: OptTensor,
    b: OptTensor,
    up: Tensor,
    seed: OptTensor,
    scale: float,
    dropout_p: float,
    impl: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    rest = seed, scale, dropout_p, impl, Needs(*needs)
    grads = backward(dy, t, x, weight, down, join(a, b), up, *rest)
    return [dy.new_empty(0) if grad is None else grad for grad in grads]


@backward_op.register_fake
def _(dy, t, x, weight, down, a, b, up, seed, scale, dropout_p, impl, needs):  # type: ignore[no-untyped-def]
    m, n = dy.shape
    k = down.shape[1]
    dx, dweight, dbias = dy.new_empty((m, k)), dy.new_empty((n, k)), dy.new_empty(n)
    like: tuple[Wanted, ...] = (dx, dweight, down, a, b, up, dbias)
    return [
        torch.empty_like(operand) if need else dy.new_empty(0)
        for need, operand in zip(needs, like, strict=True)
    ]


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, down, a, b, up, _, seed, scale, dropout_p, impl, want_t = inputs
    needs = Needs(*ctx.needs_input_grad[:7])
    t = output[1] if want_t else None
    ctx.save_for_backward(*saved(needs, t, x, weight), down, a, b, up, seed)
    ctx.needs, ctx.rest = needs, (scale, dropout_p, impl)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dy, dt):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 12
    grads = backward_op(dy, *ctx.saved_tensors, *ctx.rest, list(ctx.needs))
    wanted = [grad if need else None for need, grad in zip(ctx.needs, grads, strict=True)]
    return (*wanted, None, None, None, None, None)


forward_op.register_autograd(_op_backward, setup_context=_setup_context)
