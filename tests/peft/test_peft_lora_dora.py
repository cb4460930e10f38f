"""PEFT's own DoRA, rsLoRA and initialisers through the fused kernels: the same results."""

import copy
import importlib.util
import itertools
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from peft import PeftModel, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from peft_lora_cases import (
    BASES,
    BF16,
    F16,
    F32,
    F64,
    ROWS,
    SMALL_ROWS,
    Block,
    K,
    N,
    R,
    assert_same,
    block,
    calls,
    config,
    counted,
    fill,
    gpt2,
    gradients,
    ids,
    layer,
)

from fused_lowrank.integrations.peft import fuse_lora, unfuse_lora
from fused_lowrank.methods import dora
from fused_lowrank.testing import measure

# x and weight, factors, autocast
DTYPES = {
    "fp32": (F32, F32, None),
    "bf16": (BF16, BF16, None),
    "bf16 beside fp32": (BF16, F32, None),
    "fp16": (F16, F16, None),
    "autocast": (F32, F32, BF16),
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often which of our ways computed a layer."""
    return counted(monkeypatch)


@pytest.fixture
def mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every dropout keep the same elements, in whatever dtype."""

    def forward(self: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)).to(x.device)
        return x * (drawn >= self.p).to(x.dtype) / (1 - self.p)

    monkeypatch.setattr(nn.Dropout, "forward", forward)


def away(module: nn.Module) -> Any:
    """The module with magnitudes that are not what DoRA starts with, some of them negative."""
    torch.manual_seed(4)
    for name, parameter in module.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
            parameter.data[3] *= -1
    return module


def dora_layer(base: nn.Module | None = None, dtype: torch.dtype = F32, **settings: Any) -> Linear:
    """PEFT's layer with DoRA."""
    made = layer(base, dtype, use_dora=True, **settings)
    torch.manual_seed(4)
    with torch.no_grad():
        magnitude = made.lora_magnitude_vector["default"].weight
        magnitude.copy_(torch.randn(magnitude.shape) + 1.5)
    return made


@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("base", BASES)
def test_dora_is_within_the_error_budget(
    base: str, dtypes: str, dropped: bool, mask: None, device: torch.device, ran: Counter
) -> None:
    """y and the gradients of x, A, B, the magnitude, and what is trained of the base."""
    wide, narrow, autocast = DTYPES[dtypes]
    theirs = dora_layer(BASES[base](), wide, lora_dropout=0.3 * dropped, use_rslora=True)
    for part in theirs.lora_A, theirs.lora_B, theirs.lora_magnitude_vector:
        part.to(narrow)
    theirs = theirs.to(device)
    if theirs.base_layer.bias is not None:
        theirs.base_layer.bias.requires_grad_()
    ours = fuse_lora(copy.deepcopy(theirs))
    torch.manual_seed(2)
    x = torch.randn(ROWS, K, device=device).to(wide).requires_grad_()
    operands = {
        "x": x,
        "weight": theirs.base_layer.weight.detach(),
        "bias": theirs.base_layer.bias,
        "down": theirs.lora_A["default"].weight,
        "up": theirs.lora_B["default"].weight,
        "magnitude": theirs.lora_magnitude_vector["default"].weight,
    }
    dy = torch.randn(ROWS, N, device=device)
    measured = measure(calls(ours, autocast), calls(theirs, autocast), operands, dy)
    assert len(measured) == 5 + (base != "no bias")
    assert all(m.within for m in measured), measured
    assert ran["large"] > 0


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("rows", [SMALL_ROWS, ROWS])
def test_dora_in_double(rows: int, p: float, device: torch.device, ran: Counter) -> None:
    """In training, in eval, with either's mode alone, and with the very masks that PEFT draws."""
    for base in BASES.values():
        theirs = dora_layer(base(), F64, lora_dropout=p).double().to(device)
        ours = fuse_lora(copy.deepcopy(theirs))
        x = torch.randn(rows, K, device=device, dtype=F64)
        for of_layer, of_dropout in ((True, True), (False, False), (True, False), (False, True)):
            for module in (ours, theirs):
                module.train(of_layer).lora_dropout.train(of_dropout)
            y, got = [], []
            for module in (ours, theirs):
                torch.manual_seed(6)
                leaf = x.clone().requires_grad_()
                y.append(module(leaf))
                got.append({**gradients(module, y[-1]), "x": leaf.grad})
            torch.testing.assert_close(y[0], y[1])
            assert any("magnitude" in name for name in got[0])
            torch.testing.assert_close(got[0], got[1])
    assert ran["large"] == 4 * len(BASES)


