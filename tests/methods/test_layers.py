"""The layers: construction, initial values, what learns, merging."""

import inspect
import itertools
import math

import pytest
import torch
from layer_cases import SETTINGS, K, N, classes, error_budget, layer_of, methods
from torch import nn

from fused_lowrank import lowrank_linear
from fused_lowrank.methods import METHODS, LowRankLinear
from fused_lowrank.methods.initial.values import svd_bases

# --- the drop-in: constructor, parameters, state_dict ---


@methods
def test_fused_is_a_drop_in(method: str, device: torch.device) -> None:
    """Same signature, parameters and state_dict, loadable both ways, and the same output."""
    plain_cls, fused_cls = METHODS[method]
    assert inspect.signature(plain_cls) == inspect.signature(fused_cls)
    plain, fused = layer_of(plain_cls, device), layer_of(fused_cls, device)
    shapes = {name: (p.shape, p.dtype, p.requires_grad) for name, p in plain.named_parameters()}
    assert shapes == {n: (p.shape, p.dtype, p.requires_grad) for n, p in fused.named_parameters()}
    x = torch.randn(7, K, device=device)
    for source, target in ((plain, fused), (fused, plain)):
        nn.init.normal_(getattr(source, source.train_names[0]))
        assert not torch.allclose(source(x), target(x))
        target.load_state_dict(source.state_dict(), strict=True)
        difference = (source(x) - target(x)).double().cpu().abs()
        assert (difference <= error_budget(source, x)).all()


