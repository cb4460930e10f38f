"""How factors start in whole models: each init of `adapt`, and data for those that need it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fused_lowrank import (
    adapt,
    disable_adapters,
    export_lora,
    init_bases,
    load_adapter,
    merge,
    merge_and_restart,
    save_adapter,
    unload,
    unmerge,
)
from fused_lowrank.methods import METHODS
from fused_lowrank.methods.initial.values import (
    lora_start,
    mini_bases,
    needs,
    xs_bases,
)
from fused_lowrank.models.adapt import adapted_layers
from fused_lowrank.models.calibration import Covariance, Directions, calibrate

D = 24
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora_fa": {"r": 4},
    "lora_xs": {"r": 4},
    "lora_mini": {"r": 2, "a": 6, "b": 4},
}
INITS = [
    (method, init.replace("_N", "_4"))
    for method in SETTINGS
    for init in METHODS[method][0].row.inits_known
    if init != "loftq"  # test_loftq.py
]
RESIDUALS = [init.replace("_N", "_4") for init in METHODS["lora"][0].row.residual]
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
    given = {"data": batches()} if needs(init) else {}
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
    gatherer = Covariance() if needs(init) == "covariance" else Directions(6)
    inputs = calibrate(base, {"0": gatherer}, batches(), progress=False)["0"]
    weight = base[0].weight.detach()
    if init in ("eva", "svd", "minor", "qr", *RESIDUALS):
        make = {
            "lora": lambda: lora_start(init, weight, 4, 1.0, inputs),
            "lora_fa": lambda: lora_start(init, weight, 4, 1.0, inputs),
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
        r"init='kaiming' needs none: of lora's, 'eva' or 'corda' or 'corda_kpm' or 'loftq' does",
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
    "nothing lost": (
        "lora",
        {"init": "loftq", "data": model_of()},
        ValueError,
        "0: init='loftq' .*nothing was taken here, where it is a plain matrix",
    ),
    "no number": ("lora", {"init": "pissa_niter_N"}, ValueError, "N is a number"),
    "data for none": ("melora", {"data": batches()}, ValueError, "melora has no init that needs"),
    "no covariance": ("lora_fa", {"init": "corda"}, ValueError, "init='corda' needs to see"),
    "dropped": ("lora", {"init": "pissa", "rank_dropout": 0.1}, ValueError, "be missing from W"),
    "no scale": ("lora", {"init": "olora", "alpha": 0}, ValueError, "alpha 0 or below"),
    "no such keyword": ("vera", {"init": "pissa"}, TypeError, "vera has no keyword 'init'.*It has"),
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
            **{**SETTINGS.get(method, {}), **keywords},
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


# --- factors that start as a part of W ---


def peft_model(init: str, **more: Any) -> Any:
    """PEFT's model of the same base and init."""
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=init, **more
    )
    return get_peft_model(model_of(), config)


