"""DoRA's gain is kept by calls without gradients, and no call gets one of what was before."""

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
    methods,
)
from dora_cases import Net as TwoLayers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_lowrank import adapt, merge, unmerge
from fused_lowrank.methods import dora

COMMON = ("weight", "down", "up", "magnitude")
CORES = {"lora_xs": ("core",), "lora_mini": ("a_train", "b_train")}
PAIRS = [(method, name) for method in SETTINGS for name in (*COMMON, *CORES.get(method, ()))]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that norms are computed."""
    calls: list[bool] = []
    row_norms = dora.row_norms

    def count(*args: Any) -> Any:
        calls.append(True)
        return row_norms(*args)

    monkeypatch.setattr(dora, "row_norms", count)
    return calls


def called(layer: Any, x: torch.Tensor) -> None:
    """Call a layer twice without gradients: each result is the formula's."""
    with torch.no_grad():
        for _ in range(2):
            close([layer(x)], [formula(layer, x)], 1e-5)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_until_something_changes(
    method: str, name: str, change: Callable[..., None], computed: list[bool]
) -> None:
    """Norms are computed once, and once more after whatever writes to W or a factor."""
    layer, x = layer_of(method).eval(), torch.randn(3, K)
    for _ in range(2):
        computed.clear()
        called(layer, x)
        assert len(computed) == 1
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


@pytest.mark.parametrize("mode", ["eval", "train", "forget"])
def test_written_through_data(mode: str) -> None:
    """As an average of weights is put in place for an evaluation: seen after these calls."""
    layer, x = layer_of("lora").eval(), torch.randn(3, K)
    called(layer, x)
    without_trace(layer)
    dora.forget() if mode == "forget" else getattr(torch.nn.Sequential(layer), mode)()
    called(layer, x)


def test_settings_and_copies(computed: list[bool]) -> None:
    """A scale is part of what is kept; copies compute their own."""
    layer, x = layer_of("lora").eval(), torch.randn(3, K)
    called(layer, x)
    layer.scale *= 2
    called(layer, x)
    twin, other = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for one in (twin, other):
        in_place(one, "up")
        computed.clear()
        called(one, x)
        assert len(computed) == 1
        called(layer, x)
        assert len(computed) == 1


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


def test_residual_starts(computed: list[bool]) -> None:
    """Parts that a call makes anew are known by the factors that they are made of."""
    torch.manual_seed(0)
    settings: Any = {"r": 4, "init": "pissa", "dora": True}
    targets = ["first", "second"]
    model = adapt(TwoLayers(), "lora", target_modules=targets, progress=False, **settings)
    layer, x = model.first, torch.randn(3, K)
    with torch.no_grad():
        y = layer(x)
        computed.clear()
        torch.testing.assert_close(layer(x), y)
        assert not computed
        in_place(layer, "up")
        assert not torch.allclose(layer(x), y)
    assert len(computed) == 1


def test_where_none_is_kept(computed: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, in distributed runs and of inference tensors."""
    layer, x = layer_of("lora").eval(), torch.randn(3, K)
    computed.clear()
    layer(x), layer(x)
    assert len(computed) == 2
    with torch.no_grad():
        layer(x)
        monkeypatch.setattr(dora, "is_distributed", lambda: True)
        layer(x), layer(x)
        assert len(computed) == 5
        monkeypatch.undo()
    with torch.inference_mode():
        born = layer_of("lora").eval()
        for _ in range(2):
            close([born(x)], [formula(born, x)], 1e-5)
            in_place(born, "up")


def test_inference_mode_and_training_after_it() -> None:
    """A gain that was made in inference mode is none for a call with gradients."""
    layer, x = layer_of("lora_xs").eval(), torch.randn(M, K)
    with torch.inference_mode():
        y = layer(x)
    called(layer, x)
    layer(x.requires_grad_()).sum().backward()
    assert layer.magnitude.grad is not None
    torch.testing.assert_close(layer(x), y)


class Operations(TorchDispatchMode):
    """The operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@methods
def test_operations_of_a_small_call(method: str) -> None:
    """Two more than without dora: the gain, and the bias after it."""
    counts = []
    for dora_too in (False, True):
        layer, x = layer_of(method, dora=dora_too).eval(), torch.randn(1, K)
        with torch.no_grad():
            layer(x)
            with Operations() as seen:
                layer(x)
        counts.append(len(seen.names))
    assert counts[1] - counts[0] <= 2, seen.names
