"""PEFT's own LoRA through the fused kernels: the same results."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from peft.tuners.lora.layer import Linear
from peft_lora_cases import (
    ALPHA,
    BASES,
    BF16,
    F16,
    F32,
    F64,
    ROWS,
    SMALL_ROWS,
    K,
    N,
    R,
    assert_same,
    calls,
    counted,
    gradients,
    layer,
)

from fused_lowrank.integrations.peft import fuse_lora
from fused_lowrank.testing import FACTOR, check_pooled, measure


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often which of our ways computed a layer."""
    return counted(monkeypatch)


# x and weight, factors, autocast
DTYPES = {
    "fp32": (F32, F32, None),
    "fp64": (F64, F64, None),
    "bf16": (BF16, BF16, None),
    "fp16": (F16, F16, None),
    "bf16 beside fp32": (BF16, F32, None),
    "fp32 beside bf16": (F32, BF16, None),
    "autocast": (F32, F32, BF16),
    "autocast of fp16": (F16, F32, F16),
}


def operands_of(module: Linear, x: torch.Tensor) -> dict[str, Any]:
    """Those of `calls`."""
    return {
        "x": x,
        "weight": module.base_layer.weight.detach(),
        "bias": module.base_layer.bias,  # which bias="all" trains
        "down": module.lora_A["default"].weight,
        "up": module.lora_B["default"].weight,
        "up_bias": module.lora_B["default"].bias,
    }


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rows", [SMALL_ROWS, ROWS])
def test_results_are_within_the_error_budget(
    rows: int, base: str, dtypes: str, device: torch.device, ran: Counter
) -> None:
    """y and every gradient, in PEFT's dtypes, with rsLoRA and a bias of the factor's too."""
    wide, narrow, autocast = DTYPES[dtypes]
    theirs = layer(BASES[base](), wide, use_rslora=True, lora_bias=True).to(device)
    for part in theirs.lora_A, theirs.lora_B:
        part.to(narrow)
    ours = fuse_lora(copy.deepcopy(theirs))
    assert ours.scaling["default"] == ALPHA / R**0.5
    if theirs.base_layer.bias is not None:
        theirs.base_layer.bias.requires_grad_()
    torch.manual_seed(2)
    x = torch.randn(rows, K, device=device).to(wide).requires_grad_()
    operands = operands_of(theirs, x)
    dy = torch.randn(rows, N, device=device)
    measured = measure(calls(ours, autocast), calls(theirs, autocast), operands, dy)
    assert len(measured) == 2 + sum(
        isinstance(value, nn.Parameter) and value.requires_grad for value in operands.values()
    )
    assert all(m.within for m in measured), measured
    if wide == narrow != torch.float64 and not autocast:  # whose own errors are the truth's
        check_pooled(measured)
    way = "small" if rows == SMALL_ROWS and not autocast and device.type == "cpu" else "large"
    assert ran[way] > 0
    assert set(ran) == {way}


@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (2, 3, 5)])
def test_shapes_of_x(lead: tuple[int, ...], device: torch.device) -> None:
    """Any leading dimensions, none at all, and no rows."""
    theirs, x = layer(dtype=F64).to(device), torch.randn(*lead, K, device=device, dtype=F64)
    assert_same(fuse_lora(copy.deepcopy(theirs)), theirs, x)


@pytest.mark.parametrize("base", BASES)
def test_triton(base: str, device: torch.device, counted_launches: Any) -> None:
    """The kernels compute the layer, forward and backward; also from a transposed factor."""
    dtype = F64 if device.type == "cpu" else F32  # which the interpreter takes, too
    theirs = layer(BASES[base](), dtype).to(device)
    down = torch.randn(K, R, device=device, dtype=dtype).t()
    theirs.lora_A["default"].weight = nn.Parameter(down)
    ours = fuse_lora(copy.deepcopy(theirs))
    ours.impl = "triton"
    x = torch.randn(3, 5, K, device=device, dtype=dtype, requires_grad=True)
    with counted_launches() as counts:
        y = ours(x)
        forward = sum(counts.values())
        gradients(ours, y)
    assert 0 < forward < sum(counts.values())
    if dtype == F64:
        assert_same(ours, theirs, x)


