"""Layers with dora=True: a trained magnitude over the norms of the rows of W + ΔW."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_lowrank import (
    AdapterBank,
    adapt,
    disable_adapters,
    explain,
    init_bases,
    load_adapter,
    save_adapter,
    unload,
)
from fused_lowrank.methods import METHODS, LowRankLinear, dora
from fused_lowrank.models.restarts import merge_and_restart

K, N, M = 40, 48, 70
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora_fa": {"r": 4},
    "lora_xs": {"r": 4},
    "lora_mini": {"r": 3, "a": 6, "b": 5, "init": "paper"},
}
methods = pytest.mark.parametrize("method", SETTINGS)
fused = pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])


def layer_of(
    method: str, fused: bool = True, dtype: torch.dtype = torch.float32, **keywords: Any
) -> Any:
    """A layer with dora, all of whose trained values are away from their start."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N).to(dtype)
    keywords = {**SETTINGS[method], "alpha": 6.0, "dora": True, **keywords}
    layer = METHODS[method][fused].from_linear(linear, **keywords)
    shift(layer)
    return layer


@torch.no_grad()
def shift(layer: nn.Module) -> None:
    """Move what is trained."""
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn_like(parameter))


def formula(layer: LowRankLinear, x: Tensor) -> Tensor:
    """y in float64 as the paper writes it, the norm a constant in the gradient."""
    wide: Any = {name: factor.double() for name, factor in layer.factors_now().items()}
    core = wide.get("core")
    if "a_train" in wide:
        core = wide["a_train"] @ wide["b_train"]
    up = wide["up"] if core is None else wide["up"] @ core.t()
    whole = layer.weight.double() + layer.scale * up @ wide["down"]
    gain = wide["magnitude"] / whole.norm(dim=1).detach()
    y = x.double() @ (gain[:, None] * whole).t()
    return y if layer.bias is None else y + layer.bias.double()


