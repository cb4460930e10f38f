"""The tensors of a case, which every provider shares, and its bare layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fused_lowrank.compute.base.kinds import base_of
from fused_lowrank.compute.base.protocol import Base
from fused_lowrank.methods.method import MAGNITUDE

from . import bases
from .cases import Case

Call = Callable[[Tensor], Tensor]
SETS_OF_INPUTS = 2  # x and dy rotate among these
DORA = "+dora"  # at the end of an equation's name


@dataclass
class Tensors:
    """The tensors of a case, which every provider shares.

    Where W is quantised, `module` has it so, and `weight` is its values.
    """

    case: Case
    xs: list[Tensor]
    dys: list[Tensor]
    weight: nn.Parameter
    method: dict[str, nn.Parameter]  # the factors of the case's method, by the layer's names
    lora: dict[str, nn.Parameter]
    magnitude: nn.Parameter  # (N,)
    scale: float = 0.5
    module: nn.Module | None = None
    base: Base | None = None  # of the module

    def factors(self, equation: str) -> dict[str, nn.Parameter]:
        """The factors of an equation."""
        name, _, dora = equation.partition("+")
        plain = {"bare": {}, "lora": self.lora, "method": self.method}[name]
        return {**plain, MAGNITUDE: self.magnitude} if dora else plain

    def trained(self, equation: str) -> dict[str, nn.Parameter]:
        """Those of them that require a gradient."""
        return {name: p for name, p in self.factors(equation).items() if p.requires_grad}

    def fixed_storages(self) -> set[int]:
        """Addresses of what is there anyway: weight and factors, not x."""
        kept: list[Tensor] = [self.weight, *self.method.values(), *self.lora.values()]
        kept.append(self.magnitude)
        kept += [] if self.base is None else within(self.base.stored())
        return {tensor.untyped_storage().data_ptr() for tensor in kept}


def within(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The plain tensors that these are, or are made of."""
    found: list[Tensor] = []
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            found += within(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            found.append(tensor)
    return found


def make_tensors(case: Case, device: torch.device) -> Tensors:
    """Random operands of the order of one, so that no sum leaves fp16; seeded by the sizes."""
    generator = torch.Generator(device).manual_seed(case.rows * 7919 + case.k * 31 + case.n)

    def normal(*size: int, fan: int = 1, dtype: torch.dtype = case.torch_dtype) -> Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
        return values.div_(math.sqrt(fan)).to(dtype)

    def frozen(value: Tensor, train: bool = False) -> nn.Parameter:
        return nn.Parameter(value, requires_grad=train)

    # A core is trained in fp32, as from_linear makes it beside a 16-bit weight.
    core = torch.promote_types(case.torch_dtype, torch.float32)
    m, k, n, r = case.rows, case.k, case.n, case.r
    weight = frozen(normal(n, k, fan=k))
    lora = {
        "down": frozen(normal(r, k, fan=k), True),
        "up": frozen(normal(n, r, fan=r), True),
    }
    row, sizes = case.row, {"K": k, "N": n, **case.ranks}
    method = lora if case.method == "lora" else {}
    for name in sorted(row.factors, key=lambda name: name in row.core) if not method else ():
        shape, own = row.shape(name, sizes), name in row.core
        kind = core if own or len(shape) == 1 else case.torch_dtype
        fan = 1 if len(shape) == 1 else shape[0] if own else shape[-1]
        method[name] = frozen(normal(*shape, fan=fan, dtype=kind), row.factors[name].trained)
    xs = [normal(m, k).requires_grad_() for _ in range(SETS_OF_INPUTS)]
    dys = [normal(m, n) for _ in range(SETS_OF_INPUTS)]
    magnitude = frozen(1.0 + 0.1 * normal(n), True)
    module = base = None
    if case.base:
        module = bases.quantised(case.base, weight)
        base = cast(Base, base_of(module, True))
        weight = frozen(base.values(case.torch_dtype))
    return Tensors(case, xs, dys, weight, method, lora, magnitude, module=module, base=base)


def linear_of(tensors: Tensors) -> Any:
    """The quantised module of the case or, where there is none, an nn.Linear with its weight."""
    return plain_of(tensors) if tensors.module is None else tensors.module


def plain_of(tensors: Tensors) -> nn.Linear:
    """An nn.Linear whose weight is the case's."""
    n, k = tensors.weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = tensors.weight
    return linear
