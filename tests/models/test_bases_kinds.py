"""Kinds of bases by the libraries that make them: stand-ins for these, and they where they run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import base_cases
import pytest
import torch
from base_cases import Net, adapted, check, gradients, inputs, layers_of, model_of, shifted, trained
from quantised_libraries import STAND_INS, HQQLinear, QLinear, TorchLinear
from torch import Tensor, nn

from fused_lowrank import adapt, disable_adapters, load_adapter, save_adapter, unload
from fused_lowrank.compute.base.dequantised import Awq, Gptq, Hqq
from fused_lowrank.compute.base.protocol import Base
from fused_lowrank.compute.base.subclass import Float8, Quanto

TARGETS: dict[str, Any] = {"target_modules": ["first", "second"], "progress": False}
OF = {"gptq": Gptq, "awq": Awq, "hqq": Hqq, "quanto": Quanto, "auto_gptq": Base}
kinds = pytest.mark.parametrize("kind", STAND_INS)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helpers know them by name."""
    known = {kind: (made, "torch") for kind, made in STAND_INS.items()}
    monkeypatch.setattr(base_cases, "KINDS", {**base_cases.KINDS, **known})


@kinds
def test_a_kind_and_its_values(kind: str) -> None:
    """Known without an import of its library; the values are those of the module's products."""
    model = adapted(kind)
    for layer in layers_of(model):
        base = layer.base_weight
        assert type(base) is OF[kind]
        assert base.bias is None or not base.bias.requires_grad
        x = inputs(torch.float32, 5)[:, : layer.in_features].repeat(1, layer.in_features // 64)
        y = base.module(x) if kind != "quanto" else base.product(x, base.bias)
        weight = base.values(torch.float64)
        expected = x.double() @ weight.t() + (0.0 if base.bias is None else base.bias.double())
        torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)
        assert weight.shape == (layer.out_features, layer.in_features)
    assert not {"awq", "auto_gptq"} & sys.modules.keys()


@pytest.mark.parametrize("method", ["lora", "lora_xs", "dora"])
@kinds
def test_results_and_gradients(kind: str, method: str) -> None:
    """Within the budget of float64 on the dequantised W, in training and in eval."""
    model = adapted(kind, method)
    for mode in (True, False):
        check(model.train(mode), inputs())
    if method == "lora" and kind != "auto_gptq":
        check(adapted(kind, method, torch.bfloat16), inputs(torch.bfloat16))


@kinds
def test_files_and_back(kind: str, tmp_path: Path) -> None:
    """An adapter comes back over the same base; disabled, it is the base, and unloaded too."""
    model, x = adapted(kind, "lora_xs"), inputs()
    save_adapter(model, tmp_path / "adapter", bases=False)
    loaded = load_adapter(model_of(kind), tmp_path / "adapter", progress=False)
    torch.testing.assert_close(loaded(x), model(x))
    plain, modules = model_of(kind), [layer.base_layer for layer in layers_of(model)]
    with disable_adapters(model):
        torch.testing.assert_close(model(x), plain(x), rtol=5e-3, atol=5e-3)
    unload(model)
    assert [model.first, model.second] == modules


class Straight(TorchLinear):
    """One whose values are W, as those of other versions may be."""

    def dequantize_weight(self, num_itr: int = 1) -> Tensor:
        """W (N, K)."""
        return super().dequantize_weight().t()

    def forward(self, x: Tensor) -> Tensor:
        """As ever."""
        return x @ self.dequantize_weight().t().to(x.dtype) + self.bias


class Rotated(TorchLinear):
    """One that does something to x first, so that its values are not those of its product."""

    def forward(self, x: Tensor) -> Tensor:
        """Of x turned round."""
        return super().forward(x.flip(-1))


