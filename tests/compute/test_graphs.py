"""Whole training steps in CUDA graphs: captured by hand, made of callables, or by compiling."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fused_lowrank import FusedLoraLinear, FusedLoraMiniLinear, FusedLoraXSLinear

LAYERS = {
    "lora": (FusedLoraLinear, {"r": 8}),
    "lora_xs": (FusedLoraXSLinear, {"r": 8}),
    "lora_mini": (FusedLoraMiniLinear, {"r": 4, "a": 16, "b": 16, "init": "paper"}),
}
ROWS = (16, 300)  # of `decode`, and of two kernels


@pytest.fixture(autouse=True)
def _on_a_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs are of a GPU")


def model(method: str, device: torch.device) -> nn.Sequential:
    """Two adapted layers with a nonlinearity between them, in bfloat16, factors not zero."""
    cls, ranks = LAYERS[method]
    torch.manual_seed(0)
    layers = [cls(128, 128, **ranks, device=device, dtype=torch.bfloat16) for _ in range(2)]
    for layer in layers:
        for name in layer.train_names:
            nn.init.normal_(getattr(layer, name), std=0.1)
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def step(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """y of a call; gradients are left at the parameters and at x."""
    y = call(x)
    y.float().square().mean().backward()
    return y


def results(call: Callable[[Tensor], Tensor], of: nn.Module, x: Tensor) -> list[Tensor]:
    """y, dx and the gradients of a step."""
    x = x.clone().requires_grad_()
    of.zero_grad(set_to_none=True)
    y = step(call, x)
    return [t.detach().clone() for t in (y, x.grad, *(p.grad for p in trained(of)))]


def trained(of: nn.Module) -> list[nn.Parameter]:
    """What is trained."""
    return [p for p in of.parameters() if p.requires_grad]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", LAYERS)
def test_a_step_is_captured(method: str, rows: int, device: torch.device) -> None:
    """By torch.cuda.graph; replayed on other data it gives eager's bits."""
    made = model(method, device)
    static = torch.randn(rows, 128, device=device).bfloat16().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled, and plans chosen, before the capture
        for _ in range(3):
            made.zero_grad(set_to_none=True)
            static.grad = None
            step(made, static)
    torch.cuda.current_stream().wait_stream(side)
    made.zero_grad(set_to_none=True)
    static.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(made, static)
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn(rows, 128, device=device).bfloat16()
        with torch.no_grad():
            static.copy_(x)
        graph.replay()
        replayed = [t.detach().clone() for t in (y, static.grad, *(p.grad for p in trained(made)))]
        kept = [p.grad for p in trained(made)]
        expected = results(made, made, x)
        for parameter, grad in zip(trained(made), kept, strict=True):
            parameter.grad = grad  # the graph's own
        assert all(map(torch.equal, replayed, expected))


@pytest.mark.parametrize("method", LAYERS)
def test_graphed_callables(method: str, device: torch.device) -> None:
    """By torch.cuda.make_graphed_callables: forward and backward as two graphs."""
    made = model(method, device)
    sample = torch.randn(300, 128, device=device).bfloat16().requires_grad_()
    expected = results(made, made, sample.detach())
    graphed = torch.cuda.make_graphed_callables(made, (sample,))
    assert all(map(torch.equal, results(graphed, made, sample.detach()), expected))


@pytest.mark.parametrize("method", LAYERS)
def test_reduce_overhead(method: str, device: torch.device) -> None:
    """By torch.compile(mode="reduce-overhead"), which captures what it has compiled."""
    torch._dynamo.reset()
    made = model(method, device)
    compiled = torch.compile(made, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(300, 128, device=device).bfloat16()
    expected = results(made, made, x)
    for _ in range(4):  # warm, recorded, replayed
        torch.compiler.cudagraph_mark_step_begin()
        got = results(compiled, made, x)
    for ours, theirs in zip(got, expected, strict=True):
        # Compiled code may round elsewhere around the layers.
        assert float((ours - theirs).float().norm()) <= 0.02 * float(theirs.float().norm())


def test_dropout_draws_anew_at_each_replay(device: torch.device) -> None:
    """The seed is drawn in the graph, by the device's generator."""
    layer = FusedLoraXSLinear(128, 128, r=8, dropout=0.5, device=device, dtype=torch.bfloat16)
    nn.init.normal_(layer.core, std=1.0)
    x = torch.randn(300, 128, device=device).bfloat16()
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(y.clone())
    assert not torch.equal(*seen)
