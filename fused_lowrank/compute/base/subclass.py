"""W of an nn.Linear whose weight is a tensor subclass that can be dequantised, as torchao's are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import torchao
from .protocol import Base, is_plain, shell


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
        """W (N, K)."""
        return self.module.weight.dequantize().to(dtype or self.dtype)

    @torch.no_grad()
    def split(self, rows: int) -> Iterator[Tensor]:
        """The values, some rows at a time, if the subclass can be cut."""
        weight, n = self.module.weight, self.shape[0]
        try:
            first = weight[:rows].dequantize()
        except (NotImplementedError, RuntimeError, ValueError, AssertionError):
            yield from self.values().split(rows)
            return
        yield first.to(self.dtype)
        for start in range(rows, n, rows):
            yield weight[start : start + rows].dequantize().to(self.dtype)
