"""Keywords and ranks: what others call them, integers of any kind, and what is refused."""

import inspect
import json

import numpy as np
import pytest
import torch
from torch import nn

from fused_lowrank import (
    AdapterBank,
    FusedLoraLinear,
    FusedLoraMiniLinear,
    FusedLoraXSLinear,
    LoraXSLinear,
    adapt,
    load_adapter,
    save_adapter,
)

LAYERS = (FusedLoraLinear, FusedLoraXSLinear, FusedLoraMiniLinear)


SIZES = [("in_features", inspect.Parameter.empty), ("out_features", inspect.Parameter.empty)]
SIZES += [("bias", True)]
DORA = ("dora", False)
REST = [("impl", None), ("device", None), ("dtype", None), ("_linear", None), ("_defer", False)]
REST += [("_inputs", None)]
SCALE = [("alpha", None), ("dropout", 0.0), ("rank_dropout", 0.0)]
CONSTRUCTORS = {
    FusedLoraLinear: [("r", 16), *SCALE, ("init", "kaiming"), ("train", ("down", "up"))],
    FusedLoraXSLinear: [
        *(("r", 16), *SCALE, ("init", "svd"), ("train", ("core",)), ("svd", "krylov")),
    ],
    FusedLoraMiniLinear: [
        *(("r", 8), ("a", 64), ("b", 64), *SCALE),
        *(("init", "identity"), ("train", ("a_train", "b_train"))),
    ],
}


@pytest.mark.parametrize("cls", LAYERS)
def test_constructors_say_what_they_take(cls) -> None:
    """All keywords and their defaults, where help() and editors look, whoever has stated them."""
    parameters = inspect.signature(cls).parameters.values()
    assert [(p.name, p.default) for p in parameters] == [*SIZES, *CONSTRUCTORS[cls], DORA, *REST]
    assert str(inspect.signature(cls.__base__)) == str(inspect.signature(cls))
    assert "alpha: 'float | None' = None" in str(inspect.signature(cls))
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters)[3:])


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("wrong", ["rank", "shapes", "defer"])
def test_constructors_refuse_what_they_do_not_take(cls, wrong) -> None:
    """Before anything is looked at: of a small layer, too, whose ranks are not given."""
    said = rf"^{cls.__base__.__name__}\.__init__\(\) got an unexpected keyword argument '{wrong}'$"
    with pytest.raises(TypeError, match=said):
        cls(4, 4, **{wrong: 2})
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'out_features'"):
        cls(4, r=2)


@pytest.mark.parametrize("cls", LAYERS)
def test_a_warning_points_to_the_constructors_caller(cls) -> None:
    with pytest.warns(UserWarning, match="alpha") as warned:
        cls(64, 64, r=4, alpha=0.0)
    assert warned[0].filename == __file__


def two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor, int])
@pytest.mark.parametrize("target", ["all-linear", ["0", "2"]])
def test_ranks_are_integers_of_any_kind(kind, target, tmp_path) -> None:
    keywords = {"r": kind(4), "a": kind(8), "b": kind(12), "alpha": np.float32(3.0)}
    model = adapt(two(), "lora_mini", target_modules=target, progress=False, **keywords)
    settings = model[0].settings()
    assert {name: settings[name] for name in ("r", "a", "b")} == {"r": 4, "a": 8, "b": 12}
    assert all(type(settings[name]) is int for name in ("r", "a", "b"))
    save_adapter(model, tmp_path / "adapter")
    assert load_adapter(two_of(model), tmp_path / "adapter", progress=False)[0].r == 4
    bank = AdapterBank.from_model(model, slots=kind(3))
    assert bank.slots == 3


def two_of(model: nn.Sequential) -> nn.Sequential:
    plain = two()
    for i in (0, 2):
        plain[i].weight, plain[i].bias = model[i].weight, model[i].bias
    return plain


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("rank", [True, np.True_, 4.0, np.float64(4), "4", None, [4]])
def test_what_is_no_integer_is_no_rank(cls, rank) -> None:
    said = r"r is .*: it must be an integer"
    with pytest.raises(ValueError, match=said):
        cls(64, 64, r=rank)
    with pytest.raises(ValueError, match=said):
        cls.from_linear(nn.Linear(64, 64), r=rank)
    for target in ("all-linear", ["0"]):
        with pytest.raises(ValueError, match=said):
            adapt(two(), cls.method, target_modules=target, r=rank, progress=False)
    model = adapt(two(), "lora_xs", target_modules=["0"], r=2, progress=False)
    with pytest.raises(ValueError, match=said.replace("r is", "slots is")):
        AdapterBank.from_model(model, slots=rank)


