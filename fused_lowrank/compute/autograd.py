"""Forward and backward of the equation over passes (`run`), and the two ways to call them:

    eager        a torch.autograd.Function, directly
    compiled     the torch.library ops fused_lowrank::forward and ::backward

    forward      t, u = shrink(x,  down, core,  scale)     y  = gemm_tail(x,  W,  u, up, bias, gain)
    backward     g, v = shrink(dy, upᵀ,  coreᵀ, scale)     dx = gemm_tail(dy, Wᵀ, v, downᵀ)
                 dcore = core_grad(t, g, scale)

Where there is a gain, dy ⊙ gain is in dy's place there, and the gain's gradient is had from y.

Saved for backward is t (M, P), x only if down or the weight is trained, and y if the gain is: it is
the result. Operands are 2-D here; the core is a, or the pair a·b, or None. Dropout is of the
low-rank path's input alone. Its mask is a function of a seed: our kernels draw it in the forward,
and an eager call saves it as bits, M·K/8 bytes, where x or down needs a gradient; elsewhere it is
made again in the backward.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from .. import config as configuration
from ..config import Config
from . import choose, devices
from .dropout import Dropout, is_no_bits, no_bits
from .gain import of_magnitude, widened
from .operands import Operands, has_doubles
from .plans import PLANS
from .reference import (
    AnyCore,
    RowCores,
    like,
    through_core,
)
from .run import is_foreign, no_autocast, on_device, run
from .steps.library import Wanted

unsafe_view = torch.ops.aten._unsafe_view.default
OptTensor = Optional[Tensor]  # noqa: UP045 - torch.library reads these annotations


class Needs(NamedTuple):
    """Flags of the operands that require a gradient, in the order of `backward`'s result."""

    x: bool
    weight: bool
    down: bool
    a: bool
    b: bool
    up: bool
    bias: bool
    gain: bool = False


def fold(x: Tensor) -> Tensor:
    """(..., K) as (M, K), a view wherever the strides allow."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def join(a: OptTensor, b: OptTensor, rows: RowCores | None = None) -> Any:
    """The core from its two places in an op's signature; with `rows`, these are its tables."""
    if rows is not None:
        return rows if a is None else rows._replace(table=a, right=b)
    return a if a is None or b is None else (a, b)


def places(core: AnyCore) -> tuple[Any, Any]:
    """The core's two places in a signature: (a, b), (core, None), or the tables of `RowCores`."""
    if isinstance(core, RowCores):
        return core.table, core.right
    return core if isinstance(core, tuple) else (core, None)


def dropout_of(seed: OptTensor, dropout_p: float, bits: OptTensor = None) -> Dropout | None:
    """The dropout of `Operands` from its places in a signature; no op has one for bits."""
    return None if seed is None else Dropout(seed, dropout_p, bits)


def backward(
    dy: Tensor,
    t: Wanted,
    operands: Operands,
    impl: str,
    config: Config,
    needs: Needs,
    y: Wanted = None,
) -> list[Wanted]:
    """The gradients that are needed, in the order of `Needs`; None for the others.

    `operands` are the forward's. t is there if a core factor or up needs a gradient, the weight if
    x does, x if down or the weight does, y and the bias if the gain does.
    """
    if is_foreign(dy):
        with no_autocast(dy), on_device(dy):
            return backward(dy, t, operands, impl, config, needs, y)
    _, _, down, core, up, bias, scale, dropout, _, gain = operands
    want_g = needs.a or needs.b
    grads: dict[str, Wanted] = dict.fromkeys(Needs._fields)
    if needs.bias:
        grads["bias"] = dy.sum(0)
    if gain is not None:
        plan = PLANS["split" if choose.takes_kernels(impl, dy, *operands.ranks) else "aten"]
        plan = plan if dy.numel() else PLANS["aten"]
        tiles = devices.tiles(dy.device, "", config.tiles) if plan.ours else None
        dy, dgain = plan.gain_back.run(dy, y, widened(gain, dy.dtype), bias, tiles)
        grads["gain"] = None if dgain is None else like(dgain, gain.dtype)
    g: Wanted = None
    v: Wanted = None
    tiles = None
    if needs.x or want_g or needs.down:
        back = operands.of_backward(dy)
        if needs.x:
            done = run(back, impl, config, want_g, needs.down)
            plan, tiles, grads["x"], g, v = done[:5]
        else:
            plan = choose.for_single_steps(impl, config, dy, *operands.ranks, has_doubles(back))
            tiles = devices.tiles(dy.device, "", config.tiles) if plan.ours else None
            g, v, _ = plan.down.run(back, tiles, want_g, needs.down)
    if want_g:
        want = needs.a, needs.b
        grads["a"], grads["b"] = plan.core_grad.run(t, g, core, scale, want, tiles)
    if needs.down:
        x = operands.x
        if dropout is not None and x.numel():
            plan = PLANS["split" if choose.takes_kernels(impl, dy, *operands.ranks) else "aten"]
            tiles = devices.tiles(dy.device, "", config.tiles) if plan.ours else None
            x = plan.masked.run(x, dropout, tiles)
        grads["down"] = (v[:, : down.shape[0]].t() @ x).to(down.dtype)
    if needs.up:
        # Summed over rows with the long side as columns, which CPU libraries do faster.
        dup = through_core(t, core, scale).t() @ dy
        grads["up"] = like(dup.t().contiguous(), up.dtype)
    if needs.weight:
        grads["weight"] = dy.t() @ operands.x
    return list(grads.values())


