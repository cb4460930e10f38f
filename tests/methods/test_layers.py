"""The layers: construction, initial values, what learns, merging."""

import copy
import inspect
import io
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from fused_lowrank import lowrank_linear
from fused_lowrank.methods import METHODS, LowRankLinear
from fused_lowrank.methods.computer import Computer
from fused_lowrank.methods.initialisers import svd_bases

K, N = 24, 20
SETTINGS = {
    "lora": {"r": 4, "alpha": 6.0},
    "lora_xs": {"r": 4, "alpha": 6.0},
    "lora_mini": {"r": 3, "a": 6, "b": 5, "alpha": 6.0},
}
CLASSES = [(method, cls) for method, pair in METHODS.items() for cls in pair]
methods = pytest.mark.parametrize("method", METHODS)
classes = pytest.mark.parametrize(("method", "cls"), CLASSES)


def layer_of(cls: type[LowRankLinear], device: torch.device, **keywords: object) -> LowRankLinear:
    """A layer with every factor random, so that ΔW is of the size of W."""
    layer = cls(K, N, device=device, **{**SETTINGS[cls.method], **keywords})
    for name in layer.factors:
        nn.init.normal_(getattr(layer, name), std=0.5)
    return layer


def delta(layer: LowRankLinear) -> torch.Tensor:
    """ΔW in float64, written out here."""
    core = layer.core_factors
    if isinstance(core, tuple):
        core = core[0].double().cpu() @ core[1].double().cpu()
    core = torch.eye(layer.r) if core is None else core
    up, down = layer.up.double().cpu(), layer.down.double().cpu()
    return (layer.alpha / layer.r * up @ core.double().cpu().T @ down).detach()


