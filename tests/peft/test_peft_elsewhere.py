"""PEFT: models whose weights are elsewhere between calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from offload_cases import CLOSE, Offload, peft_model, to_ram
from offload_cases import offload as offload
from offload_training import assert_trains_alike
from peft_cases import config, inputs, integration, methods, mlp, peft, state

from fused_lowrank.methods import LowRankLinear

# --- layers of PEFT ---


@methods
def test_peft_offloaded_after(method: str, offload: Offload, tmp_path: Path) -> None:
    """The whole life of a model of PEFT that is offloaded with its adapter in it."""
    model, x = peft_model(method), inputs()
    y = model(x)
    model = offload(model)
    for _ in range(2):
        torch.testing.assert_close(model(x), y, **CLOSE)
    rows = model(x, adapter_names=["default", "__base__"] * 3)
    torch.testing.assert_close(rows[::2], y[::2], **CLOSE)
    torch.testing.assert_close(rows[1::2], mlp()(x)[1::2], **CLOSE)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), mlp()(x), **CLOSE)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y, **CLOSE)
    model.save_pretrained(tmp_path / "again")
    integration.save_as_lora(tmp_path / "lora", model)
    for folder in ("again", "lora"):
        loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / folder)
        torch.testing.assert_close(loaded(x), y, **CLOSE)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), y, **CLOSE)


@methods
def test_peft_trained_offloaded(method: str, offload: Offload) -> None:
    """As without offloading: the trained factors stay where they are."""
    model, other, x = peft_model(method), peft_model(method), inputs()
    assert_trains_alike(offload(model), other, x)


@methods
def test_peft_unloaded_while_offloaded(method: str, offload: Offload) -> None:
    model, x = peft_model(method), inputs()
    torch.testing.assert_close(offload(model).unload()(x), mlp()(x), **CLOSE)


@methods
def test_peft_more_adapters(method: str, offload: Offload, tmp_path: Path) -> None:
    """Of other files, of higher rank, and mixed of those there are."""
    larger = {"r": 3, "a": 8, "b": 7} if method == "lora_mini" else {"r": 6}
    second = peft_model(method)
    for key, value in state(second).items():
        if "_core." in key or "_train." in key:
            second.get_parameter(key).data = 2 * value
    second.save_pretrained(tmp_path / "second")
    model, x = peft_model(method), inputs()
    y = model(x)
    model = offload(model)
    model.load_adapter(tmp_path / "second", "second")
    model.set_adapter("second")
    torch.testing.assert_close(model(x), second(x), **CLOSE)
    model.add_adapter("larger", config(method, **larger))
    model.set_adapter("larger")
    assert (model(x) - y).abs().max() > 1e-3
    model.base_model.add_weighted_adapter(["default", "larger"], [1.0, 0.0], "mixed")
    for name in ("mixed", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), y, **CLOSE)


@methods
def test_peft_offloaded_before(method: str, offload: Offload, tmp_path: Path) -> None:
    """Training, merging, saving, of a base that was offloaded first."""
    other, x = peft_model(method), inputs()
    other.save_pretrained(tmp_path / "adapter")
    base = mlp()
    base._no_split_modules = []  # which PEFT asks a dispatched model for
    model = peft.PeftModel.from_pretrained(
        offload(base), tmp_path / "adapter", is_trainable=True, offload_dir=tmp_path / "peft"
    ).eval()
    assert_trains_alike(model, other, x)
    y = other(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, **CLOSE)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "again")
    torch.testing.assert_close(loaded(x), y, **CLOSE)
    torch.testing.assert_close(model.merge_and_unload()(x), y, **CLOSE)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_peft_biases_of_an_offloaded_base(bias: str, offload: Offload, tmp_path: Path) -> None:
    """They are trained, saved, disabled and restored as those of a model that is not offloaded."""
    other, x = peft_model("lora_xs", bias=bias), inputs()
    torch.manual_seed(3)
    model = peft.get_peft_model(offload(mlp()), config("lora_xs", bias=bias)).eval()
    assert_trains_alike(model, other, x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), mlp()(x), **CLOSE)
    model.save_pretrained(tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "again")
    torch.testing.assert_close(loaded(x), other(x), **CLOSE)
    torch.testing.assert_close(model.unload()(x), mlp()(x), **CLOSE)


def test_peft_modules_to_save(offload: Offload, tmp_path: Path) -> None:
    """They and biases are in the file of a model that was offloaded with them."""
    model, x = peft_model("lora_xs", modules_to_save=["head"], bias="lora_only"), inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    y = model(x)
    model = to_ram(model, tmp_path)
    model.save_pretrained(tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "again")
    torch.testing.assert_close(loaded(x), y, **CLOSE)
    integration.save_as_lora(tmp_path / "lora", model)
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "lora")
    torch.testing.assert_close(loaded(x), y, **CLOSE)


def test_a_layer_of_peft_names_itself() -> None:
    """Where its frozen factors are on the meta device."""
    model = peft_model("lora_xs", lora_dropout=0.5)
    layer = model.base_model.model.lin0
    layer.register_parameter("basis_down", torch.nn.Parameter(layer.basis_down.to("meta")))
    layer.base_layer.register_forward_hook(lambda *_: None)  # so that it has to be called
    with pytest.raises(RuntimeError, match="meta device"):
        model(inputs())
    assert isinstance(layer.lora_xs_core, torch.nn.ParameterDict)
    assert not isinstance(layer, LowRankLinear)
