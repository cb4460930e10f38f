"""lowrank_linear: the checks, the choice of implementation, dropout and autocast."""

from typing import Any

import torch
from torch import Tensor

from . import config
from .compute import choose, isolation
from .compute.autograd import Call, LowRankFunction, dropout_of, fold, forward_op, places
from .compute.dropout import Dropout, kept
from .compute.gain import Ratio, loses_z, trains
from .compute.operands import Operands
from .compute.reference import TORCH, Core, Products, RowCores, chain, lowrank_linear_reference
from .compute.run import no_autocast, run, under_autocast

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NUMBER, PAIR = (float, int), (tuple, list)  # types whose union would be made in each call
OPERANDS = ("weight", "down", "core", "core", "up", "bias", "gain")  # as the messages name them


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
    gain: Tensor | None = None,
) -> Tensor:
    """y = gain ⊙ (x·weightᵀ + scale · ((dropout(x)·downᵀ) · core) · upᵀ) + bias.

    The forward of a linear layer with a low-rank adapter: LoRA (core None; Hu et al. 2021,
    arXiv 2106.09685), LoRA-XS (core R; Bałazy et al. 2024, arXiv 2405.17604), LoRA-Mini (core
    (Atrain, Btrain); Singh et al. 2024, arXiv 2411.15804), AdaLoRA and VeRA (core a diagonal; Zhang
    et al. 2023, arXiv 2303.10512; Kopiczko et al. 2024, arXiv 2310.11454); with a gain DoRA (Liu et
    al. 2024, arXiv 2402.09353).

    Args:
        x: (..., K), float32, float16, bfloat16 or float64.
        weight: (N, K), of x's dtype (after autocast, where it is on).
        down: (P, K), of any float dtype; used in x's.
        core: (P, Q), or the pair (a (P, r), b (r, Q)) whose product it is, or a diagonal (r,), or
            None for the identity (of both then P = Q = r). Of any float dtype: the product with it
            is taken in its own.
        up: (N, Q), of any float dtype; used in x's.
        bias: (N,) of x's dtype, or None.
        scale: factor of the low-rank term.
        dropout_p: probability with which an element of x is zeroed on the low-rank path, while
            `training`, taken to the nearest 2⁻¹⁶.
        training: whether dropout is on.
        impl: "auto", "triton", "aten" or "reference"; see `fused_lowrank.compute.choose`. Within it
            the plan is chosen by the sizes and the device: `fused_lowrank.explain` says which.
        seed: int64 (1,) on x's device, from which the dropout's mask is made; by default it is
            drawn from the device's generator.
        gain: (N,), of any float dtype, or None for 1; used in float32 or wider.

    Returns:
        y (..., N) in x's dtype.

    Gradients go to whatever requires one, and to nothing else. What is saved for the backward is
    x·downᵀ, (M, P), and x only if down or weight requires a gradient. The gradient of gain is
    computed from y itself, which is then not to be written to in place, and is NaN where gain is 0,
    but by impl="reference", and by "auto" on a CPU. Where our kernels compute a
    dropout, its mask is saved as well, M·K/8 bytes, if x or down requires a gradient:
    `config.use(redraw_dropout=True)` saves none, nor does a compiled graph.

    Raises:
        ValueError: shapes that do not chain, devices that differ, an unknown implementation, a
            `dropout_p` outside [0, 1), a seed of another shape, dtype or device.
        TypeError: operands that are not tensors, a scale that is no number, dtypes that do not mix.
        RuntimeError: impl="triton" where the kernels cannot run; a second differentiation
            (impl="reference" can be differentiated twice).
    """
    dropout = Dropout(seed, dropout_p) if training and dropout_p else None
    core = paired(core)
    operands = Operands(x, weight, down, core, up, bias, scale, dropout, False, gain)
    operands = prepared(operands)
    if dropout is None:
        check_dropout(dropout_p, seed, x)
    if impl == "auto" and dropout is None and choose.small(x) and not trains(gain):
        return chain(x, weight, down, core, up, bias, scale, gain)
    return compute(operands, impl)