def saved(needs: Sequence[bool], t: Wanted, x: Tensor, weight: Tensor) -> tuple[Wanted, ...]:
    """(t, x, weight): what the backward will read of them, None for the rest.

    The first three of `needs` are of x, weight and down.
    """
    return t, (x if needs[1] or needs[2] else None), (weight if needs[0] else None)


# --- eager ---


class Call(NamedTuple):
    """The part of an eager call that is no tensor."""

    scale: float
    dropout_p: float
    impl: str
    config: Config
    rows: RowCores | None  # of a core for each row, whose tables are among the tensors


class LowRankFunction(torch.autograd.Function):
    """The eager call, of a `Call` and x, weight, down, a, b, up, bias, gain, seed, values.

    If there are values, they are the gain, and what is in its place is the magnitude of a `Ratio`.
    Leading dimensions of x are folded here.
    """

    @staticmethod
    def forward(ctx, call, *tensors):  # type: ignore[no-untyped-def]
        x, weight, down, a, b, up, bias, gain, seed, values = tensors
        gain, magnitude = (gain, None) if values is None else (values, gain)
        needs, lead, rows = Needs(*ctx.needs_input_grad[1:9]), x.shape[:-1], call.rows
        x = fold(x)
        dropout, core = dropout_of(seed, call.dropout_p), join(a, b, rows)
        operands = Operands(x, weight, down, core, up, bias, call.scale, dropout, gain=gain)
        want_t = needs.a or needs.b or needs.up
        masked = dropout is not None and (needs.x or needs.down)
        want_bits = masked and not call.config.redraw_dropout
        done = run(operands, call.impl, call.config, want_t, False, want_bits)
        by_row = (None, None) if rows is None else (rows.handles, rows.weights)
        t = done.t if want_t else None
        bits = done.bits
        if bits is None and masked and done.drawn:
            bits = no_bits(seed, *x.shape)
        # A view that autograd does not know for one: a caller may then write to y.
        y = done.y
        y = y if len(lead) == 1 else unsafe_view(y, (*lead, y.shape[-1]))
        # Those of rows are saved for autograd to see that they are not written to meanwhile, and of
        # y it is the result, not what it is a view of, for the same.
        of_gain = gain, *((y, bias, magnitude) if needs.gain else (None,) * 3), *by_row
        ctx.save_for_backward(seed, bits, *saved(needs, t, x, weight), down, a, b, up, *of_gain)
        ctx.needs, ctx.call, ctx.lead = needs, call, lead
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        call = ctx.call
        seed, bits, t, x, weight, down, a, b, up, *of_gain = saved_tensors(ctx)
        gain, y, bias, magnitude, *_ = of_gain
        if call.config.redraw_dropout or is_no_bits(bits):
            bits = None
        core, dropout = join(a, b, call.rows), dropout_of(seed, call.dropout_p, bits)
        operands = Operands(x, weight, down, core, up, bias, call.scale, dropout, gain=gain)
        y = None if y is None else fold(y)
        with torch.no_grad():
            grads = backward(fold(dy), t, operands, call.impl, call.config, ctx.needs, y)
            if magnitude is not None:
                grads[-1] = of_magnitude(grads[-1], gain, magnitude)
        if grads[0] is not None:
            grads[0] = grads[0].view(*ctx.lead, grads[0].shape[-1])
        if torch.is_grad_enabled():  # create_graph=True
            grads = refuse_double_backward(grads)
        return (None, *grads, None, None)


def saved_tensors(ctx: Any) -> Any:
    """The tensors that an eager call saved; where y was written to, the error says what to do."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if not ctx.needs.gain or "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{error}\nThe gradient of a gain (DoRA's magnitude) is computed from the layer's "
            "output: if it is that which was written to, as by `y += …` or an activation with "
            "inplace=True, write `y = y + …`, or take impl='reference', which keeps what it needs"
        ) from error


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


# --- compiled ---
#
# A schema cannot say "maybe a tensor" of a result: what is not wanted is an empty tensor there.


def run_op(operands: Operands, impl: str, want_t: bool) -> tuple[Tensor, Tensor]:
    """(y, t) of an op's forward; t is empty if it is not wanted."""
    if impl == "triton":
        choose.require_triton(operands.x, *operands.ranks)
    done = run(operands, impl, configuration.current(), want_t, False)
    return done.y, done.t if want_t else operands.x.new_empty(0)