class Lost(TorchLinear):
    """One that is packed for its kernel, and cannot be asked for its values any more."""

    def dequantize_weight(self, num_itr: int = 1) -> Tensor:
        """Nothing."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """By a kernel of its own."""
        return x @ TorchLinear.dequantize_weight(self).to(x.dtype) + self.bias.to(x.dtype)


@pytest.mark.parametrize("cls", [TorchLinear, Straight])
def test_which_way_round_the_values_are(cls: Any) -> None:
    """A product says it where the shape does not."""
    torch.manual_seed(0)
    model = nn.Sequential(cls(64, 64))
    adapt(model, "lora_xs", target_modules=["0"], r=4, progress=False)
    module, x = model[0].base_layer, inputs(torch.float32, 5)
    assert type(model[0].base_weight) is Gptq
    found = x @ model[0].base_weight.values(torch.float32).t() + module.bias
    torch.testing.assert_close(found, module(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", [Rotated, Lost])
def test_values_that_are_not_those_of_the_product(cls: Any) -> None:
    """The module is called then, and unit vectors say what its W is."""
    torch.manual_seed(0)
    model = shifted(adapt(Net(cls), "dora", r=4, **TARGETS))
    assert type(model.first.base_weight) is Base
    check(model, inputs())


@pytest.mark.parametrize("kind", ["hqq", "gptq", "awq"])
def test_no_dequantised_weight_is_kept(kind: str) -> None:
    """From forward to backward, where the libraries' own functions keep one or have no way back."""
    model, x = adapted(kind), inputs(torch.float32, 5).requires_grad_()
    saved: list[int] = []

    def note(own: Tensor) -> Tensor:
        saved.append(own.numel())
        return own

    with torch.autograd.graph.saved_tensors_hooks(note, lambda own: own):
        y = model(x)
    assert saved
    assert max(saved) < 64 * 128
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("cls", "own", "message"),
    [
        (QLinear, {"activation_qtype": "qint8"}, "first is a QLinear that quantises activations"),
        (QLinear, {"frozen": False}, r"not quantised for good: optimum\.quanto\.freeze\(model\)"),
        (HQQLinear, {"ready": False}, r"HQQLinear that is not quantised yet: initialize\(\)"),
    ],
)
def test_refused(cls: Any, own: dict[str, Any], message: str) -> None:
    """What cannot be taken says what to do, and the model is as it was."""
    model = Net(cls)
    vars(model.first).update(own)
    modules = [model.first, model.second]
    with pytest.raises(TypeError, match=message):
        adapt(model, "lora", **TARGETS)
    assert [model.first, model.second] == modules


def test_a_library_that_fails_is_named() -> None:
    """With what it said and with where a working one is had."""

    class Failing(TorchLinear):
        __module__ = "gptqmodel.nn_modules.qlinear.marlin"

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no kernel for this device")

    with pytest.raises(TypeError, match=r"Failing, whose library cannot compute on cpu.*no kernel"):
        adapt(Net(Failing), "lora", **TARGETS)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_library_that_is_not_there_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that has it; so is one that is too old for what is asked of it."""
    pytest.importorskip("torchao" if "torchao" in kind else "bitsandbytes")
    model = model_of(kind)
    if "torchao" in kind:
        monkeypatch.setattr(type(model.first.weight.data), "dequantize", lambda own: own.no_such())
    else:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
        if kind == "nf4":
            monkeypatch.delattr(torch.ops.bitsandbytes, "dequantize_4bit", raising=False)
            ops = type("Old", (), {})()
            monkeypatch.setattr(torch.ops, "bitsandbytes", ops, raising=False)
    with pytest.raises(TypeError, match=r"first is a .*Error.*fused-lowrank\[quant\]"):
        adapt(model, "lora", **TARGETS)
    assert not hasattr(model.first, "base_layer")


# --- the libraries themselves ---


def fp8(dtype: torch.dtype) -> nn.Module:
    """torchao's layers for training in fp8, whose arithmetic runs anywhere when it is emulated."""
    float8 = pytest.importorskip("torchao.float8")
    config = float8.Float8LinearConfig(emulate=True)
    return float8.convert_to_float8_training(Net(nn.Linear).to(dtype), config=config)


