"""How factors start in whole models: each init of `adapt`, and data for those that need it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fused_lowrank import adapt, load_adapter, save_adapter, unload
from fused_lowrank.methods import METHODS
from fused_lowrank.methods.initial.values import lora_start, mini_bases, xs_bases
from fused_lowrank.models.adapt import adapted_layers
from fused_lowrank.models.calibration import Directions, calibrate

D = 24
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora_fa": {"r": 4},
    "lora_xs": {"r": 4},
    "lora_mini": {"r": 2, "a": 6, "b": 4},
}
INITS = [(method, init) for method in SETTINGS for init in METHODS[method][0].row.inits_known]
STARTS_AS_BASE = {"orthogonal": 1e-5, "paper": None}  # how far from the base's output; None: any


def model_of(seed: int = 0) -> nn.Sequential:
    """Two linear layers; the same ones every time."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, D + 8), nn.ReLU(), nn.Linear(D + 8, D))


def batches() -> list[Tensor]:
    """Inputs whose directions differ in strength."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(40, D, generator=generator) * 0.8 ** torch.arange(D) for _ in range(3)]


def adapted(method: str, init: str, **more: Any) -> nn.Module:
    """The model with adapters that start so."""
    given = {"data": batches()} if init == "eva" else {}
    settings = {**SETTINGS[method], "init": init, **given, **more}
    return adapt(model_of(), method, target_modules=["0", "2"], progress=False, **settings)


@pytest.mark.parametrize(("method", "init"), INITS)
def test_starts(method: str, init: str, tmp_path: Path) -> None:
    """The output is the base's, the factors the initialiser's; it learns, and goes to a file."""
    x, base = batches()[0], model_of()
    model = adapted(method, init)
    layer: Any = dict(adapted_layers(model))["0"]
    assert layer.settings()["init"] == init
    assert layer.inputs is None
    off = STARTS_AS_BASE.get(init, 1e-6 if method != "lora_xs" else 1e-2)
    y = model(x)
    if off is not None:
        torch.testing.assert_close(y, base(x), rtol=0, atol=off)
    inputs = calibrate(base, {"0": Directions(6)}, batches(), progress=False)["0"]
    weight = base[0].weight.detach()
    if init in ("eva", "svd", "minor", "qr"):
        make = {
            "lora": lambda: lora_start(init, weight, 4, 1.0, inputs)[:2],
            "lora_fa": lambda: lora_start(init, weight, 4, 1.0, inputs)[:2],
            "lora_xs": lambda: xs_bases(init, weight, 4, inputs=inputs),
            "lora_mini": lambda: mini_bases(init, weight, 6, 4, inputs),
        }
        down, up = make[method]()
        torch.testing.assert_close(layer.down.detach(), down, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.up.detach(), up, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert any(factor.grad.any() for factor in layer.trained_factors)
    save_adapter(model, tmp_path / "a.safetensors")
    again = load_adapter(model_of(), tmp_path / "a.safetensors", progress=False)
    torch.testing.assert_close(again(x), y, rtol=0, atol=0)
    assert dict(adapted_layers(again))["0"].settings() == layer.settings()
    assert torch.equal(unload(again)[0].weight, base[0].weight)


def test_later_layers_see_the_base_model() -> None:
    """Directions are those of the model before any layer is replaced."""
    layer: Any = dict(adapted_layers(adapted("lora", "eva")))["2"]
    inputs = calibrate(model_of(), {"2": Directions(4)}, batches(), progress=False)["2"]
    assert inputs.directions is not None
    torch.testing.assert_close(layer.down.detach(), inputs.directions[:4], rtol=1e-4, atol=1e-5)


def test_data_is_called_as_forward_fn_says() -> None:
    """forward_fn is the user's way to call the model with a batch."""
    data = [{"rows": batch} for batch in batches()]
    model = adapt(
        model_of(),
        "lora",
        target_modules=["0"],
        r=4,
        init="eva",
        data=data,
        forward_fn=lambda model, batch: model(batch["rows"]),
        progress=False,
    )
    expected: Any = dict(adapted_layers(adapted("lora", "eva")))["0"]
    assert torch.equal(dict(adapted_layers(model))["0"].down, expected.down)


REFUSALS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "no data": ("lora", {"init": "eva"}, ValueError, r"init='eva' needs to see.*data=batches"),
    "put off": (
        "lora_xs",
        {"init": "eva", "data": batches(), "defer_bases": True},
        ValueError,
        "cannot be put off by defer_bases",
    ),
    "data for nothing": (
        "lora",
        {"data": batches()},
        ValueError,
        r"init='kaiming' needs none: of lora's, 'eva' does",
    ),
    "one batch": ("lora", {"init": "eva", "data": batches()[0]}, TypeError, r"give \[batch\]"),
    "no batch": ("lora", {"init": "eva", "data": []}, ValueError, "no batches"),
    "few": (
        "lora",
        {"init": "eva", "data": [batches()[0][:3]]},
        ValueError,
        "0: init='eva' needs 4 directions.*are known",
    ),
    "unknown": ("lora", {"init": "xavier"}, ValueError, "init is 'xavier'.*'kaiming' or 'gauss"),
    "odd": ("lora", {"init": "orthogonal", "r": 3}, ValueError, "takes an even r"),
    "large": (
        "lora_mini",
        {"init": "svd", "a": D, "b": D + 8, "r": 2},
        ValueError,
        f"a and b of at most {D}",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str) -> None:
    """The error says what to do, and the model is as it was."""
    method, keywords, error, message = REFUSALS[case]
    model = model_of()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules, state = list(model.modules()), torch.get_rng_state()
    with pytest.raises(error, match=message):
        adapt(
            model,
            method,
            target_modules=["0"],
            progress=False,
            **{**SETTINGS[method], **keywords},
        )
    assert list(model.modules()) == modules
    assert not any(module._forward_pre_hooks for module in modules)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    if case != "odd":  # which has drawn
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bases", [True, False])
@pytest.mark.parametrize("method", ["lora", "lora_xs"])
def test_files_of_before(method: str, bases: bool, tmp_path: Path) -> None:
    """Files that say nothing of init, and of "randomized", are read as they were meant."""
    x, how = batches()[0], {"svd": "randomized"} if method == "lora_xs" else {}
    model = adapted(method, METHODS[method][0].row.inits_known[0], **how)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.trained_factors[0])
    path = tmp_path / "a.safetensors"
    save_adapter(model, path, bases=bases)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    config = json.loads(metadata["config"])
    for entry in config["layers"].values():
        del entry["settings"]["init"]
    save_file(tensors, path, {**metadata, "config": json.dumps(config)})
    again = load_adapter(model_of(), path, progress=False)
    assert torch.equal(again(x), model(x))
    if method == "lora_xs":
        assert dict(adapted_layers(again))["0"].svd == "randomized"
