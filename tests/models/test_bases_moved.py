"""Bases that are moved, cast, copied, offloaded or quantised after `adapt`: carried or refused."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from base_cases import Net, adapted, inputs, model_of, needs, shifted
from quantised_libraries import HQQLinear, TorchLinear
from torch import nn

from fused_lowrank import adapt, load_adapter, save_adapter

TARGETS: dict[str, Any] = {"target_modules": ["first", "second"], "progress": False}
library = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs("bitsandbytes")) for kind in ("nf4", "int8")]
)


def packed_into(storage: torch.dtype, compute: torch.dtype = torch.float32) -> Any:
    """A model of 4-bit layers, whose bytes are stored as numbers of a dtype."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    own = {"compute_dtype": compute, "quant_type": "nf4", "quant_storage": storage}
    return Net(lambda k, n: bnb.nn.Linear4bit(k, n, **own)).to("cpu")


def over_packed(storage: torch.dtype, compute: torch.dtype = torch.float32) -> Any:
    """Such a model, adapted."""
    return shifted(adapt(packed_into(storage, compute), "lora", **TARGETS))


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_bits_are_not_cast(storage: torch.dtype, to: torch.dtype) -> None:
    """4-bit weights in a float dtype, as FSDP wants them, would be garbage: the cast is refused."""
    model, x = over_packed(storage), inputs()
    y = model(x).detach()
    if storage in (torch.uint8, to):
        off = (model.to(to)(x.to(to)).detach() - y).norm() / y.norm()
        assert float(off) < 0.02
        return
    with pytest.raises(TypeError, match=f"packed into {storage}, and a cast to {to} would"):
        model.to(to)
    torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=0)


def test_bits_that_were_cast() -> None:
    """Before `adapt`, and by somebody who replaces the tensor itself."""
    model = packed_into(torch.bfloat16).half()
    with pytest.raises(TypeError, match=r"first is a Linear4bit whose weight was packed into"):
        adapt(model, "lora", **TARGETS)
    model = over_packed(torch.bfloat16)
    with torch.no_grad():
        model.first.base_layer.weight.data = model.first.base_layer.weight.data.half()
    with pytest.raises(TypeError, match=r"cast to torch\.float16.*param_dtype"):
        model(inputs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16, torch.float32])
def test_a_compute_dtype_that_is_not_that_of_x(compute: torch.dtype, dtype: torch.dtype) -> None:
    """x is cast to it and y back, as by the library; gradients are of their tensors' dtypes."""
    model = over_packed(torch.uint8, compute)
    x = inputs().to(dtype).detach().clone().requires_grad_()
    y = model(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    exact = over_packed(torch.uint8)(inputs().double()).detach()
    off = float((y.detach().double() - exact).norm() / exact.norm())
    assert off < 8 * max(torch.finfo(kind).eps for kind in (compute, dtype, torch.float32))


def test_a_compute_dtype_of_a_module_that_takes_no_other() -> None:
    """HQQ's layers raise for an x of another dtype: over them, it is cast."""
    torch.manual_seed(0)
    model = Net(lambda k, n: HQQLinear(k, n, torch.bfloat16))
    with pytest.raises(RuntimeError, match="dtype"):
        model.first(inputs())
    adapt(model, "lora", **TARGETS)
    y = model(inputs())
    assert y.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float())
    model.first.base_layer.register_forward_hook(lambda module, given, result: None)
    torch.testing.assert_close(model(inputs()), y, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs()).isfinite().all()


