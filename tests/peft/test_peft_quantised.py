"""The methods in PEFT over every kind of frozen linear layer: quantised, or known by calls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from base_cases import Net, inputs, kinds, model_of, shifted
from peft_base_cases import check, config, layers_of, some_kinds, tuned
from peft_cases import every_method, integration, peft
from torch import nn

from fused_lowrank.integrations.peft.layer import over


@kinds
@every_method
def test_results_and_gradients(kind: str, method: str) -> None:
    """Within the budget of float64 on the dequantised W; trained factors are float32."""
    for dtype in (torch.float32, torch.bfloat16):
        one_dtype(tuned(kind, method, dtype), dtype)


def one_dtype(model: Any, dtype: torch.dtype) -> None:
    for layer in layers_of(model):
        assert isinstance(layer, over.PeftOverBase)
        assert type(layer) is over.over(type(layer).__mro__[2])
        for name, own in layer.factors_of("default").items():
            assert own.requires_grad == layer.row.factors[name].trained
            assert own.dtype == (torch.float32 if own.requires_grad else layer.base_weight.dtype)
    check(model, inputs(dtype))
    assert model(inputs(dtype, 5)).dtype == dtype


@some_kinds
@pytest.mark.parametrize("method", ["lora_xs", "lora_fa", "nola"])
def test_files(kind: str, method: str, tmp_path: Path) -> None:
    """What is saved comes back over the same base, bit for bit, beside another adapter too."""
    model, x = tuned(kind, method), inputs()
    model.save_pretrained(tmp_path)
    y = model(x)
    again = peft.PeftModel.from_pretrained(model_of(kind), tmp_path)
    assert torch.equal(again.train()(x), y)
    again.load_adapter(tmp_path, "two", low_cpu_mem_usage=True)
    again.set_adapter("two")
    assert torch.equal(again.train()(x), y)
    if method == "lora_xs":
        with pytest.raises(ValueError, match="another base model"):
            peft.PeftModel.from_pretrained(Net(nn.Linear), tmp_path)


@some_kinds
@pytest.mark.filterwarnings("ignore:save_projection")
def test_files_without_bases(kind: str, tmp_path: Path) -> None:
    """LoRA-XS's are made of the dequantised W again, and known by their fingerprint."""
    model, x = tuned(kind, "lora_xs", save_projection=False), inputs()
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(model_of(kind), tmp_path, low_cpu_mem_usage=low)
        torch.testing.assert_close(again.train()(x), model(x))
    with pytest.raises(ValueError, match="trained on another base model"):
        peft.PeftModel.from_pretrained(Net(nn.Linear), tmp_path)


@kinds
def test_bases_are_of_the_dequantised_weight(kind: str) -> None:
    """W's best approximation of that rank is up·down."""
    for layer in layers_of(tuned(kind, "lora_xs")):
        weight = layer.base_weight.values(torch.float64)
        left, sigma, right = torch.linalg.svd(weight)
        best = left[:, :4] @ torch.diag(sigma[:4]) @ right[:4]
        down, up = (factor.double() for factor in layer.bases(4, 4))
        torch.testing.assert_close(up @ down, best, rtol=1e-3, atol=1e-4)


@some_kinds
@every_method
def test_mixed_batches(kind: str, method: str) -> None:
    """Each row is what its adapter gives alone, and the base with none."""
    model = tuned(kind, method).eval()
    model.add_adapter("two", config(method))
    shifted(model)
    x, names = inputs(torch.float32, 4, 3), ["two", "default", "__base__", "two"]
    y = model(x, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = model(x[i : i + 1])
        else:
            model.set_adapter(name)
            expected = model(x[i : i + 1])
        torch.testing.assert_close(y[i : i + 1], expected, rtol=1e-4, atol=1e-4)
    assert (y[0] - y[1]).abs().max() > 0


@some_kinds
@every_method
def test_several_adapters(kind: str, method: str) -> None:
    """Two active ones are the sum of theirs; deleted, weighted and disabled as PEFT does it."""
    model, x = tuned(kind, method), inputs()
    model.add_adapter("two", config(method, lora_alpha=7.0))
    shifted(model)
    layer = model.base_model.model.first
    with torch.no_grad():
        with model.disable_adapter():
            base = layer(x)
        alone = {}
        for name in ("default", "two"):
            model.set_adapter(name)
            alone[name] = layer(x) - base
        model.base_model.set_adapter(["default", "two"])
        together = layer(x) - base
        torch.testing.assert_close(together, sum(alone.values()), rtol=1e-3, atol=1e-4)
        if method in ("lora_xs", "lora_mini"):
            given = {"adapters": ["default", "two"], "weights": [2.0, -1.0]}
            model.base_model.add_weighted_adapter(**given, adapter_name="mixed")
            model.set_adapter("mixed")
            expected = 2.0 * alone["default"] - alone["two"]
            torch.testing.assert_close(layer(x) - base, expected, rtol=1e-3, atol=1e-4)
        model.set_adapter("two")
        model.delete_adapter("default")
        torch.testing.assert_close(layer(x) - base, alone["two"])


@kinds
@pytest.mark.parametrize("method", ["lora_mini", "melora"])
def test_disabled_and_unloaded(kind: str, method: str) -> None:
    """The base alone, with a gradient of x; then the very modules in their places."""
    plain, x = model_of(kind), inputs()
    before, modules = plain(x).detach(), [plain.first, plain.second]
    model = shifted(peft.get_peft_model(plain, config(method, bias="none")))
    for training in (False, True):
        model.train(training)
        with model.disable_adapter():
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            if training:
                torch.testing.assert_close(y.detach(), before)
            assert torch.autograd.grad(y.sum(), leaf)[0].abs().sum() > 0
    assert not torch.allclose(model.train()(x), before)
    assert model.unload() is plain
    assert [plain.first, plain.second] == modules
    torch.testing.assert_close(plain.train()(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["opaque", "subclass"])
@pytest.mark.parametrize("method", ["lora_xs", "nola"])
def test_merging_is_refused(kind: str, method: str) -> None:
    """With what to do instead, and nothing is changed."""
    model, x = tuned(kind, method), inputs()
    y = model(x)
    acts = (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: model.merge_adapter(safe_merge=True),
        layers_of(model)[0].merge,
    )
    for act in acts:
        with pytest.raises(ValueError, match=r"cannot merge into .*dequantise the base model"):
            act()
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)


@kinds
@pytest.mark.parametrize("method", ["lora_xs", "tied_lora"])
def test_as_lora(kind: str, method: str) -> None:
    """ΔW is what the adapter adds, and converted to LoRA it is the same."""
    model = tuned(kind, method)
    made, tensors = integration.convert_to_lora(model)
    layer, x = layers_of(model)[0], inputs(torch.float32, 5)
    with torch.no_grad():
        with model.disable_adapter():
            added = -layer(x)
        added += layer(x)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(x @ delta.t(), added, rtol=1e-3, atol=1e-4)
    prefix = "base_model.model.first.lora_"
    down, up = tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"]
    scale = made.lora_alpha / made.r
    torch.testing.assert_close(scale * up @ down, delta, rtol=1e-4, atol=1e-5)
