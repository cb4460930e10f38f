"""`use_dora` of the configurations: adapters with a trained magnitude."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import (
    CLOSE,
    DELTAS,
    config,
    every_method,
    inputs,
    integration,
    layers,
    methods,
    mlp,
    own_methods,
    peft,
    same,
    state,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from fused_lowrank import load_adapter
from fused_lowrank.files.cli import main
from fused_lowrank.methods import dora

WEIGHTS = "adapter_model.safetensors"
TARGETS = ["lin0", "lin1", "conv"]


@torch.no_grad()
def shift(model: nn.Module, adapter: str = "default") -> Any:
    """The model, the adapter's magnitudes away from their start."""
    torch.manual_seed(5)
    for layer in layers(model).values():
        if layer.row_of(adapter).dora:
            own = getattr(layer, layer.magnitude)[adapter]
            own.mul_(0.5 + torch.rand_like(own))
    return model


def tuned(method: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A PeftModel of the same base at every call, with DoRA, away from its start."""
    given = {"use_dora": True, "target_modules": TARGETS, "lora_alpha": 3.0, **settings}
    torch.manual_seed(3)
    return shift(peft.get_peft_model(mlp(dtype), config(method, **given)).eval())


def formula(layer: Any, adapter: str, x: Tensor) -> Tensor:
    """m ⊙ x·(W + ΔW)ᵀ / ‖W + ΔW‖ + bias, the norm a constant in the gradient."""
    base = layer.base_layer
    weight = base.weight if type(base) is nn.Linear else base.weight.t()
    whole = weight + layer.scaling[adapter] * DELTAS[layer.prefix](layer, adapter, *weight.shape)
    magnitude = getattr(layer, layer.magnitude)[adapter]
    y = linear(x, magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True).detach())
    return y if base.bias is None else y + base.bias


def both(layer: Any, x: Tensor, call: Any) -> list[Tensor]:
    """[y, dx, the gradients of what is trained]."""
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    return [y, *torch.autograd.grad(y.sin().sum(), [leaf, *layer.trained_factors("default")])]


@every_method
@pytest.mark.parametrize("rows", [3, 70])
def test_numbers(method: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients are the formula's; what is of W, and of a frozen down, is kept."""
    model = tuned(method).train()
    for layer in layers(model).values():
        x = torch.randn(rows, layer.in_features, dtype=torch.float64)
        found = both(layer, x, layer)
        assert len(found) == 2 + len(layer.adapter_layer_names)
        torch.testing.assert_close(
            found, both(layer, x, lambda x, layer=layer: formula(layer, "default", x)), **CLOSE
        )
        with monkeypatch.context() as patch:
            patch.setattr(dora, "constants", None)
            layer(x)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_starts_as_the_base_does(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The magnitude is ‖W + ΔW‖ by row, in float32 or wider, and stays as precise in files."""
    given = {"use_dora": True, "target_modules": TARGETS, "init_weights": True}
    model = peft.get_peft_model(mlp(dtype), config(method, **given)).eval()
    x = inputs(dtype=dtype)
    wanted = mlp(dtype)(x)
    assert (model(x) - wanted).norm() <= {8: 1e-12, 2: 1e-2}[dtype.itemsize] * wanted.norm()
    far = peft.get_peft_model(mlp(dtype), config(method, **{**given, "init_weights": False}))
    far.save_pretrained(tmp_path)
    made = [
        peft.PeftModel.from_pretrained(mlp(dtype), tmp_path, low_cpu_mem_usage=low)
        for low in (False, True)
    ]
    for one in (model, far, *made):
        for layer in layers(one).values():
            magnitude = getattr(layer, layer.magnitude)["default"]
            assert magnitude.dtype == (torch.float32 if dtype.itemsize < 4 else dtype)
            if one in (model, far):
                parts = layer.joined(["default"])[:3]
                gain = layer.gain_of("default", *parts)
                gain = gain.values
                torch.testing.assert_close(gain, torch.ones_like(gain), rtol=2e-6, atol=0)
            else:
                like = getattr(layers(far)[layer_name(one, layer)], layer.magnitude)["default"]
                assert torch.equal(magnitude, like)


def layer_name(model: nn.Module, layer: nn.Module) -> str:
    """The name of a layer."""
    return next(name for name, module in model.named_modules() if module is layer)


@every_method
@pytest.mark.parametrize("low_memory", [False, True])
def test_files(method: str, low_memory: bool, tmp_path: Path, capsys: Any) -> None:
    """The same numbers and Parameters, by PEFT and by `load_adapter`; the file is described."""
    model = tuned(method)
    model.save_pretrained(tmp_path)
    keys = [key for key in load_file(tmp_path / WEIGHTS) if key.endswith("_magnitude")]
    prefix = "base_model.model."
    assert sorted(keys) == sorted(f"{prefix}{name}.{method}_magnitude" for name in TARGETS)
    x = inputs()
    for trains in (False, True):
        again = peft.PeftModel.from_pretrained(
            mlp(), tmp_path, low_cpu_mem_usage=low_memory, is_trainable=trains
        )
        assert same(state(again), state(model))
        torch.testing.assert_close(again(x), model(x), **CLOSE)
        names = {n for n, p in again.named_parameters() if p.requires_grad}
        wanted = {n for n, p in model.named_parameters() if p.requires_grad}
        assert names == (wanted if trains else set())
    model.load_adapter(tmp_path, "again", low_cpu_mem_usage=low_memory)
    model.set_adapter("again")
    torch.testing.assert_close(model(x), again(x), **CLOSE)
    other = tuned(method, target_modules=["lin0", "lin1"])
    other.save_pretrained(tmp_path / "native")
    native = load_adapter(mlp(), tmp_path / "native", progress=False)
    torch.testing.assert_close(native(x), other(x), **CLOSE)
    assert native.lin0.settings()["dora"] is True
    assert "magnitude" in native.lin0.train_names
    assert main(["inspect", str(tmp_path / "native")]) == 0
    assert f"{method} with dora" in capsys.readouterr().out
    file = load_file(tmp_path / "native" / WEIGHTS)
    del file[f"{prefix}lin1.{method}_magnitude"]
    save_file(file, tmp_path / "native" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks magnitude of lin1"):
        load_adapter(mlp(), tmp_path / "native", progress=False)


@methods
def test_files_without_frozen_factors(method: str, tmp_path: Path) -> None:
    """The magnitude is the file's, whatever the factors that are made again start as."""
    with pytest.warns(UserWarning, match="save_projection=False"):
        model = tuned(method, save_projection=False)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="save_projection=False"):
        again = peft.PeftModel.from_pretrained(mlp(), tmp_path)
    x = inputs()
    torch.testing.assert_close(again(x), model(x), **CLOSE)


@methods
def test_loading_makes_no_frozen_factors(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file brings them, no magnitude asks for others before."""
    model, x = tuned(method, init_weights=True), inputs()
    model.save_pretrained(tmp_path)
    kind = type(layers(model)["base_model.model.lin0"])
    monkeypatch.setattr(kind, "new_bases", None)
    again = peft.PeftModel.from_pretrained(mlp(), tmp_path)
    torch.testing.assert_close(again(x), model(x), **CLOSE)


@methods
@pytest.mark.parametrize("init", [True, "paper", False])
def test_first_values_of_what_is_not_trained(method: str, init: Any) -> None:
    """A gain of 1, also where frozen factors are made when they are first asked for."""
    given = {"use_dora": True, "init_weights": init, "inference_mode": True}
    model = peft.get_peft_model(mlp(), config(method, **given))
    for layer in layers(model).values():
        gain = layer.gain_of("default", *layer.joined(["default"])[:3])
        torch.testing.assert_close(gain, torch.ones_like(gain), rtol=1e-6, atol=0)


@every_method
def test_several_adapters(method: str) -> None:
    """Of those that are active each adds what it makes of W alone; rows have their own; one that is
    deleted leaves nothing.
    """
    model = tuned(method)
    model.add_adapter("two", config(method, use_dora=True, lora_alpha=7.0))
    shift(model, "two")
    model.add_adapter("plain", config(method, lora_alpha=2.0))
    x, alone = inputs(4), {}
    names = ["default", "two", "plain"]
    for name in names:
        model.set_adapter(name)
        alone[name] = model(x)
    with model.disable_adapter():
        alone["__base__"] = model(x)
    rows = ["two", "__base__", "default", "plain"]
    mixed = model(x, adapter_names=rows)
    wanted = torch.stack([alone[name][i] for i, name in enumerate(rows)])
    torch.testing.assert_close(mixed, wanted, **CLOSE)
    for layer in layers(model).values():
        if "two" in layer.scaling:
            x = torch.randn(5, layer.in_features, dtype=torch.float64)
            terms = []
            for active in (*([name] for name in names), names):
                model.base_model.set_adapter(active)
                terms.append(layer(x) - layer.base_layer(x))
            assert min(term.norm() for term in terms) > 0
            torch.testing.assert_close(terms[3], sum(terms[:3]), **CLOSE)
            torch.testing.assert_close(
                terms[1] + layer.base_layer(x), formula(layer, "two", x), **CLOSE
            )
    model.set_adapter("default")
    model.delete_adapter("two")
    assert not any(".two" in name for name in model.state_dict())
    model.add_adapter("two", config(method))
    assert not any("magnitude.two" in name for name in model.state_dict())


@every_method
def test_merging(method: str) -> None:
    """Into W and out of it, bit for bit, one and two of them; copies; for good."""
    model, x = tuned(method), inputs()
    model.add_adapter("two", config(method, use_dora=True))
    shift(model, "two")
    before = model.base_model.model.conv.base_layer.weight.clone()
    for names in (["default"], ["default", "two"]):
        model.base_model.set_adapter(names)
        expected = model(x)
        model.merge_adapter(names)
        torch.testing.assert_close(model(x), expected, **CLOSE)
        other = tuned(method)
        other.add_adapter("two", config(method, use_dora=True))
        other.load_state_dict(model.state_dict())
        other.base_model.set_adapter(names)
        torch.testing.assert_close(other(x), expected, **CLOSE)
        with torch.no_grad():
            other.base_model.model.lin0.base_layer.weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="from what DoRA makes of W nobody can tell W"):
            other.load_state_dict(model.state_dict())
        model.unmerge_adapter()
        assert torch.equal(model.base_model.model.conv.base_layer.weight, before)
        torch.testing.assert_close(model(x), expected, **CLOSE)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, **CLOSE)


@every_method
def test_as_peft_s_dora(method: str, tmp_path: Path) -> None:
    """What PEFT itself loads as LoRA with use_dora; plain LoRA cannot hold it."""
    model, x = tuned(method, target_modules=["lin0", "lin1"]), inputs()
    with pytest.raises(ValueError, match="is with dora, which plain LoRA cannot hold"):
        integration.save_as_lora(tmp_path, model)
    with pytest.raises(ValueError, match="is with dora, which plain LoRA cannot hold"):
        integration.convert_to_lora(model)
    integration.save_as_lora(tmp_path, model, dora=True)
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path).eval()
    assert loaded.peft_config["default"].use_dora
    torch.testing.assert_close(loaded(x), model(x), **CLOSE)
    made, tensors = integration.convert_to_lora(model, dora=True)
    assert made.use_dora
    assert sum(key.endswith("lora_magnitude_vector") for key in tensors) == 2
    with pytest.raises(ValueError, match="lin0 is without dora"):
        integration.convert_to_lora(tuned(method, use_dora=False), dora=True)
    assert not any(layer.supports_lora_conversion() for layer in layers(model).values())


@every_method
def test_refusals(method: str) -> None:
    """Rows without a norm, a sum of adapters, what is no bool; the model is as it was."""
    with pytest.raises(ValueError, match="use_dora is 'yes': it must be True or False"):
        config(method, use_dora="yes")
    base = mlp()
    with torch.no_grad():
        base.lin1.weight[3] = 0.0
    modules = list(base.modules())
    with pytest.raises(ValueError, match="lin1: rows 3 of the weight are zero"):
        peft.get_peft_model(base, config(method, use_dora=True))
    assert list(base.modules()) == modules
    model = tuned(method)
    model.add_adapter("two", config(method))
    with pytest.raises(ValueError, match=r"with use_dora: what it adds|no exact sum of their own"):
        model.base_model.add_weighted_adapter(["two", "default"], [1.0, 1.0], "sum")
    assert list(model.peft_config) == ["default", "two"]


@methods
def test_adapters_of_other_ranks_share_bases(method: str) -> None:
    """Each has constants of the rows of down that it uses."""
    model = tuned(method)
    model.add_adapter("less", config(method, r=2, use_dora=True, target_modules=TARGETS))
    shift(model, "less")
    layer = layers(model)["base_model.model.lin0"]
    x = inputs()
    for _ in range(2):
        for name in ("default", "less"):
            model.set_adapter(name)
            torch.testing.assert_close(layer(x), formula(layer, name, x), **CLOSE)


@every_method
def test_dropout_is_of_the_low_rank_path(method: str) -> None:
    """The gain multiplies all; what is dropped is of x·downᵀ alone."""
    model = tuned(method, lora_dropout=0.5).train()
    layer = layers(model)["base_model.model.lin1"]
    down, core, up, _ = layer.joined(["default"])
    x = torch.randn(70, layer.in_features, dtype=torch.float64)
    y = layer(x)
    low = y / layer.gain_of("default", down, core, up).values - layer.base_layer(x)
    assert int(torch.linalg.matrix_rank(low, tol=1e-8)) <= len(down)
    assert not torch.equal(layer(x), y)
    assert layer(x, **{}).shape == y.shape


@own_methods
def test_offloaded_weights(method: str) -> None:
    """The numbers are those of the whole model."""
    accelerate = pytest.importorskip("accelerate")
    given = {"use_dora": True, "target_modules": TARGETS}
    torch.manual_seed(0)
    wanted = peft.get_peft_model(mlp(), config(method, **given)).eval()
    base = accelerate.cpu_offload(mlp(), execution_device=torch.device("cpu"))
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config(method, **given)).eval()
    assert base.lin0.get_base_layer().weight.is_meta
    x = inputs()
    torch.testing.assert_close(shift(model)(x), shift(wanted)(x), **CLOSE)
