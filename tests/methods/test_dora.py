"""DoRA's norms against the dense ones, and DoRA as a gain against PEFT's own."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lowrank import lowrank_linear
from fused_lowrank.compute.gain import least
from fused_lowrank.methods import dora

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def made(n: int, k: int, p: int, core: str, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """(weight, down, core, up), the factors in float32 or wider."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q = p + 1 if core in ("core", "pair") else p
    parts: Any = {
        "core": lambda: draw(p, q),
        "pair": lambda: (draw(p, 3), draw(3, q)),
        "diagonal": lambda: draw(p),
        "none": lambda: None,
    }[core]()
    parts = tuple(part.to(wide) for part in parts) if core == "pair" else parts
    parts = parts.to(wide) if isinstance(parts, Tensor) else parts
    down, up = draw(p, k, std=k**-0.5), draw(n, q, std=0.3)
    return draw(n, k, std=k**-0.5).to(dtype), down.to(dtype), parts, up.to(wide)


def dense(weight: Tensor, down: Tensor, core: Any, up: Tensor, scale: float) -> Tensor:
    """‖W + ΔW‖ by row, of the matrix itself, in float64."""
    core = core[0].double() @ core[1].double() if isinstance(core, tuple) else core
    middle = up.double()
    if core is not None:
        middle = middle * core.double() if core.dim() == 1 else middle @ core.double().t()
    return (weight.double() + scale * middle @ down.double()).norm(dim=1)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 60),
    p=st.integers(1, 12),
    core=st.sampled_from(["core", "pair", "diagonal", "none"]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 0.5, -1.5, 8.0]),
    frozen=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_row_norms(
    n: int, k: int, p: int, core: str, dtype: torch.dtype, scale: float, frozen: bool, seed: int
) -> None:
    """Of every kind of core, with a frozen down and with a trained one."""
    weight, down, middle, up = made(n, k, p, core, dtype, seed)
    fixed = dora.constants(weight, down if frozen else None)
    assert (fixed.with_down is None) == (not frozen)
    norm = dora.row_norms(fixed, weight, down, middle, up, scale)
    expected = dense(weight, down, middle, up, scale)
    eps = 1e-14 if dtype == torch.float64 else 2e-6
    # What cancels has been rounded where it was large.
    large = weight.double().norm(dim=1) + dense(torch.zeros_like(weight), down, middle, up, scale)
    most = 4 * eps * large.square()
    if dtype == torch.bfloat16 and not frozen:
        most += 2**-7 * abs(scale) * mixed(weight, down, middle, up)
    assert bool(((norm.square() - expected.square()).abs() <= most).all())


def mixed(weight: Tensor, down: Tensor, core: Any, up: Tensor) -> Tensor:
    """Σ|up·coreᵀ|·|down·Wᵀ| by row, in float64: what is rounded of W·downᵀ is a part of it."""
    absolute = [
        part if part is None else part.double().abs()
        for part in (core if isinstance(core, tuple) else (core,))
    ]
    middle = absolute[0] if len(absolute) == 1 else absolute[0] @ absolute[1]
    rows = up.double().abs()
    if middle is not None:
        rows = rows * middle if middle.dim() == 1 else rows @ middle.t()
    return (rows * (weight.double() @ down.double().t()).abs()).sum(1)


def test_rows_of_bfloat16_that_cancel() -> None:
    """Where ΔW takes most of a row away, nothing is rounded on the way to its norm."""
    weight, down, _, up = made(50, 256, 4, "none", torch.bfloat16, 0)
    fixed, left = dora.constants(weight), torch.ones(50, 1).index_fill_(0, torch.arange(3), 0.05)
    down[:4] = weight[:4].clone()
    up[:3] = -torch.eye(4)[:3] * (1.0 - left[:3])
    expected = dense(weight, down, None, up, 1.0)
    assert bool((expected[:3] < 0.1 * weight[:3].double().norm(dim=1)).all())
    norm = dora.row_norms(fixed, weight, down, None, up, 1.0)
    torch.testing.assert_close(norm.double(), expected, rtol=2e-4, atol=0)
    assert float((norm.double() / expected - 1.0)[3:].abs().max()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("off", [0.0, 1e-7, 1e-4])
def test_a_norm_that_cancels_is_a_number(off: float, dtype: torch.dtype) -> None:
    """ΔW = -W, almost: nothing that rounding leaves has a negative root."""
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(50, 4, generator=generator, dtype=dtype) for _ in range(2))
    weight, down = up @ down.t() * (1.0 + off), down.t().contiguous()
    for fixed in (dora.constants(weight, down), dora.constants(weight)):
        norm = dora.row_norms(fixed, weight, down, None, up, -1.0)
        assert bool((norm > 0).all())
        least = torch.finfo(dtype).eps ** 0.5 * weight.norm(dim=1)
        assert bool(((norm - off * weight.norm(dim=1)).abs() <= 8 * least).all())


