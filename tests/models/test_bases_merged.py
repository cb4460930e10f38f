"""Merging into weights that are quantised: as PEFT does it, what is lost, and the way back."""

from __future__ import annotations

import copy
import re
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from base_cases import (
    KINDS,
    adapted,
    eight_bit,
    four_bit,
    gradients,
    inputs,
    layers_of,
    methods,
    model_of,
    needs,
    shifted,
    torchao,
    trained,
)
from torch import Tensor, nn

from fused_lowrank import (
    AdapterBank,
    adapt,
    disable_adapters,
    export_lora,
    load_adapter,
    merge,
    merge_and_restart,
    parameter_groups,
    save_adapter,
    unload,
    unmerge,
)
from fused_lowrank.compute.base import requantise
from fused_lowrank.methods.accept import base_of

MERGED = ["nf4", "fp4", "int8", "torchao-int8", "torchao-fp8"]
merging = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs(KINDS[kind][1])) for kind in MERGED]
)


@pytest.fixture(autouse=True)
def _without_a_word() -> Any:
    """Each test but those that look for it is spared the warning of what was lost."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "merging lost")
        warnings.filterwarnings("ignore", ".*different generations due to rounding errors")
        yield


def stored(module: nn.Module) -> list[Tensor]:
    """Copies of all that the values of a module are made of."""
    base: Any = base_of(module)
    state = base.state()[1] if base.kind == "4bit" else None
    offset = [state.offset] if state is not None and state.nested else []
    within = [module.weight, base.state()[1]] if base.kind == "8bit" else base.stored()
    return [own.detach().clone() for own in (*within, *offset)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lists hold the same bits."""
    pairs = [(a.contiguous(), b.contiguous()) for a, b in zip(one, other, strict=True)]
    kinds = all((a.dtype, a.shape) == (b.dtype, b.shape) for a, b in pairs)
    return kinds and all(
        torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)) for a, b in pairs
    )


# --- as PEFT does it ---

NETS: dict[str, tuple[Callable[[torch.dtype], nn.Module], str]] = {
    "nf4": (four_bit("nf4", nested=False), "bitsandbytes"),
    "nf4, double": (four_bit("nf4"), "bitsandbytes"),
    "fp4": (four_bit("fp4", nested=False), "bitsandbytes"),
    "fp4, double": (four_bit("fp4"), "bitsandbytes"),
    "int8": (eight_bit, "bitsandbytes"),
    "torchao int8": (torchao("Int8WeightOnlyConfig"), "torchao"),
    "torchao int8 of x": (torchao("Int8DynamicActivationInt8WeightConfig"), "torchao"),
    "torchao fp8": (torchao("Float8WeightOnlyConfig"), "torchao"),
}


def with_storage(storage: torch.dtype) -> Callable[[torch.dtype], nn.Module]:
    """nf4 in bytes of another dtype, as FSDP wants them."""
    return lambda dtype: four_bit("nf4", quant_storage=storage)(dtype)


NETS["nf4 in bfloat16"] = with_storage(torch.bfloat16), "bitsandbytes"


def by_peft(net: nn.Module, kind: str, factors: dict[str, dict[str, Tensor]], dora: bool) -> Any:
    """A model with these factors merged into it by PEFT, unloaded."""
    from peft import LoraConfig, get_peft_model

    net.is_loaded_in_4bit, net.is_loaded_in_8bit = "4" in kind, kind == "int8"
    if kind.startswith("torchao"):
        import torchao.quantization as ao

        name = {"int8": "Int8WeightOnly", "fp8": "Float8WeightOnly"}.get(kind[8:])
        config = getattr(ao, f"{name or 'Int8DynamicActivationInt8Weight'}Config")
        quantization = types.SimpleNamespace(get_apply_tensor_subclass=config)
        net.hf_quantizer = types.SimpleNamespace(quantization_config=quantization)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], use_dora=dora)
    model = get_peft_model(net, config)
    for name, own in factors.items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(own["down"])
        layer.lora_B["default"].weight.data.copy_(own["up"])
        if dora:
            layer.lora_magnitude_vector["default"].weight.data.copy_(own["magnitude"])
    return model.merge_and_unload()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [pytest.param(k, marks=needs(NETS[k][1])) for k in NETS])
