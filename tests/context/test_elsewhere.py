"""Models whose weights are elsewhere between calls: accelerate's offloading to RAM and to disk."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from offload_cases import (
    CLOSE,
    NATIVE,
    Offload,
    Q,
    Tied,
    accelerate,
    adapted,
    peft_model,
    saved,
    to_disk,
)
from offload_cases import offload as offload
from offload_training import assert_trains_alike
from peft_cases import inputs, methods, mlp, peft
from safetensors.torch import save_file

import fused_lowrank
from fused_lowrank import AdapterBank, adapt, load_adapter
from fused_lowrank.files.adapter import complete_layers

native = pytest.mark.parametrize("method", NATIVE)


# --- layers of adapt ---


@native
def test_offloaded_after_adapt(method: str, offload: Offload, tmp_path: Path) -> None:
    """Merged, unmerged, disabled, saved, exported: each is what it is without offloading."""
    model, x, base = adapted(method), inputs(), mlp()
    y = model(x)
    model = offload(model)
    torch.testing.assert_close(model(x), y, **CLOSE)
    fused_lowrank.merge(model)
    torch.testing.assert_close(model(x), y, **CLOSE)
    with fused_lowrank.disable_adapters(model):
        torch.testing.assert_close(model(x), base(x), **CLOSE)
    fused_lowrank.unmerge(model)
    assert model.lin0.weight.is_meta
    torch.testing.assert_close(model(x), y, **CLOSE)
    loaded = load_adapter(mlp(), saved(model, tmp_path / "file"), **Q)
    torch.testing.assert_close(loaded(x), y, **CLOSE)
    fused_lowrank.export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(mlp(), tmp_path / "lora")
    torch.testing.assert_close(lora(x), y, **CLOSE)
    assert "CPU" in (said := str(fused_lowrank.explain(model.lin0, 8))).upper() or "x86" in said


@native
@pytest.mark.parametrize("merged", [True, False])
def test_unloaded_while_offloaded(method: str, merged: bool, offload: Offload) -> None:
    """The plain layers are offloaded as those of the model were."""
    model, x = adapted(method), inputs()
    wanted = model(x) if merged else mlp()(x)
    fused_lowrank.unload(offload(model), merge=merged)
    assert type(model.lin0) is torch.nn.Linear
    assert model.lin0.weight.is_meta
    torch.testing.assert_close(model(x), wanted, **CLOSE)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not model.lin0.weight.is_meta
    torch.testing.assert_close(model(x), wanted, **CLOSE)


@native
def test_hooks_taken_off(method: str, offload: Offload) -> None:
    """Weights come back as they are: merged, and then as they were before."""
    model, x = adapted(method), inputs()
    y = model(x)
    fused_lowrank.merge(offload(model))
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(model(x), y, **CLOSE)
    fused_lowrank.unmerge(model)
    torch.testing.assert_close(model(x), y, **CLOSE)
    fused_lowrank.unload(model)
    torch.testing.assert_close(model(x), mlp()(x), **CLOSE)


@native
def test_offloaded_before_adapt(method: str, offload: Offload, tmp_path: Path) -> None:
    """Adapted, or given an adapter, it computes, trains, merges and unloads."""
    model, x = adapted(method), inputs()
    file, y = saved(model, tmp_path / "file"), model(x)
    fresh = offload(mlp())
    adapt(fresh, method, **NATIVE[method], target_modules=["lin0", "lin1"], **Q)
    assert fresh.lin0.weight.is_meta
    torch.testing.assert_close(fresh(x), mlp()(x), rtol=1e-3, atol=1e-3)
    fused_lowrank.unload(fresh)
    torch.testing.assert_close(fresh(x), mlp()(x), **CLOSE)
    loaded = load_adapter(fresh, file, **Q)
    torch.testing.assert_close(loaded(x), y, **CLOSE)
    assert_trains_alike(loaded, model, x)
    y = model(x)
    fused_lowrank.merge(loaded)
    torch.testing.assert_close(loaded(x), y, **CLOSE)
    fused_lowrank.unload(loaded, merge=True)
    torch.testing.assert_close(loaded(x), y, **CLOSE)


@native
@pytest.mark.parametrize("extra", [(), ("bias",), ("weight", "bias")])
def test_training(method: str, extra: tuple[str, ...], offload: Offload, tmp_path: Path) -> None:
    """What is trained is not taken away: an optimiser has what the next call computes with."""
    trained = {"lora": ("down", "up"), "lora_xs": ("core",), "lora_mini": ("a_train", "b_train")}
    model = adapted(method, train=(*trained[method], *extra))
    other, x = copy.deepcopy(model), inputs()
    assert_trains_alike(offload(model), other, x)
    loaded = load_adapter(mlp(), saved(model, tmp_path / "file"), **Q)
    torch.testing.assert_close(loaded(x), other(x), **CLOSE)


@native
def test_another_adapter_is_loaded(method: str, offload: Offload, tmp_path: Path) -> None:
    """Its frozen factors too go where those of the model are."""
    other = adapted(method)
    with torch.no_grad():
        for layer in (other.lin0, other.lin1):
            for name in layer.factors:
                getattr(layer, name).mul_(2)
    model, x = offload(adapted(method)), inputs()
    load_adapter(model, saved(other, tmp_path / "file"), **Q)
    torch.testing.assert_close(model(x), other(x), **CLOSE)


@methods
def test_bank(method: str, offload: Offload, tmp_path: Path) -> None:
    """Of an offloaded model; from files, and from such a model."""
    other, x = adapted(method), inputs()
    model = offload(copy.deepcopy(other))
    bank = AdapterBank.from_model(model, slots=3)
    bank.add("file", saved(other, tmp_path / "file"))
    bank.add("model", other)
    wanted = torch.where(torch.arange(6)[:, None] % 3 == 1, mlp()(x), other(x))
    with bank.use(["file", None, "model"] * 2):
        torch.testing.assert_close(model(x), wanted, **CLOSE)
    plain = AdapterBank.from_model(copy.deepcopy(other), slots=1)
    plain.add("offloaded", model)
    fused_lowrank.export_lora(bank, tmp_path / "lora", name="file")


def test_modules_trained_whole(offload: Offload, tmp_path: Path) -> None:
    """Of a model that is offloaded, before or after: they are in the file, and trained before."""
    model, x = adapted("lora_xs", modules_to_save=["head"]), inputs()
    before = offload(mlp())
    keywords = {**NATIVE["lora_xs"], "target_modules": ["lin0", "lin1"]}
    adapt(before, "lora_xs", **keywords, modules_to_save=["head"], **Q)
    load_adapter(before, saved(model, tmp_path / "file"), **Q)
    torch.testing.assert_close(before(x), model(x), **CLOSE)
    assert_trains_alike(before, model, x)
    loaded = load_adapter(mlp(), saved(before, tmp_path / "again"), **Q)
    torch.testing.assert_close(loaded(x), model(x), **CLOSE)
    fused_lowrank.unload(before)
    torch.testing.assert_close(before(x), mlp()(x), **CLOSE)


def test_tied_module_trained_whole(tmp_path: Path) -> None:
    """What it is tied to is trained with it, if it was offloaded to RAM; the base is left alone."""
    tokens, keywords = torch.arange(8), {"target_modules": ["lin"], "modules_to_save": ["embed"]}
    base = Tied().double()
    before, state = base(tokens), copy.deepcopy(base.state_dict())
    model = accelerate.cpu_offload(copy.deepcopy(base), "cpu", state_dict=base.state_dict())
    adapt(model, "lora_xs", r=3, **keywords, **Q)
    other = copy.deepcopy(base)
    load_adapter(other, saved(model, tmp_path / "start"), **Q)
    assert_trains_alike(model, other, tokens)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(base.state_dict(), state, rtol=0, atol=0)
    loaded = load_adapter(copy.deepcopy(base), saved(model, tmp_path / "file"), **Q)
    torch.testing.assert_close(loaded(tokens), model(tokens), **CLOSE)
    again = accelerate.cpu_offload(copy.deepcopy(base), "cpu")
    load_adapter(again, tmp_path / "file", **Q)
    torch.testing.assert_close(again(tokens), model(tokens), **CLOSE)
    for each in (model, again):
        fused_lowrank.unload(each)
        torch.testing.assert_close(each(tokens), before, **CLOSE)


def test_model_brought_whole() -> None:
    """By cpu_offload_with_hook: on the CPU between calls, where it is merged and unloaded."""
    model, x = adapted("lora_xs"), inputs()
    y = model(x)
    device = torch.device("cpu")
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device=device)
    fused_lowrank.merge(model)
    torch.testing.assert_close(model(x), y, **CLOSE)
    hook.offload()
    fused_lowrank.unload(model)
    torch.testing.assert_close(model(x), mlp()(x), **CLOSE)


def test_blocks_brought_whole() -> None:
    """By a hook on the block: its layers' weights are nobody else's to bring, or to replace."""
    model, other, x = adapted("lora_xs"), peft_model("lora_xs"), inputs()
    for each in (model, other):
        y = each(x)
        accelerate.cpu_offload(each, execution_device="cpu", preload_module_classes=["Mlp"])
        torch.testing.assert_close(each(x), y, **CLOSE)
    refused = [lambda: fused_lowrank.merge(model), lambda: fused_lowrank.unload(model)]
    refused += [other.merge_adapter, other.unload, other.merge_and_unload]
    for call in refused:
        with pytest.raises(RuntimeError, match=r"brings whole blocks.*remove_hook_from_submodules"):
            call()
    for call in (complete_layers, lambda m: AdapterBank.from_model(m, slots=1)):
        with pytest.raises(ValueError, match=r"lin0\.weight is on the meta device"):
            call(model)


def test_checkpoint_dispatched(tmp_path: Path) -> None:
    """A model that was never whole in memory takes an adapter, merges and unloads it."""
    model, x = adapted("lora_xs"), inputs()
    file = saved(model, tmp_path / "file")
    save_file(mlp().state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    with accelerate.init_empty_weights():
        base = mlp()
    places = {"lin0": "disk", "lin1": "cpu", "conv": "cpu", "head": "disk"}
    base = accelerate.load_checkpoint_and_dispatch(
        base.double(), str(tmp_path / "model.safetensors"), places, offload_folder=tmp_path / "disk"
    )
    load_adapter(base, file, **Q)
    torch.testing.assert_close(base(x), model(x), **CLOSE)
    fused_lowrank.unload(base, merge=True)
    torch.testing.assert_close(base(x), model(x), **CLOSE)


def test_meta_weights_are_refused() -> None:
    """PyTorch would multiply x on a CPU by memory that nobody has written."""
    for kind in ("weight", "down", "core", "up"):
        model = adapted("lora_xs")
        own = getattr(model.lin0, kind)
        setattr(model.lin0, kind, torch.nn.Parameter(own.to("meta")))
        said = r"FusedLoraXSLinear\(in_features=12.* meta device"
        with pytest.raises(RuntimeError, match=said):
            model(inputs())
    model = adapted("lora_xs").to("meta")
    for call in (lambda: fused_lowrank.merge(model), lambda: model.lin0.delta_weight()):
        with pytest.raises((RuntimeError, ValueError), match="meta device"):
            call()
    assert not model.lin0.merged


def test_weights_that_were_not_offloaded_are_named(tmp_path: Path) -> None:
    """A folder of the base's weights has no trained factors, and accelerate drops the model's."""
    to_disk(mlp(), tmp_path)
    with pytest.raises(ValueError, match="core of a FusedLoraXSLinear is not among the weights"):
        to_disk(adapted("lora_xs"), tmp_path)
