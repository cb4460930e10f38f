"""Forward and backward of the equation, written once over three primitives that `Triton` and
`Aten` each provide, and the two ways in which they are called:

    eager        a torch.autograd.Function, directly
    compiled     the torch.library ops fused_lowrank::forward and ::backward

    forward      t, u = shrink(x,  down, core,  scale)        y  = gemm_tail(x,  W,  u, up, bias)
    backward     g, v = shrink(dy, upᵀ,  coreᵀ, scale)        dx = gemm_tail(dy, Wᵀ, v, downᵀ)
                 dcore = core_grad(t, g, scale)

Saved for backward is t (M, P), and x only if down or the weight is trained. Operands are 2-D here;
the core is a, or the pair a·b, or None. Dropout is of the low-rank path's input alone. It is done
either before, and `low` is then x after it; or by the kernels, which take the mask from `seed`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import planner
from .reference import Core, like, product, through_core

OptTensor = Optional[Tensor]  # noqa: UP045 - torch.library reads these annotations
Dropout = tuple[Tensor, float] | None  # inside the kernels: the seed and the probability
Wanted = Any  # a Tensor, or None where it was not wanted


class Needs(NamedTuple):
    """Which of the operands require a gradient, in the order of `backward`'s result."""

    x: bool
    low: bool
    weight: bool
    down: bool
    a: bool
    b: bool
    up: bool
    bias: bool


def contiguous(core: Core) -> Any:
    """The core with each factor contiguous, as the kernels read it."""
    if isinstance(core, tuple):
        return core[0].contiguous(), core[1].contiguous()
    return None if core is None else core.contiguous()


class Triton:
    """The primitives as this library's kernels, one launch each."""

    @staticmethod
    def counters(x: Tensor) -> OptTensor:
        from .kernels.core_grad import new_counters

        return new_counters(x.device)

    @staticmethod
    def shrink(
        x: Tensor,
        down: Tensor,
        core: Core,
        scale: float,
        transposed: bool,
        want_t: bool,
        want_u: bool,
        counters: OptTensor = None,
        dropout: Dropout = None,
    ) -> tuple[Wanted, Wanted]:
        from .kernels.shrink import shrink

        choose = planner.tiles(x.device)
        down, core = down.contiguous(), contiguous(core)
        return shrink(x, down, core, scale, transposed, want_t, want_u, counters, dropout, choose)

    @staticmethod
    def gemm_tail(
        x: Tensor,
        weight: Tensor,
        u: Tensor,
        up: Tensor,
        bias: OptTensor,
        transposed: bool,
        dropout: Dropout = None,
    ) -> Tensor:
        from .kernels.gemm_tail import gemm_tail

        bias = None if bias is None else bias.contiguous()
        choose = planner.tiles(x.device)
        return gemm_tail(x, weight, u, up.contiguous(), bias, transposed, dropout, choose)

    @staticmethod
    def core_grad(
        t: Tensor, g: Tensor, core: Core, scale: float, want: tuple[bool, bool], counters: OptTensor
    ) -> tuple[Wanted, Wanted]:
        from .kernels.core_grad import core_grad

        choose = planner.tiles(t.device)
        return core_grad(t, g, contiguous(core), scale, want, counters, choose)


class Aten:
    """The primitives as library GEMMs, on any device."""

    @staticmethod
    def counters(x: Tensor) -> OptTensor:
        return None

    @staticmethod
    def shrink(
        x: Tensor,
        down: Tensor,
        core: Core,
        scale: float,
        transposed: bool,
        want_t: bool,
        want_u: bool,
        counters: OptTensor = None,
        dropout: Dropout = None,
    ) -> tuple[Wanted, Wanted]:
        down, matrix = like(down, x.dtype), product(core)
        t = x @ (down if transposed else down.t())
        if not want_u:
            return t, None
        if matrix is None:
            return t, (t if scale == 1.0 else t * scale)
        u = like(t, matrix.dtype) @ (matrix.t() if transposed else matrix)
        return t, like(u if scale == 1.0 else u.mul_(scale), x.dtype)

    @staticmethod
    def gemm_tail(
        x: Tensor,
        weight: Tensor,
        u: Tensor,
        up: Tensor,
        bias: OptTensor,
        transposed: bool,
        dropout: Dropout = None,
    ) -> Tensor:
        up = like(up, x.dtype)
        y = linear(x, weight, bias)
        return y.addmm_(u, up if transposed else up.t())

    @staticmethod
    def core_grad(
        t: Tensor, g: Tensor, core: Any, scale: float, want: tuple[bool, bool], counters: OptTensor
    ) -> tuple[Wanted, Wanted]:
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