def test_gradients_go_to_what_requires_them(device: torch.device) -> None:
    """One factor, x alone, a trained weight, and nothing at all."""
    for wanted in ({"lora_A"}, {"lora_B"}, {"base_layer"}, set()):
        for wants_x in (True, False):
            theirs = layer(dtype=F64).to(device)
            for name, parameter in theirs.named_parameters():
                parameter.requires_grad_(name.partition(".")[0] in wanted)
            ours = fuse_lora(copy.deepcopy(theirs))
            for rows in (SMALL_ROWS, ROWS):
                x = torch.randn(rows, K, device=device, dtype=F64, requires_grad=wants_x)
                y, expected = ours(x), theirs(x)
                assert y.requires_grad == expected.requires_grad == bool(wanted or wants_x)
                if not y.requires_grad:
                    continue
                got = [gradients(ours, y), x.grad]
                x.grad = None
                want = [gradients(theirs, expected), x.grad]
                x.grad = None
                torch.testing.assert_close(got, want)


def test_fp16_beside_fp32_is_trained_by_peft(device: torch.device, ran: Counter) -> None:
    """Small gradients of fp32 factors would vanish in fp16; inference has none."""
    theirs = layer(dtype=F16).to(device)
    theirs.lora_A.float(), theirs.lora_B.float()
    theirs.lora_B["default"].weight.data.mul_(1e-6)
    ours = fuse_lora(copy.deepcopy(theirs))
    x = torch.randn(ROWS, K, device=device, dtype=F16)
    dy = torch.full((ROWS, N), 1e-3, device=device, dtype=F16)
    for module in (ours, theirs):
        module(x).backward(dy)
    down = ours.lora_A["default"].weight.grad
    assert torch.equal(down, theirs.lora_A["default"].weight.grad)
    assert down.abs().max() > 0
    assert not ran
    operands = operands_of(theirs, x)
    frozen = {name: value.detach() for name, value in operands.items() if value is not None}
    with torch.no_grad():
        (y,) = measure(calls(ours, None), calls(theirs, None), {**operands, **frozen}, dy)
    assert y.error <= FACTOR * y.reference, y  # so many elements need no floor
    assert ran["large"] == 1


# --- dropout ---


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [SMALL_ROWS, ROWS])
def test_dropout(rows: int, compiled: bool, device: torch.device, ran: Counter) -> None:
    """The share that PEFT drops, scaled as it does, the same in the backward, none in eval."""
    p, base = 0.25, nn.Linear(K, K, bias=False)
    nn.init.zeros_(base.weight)
    theirs = layer(base, r=K, lora_alpha=3 * K, lora_dropout=p).to(device)
    for part in theirs.lora_A, theirs.lora_B:  # y = 3 · dropout(x)
        nn.init.eye_(part["default"].weight)
    ours = fuse_lora(copy.deepcopy(theirs))
    if compiled:
        torch._dynamo.reset()
        ours = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.ones(rows, K, device=device, requires_grad=True)
    y = ours(x)
    kept = y != 0
    torch.testing.assert_close(y, kept * (3 / (1 - p)))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y)
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(1 - kept.float().mean() - p) < 5 * deviation
    assert not torch.equal(ours(x), y)
    assert compiled or ran.total() == 2
    torch.testing.assert_close(ours.eval()(x), 3 * x)
    ours.train().lora_dropout.eval()  # it is dropout's own mode that counts
    torch.testing.assert_close(ours(x), 3 * x)


def test_dropout_of_small_calls_is_peft_s(device: torch.device) -> None:
    """On a CPU they draw the very same mask."""
    if device.type != "cpu":
        pytest.skip("there are no small calls there")
    theirs = layer(dtype=F64, lora_dropout=0.5)
    theirs.lora_A.double(), theirs.lora_B.double()
    ours = fuse_lora(copy.deepcopy(theirs))
    x, y = torch.randn(SMALL_ROWS, K, dtype=F64), []
    for module in (ours, theirs):
        torch.manual_seed(4)
        y.append(module(x))
    torch.testing.assert_close(*y)
