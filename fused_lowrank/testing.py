"""Helpers for tests and benchmarks: operands, the error budget, pinned tiles."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import config

if TYPE_CHECKING:
    from .kernels.tiles import TileConfig

FACTOR = 2.5  # a correct result's error exceeds this multiple of the reference's in 1% of tensors
POOLED = 200  # elements from which a tensor's ratio is stable enough to be pooled
PARTS = 8  # of such a tensor, each with a ratio of its own


def pinned_tiles(**tiles: TileConfig) -> AbstractContextManager[None]:
    """A context in which the named kernels are launched with these tiles.

        with pinned_tiles(shrink=TileConfig(16, 16, 64, 4, 2)):
            layer(x)  # and its backward

    It is `config.use(tiles=…)`: of the calling thread or asyncio task, and taken along by calls for
    their backward. Kernels that are not named keep the tiles that they would have.

    Args:
        tiles: a `TileConfig` by the kernel's name: shrink, gemm_tail, core_grad, decode, relay or
            dropped.

    Raises ValueError for another kernel or no `TileConfig` when the context is entered, and for a
    tile that is not valid for a launch when a layer is called.
    """
    return config.use(tiles=tiles)


def pinned_plan(name: str) -> AbstractContextManager[None]:
    """A context in which every pass is computed by the plan of that name.

    It is `config.use(plan=name)`: of the calling thread or asyncio task, and taken along by calls
    for their backward. A layer or call with impl="reference" has no plan, and stays as it is.

    Args:
        name: a plan of `fused_lowrank.compute.plans.PLANS`, also one that is never chosen by
            itself.

    Raises ValueError for an unknown plan, and RuntimeError for one that cannot compute a pass, when
    a layer is called.
    """
    return config.use(plan=name)


@dataclass(frozen=True)
class Measured:
    """The error of one tensor against fp64, beside that of the reference in the same dtype.

    `error` and `reference` are Frobenius norms of the difference from the result in fp64, in the
    tensor's own unit; `name` is "y" or "d" and an operand's name, `size` the number of elements.
    """

    name: str
    size: int
    error: float
    reference: float
    floor: float  # 2·u·‖the formula on absolute values‖, u the dtype's unit roundoff
    logs: tuple[float, ...] = ()  # of error / reference in each of PARTS parts, where it is pooled

    @property
    def within(self) -> bool:
        """Whether the error is within the budget; NaN never is."""
        return self.error <= max(FACTOR * self.reference, self.floor)


Results = dict[str, Tensor]
Call = Callable[..., Tensor]


def results(call: Call, operands: dict[str, Any], dy: Tensor) -> Results:
    """call(**operands) as "y", and the gradient of each operand that requires one as "d<name>".

    Operands are tensors, tuples of tensors, None or plain values; dy is converted to y's dtype.
    """
    leaves = {
        name if part is None else f"{name}{part}": tensor
        for name, value in operands.items()
        for part, tensor in (enumerate(value) if isinstance(value, tuple) else [(None, value)])
        if isinstance(tensor, Tensor) and tensor.requires_grad
    }
    y = call(**operands)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)) if leaves else ()
    named = {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), **named}


def mapped(operands: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The operands with `change` applied to each tensor, as leaves that require what they did."""

    def leaf(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(leaf(part) for part in value)
        if isinstance(value, Tensor):
            return change(value.detach()).requires_grad_(value.requires_grad)
        return value

    return {name: leaf(value) for name, value in operands.items()}


def measure(ours: Call, reference: Call, operands: dict[str, Any], dy: Tensor) -> list[Measured]:
    """The error of `ours` for the output and every gradient.

    `reference` is called with the operands as they are, in fp64 (the truth), and in fp64 with the
    absolute values of all of them and of the scale (how much rounding can matter).

    Args:
        ours: a function that is called with the operands by keyword and returns y (…, N).
        reference: the same function in plain torch, in any float dtype.
        operands: tensors, pairs of tensors, None or plain values by name, as `lowrank_linear` takes
            them; "x" (…, K) is among them. Gradients are measured of those that require one.
        dy: (…, N), the gradient of y, of any float dtype; it is used in x's.

    Returns:
        A `Measured` for "y" and for the gradient of each operand that requires one, in this order.

    Raises AssertionError where a result has not the shape and dtype of the reference's.
    """
    dy = dy.to(operands["x"].dtype)
    got = results(ours, operands, dy)
    same = results(reference, operands, dy)
    truth = results(reference, mapped(operands, torch.Tensor.double), dy.double())
    absolute = mapped(operands, lambda tensor: tensor.double().abs())
    if "scale" in absolute:
        absolute["scale"] = abs(absolute["scale"])
    sizes = results(reference, absolute, dy.double().abs())

    core = operands.get("core")
    factors = core if isinstance(core, tuple) else (operands["x"] if core is None else core,)
    product = functools.reduce(torch.promote_types, (factor.dtype for factor in factors))

    measured = []
    for name, tensor in got.items():
        if tensor.shape != same[name].shape or tensor.dtype != same[name].dtype:
            raise AssertionError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"the reference's {tuple(same[name].shape)} {same[name].dtype}"
            )
        # Whatever is wider than x still carries x's roundings, and those of the core's product.
        unit = max(torch.finfo(d).eps for d in (tensor.dtype, operands["x"].dtype, product)) / 2
        error, reference_error = (r.double() - truth[name] for r in (tensor, same[name]))
        measured.append(
            Measured(
                name,
                tensor.numel(),
                float(error.norm()),
                float(reference_error.norm()),
                float(2 * unit * sizes[name].norm()),
                log_ratios(error, reference_error) if tensor.numel() > POOLED else (),
            )
        )
    return measured