def stepped(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of the model while it is trained for a few steps by gradient descent."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-3)
    outputs = []
    for _ in range(4):
        y = model(x)
        optimizer.zero_grad()
        (y - 1).square().sum().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_trains_as_peft_does(init: str, dora: bool) -> None:
    """PEFT puts the residual in the weight's place; what both compute stays the same."""
    theirs, ours = peft_model(init, use_dora=dora), adapted("lora", init, alpha=6, dora=dora)
    if init == "orthogonal":  # which is random
        for name, layer in adapted_layers(ours):
            own = theirs.base_model.model.get_submodule(name)
            layer.down.data.copy_(own.lora_A["default"].weight)
            layer.up.data.copy_(own.lora_B["default"].weight)
            if dora:
                layer.magnitude.data.copy_(own.lora_magnitude_vector["default"].weight)
    for y, expected in zip(stepped(ours, batches()[0]), stepped(theirs, batches()[0]), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method", ["lora", "lora_fa"])
@pytest.mark.parametrize("init", RESIDUALS)
def test_the_base_stays(method: str, init: str, dora: bool, tmp_path: Path) -> None:
    """W is what it was, bit for bit, trained or not, merged, saved, exported, unloaded."""
    base, x = model_of(), batches()[0]
    before = base[0].weight.detach().clone()
    model = adapted(method, init, alpha=6, dora=dora)
    layer: Any = dict(adapted_layers(model))["0"]
    torch.testing.assert_close(layer.delta_weight(), torch.zeros_like(before), rtol=0, atol=1e-6)
    outputs = stepped(model, x)
    assert (outputs[-1] - outputs[0]).abs().max() > 1e-4
    with disable_adapters(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(layer.base()[0], before)
    y = model(x)
    merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    unmerge(model)
    for bases in (True, False):  # what they started as is always there
        save_adapter(model, tmp_path / "a.safetensors", bases=bases or method == "lora_fa")
        again = load_adapter(model_of(), tmp_path / "a.safetensors", progress=False)
        assert torch.equal(again(x), y)
    export_lora(tmp_path / "a.safetensors", tmp_path / "of file", dora=dora)
    export_lora(model, tmp_path / "of model", dora=dora)
    for folder in ("of file", "of model"):
        theirs = PeftModel.from_pretrained(model_of(), tmp_path / folder)
        assert theirs.peft_config["default"].r == 8
        torch.testing.assert_close(theirs(x), y, rtol=1e-4, atol=1e-5)
        assert torch.equal(theirs.base_model.model[0].base_layer.weight, before)
    assert torch.equal(unload(model)[0].weight, before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_exports_what_peft_converts(init: str, tmp_path: Path) -> None:
    """PEFT's own conversion to a plain LoRA has A beside the first A, and B beside the first -B."""
    theirs = peft_model(init)
    theirs.save_pretrained(tmp_path / "first")
    ours = adapted("lora", init, alpha=6)
    for model in (theirs, ours):
        stepped(model, batches()[0])
    theirs.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "first"
    )
    export_lora(ours, tmp_path / "ours")
    expected, found = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")
    )
    assert found.keys() == expected.keys()
    for name in ("0", "2"):
        a, b, theirs_a, theirs_b = (
            state[f"base_model.model.{name}.lora_{part}.weight"]
            for state in (found, expected)
            for part in "AB"
        )
        assert (a.shape, b.shape) == (theirs_a.shape, theirs_b.shape)
        torch.testing.assert_close(b @ a, theirs_b @ theirs_a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_base_stays_in_16_bits(dtype: torch.dtype) -> None:
    """Factors are trained in float32, and what they started as is kept in it: ΔW starts at zero."""
    model = model_of().to(dtype)
    before = model[0].weight.detach().clone()
    adapt(model, target_modules=["0"], method="lora", r=4, init="pissa", progress=False)
    layer: Any = model[0]
    assert layer.down.dtype == layer.start_down.dtype == torch.float32
    assert layer.delta_weight().abs().max() < 1e-6
    assert torch.equal(unload(model)[0].weight, before)


def test_tied_weights_stay_tied() -> None:
    """W is not changed, so nothing changes where it is used elsewhere."""
    model = model_of()
    model.extra = nn.Linear(D, D + 8)
    model.extra.weight = model[0].weight
    before = model.extra.weight.detach().clone()
    adapt(model, "lora", target_modules=["0"], r=4, init="pissa", progress=False)
    assert model.extra.weight is model[0].weight
    assert torch.equal(model.extra.weight, before)


def test_a_layer_goes_through_a_state_dict() -> None:
    """What the factors started as is in the state_dict, and copies of a layer have it."""
    x = batches()[0]
    model = adapted("lora", "milora")
    stepped(model, x)
    other = adapt(model_of(1), "lora", target_modules=["0", "2"], r=4, init="milora")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_put_off(tmp_path: Path) -> None:
    """A model on the meta device gets its factors once its weights are there."""
    with torch.device("meta"):
        model = model_of()
    adapt(model, "lora", target_modules=["0", "2"], r=4, init="pissa", defer_bases=True)
    model.to_empty(device="cpu").load_state_dict(model_of().state_dict(), strict=False)
    init_bases(model, progress=False)
    expected = adapted("lora", "pissa")
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])
def test_bases_that_only_data_would_make_again(method: str, tmp_path: Path) -> None:
    """A file without them is refused, and says so; of LoRA, which trains all its factors, not."""
    save_adapter(adapted(method, "eva"), tmp_path / "a.safetensors", bases=False)
    model = model_of()
    with pytest.raises(ValueError, match="init='eva' made of a model's inputs: save it with bases"):
        load_adapter(model, tmp_path / "a.safetensors", progress=False)
    save_adapter(adapted("lora", "eva"), tmp_path / "b.safetensors", bases=False)
    load_adapter(model, tmp_path / "b.safetensors", progress=False)


@pytest.mark.parametrize("method", ["lora", "lora_xs"])
def test_a_start_of_data_is_not_begun_anew(method: str) -> None:
    """A restart sees no inputs: it is refused, and says so."""
    model = adapted(method, "eva")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match=r"init='eva', of inputs .* cannot be begun anew"):
        merge_and_restart(model, torch.optim.SGD(trained, 0.1), progress=False)
