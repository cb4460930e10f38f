"""Stand-ins for layers of quantising libraries, by the attributes and the behaviour of the real.

GPTQ's after gptqmodel 7.7 (TorchLinear) and auto_gptq 0.7 (QuantLinear), AWQ's after AutoAWQ 0.2
(WQLinear_GEMM), HQQ's after hqq 0.2 (HQQLinear), quanto's after optimum-quanto 0.2 (QLinear). Their
classes say that they are from these packages; the weights are those of a plain layer, rounded.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from base_cases import Net, Rows8
from torch import Tensor, nn

GROUP = 32


def rounded(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(4-bit numbers (K, N), zeros (K / GROUP, N), scales likewise) of a weight (N, K)."""
    groups = weight.detach().t().reshape(-1, GROUP, weight.shape[0])
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round()
    numbers = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return numbers.flatten(0, 1).int(), zeros.int(), scales


def packed(numbers: Tensor, order: range | list[int]) -> Tensor:
    """int32, of eight columns each, the first of `order` lowest."""
    parts = numbers.reshape(len(numbers), -1, 8).long()
    words = sum(parts[..., column] << 4 * i for i, column in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpacked(words: Tensor, order: range | list[int]) -> Tensor:
    """What `packed` has packed."""
    parts = torch.empty(*words.shape, 8, dtype=torch.int32)
    for i, column in enumerate(order):
        parts[..., column] = words >> 4 * i & 15
    return parts.flatten(1)


class Packed(nn.Module):
    """Buffers of GPTQ's and AWQ's layers."""

    def keep(self, plain: nn.Linear, *packings: Tensor) -> None:
        """Register them, the bias in half precision."""
        names = "qweight", "qzeros", "scales", "g_idx"
        for name, own in zip(names, packings, strict=False):
            self.register_buffer(name, own)
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach().half())


class TorchLinear(Packed):
    """gptqmodel's: packed along K, groups in an order of their own, `weight` no tensor."""

    weight = property(lambda self: "no tensor")
    __module__ = "gptqmodel.nn_modules.qlinear.torch"

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = k, n, 4
        plain = nn.Linear(k, n)
        numbers, zeros, scales = rounded(plain.weight)
        order = torch.arange(k) // GROUP
        words = packed(numbers.t(), range(8)).t().contiguous()
        self.keep(plain, words, packed(zeros, range(8)), scales, order.flip(0).int())

    def dequantize_weight(self, num_itr: int = 1) -> Tensor:
        """Wᵀ (K, N)."""
        own, zeros = self.g_idx.long(), unpacked(self.qzeros, range(8))
        return self.scales[own] * (unpacked(self.qweight.t(), range(8)).t() - zeros[own])

    def forward(self, x: Tensor) -> Tensor:
        """In x's dtype."""
        y = torch.matmul(x, self.dequantize_weight().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class QuantLinear(nn.Module):
    """auto_gptq's: sizes in old names, and no way to its values but products."""

    __module__ = "auto_gptq.nn_modules.qlinear.qlinear_cuda_old"
    bias = property(lambda self: self.own.bias)

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = k, n
        self.own = TorchLinear(k, n)

    def forward(self, x: Tensor) -> Tensor:
        """As that layer."""
        return self.own(x)


ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def dequantize_gemm(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int
) -> Tensor:
    """Wᵀ (K, N), as AutoAWQ's function of this name gives it."""
    assert bits == 4
    zeros = unpacked(qzeros, ORDER).repeat_interleave(group_size, 0)
    return (unpacked(qweight, ORDER) - zeros) * scales.repeat_interleave(group_size, 0)


class WQLinear_GEMM(Packed):
    """AutoAWQ's: computes in float16, under no_grad in eval, with no way back on a CPU."""

    __module__ = "awq.modules.linear.gemm"

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.w_bit, self.group_size = k, n, 4, GROUP
        plain = nn.Linear(k, n)
        numbers, zeros, scales = rounded(plain.weight)
        self.keep(plain, packed(numbers, ORDER), packed(zeros, ORDER), scales)

    def forward(self, x: Tensor) -> Tensor:
        """In float16, and back."""
        with torch.no_grad():
            own = self.qweight, self.qzeros, self.scales, 4, self.group_size
            return (x.half() @ dequantize_gemm(*own) + self.bias).to(x.dtype)


class HQQLinear(nn.Module):
    """hqq's: scales in a dict, one dtype of x, no buffers but W_q, and `to` does nothing."""

    __module__ = "hqq.core.quantize"

    def __init__(self, k: int, n: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features, self.out_features = k, n
        plain = nn.Linear(k, n).to(dtype)
        groups = plain.weight.detach().reshape(-1, GROUP)
        scale = groups.abs().amax(1, keepdim=True) / 7
        numbers = ((groups / scale).round() + 8).to(torch.uint8)
        self.W_q = nn.Parameter(numbers, requires_grad=False)
        self.meta = {"scale": scale, "zero": torch.full_like(scale, 8.0), "shape": (n, k)}
        self.bias, self.compute_dtype, self.ready = plain.bias.clone(), dtype, True

    def dequantize(self) -> Tensor:
        """W (N, K)."""
        own = self.W_q.to(self.compute_dtype) - self.meta["zero"]
        return (own * self.meta["scale"]).reshape(self.meta["shape"])

    def forward(self, x: Tensor) -> Tensor:
        """x must be of the compute dtype."""
        return torch.matmul(x, self.dequantize().t()) + self.bias


class QLinear(nn.Linear):
    """quanto's: the weight under another name, frozen or not, and what it does to activations."""

    __module__ = "optimum.quanto.nn.qlinear"
    activation_qtype: Any = None
    frozen = True

    def __init__(self, k: int, n: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(k, n, dtype=dtype)
        self.weight = Rows8.of(self.weight)

    qweight = property(lambda self: self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """By the weight's own product."""
        return nn.functional.linear(x, self.qweight, self.bias)


def awq_net(dtype: torch.dtype) -> nn.Module:
    """AutoAWQ's layers, with the module that they are from."""
    home = types.ModuleType(WQLinear_GEMM.__module__)
    home.dequantize_gemm = dequantize_gemm  # type: ignore[attr-defined]
    sys.modules.setdefault(home.__name__, home)
    return Net(WQLinear_GEMM)


# kind → makes a model of it
STAND_INS = {
    "gptq": lambda dtype: Net(TorchLinear),
    "awq": awq_net,
    "hqq": lambda dtype: Net(lambda k, n: HQQLinear(k, n, dtype)),
    "quanto": lambda dtype: Net(lambda k, n: QLinear(k, n, dtype)),
    "auto_gptq": lambda dtype: Net(QuantLinear),
}