def prepared(operands: Operands) -> Operands:
    """The operands in autocast's dtype, where it is on, if they fit together.

    Raises as `lowrank_linear` does.
    """
    try:
        if under_autocast(operands.x):
            operands = autocast(operands)
        if not fits(operands):
            check(operands)
        if operands.dropout is not None:
            check_dropout(operands.dropout.p, operands.dropout.seed, operands.x)
    except AttributeError:
        check_kinds(operands)
        raise
    return operands


def compute(operands: Operands, impl: str, isolated: bool | None = None) -> Tensor:
    """`lowrank_linear` of operands that have been checked, by the implementation asked for.

    x (..., K) may have any leading dimensions; a dropout's seed may be None, and is then drawn.
    `isolated` says whether products are padded so that no row's NaN or Inf reaches another; None:
    where there is a core for each row and this CPU's library needs it.
    """
    if isinstance(operands.gain, Ratio) and (
        torch.compiler.is_compiling() or not torch.is_grad_enabled()
    ):
        operands = operands._replace(gain=operands.gain.tensor())
    x, weight, down, core, up, bias, scale, dropout, _, gain = operands
    values, gain = (gain.values, gain.magnitude) if isinstance(gain, Ratio) else (None, gain)
    rows = core if isinstance(core, RowCores) else None
    impl = choose.implementation(impl, x, down.shape[0], up.shape[1])
    products = TORCH
    if isolated is None:
        isolated = rows is not None and choose.isolates(impl, x, down, up)
    if isolated:
        impl, products = ("reference" if impl == "reference" else "isolated"), isolation.PRODUCTS
    if impl == "reference" or (impl == "auto" and loses_z(operands.gain, bias)):
        ratio = operands.gain
        if isinstance(ratio, Ratio):
            operands = operands._replace(gain=ratio.tensor())
        return by_reference(operands, products)
    # Whoever needs the mask makes it from this, forward and backward.
    seed, dropout_p = (None, 0.0) if dropout is None else dropout[:2]
    if dropout is not None and seed is None:
        seed = draw_seed(x)
    a, b = places(core)
    tensors = x, weight, down, a, b, up, bias, gain
    wants_grad = torch.is_grad_enabled() and any(
        operand is not None and operand.requires_grad for operand in tensors
    )
    if torch.compiler.is_compiling():
        want_t = wants_grad and any(f is not None and f.requires_grad for f in (a, b, up))
        flags = seed, scale, dropout_p, impl, want_t, *(() if gain is None else (gain,))
        y, _ = forward_op(fold(x), *tensors[1:7], *flags)
    elif wants_grad:
        call = Call(scale, dropout_p, impl, config.current(), rows)
        return LowRankFunction.apply(call, *tensors, seed, values)
    else:
        if x.dim() != 2 or seed is not None:
            operands = operands._replace(x=fold(x), dropout=dropout_of(seed, dropout_p))
        y = run(operands, impl, config.current(), False, False).y
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def by_reference(operands: Operands, products: Products) -> Tensor:
    """y by the equation in plain torch."""
    x, weight, down, core, up, bias, scale, dropout, _, gain = operands
    low = None
    if dropout is not None:
        if dropout.seed is None:
            low = torch.nn.functional.dropout(x, dropout.p)
        else:
            low = x * kept(x, dropout.seed, dropout.p) / (1.0 - dropout.p)
    with no_autocast(x):
        return lowrank_linear_reference(
            x, weight, down, core, up, bias, scale=scale, low=low, products=products, gain=gain
        )


def draw_seed(x: Tensor) -> Tensor:
    """A seed for dropout from the default generator of x's device: int64 (1,)."""
    return torch.randint(2**62, (1,), device=x.device)


def check_dropout(dropout_p: float, seed: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless these are a probability and, or None, a seed as `draw_seed` makes."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}: it must be at least 0 and below 1")
    if seed is None:
        return
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != x.device:
        raise ValueError(
            f"seed is {shape(seed)} of {seed.dtype} on {seed.device}: it must be (1,) of "
            f"torch.int64 on {x.device}"
        )


def paired(core: Any) -> Any:
    """The core as `Operands` have it: a pair that was given as a list is a tuple."""
    if not isinstance(core, PAIR):
        return core
    if len(core) != 2 or not (isinstance(core[0], Tensor) and isinstance(core[1], Tensor)):
        kinds = ", ".join(type(factor).__name__ for factor in core)
        raise TypeError(f"core is ({kinds}): it must be a tensor, a pair of tensors or None")
    return tuple(core)