@pytest.fixture
def of_fp8(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`adapted` over them."""
    monkeypatch.setitem(base_cases.KINDS, "fp8", (fp8, "torchao"))
    return lambda *given: adapted("fp8", *given)


@pytest.mark.parametrize("method", ["lora", "lora_xs", "dora"])
def test_fp8_training(of_fp8: Callable[..., Any], method: str) -> None:
    """The module is called as it is: y and dx are its own, and the term's beside them exactly."""
    model = of_fp8(method)
    x = inputs(torch.float32, 5)
    layer = model.first
    assert type(layer.base_weight) is Float8
    assert torch.equal(layer.base_weight.values(), layer.base_layer.weight)
    found = gradients(layer, [p for p in layer.parameters() if p.requires_grad], x)
    down, core, up, gain = layer.parts()
    gain = None if gain is None else gain.tensor()
    leaf = x.clone().requires_grad_()
    y0 = layer.base_layer(leaf)
    low = leaf @ down.t()
    y = y0 + layer.scale * (low if core is None else low @ core) @ up.t()
    if gain is not None:
        y = y * gain + (1 - gain) * layer.bias
    torch.manual_seed(2)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    torch.testing.assert_close(found[0], y.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], dx, rtol=1e-4, atol=1e-4)
    exact = gradients(base_cases.formula(model, torch.float64)[0], [], x.double())
    near = gradients(model, [], x)
    for ours, true in zip(near, exact, strict=True):  # e4m3 has 3 bits, e5m2 of gradients 2
        assert 1e-4 < float((ours - true).norm() / true.norm()) < 0.1


def test_fp8_is_the_base_of_the_plain_model(of_fp8: Callable[..., Any], tmp_path: Path) -> None:
    """Its weight is the plain one: adapters go from one to the other."""
    save_adapter(of_fp8("lora_xs"), tmp_path / "adapter")
    torch.manual_seed(0)
    plain = load_adapter(Net(nn.Linear), tmp_path / "adapter", progress=False)
    assert torch.equal(plain.first.core, of_fp8("lora_xs").first.core)


def real_hqq(dtype: torch.dtype) -> nn.Module:
    """hqq's own layers."""
    hqq = pytest.importorskip("hqq.core.quantize")
    config = {"quant_config": hqq.BaseQuantizeConfig(nbits=4, group_size=32, axis=1)}
    config |= {"compute_dtype": dtype, "device": "cpu"}
    return Net(lambda k, n: hqq.HQQLinear(nn.Linear(k, n).to(dtype), **config))


def real_gptq(dtype: torch.dtype) -> nn.Module:
    """gptqmodel's own layers, of numbers drawn at random."""
    library = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    return Net(lambda k, n: of_gptqmodel(library.TorchLinear, k, n))


def real_awq(dtype: torch.dtype) -> nn.Module:
    """gptqmodel's own layers for AWQ."""
    library = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq")
    return Net(lambda k, n: of_gptqmodel(library.AwqTorchLinear, k, n))


def of_gptqmodel(cls: Any, k: int, n: int) -> nn.Module:
    """A layer with something in its buffers."""
    own = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "bias": True}
    layer = cls(in_features=k, out_features=n, register_buffers=True, **own)
    for name, buffer in layer.named_buffers():
        if name in ("qweight", "qzeros"):
            buffer.copy_(torch.randint(-(2**31), 2**31, buffer.shape))
        elif name in ("scales", "bias"):
            buffer.copy_(torch.rand(buffer.shape) * 0.02)
    return layer


def real_quanto(dtype: torch.dtype) -> nn.Module:
    """optimum-quanto's own layers."""
    quanto = pytest.importorskip("optimum.quanto")
    model = Net(nn.Linear).to(dtype)
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    return model


REAL = {"hqq": real_hqq, "gptq": real_gptq, "awq": real_awq, "quanto": real_quanto}


@pytest.mark.parametrize("kind", REAL)
def test_the_library_itself(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the stand-ins."""
    monkeypatch.setitem(base_cases.KINDS, kind, (REAL[kind], "torch"))
    for method in ("lora", "lora_xs", "dora"):
        for dtype in (torch.float32, torch.bfloat16):
            model = adapted(kind, method, dtype)
            assert type(model.first.base_weight) is OF[kind]
            check(model, inputs(dtype))
            assert trained(model)
    test_files_and_back(kind, tmp_path)
