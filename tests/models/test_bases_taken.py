"""Bases that are no plain linear layers: what is taken and refused, hooks, dtypes, a state_dict."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from base_cases import (
    D,
    H,
    Net,
    Opaque,
    adapted,
    check,
    inputs,
    kinds,
    model_of,
    shifted,
)
from torch import Tensor, nn

from fused_lowrank import (
    adapt,
    unload,
)
from fused_lowrank.methods import METHODS as LAYERS


def test_an_unknown_module_is_called_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """A line says so, once for a class."""
    kind = type("Unheard", (Opaque,), {})
    with caplog.at_level(logging.WARNING, logger="fused_lowrank"):
        for _ in range(2):
            adapt(Net(kind), "lora", target_modules=["first", "second"], progress=False)
    said = [record.getMessage() for record in caplog.records if "Unheard" in record.getMessage()]
    assert len(said) == 1
    assert "called as it is" in said[0]


def test_an_opaque_base_is_called_once_a_call() -> None:
    """And its y0 is not written to: its maker may need it."""

    class Saving(Opaque):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).exp()  # exp saves its result

    model = adapt(Net(Saving), "lora", target_modules=["first", "second"], progress=False)
    shifted(model)
    calls, x = model.first.base_layer.calls, inputs(torch.float32, 5).requires_grad_()
    y = model(x)
    assert model.first.base_layer.calls == calls + 1
    y.sum().backward()
    assert x.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"first: .*not linear"):
        adapt(Net(Saving), "lora_xs", target_modules=["first"], r=4, progress=False)


class Deaf(Opaque):
    """A module without a gradient of x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Narrow(Opaque):
    """A module that does not make what it says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :-1]


class Broken(Opaque):
    """A module whose library is not there."""

    def forward(self, x: Tensor) -> Tensor:
        raise ImportError("no such kernels")


class Nameless(nn.Module):
    """A module that does not say its sizes."""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Deaf, "first is a Deaf, which makes no .*differentiated"),
        (Narrow, r"first is a Narrow, which makes no \(2, 128\) of \(2, 64\)"),
        (Broken, "first is a Broken, whose library cannot compute on cpu.*no such kernels"),
        (lambda k, n: Nameless(), "first is a Nameless: only nn.Linear"),
    ],
)
def test_refused(kind: Any, message: str) -> None:
    """By name, before anything is changed."""
    model = Net(kind)
    before = [model.first, model.second]
    with pytest.raises(TypeError, match=message):
        adapt(model, "lora", target_modules=["first"], progress=False)
    assert [model.first, model.second] == before


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_nothing_of_the_base_is_trained(part: str) -> None:
    """Its own parameters are frozen, and cannot be named."""
    model = adapted("opaque")
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "down",
        "up",
    }
    with pytest.raises(ValueError, match=f"train names {part}, but the base is a Opaque"):
        adapt(model_of("opaque"), "lora", target_modules=["first"], train=("down", "up", part))


def test_state_dict() -> None:
    """Keys of the module are below `base_layer`; those of a plain model are taken as well."""
    model, x = adapted("opaque", "lora_xs"), inputs()
    state, y = model.state_dict(), model(x)
    assert {"first.base_layer.turned", "first.core"} <= state.keys()
    plain = {key.replace(".base_layer.", "."): value for key, value in state.items()}
    for given in (state, plain):
        other = adapted("opaque", "lora_xs")
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(given)
        torch.testing.assert_close(other(x), y, rtol=0, atol=0)


def test_hooks_are_of_the_whole_layer() -> None:
    """They see the adapted result, once; and are the module's again."""
    model, seen = model_of("subclass"), []
    handle = model.first.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    module = model.first
    model = shifted(adapt(model, "lora", target_modules=["first"], progress=False))
    x = inputs()
    model(x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], model.first(x).detach())
    unload(model)
    assert model.first is module
    assert len(module._forward_hooks) == 1
    handle.remove()
    assert not module._forward_hooks


def test_hooks_on_the_base_are_called() -> None:
    """Whoever puts one on the module later has it called."""
    model, seen = adapted("opaque"), []
    model.first.base_layer.register_forward_hook(lambda m, args, y: seen.append(1))
    check(model, inputs())
    assert seen


class Elsewhere(Opaque):
    """A layer as a library that is known makes it."""


Elsewhere.__module__ = "hqq.core.quantize"


@kinds
def test_all_linear(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is quantised is among them, without a word; what nobody knows is not."""
    model = nn.ModuleDict({"block": model_of(kind), "head": nn.Linear(D, 2)})
    if kind == "opaque":
        model["block"].second = Elsewhere(H, D)
        adapt(model, "lora", target_modules="all-linear", progress=False)
        assert type(model["block"].first) is Opaque
        assert not caplog.records
    else:
        adapt(model, "lora", target_modules="all-linear", progress=False)
        assert isinstance(model["block"].first, LAYERS["lora"][1])
    assert isinstance(model["block"].second, LAYERS["lora"][1])
    assert type(model["head"]) is nn.Linear


@kinds
def test_bad_input(kind: str) -> None:
    """As of layers over plain matrices."""
    layer = adapted(kind).first
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        layer(torch.ones(2, D, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x is \(2, 65\) and weight \(128, 64\)"):
        layer(torch.ones(2, D + 1))
    with pytest.raises(ValueError, match="down is on cpu, but x on meta"):
        layer(torch.ones(2, D, device="meta"))


@kinds
def test_a_wider_input(kind: str) -> None:
    """y is of x's dtype, whatever dtype the base computes in, and so is dx."""
    model = adapted(kind, "lora", torch.bfloat16)
    if kind in ("nf4", "fp4"):
        x = inputs().requires_grad_()
        y = model(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == torch.float32
        near = model(inputs(torch.bfloat16)).float()
        torch.testing.assert_close(y.detach(), near.detach(), rtol=0.05, atol=0.05)
    model, x = adapted(kind), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    off = float((y - model(x)).detach().float().norm() / y.detach().float().norm())
    assert 1e-4 < off < 2e-2  # it is computed in bfloat16
    assert y.dtype == torch.float32


@kinds
def test_moved_to_another_dtype(kind: str) -> None:
    """The base stays as it is stored, and the layer computes."""
    if kind == "subclass":
        pytest.skip("the stand-in cannot be moved")
    model = adapted(kind).to(torch.bfloat16)
    if kind in ("nf4", "fp4"):
        assert model.first.base_layer.weight.dtype == torch.uint8
    assert model(inputs(torch.bfloat16)).isfinite().all()


@kinds
def test_nothing_that_is_computed_changes_the_base(kind: str) -> None:
    """Neither a pass for inference by reference layers, nor one over data that a start asks for:
    bitsandbytes packs 4-bit weights in such a pass, and rounds their scales.
    """
    x = inputs(torch.float32, 6)
    before = model_of(kind).train()(x).detach()
    model = adapted(kind, "lora", fused=False).eval()
    with torch.no_grad():
        model(x)
    started = model_of(kind)
    adapt(started, "lora", target_modules=["first"], r=4, init="eva", data=[x], progress=False)
    for own in (model.train(), started):
        unload(own)
        assert torch.equal(own.train()(x), before)
