"""PEFT's own DoRA: its numbers, its folders, and ours in its format."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dora_cases import SETTINGS, K, M, Net, adapted, close, shift
from torch import Tensor, nn

from fused_lowrank import adapt, export_lora, load_adapter, save_adapter, unload
from fused_lowrank.files import cli

peft = pytest.importorskip("peft")
CONFIG = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], "use_dora": True}


def theirs(net: nn.Module, **keywords: Any) -> Any:
    """A model of PEFT's with DoRA, all of whose trained values are away from their start."""
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**{**CONFIG, **keywords}))
    shift(model)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """y, dx, and the gradients of what is trained, by the names that PEFT's files have."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    torch.manual_seed(2)
    trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
    grads = torch.autograd.grad(y, [leaf, *trained.values()], torch.randn(y.shape).to(y.dtype))
    found = {"y": y.detach(), "x": grads[0]}
    for name, grad in zip(trained, grads[1:], strict=True):
        name = name.removeprefix("base_model.model.").replace(".default", "")
        name = name.replace(".base_layer.bias", ".bias").removesuffix(".weight")
        for ours, other in (
            ("down", "lora_A"),
            ("up", "lora_B"),
            ("magnitude", "lora_magnitude_vector"),
        ):
            name = name.replace(other, ours)
        found[name] = grad
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"use_rslora": True, "bias": "lora_only"},
        {"rank_pattern": {"second": 2}, "alpha_pattern": {"first": 3}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_same_numbers(keywords: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """Their folder is loaded: output, gradients and merged weight are as near to exact ones."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    model = theirs(net, **keywords)
    model.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(net), tmp_path, progress=False)
    x = torch.randn(M, K).to(dtype)
    found, other = gradients(ours, x), gradients(model, x)
    exact = gradients(copy.deepcopy(model).double(), x.double())
    assert found.keys() == other.keys() == exact.keys()
    assert {"first.magnitude", "second.down", "second.up"} <= found.keys()
    least = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for name, truth in exact.items():
        off, of_theirs = (float((g[name].double() - truth).norm()) for g in (found, other))
        assert off <= max(2.5 * of_theirs, least * float(truth.norm())), name
    merged, of_peft = unload(ours, merge=True), model.merge_and_unload()
    for name in ("first", "second"):
        a, b = (getattr(one, name).weight for one in (merged, of_peft))
        close([a], [b], least)


@pytest.mark.parametrize(
    ("method", "by"),
    [  # of a file that has NOLA's random factors not, its base model makes them
        (method, by)
        for method in SETTINGS
        for by in (["model"] if method == "nola" else ["model", "file", "cli"])
    ],
)
def test_export(method: str, by: str, tmp_path: Path, capsys: Any) -> None:
    """As PEFT's DoRA, which PEFT loads, and so does load_adapter; never as plain LoRA."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(M, K)
    model = adapted(net, method)
    save_adapter(model, tmp_path / "file")
    source: Any = model if by == "model" else tmp_path / "file"
    with pytest.raises(ValueError, match=r"plain LoRA cannot hold: merge .*dora=True.*peft-dora"):
        export_lora(source, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    if by == "cli":
        assert cli.main(["convert", str(source), str(tmp_path / "dora"), "--to", "peft-lora"]) == 1
        assert "cannot hold" in capsys.readouterr().err
        assert cli.main(["convert", str(source), str(tmp_path / "dora"), "--to", "peft-dora"]) == 0
    else:
        export_lora(source, tmp_path / "dora", dora=True)
    assert json.loads((tmp_path / "dora" / "adapter_config.json").read_text())["use_dora"] is True
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "dora")
    close([loaded(x)], [model(x)], 2e-6)
    back = load_adapter(copy.deepcopy(net), tmp_path / "dora", progress=False)
    close([back(x)], [model(x)], 2e-6)
    assert cli.main(["inspect", str(tmp_path / "dora")]) == 0
    assert "lora with dora" in capsys.readouterr().out


def test_export_of_what_is_without_it(tmp_path: Path) -> None:
    """dora=True is for adapters with it."""
    model = adapt(Net(), "lora", target_modules=["first"], r=2, progress=False)
    with pytest.raises(ValueError, match="first is without dora: with dora=False"):
        export_lora(model, tmp_path / "folder", dora=True)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    """Plain LoRA as before; a folder that lacks a magnitude; settings that only PEFT knows."""
    net = Net()
    theirs(net, use_dora=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is plain LoRA"):
        load_adapter(net, tmp_path, progress=False)
    config = tmp_path / "adapter_config.json"
    there = json.loads(config.read_text())
    config.write_text(json.dumps({**there, "use_dora": True}))
    with pytest.raises(ValueError, match="lacks magnitude of first"):
        load_adapter(net, tmp_path, progress=False)
    config.write_text(json.dumps({**there, "use_dora": True, "fan_in_fan_out": True}))
    with pytest.raises(ValueError, match="fan_in_fan_out is True"):
        load_adapter(net, tmp_path, progress=False)