def test_dora_through_the_kernels(device: torch.device, counted_launches: Any) -> None:
    """Forward and backward are launches, and of a dropout's x as well."""
    dtype = F64 if device.type == "cpu" else F32
    for p in (0.0, 0.3):
        theirs = dora_layer(dtype=dtype, lora_dropout=p).to(dtype).to(device)
        ours = fuse_lora(copy.deepcopy(theirs))
        ours.impl = "triton"
        x = torch.randn(3, 5, K, device=device, dtype=dtype)
        with counted_launches() as counts:
            torch.manual_seed(6)
            y = ours(x)
            forward = sum(counts.values())
            got = gradients(ours, y)
        assert 0 < forward < sum(counts.values())
        torch.manual_seed(6)
        expected = theirs(x)
        if dtype == F64:
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(got, gradients(theirs, expected))


def test_dora_follows_what_is_written(device: torch.device, ran: Counter) -> None:
    """Steps, merging and back, another weight or factor by `.data`, a load, other dtypes."""
    theirs = away(block(use_dora=True, target_modules=["proj", "out"])).to(device).double().eval()
    ours, x = fuse_lora(copy.deepcopy(theirs)), ids(device)
    layers, seeds = 2, itertools.count()

    def check(fused: int = layers) -> None:
        ran.clear()
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))
        assert ran.total() == fused

    def both(change: Any) -> None:
        seed = next(seeds)
        for model in (ours, theirs):
            torch.manual_seed(seed)
            change(model)

    def write(model: Any, *names: str) -> None:
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.data.copy_(torch.randn_like(parameter))

    check()
    both(lambda model: model.requires_grad_(False))
    check()
    both(lambda model: write(model, "lora_A", "lora_B"))  # as PEFT's hot swap does
    check()
    both(lambda model: model.merge_adapter())
    check(0)
    both(lambda model: write(model, "lora_B") or model.unmerge_adapter())
    check()
    both(lambda model: model.merge_adapter(safe_merge=True))
    both(lambda model: model.unmerge_adapter())
    check()
    both(lambda model: model._apply(lambda tensor: tensor.data.mul_(0.9)))
    check()
    both(lambda model: model.add_adapter("plain", config()))
    check()
    both(lambda model: write(model, "plain") or model.set_adapter("plain"))
    both(lambda model: model.merge_adapter())
    both(lambda model: write(model, "plain") or model.unmerge_adapter())  # another base from now on
    both(lambda model: model.set_adapter("default"))
    check()
    both(lambda model: model.float())
    with torch.no_grad():
        ours(x)
    assert dora.KEPT
    pissa = config(init_lora_weights="pissa", use_dora=True)
    both(lambda model: model.add_adapter("pissa", pissa))
    assert not dora.KEPT  # the new base may lie where that of old constants did
    both(lambda model: model.double())
    check()
    both(lambda model: model.set_adapter("pissa"))
    check(1)
    with ours.disable_adapter(), theirs.disable_adapter():
        check(0)
    both(lambda model: model.base_model.set_adapter(["default", "pissa"]))
    check(1)  # `out` has one of them
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    torch.testing.assert_close(merged.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_training_steps_are_peft_s(device: torch.device) -> None:
    """The norm changes from step to step."""
    theirs = block(use_dora=True, use_rslora=True, target_modules=["proj", "out"]).to(device)
    ours = fuse_lora(copy.deepcopy(theirs.double()))
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids(device)).square().mean().backward()
            optimizer.step()
    assert_same(ours, theirs, ids(device))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_names_with_dora_are_refused_as_peft_does(device: torch.device) -> None:
    """A mixed batch: PEFT's error, and plain adapters beside DoRA's are computed."""
    theirs = block(use_dora=True)
    theirs.add_adapter("plain", config(r=3))
    theirs = fill(theirs).to(device).double().eval()
    ours = fuse_lora(copy.deepcopy(theirs))
    for model in (ours, theirs):
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA"):
            model(ids(device), adapter_names=["default", "__base__"])
    names = ["plain", "__base__"]
    y, expected = (m(ids(device), adapter_names=names) for m in (ours, theirs))
    assert torch.equal(y, expected)


def test_a_graph_with_dora(device: torch.device) -> None:
    """torch.compile has the same numbers, with gradients, dropout and without."""
    for p in (0.0, 0.3):
        theirs = dora_layer(dtype=F64, lora_dropout=p).double().to(device)
        ours = fuse_lora(copy.deepcopy(theirs))
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        x = torch.randn(ROWS, K, device=device, dtype=F64)
        if p:
            compiled(x).sum().backward()
            ours.eval(), theirs.eval()
        y, expected = compiled(x), theirs(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradients(ours, y), gradients(theirs, expected))


