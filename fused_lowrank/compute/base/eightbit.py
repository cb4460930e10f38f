"""W of bitsandbytes' Linear8bitLt: int8 rows, each with the largest of its absolute values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .protocol import NOT_YET, Base, is_plain, shell

AT_ONCE = 1 << 18  # values that a CPU scales at a time


class EightBit(Base):
    """W of a Linear8bitLt that is quantised."""

    kind = "8bit"
    form = "int8 of bitsandbytes"
    holders = "weight", "state"

    @classmethod
    def of(cls, module: Any) -> Base | str:
        """W of the module if it is quantised; one that never is is called as it is."""
        if module.state.has_fp16_weights:
            return Base(module)
        if module.weight.dtype != torch.int8:
            return NOT_YET.format(type(module).__name__)
        return cls(module)

    def state(self) -> tuple[Tensor, Tensor]:
        """(int8 (N, K), the rows' maxima (N,)), wherever the module has them by now."""
        weight, state = self.module.weight, self.module.state
        if weight.CB is not None:
            if weight.SCB is None:  # moved since, as PEFT's DoRA does on a CPU: they stayed behind
                weight.SCB = state.SCB
            self.module.init_8bit_state()
        return state.CB, state.SCB

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        bias = self.module.bias
        self._dtype = torch.float32 if bias is None else bias.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the bias when the module was looked at; float32 where there is none.

        Nothing else says it, and the library casts the bias to each x. The values are of this dtype
        only where that is asked for: they are float32.
        """
        return self._dtype

    def stored(self) -> list[Tensor]:
        """The rows and their maxima."""
        weight, state = self.module.weight, self.module.state
        maxima = state.SCB if weight.SCB is None else weight.SCB
        return [weight] if maxima is None else [weight, maxima]

    def is_called(self) -> bool:
        """Whether the module has hooks now."""
        return not is_plain(self.module)

    def is_exact(self) -> bool:
        """Whether x is not quantised as well: in training on a CPU, as the library decides it."""
        return self.module.training and self.device.type == "cpu"

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias by the library's kernels."""
        from bitsandbytes import matmul

        state = self.module.state
        self.state()
        state.is_training = self.module.training
        with torch.no_grad():
            bias = None if bias is None else bias.to(x.dtype)
            return matmul(x, self.module.weight, bias=bias, state=state).to(x.dtype)

    def before_loading(self, state: dict[str, Any], prefix: str) -> None:
        """Have the weight be what is computed with: it is not after a first call, nor in a copy.

        The library writes the rows to the weight, and asks it for the maxima.
        """
        weight = self.module.weight
        weight.data, weight.SCB = self.state()

    def why_not_requantised(self) -> str | None:
        """None."""
        return None

    def values_to_merge(self) -> Tensor:
        """W (N, K) in float32, by the library's own order of products."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(*self.state())

    def requantised(self, values: Tensor) -> nn.Module:
        """A module with such values, which the library takes through float16."""
        from bitsandbytes.nn import Int8Params

        module, state = shell(self.module), copy.copy(self.module.state)
        made: Any = Int8Params(values.cpu(), requires_grad=False, has_fp16_weights=False)
        module.weight, module.state = made.to(self.device), state
        module.state.reset_grads()
        return module

    @torch.no_grad()
    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (N, K), in float32 where no dtype is asked for."""
        rows, maxima = self.state()
        return scaled(rows, maxima.unsqueeze(1).mul(1.0 / 127.0), dtype or torch.float32)


def scaled(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """rows (N, K) · scales (N, 1) in one pass, rounded once.

    A CPU makes wider numbers of both on the way, so of some rows at a time.
    """
    values = torch.empty_like(rows, dtype=dtype)
    scales = scales.to(torch.promote_types(dtype, scales.dtype))
    count = max(1, AT_ONCE // rows.shape[1]) if rows.is_cpu else rows.shape[0]
    for parts in zip(*(whole.split(count) for whole in (rows, scales, values)), strict=True):
        torch.mul(*parts[:2], out=parts[2])
    return values