@classes
def test_parameters(method: str, cls: type[LowRankLinear], device: torch.device) -> None:
    """The factors are Parameters (no buffers), named and shaped as documented."""
    layer = layer_of(cls, device)
    r, a, b = (SETTINGS[method].get(name) for name in ("r", "a", "b"))
    shapes = {
        "lora": {"down": (r, K), "up": (N, r)},
        "lora_xs": {"down": (r, K), "core": (r, r), "up": (N, r)},
        "lora_mini": {"down": (a, K), "a_train": (a, r), "b_train": (r, b), "up": (N, b)},
        "lora_fa": {"down": (r, K), "up": (N, r)},
        "vera": {"down": (r, K), "up": (N, r), "d": (r,), "b": (N,)},
        "tied_lora": {"down": (r, K), "up": (N, r), "u": (r,), "v": (N,)},
        "melora": {"down": (r * 2, K // 2), "up": (N, r)},
        "nola": {"down_bases": (5, r, K), "up_bases": (5, N, r), "a": (5,), "b": (5,)},
        "adalora": {"down": (r, K), "core": (r,), "up": (N, r)},
    }[method]
    expected = {"weight": (N, K), "bias": (N,), **shapes}
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == expected
    assert list(layer.buffers()) == []
    assert layer.scale == 6.0 / r
    assert cls(K, N, **{**SETTINGS[method], "alpha": None}).scale == 1.0
    assert cls(K, N, bias=False, **SETTINGS[method]).bias is None


@classes
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares(
    method: str, cls: type[LowRankLinear], bias: bool, device: torch.device
) -> None:
    """weight and bias are the very same Parameters, there and back; the mode is kept."""
    linear = nn.Linear(K, N, bias, device=device).eval()
    layer = cls.from_linear(linear, **SETTINGS[method])
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert back.weight is linear.weight
    assert back.bias is linear.bias
    assert not back.training


@methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_trained_factors_dtype(method: str, dtype: torch.dtype, device: torch.device) -> None:
    """Beside a 16-bit base the trained factors are float32, the frozen ones of its dtype."""
    linear = nn.Linear(K, N, device=device, dtype=dtype)
    cls = METHODS[method][1]
    wide = torch.promote_types(dtype, torch.float32)
    for keywords, trained in (({}, wide), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        layer = cls.from_linear(linear, **SETTINGS[method], **keywords)
        for name in layer.factors:
            expected = trained if name in layer.train_names else dtype
            assert getattr(layer, name).dtype == expected, name
    assert {p.dtype for p in cls(K, N, dtype=dtype, **SETTINGS[method]).parameters()} == {dtype}


# --- what learns ---


@classes
def test_gradients_of_train(method: str, cls: type[LowRankLinear], device: torch.device) -> None:
    """For every subset of names: gradients for exactly those; what never could learn is refused."""
    zero = next((n for n, init in cls.row.inits("identity").items() if "zero" in init), None)
    zero = "b" if method == "vera" else zero
    names = ("weight", "bias", *(n for n, f in cls.row.factors.items() if f.saved))
    for size in range(len(names) + 1):
        for train in itertools.combinations(names, size):
            factors = set(train) & set(cls.factors)
            if zero and factors and zero not in factors:
                with pytest.raises(ValueError, match=zero):
                    cls(K, N, **SETTINGS[method], train=train)
                continue
            layer = layer_of(cls, device, train=train)
            y = layer(torch.randn(5, K, device=device))
            assert y.requires_grad == bool(train)
            if train:
                y.square().sum().backward()
            learned = {
                n for n, p in layer.named_parameters() if p.grad is not None and p.grad.any()
            }
            assert learned == set(train)


def test_refusal_leaves_the_linear_alone() -> None:
    """A refused `train` has not frozen the linear layer."""
    for method, train in (("lora", ("down",)), ("lora_mini", ("a_train",)), ("lora_xs", ("x",))):
        linear = nn.Linear(K, N)
        with pytest.raises(ValueError, match="train"):
            METHODS[method][1].from_linear(linear, **SETTINGS[method], train=train)
        assert linear.weight.requires_grad
        assert linear.bias.requires_grad


# --- initial values ---


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
def test_lora_xs_bases(svd: str, shape: tuple[int, int], device: torch.device) -> None:
    """W = S·Σ·Dᵀ: down = Σᵣ·Dᵣᵀ, up = Sᵣ, the largest entry of each column of S positive.

    The SVD of float32 is that of a W which is off by a small multiple of √n·u·σ₁: singular values
    are off by as much, and vectors by as much over their value's distance from the next (Wedin).
    """
    r = 6
    spectrum = torch.linspace(3, 0.1, min(shape))
    (left, _), (right, _) = (torch.linalg.qr(torch.randn(n, min(shape))) for n in shape)
    weight = (left * spectrum @ right.T).to(device)
    down, up = (f.cpu() for f in svd_bases(weight, r, svd))
    s, sigma, dt = torch.linalg.svd(weight.cpu().double(), full_matrices=False)
    off = 8 * math.sqrt(max(shape)) * 2**-24 * sigma[0]
    derived = float(off / (sigma[:-1] - sigma[1:])[:r].min())
    tolerance = {"exact": derived, "randomized": 1e-3}[svd]
    sign = (s[:, :r] * up).sum(0).sign()
    torch.testing.assert_close(up.double(), s[:, :r] * sign, rtol=0, atol=tolerance)
    expected = sigma[:r, None] * dt[:r] * sign[:, None]
    torch.testing.assert_close(down.double(), expected, rtol=0, atol=3 * tolerance)
    best = s[:, :r] * sigma[:r] @ dt[:r]
    torch.testing.assert_close((up @ down).double(), best, rtol=0, atol=3 * tolerance)
    assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_lora_xs_is_deterministic(svd: str, device: torch.device) -> None:
    """The SVD gives the same factors whatever the RNG's state, and leaves that untouched."""
    weight = torch.randn(N, K, device=device)
    first = svd_bases(weight, 4, svd)
    torch.manual_seed(1)
    before = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    second = svd_bases(weight, 4, svd)
    after = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    flipped = svd_bases(-weight, 4, svd)  # -W = S·Σ·(-D)ᵀ: the convention is on S
    torch.testing.assert_close(flipped[1], first[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(flipped[0], -first[0], rtol=0, atol=1e-2)


def test_svd_seeds_no_other_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed would seed every device's generator: it is not called."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("torch.manual_seed"))
    monkeypatch.setattr(torch.random, "manual_seed", lambda seed: pytest.fail("manual_seed"))
    svd_bases(torch.randn(N, K), 4)


def test_lora_xs_core(device: torch.device) -> None:
    """The core starts as N(0, 1e-5²)."""
    layer = METHODS["lora_xs"][1](160, 160, r=128, device=device)
    core = layer.core.detach().double() / 1e-5
    size = core.numel()
    assert abs(core.mean()) < 5 / math.sqrt(size)
    assert abs(core.var() - 1) < 5 * math.sqrt(2 / size)
    assert abs((core**4).mean() - 3) < 5 * math.sqrt(96 / size)


@pytest.mark.parametrize("init", ["identity", "paper"])
def test_lora_mini_init(init: str, device: torch.device) -> None:
    """Kaiming-uniform, within ±1/√fan-in of x·F, and up to it; b_train zero with "identity"."""
    layer = METHODS["lora_mini"][1](96, 80, r=16, a=40, b=48, init=init, device=device)
    for name, fan_in in {"down": 96, "a_train": 40, "b_train": 16, "up": 48}.items():
        largest = getattr(layer, name).abs().max().item() * math.sqrt(fan_in)
        if init == "identity" and name == "b_train":
            assert largest == 0
        else:
            assert 0.95 < largest <= 1 + 1e-6, name
    assert bool(layer.delta_weight().any()) == (init == "paper")


def test_lora_mini_formula(device: torch.device) -> None:
    """y = x·Aaux·Atrain·Btrain·Baux·scale + linear(x)."""
    layer = layer_of(METHODS["lora_mini"][1], device).double()
    x = torch.randn(2, 3, K, device=device, dtype=torch.double)
    a_aux, b_aux = layer.down.T, layer.up.T
    y = x @ a_aux @ layer.a_train @ layer.b_train @ b_aux * 2.0
    y = y + nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("method", "first"), [("lora", "up"), ("lora_mini", "b_train")])
def test_starts_as_the_base_and_learns(method: str, first: str, device: torch.device) -> None:
    """ΔW is 0 and the output the base's; one factor has a gradient at once, all after a step."""
    layer = METHODS[method][1](K, N, **SETTINGS[method], device=device)
    x = torch.randn(9, K, device=device)
    assert not layer.delta_weight().any()
    difference = layer(x) - nn.functional.linear(x, layer.weight, layer.bias)
    if device.type == "cpu":  # elsewhere another GEMM may sum in another order
        assert not difference.any()
    assert (difference.double().cpu().abs() <= error_budget(layer, x)).all()
    optimiser = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.1)
    for learning in ({first}, set(layer.train_names)):
        optimiser.zero_grad()
        layer(x).square().sum().backward()
        assert {n for n in layer.train_names if getattr(layer, n).grad.any()} == learning
        optimiser.step()


def test_dropout_is_of_training_alone(device: torch.device) -> None:
    """dropout acts in training on the low-rank path, and nowhere in eval mode."""
    layer = layer_of(METHODS["lora_xs"][1], device, dropout=0.5)
    x = torch.randn(9, K, device=device)
    operands = layer.weight, layer.down, layer.core, layer.up, layer.bias
    assert torch.equal(layer.eval()(x), lowrank_linear(x, *operands, scale=layer.scale))
    assert not torch.allclose(layer.train()(x), layer(x))
    nn.init.zeros_(layer.core)  # a GPU computes the two by other plans
    torch.testing.assert_close(layer(x), layer.eval()(x))
