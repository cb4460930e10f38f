"""DoRA where a magnitude is 0, in torch.func's transforms, in subclasses, over opaque bases."""

from typing import Any

import pytest
import torch
from dora_cases import K, M, N, close, formula, fused, gradients, layer_of, methods
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from fused_lowrank import FusedLoraLinear


class Called(nn.Module):
    """A module around a linear layer, of which nothing but its results is known."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(K, N)
        self.in_features, self.out_features, self.bias = K, N, self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) → (..., N)."""
        result: Tensor = self.inner(x)
        return result


@methods
@fused
def test_a_magnitude_of_zero(method: str, fused: bool) -> None:
    """It has its gradient, also beside a bias, which is all that y has there."""
    layer, x = layer_of(method, fused, torch.float64), torch.randn(M, K, dtype=torch.float64)
    with torch.no_grad():
        layer.magnitude[3] = 0.0
    expected = gradients(lambda x: formula(layer, x), layer, x)
    close(gradients(layer, layer, x), expected, 1e-12)
    assert float(expected[-1].abs().min()) > 0.0


@pytest.mark.parametrize("bias", [False, True])
def test_a_magnitude_of_zero_that_is_wider_than_the_weight(bias: bool) -> None:
    """Nor is it lost where it is in float64, and W is not."""
    torch.manual_seed(0)
    linear, x = nn.Linear(K, N, bias=bias), torch.randn(M, K)
    layer = FusedLoraLinear.from_linear(linear, r=4, dora=True, dtype=torch.float64)
    assert layer.magnitude.dtype == torch.float64
    with torch.no_grad():
        layer.up.normal_()
        layer.magnitude[3] = 0.0
    close(gradients(layer, layer, x), gradients(lambda x: formula(layer, x), layer, x), 1e-5)


@methods
def test_transforms(method: str) -> None:
    """Models side by side, and derivatives along a direction."""
    torch.manual_seed(0)
    layer, x = layer_of(method, True), torch.randn(M, K)
    own = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    both = {name: torch.stack([one, 1.1 * one]) for name, one in own.items()}
    found = vmap(lambda factors: functional_call(layer, factors, (x,)))(both)
    for i, y in enumerate(found):
        each = {name: pair[i] for name, pair in both.items()}
        torch.testing.assert_close(y, functional_call(layer, each, (x,)), rtol=1e-4, atol=1e-5)
    y, along = jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
    expected = layer(torch.ones_like(x)) - layer(torch.zeros_like(x))
    torch.testing.assert_close(along, expected, rtol=1e-4, atol=1e-4)


def test_a_subclass_says_what_its_factors_are() -> None:
    class Half(FusedLoraLinear):
        """LoRA with half of up."""

        def factors_now(self) -> dict[str, Tensor]:
            """The factors by name."""
            return {n: 0.5 * f if n == "up" else f for n, f in super().factors_now().items()}

    torch.manual_seed(0)
    layer, x = Half(K, N, r=4, dora=True), torch.randn(M, K)
    nn.init.normal_(layer.up)
    close([layer(x)], [formula(layer, x)], 1e-5)


@pytest.mark.parametrize("zero", [False, True])
def test_over_a_base_that_is_called(zero: bool) -> None:
    """The magnitude's gradient past a bias that is the module's own, also of a magnitude of 0."""
    torch.manual_seed(0)
    module: Any = Called()
    plain = FusedLoraLinear.from_linear(module.inner, r=4, dora=True)
    layer: Any = FusedLoraLinear.from_linear(module, r=4, dora=True)
    with torch.no_grad():
        for name in plain.factors:
            getattr(plain, name).copy_(torch.randn(getattr(plain, name).shape))
            getattr(layer, name).copy_(getattr(plain, name))
        if zero:
            plain.magnitude[3], layer.magnitude[3] = 0.0, 0.0
    x = torch.randn(M, K)
    y, *grads = gradients(layer, layer, x)
    expected, *others = gradients(plain, plain, x)
    close([y, *grads], [expected, *others], 1e-4)


@pytest.mark.parametrize("rows", [4, M])
def test_over_a_quantised_base(rows: int) -> None:
    """A magnitude of 0 has its gradient beside a bias over four bits too."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    layer = FusedLoraLinear.from_linear(linear, r=4, dora=True)
    with torch.no_grad():
        layer.up.normal_()
        layer.magnitude[3] = 0.0
    x, found = torch.randn(rows, 64), []
    for layer.impl in ("auto", "reference"):
        found.append(gradients(layer, layer, x))
    close(*found, 1e-5)
    assert float(found[0][-1].abs().min()) > 0.0