@library
def test_copies(kind: str) -> None:
    """By copy, pickle and torch.save; the copy's W is its own module's."""
    model, x = adapted(kind, "lora_xs"), inputs()
    y, file = model(x), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), read):
        torch.testing.assert_close(other(x), y, rtol=0, atol=0)
        assert other.first.base_weight.module is other.first.base_layer
        assert other.first.base_layer is not model.first.base_layer
    torch.testing.assert_close(model.cpu()(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["opaque", pytest.param("torchao-int8", marks=needs("torchao"))])
def test_on_the_meta_device(kind: str) -> None:
    """No call takes memory that nobody has written for W."""
    model = adapted(kind).to("meta")
    for x in (inputs(), inputs().to("meta")):
        with pytest.raises((RuntimeError, ValueError), match=r"on the meta device|on meta, but x"):
            model(x)
    with pytest.raises(ValueError, match="whose weight is on the meta device or offloaded"):
        adapt(model_of(kind).to("meta"), "lora", **TARGETS)


OFFLOADED = [
    ("opaque", "lora"),
    ("opaque", "lora_xs"),
    pytest.param("torchao-int8", "lora", marks=needs("torchao")),
    pytest.param("torchao-int8", "dora", marks=needs("torchao")),
]


@pytest.mark.parametrize(("kind", "method"), OFFLOADED)
def test_offloaded_after_adapt(kind: str, method: str, tmp_path: Path) -> None:
    """accelerate's hooks bring W for each call of the module, and for a file's fingerprint."""
    accelerate = pytest.importorskip("accelerate")
    model, x = adapted(kind, method), inputs().requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    accelerate.cpu_offload(model, "cpu")
    assert model.first.base_weight.is_meta
    found = model(x)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], dx)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(model_of(kind), tmp_path / "adapter", progress=False)
    torch.testing.assert_close(loaded(x), y)


@pytest.mark.parametrize("kind", ["opaque", pytest.param("torchao-int8", marks=needs("torchao"))])
def test_offloaded_before_adapt(kind: str) -> None:
    """What is to be looked at is not here."""
    accelerate = pytest.importorskip("accelerate")
    model = model_of(kind)
    accelerate.cpu_offload(model, "cpu")
    with pytest.raises(ValueError, match=r"first is a .*offloaded: load it onto its device first"):
        adapt(model, "lora", **TARGETS)


def test_a_module_with_a_hook_that_brings_only_buffers() -> None:
    """GPTQ's layers have nothing else, and accelerate's hook is on them all the same."""
    accelerate = pytest.importorskip("accelerate")
    model = Net(TorchLinear)
    accelerate.cpu_offload(model, "cpu")
    with pytest.raises(ValueError, match=r"first is a TorchLinear .*offloaded"):
        adapt(model, "lora", **TARGETS)


@pytest.mark.parametrize("kind", [None, "opaque"])
def test_quantised_after_adapt(kind: str | None) -> None:
    """torchao and transformers look for nn.Linear, which adapted layers are none of."""
    quantization = pytest.importorskip("torchao.quantization")
    model = adapted(kind) if kind else shifted(adapt(Net(nn.Linear), "lora", **TARGETS))
    x = inputs()
    y, before = model(x).detach(), [type(part) for part in model.modules()]
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert [type(part) for part in model.modules()] == before
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)


def test_a_base_is_not_replaced() -> None:
    """Whoever dequantises the model, or quantises it anew, would leave W behind."""
    model, x = adapted("subclass"), inputs()
    y = model(x)
    with pytest.raises(RuntimeError, match="Linear within an adapted layer cannot become a Ident"):
        model.first.base_layer = nn.Identity()
    model.first.base_layer = model.first.base_layer
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("config", ["nf4", "int8", "torchao"])
def test_models_that_transformers_quantises(config: str, tmp_path: Path) -> None:
    """Adapted, trained a step, saved, loaded; they generate the same."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchao" if config == "torchao" else "bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    plain.save_pretrained(tmp_path / "model")
    if config == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        how = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        own: dict[str, Any] = {"bnb_4bit_compute_dtype": torch.float32, "load_in_4bit": True}
        own["bnb_4bit_quant_type"] = "nf4"
        own = own if config == "nf4" else {"load_in_8bit": True}
        how = transformers.BitsAndBytesConfig(**own)

    def load() -> Any:
        given = {"quantization_config": how, "device_map": "cpu", "dtype": torch.float32}
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **given)

    model, ids = load().train(), torch.arange(12).reshape(2, 6)
    adapt(model, "lora_xs", target_modules="all-linear", r=4, progress=False)
    assert len(adapted_in(model)) == 7
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    save_adapter(model, tmp_path / "adapter", bases=False)
    loaded = load_adapter(load(), tmp_path / "adapter", progress=False)
    found, expected = (
        own.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        for own in (loaded, model)
    )
    assert torch.equal(found, expected)
    with torch.no_grad():
        y, z = (own(input_ids=ids).logits for own in (loaded, model))
    torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-3)


def adapted_in(model: nn.Module) -> list[nn.Module]:
    """The adapted layers."""
    return [part for part in model.modules() if hasattr(part, "base_layer")]