def test_dora_that_is_left_to_peft(device: torch.device, ran: Counter) -> None:
    """Another variant, a magnitude that is hooked or of a class of its own: named, and PEFT's."""

    class Other(DoraLinearLayer):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 2 * super().forward(*args, **kwargs)

    def of_own_class(made: Linear) -> None:
        made.lora_magnitude_vector["default"].__class__ = Other

    def hook(made: Linear) -> None:
        made.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)

    def bias(made: Linear) -> None:
        made.lora_B["default"].bias = nn.Parameter(torch.ones(N, device=device))

    def variant(made: Linear) -> None:
        kind = type(made.lora_variant["default"])
        made.lora_variant["default"] = type("Velora", (kind,), {})()

    cases = (of_own_class, "a Other"), (hook, "hooks"), (bias, "a bias"), (variant, "Velora")
    for change, said in cases:
        theirs = dora_layer().to(device)
        change(theirs)
        with pytest.warns(UserWarning, match=f"left to PEFT's own forward: .*{said}"):
            ours = fuse_lora(copy.deepcopy(theirs))
        x = torch.randn(ROWS, K, device=device)
        assert torch.equal(ours(x), theirs(x))
    assert not ran


STARTS: dict[str, dict[str, Any]] = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "rslora": {"use_rslora": True},
    "pissa, rslora, dora": {"init_lora_weights": "pissa", "use_rslora": True, "use_dora": True},
    "olora, dora": {"init_lora_weights": "olora", "use_dora": True},
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("first", [False, True], ids=["fused after", "fused before"])
def test_initialisers(start: str, first: bool, device: torch.device, ran: Counter) -> None:
    """What they put into the base and the factors is what is computed, without a warning."""
    torch.manual_seed(3)
    base, settings = Block().to(device), config(target_modules=["proj", "out"], **STARTS[start])
    torch.manual_seed(8)
    theirs = get_peft_model(copy.deepcopy(base), settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if first:  # PEFT then changes the base of a layer that is fused
            ours = fuse_lora(get_peft_model(base, config(target_modules=["proj", "out"])))
            ours(ids(device))
            torch.manual_seed(8)
            ours.add_adapter("start", settings)
            ours.set_adapter("start")
        else:
            ours = fuse_lora(copy.deepcopy(theirs))
    ran.clear()
    ours, theirs = ours.double(), theirs.double()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids(device)), theirs(ids(device)))
    assert ran.total() == 2
    if not first:
        assert_same(ours, theirs, ids(device))


def test_eva(device: torch.device, ran: Counter) -> None:
    """First values that come from batches."""
    from peft import EvaConfig, initialize_lora_eva_weights

    torch.manual_seed(3)
    settings = config(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), r=3)
    theirs = get_peft_model(Block().to(device), settings)
    batches = [{"x": torch.randint(11, (8, 5), device=device)} for _ in range(4)]
    steps = dict.fromkeys(("prepare_model_inputs_fn", "prepare_layer_inputs_fn"))
    steps |= {"forward_fn": lambda model, batch: model(**batch)}
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False, **steps)
    assert_fused(theirs, device, ran)


def test_corda(device: torch.device, ran: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """First values, and a residual base, that come from batches."""
    if importlib.util.find_spec("attr") is None:  # PEFT has a dataclass from it, and no more
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(3)
    base = Block().to(device)
    settings = config(init_lora_weights="corda", corda_config=CordaConfig(), r=3)
    batches = [torch.randint(11, (1, 9), device=device) for _ in range(4)]
    preprocess_corda(base, settings, run_model=lambda: [base(batch) for batch in batches])
    assert_fused(get_peft_model(base, settings), device, ran)


def assert_fused(theirs: PeftModel, device: torch.device, ran: Counter) -> None:
    """A copy is fused, and gives the same."""
    ours = fuse_lora(copy.deepcopy(theirs).double())
    ran.clear()
    assert_same(ours, theirs.double(), ids(device))
    assert ran.total() == 1


def test_gpt2_with_dora_and_back(device: torch.device) -> None:
    """A model of Conv1D layers; unfused it is PEFT's again."""
    settings = config(target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True)
    theirs = away(fill(get_peft_model(gpt2(), settings))).to(device).double()
    ours, tokens = fuse_lora(copy.deepcopy(theirs)), torch.arange(6, device=device).view(1, 6)
    assert_same(ours, theirs, tokens)
    unfused = unfuse_lora(ours)
    assert torch.equal(unfused(tokens).logits, theirs(tokens).logits)
    assert all(R in module.r.values() for module in ours.modules() if isinstance(module, Linear))
