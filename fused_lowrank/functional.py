"""lowrank_linear: the checks, the choice of implementation, dropout and autocast."""

from typing import Any

import torch
from torch import Tensor

from . import isolation, ops, planner
from .dropout import kept
from .reference import TORCH, Core, Rows, lowrank_linear_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    core: Core,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    impl: str = "auto",
    seed: Tensor | None = None,
) -> Tensor:
    """y = x·weightᵀ + bias + scale · ((dropout(x)·downᵀ) · core) · upᵀ.

    The forward of a linear layer with a low-rank adapter: LoRA (core None; Hu et al. 2021,
    arXiv 2106.09685), LoRA-XS (core R; Bałazy et al. 2024, arXiv 2405.17604), LoRA-Mini (core
    (Atrain, Btrain); Singh et al. 2024, arXiv 2411.15804).

    Args:
        x: (..., K), float32, float16, bfloat16 or float64.
        weight: (N, K), of x's dtype (after autocast, where it is on).
        down: (P, K), of any float dtype; used in x's.
        core: (P, Q), or the pair (a (P, r), b (r, Q)) whose product it is, or None for the
            identity (then P = Q). Of any float dtype: the product with it is taken in its own.
        up: (N, Q), of any float dtype; used in x's.
        bias: (N,) of x's dtype, or None.
        scale: factor of the low-rank term.
        dropout_p: probability with which an element of x is zeroed on the low-rank path, while
            `training`, taken to the nearest 2⁻¹⁶.
        training: whether dropout is on.
        impl: "auto", "triton", "aten" or "reference"; see `fused_lowrank.planner`. Within it the
            plan is chosen by the sizes and the device: `fused_lowrank.explain` says which.
        seed: int64 (1,) on x's device, from which the dropout's mask is made; by default it is
            drawn from the device's generator.

    Returns:
        y (..., N) in x's dtype.

    Gradients go to whatever requires one, and to nothing else. What is saved for the backward is
    x·downᵀ, (M, P), and x only if down or weight requires a gradient.

    Raises:
        ValueError: shapes that do not chain, devices that differ, an unknown implementation, a
            probability that is none.
        TypeError: operands that are not tensors, a scale that is no number, dtypes that do not mix.
        RuntimeError: impl="triton" where the kernels cannot run; a second differentiation
            (impl="reference" can be differentiated twice).
    """
    a, b = split(core)
    x, weight, bias = prepared(x, weight, down, a, b, up, bias, scale, dropout_p)
    if seed is not None:
        check_seed(seed, x)
    dropout_p = dropout_p if training else 0.0
    if impl == "auto" and not dropout_p and planner.small(x):
        return ops.small(x, weight, down, ops.join(a, b), up, bias, scale)
    return compute(x, weight, down, a, b, up, bias, None, scale, dropout_p, impl, seed)


def prepared(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, weight, bias) in autocast's dtype, where it is on, of operands that fit together."""
    try:
        if ops.under_autocast(x):
            x, weight, bias = autocast(x, weight, bias)
        check(x, weight, down, a, b, up, bias, scale, dropout_p)
    except AttributeError:
        check_kinds(x=x, weight=weight, down=down, core=a, up=up, bias=bias)
        raise
    return x, weight, bias


def compute(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    rows: Rows | None,
    scale: float,
    dropout_p: float,
    impl: str,
    seed: Tensor | None = None,
    apart: bool = False,
) -> Tensor:
    """`lowrank_linear` of operands that have been checked, by the implementation asked for.

    With `rows` the core's two places hold its tables. Where there are `rows`, or `apart` is set, no
    row's NaN or Inf reaches another.
    """
    impl = planner.implementation(impl, x, down.shape[0], up.shape[1])
    products = TORCH
    if (rows is not None or apart) and planner.isolates(impl, x, down, up):
        impl, products = ("reference" if impl == "reference" else "isolated"), isolation.PRODUCTS
    if impl == "reference":
        if not dropout_p:
            low = None
        elif seed is None:
            low = torch.nn.functional.dropout(x, dropout_p)
        else:
            low = x * kept(x, seed, dropout_p) / (1.0 - dropout_p)
        with ops.no_autocast(x):
            core = ops.join(a, b, rows)
            return lowrank_linear_reference(
                x, weight, down, core, up, bias, scale=scale, low=low, products=products
            )
    # Whoever needs the mask makes it from this, forward and backward.
    seed = (draw_seed(x) if seed is None else seed) if dropout_p else None
    operands = (x, weight, down, a, b, up, bias)
    rest = seed, scale, dropout_p, impl
    wants_grad = torch.is_grad_enabled() and any(
        operand is not None and operand.requires_grad for operand in operands
    )
    if wants_grad and not torch.compiler.is_compiling():
        return ops.LowRankLinear.apply(*operands, *rest, rows)
    if torch.compiler.is_compiling():
        folded = (ops.fold(x), *operands[1:])
        want_t = wants_grad and any(f is not None and f.requires_grad for f in (a, b, up))
        y, _ = ops.forward_op(*folded, *rest, want_t)
    else:
        core = ops.join(a, b, rows)
        y, _ = ops.forward(ops.fold(x), weight, down, core, up, bias, *rest, False)
    return y.view(*x.shape[:-1], y.shape[-1])


