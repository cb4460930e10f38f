"""Parameters as DeepSpeed's ZeRO-3 leaves them between calls: empty, with their shape beside them.

DeepSpeed is not there: a stand-in has what it gives a Parameter, `ds_id` and `ds_shape`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import config, inputs, integration, methods, mlp, peft, state

import fused_lowrank
from fused_lowrank import AdapterBank, adapt, load_adapter, save_adapter

KEYWORDS: dict[str, Any] = {"target_modules": ["lin0", "lin1"], "progress": False}
WITHIN = r"ZeRO-3.*within deepspeed.zero.GatheredParameters"


def partitioned(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its values put aside."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.aside = parameter.data
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return model


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """As deepspeed.zero.GatheredParameters(list(model.parameters()))."""
    parameters = [p for p in model.parameters() if hasattr(p, "ds_id")]
    for parameter in parameters:
        parameter.data = parameter.aside
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype)


def adapted() -> torch.nn.Module:
    model = adapt(mlp(), "lora_xs", r=4, **KEYWORDS)
    with torch.no_grad():
        model.lin0.core.normal_()
    return model


def test_layers(tmp_path: Path) -> None:
    """Saved and exported within the gathering; refused outside it, and whatever puts others in."""
    model, x = adapted(), inputs()
    y = model(x)
    save_adapter(model, tmp_path / "whole")
    partitioned(model)
    for refused in (
        lambda: save_adapter(model, tmp_path / "file"),
        lambda: fused_lowrank.export_lora(model, tmp_path / "lora"),
    ):
        with pytest.raises(ValueError, match=WITHIN):
            refused()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    with pytest.raises(ValueError, match="lin0 is sharded by DeepSpeed's ZeRO-3"):
        AdapterBank.from_model(model, slots=2)
    with pytest.raises(ValueError, match="is sharded by DeepSpeed's ZeRO-3"):
        fused_lowrank.explain(model.lin0, 8)
    with pytest.raises(RuntimeError, match="cannot merge under DeepSpeed's ZeRO-3"):
        model.lin0.merge()
    with pytest.raises(ValueError, match="load an adapter before DeepSpeed's ZeRO-3"):
        load_adapter(model, tmp_path / "whole", progress=False)
    with gathered(model):
        for refused in (fused_lowrank.merge, fused_lowrank.unload):
            with pytest.raises(RuntimeError, match="under DeepSpeed's ZeRO-3"):
                refused(model)
        save_adapter(model, tmp_path / "file")
        fused_lowrank.export_lora(model, tmp_path / "lora")
    loaded = load_adapter(mlp(), tmp_path / "file", progress=False)
    torch.testing.assert_close(loaded(x), y, rtol=1e-10, atol=1e-10)
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "lora")
    torch.testing.assert_close(loaded(x), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["lora", "lora_xs", "lora_mini"])
def test_adapt(method: str, tmp_path: Path) -> None:
    """Of a base that is partitioned: within the gathering, as `load_adapter` is."""
    model, settings = partitioned(mlp()), {"a": 5, "b": 4} if method == "lora_mini" else {}
    before = dict(model.named_modules())
    with pytest.raises(TypeError, match=f"lin0 has its weight sharded by DeepSpeed's {WITHIN[:6]}"):
        adapt(model, method, r=2, **settings, **KEYWORDS)
    save_adapter(adapted(), tmp_path / "file")
    with pytest.raises(ValueError, match="lin0 has its weight sharded by DeepSpeed's ZeRO-3"):
        load_adapter(model, tmp_path / "file", progress=False)
    assert dict(model.named_modules()) == before
    with gathered(model):
        load_adapter(model, tmp_path / "file", progress=False)
        loaded, x = load_adapter(mlp(), tmp_path / "file", progress=False), inputs()
        torch.testing.assert_close(model(x), loaded(x))


@methods
def test_peft(method: str, tmp_path: Path) -> None:
    """Of a gathered state_dict the file is that of a whole model; without one it is refused."""
    model, x = peft.get_peft_model(mlp(), config(method)), inputs()
    y, whole = model(x), state(model)
    partitioned(model)
    with pytest.raises(ValueError, match="ZeRO-3: give save_pretrained the gathered state_dict"):
        model.save_pretrained(tmp_path / "not")
    with pytest.raises(ValueError, match="ZeRO-3"):
        integration.save_as_lora(tmp_path / "not", model)
    for refused in (model.merge_adapter, model.unload, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="under DeepSpeed's ZeRO-3"):
            refused()
    model.save_pretrained(tmp_path / "file", state_dict=whole)
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "file")
    torch.testing.assert_close(loaded(x), y, rtol=1e-10, atol=1e-10)
    other = mlp()
    torch.nn.init.normal_(other.lin1.weight)
    with pytest.raises(ValueError, match="another base model"):  # so it has a fingerprint
        peft.PeftModel.from_pretrained(other, tmp_path / "file")
    with pytest.raises(ValueError, match="lin0 has its weight sharded by DeepSpeed's ZeRO-3"):
        peft.get_peft_model(partitioned(mlp()), config(method))


@methods
def test_peft_trained_parameters_alone(method: str, tmp_path: Path) -> None:
    """A state_dict without what is frozen: its file lacks nothing while that is here."""
    model, x = peft.get_peft_model(mlp(), config(method)), inputs()
    y = model(x)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path / "file", state_dict=trained)
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "file")
    torch.testing.assert_close(loaded(x), y, rtol=1e-10, atol=1e-10)
    partitioned(model)
    with pytest.raises(ValueError, match=r"basis_down is sharded.* of frozen factors too"):
        model.save_pretrained(tmp_path / "not", state_dict=trained)
