"""Models over bases that are no plain linear layers, and the formula that they compute."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_lowrank import adapt
from fused_lowrank.compute.reference import lowrank_linear_reference
from fused_lowrank.methods import LowRankLinear, dora
from fused_lowrank.testing import FACTOR

D, H = 64, 128
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora_xs": {"r": 4},
    "lora_mini": {"r": 3, "a": 8, "b": 6, "init": "paper"},
    "dora": {"r": 4},
    "vera": {"r": 8},
}


class Rows8(Tensor):
    """A stand-in for a quantised weight: int8 rows, each with a scale."""

    rows: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Rows8:
        return Tensor._make_wrapper_subclass(cls, rows.shape, dtype=dtype, device=rows.device)

    def __init__(self, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.rows, self.scale = rows, scale

    @classmethod
    def of(cls, weight: Tensor) -> nn.Parameter:
        """A weight, quantised."""
        scale = weight.detach().abs().amax(1, keepdim=True).float() / 127
        rows = (weight.detach() / scale).round().to(torch.int8)
        return nn.Parameter(cls(rows, scale, weight.dtype), requires_grad=False)

    def dequantize(self) -> Tensor:
        """The values."""
        return (self.rows * self.scale).to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["rows", "scale"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of products a linear layer's, which has no gradient of x."""
        if func is nn.functional.linear:
            x, weight, bias = (*args, None)[:3]
            with torch._C.DisableTorchFunctionSubclass():
                return nn.functional.linear(x.detach(), weight.dequantize(), bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Copies of the tensors within, and nothing else."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            own = args[0]
            return cls(func(own.rows), func(own.scale), own.dtype)
        if func is torch.ops.aten._to_copy.default:
            own, dtype = args[0], (kwargs or {}).get("dtype")
            return cls(own.rows.clone(), own.scale.clone(), dtype or own.dtype)
        raise NotImplementedError(str(func))


class Opaque(nn.Module):
    """A linear layer that nobody knows: it has another weight than most, and no name for it."""

    def __init__(self, k: int, n: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.calls = k, n, 0
        plain = nn.Linear(k, n)
        self.turned = nn.Parameter(plain.weight.detach().t().contiguous())
        self.bias = plain.bias if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """As a linear layer."""
        self.calls += 1
        y = x @ self.turned
        return y if self.bias is None else y + self.bias


class Net(nn.Module):
    """Two layers, made by a function of their sizes, and what is between them."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.act, self.second = layer(D, H), nn.GELU(), layer(H, D)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) → (..., D)."""
        return self.second(self.act(self.first(x)))


def subclass_net(dtype: torch.dtype) -> nn.Module:
    """Linear layers whose weights are `Rows8`."""
    net = Net(nn.Linear).to(dtype)
    for layer in (net.first, net.second):
        layer.weight = Rows8.of(layer.weight)
    return net


def opaque_net(dtype: torch.dtype) -> nn.Module:
    """Layers that nobody knows."""
    return Net(Opaque).to(dtype)


def four_bit(kind: str, nested: bool = True, **keywords: Any) -> Callable[[torch.dtype], nn.Module]:
    """A function that makes a model of bitsandbytes' 4-bit layers."""

    def net(dtype: torch.dtype) -> nn.Module:
        from bitsandbytes.nn import Linear4bit

        own: Any = {"compute_dtype": dtype, "quant_type": kind, "compress_statistics": nested}
        own |= keywords
        return Net(lambda k, n: Linear4bit(k, n, **own)).to(dtype).to("cpu")

    return net


def eight_bit(dtype: torch.dtype) -> nn.Module:
    """A model of bitsandbytes' 8-bit layers, in training, where x is not quantised on a CPU."""
    from bitsandbytes.nn import Linear8bitLt

    def layer(k: int, n: int) -> nn.Module:
        made = Linear8bitLt(k, n, has_fp16_weights=False, threshold=6.0)
        made.bias.data = made.bias.data.to(dtype)
        return made

    return Net(layer).to("cpu")


def torchao(name: str, **keywords: Any) -> Callable[[torch.dtype], nn.Module]:
    """A function that makes a model quantised by a configuration of torchao's."""

    def net(dtype: torch.dtype) -> nn.Module:
        import torchao.quantization as ao

        made = Net(nn.Linear).to(dtype)
        ao.quantize_(made, getattr(ao, name)(**keywords))
        return made

    return net


def int4(dtype: torch.dtype) -> nn.Module:
    """torchao's int4 in groups of 32, which runs anywhere."""
    from torchao.quantization.granularity import PerGroup

    own = {"weight_dtype": torch.int4, "granularity": PerGroup(32)}
    return torchao("IntxWeightOnlyConfig", **own)(dtype)


def needs(package: str) -> list[Any]:
    """The marks of a case that a package must be there for."""
    missing = importlib.util.find_spec(package) is None
    return [pytest.mark.skipif(missing, reason=f"{package} is not installed")]


# kind of base → makes a model of a dtype
KINDS: dict[str, tuple[Callable[[torch.dtype], nn.Module], str]] = {
    "subclass": (subclass_net, "torch"),
    "opaque": (opaque_net, "torch"),
    "nf4": (four_bit("nf4"), "bitsandbytes"),
    "fp4": (four_bit("fp4", nested=False), "bitsandbytes"),
    "int8": (eight_bit, "bitsandbytes"),
    "torchao-int8": (torchao("Int8WeightOnlyConfig"), "torchao"),
    "torchao-int4": (int4, "torchao"),
    "torchao-fp8": (torchao("Float8WeightOnlyConfig"), "torchao"),
}
methods = pytest.mark.parametrize("method", METHODS)
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs(package)) for kind, (_, package) in KINDS.items()]
)


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model over such a base, always the same."""
    torch.manual_seed(0)
    return KINDS[kind][0](dtype)


def adapted(
    kind: str, method: str = "lora", dtype: torch.dtype = torch.float32, **keywords: Any
) -> Any:
    """Such a model, adapted, all that is trained away from its start."""
    model = model_of(kind, dtype)
    own = {"target_modules": ["first", "second"], "alpha": 6.0, **METHODS[method], **keywords}
    adapt(model, method, progress=False, **own)
    return shifted(model)


@torch.no_grad()
def shifted(model: Any) -> Any:
    """The model, what is trained moved."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def layers_of(model: Any) -> list[LowRankLinear]:
    """The two layers."""
    return [model.first, model.second]


