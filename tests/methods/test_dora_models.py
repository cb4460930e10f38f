"""Models with dora=True: files, merging, what is refused, and what it is used beside."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from dora_cases import (
    SETTINGS,
    SHARING,
    K,
    M,
    N,
    Net,
    adapted,
    close,
    formula,
    layer_of,
    methods,
    shift,
)
from torch import nn

from fused_lowrank import (
    AdapterBank,
    RankBudget,
    adapt,
    disable_adapters,
    init_bases,
    load_adapter,
    orthogonality,
    save_adapter,
    unload,
)
from fused_lowrank.methods import METHODS, LoraLinear, dora
from fused_lowrank.models.restarts import merge_and_restart


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


def test_a_method_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no such keyword; and who has it takes True or False alone."""

    class OwnGain(LoraLinear, row=replace(LoraLinear.row, name="own_gain", dora=None)):
        """A method whose parts have a gain of their own."""

    monkeypatch.setitem(METHODS, "own_gain", (OwnGain, OwnGain))
    with pytest.raises(TypeError, match="own_gain has no keyword 'dora'"):
        adapt(Net(), "own_gain", target_modules=["first"], dora=True, progress=False)
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


@pytest.mark.parametrize("method", [name for name in SETTINGS if name not in SHARING])
def test_restart(method: str) -> None:
    """Merged for good and begun anew: the function stays, and the magnitude is W's norm."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(M, K)
    model = adapted(net, method, **({"init": "identity"} if method == "lora_mini" else {}))
    expected = model(x).detach()
    trained = [own for own in model.parameters() if own.requires_grad]
    merge_and_restart(model, torch.optim.SGD(trained, lr=0.1), progress=False)
    close([model(x)], [expected], 1e-4)
    torch.testing.assert_close(
        model.first.magnitude, model.first.weight.norm(dim=1), rtol=1e-4, atol=0
    )


def test_a_budget_of_ranks() -> None:
    """The norm is of the ranks that AdaLoRA's budget has left."""
    torch.manual_seed(0)
    model, x = adapted(Net(), "adalora"), torch.randn(M, K)
    budget = RankBudget(model, target_r=2, total_step=4)
    for step in range(1, 5):
        (model(x).square().mean() + orthogonality(model)).backward()
        budget.update_and_allocate(step)
        close([model.first(x)], [formula(model.first, x)], 1e-5)
    assert sum(int(m.core.count_nonzero()) for m in (model.first, model.second)) == 4


@pytest.mark.parametrize("method", SHARING)
def test_layers_that_share_factors(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has constants, and a magnitude, of its own W; deferred or not."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(M, K)
    keywords = {"target_modules": ["first", "second"], "progress": False, "dora": True}
    keywords |= {**SETTINGS[method], **({"b_initial": 0.3} if method == "vera" else {})}
    later = adapt(copy.deepcopy(net), method, defer_bases=True, **keywords)
    given: list[Any] = []
    row_norms = dora.row_norms
    monkeypatch.setattr(dora, "row_norms", lambda *own: given.append(own[0]) or row_norms(*own))
    for model in (adapt(copy.deepcopy(net), method, **keywords), init_bases(later, progress=False)):
        for layer in (model.first, model.second):
            made = layer.row.made(layer.factors_now(), layer.weight, layer.scale)
            assert method != "vera" or (made.up @ made.down).norm() > 0
            ones = torch.ones(layer.out_features)
            torch.testing.assert_close(layer.parts().gain.values, ones, rtol=1e-5, atol=0)
        shift(model)
        model(x)
        given.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dora, "constants", None)  # they are kept, and not asked for again
            close([model(x)], [formula(model.second, torch.tanh(formula(model.first, x)))], 1e-5)
        assert [len(one.of_weight) for one in given] == [N, K]
        row, factors = model.first.row, model.first.factors_now()
        frozen = not any(factors[name].requires_grad for name in row.down_of)
        assert all((one.with_down is not None) == frozen for one in given)


@pytest.mark.parametrize("method", ["vera", "nola"])
def test_constants_of_weights_that_are_gone_are_not_kept(method: str) -> None:
    """Beside factors that stay: a layer may get another weight as often as it likes."""
    layer, x = layer_of(method, train=("b", "magnitude")), torch.randn(3, K)
    for _ in range(3):
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        layer(x)
    key = getattr(layer, layer.row.down_of[0])
    assert len(dora.KEPT[key]) <= 2  # the last of those that are gone may be there until the next


def test_patterns_and_rslora() -> None:
    """Settings of adapt compose with it."""
    model = adapted(Net(), "lora", use_rslora=True, rank_pattern={"second": 2}, alpha=8)
    assert (model.first.r, model.second.r) == (4, 2)
    assert model.first.scale == pytest.approx(8 / 2)
    x = torch.randn(M, K)
    close([model.first(x)], [formula(model.first, x)], 1e-5)
