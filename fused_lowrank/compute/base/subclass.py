"""W of an nn.Linear whose weight is a tensor that says its values: torchao's, quanto's, fp8's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import torchao
from .protocol import Base, is_plain, shell

# Values that are dequantised at a time on a CPU, and of how many such blocks W is where it is done
# so: a smaller one is made at once, in memory that the allocator has kept.
BLOCK, BLOCKS = 1 << 19, 8


class Subclass(Base):
    """W of an nn.Linear with such a weight.

    The subclass's own autograd may keep W dequantised for its backward, and has none where it
    quantises x: ours does neither.
    """

    kind = "subclass"

    @property
    def form(self) -> str:  # type: ignore[override]
        """The subclass's name."""
        return type(self.module.weight).__name__

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the subclass shows."""
        return self.module.weight.dtype

    def stored(self) -> list[Tensor]:
        """The tensors within the subclass."""
        weight = self.module.weight
        names, _ = weight.__tensor_flatten__() if hasattr(weight, "__tensor_flatten__") else ((), 0)
        return [getattr(weight, name) for name in names] or [weight]

    def is_called(self) -> bool:
        """Whether the module has hooks now."""
        return not is_plain(self.module)

    def is_exact(self) -> bool:
        """Whether the subclass leaves x as it is."""
        return getattr(self.module.weight, "act_quant_kwargs", None) is None

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias by the subclass, which need not take an x of another dtype."""
        with torch.no_grad():
            weight = self.module.weight if x.dtype == self.dtype else self.values(x.dtype)
            return linear(x, weight, None if bias is None else bias.to(x.dtype)).to(x.dtype)

    def why_not_requantised(self) -> str | None:
        """The reason why the weight cannot be quantised again as it was, to follow "it"."""
        return torchao.why_not(self.module.weight)

    def values_to_merge(self) -> Tensor:
        """W (N, K), in the dtype that the subclass shows."""
        return self.module.weight.dequantize()

    def requantised(self, values: Tensor) -> nn.Module:
        """A module with such values, rounded to the weight's dtype first, as torchao takes them."""
        module = shell(self.module)
        made = torchao.quantised(self.module.weight, values)
        module.weight = nn.Parameter(made, requires_grad=False)
        return module

    @torch.no_grad()
    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (N, K); a large one on a CPU by blocks of rows, for libraries make it in steps."""
        weight, (n, k), dtype = self.module.weight, self.shape, dtype or self.dtype
        rows = BLOCK // k
        if not 0 < BLOCKS * rows <= n or not self.is_cpu or (first := self.cut(rows)) is None:
            return weight.dequantize().to(dtype)
        values = torch.empty(n, k, dtype=dtype, device=first.device)
        values[:rows] = first
        for start in range(rows, n, rows):
            values[start : start + rows] = weight[start : start + rows].dequantize()
        return values

    def cut(self, rows: int) -> Tensor | None:
        """The values of the first rows, if the subclass can be cut and stays what it is."""
        try:
            part = self.module.weight[:rows]
            return part.dequantize() if type(part) is type(self.module.weight) else None
        except (NotImplementedError, RuntimeError, ValueError, AssertionError):
            return None

    @torch.no_grad()
    def split(self, rows: int) -> Iterator[Tensor]:
        """The values, some rows at a time, if the subclass can be cut."""
        weight, n = self.module.weight, self.shape[0]
        if (first := self.cut(rows)) is None:
            yield from self.values().split(rows)
            return
        yield first.to(self.dtype)
        for start in range(rows, n, rows):
            yield weight[start : start + rows].dequantize().to(self.dtype)


class Quanto(Subclass):
    """W of a QLinear of quanto's that is frozen; it is read by another name, and cut as a whole."""

    @classmethod
    def of(cls, module: Any) -> Base | str:
        """W of the module if its weight alone is quantised, and for good."""
        if module.activation_qtype is not None:
            return "is a QLinear that quantises activations: have its weights quantised alone"
        if not module.frozen:
            return "is a QLinear that is not quantised for good: optimum.quanto.freeze(model) first"
        return cls(module)

    def split(self, rows: int) -> Iterator[Tensor]:
        """The values, some rows at a time."""
        return Base.split(self, rows)


class Float8(Base):
    """W of torchao's Float8Linear, which trains in fp8: it is called, its weight is a plain one."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.module.weight.dtype

    @torch.no_grad()
    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (N, K), as it is before each call rounds it."""
        return self.module.weight.detach().to(dtype or self.dtype)
