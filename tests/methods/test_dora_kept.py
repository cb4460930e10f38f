"""DoRA's norms have constants that are kept; no call gets a gain of what was before."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dora_cases import (
    CHANGES,
    SETTINGS,
    K,
    M,
    adapted,
    close,
    formula,
    in_place,
    layer_of,
    load,
    methods,
    replaced,
)
from dora_cases import Net as TwoLayers
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lowrank import merge, unmerge
from fused_lowrank.methods import METHODS, dora

PAIRS = [
    (method, name)
    for method in SETTINGS
    for name in ("weight", *METHODS[method][0].row.factors, "magnitude")
]


def called(layer: Any, x: torch.Tensor) -> None:
    """Call a layer twice without gradients: each result is the formula's."""
    with torch.no_grad():
        for _ in range(2):
            close([layer(x)], [formula(layer, x)], 1e-5)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_after_a_change(method: str, name: str, change: Callable[..., None]) -> None:
    """A call has the gain of what W and the factors are then, whatever writes to them."""
    layer, x = layer_of(method).eval(), torch.randn(3, K)
    if change is load and name not in layer.state_dict():
        change = replaced  # no state_dict has it
    for _ in range(2):
        called(layer, x)
        change(layer, name)


def without_trace(layer: Any) -> None:
    """Write as an optimiser in C++ does, which no version counts."""
    for own in layer.trained_factors:
        own.data.mul_(1.5)


@methods
def test_training_between_two_evaluations(method: str) -> None:
    """What optimisers write is seen, also where it leaves no trace."""
    layer, x = layer_of(method), torch.randn(M, K)
    for write in (torch.optim.SGD(layer.trained_factors, lr=0.1).step, without_trace):
        called(layer, x)
        layer(x).square().mean().backward()
        write() if write is not without_trace else write(layer)
        called(layer, x)


@methods
@pytest.mark.parametrize("reentrant", [True, False])
def test_training_in_checkpoints(method: str, reentrant: bool) -> None:
    """Whose forward is without gradients in one of the two kinds."""
    layer, x = layer_of(method), torch.randn(M, K).requires_grad_()
    for _ in range(2):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        close([y], [formula(layer, x)], 1e-5)
        y.square().mean().backward()
        without_trace(layer)
    called(layer, x.detach())


@methods
def test_written_through_data(method: str) -> None:
    """As an average of weights is put in place for an evaluation, of what is trained."""
    layer, x = layer_of(method).eval(), torch.randn(3, K)
    called(layer, x)
    without_trace(layer)
    called(layer, x)


def test_settings_and_copies() -> None:
    """A scale is part of a gain; copies compute their own."""
    layer, x = layer_of("lora").eval(), torch.randn(3, K)
    called(layer, x)
    layer.scale *= 2
    called(layer, x)
    twin, other = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for one in (twin, other):
        in_place(one, "up")
        called(one, x)
        called(layer, x)


@methods
def test_merged_and_back(method: str) -> None:
    """Neither merging nor what is written while merged leaves an old gain."""
    torch.manual_seed(0)
    model = adapted(TwoLayers(), method).eval()
    x = torch.randn(3, K)
    called(model.first, x)
    merge(model)
    in_place(model.first, "magnitude")
    unmerge(model)
    called(model.first, x)


def test_weights_and_factors_that_two_layers_share() -> None:
    """Each has the gain of its own factors."""
    one, two = layer_of("lora").eval(), layer_of("lora").eval()
    two.weight, two.magnitude = one.weight, one.magnitude
    in_place(two, "up")
    x = torch.randn(3, K)
    for _ in range(2):
        called(one, x)
        called(two, x)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["down", "start_down"])
def test_a_down_of_two_factors(name: str, change: Callable[..., None]) -> None:
    """Of an init that starts as a part of W: the constants are of both, and follow either."""
    layer, x = layer_of("lora_fa", init="pissa").eval(), torch.randn(3, K)
    for _ in range(2):
        whole = layer.weight + layer.delta_weight()
        close([layer(x)], [x @ whole.t() + layer.bias], 1e-5)
        (found,) = dora.KEPT[layer.down].values()
        assert found[1].with_down.shape == (len(layer.weight), 2 * layer.r)
        change(layer, name)


def test_a_weight_and_views_of_it() -> None:
    """The rows of a weight, of it turned, and of parts of it have norms of their own."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    down = nn.Parameter(torch.randn(2, 6), requires_grad=False)
    for _ in range(2):
        for view in (weight, weight.t(), weight[:3], weight[3:], weight[:3].t()):
            own = down[:, : view.shape[1]]
            for of in ([], [own]):
                fixed = dora.kept(view, own, of)
                torch.testing.assert_close(fixed.of_weight, view.square().sum(1))
                if of:
                    torch.testing.assert_close(fixed.with_down, view @ own.t())
    assert dora.kept(weight.t(), down, [down]) is dora.kept(weight.t(), down, [down])


def test_inference_mode_and_training_after_it() -> None:
    """A gain that was made in inference mode is none for a call with gradients."""
    layer, x = layer_of("lora_xs").eval(), torch.randn(M, K)
    with torch.inference_mode():
        y = layer(x)
    called(layer, x)
    layer(x.requires_grad_()).sum().backward()
    assert layer.magnitude.grad is not None
    torch.testing.assert_close(layer(x), y)