def formula(model: Any, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """(the model by the equation on dequantised W in a dtype, its trained factors as leaves)."""
    leaves, made = [], []
    for layer in layers_of(model):
        weight = layer.base_weight.values(torch.float64)
        factors: Any = {}
        for name, own in layer.factors_now().items():
            wide = own.detach().to(dtype if dtype == torch.float64 else own.dtype)
            factors[name] = wide.clone().requires_grad_(own.requires_grad)
        leaves += [factors[name] for name, own in layer.factors_now().items() if own.requires_grad]
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        made.append((layer, weight, factors, bias))

    def call(x: Tensor) -> Tensor:
        for i, (layer, weight, factors, bias) in enumerate(made):
            down, core, up, gain = layer.row.made(factors, weight.to(dtype), layer.scale)
            if layer.row.dora:
                whole = weight + layer.scale * (up @ down).detach().double()
                gain = dora.gain(factors["magnitude"], whole.norm(dim=1))
            own = {"bias": bias, "scale": layer.scale, "gain": gain}
            x = lowrank_linear_reference(x, weight.to(dtype), down, core, up, **own)
            x = model.act(x) if i == 0 else x
        return x

    return call, leaves


def gradients(call: Callable[[Tensor], Tensor], leaves: list[Tensor], x: Tensor) -> list[Tensor]:
    """[y, dx, the gradients of the leaves]."""
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    torch.manual_seed(2)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *leaves], dy)]


def trained(model: Any) -> list[Tensor]:
    """The factors that are trained, in the order of `formula`'s leaves; each once."""
    own = [f for layer in layers_of(model) for f in layer.factors_now().values() if f.requires_grad]
    return list(dict.fromkeys(own))


def inputs(dtype: torch.dtype = torch.float32, *lead: int) -> Tensor:
    """x (*lead, D)."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*(lead or (3, 7)), D, generator=generator).to(dtype)


def check(model: Any, x: Tensor, fused: bool = True) -> None:
    """The model's results and gradients are as near to float64 as the formula in x's dtype is."""
    found = gradients(model, trained(model), x)
    (truth, wide), (same, own) = formula(model, torch.float64), formula(model, x.dtype)
    against(found, gradients(truth, wide, x.double()), gradients(same, own, x))


def against(found: list[Tensor], exact: list[Tensor], rounded: list[Tensor]) -> None:
    """What is found is as near to what is exact as that which is rounded as usual."""
    eps = torch.finfo(found[0].dtype).eps
    assert len(found) == len(exact) == len(rounded) > 2
    for i, (ours, true, plain) in enumerate(zip(found, exact, rounded, strict=True)):
        error, usual = (float((one.double() - true).norm()) for one in (ours, plain))
        assert error <= FACTOR * usual + eps * float(true.norm()), (i, error, usual)
        assert float(true.norm()) > 0