def draw_seed(x: Tensor) -> Tensor:
    """A seed for dropout from the default generator of x's device: int64 (1,)."""
    return torch.randint(2**62, (1,), device=x.device)


def check_seed(seed: Tensor, x: Tensor) -> None:
    """Raise unless the seed is such as `draw_seed` makes."""
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != x.device:
        raise ValueError(
            f"seed is {shape(seed)} of {seed.dtype} on {seed.device}: it must be (1,) of "
            f"torch.int64 on {x.device}"
        )


def split(core: Any) -> tuple[Any, Any]:
    """The core's two places in an op's signature: (core, None), or the pair."""
    if not isinstance(core, tuple | list):
        return core, None
    if len(core) != 2 or not all(isinstance(factor, Tensor) for factor in core):
        kinds = ", ".join(type(factor).__name__ for factor in core)
        raise TypeError(f"core is ({kinds}): it must be a tensor, a pair of tensors or None")
    return core[0], core[1]


def check_kinds(**operands: Any) -> None:
    """Raise a TypeError, naming the argument, for an operand that is no tensor."""
    for name, operand in operands.items():
        if not isinstance(operand, Tensor) and not (operand is None and name in ("core", "bias")):
            raise TypeError(f"{name} is a {type(operand).__name__}: it must be a tensor")


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype, as torch's own linear takes them; fp64 stays."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors
    )


def check(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
) -> None:
    """Raise, naming the argument, what it is and what it must be, if the operands do not fit."""
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        dtype_error(x, weight)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x is {shape(x)} and weight {shape(weight)}: they must be (..., K) and (N, K)"
        )
    (n, k), device = weight.shape, x.device
    if down.dim() != 2 or down.shape[1] != k or down.shape[0] == 0:
        raise ValueError(f"down is {shape(down)}: it must be (P, {k}), P at least 1")
    if up.dim() != 2 or up.shape[0] != n or up.shape[1] == 0:
        raise ValueError(f"up is {shape(up)}: it must be ({n}, Q), Q at least 1")
    p, q = down.shape[0], up.shape[1]
    if a is None:
        if p != q:
            raise ValueError(f"core is None, but down has P={p} and up has Q={q}: they must agree")
    elif b is None:
        if a.shape != (p, q):
            raise ValueError(f"core is {shape(a)}: it must be ({p}, {q}), as down and up say")
    elif a.dim() != 2 or b.dim() != 2 or a.shape[0] != p or b.shape != (a.shape[1], q):
        raise ValueError(f"core is {shape(a)}·{shape(b)}: it must be ({p}, r)·(r, {q})")
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype):
        raise ValueError(
            f"bias is {shape(bias)} of {bias.dtype}: it must be ({n},) of {x.dtype}, as x"
        )
    if not isinstance(scale, int | float):
        raise TypeError(f"scale is {scale!r}: it must be a number")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}: it must be at least 0 and below 1")
    for name, operand in zip(
        ("weight", "down", "core", "core", "up", "bias"),
        (weight, down, a, b, up, bias),
        strict=True,
    ):
        if operand is not None:
            if operand.device != device:
                raise ValueError(f"{name} is on {operand.device}, but x on {device}: move one")
            if operand.dtype not in DTYPES:
                raise TypeError(f"{name} is {operand.dtype}: it must be one of {names(DTYPES)}")


def dtype_error(x: Tensor, weight: Tensor) -> None:
    """Raise the TypeError for an x or a weight that the equation does not take."""
    for name, operand in (("x", x), ("weight", weight)):
        if operand.dtype not in DTYPES:
            raise TypeError(f"{name} is {operand.dtype}: it must be one of {names(DTYPES)}")
    raise TypeError(
        f"x is {x.dtype} and weight {weight.dtype}: they must be alike "
        "(convert one, or run under torch.autocast)"
    )


def shape(tensor: Tensor) -> str:
    """A shape as the messages print it."""
    return f"({', '.join(map(str, tensor.shape))})"


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """Dtypes as the messages print them."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
