"""`Apart` is a W whose products are in a narrower dtype than the term, as in PEFT's QLoRA."""

from __future__ import annotations

import torch
from torch import Tensor

from .protocol import Base


class Apart(Base):
    """A known base whose products are computed in its own dtype, of an x that is wider.

    The term is then in x's dtype, and its gradients too. Values of W are never made in that.
    """

    def __init__(self, base: Base) -> None:
        super().__init__(base.module)
        self.base, self.kind = base, base.kind

    @property
    def dtype(self) -> torch.dtype:
        """That of the values."""
        return self.base.dtype

    def stored(self) -> list[Tensor]:
        """The tensors that the values are made of."""
        return self.base.stored()

    def is_called(self) -> bool:
        """Whether the module has hooks now."""
        return self.base.is_called()

    def is_only_called_back(self) -> bool:
        """True: dy·W is in the narrower dtype as well."""
        return True

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias (M, N), in x's dtype."""
        own = self.base.computes_in(x.dtype)
        bias = None if bias is None else bias.to(own)
        return self.base.product(x.to(own), bias).to(x.dtype)

    def back(self, dy: Tensor) -> Tensor:
        """dy·W (M, K), in dy's dtype."""
        return self.base.back(dy.to(self.base.computes_in(dy.dtype))).to(dy.dtype)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (N, K)."""
        return self.base.values(dtype)
