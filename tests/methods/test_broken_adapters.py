"""Adapters that hold NaN or Inf, and sums that their dtype cannot hold: merging and saving."""

import math
import warnings

import pytest
import torch
from torch import nn

from fused_lowrank import adapt, export_lora, load_adapter, merge, save_adapter, unload, unmerge
from fused_lowrank.methods.merging import lost_to_rounding, why_not_finite

METHODS = {"lora": {"r": 2}, "lora_xs": {"r": 2}, "lora_mini": {"r": 2, "a": 4, "b": 4}}
LAST = {"lora": "up", "lora_xs": "core", "lora_mini": "b_train"}
X = torch.randn(3, 16)


def two(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).to(dtype)


def adapted(method: str = "lora_xs", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = adapt(two(dtype), method, target_modules=["0", "2"], progress=False, **METHODS[method])
    for layer in (model[0], model[2]):
        nn.init.normal_(getattr(layer, LAST[method]))
    return model


def spoil(tensor: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[1] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_broken_adapter_is_refused(value, method, dtype) -> None:
    model = adapted(method, dtype)
    spoil(getattr(model[2], LAST[method]), value)
    weights = [model[0].weight, model[2].weight]
    for act in (merge, lambda m: unload(m, merge=True)):
        with pytest.raises(ValueError, match=r"^2: cannot merge: the adapter holds NaN or Inf"):
            act(model)
        assert [model[0].weight, model[2].weight] == weights
        assert not model[0].merged
        assert model[0].method == method
    with pytest.raises(ValueError, match="cannot merge: the adapter holds"):
        model[2].merge()
    spoil(getattr(model[2], LAST[method]), 0.0)
    merge(unmerge(model))


def test_a_layer_merged_before_stays_so_when_another_is_refused() -> None:
    model = adapted()
    model[0].merge()
    spoil(model[2].core, math.nan)
    with pytest.raises(ValueError, match=r"^2: "):
        merge(model)
    assert model[0].merged
    assert not model[2].merged


def test_a_sum_beyond_float16_is_refused_clearly() -> None:
    model = adapted("lora", torch.float16)
    with torch.no_grad():
        model[0].up.fill_(3e4)
        model[0].down.fill_(3.0)
    with pytest.raises(ValueError, match=r"^0: cannot merge: W \+ ΔW is more than torch.float16"):
        merge(model)
    assert not model[2].merged


def test_a_base_weight_that_is_not_finite_is_not_the_adapters_fault() -> None:
    model = adapted("lora", torch.bfloat16)
    spoil(model[0].weight, math.inf)
    with pytest.warns(UserWarning, match=r"merging lost up to 0\.\d+%"):
        merge(model)
    assert model[0].weight.isinf().sum() == 1


def test_what_is_lost() -> None:
    one = torch.ones(2, 2)
    assert lost_to_rounding(torch.zeros(2, 2), one, one) == 0.0
    assert lost_to_rounding(one, one, one) == 1.0
    assert math.isnan(lost_to_rounding(one * math.nan, one, one))
    assert why_not_finite(one, one, 2 * one) is None
    nothing = torch.empty(0, 4)
    assert why_not_finite(nothing, nothing, nothing) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_saving_a_broken_adapter_is_warned_of(value, tmp_path) -> None:
    model = adapted()
    spoil(model[2].core, value)
    with pytest.warns(UserWarning, match=r"^what is saved of 2 holds NaN or Inf") as caught:
        save_adapter(model, tmp_path / "file")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    fresh = load_adapter(two(), tmp_path / "file", progress=False)  # the state comes back
    assert torch.equal(fresh[2].core.isfinite(), model[2].core.isfinite())
    with pytest.raises(ValueError, match="NaN"):
        export_lora(model, tmp_path / "folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(adapted(), tmp_path / "file")


def through_peft(name: str = "LoraXSConfig", dtype: torch.dtype = torch.float32) -> nn.Module:
    peft = pytest.importorskip("peft")
    import fused_lowrank.integrations.peft as ours

    sides = {"a": 4, "b": 4} if "Mini" in name else {}
    config = getattr(ours, name)(r=2, target_modules=["0", "2"], init_weights=False, **sides)
    return peft.get_peft_model(two(dtype), config)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["LoraXSConfig", "LoraMiniConfig"])
def test_peft_merging_a_broken_adapter(value, name, tmp_path) -> None:
    model = through_peft(name)
    layers = [model.base_model.model[i] for i in (0, 2)]
    weights = [layer.base_layer.weight for layer in layers]
    spoil(layers[1].trained_factors("default")[-1], value)
    for act in (
        lambda: model.merge_adapter(safe_merge=True),
        lambda: model.merge_and_unload(safe_merge=True),
        lambda: model.merge_and_unload(safe_merge=True, adapter_names=["default"]),
    ):
        with pytest.raises(ValueError, match=r"NaNs detected .* \(in 2\)"):
            act()
        assert [layer.base_layer.weight for layer in layers] == weights
        assert not any(layer.merged for layer in layers)
    with pytest.warns(UserWarning, match=r"^the merged weights of 2 hold NaN or Inf"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match=r"what is saved of .*2.* holds NaN or Inf"):
        model.save_pretrained(tmp_path)


def test_peft_sums_beyond_float16() -> None:
    model = through_peft(dtype=torch.float16)
    with torch.no_grad():
        model.base_model.model[0].trained_factors("default")[0].fill_(1e7)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    with pytest.warns(UserWarning, match="merged weights of 0 hold NaN or Inf") as caught:
        model.merge_adapter()
    assert not any("inf%" in str(w.message) for w in caught)