def test_the_bits_are_those_that_peft_merges(kind: str, dtype: torch.dtype, dora: bool) -> None:
    """Of the same factors over the same module; PEFT forgets DoRA's magnitude over torchao."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    net = NETS[kind][0](dtype)
    theirs = copy.deepcopy(net) if "torchao" in kind else None
    if theirs is None:
        torch.manual_seed(0)
        theirs = NETS[kind][0](dtype)
    own = {"target_modules": ["first", "second"], "r": 4, "alpha": 6.0, "dora": dora}
    model: Any = shifted(adapt(net, "lora", progress=False, **own))
    factors = {name: model.get_submodule(name).factors_now() for name in ("first", "second")}
    factors = {
        name: {f: t.detach().clone() for f, t in own.items()} for name, own in factors.items()
    }
    merged: Any = unload(model, merge=True)
    if dora and kind.startswith("torchao"):
        return
    theirs = by_peft(theirs, kind, factors, dora)
    for name in ("first", "second"):
        ours, peft = merged.get_submodule(name), theirs.get_submodule(name)
        assert type(ours) is type(peft)
        if not dora or dtype == torch.float32 or kind == "int8":
            assert equal(stored(ours), stored(peft))
            continue  # PEFT rounds DoRA's sum to bfloat16 before it is quantised
        one, other = base_of(ours).values().float(), base_of(peft).values().float()
        assert float((one - other).norm() / one.norm()) < 0.04


# --- what is merged ---


@merging
@methods
def test_merged_and_back(kind: str, method: str) -> None:
    """W is W + ΔW but for the quantising; disabled, saved and unmerged the layer has the old W."""
    model, x = adapted(kind, method), inputs()
    y, modules = model(x).detach(), [layer.base_layer for layer in layers_of(model)]
    before = [stored(module) for module in modules]
    with disable_adapters(model):
        plain = model(x).detach()
    wanted = [own.base_weight.values() + own.delta_weight() for own in layers_of(model)]
    merge(model)
    assert [layer.base_layer for layer in layers_of(model)] == modules
    for layer, whole, old in zip(layers_of(model), wanted, before, strict=True):
        off = base_of(layer.base_layer).values() - whole
        assert layer.merged
        assert 0 < float(off.norm() / whole.norm()) < (0.13 if kind in ("nf4", "fp4") else 0.04)
        assert not equal(stored(layer.base_layer), old)
        torch.testing.assert_close(layer.base_weight.values() + layer.delta_weight(), whole)
    merged = model(x).detach()
    assert 0 < float((merged - y).norm() / y.norm()) < 0.2
    with disable_adapters(model):
        torch.testing.assert_close(model(x).detach(), plain, rtol=0, atol=0)
    unmerge(model)
    assert all(equal(stored(m), old) for m, old in zip(modules, before, strict=True))
    torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=0)
    assert unload(model, merge=True) is model
    assert [model.first, model.second] == modules
    torch.testing.assert_close(model(x).detach(), merged)


@merging
def test_a_gradient_of_before(kind: str) -> None:
    """A backward of a call from before the merging is still that of W."""
    model, x = adapted(kind), inputs()
    expected = gradients(model, trained(model), x)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    merge(model)
    torch.manual_seed(2)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    found = torch.autograd.grad(y, [leaf, *trained(model)], dy)
    torch.testing.assert_close(list(found), expected[1:], rtol=0, atol=0)
    unmerge(model)
    torch.testing.assert_close(gradients(model, trained(model), x), expected, rtol=0, atol=0)


@merging
def test_a_gradient_of_the_merged(kind: str) -> None:
    """A backward of a call while merged is still that of W + ΔW after `unmerge`."""
    model, leaf = adapted(kind), inputs().requires_grad_()
    merge(model)
    y = model(leaf).sum()
    (expected,) = torch.autograd.grad(y, leaf, retain_graph=True)
    unmerge(model)
    torch.testing.assert_close(torch.autograd.grad(y, leaf)[0], expected, rtol=0, atol=0)


@merging
def test_what_is_lost_is_said(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a model, with the figures, which are those of all of W."""
    monkeypatch.setattr(requantise, "ROWS", 24)  # whole blocks, and a rest
    model = adapted(kind)
    deltas = [layer.delta_weight() for layer in layers_of(model)]
    wanted = [own.base_weight.values() + d for own, d in zip(layers_of(model), deltas, strict=True)]
    with pytest.warns(UserWarning, match="merging lost") as said:
        merge(model)
    found = [base_of(layer.base_layer).values() for layer in layers_of(model)]
    off = [(a - b).norm() for a, b in zip(found, wanted, strict=True)]
    lost = [float(o / d.norm()) for o, d in zip(off, deltas, strict=True)]
    worst = lost.index(max(lost))
    whole = float(off[worst] / wanted[worst].norm())
    numbers = [float(n) for n in re.findall(r"([\d.]+)%", str(said[0].message))]
    assert len(said) == 1
    assert numbers == pytest.approx([100 * max(lost), 100 * whole], abs=0.011)
    unmerge(model)
    with pytest.warns(UserWarning, match="merging lost"):
        assert model.first.merge() == pytest.approx(lost[0], rel=1e-4)
    assert model.first.merge() == 0.0  # it is merged


