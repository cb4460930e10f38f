"""fuse_lora over quantised bases: results, and what is left to PEFT, of every kind of base."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from base_cases import KINDS, D, H, inputs, model_of, needs
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
from peft import (
    LoraConfig,
    inject_adapter_in_model,
)
from peft_lora_cases import R, counted
from peft_qlora_cases import layers_of, qlora, shifted, trained

from fused_lowrank.integrations.peft import fuse_lora, lora_layers
from fused_lowrank.testing import FACTOR

F32, BF16 = torch.float32, torch.bfloat16
OURS = [kind for kind, (_, package) in KINDS.items() if package != "torch"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often which of our ways computed a layer."""
    return counted(monkeypatch)


def results(module: Any, x: Tensor, autocast: torch.dtype | None = None) -> list[Tensor]:
    """[y, dx, the gradients of what is trained]."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        y = module(x)
    torch.manual_seed(2)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained(module)], dy)]


def truth(layer: Any, x: Tensor) -> list[Tensor]:
    """The same by the equation in float64, on the dequantised W."""
    base, scale = layer.base_layer, layer.scaling["default"]
    weight = lora_layers.quantised(base).values(torch.float64)
    leaves = {
        n: p.detach().double().requires_grad_()
        for n, p in layer.named_parameters()
        if p.requires_grad
    }
    own = {name.split(".")[0] + name[-7:-4]: leaf for name, leaf in leaves.items()}
    a, b = leaves["lora_A.default.weight"], leaves["lora_B.default.weight"]
    assert len(own) == len(leaves)
    x = x.double().requires_grad_()
    y = x @ weight.t() + scale * (x @ a.t() @ b.t())
    magnitude = leaves.get("lora_magnitude_vector.default.weight")
    if magnitude is not None:
        y = y * (magnitude / (weight + scale * b @ a).detach().norm(dim=1))
    y = y + base.bias.double()
    if "lora_B.default.bias" in leaves:
        y = y + scale * leaves["lora_B.default.bias"]
    torch.manual_seed(2)
    dy = torch.randn(y.shape, dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves.values()], dy)]


# x, the base's own dtype, autocast's
CASES = {
    "float32": (F32, F32, None),
    "bfloat16": (BF16, BF16, None),
    "as prepared": (F32, BF16, None),  # for k-bit training, which makes x float32
    "wide base": (BF16, F32, None),
    "autocast": (F32, BF16, BF16),
}
FEW = ("float32", "bfloat16")  # torchao's layers take an x of their own dtype
RESULTS = [
    pytest.param(kind, case, dora, marks=needs(KINDS[kind][1]), id=f"{kind}-{case}-{dora}")
    for kind in OURS
    for case in (CASES if kind in ("nf4", "fp4") else FEW)
    for dora in (False, True)
    if not (kind in ("fp4", "torchao-fp8") and dora)
    and not (kind == "int8" and dora and case != "float32")
]


@pytest.mark.parametrize(("kind", "case", "dora"), RESULTS)
def test_results_are_within_the_error_budget(
    kind: str, case: str, dora: bool, ran: Counter
) -> None:
    """y and every gradient, in PEFT's dtypes, as near to float64 as PEFT's, with rsLoRA."""
    x_dtype, base, autocast = CASES[case]
    more = {} if dora or kind.startswith("torchao") else {"lora_bias": True}
    layer = layers_of(qlora(kind, base, use_dora=dora, use_rslora=True, **more))[0]
    x = inputs(x_dtype, 3, 7)
    theirs = results(layer, x, autocast)
    holder = nn.ModuleList([layer])
    fuse_lora(holder)
    assert type(layer).__name__ == f"Fused{layer.plain.__name__}"
    ours = results(layer, x, autocast)
    assert ran == {"over": 1}
    eps = torch.finfo(x_dtype).eps
    for i, (one, other, true) in enumerate(zip(ours, theirs, truth(layer, x), strict=True)):
        assert one.dtype == other.dtype
        error, usual = (float((value.double() - true).norm()) for value in (one, other))
        assert error <= FACTOR * usual + eps * float(true.norm()), (i, error, usual)
        assert float(true.norm()) > 0


LEFT = {
    "another dtype": ("torchao-int8", F32, BF16, None, False),
    "torchao under autocast": ("torchao-int8", F32, F32, BF16, False),
    "8 bits under autocast": ("int8", F32, F32, BF16, False),
    "float64": ("nf4", F32, torch.float64, None, False),
    "DoRA of 16 bits under autocast": ("nf4", F32, BF16, BF16, True),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_peft(case: str, ran: Counter) -> None:
    """Where PEFT's dtypes are others the very same is computed, by PEFT."""
    kind, base, x_dtype, autocast, dora = LEFT[case]
    if kind.startswith("torchao"):
        pytest.importorskip("torchao")
    model = qlora(kind, base, use_dora=dora)
    layer, x = layers_of(model)[0], inputs(x_dtype)
    expected = results(layer, x, autocast)
    fuse_lora(model)
    for one, other in zip(results(layer, x, autocast), expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert not ran


def test_what_is_not_fused_is_named() -> None:
    """A base in 8 bits that is not quantised, one with hooks, a forward of somebody's own."""
    from bitsandbytes.nn import Linear4bit

    class Other(Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for change, reason in (
        (lambda base: setattr(base, "__class__", Other), "around a Other, which is not quantised"),
        (lambda base: base.register_forward_hook(lambda *_: None), "hooks"),
    ):
        model = qlora("nf4", F32)
        expected = copy.deepcopy(model)
        for own in (model, expected):
            change(own.base_model.model.first.base_layer)
        with pytest.warns(match=f"left to PEFT's own forward: .*first: a layer .*{reason}") as said:
            fuse_lora(model)
        assert len([w for w in said if "left to" in str(w.message)]) == 1
        torch.testing.assert_close(model(inputs()), expected(inputs()))
    model = qlora("nf4", F32)
    model.base_model.model.first.base_layer = nn.Linear(D, H)
    with pytest.warns(match="around a Linear, which is not quantised"):
        fuse_lora(model)


def test_dora_over_8_bits_goes_on() -> None:
    """PEFT's DoRA moves an 8-bit weight in each call, and on a CPU its maxima are lost by it."""
    model, x = qlora("int8", F32, use_dora=True), inputs()
    layer = layers_of(model)[0]
    results(layer, x)
    fuse_lora(model)
    for _ in range(3):
        for one, true in zip(results(layer, x), truth(layer, x), strict=True):
            torch.testing.assert_close(one.double(), true, rtol=1e-4, atol=1e-4)
        shifted(layer)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout(dora: bool) -> None:
    """The share that PEFT drops, the same in the backward, none in eval."""
    p = 0.25
    how = {"use_dora": dora, "bias": "all" if dora else "none"}
    model = qlora("nf4", F32, r=D, lora_alpha=3 * D, lora_dropout=p, **how)
    layer = layers_of(model)[0]
    if dora:  # torch's own mask, which is PEFT's
        x, found = inputs(), []
        for change in (lambda own: own, fuse_lora):
            change(model)
            torch.manual_seed(4)
            found.append(results(layer, x))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        return
    fuse_lora(model)
    nn.init.eye_(layer.lora_A["default"].weight)
    nn.init.eye_(layer.lora_B["default"].weight)  # y - y0 = 3 · dropout(x)
    x = torch.ones(200, D, requires_grad=True)
    y0 = layer.base_layer(x)
    term = (layer(x) - y0)[:, :D]
    kept = term.detach().abs() > 1
    torch.testing.assert_close(term, kept * (3 / (1 - p)), rtol=1e-4, atol=1e-4)
    (of_x,) = torch.autograd.grad(term.sum(), x)
    torch.testing.assert_close(of_x, term, rtol=1e-4, atol=1e-4)
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(1 - kept.float().mean() - p) < 5 * deviation
    layer.eval()
    torch.testing.assert_close((layer(x) - y0)[:, :D], 3 * x.detach(), rtol=1e-4, atol=2e-2)


@contextmanager
def sizes_saved() -> Iterator[list[int]]:
    """The sizes of the tensors that are saved for a backward meanwhile."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("kind", ["nf4", pytest.param("torchao-int8", marks=needs("torchao"))])
def test_nothing_of_w_is_saved(kind: str) -> None:
    """For the backward x, t and the factors are kept, and no dequantised W."""
    layer = layers_of(fuse_lora(qlora(kind, F32)))[0]
    x = inputs(F32, 5).requires_grad_()
    with sizes_saved() as sizes:
        y = layer(x)
    assert sum(sizes) == x.numel() + 5 * R + R * (D + H)
    y.sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_merging_after_inference() -> None:
    """bitsandbytes packs a weight anew in inference on CPUs, which PEFT's merging cannot read."""
    model, plain = (fuse_lora(qlora("nf4", F32)) for _ in range(2))
    x = inputs()
    plain.merge_adapter()
    expected = plain(x)
    for packs in (True, False):
        model.eval()
        with torch.no_grad(), model.disable_adapter():
            model(x)
        model.train()
        model.merge_adapter()
        y = model(x)
        if packs:  # its maxima are in bfloat16 since
            torch.testing.assert_close(y, expected, rtol=0, atol=0.15 * float(expected.std()))
        model.eval()
        with torch.no_grad():
            model(x)
        model.unmerge_adapter()
        model.train()
        assert (model(x) - plain(x)).norm() < 0.3 * y.norm()


def test_a_layer_is_pickled() -> None:
    """As PEFT's own is."""
    model = fuse_lora(qlora("nf4", F32))
    again = pickle.loads(pickle.dumps(model))
    assert type(layers_of(again)[0]) is type(layers_of(model)[0])
    assert torch.equal(again(inputs()), model(inputs()))


def test_compiled() -> None:
    """torch.compile takes it as far as the base's library goes, and the results are the same."""
    model = fuse_lora(qlora("nf4", F32))
    layer, x = layers_of(model)[0], inputs()
    expected = results(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    for one, other in zip(results(compiled, x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_injected(ran: Counter) -> None:
    """Also without a PeftModel."""
    model: Any = model_of("nf4")
    model.is_loaded_in_4bit = True
    inject_adapter_in_model(LoraConfig(r=R, target_modules=["first"]), model)
    fuse_lora(model)(inputs())
    assert ran == {"over": 1}
