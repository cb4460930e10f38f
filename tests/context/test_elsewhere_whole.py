"""Modules that are trained whole, and biases, in models that are offloaded after the adapter."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_cases import CLOSE, Offload, Q, Tied, accelerate, adapted, losses, peft_model, saved
from offload_cases import offload as offload
from peft_cases import config, inputs, mlp, peft

import fused_lowrank
from fused_lowrank import adapt, load_adapter


def assert_learns_alike(model: torch.nn.Module, other: torch.nn.Module, x: torch.Tensor) -> None:
    """By optimisers that are made now, before the first call."""
    got, wanted = losses(model, x), losses(other, x)
    assert wanted[0] - wanted[-1] > 1e-6 * wanted[0]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)


def test_trained_whole_and_offloaded_after(offload: Offload, tmp_path: Path) -> None:
    """Trains, saves, is disabled and unloaded as without offloading; the rest is away."""
    model, x = adapted("lora_xs", modules_to_save=["head"]), inputs()
    other = copy.deepcopy(model)
    model = offload(model)
    assert_learns_alike(model, other, x)
    assert not model.head.weight.is_meta
    assert model.lin0.weight.is_meta
    loaded = load_adapter(mlp(), saved(model, tmp_path / "file"), **Q)
    torch.testing.assert_close(loaded(x), other(x), **CLOSE)
    with fused_lowrank.disable_adapters(model):
        torch.testing.assert_close(model(x), mlp()(x), **CLOSE)
    fused_lowrank.unload(model)
    assert not model._forward_pre_hooks
    torch.testing.assert_close(model(x), mlp()(x), **CLOSE)


def test_offloaded_between_two_steps() -> None:
    """Also where training has begun, and by a part of the model alone."""
    model, x = adapted("lora_xs", modules_to_save=["head"]), inputs()
    other = copy.deepcopy(model)
    assert_learns_alike(model, other, x)
    accelerate.cpu_offload(model.head, execution_device="cpu")
    assert_learns_alike(model, other, x)


class Alike(torch.nn.Module):
    """A stack of layers of one shape, of which two are in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
        self.first, self.last = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("whole", ["last", "block"])
def test_of_layers_alike(whole: str, first: bool, tmp_path: Path, offload: Offload) -> None:
    """Each has its own values, although one is read from disk to where another was."""
    base, x = Alike().double().eval(), torch.randn(4, 6).double()

    def adapted(model: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(0)
        settings: Any = {"r": 2, "target_modules": ["first"], "modules_to_save": [whole]}
        return adapt(model, "lora_xs", **settings, **Q)

    other = adapted(copy.deepcopy(base))
    model = adapted(offload(copy.deepcopy(base))) if first else offload(copy.deepcopy(other))
    assert_learns_alike(model, other, x)
    torch.testing.assert_close(model(x), other(x), **CLOSE)
    loaded = load_adapter(copy.deepcopy(base), saved(model, tmp_path / "file"), **Q)
    torch.testing.assert_close(loaded(x), other(x), **CLOSE)
    fused_lowrank.unload(model)
    torch.testing.assert_close(model(x), base(x), **CLOSE)


def test_tied_and_offloaded_after() -> None:
    """What it is tied to learns with it."""
    tokens = torch.arange(8)
    model = adapt(
        Tied().double(), "lora_xs", r=3, target_modules=["lin"], modules_to_save=["embed"], **Q
    )
    other = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert_learns_alike(model, other, tokens)
    assert model.head.weight is model.embed.weight


def test_offloaded_and_called_without_the_model() -> None:
    """An error in training, which says what to do; without training it is brought as ever."""
    model, x = adapted("lora_xs", modules_to_save=["head"]), torch.randn(2, 14).double()
    y = model.head(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model.head(x), y, **CLOSE)
    torch.testing.assert_close(model.eval().head(x), y, **CLOSE)
    with pytest.raises(RuntimeError, match=r"learn nothing\. Adapt after offloading"):
        model.train().head(x)
    model(inputs())
    model.head(x).sum().backward()
    assert model.head.weight.grad.any()


def test_in_a_block_that_is_brought_whole() -> None:
    """Nobody else could bring it: an error before anything is lost."""
    model = adapted("lora_xs", modules_to_save=["head"])
    x = inputs()
    y = model(x)
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["Mlp"])
    torch.testing.assert_close(model(x), y, **CLOSE)
    with pytest.raises(RuntimeError, match=r"brought anew for each call.*Adapt after offloading"):
        model.train()(x)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_peft(bias: str, first: bool, offload: Offload, tmp_path: Path) -> None:
    """Copies of PEFT's and biases learn, whether the model is offloaded first or the adapter is."""
    settings, x = {"modules_to_save": ["head"], "bias": bias}, inputs()
    other = peft_model("lora_xs", **settings)
    if first:
        torch.manual_seed(3)
        model = peft.get_peft_model(offload(mlp()), config("lora_xs", **settings))
    else:
        model = offload(copy.deepcopy(other))
    assert_learns_alike(model, other, x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), mlp()(x), **CLOSE)
    torch.testing.assert_close(model(x), other(x), **CLOSE)
    model.save_pretrained(tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "again")
    torch.testing.assert_close(loaded(x), other(x), **CLOSE)
