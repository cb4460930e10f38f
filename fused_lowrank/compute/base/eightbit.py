"""W of bitsandbytes' Linear8bitLt: int8 rows, each with the largest of its absolute values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .protocol import NOT_YET, Base, is_plain

AT_ONCE = 1 << 18  # values that a CPU scales at a time


class EightBit(Base):
    """W of a Linear8bitLt that is quantised."""

    kind = "8bit"

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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the bias; float32 where there is none, for nothing else says it."""
        bias = self.module.bias
        return torch.float32 if bias is None else bias.dtype

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

    @torch.no_grad()
    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (N, K)."""
        rows, maxima = self.state()
        return scaled(rows, maxima.unsqueeze(1).mul(1.0 / 127.0), dtype or self.dtype)


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
