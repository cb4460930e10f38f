"""Every method over every kind of frozen linear layer: results, files, and the base given back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from base_cases import (
    D,
    H,
    Net,
    adapted,
    check,
    four_bit,
    gradients,
    inputs,
    kinds,
    layers_of,
    methods,
    model_of,
    shifted,
    trained,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_lowrank import (
    AdapterBank,
    adapt,
    disable_adapters,
    explain,
    load_adapter,
    save_adapter,
    unload,
)
from fused_lowrank.compute.base.fourbit import FourBit
from fused_lowrank.files import fingerprint
from fused_lowrank.methods import METHODS as LAYERS
from fused_lowrank.testing import pinned_plan

DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@kinds
@methods
@dtypes
def test_results_and_gradients(kind: str, method: str, dtype: torch.dtype) -> None:
    """Within the budget of float64 on the dequantised W, with leading dimensions and without."""
    model = adapted(kind, method, dtype)
    assert all(isinstance(layer, LAYERS[layer.method][1]) for layer in layers_of(model))
    for x in (inputs(dtype), inputs(dtype, 5), inputs(dtype, 2, 3, 4)):
        check(model, x)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs(dtype)), model(inputs(dtype).requires_grad_()))
        assert model(inputs(dtype, 0)).shape == (0, D)


@kinds
@methods
def test_the_reference_layers(kind: str, method: str) -> None:
    """By the module and plain torch."""
    if kind in ("subclass",):
        pytest.skip("the stand-in itself has no gradient of x")
    model = adapted(kind, method, fused=False)
    assert type(model.first).impl == "reference"
    check(model, inputs())


@pytest.mark.parametrize("plan", ["aten", "first", "split", "decode", "called"])
@kinds
def test_by_a_plan_for_plain_matrices(kind: str, plan: str) -> None:
    """W is dequantised for a pass; what is only called says so."""
    model = adapted(kind, "lora_xs")
    with pinned_plan(plan):
        if kind == "opaque" and plan != "called":
            with pytest.raises(RuntimeError, match="known by what its module or its library"):
                model(inputs())
            return
        check(model, inputs())


@kinds
@methods
def test_files(kind: str, method: str, tmp_path: Path) -> None:
    """An adapter comes back over the same base; LoRA-XS's without its bases, too."""
    model, x = adapted(kind, method), inputs()
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(model_of(kind), tmp_path / "adapter", progress=False)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    other = model_of(kind)
    torch.manual_seed(7)
    for name in ("first", "second"):
        setattr(other, name, getattr(Net(nn.Linear), name))
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(other, tmp_path / "adapter", progress=False)
    if method == "lora_xs":
        save_adapter(model, tmp_path / "small", bases=False)
        loaded = load_adapter(model_of(kind), tmp_path / "small", progress=False)
        torch.testing.assert_close(loaded(x), model(x))


def tensors_within(module: nn.Module) -> list[Tensor]:
    """What a base is stored as."""
    found = []
    for own in module.parameters():
        names = own.__tensor_flatten__()[0] if hasattr(own, "__tensor_flatten__") else ()
        found += [getattr(own, name) for name in names] or [own.data]
    return found


@kinds
@methods
def test_disabled_and_unloaded(kind: str, method: str) -> None:
    """The base alone, with its gradient; and the very same modules in their places."""
    plain, x = model_of(kind), inputs()
    before, modules = plain(x).detach(), [plain.first, plain.second]
    stored = [own.clone() for layer in modules for own in tensors_within(layer)]
    model = shifted(adapt(plain, method, target_modules=["first", "second"], progress=False))
    assert not torch.allclose(model(x), before)
    with disable_adapters(model):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        torch.testing.assert_close(y.detach(), before)
        if kind != "subclass" or y.requires_grad:
            assert torch.autograd.grad(y.sum(), leaf)[0].abs().sum() > 0
    assert unload(model) is plain
    assert [plain.first, plain.second] == modules
    torch.testing.assert_close(plain(x), before, rtol=0, atol=0)
    after = [own for layer in modules for own in tensors_within(layer)]
    assert all(torch.equal(*pair) for pair in zip(after, stored, strict=True))


@kinds
def test_fingerprints(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some rows at a time it is that of all of the values."""
    layer = adapted(kind, "lora_xs").second
    whole = fingerprint.fingerprint(layer.base_weight.values(), *layer.bases)
    monkeypatch.setattr(fingerprint, "ROWS", 16)
    torch.testing.assert_close(fingerprint.fingerprint_of(layer), whole, rtol=1e-4, atol=1e-3)


@kinds
def test_rows_of_the_values(kind: str) -> None:
    """Some at a time are the same as all, wherever blocks end."""
    for layer in layers_of(adapted(kind)):
        base = layer.base_weight
        for rows in (7, 32, 1024):
            parts = list(base.split(rows))
            assert torch.equal(torch.cat(parts), base.values())
            assert rows > 32 or len(parts) > 1
    for k in (40, 96) if kind in ("nf4", "fp4") else ():  # blocks of 64 end within rows
        odd = model_of(kind).first.__class__(k, 36, quant_type=kind)
        plain = odd.weight.detach().clone()
        base = FourBit(odd.to("cpu"))
        assert torch.equal(torch.cat(list(base.split(8))), base.values())
        assert float((base.values() - plain).norm() / plain.norm()) < 0.2
        x = torch.randn(3, k)
        torch.testing.assert_close(base.product(x, None), x @ base.values().t())


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_that_was_packed_for_inference(nested: bool) -> None:
    """bitsandbytes does that on some CPUs; it is unpacked, and the values are nearly as before."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    torch.manual_seed(0)
    model = four_bit("nf4", nested)(torch.float32)
    before = [FourBit(layer).values() for layer in (model.first, model.second)]
    for layer in (model.first, model.second):
        weight = layer.weight
        weight.data, _ = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    adapt(model, "lora_xs", target_modules=["first", "second"], r=4, progress=False)
    after = [layer.base_weight.values() for layer in layers_of(model)]
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-4)
    check(shifted(model), inputs())
    check(model.eval(), inputs())


