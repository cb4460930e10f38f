"""Adapters over a base that they were not made for: refused, or loaded where that is asked for."""

import copy
import warnings

import pytest
import torch
from torch import nn

from fused_lowrank import AdapterBank, adapt, load_adapter, save_adapter, unload

METHODS = {"lora": {"r": 2}, "lora_xs": {"r": 2}, "lora_mini": {"r": 2, "a": 4, "b": 4}}
X = torch.randn(3, 16)
SAID = "^.* was made for another base model: the weights of 0, 2 differ"


def base(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))


def moved(model: nn.Module) -> nn.Module:
    """The base as it is after more training."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def adapted(method: str) -> nn.Module:
    model = adapt(base(), method, target_modules=["0", "2"], progress=False, **METHODS[method])
    for layer in (model[0], model[2]):
        for factor in layer.trained_factors:
            nn.init.normal_(factor)
    return model


def silent(action):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return action()


@pytest.mark.parametrize("method", METHODS)
def test_load_adapter_over_another_base(method, tmp_path) -> None:
    model, file, other = adapted(method), tmp_path / "file", moved(base())
    save_adapter(model, file)
    for way in ({}, {"on_other_base": "refuse"}):
        with pytest.raises(ValueError, match=r"another base model.*on_other_base='warn'"):
            load_adapter(copy.deepcopy(other), file, progress=False, **way)
    with pytest.warns(UserWarning, match=SAID) as caught:
        loaded = load_adapter(copy.deepcopy(other), file, progress=False, on_other_base="warn")
    assert [(len(caught), w.filename) for w in caught] == [(1, __file__)]
    for i in (0, 2):
        assert torch.equal(loaded[i].delta_weight(), model[i].delta_weight())
        assert torch.equal(loaded[i].weight, other[i].weight)
    with pytest.raises(ValueError, match="another base model"):  # it was for that call alone
        load_adapter(copy.deepcopy(other), file, progress=False)
    silent(lambda: load_adapter(base(), file, progress=False, on_other_base="warn"))
    save_adapter(loaded, file)  # from now on it is of the other base
    silent(lambda: load_adapter(copy.deepcopy(other), file, progress=False))


@pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])
def test_over_a_merged_base_and_into_an_adapted_model(method, tmp_path) -> None:
    model, file = adapted(method), tmp_path / "file"
    save_adapter(model, file)
    merged = unload(copy.deepcopy(model), merge=True)
    with pytest.warns(UserWarning, match=SAID):
        loaded = load_adapter(merged, file, progress=False, on_other_base="warn")
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(loaded, file)
    with pytest.warns(UserWarning, match=SAID):
        load_adapter(loaded, file, on_other_base="warn")
    assert torch.equal(loaded[0].down, model[0].down)


@pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])
def test_without_its_frozen_factors_it_stays_refused(method, tmp_path) -> None:
    save_adapter(adapted(method), tmp_path / "lean", bases=False)
    other = moved(base())
    weights = [other[0].weight, other[2].weight]
    with pytest.raises(ValueError, match=r"comes without its frozen factors$"):
        load_adapter(other, tmp_path / "lean", progress=False, on_other_base="warn")
    assert [other[0].weight, other[2].weight] == weights


def test_other_words_are_refused(tmp_path) -> None:
    save_adapter(adapted("lora"), tmp_path / "file")
    for word in ("ignore", True, "WARN"):
        with pytest.raises(ValueError, match=r"on_other_base is .*: it must be 'refuse' or 'warn'"):
            load_adapter(base(), tmp_path / "file", on_other_base=word)


def test_what_does_not_fit_stays_an_error(tmp_path) -> None:
    save_adapter(adapted("lora_xs"), tmp_path / "file")
    wider = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(wider, tmp_path / "file", progress=False, on_other_base="warn")


@pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])
def test_banks_over_another_base(method, tmp_path) -> None:
    alice = adapted(method)
    bob = copy.deepcopy(alice)
    for layer in (bob[0], bob[2]):
        for factor in layer.trained_factors:
            nn.init.normal_(factor)
    save_adapter(alice, tmp_path / "alice")
    save_adapter(bob, tmp_path / "bob")
    one = AdapterBank.from_model(alice, slots=4)
    one.add("bob", bob)
    one.save(tmp_path / "all")
    with pytest.warns(UserWarning, match=SAID):
        model = load_adapter(
            moved(base()), tmp_path / "alice", progress=False, on_other_base="warn"
        )
    bank = AdapterBank.from_model(model, slots=4)
    for source in (tmp_path / "bob", bob, bob.state_dict()):
        with pytest.raises(ValueError, match=r"made for another base: .*on_other_base='warn'"):
            bank.add("bob", source)
        with pytest.warns(UserWarning, match=SAID) as caught:
            bank.add("bob", source, on_other_base="warn")
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match=SAID):
            bank.replace("bob", source, on_other_base="warn")
        with bank.use("bob"):
            y = model(X)
        expected = copy.deepcopy(bob)
        for i in (0, 2):
            expected[i].weight, expected[i].bias = model[i].weight, model[i].bias
        torch.testing.assert_close(y, expected(X))
        bank.remove("bob")
    with pytest.raises(ValueError, match="made for another base"):
        bank.load(tmp_path / "all", progress=False)
    with pytest.warns(UserWarning, match=SAID):
        bank.load(tmp_path / "all", progress=False, on_other_base="warn")
    assert bank.names == ["bob"]
    stranger = adapted(method)
    for layer in (stranger[0], stranger[2]):
        nn.init.normal_(layer.down)
    with pytest.raises(ValueError, match="down of 0 is not the bank's"):
        bank.add("stranger", stranger, on_other_base="warn")


# --- in PEFT ---


def of_peft(method: str, model: nn.Module, **more) -> nn.Module:
    peft = pytest.importorskip("peft")
    from fused_lowrank.integrations.peft import LoraMiniConfig, LoraXSConfig

    kind = LoraXSConfig if method == "lora_xs" else LoraMiniConfig
    keywords = {"target_modules": ["0", "2"], "init_weights": False, **METHODS[method], **more}
    return peft.get_peft_model(model, kind(**keywords)).eval()


@pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])
def test_peft_over_another_base(method, tmp_path) -> None:
    peft, other = pytest.importorskip("peft"), moved(base())
    model = of_peft(method, base())
    model.save_pretrained(tmp_path)
    load = peft.PeftModel.from_pretrained
    for way in ({}, {"on_other_base": "refuse"}):
        with pytest.raises(ValueError, match=r"another base model.*on_other_base='warn'"):
            load(copy.deepcopy(other), tmp_path, **way)
    with pytest.warns(UserWarning, match=r"the weights of .*0, .*2 differ") as caught:
        loaded = load(copy.deepcopy(other), tmp_path, on_other_base="warn")
    assert [(len(caught), w.filename) for w in caught] == [(1, __file__)]
    for i in (0, 2):
        mine, theirs = (m.base_model.model[i].get_delta_weight("default") for m in (loaded, model))
        torch.testing.assert_close(mine, theirs)
    with pytest.raises(ValueError, match="another base model"):
        loaded.load_adapter(tmp_path, "again")
    with pytest.warns(UserWarning, match=r"the weights of .*0, .*2 differ"):
        loaded.load_adapter(tmp_path, "again", on_other_base="warn")
    loaded.set_adapter("again")
    assert not torch.equal(loaded(X), other(X))
    silent(lambda: load(base(), tmp_path, on_other_base="warn"))
    with pytest.raises(ValueError, match="on_other_base is 'no'"):
        load(base(), tmp_path, on_other_base="no")


@pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])
@pytest.mark.filterwarnings("ignore:save_projection")
def test_peft_without_its_frozen_factors(method, tmp_path) -> None:
    peft, other = pytest.importorskip("peft"), moved(base())
    of_peft(method, base(), save_projection=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"comes without its frozen factors$"):
        peft.PeftModel.from_pretrained(other, tmp_path, on_other_base="warn")
    assert type(other[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"comes without its frozen factors$"):
        load_adapter(other, tmp_path, progress=False, on_other_base="warn")
