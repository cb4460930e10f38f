"""torch.compile and torch.export of the layers agree with eager."""

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from fused_lowrank import FusedLoraLinear, FusedLoraMiniLinear, FusedLoraXSLinear
from fused_lowrank.testing import Measured

LAYERS = {
    "lora": (FusedLoraLinear, {"r": 4}),
    "lora_xs": (FusedLoraXSLinear, {"r": 4}),
    "lora_mini": (FusedLoraMiniLinear, {"r": 3, "a": 6, "b": 5}),
}


def filled(
    method: str, device: torch.device, dtype: torch.dtype = torch.float64, **keywords: object
) -> torch.nn.Module:
    """A layer none of whose factors is zero."""
    cls, ranks = LAYERS[method]
    layer = cls(24, 20, **ranks, **keywords, device=device, dtype=dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def close(ours: Any, expected: Any) -> None:
    """Equal but for the order of the operations; in float32 are only kernels on a GPU."""
    narrow = expected[0].dtype == torch.float32
    torch.testing.assert_close(ours, expected, **({} if narrow else {"rtol": 1e-9, "atol": 1e-9}))


def step(layer: torch.nn.Module, call: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, dx and every parameter's gradient."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("method", LAYERS)
@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_compile_agrees_with_eager(method: str, impl: str, device: torch.device) -> None:
    """The same output and gradients for several batch sizes, with at most one recompile."""
    torch._dynamo.reset()
    kernels = impl == "triton" and device.type == "cuda"
    dtype = torch.float32 if kernels else torch.float64  # which the interpreter takes, too
    layer = filled(method, device, dtype)
    layer.impl = impl
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._inductor.compile(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for lead in ((5, 7), (3, 7), (9, 7), (11, 7)):
        x = torch.randn(*lead, 24, device=device, dtype=dtype)
        close(step(layer, compiled, x), step(layer, layer, x))
    assert len(graphs) <= 2


@pytest.mark.parametrize("method", LAYERS)
@pytest.mark.parametrize("impl", ["auto", "aten"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_large_call_can_be_traced(impl: str, method: str, device: torch.device) -> None:
    """By torch.jit.trace, with gradients and without; kernels, which it cannot record, say so."""
    layer = filled(method, device, impl=impl)
    x = torch.randn(4000, 24, device=device, dtype=torch.float64)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            traced = torch.jit.trace(layer, x)
        for rows in (x, x[:70]):
            torch.testing.assert_close(traced(rows), layer(rows), rtol=1e-9, atol=1e-9)
    close(step(layer, traced, x), step(layer, layer, x))
    layer.impl = "triton"
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace records no kernels"):
        torch.jit.trace(layer, x)


FIRST_CALL = """
import warnings, torch, fused_lowrank
warnings.filterwarnings("error", ".*lru_cache")  # what is asked once is asked outside of traces
layer = fused_lowrank.FusedLoraXSLinear(24, 20, r=4, dropout=0.5)
layer.impl = "triton"
x = torch.randn(6, 24)
assert torch.compile(layer, fullgraph=True, backend="eager")(x).isfinite().all()
"""


def test_the_first_call_may_be_a_compiled_one() -> None:
    """Nothing that is asked once in a process is left to be asked within a trace."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", LAYERS)
def test_default_backend(method: str, device: torch.device) -> None:
    """torch.compile as users call it, in training and in inference, with dropout traced."""
    torch._dynamo.reset()
    layer = filled(method, device)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(6, 24, device=device, dtype=torch.float64)
    close(step(layer, compiled, x), step(layer, layer, x))
    with torch.no_grad():
        close(compiled(x), layer(x))
    dropping = filled(method, device, dropout=0.5)
    assert torch.compile(dropping, fullgraph=True)(x).isfinite().all()


@pytest.mark.parametrize("method", LAYERS)
def test_autocast_compiles(method: str, device: torch.device) -> None:
    """fp32 parameters under bf16 autocast inside a compiled call: eager's error against fp64.

    Compiled code may round elsewhere than eager's, hence the error budget, not equal results.
    """
    torch._dynamo.reset()
    layer = filled(method, device, torch.float32)
    wide = copy.deepcopy(layer).double()
    absolute = copy.deepcopy(wide)
    for parameter in absolute.parameters():
        parameter.data.abs_()

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return layer(x)

    x = torch.randn(6, 24, device=device)
    ours = step(layer, torch.compile(call, fullgraph=True), x)
    theirs, truth = step(layer, call, x), step(wide, wide, x.double())
    sizes, unit = step(absolute, absolute, x.double().abs()), 2.0**-8
    for i, (compiled, eager, true, size) in enumerate(zip(ours, theirs, truth, sizes, strict=True)):
        assert compiled.dtype == eager.dtype
        errors = (float((result.double() - true).norm()) for result in (compiled, eager))
        measured = Measured(str(i), true.numel(), *errors, float(2 * unit * size.norm()))
        assert measured.within, measured


@pytest.mark.parametrize("method", LAYERS)
def test_export_keeps_the_op(method: str, device: torch.device) -> None:
    """An exported program holds our op and gives the same output for another batch size."""
    layer = filled(method, device).requires_grad_(False).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        layer,
        (torch.randn(4, 24, device=device, dtype=torch.float64),),
        dynamic_shapes=({0: batch},),
    )
    assert "fused_lowrank.forward" in str(program.graph)
    x = torch.randn(9, 24, device=device, dtype=torch.float64)
    close(program.module()(x), layer(x))


def test_scale_and_rank_do_not_leak_between_compiled_layers(device: torch.device) -> None:
    """Two layers with other scales in one compiled model keep their own."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        FusedLoraXSLinear(24, 24, r=4, alpha=4, device=device),
        FusedLoraXSLinear(24, 24, r=4, alpha=40, device=device),
    ).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(6, 24, device=device, dtype=torch.float64)
    close(torch.compile(model, fullgraph=True)(x), model(x))
