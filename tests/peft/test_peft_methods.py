"""The methods as methods of PEFT: what they compute, alone and several at once."""

import copy
import io
from typing import Any

import pytest
import torch
from peft_cases import (
    CLOSE,
    CONFIGS,
    SETTINGS,
    SHARING,
    by_hand,
    config,
    every_method,
    inputs,
    layers,
    methods,
    mlp,
    peft,
)

# --- what is computed ---


@every_method
def test_the_equation(method: str) -> None:
    """Every kind of layer against the formula, with patterns for rank and alpha, in fp64."""
    given = config(
        method,
        target_modules=["lin0", "lin1", "conv"],
        lora_alpha=6,
        fan_in_fan_out=True,
        alpha_pattern={"conv": 10},
        **({} if method in SHARING else {"rank_pattern": {"lin1": 3}}),
    )
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = peft.get_peft_model(mlp(), given)
    found = layers(model)
    assert len(found) == 3
    r = SETTINGS[method]["r"]
    scalings = {name.rpartition(".")[2]: layer.scaling["default"] for name, layer in found.items()}
    assert scalings == {"lin0": 6 / r, "lin1": 6 / (r if method in SHARING else 3), "conv": 10 / r}
    for layer in found.values():
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(x), by_hand(layer, "default", x), **CLOSE)
        assert not torch.allclose(layer(x), layer.base_layer(x))


@methods
def test_it_runs_through_lowrank_linear(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of it a layer, which keeps nothing of the size of x for the backward."""
    from fused_lowrank.integrations.peft.layer import base as module

    model = peft.get_peft_model(mlp(), config(method)).train()
    calls, real = [], module.lowrank_linear
    monkeypatch.setattr(
        module, "lowrank_linear", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k)
    )
    layer, kept = next(iter(layers(model).values())), []
    x = inputs(50)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = layer(x)
    assert calls == [x.shape]
    assert y.requires_grad
    assert not {(50, 12), (50, 16)} & {tuple(shape) for shape in kept}


@every_method
@pytest.mark.parametrize("init", [True, "identity", "paper", "gaussian", False])
def test_how_it_starts(method: str, init: Any) -> None:
    """As the base model or not; and whatever it is, the gradients are not all zero."""
    base, x = mlp(), inputs()
    if init not in (True, False, *CONFIGS[method].words):
        pytest.skip("there is no such word")
    y = base(x)
    model = peft.get_peft_model(base, config(method, init_weights=init))
    starts = model(x)
    assert torch.equal(starts, y) == (init in (True, "identity", "gaussian"))
    if method == "lora_xs" and init == "paper":
        torch.testing.assert_close(starts, y, rtol=1e-3, atol=1e-3)
    starts.square().sum().backward()
    assert any(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@every_method
def test_dropout_and_rslora(method: str) -> None:
    """rsLoRA divides by √r; dropout drops in training alone, and what it keeps is scaled up."""
    given = config(method, lora_dropout=0.5, use_rslora=True, lora_alpha=3)
    model = peft.get_peft_model(mlp(), given)
    layer = model.base_model.model.lin0
    assert layer.scaling["default"] == 3 / SETTINGS[method]["r"] ** 0.5
    x = inputs()
    model.train()
    assert not torch.equal(layer(x), layer(x))
    y = layer.base_layer(x)
    mean = torch.stack([layer(x) - y for _ in range(3000)]).mean(0)
    model.eval()
    wanted = layer(x) - y
    assert (mean - wanted).norm() < 0.1 * wanted.norm()


# --- several adapters ---


@every_method
def test_several_adapters(method: str) -> None:
    """Each alone, their sum when both are active, none when disabled; deleting leaves others."""
    base, x = mlp(), inputs()
    y = base(x)
    model = peft.get_peft_model(base, config(method))
    model.add_adapter("two", config(method, r=3, lora_alpha=5))
    model.eval()
    layer = model.base_model.model.lin0
    out = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        out[name] = model(x)
        torch.testing.assert_close(layer(x), by_hand(layer, name, x), **CLOSE)
    assert not torch.allclose(out["default"], out["two"])
    model.base_model.set_adapter(["default", "two"])
    both = by_hand(layer, "default", x) + by_hand(layer, "two", x) - layer.base_layer(x)
    torch.testing.assert_close(layer(x), both, **CLOSE)
    with model.disable_adapter():
        assert torch.equal(model(x), y)
    model.set_adapter("default")
    model.delete_adapter("two")
    assert torch.equal(model(x), out["default"])
    assert not any(".two" in name for name in model.state_dict())


@every_method
def test_several_active_with_dropout(method: str) -> None:
    """Each adapter drops by its own probability: one without any is exact."""
    model = peft.get_peft_model(mlp(), config(method))
    model.add_adapter("two", config(method, lora_dropout=0.5))
    model.base_model.set_adapter(["default", "two"])
    layer, x = model.base_model.model.lin0, inputs()
    model.train()
    base = layer.base_layer(x)
    one, two = (by_hand(layer, name, x) - base for name in ("default", "two"))
    mean = torch.stack([layer(x) - base for _ in range(3000)]).mean(0)
    assert (mean - one - two).norm() < 0.1 * two.norm()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        getattr(layer, layer.adapter_layer_names[0])["two"].zero_()
    torch.testing.assert_close(layer(x), base + one, **CLOSE)


# --- copies, and other ways in ---


@methods
def test_copies(method: str) -> None:
    """deepcopy and a pickle of the whole model compute the same, with bases of their own."""
    model = peft.get_peft_model(mlp(), config(method)).eval()
    x = inputs()
    y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), y)
        ours, theirs = (m.base_model.model.lin0.basis_down for m in (model, other))
        assert ours.data_ptr() != theirs.data_ptr()
        assert not theirs.requires_grad


@every_method
def test_transformers_own_way(method: str) -> None:
    """model.add_adapter of transformers, which injects without PeftModel; one layer of two."""
    pytest.importorskip("transformers")
    from architectures import batch, tiny

    model = tiny("llama")
    chosen = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {**SETTINGS[method], "init_weights": False, "target_modules": chosen}
    inputs = batch("llama", 5)
    plain = model(**inputs).logits
    model.add_adapter(CONFIGS[method](**settings, layers_to_transform=[1], layers_pattern="layers"))
    names = list(layers(model))
    assert len(names) == 7
    assert all(".1." in name for name in names)
    assert not torch.allclose(model(**inputs).logits, plain)
    model.disable_adapters()
    assert torch.equal(model(**inputs).logits, plain)