def log_ratios(ours: Tensor, reference: Tensor) -> tuple[float, ...]:
    """log(‖ours‖ / ‖reference‖) of PARTS parts of two errors, less those in which one is zero."""
    parts = zip(*(error.flatten().tensor_split(PARTS) for error in (ours, reference)), strict=True)
    norms = [[float(error.norm()) for error in part] for part in parts]
    return tuple(math.log(a / b) for a, b in norms if a > 0 and b > 0)


def pooled_ratio(measured: list[Measured]) -> float:
    """Geometric mean of error / reference error over the tensors large enough to say something."""
    logs = [
        math.log(m.error / m.reference)
        for m in measured
        if m.size > POOLED and m.error > 0 and m.reference > 0
    ]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def check_pooled(measured: list[Measured]) -> None:
    """Raise an AssertionError unless the errors, pooled, are no larger than the reference's.

    See `check_mean`, of the logarithms of the ratios of all parts of all tensors that are pooled.
    """
    check_mean([log for m in measured for log in m.logs])


def check_mean(logs: Sequence[float]) -> None:
    """Raise an AssertionError if log(error / reference) is above 0 on the average, beyond chance.

    A result that is as exact as the reference has errors of the same distribution, so log(e / e')
    is as often above 0 as below: its mean over n of them is normal about 0 with standard error
    s/√n, s their standard deviation, however a CPU orders its sums. By chance it is above three
    standard errors once in 740 times. As s is itself an estimate, the mean over s/√n has Student's
    distribution, and three standard errors are its quantile of that chance: 4.5 for n of 8, 3.2 for
    40 (by its expansion in 1/(n - 1)). What is less exact by more than that is seen.
    """
    assert len(logs) >= PARTS, f"{len(logs)} ratios say nothing: measure larger tensors"
    mean, error = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    freedom = len(logs) - 1
    most = 3 * (1 + 2.5 / freedom + 5.75 / freedom**2) * error
    assert mean <= most, (
        f"errors are {math.exp(mean):.4f} of the reference's, pooled over {len(logs)} parts; by "
        f"chance it is at most {math.exp(most):.4f}"
    )