@pytest.mark.parametrize("method", ["lora", "lora_xs", "lora_mini"])
@pytest.mark.parametrize(
    ("keyword", "said"),
    [
        ("lora_alpha", "it is called alpha"),
        ("lora_dropout", "it is called dropout"),
        ("bias", "train names them"),
        ("rank", "it is called r"),
        ("device", "stays where"),
        ("droput", r"did you mean dropout\?"),
        ("nonsense", "has no keyword 'nonsense'. It has r, "),
    ],
)
def test_an_unknown_keyword_says_which_is_meant(method, keyword, said) -> None:
    model = two()
    with pytest.raises(TypeError, match=said) as caught:
        adapt(model, method, target_modules=["0"], progress=False, **{keyword: 8})
    assert "It has r, " in str(caught.value)
    assert "alpha, dropout" in str(caught.value)
    assert "_linear" not in str(caught.value)
    assert type(model[0]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(
    ("keyword", "said"),
    [
        ("use_rslora", "adapt takes it; of one layer it is alpha = lora_alpha·√r"),
        ("rank_pattern", "adapt takes it; one layer has one r"),
        ("alpha_pattern", "adapt takes it; one layer has one alpha"),
        ("layers_to_transform", "adapt takes it"),
        ("layers_pattern", "adapt takes it"),
        ("rank_dropout_scale", "rank_dropout scales"),
        ("deltaT", "it is RankBudget's"),
        ("orth_reg_weight", r"it is what the loss adds orthogonality\(model\) times"),
        ("eva_config", "adapt takes the batches that init='eva' needs, as data"),
    ],
)
def test_what_only_a_whole_model_has(cls, keyword, said) -> None:
    with pytest.raises(TypeError, match=f"{cls.method} has no keyword '{keyword}': {said}"):
        cls.from_linear(nn.Linear(16, 16), **{keyword: 8})


def test_a_keyword_of_another_method_lists_what_this_one_has() -> None:
    with pytest.raises(TypeError, match=r"lora_xs has no keyword 'a'.* It has r, .*svd"):
        adapt(two(), "lora_xs", target_modules=["0"], a=8, progress=False)
    with pytest.raises(TypeError, match=r"lora_mini has no keyword 'svd'.* It has r, a, b, "):
        adapt(two(), "lora_mini", target_modules=["0"], svd="exact", progress=False)
    with pytest.raises(TypeError, match="it is called alpha"):
        LoraXSLinear.from_linear(nn.Linear(16, 16), lora_alpha=8)


def test_ranks_of_peft_configs(tmp_path) -> None:
    pytest.importorskip("peft")
    from fused_lowrank.integrations.peft import LoraMiniConfig, LoraXSConfig

    config = LoraMiniConfig(
        r=np.int64(4),
        a=np.int32(8),
        b=np.uint8(12),
        lora_alpha=np.float32(2.5),
        rank_pattern={"0": np.int64(2)},
        alpha_pattern={"0": np.float32(1.5)},
        projection_seed=np.int64(7),
        lora_dropout=np.float32(0.5),
        layers_to_transform=[np.int64(1)],
    )
    config.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (kept["r"], kept["a"], kept["b"], kept["projection_seed"]) == (4, 8, 12, 7)
    assert (kept["lora_alpha"], kept["rank_pattern"], kept["alpha_pattern"]) == (
        2.5,
        {"0": 2},
        {"0": 1.5},
    )
    assert (kept["lora_dropout"], kept["layers_to_transform"]) == (0.5, [1])
    assert LoraXSConfig(layers_to_transform=np.int64(1)).layers_to_transform == 1
    with pytest.raises(ValueError, match=r"lora_dropout is '0\.1': it must be a finite number"):
        LoraXSConfig(lora_dropout="0.1")
    for rank in (True, 4.0, "4", None):
        with pytest.raises(ValueError, match=r"r is .*: it must be an integer"):
            LoraXSConfig(r=rank)
        with pytest.raises(ValueError, match=r"rank_pattern\['0'\] is .*: it must be an integer"):
            LoraXSConfig(r=4, rank_pattern={"0": rank})
    for alpha in (float("nan"), float("inf"), "16", True, [1]):
        with pytest.raises(ValueError, match=r"lora_alpha is .*: it must be a finite number"):
            LoraXSConfig(r=4, lora_alpha=alpha)
        with pytest.raises(ValueError, match=r"alpha_pattern\['0'\] is .*: it must be a finite"):
            LoraXSConfig(r=4, alpha_pattern={"0": alpha})
