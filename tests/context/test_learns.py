"""What could never learn, or loses what it learns, is said before the training, once."""

import warnings

import pytest
import torch
from torch import nn

from fused_lowrank import (
    AdapterBank,
    FusedLoraMiniLinear,
    FusedLoraXSLinear,
    adapt,
    init_bases,
    load_adapter,
    save_adapter,
)

METHODS = {"lora": {"r": 2}, "lora_xs": {"r": 2}, "lora_mini": {"r": 2, "a": 4, "b": 4}}
NAMES = ["0", "2"]


def two(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).to(dtype)


def adapted(model: nn.Module, method: str = "lora_xs", **keywords) -> nn.Module:
    keywords = {"target_modules": NAMES, **METHODS[method], **keywords}
    return adapt(model, method, progress=False, **keywords)


def said(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    assert all(w.filename == __file__ for w in caught), [w.filename for w in caught]
    return [str(w.message) for w in caught]


# --- a scale of 0 ---


@pytest.mark.parametrize("method", METHODS)
def test_alpha_of_0_is_said_once_for_all_layers(method) -> None:
    (one,) = said(lambda: adapted(two(), method, alpha=0))
    assert one.startswith("alpha is 0 in 0, 2: ")
    assert "nothing is ever learned" in one
    assert not said(lambda: adapted(two(), method, alpha=1e-30))


def test_alpha_of_0_of_layers() -> None:
    for make in (
        lambda: FusedLoraXSLinear(16, 16, r=2, alpha=0),
        lambda: FusedLoraXSLinear.from_linear(nn.Linear(16, 16), r=2, alpha=0.0),
    ):
        (one,) = said(make)
        assert one.startswith("alpha is 0 in this layer: ")
    biased = {"r": 2, "alpha": 0, "train": ("bias",)}
    assert not said(lambda: FusedLoraMiniLinear.from_linear(nn.Linear(16, 16), **biased, a=4, b=4))


def test_a_scale_of_0_loads(tmp_path) -> None:
    with pytest.warns(UserWarning, match="alpha is 0"):
        model = adapted(two(), alpha=0)
    save_adapter(model, tmp_path / "whole")
    save_adapter(model, tmp_path / "lean", bases=False)
    for file in ("whole", "lean"):
        assert not said(lambda file=file: load_adapter(two(), tmp_path / file, progress=False))
    bank = AdapterBank.from_model(adapted(two()), slots=2)
    assert not said(lambda: bank.add("zero", tmp_path / "whole"))


# --- weights of zeros, and of no numbers ---


def zeroed(*names: str) -> nn.Sequential:
    model = two()
    for name in names:
        nn.init.zeros_(model.get_submodule(name).weight)
    return model


def test_weights_of_zeros_under_lora_xs() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        (one,) = said(lambda dtype=dtype: adapted(zeroed("0").to(dtype)))
        assert one.startswith("the frozen factors of 0 are zero")
    (one,) = said(lambda: adapted(zeroed(*NAMES), svd="exact"))
    assert "of 0, 2 are zero" in one
    for method in ("lora", "lora_mini"):
        assert not said(lambda method=method: adapted(zeroed(*NAMES), method))
    (one,) = said(lambda: FusedLoraXSLinear.from_linear(zeroed("0")[0], r=2))
    assert "of this layer are zero" in one
    assert not said(lambda: adapted(zeroed("0"), train=("down", "core", "up")))


def test_weights_of_zeros_that_come_later(tmp_path) -> None:
    def late() -> None:
        with torch.device("meta"):
            model = two()
        adapted(model, defer_bases=True)
        model.to_empty(device="cpu")
        with torch.no_grad():
            model[0].weight.zero_()
            model[2].weight.fill_(1.0)
        init_bases(model, progress=False)

    (one,) = said(late)
    assert one.startswith("the frozen factors of 0 are zero")
    with pytest.warns(UserWarning, match="are zero"):
        save_adapter(adapted(zeroed("0")), tmp_path / "file")
    assert not said(lambda: load_adapter(zeroed("0"), tmp_path / "file", progress=False))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("svd", ["randomized", "exact"])
def test_a_weight_that_is_not_finite_is_refused_by_name(value, svd) -> None:
    model = two()
    with torch.no_grad():
        model[2].weight[3, 5] = value
    with pytest.raises(ValueError, match=r"^2: the weight holds NaN or Inf"):
        adapted(model, svd=svd)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad
    adapted(model, "lora")  # takes nothing from the weight
    model = adapted(two(), defer_bases=True)
    with torch.no_grad():
        model[0].weight[0, 0] = value
    with pytest.raises(ValueError, match=r"^0: the weight holds NaN or Inf"):
        init_bases(model, progress=False)


def test_singular_values_beyond_the_dtype() -> None:
    model = two(torch.float16)
    with torch.no_grad():
        model[0].weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"^0: the weight's singular values are more than"):
        adapted(model)