def check_kinds(operands: Operands) -> None:
    """Raise a TypeError, naming the argument, for an operand that is no tensor."""
    for name in ("x", "weight", "down", "core", "up", "bias", "gain"):
        operand, may_miss = getattr(operands, name), name in ("core", "bias", "gain")
        if name == "core":
            operand, _ = places(operand)
        if not isinstance(operand, Tensor) and not (operand is None and may_miss):
            raise TypeError(f"{name} is a {type(operand).__name__}: it must be a tensor")


def autocast(operands: Operands) -> Operands:
    """x, weight and bias in autocast's dtype, as torch's own linear takes them; fp64 stays."""
    dtype = torch.get_autocast_dtype(operands.x.device.type)
    x, weight, bias = (
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in (operands.x, operands.weight, operands.bias)
    )
    return operands._replace(x=x, weight=weight, bias=bias)


def fits(operands: Operands) -> bool:
    """Whether `check` would find nothing; False where it has to be asked. It costs less."""
    x, weight, down, core, up, bias, scale, _, _, gain = operands
    (left, right), of_rows = places(core), isinstance(core, RowCores)
    try:
        (n, k), (p, k_down), (n_up, q) = weight.shape, down.shape, up.shape
        dtype, device = x.dtype, x.device
        if left is None:
            through = p == q
        else:
            sizes = left.shape[1:] if of_rows else left.shape  # the first of tables is the slots
            if right is None:
                through = sizes == (p, q) or (sizes == (p,) and p == q)
            else:
                (p_left, r), (r_right, q_right) = sizes, right.shape[1:] if of_rows else right.shape
                through = p_left == p and r == r_right and q_right == q
        if not (
            through
            and dtype in DTYPES
            and weight.dtype is dtype
            and x.shape[-1] == k == k_down
            and n == n_up
            and 0 not in (p, q)
            and (bias is None or (bias.shape == (n,) and bias.dtype is dtype))
            and (gain is None or gain.shape == (n,))
            and isinstance(scale, NUMBER)
        ):
            return False
        for factor in (down, left, right, up, gain):
            if factor is not None and (factor.device != device or factor.dtype not in DTYPES):
                return False
        return weight.device == device and (bias is None or bias.device == device)
    except (ValueError, IndexError):  # of other dimensions
        return False


def check(operands: Operands) -> None:
    """Raise, naming the argument, what it is and what it must be, if the operands do not fit."""
    x, weight, down, core, up, bias, scale, _, _, gain = operands
    a, b = places(core)
    of_rows = isinstance(core, RowCores)  # a and b are tables then, of factors
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
        sizes = tuple(a.shape[1:] if of_rows else a.shape)
        if len(sizes) == 1 and p != q:
            raise ValueError(
                f"core is {shape(a)}, a diagonal, but down has P={p} and up has Q={q}: they must "
                f"agree, or core be ({p}, {q})"
            )
        diagonal = f" or, of a diagonal, ({p},)" if p == q else ""
        if sizes != (p, q) and not (diagonal and sizes == (p,)):
            raise ValueError(
                f"core is {shape(a)}: it must be ({p}, {q}){diagonal}, as down and up say"
            )
    elif of_rows:
        if a.shape[1] != p or b.shape[1:] != (a.shape[2], q):
            raise ValueError(f"tables are {shape(a)}·{shape(b)}: they must be of ({p}, r)·(r, {q})")
    elif a.dim() != 2 or b.dim() != 2 or a.shape[0] != p or b.shape != (a.shape[1], q):
        raise ValueError(f"core is {shape(a)}·{shape(b)}: it must be ({p}, r)·(r, {q})")
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype):
        raise ValueError(
            f"bias is {shape(bias)} of {bias.dtype}: it must be ({n},) of {x.dtype}, as x"
        )
    if gain is not None and gain.shape != (n,):
        raise ValueError(f"gain is {shape(gain)}: it must be ({n},), a number for each output")
    if not isinstance(scale, int | float):
        raise TypeError(f"scale is {scale!r}: it must be a number")
    for name, operand in zip(OPERANDS, (weight, down, a, b, up, bias, gain), strict=True):
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