def error_budget(layer: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
    """How far apart two ways of summing y may lie: unit roundoff · terms · |formula|."""
    weight = layer.base_weight.detach().double().cpu().abs()
    absolute = x.double().cpu().abs() @ (weight + delta_abs(layer)).T
    return 4 * torch.finfo(x.dtype).eps * math.sqrt(K) * (absolute + 1)


def delta_abs(layer: LowRankLinear) -> torch.Tensor:
    """ΔW of the absolute values."""
    clone = copy.deepcopy(layer)
    for name in layer.factors:
        getattr(clone, name).data.abs_()
    return delta(clone).abs()


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
        nn.init.normal_(source.down)
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
    zero = {"lora": "up", "lora_mini": "b_train"}.get(method)
    names = ("weight", "bias", *cls.factors)
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
    nn.init.zeros_(layer.core)
    assert torch.equal(layer(x), layer.eval()(x))


# --- merging ---


@classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merge(
    method: str, cls: type[LowRankLinear], dtype: torch.dtype, device: torch.device
) -> None:
    """Merged and unmerged forward agree, the loss is the right one, unmerge is bit for bit."""
    layer = layer_of(cls, device, dtype=dtype)
    x = torch.randn(11, K, device=device, dtype=dtype)
    parameter, values, y = layer.weight, layer.weight.detach().clone(), layer(x)
    expected = delta(layer)
    torch.testing.assert_close(
        layer.delta_weight().double().cpu(),
        expected,
        rtol=0,
        atol=float(8 * 2**-23 * delta_abs(layer).max()),
    )
    assert layer.delta_weight().dtype == torch.promote_types(dtype, torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lost = layer.merge()
    assert layer.merged
    assert layer.weight is not parameter
    assert layer.weight.dtype == dtype
    assert torch.equal(parameter, values)
    assert ((layer(x) - y).double().cpu().abs() <= error_budget(layer, x)).all()
    if dtype.itemsize < 4:
        kept = layer.weight.double().cpu() - values.double().cpu()
        assert lost == pytest.approx(float((expected - kept).norm() / expected.norm()), rel=1e-3)
        assert 0 < lost < 1
        assert f"{lost:.2%}" in str(caught[0].message)
    else:
        assert lost == 0
        assert not caught
    assert layer.merge() == 0
    layer.unmerge()
    assert layer.weight is parameter
    assert torch.equal(parameter, values)
    assert torch.equal(layer(x), y)
    layer.unmerge()
    assert not layer.merged


def test_merge_that_loses_everything(device: torch.device) -> None:
    """A ΔW below half a unit in the last place of every weight is lost, and the figure says so."""
    layer = METHODS["lora"][1](K, N, r=1, device=device, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.down, 2**-6)
    nn.init.constant_(layer.up, 2**-6)
    with pytest.warns(UserWarning, match=r"100\.00%"):
        assert layer.merge() == 1.0


def copied(layer: LowRankLinear) -> LowRankLinear:
    """The layer through torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@methods
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, copied])
def test_copies(method: str, merged: bool, copy_of: object, device: torch.device) -> None:
    """A copy computes the same, is as merged as the original and shares nothing with it."""
    layer = layer_of(METHODS[method][1], device)
    x = torch.randn(3, K, device=device)
    y = layer(x)
    if merged:
        layer.merge()
    clone = copy_of(layer)
    assert clone.merged == merged
    assert torch.equal(clone(x), layer(x))
    clone.unmerge()
    assert torch.equal(clone(x), y)
    assert clone.weight.data_ptr() != layer.base_weight.data_ptr()


@methods
def test_loading_its_own_tensors_gives_no_values(method: str) -> None:
    """As torch's checkpoints hand a model what they lack; a layer's factors are pending then."""
    linear, cls = nn.Linear(K, N), METHODS[method][1]
    layer = cls.from_linear(linear, defer_bases=True, **SETTINGS[method])
    layer.load_state_dict(layer.state_dict())
    assert layer.bases_pending
    layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
    assert not layer.bases_pending


class Doubling(Computer):
    """Gives twice what the layer gives, and remembers what it is told."""

    def __init__(self) -> None:
        self.looks, self.values = 0, None

    def __call__(self, layer: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
        return 2 * layer.own(x)

    def look_again(self, moved: bool = False) -> None:
        self.looks += 1

    def refuse_other(self, values: dict) -> None:
        self.values = sorted(values)


class Bank(Doubling):
    """The same, which no copy of a layer is part of."""

    is_bank = True


@methods
@pytest.mark.parametrize("kind", [Doubling, Bank])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, copied])
def test_computed_by_another(method: str, kind: type[Doubling], copy_of: object) -> None:
    """Who has the layer's slot computes it, and is told of what happens to its Parameters."""
    layer, x = layer_of(METHODS[method][1], "cpu"), torch.randn(3, K)
    y = layer(x)
    other = layer.computed_by = kind()
    assert torch.equal(layer(x), 2 * y)
    assert layer.in_bank == other.is_bank
    assert torch.equal(copy_of(layer)(x), y if kind is Bank else 2 * y)
    layer.float()
    layer.up = nn.Parameter(layer.up.detach())
    assert other.looks == 2
    layer.load_state_dict(layer.state_dict())
    assert other.values == sorted({*layer.factors, "weight"})
    layer.merge()
    assert torch.allclose(layer(x), 2 * y, atol=1e-5)  # who computes it is asked first
    layer.computed_by = None
    assert torch.allclose(layer(x), y, atol=1e-5)


@methods
def test_conversion_while_merged(method: str, device: torch.device) -> None:
    """.to(dtype) and .to(device) of a merged layer convert the kept weight too."""
    layer = layer_of(METHODS[method][1], "cpu")
    x = torch.randn(3, K, device=device, dtype=torch.double)
    layer.merge()
    assert layer.to(device).double()(x).dtype == torch.double
    layer.unmerge()
    assert layer.weight.dtype == torch.double
    assert layer.weight.device.type == device.type
    assert layer(x).dtype == torch.double


@methods
def test_load_state_dict_while_merged(method: str, device: torch.device) -> None:
    """A merged layer refuses a state_dict: it could not say which weight is meant."""
    layer = layer_of(METHODS[method][1], device)
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.load_state_dict(state)
    layer.unmerge()
    layer.load_state_dict(state)
