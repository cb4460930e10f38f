"""W of bitsandbytes' Linear4bit: nf4 or fp4 in blocks, whose maxima may be quantised as well.

Its own forward packs the weight otherwise in inference on CPUs with AVX512-BF16, with maxima in
bfloat16, and then has no gradient of x. We never ask for that; what is packed so is unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .protocol import NOT_YET, Base, is_plain, shell

WAS_CAST = (
    "whose weight was packed into {} and then cast to {}, so that its bits are lost: load it "
    "again, and cast it no more; FSDP's param_dtype must be bnb_4bit_quant_storage"
)


class FourBit(Base):
    """W of a Linear4bit that is quantised."""

    kind = "4bit"
    holders = "weight", "quant_state"

    @classmethod
    def of(cls, module: Any) -> Base | str:
        """W of the module if it is quantised."""
        weight, name = module.weight, type(module).__name__
        state = getattr(weight, "quant_state", None) or module.quant_state
        if state is None:
            return NOT_YET.format(name)
        packed_in = getattr(weight, "quant_storage", weight.dtype)
        if weight.dtype != packed_in and not getattr(state, "packing_format_for_cpu", False):
            return f"is a {name} {WAS_CAST.format(packed_in, weight.dtype)}"
        return cls(module)

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.packed_in: torch.dtype | None = None
        self.packed_in = self.state()[0].dtype
        self._dtype = self.module.compute_dtype or self.state()[1].dtype

    def state(self) -> tuple[Tensor, Any]:
        """(the packed weight, its QuantState)."""
        weight = self.module.weight
        state = getattr(weight, "quant_state", None)
        if state is None:  # FSDP puts a plain tensor there
            state = self.module.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            unpack(self.module, state)
        if self.packed_in is not None and weight.dtype != self.packed_in:
            raise TypeError(f"a Linear4bit {WAS_CAST.format(self.packed_in, weight.dtype)}")
        return weight, state

    def bits(self) -> list[Tensor]:
        """The packed weight."""
        return [self.module.weight]

    @property
    def form(self) -> str:  # type: ignore[override]
        """The name of the values that four bits stand for."""
        return f"{self.state()[1].quant_type} of bitsandbytes"

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype when the module was looked at or, where none is set, that which was
        quantised: the library sets it to the dtype of the first x. The values are of the latter.
        """
        return self._dtype

    def stored(self) -> list[Tensor]:
        """The packed weight and its maxima."""
        weight = self.module.weight
        state = getattr(weight, "quant_state", None) or self.module.quant_state
        nested = [state.state2.absmax] if getattr(state, "nested", False) else []
        return [weight] if state is None else [weight, state.absmax, *nested]

    def is_called(self) -> bool:
        """Whether the module has hooks now."""
        return not is_plain(self.module)

    def is_exact(self) -> bool:
        """True."""
        return True

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The compute dtype of the module."""
        return self.module.compute_dtype or dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias by the library, which on a CPU would take the values as well."""
        from bitsandbytes import matmul_4bit

        with torch.no_grad():
            if x.is_cpu:
                return linear(x, self.values(x.dtype), bias)
            weight, state = self.state()
            return matmul_4bit(x, weight, bias=bias, quant_state=state)

    def before_loading(self, state: dict[str, Any], prefix: str) -> None:
        """Take the maxima and the like, for which the library's modules have no place."""
        from bitsandbytes.functional import QuantState

        weight: Any = self.state()[0]  # unpacked
        prefix = f"{prefix}weight."
        found = {key: state.pop(key).clone() for key in list(state) if key.startswith(prefix)}
        if found:
            made = QuantState.from_dict(found, weight.device)
            self.module.quant_state = weight.quant_state = made
            weight.quant_type, weight.blocksize = made.quant_type, made.blocksize

    def why_not_requantised(self) -> str | None:
        """None."""
        return None

    def requantised(self, values: Tensor) -> nn.Module:
        """A module with such values in blocks of the same size, quantised from float32 or wider.

        Its maxima are quantised, and its bytes stored, as those of W are.
        """
        from bitsandbytes.nn import Params4bit

        (weight, state), module = self.state(), shell(self.module)
        made: Any = Params4bit(
            values if tuple(state.shape) == tuple(self.shape) else values.t(),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=getattr(weight, "compress_statistics", state.nested),
            quant_type=state.quant_type,
            quant_storage=weight.dtype,
        )
        made = made.to(weight.device)
        made.module = getattr(weight, "module", None)
        made.quant_state.dtype = state.dtype  # of what it is dequantised to, as before
        module.weight, module.quant_state = made, made.quant_state
        return module

    @torch.no_grad()
    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (N, K)."""
        weight, state = self.state()
        values = dequantised(packed(weight), maxima(state), state, tuple(state.shape), dtype)
        return values if values.shape == self.shape else values.t()

    @torch.no_grad()
    def split(self, rows: int) -> Iterator[Tensor]:
        """The values, some rows at a time, of which no others are dequantised."""
        weight, state = self.state()
        (n, k), block = self.shape, state.blocksize
        if tuple(state.shape) != (n, k):
            yield from self.values().split(rows)
            return
        whole = block // math.gcd(k, block)  # rows that end where a block does
        data, absmax, step = packed(weight), maxima(state), max(whole, rows // whole * whole)
        for first in range(0, n, step):
            last = min(first + step, n)
            some = data[first * k // 2 : (last * k + 1) // 2]
            of_blocks = absmax[first * k // block : -(-last * k // block)]
            yield dequantised(some, of_blocks, state, (last - first, k), None)


def packed(weight: Tensor) -> Tensor:
    """The bytes of a packed weight, two values each, whatever dtype they are stored in; all of
    them where FSDP has a part of it here, and then every rank must call this.
    """
    if type(weight).__name__ == "DTensor":
        weight = weight.full_tensor()  # type: ignore[attr-defined]
    return weight.detach().contiguous().view(torch.uint8).reshape(-1)


def maxima(state: Any) -> Tensor:
    """The absolute maxima of the blocks, in float32."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax.float()
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def dequantised(
    data: Tensor, absmax: Tensor, state: Any, shape: tuple[int, ...], dtype: torch.dtype | None
) -> Tensor:
    """The values of a shape, in a dtype or that which was quantised.

    The library is asked for them a block to a row: asked for rows that end within blocks, its
    kernel for CPUs (0.50.2) takes the maxima of others.
    """
    op = torch.ops.bitsandbytes.dequantize_4bit.default
    kind, wide, block = state.quant_type, dtype or state.dtype, state.blocksize
    if wide == torch.float64:
        wide = torch.float32
    count = math.prod(shape)
    blocks = (count,) if count % block else (count // block, block)
    values = op(data.view(-1, 1), absmax, block, kind, blocks, wide).view(shape)
    return values if dtype is None else values.to(dtype)


def unpack(module: Any, state: Any) -> None:
    """Put a weight that was packed for inference back as it lay, with the maxima it has now."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    absmax = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # the maxima would be quantised again
    weight, state = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    state.absmax, state.nested = absmax, False
    module.weight.data = weight