@kinds
def test_copies(kind: str) -> None:
    """A deep copy has modules of its own."""
    model, x = adapted(kind, "lora_xs"), inputs()
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    assert other.first.base_layer is other.first.base_weight.module is not model.first.base_layer
    assert type(other.first) is type(model.first)


def test_pickled() -> None:
    """A class that is made is found again."""
    model, x = adapted("opaque", "lora_xs"), inputs()
    other = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


class Sizes(TorchDispatchMode):
    """The tensors of the sizes of a W in a float dtype that are made, and still there."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Any] = {}
        self.most = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is computed, looked at."""
        result = func(*args, **(kwargs or {}))
        for own in result if isinstance(result, tuple | list) else (result,):
            if isinstance(own, Tensor) and own.numel() == D * H and own.dtype in DTYPES:
                place = own.untyped_storage()._cdata
                self.made += place not in self.alive
                self.alive[place] = StorageWeakRef(own.untyped_storage())
                self.most = max(self.most, self.count())
        return result

    def count(self) -> int:
        """How many there are now."""
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        return len(self.alive)


@pytest.mark.parametrize("plan", ["called", "aten"])
@kinds
def test_no_dequantised_weight_is_kept(kind: str, plan: str) -> None:
    """One at a time, for a pass: none between layers, nor from the forward to the backward."""
    if kind == "opaque":
        pytest.skip("its own autograd keeps what it likes")
    model, x = adapted(kind), inputs(torch.float32, 5).requires_grad_()
    with pinned_plan(plan), Sizes() as sizes:
        y = model(x)
        assert sizes.count() == 0
        y.sum().backward()
        assert sizes.count() == 0
    assert sizes.made >= 3  # it does count: forward of two, backward of two, less what libraries do
    assert sizes.most <= 2  # one, and a library's own step on the way to it


@kinds
def test_bank(kind: str) -> None:
    """Adapters of a bank over such a base, each row with its own."""
    model = adapted(kind, "lora_xs")
    bank = AdapterBank.from_model(model, slots=3)
    x = inputs(torch.float32, 4)
    cores = {}
    for i, name in enumerate("ab"):
        for layer in layers_of(model):
            with torch.no_grad():
                layer.core.normal_(generator=torch.Generator().manual_seed(i))
        cores[name] = model(x).detach()
        bank.add(name, model)
    with bank.use(["a", "b", "a", None]):
        y = model(x).detach()
    torch.testing.assert_close(y[:3], torch.stack([cores[n][i] for i, n in enumerate("aba")]))
    with disable_adapters(model):
        torch.testing.assert_close(y[3], model(x)[3].detach())


@kinds
@methods
def test_delta(kind: str, method: str) -> None:
    """ΔW is what the adapter adds to W."""
    layer = adapted(kind, method).first
    x, weight = inputs(torch.float32, 5), layer.base_weight.values()
    bias = 0.0 if layer.bias is None else layer.bias.detach()
    y = x @ (weight + layer.delta_weight()).t() + bias
    torch.testing.assert_close(layer(x).detach(), y, rtol=1e-4, atol=1e-4)


@kinds
def test_explained(kind: str) -> None:
    """The plan is the one that a call takes."""
    layer = adapted(kind, "lora").first
    assert "called" in str(explain(layer, 4096))


@kinds
def test_checkpointed(kind: str) -> None:
    """Dropout's mask is the same where a checkpoint computes the layers again."""
    model = adapted(kind, "lora_xs", dropout=0.5)
    x, found = inputs(), []
    for reentrant in (None, False, True):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        given = {"use_reentrant": reentrant}
        y = model(leaf) if reentrant is None else checkpoint(model, leaf, **given)
        found.append(
            [y.detach(), *torch.autograd.grad(y.sum(), [leaf, *trained(model)])]
            if not reentrant
            else [y.detach()]
        )
        assert (y.detach() - model.eval()(x)).abs().max() > 1e-3
        model.train()
    for one in found[1:]:
        for a, b in zip(one, found[0], strict=False):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ["lora", "dora"])
@kinds
def test_compiled(kind: str, method: str) -> None:
    """As far as the module can be compiled; the results are the same."""
    if kind not in ("opaque", "nf4", "torchao-int8"):
        pytest.skip("one of a library is enough")
    model, x = adapted(kind, method), inputs()
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients(compiled, trained(model), x)
    torch.testing.assert_close(found, gradients(model, trained(model), x), rtol=1e-4, atol=1e-5)