# --- trained in 16 bits ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_trained_in_16_bits_is_named(dtype) -> None:
    (one,) = said(lambda: adapted(two(dtype), train=("core", "bias")))
    assert one.startswith(f"0.bias, 2.bias are trained in {dtype}, ")
    assert ("GradScaler" in one) == (dtype == torch.float16)
    targets = {"target_modules": ["0"], "modules_to_save": ["2"]}
    (one,) = said(lambda: adapted(two(dtype), **targets))
    assert one.startswith("2.weight, 2.bias are trained in")
    (one,) = said(lambda: adapted(two(dtype), "lora", train=("up", "weight")))
    assert one.startswith("0.weight, 2.weight are trained in")
    assert not said(lambda: adapted(two(dtype), train=("down", "core")))
    assert not said(lambda: adapted(two(dtype), dtype=dtype))  # as it was asked for
    assert not said(lambda: adapted(two(), train=("core", "bias")))
    assert not said(lambda: adapted(two(), **targets))


# --- in PEFT ---


def through_peft(model: nn.Module, **keywords) -> nn.Module:
    peft = pytest.importorskip("peft")
    from fused_lowrank.integrations.peft import LoraXSConfig

    return peft.get_peft_model(model, LoraXSConfig(r=2, **{"target_modules": NAMES, **keywords}))


def heard(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught]


def test_peft_scales_of_0(tmp_path) -> None:
    (one,) = heard(lambda: through_peft(two(), lora_alpha=0))
    assert one.startswith("lora_alpha is 0 in 0, 2: ")
    (one,) = heard(lambda: through_peft(two(), alpha_pattern={"2": 0}))
    assert one.startswith("lora_alpha is 0 in 2: ")
    with pytest.warns(UserWarning, match="lora_alpha is 0"):
        through_peft(two(), lora_alpha=0).save_pretrained(tmp_path)
    peft = pytest.importorskip("peft")
    assert not heard(lambda: peft.PeftModel.from_pretrained(two(), tmp_path))
    assert not heard(lambda: load_adapter(two(), tmp_path, progress=False))


def test_peft_weights_of_zeros_and_of_no_numbers() -> None:
    (one,) = heard(lambda: through_peft(zeroed("2")))
    assert one.startswith("the frozen factors of 2 are zero")
    model = two()
    with torch.no_grad():
        model[2].weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"^2: the weight holds NaN or Inf"):
        through_peft(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_peft_what_is_trained_in_16_bits(dtype) -> None:
    for bias in ("all", "lora_only", "lora_xs_only"):
        (one,) = heard(lambda bias=bias: through_peft(two(dtype), bias=bias))
        assert "0.bias, 2.bias are trained in" in one
    (one,) = heard(lambda: through_peft(two(dtype), target_modules=["0"], modules_to_save=["2"]))
    assert one.startswith("2.weight, 2.bias are trained in")
    assert not heard(lambda: through_peft(two(dtype)))
