"""What can be done with an adapted model: unload, disable, merge, modules to save, meta devices."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_model import SETTINGS, VOCABULARY, D, Tiny, methods, same, train
from torch import nn

from fused_lowrank import adapt, disable_adapters, init_bases, merge, save_adapter, unload, unmerge
from fused_lowrank.methods import METHODS, LowRankLinear


@pytest.fixture
def ids(device: torch.device) -> torch.Tensor:
    """Inputs."""
    return torch.arange(VOCABULARY, device=device)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unload(method: str, dtype: torch.dtype, device: torch.device, ids: torch.Tensor) -> None:
    """The outputs of before, bit for bit, and the same Parameters; also merged before."""
    model = Tiny().to(device, dtype).eval()
    y, state = model(ids), copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    adapt(model, method, target_modules="all-linear", modules_to_save=["head"], **SETTINGS[method])
    model.norm.eval().requires_grad_(False)
    train(model, ids)
    model.norm.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("norm.")})
    assert not torch.allclose(model(ids), y)
    if dtype == torch.float32:
        merge(model)
    assert unload(model) is model
    assert same(model.state_dict(), state)
    assert torch.equal(model(ids), y)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    assert adapt(model, method, target_modules=["up"], **SETTINGS[method]) is model


@methods
def test_unload_merged(method: str, device: torch.device, ids: torch.Tensor) -> None:
    """unload(merge=True) leaves a plain model that computes what the adapted one did."""
    model = Tiny().to(device).eval()
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapt(model, method, target_modules=["up"], modules_to_save=["head"], **SETTINGS[method])
    train(model, ids, 5)
    y = model(ids)
    unload(model, merge=True)
    assert type(model.body.up) is nn.Linear
    torch.testing.assert_close(model(ids), y, rtol=1e-4, atol=1e-5)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, originals[n])}
    assert changed == {"body.up.weight", "head.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_disable_adapters(tied: bool, device: torch.device, ids: torch.Tensor) -> None:
    """Inside it is the model of before, also nested, merged, and after an exception inside."""
    model = Tiny(tied).to(device).eval()
    y = model(ids)
    saved = ["head", "norm"]
    adapt(model, "lora", target_modules=["up", "down"], modules_to_save=saved, r=4)
    train(model, ids)
    trained, state = model(ids), copy.deepcopy(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert not torch.allclose(trained, y)
    with disable_adapters(model) as inside:
        assert inside is model
        assert torch.equal(model(ids), y)
        with disable_adapters(model):
            assert torch.equal(model(ids), y)
        assert torch.equal(model(ids), y)
    assert torch.equal(model(ids), trained)
    with pytest.raises(KeyError), disable_adapters(model):
        raise KeyError
    assert torch.equal(model(ids), trained)
    assert same(model.state_dict(), state)
    assert parameters == {name: id(p) for name, p in model.named_parameters()}
    merge(model)
    with disable_adapters(model):
        assert torch.equal(model(ids), y)
    unload(model)
    assert torch.equal(model(ids), y)


def test_disable_adapters_within_a_step(device: torch.device, ids: torch.Tensor) -> None:
    """A reference forward between forward and backward leaves the gradients as they are."""
    model = Tiny().to(device).eval()
    adapt(model, target_modules=["up"], modules_to_save=["head"], r=4)
    gradients = []
    for reference in (False, True):
        model.zero_grad()
        y = model(ids)
        if reference:
            with disable_adapters(model):
                assert not model(ids).requires_grad
                y.square().sum().backward()
        else:
            y.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_modules_to_save(device: torch.device, ids: torch.Tensor) -> None:
    """They are trained whole, one inside another too, and are not adapted."""
    model = Tiny().to(device).eval()
    values = copy.deepcopy(model.body.state_dict())
    adapt(model, target_modules=["head"], modules_to_save=["body", "down"], r=4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = {f"body.{name}.{part}" for name in ("up", "down") for part in ("weight", "bias")}
    assert trained == {"head.core", *parts}
    train(model, ids)
    after = copy.deepcopy(model.body.state_dict())
    assert not same(after, values)
    for _ in range(2):
        with disable_adapters(model):
            assert same(dict(model.body.named_parameters()), values)
        assert same(model.body.state_dict(), after)
    model = Tiny()
    adapt(model, target_modules=["up", "down"], modules_to_save=["down"], r=4)
    assert type(model.body.down) is nn.Linear


@pytest.mark.parametrize("tied", [False, True])
def test_merge_model(tied: bool, device: torch.device, ids: torch.Tensor) -> None:
    """merge acts on every layer; a weight tied to another module keeps its values there."""
    model = Tiny(tied).to(device).eval()
    adapt(model, "lora", target_modules=["up", "head"], r=4)
    train(model, ids)
    y, values = model(ids), model.embed.weight.detach().clone()
    if tied:
        with pytest.warns(UserWarning, match="weights of head were tied") as caught:
            assert merge(model) is model
        assert caught[0].filename == __file__
    else:
        merge(model)
    assert model.head.merged
    assert torch.equal(model.embed.weight, values)
    assert model.head.weight is not model.embed.weight
    torch.testing.assert_close(model(ids), y, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert (model.head.weight is model.embed.weight) == tied
    assert torch.equal(model(ids), y)


def test_merge_model_says_what_is_lost(device: torch.device) -> None:
    """One warning for all layers, of the worst."""
    model = Tiny().to(device, torch.bfloat16)
    adapt(model, target_modules=["up", "head"], r=4)
    nn.init.normal_(model.body.up.core)
    nn.init.normal_(model.head.core, std=1e-3)
    clone = copy.deepcopy(model.head)
    with pytest.warns(UserWarning, match="lost"):
        lost = clone.merge()
    with pytest.warns(UserWarning, match="lost") as caught:
        merge(model)
    assert len(caught) == 1
    assert f"{lost:.2%}" in str(caught[0].message)
    assert "in head" in str(caught[0].message)


# --- models on the meta device ---


@methods
@pytest.mark.parametrize("built_adapted", [False, True])
def test_init_bases(
    method: str, built_adapted: bool, device: torch.device, ids: torch.Tensor
) -> None:
    """Made on the meta device, loaded, initialised: the same as adapting the loaded model."""
    if built_adapted and METHODS[method][1].row.shared:
        pytest.skip("layers that are built alone share nothing")
    loaded = Tiny().to(device)
    weights = copy.deepcopy(loaded.state_dict())
    keywords = {"target_modules": ["up", "down"], "progress": False}
    adapt(loaded, method, **keywords, **SETTINGS[method])

    with torch.device("meta"):
        model = Tiny()
    if built_adapted:
        cls = METHODS[method][1]
        model.body.up = cls(D, D + 4, device="meta", **SETTINGS[method])
        model.body.down = cls(D + 4, D, device="meta", **SETTINGS[method])
    else:
        adapt(model, method, defer_bases=True, **keywords, **SETTINGS[method])
    with pytest.raises(ValueError, match=r"body\.up\.weight is still on the meta device"):
        init_bases(model)
    model.to_empty(device=device)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert {name.rpartition(".")[2] for name in missing} == {
        name for name, factor in model.body.up.row.factors.items() if factor.saved
    }
    for refused in (model, lambda _: model.body.up.merge(), lambda _: model.body.up.delta_weight()):
        with pytest.raises(RuntimeError, match="init_bases"):
            refused(ids)
    torch.manual_seed(3)
    assert init_bases(model, progress=False) is model
    torch.manual_seed(3)
    for name in ("up", "down"):
        loaded.body.get_submodule(name).init_factors()
    assert same(model.state_dict(), loaded.state_dict())
    assert torch.equal(model.eval()(ids), loaded.eval()(ids))
    init_bases(model)
    assert same(model.state_dict(), loaded.state_dict())
    trained = [(name, p.requires_grad) for name, p in model.body.named_parameters()]
    assert trained == [(name, p.requires_grad) for name, p in loaded.body.named_parameters()]


def test_load_state_dict_initialises(device: torch.device, ids: torch.Tensor) -> None:
    """A state_dict that holds the factors makes init_bases unnecessary, and harmless."""
    loaded = adapt(Tiny().to(device), "lora_mini", target_modules=["up"], **SETTINGS["lora_mini"])
    for assign in (False, True):
        with torch.device("meta"):
            model = Tiny()
        adapt(model, "lora_mini", target_modules=["up"], defer_bases=True, **SETTINGS["lora_mini"])
        if not assign:
            model.to_empty(device=device)
        model.load_state_dict(copy.deepcopy(loaded.state_dict()), assign=assign)
        init_bases(model)
        assert torch.equal(model.eval()(ids), loaded.eval()(ids))


def test_meta_refused(tmp_path: Path) -> None:
    """Without defer_bases a model on the meta device is refused, and none is saved unfinished."""
    with torch.device("meta"):
        model = Tiny()
    with pytest.raises(
        ValueError, match=r"body\.up has its weight on the meta device.*defer_bases"
    ):
        adapt(model, target_modules=["up"], r=4)
    assert all(p.requires_grad for p in model.parameters())
    adapt(model, target_modules=["up"], r=4, defer_bases=True)
    for prepare in (lambda: model, lambda: model.to_empty(device="cpu")):
        with pytest.raises(ValueError, match=r"body\.up.*init_bases"):
            save_adapter(prepare(), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