def test_rows_of_zeros() -> None:
    """Neither a norm nor a magnitude of 0 makes a number that is none, or a gradient."""
    weight, down, _, up = made(6, 8, 2, "none", torch.float32, 0)
    weight[:3], up[:2] = 0.0, 0.0
    norm = dora.row_norms(dora.constants(weight), weight, down, None, up, 1.0)
    assert bool((norm[:2] == least(torch.float32)).all())
    magnitude = weight.norm(dim=1).requires_grad_()
    gain = dora.gain(magnitude, norm)
    assert gain[:2].tolist() == [1.0, 1.0]
    assert 0 < float(gain[2]) < 1e-15
    for bias in (None, torch.ones(6)):
        x, factors = torch.randn(70, 8), (weight, down, None, up, bias)
        y = lowrank_linear(x, *factors, gain=gain, impl="aten")
        expected = lowrank_linear(x, *factors, gain=gain, impl="reference")
        torch.testing.assert_close(y, expected)
        (found,) = torch.autograd.grad(y.sum(), magnitude, retain_graph=True)
        assert bool(found.isfinite().all())


class Sizes(TorchDispatchMode):
    """The most elements of a tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = result if isinstance(result, tuple | list) else [result]
            self.most = max([self.most, *(r.numel() for r in made if isinstance(r, Tensor))])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_weights_size_is_made(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N × P numbers in a step with a frozen down; some rows of W at a time elsewhere."""
    n, k, p, rows = 250, 64, 4, 64  # the last of the parts has fewer rows
    monkeypatch.setattr(dora, "WIDENED", rows * k // torch.get_num_threads())
    weight, down, core, up = made(n, k, p, "core", dtype, 0)
    with Sizes() as of_constants:
        fixed = dora.constants(weight, down)
    assert of_constants.most <= rows * k
    with Sizes() as of_step:
        dora.row_norms(fixed, weight, down, core, up, 0.5)
    assert of_step.most <= n * (p + 1)
    with Sizes() as of_trained:
        dora.row_norms(dora.constants(weight), weight, down, core, up, 0.5)
    assert of_trained.most <= rows * k
    if dtype == torch.bfloat16:  # which is multiplied as it is
        fixed = dora.constants(weight)
        with Sizes() as of_rounded:
            dora.row_norms(fixed, weight, down, core, up, 0.5)
        assert of_rounded.most <= n * (p + 1)
    norm, rtol = dora.row_norms(dora.constants(weight), weight, down, core, up, 0.5), 1e-5
    rtol = 2**-10 if dtype == torch.bfloat16 else rtol
    torch.testing.assert_close(norm.double(), dense(weight, down, core, up, 0.5), rtol=rtol, atol=0)


def by_gain(x: Tensor, layer: Any, impl: str) -> Tensor:
    """PEFT's DoRA layer, computed by this library."""
    base, name = layer.get_base_layer(), "default"
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    scale = layer.scaling[name]
    fixed = dora.constants(base.weight)
    norm = dora.row_norms(fixed, base.weight, down, None, up, scale)
    gain = dora.gain(layer.lora_magnitude_vector[name].weight, norm)
    factors = down, None, up, base.bias
    return lowrank_linear(x, base.weight, *factors, scale=scale, impl=impl, gain=gain)


def peft_layer(bias: bool, use_rslora: bool, dtype: torch.dtype) -> Any:
    """A layer of PEFT's with DoRA, all of whose values are away from their start."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = nn.Module()
    model.proj = nn.Linear(96, 80, bias=bias)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["proj"], "use_dora": True}
    config = peft.LoraConfig(**settings, use_rslora=use_rslora)
    layer = peft.inject_adapter_in_model(config, model).proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.3)
        layer.lora_magnitude_vector["default"].weight.mul_(0.7 + 0.6 * torch.rand(80))
    return layer.to(dtype)


@pytest.mark.parametrize("impl", ["auto", "aten", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_peft(bias: bool, dtype: torch.dtype, impl: str) -> None:
    """Same factors in, the same output and gradients: as near to float64 as PEFT's own."""
    if impl == "triton":
        pytest.importorskip("triton")
    layer = peft_layer(bias, use_rslora=bias, dtype=dtype)
    x, dy = torch.randn(60, 96).to(dtype), torch.randn(60, 80).to(dtype)
    trained = {name: one for name, one in layer.named_parameters() if one.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"lora_A", "lora_B", "lora_magnitude_vector"}

    def gradients(call: Any, of: Any) -> list[Tensor]:
        leaf = x.to(next(of.parameters()).dtype).requires_grad_()
        y = call(leaf)
        leaves = [leaf, *(one for one in of.parameters() if one.requires_grad)]
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    found = gradients(lambda leaf: by_gain(leaf, layer, impl), layer)
    theirs = gradients(layer, layer)
    exact = gradients(layer, layer) if dtype == torch.float64 else None
    if exact is None:
        twin = peft_layer(bias, use_rslora=bias, dtype=dtype).double()
        exact = gradients(twin, twin)
    for ours, other, truth in zip(found, theirs, exact, strict=True):
        size = float(truth.norm())
        assert ours.dtype == other.dtype
        off, of_theirs = (float((one.double() - truth).norm()) for one in (ours, other))
        floor = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 8e-3) * size
        assert off <= max(2.5 * of_theirs, floor), (off, of_theirs, size)
