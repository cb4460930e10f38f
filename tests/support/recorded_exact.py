"""`watched`, which checks every product and sum of a call: exact, in whatever order (recorded.py).

`check_rounding` checks that each rounding to 16 bits shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from recorded_operands import F64, operands
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EXACT = 2.0**24  # integers up to here are exact in float32, in which everything is summed


def granule(values: np.ndarray) -> np.ndarray:
    """The largest power of two of which each value is a multiple; inf of 0."""
    mantissa, exponent = np.frexp(values)
    bits = (np.abs(mantissa) * 2.0**53).astype(np.int64)
    with np.errstate(over="ignore"):
        return np.where(values == 0, np.inf, np.ldexp((bits & -bits).astype(float), exponent - 53))


def check_product(a: Any, b: Any, what: str, limit: float = EXACT) -> None:
    """Raise unless each sum in the matrix product a·b is exact in any order."""
    a, b = (np.asarray(side, np.float64) for side in (a, b))
    if not a.size or not b.size:
        return
    most = (np.abs(a) @ np.abs(b)).max()
    if most <= limit * granule(a).min() * granule(b).min():  # as a rule
        return
    for i in range(a.shape[-2]):
        row = a[..., i : i + 1, :]
        sums = (np.abs(row) @ np.abs(b))[..., 0, :]
        with np.errstate(invalid="ignore"):
            units = granule(np.swapaxes(row, -1, -2)) * granule(b)
        finest = units.min(-2, initial=np.inf)
        if not np.isfinite(sums).all() or (sums > limit * finest).any():
            raise AssertionError(f"{what}: a sum needs {np.log2((sums / finest).max()):.1f} bits")


class Watch(TorchDispatchMode):
    """Within it products and sums by libraries are checked before they are made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm", "addmm"):
            a, b = args[-2:]
            wide = 2.0**53 if a.dtype == F64 else EXACT
            check_product(a.double(), b.double(), name, wide)
            if name == "addmm":  # a library may round the product before it adds it
                exact = a.double() @ b.double() * kwargs.get("alpha", 1)
                self.check_fits(exact, a.dtype, "the product of an addmm")
        elif name == "sum" and args[0].is_floating_point():
            values = args[0].double()
            check_product(torch.ones(1, values.numel()), values.view(-1, 1), name)
            self.check_fits(func(values, *args[1:], **kwargs), args[0].dtype, "a sum")
        elif name in ("mv", "addmv", "dot", "baddbmm", "linear", "matmul", "mkldnn_linear"):
            raise AssertionError(f"nothing here checks {name}")
        return func(*args, **kwargs)

    def check_fits(self, exact: Tensor, dtype: torch.dtype, what: str) -> None:
        """Raise unless the values are some of the dtype's."""
        if not fit(exact, dtype):
            raise AssertionError(f"{what} is rounded before anything is added")


def fit(exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether no value of a float64 tensor is rounded in this dtype."""
    return torch.equal(exact.to(dtype).double(), exact)


@contextmanager
def watched() -> Iterator[None]:
    """Within it every product and sum is checked, by libraries and in the interpreter's kernels."""
    from triton.runtime import interpreter

    dots, sums = interpreter.InterpreterBuilder, interpreter.ReduceOps
    create_dot, reduced = dots.create_dot, sums.sum

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        check_product(a.data, b.data, "a dot", 2.0**53 if d.data.itemsize == 8 else EXACT)
        return create_dot(self, a, b, d, *rest)

    def add_up(self: Any, value: Any) -> Any:
        data = np.moveaxis(np.asarray(value.handle.data, np.float64), self.axis, -2)
        if data.shape[-2] > 1 and value.dtype.is_floating():
            flat = data.reshape(-1, *data.shape[-2:])
            check_product(np.ones((len(flat), 1, flat.shape[1])), flat, "a kernel's sum")
        return reduced(self, value)

    dots.create_dot, sums.sum = dot, add_up
    try:
        with Watch():
            yield
    finally:
        dots.create_dot, sums.sum = create_dot, reduced


def check_rounding(kind: dict[str, Any], scale: float) -> None:
    """Raise unless each rounding to 16 bits changes something: of t, u and y, of g, v and dx."""
    made, dy = operands(**kind)
    dtype = kind["dtype"]
    wide = {name: part.double() for name, part in made.items() if isinstance(part, Tensor)}

    def rounded(exact: Tensor, what: str) -> Tensor:
        if fit(exact, dtype):
            raise AssertionError(f"{what} is not rounded by {kind}")
        return exact.to(dtype).double()

    core = made["core"]
    if isinstance(core, tuple):
        core = core[0].double() @ core[1].double()
        core = core.to(made["core"][0].dtype)
    matrix = torch.eye(len(made["down"]), dtype=F64) if core is None else core.double()
    for x, weight, down, middle, up, names in (
        (wide["x"], wide["weight"], wide["down"].t(), matrix, wide["up"].t(), "tuy"),
        (dy.double(), wide["weight"].t(), wide["up"], matrix.t(), wide["down"], ("g", "v", "dx")),
    ):
        x = x.reshape(-1, x.shape[-1])
        t = rounded(x @ down, names[0])
        u = scale * (t @ middle)
        if core is not None or scale not in (0.5, 1.0):  # otherwise t is rounded, and u as t is
            u = rounded(u, names[1])
        rounded(x @ weight.t() + u @ up, names[2])