def gradients(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """[y, dx, the gradients of what is trained]."""
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    torch.manual_seed(1)
    dy = torch.randn(y.shape).to(y.dtype)
    leaves = [leaf, *(own for own in layer.parameters() if own.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def close(found: list[Tensor], expected: list[Tensor], eps: float) -> None:
    """Whether tensors agree, by their norms."""
    for ours, truth in zip(found, expected, strict=True):
        off = float((ours.double() - truth.double()).norm())
        assert off <= eps * float(truth.double().norm()) + 1e-30, (off, ours.shape)


@methods
@fused
@pytest.mark.parametrize("rows", [3, M])
@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_numbers(method: str, fused: bool, rows: int, dtype: torch.dtype, eps: float) -> None:
    """Output and gradients are the formula's; trained factors, magnitude among them, are wide."""
    layer = layer_of(method, fused, dtype)
    assert layer.magnitude.shape == (N,)
    assert layer.magnitude.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    x = torch.randn(rows, K).to(dtype)
    close(gradients(layer, layer, x), gradients(lambda x: formula(layer, x), layer, x), eps)


@methods
def test_starts_as_the_base_does(method: str) -> None:
    """The magnitude is the norm of W + ΔW at the start: the gain is 1."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    keywords = {**SETTINGS[method], "dora": True}
    layer: Any = METHODS[method][1].from_linear(linear, **keywords)
    plain: Any = METHODS[method][1].from_linear(linear, **SETTINGS[method])
    for name in plain.factors:
        getattr(plain, name).data.copy_(getattr(layer, name))
    torch.testing.assert_close(layer(torch.eye(K)), plain(torch.eye(K)))
    torch.testing.assert_close(layer.magnitude, (linear.weight + plain.delta_weight()).norm(dim=1))
    assert layer.train_names == (*plain.train_names, "magnitude")
    assert list(layer.state_dict()) == [*plain.state_dict(), "magnitude"]


def test_under_autocast() -> None:
    """The norm is taken in float32, whatever autocast makes of products."""
    layer, x = layer_of("lora_xs"), torch.randn(M, K)
    parts = layer.parts()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.parts().gain, parts.gain, rtol=1e-6, atol=0)
        assert layer(x).dtype == torch.bfloat16


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that constants are computed."""
    calls: list[bool] = []
    constants = dora.constants

    def count(*args: Any) -> Any:
        calls.append(True)
        return constants(*args)

    monkeypatch.setattr(dora, "constants", count)
    return calls


def load(layer: Any, name: str) -> None:
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    state[name] = state[name] * 2
    layer.load_state_dict(state)


def replaced(layer: Any, name: str) -> None:
    value = nn.Parameter(getattr(layer, name).detach() * 2, requires_grad=False)
    setattr(layer, name, value)


def in_place(layer: Any, name: str) -> None:
    with torch.no_grad():
        getattr(layer, name).mul_(2)


def moved(layer: Any, name: str) -> None:
    layer.double()
    in_place(layer, name)
    layer.float()


def swapped(layer: Any, name: str) -> None:
    own = getattr(layer, name)
    own.data = own.data * 2


@methods
@pytest.mark.parametrize("change", [load, replaced, in_place, moved, swapped])
@pytest.mark.parametrize("name", ["weight", "down"])
def test_constants_are_kept_until_something_changes(
    method: str, name: str, change: Callable[..., None], counted: list[bool]
) -> None:
    """Once a layer, not once a call; and anew after whatever writes W or down."""
    layer, x = layer_of(method), torch.randn(M, K)
    layer(x)
    counted.clear()
    layer(x), layer(x).sum().backward()
    assert not counted
    if method == "lora" and name == "down" and change is replaced:
        pytest.skip("a trained down is no constant")
    change(layer, name)
    close([layer(x)], [formula(layer, x)], 1e-5)
    layer(x)
    assert len(counted) <= 1


def test_a_trained_weight_has_no_constants() -> None:
    """Of a weight that is trained the norm is taken in every call."""
    layer = layer_of("lora_xs", train=("core", "magnitude", "weight"))
    x = torch.randn(M, K)
    for _ in range(2):
        close([layer(x)], [formula(layer, x)], 1e-5)
        with torch.no_grad():
            layer.weight.data.mul_(1.5)
            layer.weight[3] += 1.0


@methods
@pytest.mark.parametrize("rows", [3, M])
def test_compiled(method: str, rows: int, counted: list[bool]) -> None:
    """One graph, the eager numbers, and constants that are kept as in eager calls."""
    layer, x = layer_of(method), torch.randn(rows, K)
    expected = gradients(layer, layer, x)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(gradients(compiled, layer, x), expected, 1e-6)
    counted.clear()
    gradients(compiled, layer, x)
    assert not counted
    in_place(layer, "weight")
    close([compiled(x)], [formula(layer, x)], 1e-5)


@methods
@fused
def test_saved_for_backward(method: str, fused: bool) -> None:
    """M × P and N numbers, x where down is trained, and the result; nothing else of M."""
    if not fused:
        pytest.skip("the reference is plain autograd")
    layer, x = layer_of(method), torch.randn(M, K)
    x.requires_grad_()
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    sizes: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        y = layer(x)
    own |= {x.data_ptr(), y.data_ptr()}
    rest = sum(count for place, count in sizes.items() if place not in own)
    p = layer.down.shape[0]
    assert rest <= M * p + 3 * N  # t; the gain, the norm and what is 1 where it is 0
    assert (x.data_ptr() in sizes) == (method == "lora")


@methods
def test_merging(method: str) -> None:
    """W' = gain ⊙ (W + ΔW), and back again, bit for bit."""
    layer, x = layer_of(method), torch.randn(M, K)
    expected, before = layer(x), layer.weight.detach().clone()
    close(
        [before + layer.delta_weight()],
        [formula(layer, torch.eye(K)).t() - layer.bias[:, None]],
        1e-6,
    )
    layer.merge()
    close([layer(x)], [expected], 1e-5)
    state = layer.state_dict()
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    twin = layer_of(method)
    twin.load_state_dict(state)
    close([twin(x)], [expected], 1e-6)
    other = METHODS[method][1](K, N, **{**SETTINGS[method], "alpha": 6.0, "dora": True})
    with pytest.raises(RuntimeError, match=r"nobody can tell W: unmerge\(model\)"):
        other.load_state_dict(state)


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def adapted(net: nn.Module, method: str, **keywords: Any) -> Any:
    """A copy of a model, with dora, away from its start."""
    keywords = {**SETTINGS[method], "dora": True, **keywords}
    targets = ["first", "second"]
    model = adapt(copy.deepcopy(net), method, target_modules=targets, progress=False, **keywords)
    shift(model)
    return model


@methods
@pytest.mark.parametrize("bases", [True, False])
def test_files(method: str, bases: bool, tmp_path: Any) -> None:
    """Saved and loaded, into a plain model and an adapted one; refused by another base."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(M, K)
    model = adapted(net, method)
    save_adapter(model, tmp_path / "file", bases=bases)
    into = adapted(net, method)
    targets = [into]
    if not bases and method in ("lora_fa", "lora_mini"):  # random ones are in no such file
        there = model.state_dict()
        frozen = {key: v for key, v in there.items() if key.endswith((".down", ".up"))}
        into.load_state_dict(frozen, strict=False)
    else:
        targets.append(copy.deepcopy(net))
    for target in targets:
        found = load_adapter(target, tmp_path / "file", progress=False)
        close([found(x)], [model(x)], 1e-6)
        assert found.first.settings() == model.first.settings()
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(Net() if bases else adapted(Net(), method), tmp_path / "file", progress=False)
    plain = adapted(net, method, dora=False)
    with pytest.raises(ValueError, match=f"first is {method} here and {method} with dora there"):
        load_adapter(plain, tmp_path / "file", progress=False)


@methods
def test_whole_models(method: str) -> None:
    """Disabled, copied, pickled, merged and taken out."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(M, K)
    model = adapted(net, method)
    expected = model(x)
    with disable_adapters(model):
        assert torch.equal(model(x), net(x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    close([unload(copy.deepcopy(model), merge=True)(x)], [expected], 1e-5)
    assert torch.equal(unload(model)(x), net(x))


def test_dora_is_a_name_of_lora_with_it() -> None:
    """adapt(model, "dora")."""
    model = adapt(Net(), "dora", target_modules=["first"], r=2, progress=False)
    assert model.first.settings() == {**model.first.settings(), "dora": True}
    assert model.first.method == "lora"
    with pytest.raises(ValueError, match="take 'lora'"):
        adapt(Net(), "dora", target_modules=["first"], dora=False, progress=False)


def test_meta() -> None:
    """Layers that are made before their weights are there get their magnitude with their bases."""
    with torch.device("meta"):
        net = Net()
    model = adapt(
        net, "lora_xs", target_modules=["first"], r=4, dora=True, defer_bases=True, progress=False
    )
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name in ("first", "second"):
            for part in ("weight", "bias"):
                getattr(getattr(model, name), part).normal_()
        model.first.weight[2] = 0.0
    with pytest.raises(ValueError, match="first: rows 2 of the weight are zero"):
        init_bases(model, progress=False)
    assert model.first.bases_pending
    with torch.no_grad():
        model.first.weight[2] = 1.0
    init_bases(model, progress=False)
    torch.testing.assert_close(
        model.first.magnitude, model.first.weight.norm(dim=1), rtol=1e-3, atol=0
    )


# --- refused ---


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@methods
def test_rows_without_a_norm(method: str, value: float) -> None:
    """Refused before anything is changed."""
    net = Net()
    with torch.no_grad():
        net.second.weight[5] = value
    before, modules = copy.deepcopy(net.state_dict()), list(net.modules())
    with pytest.raises(ValueError, match=r"second: rows 5 of the weight are zero, or hold NaN"):
        adapted_in_place(net, method)
    assert list(net.modules()) == modules
    assert all(own.requires_grad for own in net.parameters())
    assert all(
        torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in net.state_dict().items()
    )


def adapted_in_place(net: nn.Module, method: str) -> None:
    keywords = {**SETTINGS[method], "dora": True}
    adapt(net, method, target_modules=["first", "second"], progress=False, **keywords)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SETTINGS])
def test_methods_without_it(method: str) -> None:
    """They say who has it; and who has it takes True or False alone."""
    with pytest.raises(TypeError, match="no keyword 'dora': lora, lora_fa, lora_xs and lora_mini"):
        adapt(Net(), method, target_modules=["first"], dora=True, progress=False)
    with pytest.raises(ValueError, match="dora is 1: it must be True or False"):
        adapt(Net(), "lora", target_modules=["first"], dora=1, progress=False)


def test_banks(tmp_path: Any) -> None:
    """A bank takes neither a model with dora nor an adapter with it."""
    torch.manual_seed(0)
    net = Net()
    model, plain = adapted(net, "lora_xs"), adapted(net, "lora_xs", dora=False)
    with pytest.raises(ValueError, match="first is with dora: the norms of its rows are of one"):
        AdapterBank(model, slots=2)
    save_adapter(model, tmp_path / "file")
    bank = AdapterBank(plain, slots=2)
    for source in (model, tmp_path / "file"):
        with pytest.raises(ValueError, match="first is lora_xs with dora there and lora_xs here"):
            bank.add("a", source)
    with pytest.raises(ValueError, match="magnitude of first: a bank holds no adapters with dora"):
        bank.add("a", model.state_dict())


# --- beside the rest ---


@methods
def test_dropouts(method: str) -> None:
    """Of the low-rank path alone; the norm is that of W + ΔW whole."""
    layer, x = layer_of(method, dropout=0.5, rank_dropout=0.5), torch.randn(M, K)
    gain = layer.parts().gain
    base = x @ layer.weight.t()
    y = layer(x)
    low = (y - layer.bias) / gain - base
    assert not torch.equal(layer(x), y)
    assert int(torch.linalg.matrix_rank(low.double(), tol=1e-3)) <= layer.down.shape[0]
    layer.eval()
    close([layer(x)], [formula(layer, x)], 1e-5)


@methods
def test_restart(method: str) -> None:
    """Merged for good and begun anew: the function stays, and the magnitude is W's norm."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(M, K)
    if method == "lora_fa":
        return
    model = adapted(net, method, **({"init": "identity"} if method == "lora_mini" else {}))
    expected = model(x).detach()
    trained = [own for own in model.parameters() if own.requires_grad]
    merge_and_restart(model, torch.optim.SGD(trained, lr=0.1), progress=False)
    close([model(x)], [expected], 1e-4)
    torch.testing.assert_close(
        model.first.magnitude, model.first.weight.norm(dim=1), rtol=1e-4, atol=0
    )


def test_patterns_and_rslora() -> None:
    """Settings of adapt compose with it."""
    model = adapted(Net(), "lora", use_rslora=True, rank_pattern={"second": 2}, alpha=8)
    assert (model.first.r, model.second.r) == (4, 2)
    assert model.first.scale == pytest.approx(8 / 2)
    x = torch.randn(M, K)
    close([model.first(x)], [formula(model.first, x)], 1e-5)


def test_explain() -> None:
    """The plans are those of a call with a gain."""
    layer = layer_of("lora")
    said = explain(layer, 4096)
    assert [one.problem.gain for one in said.passes] == [True, False]