def gradients_of_op(
    dy: Tensor, t: OptTensor, operands: Operands, impl: str, needs: Needs, y: OptTensor = None
) -> list[Wanted]:
    """The gradients of an op's backward, None for those that are not needed.

    That of the gain is among them if there is one.
    """
    grads = backward(dy, t, operands, impl, configuration.current(), needs, y)
    return grads[:-1] if operands.gain is None else grads


def there(grads: Sequence[Wanted], dy: Tensor) -> list[Tensor]:
    """The gradients as an op returns them."""
    return [dy.new_empty(0) if grad is None else grad for grad in grads]


def fake_results(x: Tensor, weight: Tensor, down: Tensor, want_t: bool) -> tuple[Tensor, Tensor]:
    """(y, t) of the sizes that an op's forward gives."""
    t = x.new_empty((x.shape[0], down.shape[0]) if want_t else 0)
    return x.new_empty((x.shape[0], weight.shape[0])), t


def fake_gradients(
    dy: Tensor, factors: Sequence[OptTensor], needs: Sequence[bool], gain: OptTensor = None
) -> list[Tensor]:
    """Gradients of the sizes that an op's backward gives; `factors` go from down to up."""
    m, n = dy.shape
    k = factors[0].shape[1]  # type: ignore[union-attr]
    of_x, of_weight, of_bias = dy.new_empty((m, k)), dy.new_empty((n, k)), dy.new_empty(n)
    operands = of_x, of_weight, *factors, of_bias, *(() if gain is None else (gain,))
    return [
        torch.empty_like(operand) if need else dy.new_empty(0)
        for need, operand in zip(needs, operands, strict=True)
    ]


def connect(
    forward_op: Any, backward_op: Callable[..., list[Tensor]], count: int, has_gain: bool = False
) -> None:
    """Make `backward_op` the backward of `forward_op`, whose first `count` inputs have gradients.

    The forward's inputs are x, weight, the factors from down to up, bias, then others, the last of
    which is whether t is wanted. The backward's are dy, t, x, weight, those factors, those others
    but the last, and which gradients are needed. If it `has_gain`, that is the last input, or None.
    Where it is a tensor the backward is given it too, and y and the bias if it needs a gradient.
    """

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.inputs, gain = len(inputs), None
        if has_gain:
            *inputs, gain = inputs
        (x, weight, *factors, bias), (*others, want_t) = inputs[:count], inputs[count:]
        needs = list(ctx.needs_input_grad[:count])
        values = *saved(needs, output[1] if want_t else None, x, weight), *factors, *others
        of_gain: tuple[OptTensor, ...] = ()
        if gain is not None:
            needs.append(ctx.needs_input_grad[ctx.inputs - 1])
            of_gain = gain, *((output[0], bias) if needs[-1] else (None, None))
        ctx.of_gain = len(of_gain)
        values = *values, *of_gain
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in values))
        ctx.plain = [None if isinstance(v, Tensor) else v for v in values]
        ctx.needs = needs
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, dy: Any, dt: Any) -> Any:
        if dy is None:
            return (None,) * ctx.inputs
        pairs = zip(ctx.saved_tensors, ctx.plain, strict=True)
        values = [plain if tensor is None else tensor for tensor, plain in pairs]
        first = len(values) - ctx.of_gain
        grads = backward_op(dy, *values[:first], ctx.needs, *values[first:])
        wanted = [grad if need else None for need, grad in zip(ctx.needs, grads, strict=True)]
        plain = [None] * (ctx.inputs - len(wanted))
        return (*wanted[:count], *plain, *wanted[count:])

    forward_op.register_autograd(backward, setup_context=setup_context)


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
    gain: OptTensor = None,
) -> tuple[Tensor, Tensor]:
    dropout = dropout_of(seed, dropout_p)
    operands = Operands(x, weight, down, join(a, b), up, bias, scale, dropout, gain=gain)
    return run_op(operands, impl, want_t)


@forward_op.register_fake
def _(x, weight, down, *others):  # type: ignore[no-untyped-def]
    return fake_results(x, weight, down, others[8])


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
    gain: OptTensor = None,
    y: OptTensor = None,
    bias: OptTensor = None,
) -> list[Tensor]:
    dropout = dropout_of(seed, dropout_p)
    operands = Operands(x, weight, down, join(a, b), up, bias, scale, dropout, gain=gain)
    return there(gradients_of_op(dy, t, operands, impl, Needs(*needs), y), dy)


@backward_op.register_fake
def _(dy, t, x, weight, down, a, b, up, *others):  # type: ignore[no-untyped-def]
    return fake_gradients(dy, (down, a, b, up), *others[4:6])


connect(forward_op, backward_op, count=7, has_gain=True)
