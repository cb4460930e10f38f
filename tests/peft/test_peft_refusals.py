"""LoRA-XS and LoRA-Mini in PEFT: what is refused, warned of, or gone around."""

import warnings
from typing import Any

import pytest
import torch
from peft_cases import (
    CLOSE,
    CONFIGS,
    config,
    every_method,
    inputs,
    layers,
    methods,
    mlp,
    peft,
)
from torch import nn
from torch.nn.utils import prune

from fused_lowrank.integrations.peft import LoraXSConfig, registry


def test_rank_above_the_layer() -> None:
    """Taken down to it, with one warning for all; the scaling is that of the rank asked for."""
    with pytest.warns(UserWarning, match=r"r=64 is more than 2 layers have room for") as caught:
        model = peft.get_peft_model(mlp(), config("lora_xs", r=64, lora_alpha=16))
    assert len(caught) == 1
    found = {name.rpartition(".")[2]: layer for name, layer in layers(model).items()}
    assert {name: layer.r["default"] for name, layer in found.items()} == {"lin0": 12, "lin1": 10}
    assert all(layer.scaling["default"] == 0.25 for layer in found.values())
    with pytest.warns(UserWarning, match=r"r=8, a=64, b=64 is more than 2 layers"):
        model = peft.get_peft_model(mlp(), CONFIGS["lora_mini"](target_modules=["lin0", "lin1"]))
    layer = model.base_model.model.lin1
    assert layer.sides["default"] == (16, 10)
    assert layer.lora_mini_a_train["default"].shape == (16, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(mlp(), config("lora_xs", r=10))


class Norm(nn.Module):
    """What has no linear layer at `norm`, and one that is never called at `attention.out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("norm", "Target module norm is a LayerNorm"),
        ("out_proj", "attention.out_proj .*never calls"),
    ],
)
def test_unsupported_layers_are_named(target: str, message: str) -> None:
    """With their path, and what to do."""
    with pytest.raises(ValueError, match=f"{message}.*Leave it out of target_modules"):
        peft.get_peft_model(Norm(), LoraXSConfig(r=2, target_modules=[target]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"init_weights": "zeros"}, "init_weights is 'zeros'"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": ".*up"}, "target_modules is '.*up'"),
        ({"layers_to_transform": 0, "target_modules": "all-linear"}, "name the modules in a list"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern is '\\('"),
    ],
)
def test_bad_configurations(settings: dict[str, Any], message: str) -> None:
    """Each names what it got."""
    with pytest.raises(ValueError, match=message):
        config("lora_xs", **settings)


def test_seeds_of_one_layer_agree() -> None:
    """A second adapter with another seed would need other bases."""
    model = peft.get_peft_model(mlp(), config("lora_mini"))
    with pytest.raises(ValueError, match="projection_seed is 3, but 42"):
        model.add_adapter("two", config("lora_mini", projection_seed=3))


@every_method
def test_hooks_and_parametrisations_of_the_base_layer_run(method: str) -> None:
    """It is called then, and the low-rank term added to what it gives."""
    x = inputs()
    for kind in ("hook", "parametrisation", "pre-hook", "pruning"):
        base = mlp()
        if kind == "hook":
            base.lin0.register_forward_hook(lambda module, args, y: y * 2)
        elif kind == "pre-hook":
            base.lin0.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        elif kind == "pruning":
            prune.random_unstructured(base.lin0, "weight", 0.5)
        else:
            nn.utils.parametrizations.weight_norm(base.lin0)
        plain = base.lin0(x)
        model = peft.get_peft_model(base, config(method))
        layer = model.base_model.model.lin0
        weight = layer.base_layer.weight
        term = x @ layer.get_delta_weight("default").t()
        torch.testing.assert_close(layer(x), plain + term, **CLOSE)
        mixed = layer(x, adapter_names=["default", "__base__"] * 3)
        torch.testing.assert_close(mixed[::2], (plain + term)[::2], **CLOSE)
        torch.testing.assert_close(mixed[1::2], plain[1::2], **CLOSE)
        assert weight.shape == (16, 12)


def test_backward_hooks_and_arguments_of_the_base_layer() -> None:
    """They reach it: hooks on gradients run, and what nn.Linear does not take is its error."""
    base, seen = mlp(), []
    base.lin0.register_full_backward_hook(lambda *_: seen.append("full"))
    base.lin1.register_full_backward_pre_hook(lambda *_: seen.append("pre"))
    model = peft.get_peft_model(base, config("lora_xs"))
    model(inputs().requires_grad_()).sum().backward()
    assert seen == ["pre", "full"]
    with pytest.raises(TypeError, match="scale"):
        peft.get_peft_model(mlp(), config("lora_xs")).base_model.model.lin0(inputs(), scale=2)


@methods
def test_offloaded_weights(method: str) -> None:
    """Bases are made of the weights themselves, which are on the meta device between calls."""
    accelerate = pytest.importorskip("accelerate")
    wanted = peft.get_peft_model(mlp(), config(method, init_weights=False))
    base = accelerate.cpu_offload(mlp(), execution_device=torch.device("cpu"))
    assert base.lin0.weight.is_meta
    model = peft.get_peft_model(base, config(method, init_weights=False))
    layer, like = model.base_model.model.lin0, wanted.base_model.model.lin0
    assert torch.equal(layer.basis_down, like.basis_down)
    for name in layer.adapter_layer_names:
        getattr(layer, name)["default"].data.copy_(getattr(like, name)["default"].data)
    x = inputs()
    torch.testing.assert_close(layer(x), like(x), **CLOSE)
    assert not layer.is_plain(layer.base_layer)
    accelerate.hooks.remove_hook_from_submodules(layer)
    assert layer.is_plain(layer.base_layer)


def test_meta_weights_are_refused() -> None:
    """Their singular vectors would be meta, too, and stay so."""
    with torch.device("meta"):
        base = mlp()
    with pytest.raises(ValueError, match="lin0 is on the meta device"):
        peft.get_peft_model(base, config("lora_xs"))


def test_a_failed_probe_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the version that was tested; where nothing is missing there is no error."""
    from peft.tuners import tuners_utils

    monkeypatch.setattr(registry, "METHODS", ())
    registry.probe()
    monkeypatch.delattr(tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load")
    monkeypatch.delattr(tuners_utils, "check_adapters_to_merge")
    with pytest.raises(
        ImportError, match=r"tested with 0.21.2.*check_adapters_to_merge.*_remap_adapter"
    ):
        registry.probe()