PRIMITIVES: dict[str, type[Triton] | type[Aten]] = {"triton": Triton, "aten": Aten}


def primitives(impl: str, rows: Tensor) -> type[Triton] | type[Aten]:
    """The primitives of an implementation; a call without rows has nothing to launch."""
    return PRIMITIVES[impl if rows.shape[0] else "aten"]


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The operands have their dtypes by now: autocast must not change them inside."""
    if under_autocast(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def fold(x: Tensor) -> Tensor:
    """(..., K) as (M, K), a view wherever the strides allow."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def join(a: OptTensor, b: OptTensor) -> Core:
    """The core from its two places in an op's signature."""
    return a if a is None or b is None else (a, b)


def forward(
    x: Tensor,
    low: OptTensor,
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
) -> tuple[Tensor, Wanted]:
    """(y, t), t only if wanted."""
    with no_autocast(x):
        do, dropout = primitives(impl, x), None if seed is None else (seed, dropout_p)
        rows = x if low is None else low
        t, u = do.shrink(rows, down, join(a, b), scale, False, want_t, True, None, dropout)
        return do.gemm_tail(x, weight, u, up, bias, False), (t if want_t else None)


def backward(
    dy: Tensor,
    t: Wanted,
    x: Wanted,
    low: Wanted,
    weight: Wanted,
    down: Tensor,
    a: OptTensor,
    b: OptTensor,
    up: Tensor,
    seed: OptTensor,
    scale: float,
    dropout_p: float,
    impl: str,
    needs: Needs,
) -> list[Wanted]:
    """The gradients that are needed, in the order of `Needs`; None for the others.

    t is there if a core factor or up needs a gradient, the weight if x does, x if the weight does
    (or down, without dropout), low if down does and there is dropout.
    """
    with no_autocast(dy):
        do, dropout = primitives(impl, dy), None if seed is None else (seed, dropout_p)
        core, p = join(a, b), down.shape[0]
        need_core = needs.a or needs.b
        need_v = needs.x or needs.low or needs.down
        g: Wanted = None
        v: Wanted = None
        if need_core or need_v:
            counters = do.counters(dy) if need_core else None
            back = scale if dropout is None else scale / (1.0 - dropout_p)
            g, v = do.shrink(dy, up, core, back, True, need_core, need_v, counters)
        grads: dict[str, Wanted] = dict.fromkeys(Needs._fields)
        if needs.low:  # dropout lies between x and low: their gradients are two
            grads["low"] = v[:, :p] @ down.to(dy.dtype)
        if needs.x:
            if needs.low:
                grads["x"] = dy @ weight
            else:
                grads["x"] = do.gemm_tail(dy, weight.t(), v, down, None, True, dropout)
        if need_core:
            grads["a"], grads["b"] = do.core_grad(t, g, core, scale, (needs.a, needs.b), counters)
        if needs.down:
            grads["down"] = (v[:, :p].t() @ (x if low is None else low)).to(down.dtype)
        if needs.up:
            grads["up"] = (dy.t() @ through_core(t, core, scale)).to(up.dtype)
        if needs.weight:
            grads["weight"] = dy.t() @ x
        if needs.bias:
            grads["bias"] = dy.sum(0)
        return list(grads.values())


def saved(
    needs: Needs, t: Wanted, x: Tensor, low: OptTensor, weight: Tensor
) -> tuple[Wanted, Wanted, Wanted, Wanted]:
    """(t, x, low, weight): what the backward will read of them, None for the rest."""
    need_x = needs.weight or (needs.down and low is None)
    return (
        t,
        x if need_x else None,
        low if needs.down else None,
        weight if needs.x else None,
    )


