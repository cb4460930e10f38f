"""W of a module that can be asked for its values: GPTQ's, AWQ's and HQQ's layers.

Their own ways back differ: some keep W dequantised from forward to backward, some have none in
eval, or none at all. Ours is by the values, whatever theirs is.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import linear

from .protocol import Base, agrees, is_plain

TURNED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # module → what `turned` has found


class Dequantised(Base):
    """W of such a module, which `read` takes from it as (N, K) or as (K, N)."""

    kind = "dequantised"

    def __init__(self, module: Any, is_turned: bool) -> None:
        super().__init__(module)
        self.is_turned = is_turned

    @classmethod
    def of(cls, module: Any) -> Base | str:
        """W of the module; it is called as it is where its product is not that of its values."""
        found = cls.turned(module)
        return Base(module) if found is None else cls(module, found)

    @classmethod
    def turned(cls, module: Any) -> bool | None:
        """Whether what is read is Wᵀ, as a product of the module's says; None: it is neither."""
        if module in TURNED:
            return TURNED[module]
        for is_turned in (False, True):
            base = cls(module, is_turned)
            if base.is_meta:
                return is_turned
            try:
                values = base.values()
                agree = values.shape == base.shape and agrees(base, values)
            except Exception:  # a call of the module says better what is wrong with it
                agree = False
            if agree:
                TURNED[module] = is_turned
                return is_turned
        return None

    def read(self) -> Tensor:
        """The values, by the library."""
        raise NotImplementedError

    def is_called(self) -> bool:
        """Whether the module has hooks now."""
        return not is_plain(self.module)

    def is_exact(self) -> bool:
        """True: that was asked when the base was made."""
        return True

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias: on a GPU by the library's kernel if this is the product that it makes."""
        with torch.no_grad():
            own = x.dtype == self.dtype and (bias is None) == (self.bias is None)
            if own and not x.is_cpu:
                return self.module(x)
            return linear(x, self.values(x.dtype), None if bias is None else bias.to(x.dtype))

    @torch.no_grad()
    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (N, K)."""
        found = self.read().to(dtype or self.dtype)
        return found.t() if self.is_turned else found


class Gptq(Dequantised):
    """W of a layer of gptqmodel's: packed along K, in groups that may be permuted."""

    def read(self) -> Tensor:
        """Wᵀ (K, N)."""
        return self.module.dequantize_weight()


class Awq(Dequantised):
    """W of a layer of AutoAWQ's or gptqmodel's: packed along N, in an order of its own."""

    def read(self) -> Tensor:
        """Wᵀ (K, N), by the function that the layer's own module has for it."""
        own = self.module
        homes = (vars(sys.modules[cls.__module__]) for cls in type(own).__mro__)
        read = next(home["dequantize_gemm"] for home in homes if "dequantize_gemm" in home)
        bits = own.bits if hasattr(own, "bits") else own.w_bit
        return read(own.qweight, own.qzeros, own.scales, bits, own.group_size)


class Hqq(Dequantised):
    """W of an HQQLinear, which has scales and zeros in a dict and takes an x of one dtype alone."""

    @classmethod
    def of(cls, module: Any) -> Base | str:
        """W of the module if it is quantised."""
        if not module.ready:
            return f"is a {type(module).__name__} that is not quantised yet: initialize() it first"
        return super().of(module)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.module.compute_dtype

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The compute dtype."""
        return self.module.compute_dtype

    def stored(self) -> list[Tensor]:
        """The packed values, and what is in the dict."""
        meta = self.module.meta.values()
        return [self.module.W_q, *(own for own in meta if isinstance(own, Tensor))]

    def bits(self) -> list[Tensor]:
        """The packed values."""
        return [self.module.W_q]

    def read(self) -> Tensor:
        """W (N, K)."""
        return self.module.dequantize()
