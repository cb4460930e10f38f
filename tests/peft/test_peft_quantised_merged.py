"""Merging by PEFT into weights that are quantised: as native layers do it, and back."""

import warnings
from typing import Any

import pytest
import torch
from base_cases import KINDS, inputs, model_of, needs, shifted
from peft_base_cases import config, layers_of, tuned

from fused_lowrank.methods.accept import base_of

pytest.importorskip("peft")
merging = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=needs(KINDS[k][1])) for k in ("nf4", "int8", "torchao-int8")]
)


def values(layer: Any) -> torch.Tensor:
    """W as the base layer has it."""
    return base_of(layer.base_layer).values()


@merging
@pytest.mark.parametrize("method", ["lora_xs", "melora"])
def test_merged_and_back(kind: str, method: str) -> None:
    """One after the other is as both at once, from W; what is lost is said, and W comes back."""
    model, x = tuned(kind, method), inputs()
    model.add_adapter("two", config(method, lora_alpha=7.0))
    shifted(model)
    layers, y = layers_of(model), model(x).detach()
    modules, before = [own.base_layer for own in layers], [values(own) for own in layers]
    deltas = [own.get_delta_weight("default") + own.get_delta_weight("two") for own in layers]
    with pytest.warns(UserWarning, match=r"merging lost up to .*quantised anew, is .*% off W \+"):
        model.merge_adapter(["default"])
    model.merge_adapter(["two"])
    for layer, module, old, delta in zip(layers, modules, before, deltas, strict=True):
        whole = old.float() + delta
        assert layer.base_layer is module
        assert 0 < float((values(layer) - whole).norm() / whole.norm()) < 0.13
        assert torch.equal(layer.unmerged_weight.values(), old)
    apart = [values(own) for own in layers]
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="does not tell W"):
        tuned(kind, method).load_state_dict(state, strict=False)
    model.unmerge_adapter()
    assert all(torch.equal(values(own), old) for own, old in zip(layers, before, strict=True))
    torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=0)
    model.merge_adapter(["default", "two"])
    for layer, one in zip(layers, apart, strict=True):
        torch.testing.assert_close(values(layer), one, rtol=0, atol=0)
    plain = model.merge_and_unload()
    assert [plain.first, plain.second] == modules


@merging
def test_the_same_as_natively(kind: str) -> None:
    """A merged layer computes what the adapter did, but for the quantising; disabled it is W's."""
    model, x = tuned(kind, "lora_mini"), inputs()
    y, layer = model(x).detach(), layers_of(model)[0]
    with model.disable_adapter():
        plain = model(x).detach()
    leaf = x.clone().requires_grad_()
    core = next(own for own in layer.factors_of("default").values() if own.requires_grad)
    (expected,) = torch.autograd.grad(model(x).sum(), core)
    pending = model(leaf).sum()
    model.merge_adapter()
    torch.testing.assert_close(torch.autograd.grad(pending, core)[0], expected)
    assert 0 < float((model(x).detach() - y).norm() / y.norm()) < 0.2
    with model.disable_adapter():
        torch.testing.assert_close(model(x).detach(), plain, rtol=0, atol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=0)


@merging
def test_not_finite(kind: str) -> None:
    """Refused with `safe_merge` or without, for what is quantised of it may look sound."""
    model = tuned(kind, "lora_mini")
    before = [values(own) for own in layers_of(model)]
    core = next(iter(layers_of(model)[1].factors_of("default").values()))
    with torch.no_grad():
        core.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter()
    assert not any(own.merged for own in layers_of(model))
    assert all(
        torch.equal(values(own), old) for own, old in zip(layers_of(model), before, strict=True)
    )


@merging
def test_its_own_state_dict(kind: str) -> None:
    """It loads, with what a 4-bit weight's bytes mean, and nothing is lost of ΔW = 0."""
    model, other, x = tuned(kind, "lora_xs"), tuned(kind, "lora_xs"), inputs()
    shifted(other)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    import peft

    fresh = peft.get_peft_model(model_of(kind), config("melora", init_weights=True))
    before = [values(own) for own in layers_of(fresh)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "merging lost")
        fresh.merge_adapter()
    assert all(
        torch.equal(values(own), old) for own, old in zip(layers_of(fresh), before, strict=True)
    )


@merging
def test_gradients_of_the_merged(kind: str) -> None:
    """A backward of a call while merged is that of what was merged then, whatever came after."""
    model, leaf = tuned(kind, "melora"), inputs().requires_grad_()
    model.add_adapter("two", config("melora", lora_alpha=7.0))
    shifted(model)
    calls = []
    for name in ("default", "two"):
        model.merge_adapter([name])
        y = model(leaf).sum()
        calls.append((y, torch.autograd.grad(y, leaf, retain_graph=True)[0]))
    model.unmerge_adapter()
    for y, expected in calls:
        torch.testing.assert_close(torch.autograd.grad(y, leaf)[0], expected, rtol=0, atol=0)


@merging
def test_a_base_that_is_dequantised_while_merged(kind: str) -> None:
    """It has no place for what was stored before: that is said."""
    model = tuned(kind, "melora")
    model.merge_adapter()
    layer = layers_of(model)[0]
    plain = torch.nn.Linear(layer.in_features, layer.out_features)
    layer.base_layer = plain.requires_grad_(False)
    with pytest.raises(RuntimeError, match="first has become a Linear while adapters were merged"):
        model.unmerge_adapter()
