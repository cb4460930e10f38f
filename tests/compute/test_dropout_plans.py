"""Dropout's mask is of the call, not of its plan: passes by different plans see one mask."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from fused_lowrank import config, lowrank_linear
from fused_lowrank.compute import devices
from fused_lowrank.compute.dropout import Dropout
from fused_lowrank.compute.plans import PLANS
from fused_lowrank.compute.reference import lowrank_linear_reference

P = 0.5
NAMES = ("x", "weight", "down", "core", "up", "bias")
TRAINED = [("core",), ("down",), ("x", "core"), NAMES]
WAYS = {
    "plain": lambda call, *tensors: call(*tensors),
    "reentrant": lambda call, *tensors: checkpoint(call, *tensors, use_reentrant=True),
    "not reentrant": lambda call, *tensors: checkpoint(call, *tensors, use_reentrant=False),
}
# Of the forward, and of the backward with what it computes again; None: whatever is chosen.
PINS = [("aten", None), ("split", None), (None, "aten"), (None, "split"), ("aten", "split")]
PINS += [("split", "aten"), ("aten", "aten"), ("split", "split"), ("first", "split")]
PINS += [("mixed", "aten")]
# Bits are kept, unless redrawn: in the forward alone, in what is computed again alone, in both.
SETTINGS = [(impl, pins, (False, False)) for impl in ("triton", "aten") for pins in PINS]
SETTINGS += [("auto", pins, (False, False)) for pins in PINS[1:4]]
SETTINGS += [("triton", pins, (True, True)) for pins in PINS[4:6]]
SETTINGS += [
    ("triton", pins, redraw) for pins in PINS[:3] for redraw in ((True, False), (False, True))
]
Tensors = dict[str, torch.Tensor]


def operands(device: torch.device, trained: tuple[str, ...]) -> Tensors:
    """Those of a call, in float64 where kernels take it."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    sizes = {"x": (5, 45), "weight": (21, 45), "down": (4, 45), "core": (4, 6), "up": (21, 6)}
    sizes["bias"] = (21,)
    return {
        name: torch.randn(size, device=device, dtype=dtype).requires_grad_(name in trained)
        for name, size in sizes.items()
    }


def masks(seed: torch.Tensor) -> list[torch.Tensor]:
    """What the kernels and what library products keep of an x (5, 45)."""
    ones = torch.ones(5, 45, device=seed.device)
    return [
        PLANS[name].masked.run(ones, Dropout(seed, P), devices.tiles(seed.device) if ours else None)
        for name, ours in (("split", True), ("aten", False))
    ]


def under(mask: torch.Tensor, made: Tensors, dy: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradients by the equation under a mask."""
    low = made["x"] * mask.to(made["x"].dtype) / (1 - P)
    y = lowrank_linear_reference(**made, scale=0.5, low=low)
    leaves = [tensor for tensor in made.values() if tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize(("impl", "pins", "redraw"), SETTINGS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trained", TRAINED, ids=" ".join)
def test_gradients_are_of_the_mask_that_the_forward_saw(
    impl: str, trained: tuple[str, ...], way: str, pins: tuple, redraw: tuple, device: torch.device
) -> None:
    """Which mask that was, y says; and the gradients are those of the equation under it."""
    made, seed = operands(device, trained), torch.tensor([12345], device=device)
    dy = torch.randn_like(made["x"][:, :21]).detach()

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(NAMES, tensors, strict=True))
        how = {"scale": 0.5, "dropout_p": P, "training": True, "impl": impl}
        return lowrank_linear(**named, **how, seed=seed)

    with config.use(plan=pins[0], redraw_dropout=redraw[0]):
        y = WAYS[way](call, *made.values())
    leaves = [tensor for tensor in made.values() if tensor.requires_grad]
    with config.use(plan=pins[1], redraw_dropout=redraw[1]):
        if pins[0] in ("first", "mixed") and way != "reentrant" and "x" in trained:
            with pytest.raises(RuntimeError, match=r"cannot.*dropout"):
                y.backward(dy)
            return
        y.backward(dy)
    found = [y.detach(), *(leaf.grad for leaf in leaves)]
    near = 1e-9 if y.dtype == torch.float64 else 1e-4
    expected = [under(mask, made, dy) for mask in masks(seed)]
    (seen,) = (e for e in expected if torch.allclose(e[0], y, rtol=near, atol=near))
    for ours, theirs in zip(found, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)


@pytest.mark.parametrize("impl", ["triton", "aten"])
@pytest.mark.parametrize("pins", [("aten", "split"), ("split", None)])
def test_a_compiled_graph_may_be_pinned_in_one_pass_alone(
    pins: tuple[str, str | None], impl: str, device: torch.device
) -> None:
    """Its ops read the context that they run in."""
    made, seed = operands(device, ("x", "down", "core")), torch.tensor([12345], device=device)
    dy = torch.randn_like(made["x"][:, :21]).detach()

    def call(x: torch.Tensor) -> torch.Tensor:
        how = {"scale": 0.5, "dropout_p": P, "training": True, "impl": impl}
        return lowrank_linear(**{**made, "x": x}, **how, seed=seed)

    torch._dynamo.reset()
    with config.use(plan=pins[0]):
        y = torch.compile(call, fullgraph=True, backend="aot_eager")(made["x"])
    with config.use(plan=pins[1]):
        found = torch.autograd.grad(y, [t for t in made.values() if t.requires_grad], dy)
    near = 1e-9 if y.dtype == torch.float64 else 1e-4
    expected = under(masks(seed)[impl == "aten"], made, dy)
    for ours, theirs in zip((y.detach(), *found), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)