def small(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    core: Core,
    up: Tensor,
    bias: OptTensor,
    scale: float,
) -> Tensor:
    """y, by library operations that autograd itself differentiates: the least work for the host.

    t is all that it saves of size M where down, up and weight are frozen, as `LowRankLinear` does;
    its backward makes dx in two parts and adds them, which costs another pass over M × K.
    """
    rows = fold(x)
    t, matrix = linear(rows, like(down, x.dtype)), product(core)
    u = t if matrix is None else like(like(t, matrix.dtype) @ matrix, x.dtype)
    y = linear(rows, weight, bias).addmm_(u, like(up, x.dtype).t(), alpha=scale)
    return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])


class LowRankLinear(torch.autograd.Function):
    """The eager call. Leading dimensions of x are folded here."""

    @staticmethod
    def forward(ctx, x, low, weight, down, a, b, up, bias, seed, scale, dropout_p, impl):  # type: ignore[no-untyped-def]
        needs = Needs(*ctx.needs_input_grad[:8])
        lead = x.shape[:-1]
        x, low = fold(x), None if low is None else fold(low)
        want_t = needs.a or needs.b or needs.up
        rest = seed, scale, dropout_p, impl
        y, t = forward(x, low, weight, down, a, b, up, bias, *rest, want_t)
        ctx.save_for_backward(*saved(needs, t, x, low, weight), down, a, b, up, seed)
        ctx.needs, ctx.rest, ctx.lead = needs, rest[1:], lead
        return y.view(*lead, y.shape[-1])

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        operands = *ctx.saved_tensors, *ctx.rest, ctx.needs
        with torch.no_grad():
            grads = backward(fold(dy), *operands)
        for i in (0, 1):
            if grads[i] is not None:
                grads[i] = grads[i].view(*ctx.lead, grads[i].shape[-1])
        if torch.is_grad_enabled():  # create_graph=True
            grads = refuse_double_backward(grads)
        return (*grads, None, None, None, None)


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
    low: OptTensor,
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
    y, t = forward(x, low, weight, down, a, b, up, bias, *rest)
    return y, x.new_empty(0) if t is None else t


@forward_op.register_fake
def _(x, low, weight, down, a, b, up, bias, seed, scale, dropout_p, impl, want_t):  # type: ignore[no-untyped-def]
    t = x.new_empty((x.shape[0], down.shape[0]) if want_t else 0)
    return x.new_empty((x.shape[0], weight.shape[0])), t


@torch.library.custom_op("fused_lowrank::backward", mutates_args=())
def backward_op(
    dy: Tensor,
    t: OptTensor,
    x: OptTensor,
    low: OptTensor,
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
    grads = backward(dy, t, x, low, weight, down, a, b, up, *rest)
    return [dy.new_empty(0) if grad is None else grad for grad in grads]


@backward_op.register_fake
def _(dy, t, x, low, weight, down, a, b, up, seed, scale, dropout_p, impl, needs):  # type: ignore[no-untyped-def]
    m, n = dy.shape
    k = down.shape[1]
    dx, dweight, dbias = dy.new_empty((m, k)), dy.new_empty((n, k)), dy.new_empty(n)
    like: tuple[Wanted, ...] = (dx, dx, dweight, down, a, b, up, dbias)
    return [
        torch.empty_like(operand) if need else dy.new_empty(0)
        for need, operand in zip(needs, like, strict=True)
    ]


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, low, weight, down, a, b, up, _, seed, scale, dropout_p, impl, want_t = inputs
    needs = Needs(*ctx.needs_input_grad[:8])
    t = output[1] if want_t else None
    ctx.save_for_backward(*saved(needs, t, x, low, weight), down, a, b, up, seed)
    ctx.needs, ctx.rest = needs, (scale, dropout_p, impl)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dy, dt):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 13
    grads = backward_op(dy, *ctx.saved_tensors, *ctx.rest, list(ctx.needs))
    wanted = [grad if need else None for need, grad in zip(ctx.needs, grads, strict=True)]
    return (*wanted, None, None, None, None, None)


forward_op.register_autograd(_op_backward, setup_context=_setup_context)