@merging
def test_nothing_is_lost_of_nothing(kind: str) -> None:
    """Where ΔW is zero the weight stays as it is stored."""
    model = adapt(model_of(kind), "lora", target_modules=["first", "second"], progress=False)
    before = [stored(layer.base_layer) for layer in layers_of(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unload(model, merge=True)
    after = [stored(module) for module in (model.first, model.second)]
    assert all(equal(*pair) for pair in zip(after, before, strict=True))


@merging
def test_moved_and_copied_while_merged(kind: str) -> None:
    """What is kept goes along."""
    model, x = adapted(kind, dtype=torch.bfloat16), inputs(torch.bfloat16)
    y = model(x).detach()
    merge(model)
    merged = model(x).detach()
    other = copy.deepcopy(model)
    assert other.first.base_weight.module is not model.first.base_weight.module
    unmerge(model.to("cpu"))
    torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=0)
    torch.testing.assert_close(other(x).detach(), merged, rtol=0, atol=0)
    unmerge(other)
    torch.testing.assert_close(other(x).detach(), y, rtol=0, atol=0)
    merge(model)
    seen: list[Tensor] = []
    model._apply(lambda own: seen.append(own) or own)
    for module in (model.first.base_layer, model.first.base_weight.module):
        assert any(own is module.weight for own in seen)


@merging
def test_files_of_a_merged_model(kind: str, tmp_path: Path) -> None:
    """They are the adapter's over the old W; and as plain LoRA for PEFT."""
    model, x = adapted(kind), inputs()
    y = model(x).detach()
    merge(model)
    save_adapter(model, tmp_path / "adapter")
    export_lora(model, tmp_path / "peft")
    loaded = load_adapter(model_of(kind), tmp_path / "adapter", progress=False)
    torch.testing.assert_close(loaded(x).detach(), y, rtol=0, atol=0)
    with pytest.raises(ValueError, match="another base"):
        load_adapter(unload(model, merge=True), tmp_path / "adapter", progress=False)
    peft = pytest.importorskip("peft")
    plain: Any = model_of(kind)
    plain.is_loaded_in_4bit, plain.is_loaded_in_8bit = kind in ("nf4", "fp4"), kind == "int8"
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").train()
    torch.testing.assert_close(theirs(x).detach(), y, rtol=1e-4, atol=1e-4)


@merging
def test_a_state_dict_of_a_merged_model(kind: str) -> None:
    """It does not tell W, and weights are not put where W + ΔW is: both are refused."""
    model = adapted(kind)
    plain = model.state_dict()
    merge(model)
    with pytest.raises(RuntimeError, match="first is merged: unmerge it before loading"):
        model.load_state_dict(plain)
    only = {key: value for key, value in plain.items() if "base_layer" in key}
    with pytest.raises(RuntimeError, match="first is merged: unmerge it before loading"):
        model.load_state_dict(only, strict=False)
    with pytest.raises(RuntimeError, match=r"does not tell W: unmerge\(model\) before"):
        adapted(kind).load_state_dict(model.state_dict())


@merging
def test_in_a_bank(kind: str) -> None:
    """A merged layer is called by its own, without the bank's adapters."""
    model, x = adapted(kind, "lora_xs"), inputs()
    bank = AdapterBank.from_model(model, slots=4)
    bank.add("a", model)
    with bank.use("a"):
        y = model(x)
    merge(model)
    with pytest.raises(RuntimeError, match="first is merged"), bank.use("a"):
        model(x)
    unmerge(model)
    with bank.use("a"):
        torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    bank.close()
    with pytest.raises(ValueError, match="first is merged"):
        AdapterBank.from_model(merge(model), slots=4)


def test_packed_for_inference() -> None:
    """A 4-bit weight that the library has packed is merged as one that it has not."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    found = []
    for pack in (False, True):
        model = adapted("fp4")
        for layer in layers_of(model):
            if pack:
                weight = layer.base_layer.weight
                weight.data, _ = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        unload(model, merge=True)
        found.append([base_of(module).values() for module in (model.first, model.second)])
        assert model(inputs()).isfinite().all()
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / one.norm()) < 0.02


# --- what is refused ---


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        pytest.param("opaque", "lies over Opaque, whose weight is no plain matrix"),
        pytest.param("subclass", "has a weight of Rows8, which does not say how it was quantised"),
        pytest.param(
            "torchao-int4",
            "has a weight of IntxUnpackedToInt8Tensor, which does not say",
            marks=needs("torchao"),
        ),
    ],
)
def test_refused(kind: str, said: str) -> None:
    """With what to do instead, and nothing is changed."""
    model, x = adapted(kind), inputs()
    y = model(x)
    for call in (lambda: merge(model), lambda: unload(model, merge=True), model.first.merge):
        with pytest.raises(TypeError, match=f"{said}.*dequantise the model"):
            call()
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)


@merging
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite(kind: str, value: float) -> None:
    """The model is as it was."""
    model, x = adapted(kind), inputs()
    before = [stored(layer.base_layer) for layer in layers_of(model)]
    kept = model.second.up.detach().clone()
    model.second.up.data[3] = value
    with pytest.raises(ValueError, match="second: cannot merge: the adapter holds NaN or Inf"):
        merge(model)
    assert not any(layer.merged for layer in layers_of(model))
    after = [stored(layer.base_layer) for layer in layers_of(model)]
    assert all(equal(*pair) for pair in zip(after, before, strict=True))
    model.second.up.data.copy_(kept)
    assert model(x).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int8", torch.float32), ("torchao-int8", torch.float16)]
)
def test_more_than_it_can_hold(kind: str, dtype: torch.dtype) -> None:
    """bitsandbytes takes float16 to quantise, and torchao what the weight shows."""
    pytest.importorskip(KINDS[kind][1])
    model = adapted(kind, dtype=dtype)
    model.second.up.data[3] = 1e6
    with pytest.raises(ValueError, match=r"second: cannot merge: W \+ ΔW is more than a Linear"):
        merge(model)
    assert not any(layer.merged for layer in layers_of(model))


@merging
def test_no_restart(kind: str) -> None:
    """Each would lose some of ΔW for good."""
    model = adapted(kind)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3))
    with pytest.raises(TypeError, match=r"lies over .*, in which each restart would lose"):
        merge_and_restart(model, optimizer, progress=False)


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("blocks", ["PerTensor", "PerRow", "PerGroup"])
def test_blocks_of_torchao(name: str, blocks: str) -> None:
    """They are of the same size, and the bits those that torchao makes of W + ΔW."""
    ao = pytest.importorskip("torchao.quantization")
    from torchao.quantization import granularity

    if (name, blocks) == ("Float8WeightOnlyConfig", "PerGroup"):
        pytest.skip("float8 has none")
    own = {"granularity": getattr(granularity, blocks)(*([32] if blocks == "PerGroup" else []))}
    torch.manual_seed(0)
    net = torchao(name, **own)(torch.float32)
    model = shifted(adapt(net, "lora", target_modules=["first"], r=4, progress=False))
    wanted = nn.Linear(64, 128)
    wanted.weight.data = model.first.base_weight.values() + model.first.delta_weight()
    ao.quantize_(wanted, getattr(ao, name)(**own))
    assert equal(stored(unload(model, merge=True).first), stored(wanted))
