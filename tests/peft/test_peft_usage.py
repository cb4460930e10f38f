"""What PEFT's users expect of its layers: scales that are set, modes, fields that are not there."""

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from fused_lowrank.integrations.peft import (  # noqa: E402
    LoraMiniConfig,
    LoraXSConfig,
    convert_to_lora,
    save_as_lora,
)

CONFIGS = {
    "lora_xs": lambda **more: LoraXSConfig(r=4, target_modules=["0", "2"], **more),
    "lora_mini": lambda **more: LoraMiniConfig(r=2, a=8, b=8, target_modules=["0", "2"], **more),
}
X = torch.randn(3, 16)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))


def layers_of(model: nn.Module) -> list:
    return [model.base_model.model[i] for i in (0, 2)]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("keywords", [{}, {"lora_alpha": 3, "use_rslora": True}])
def test_scales_are_set_as_those_of_lora(method, keywords, tmp_path) -> None:
    """By the same calls as PEFT's LoRA of the same ΔW, with the same results."""
    model = peft.get_peft_model(plain(), CONFIGS[method](init_weights=False, **keywords))
    model.add_adapter("other", CONFIGS[method](init_weights=False, lora_alpha=5))
    for name in ("default", "other"):
        save_as_lora(tmp_path / name, model, name)
    lora = peft.PeftModel.from_pretrained(plain(), tmp_path / "default")
    lora.load_adapter(tmp_path / "other", "other")
    start = model.eval()(X)
    for act in (
        lambda layer: layer.set_scale("default", 0.5),
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.set_scale("other", 0.0),
        lambda layer: layer.set_scale("nobody", 7.0),
        lambda layer: layer.unscale_layer(),
    ):
        for one in (model, lora):
            for layer in layers_of(one):
                act(layer)
        for name in ("default", "other"):
            for one in (model, lora):
                one.set_adapter(name)
            torch.testing.assert_close(model(X), lora(X), rtol=1e-4, atol=1e-5)
        for one in (model, lora):
            one.set_adapter("default")
    torch.testing.assert_close(model(X), start)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_scale_is_of_mixed_batches_merges_and_exports(method) -> None:
    model = peft.get_peft_model(plain(), CONFIGS[method](init_weights=False)).eval()
    base = plain()(X)
    model(X, adapter_names=["default", "__base__", "default"])
    for layer in layers_of(model):
        layer.set_scale("default", 0.25)
    quarter = model(X)
    mixed = model(X, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(mixed[0], quarter[0])
    torch.testing.assert_close(mixed[1], base[1])
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(X), quarter)
    config, tensors = convert_to_lora(model)
    lora = peft.get_peft_model(plain(), config).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(lora(X), quarter, rtol=1e-4, atol=1e-5)
    model.delete_adapter("default")
    assert not any(layer.own_scaling for layer in layers_of(model))


@pytest.mark.parametrize("method", CONFIGS)
def test_new_layers_are_in_the_mode_of_what_they_replace(method) -> None:
    config = CONFIGS[method](init_weights=False, lora_dropout=0.5)
    model = plain().eval()
    model[2].train()
    layers = layers_of(peft.get_peft_model(model, config))
    assert [layer.training for layer in layers] == [False, True]
    torch.testing.assert_close(layers[0](X), layers[0](X))
    assert not torch.equal(layers[1](layers[0](X)), layers[1](layers[0](X)))
    injected = peft.inject_adapter_in_model(copy.deepcopy(config), plain().eval())
    torch.testing.assert_close(injected(X), injected(X))
    model = peft.get_peft_model(plain().eval(), copy.deepcopy(config))
    assert model.train().base_model.model[0].training


@pytest.mark.parametrize("config", [LoraXSConfig, LoraMiniConfig])
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("trainable_token_indices", [1, 2], "modules_to_save"),
        ("trainable_token_indices", {"embed_tokens": [1]}, "LoraConfig"),
        ("target_parameters", ["mlp.experts.gate_up_proj"], "target_modules"),
    ],
)
def test_fields_of_lora_that_are_refused(config, field, value, said, tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is not supported by .*{said}"):
        config(r=2, **{field: value})
    config(r=2).save_pretrained(tmp_path)
    assert getattr(config.from_pretrained(tmp_path), field) is None


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.filterwarnings("ignore:save_projection", "ignore::DeprecationWarning")
def test_a_base_that_is_quantised_afterwards(method, tmp_path) -> None:
    """It computes and is saved; what cannot be done says why."""
    for whole in (True, False):
        config = CONFIGS[method](init_weights=False, save_projection=whole)
        model = peft.get_peft_model(plain(), config).eval()
        y = model(X)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        torch.testing.assert_close(quantised(X), y, rtol=0.1, atol=0.3)
        for act in (
            quantised.merge_adapter,
            quantised.merge_and_unload,
            lambda quantised=quantised: quantised.merge_adapter(safe_merge=True),
        ):
            with pytest.raises(
                ValueError, match=r"cannot merge into 0, .*in place of a tensor: quantised"
            ):
                act()
        if not whole:
            with pytest.raises(ValueError, match=r"weight of .*0 .*save_projection=True"):
                quantised.save_pretrained(tmp_path)
            continue
        quantised.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(plain(), tmp_path).eval()
        torch.testing.assert_close(again(X), y)
