"""torch.compile and torch.export of the layers agree with eager."""

import pytest
import torch

from fused_lowrank import FusedLoraLinear, FusedLoraMiniLinear, FusedLoraXSLinear

LAYERS = {
    "lora": (FusedLoraLinear, {"r": 4}),
    "lora_xs": (FusedLoraXSLinear, {"r": 4}),
    "lora_mini": (FusedLoraMiniLinear, {"r": 3, "a": 6, "b": 5}),
}


def filled(method: str, device: torch.device, **keywords: object) -> torch.nn.Module:
    """A layer none of whose factors is zero."""
    cls, ranks = LAYERS[method]
    layer = cls(24, 20, **ranks, **keywords, device=device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


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
    layer = filled(method, device)
    layer.impl = impl
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._inductor.compile(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for lead in ((5, 7), (3, 7), (9, 7), (11, 7)):
        x = torch.randn(*lead, 24, device=device)
        for ours, eager in zip(step(layer, compiled, x), step(layer, layer, x), strict=True):
            torch.testing.assert_close(ours, eager)
    assert len(graphs) <= 2


@pytest.mark.parametrize("method", LAYERS)
def test_default_backend(method: str, device: torch.device) -> None:
    """torch.compile as users call it, in training and in inference, with dropout traced."""
    torch._dynamo.reset()
    layer = filled(method, device)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(6, 24, device=device)
    for ours, eager in zip(step(layer, compiled, x), step(layer, layer, x), strict=True):
        torch.testing.assert_close(ours, eager)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    dropping = filled(method, device, dropout=0.5)
    assert torch.compile(dropping, fullgraph=True)(x).isfinite().all()


@pytest.mark.parametrize("method", LAYERS)
def test_autocast_compiles(method: str, device: torch.device) -> None:
    """fp32 parameters under bf16 autocast inside a compiled call."""
    torch._dynamo.reset()
    layer = filled(method, device)

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return layer(x)

    x = torch.randn(6, 24, device=device)
    ours = step(layer, torch.compile(call, fullgraph=True), x)
    for compiled, eager in zip(ours, step(layer, call, x), strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("method", LAYERS)
def test_export_keeps_the_op(method: str, device: torch.device) -> None:
    """An exported program holds our op and gives the same output for another batch size."""
    layer = filled(method, device).requires_grad_(False).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        layer, (torch.randn(4, 24, device=device),), dynamic_shapes=({0: batch},)
    )
    assert "fused_lowrank.forward" in str(program.graph)
    x = torch.randn(9, 24, device=device)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_scale_and_rank_do_not_leak_between_compiled_layers(device: torch.device) -> None:
    """Two layers with other scales in one compiled model keep their own."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(
        FusedLoraXSLinear(24, 24, r=4, alpha=4, device=device),
        FusedLoraXSLinear(24, 24, r=4, alpha=40, device=device),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(6, 24, device=device)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
