"""Layers with dora=True: a trained magnitude over the norms of the rows of W + ΔW."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dora_cases import (
    CHANGES,
    SETTINGS,
    K,
    M,
    N,
    close,
    formula,
    fused,
    gradients,
    in_place,
    layer_of,
    load,
    methods,
    replaced,
)
from torch import nn
from torch.nn.utils import parametrize, prune

from fused_lowrank import explain
from fused_lowrank.methods import METHODS, dora


@methods
@fused
@pytest.mark.parametrize("rows", [3, M])
@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_numbers(method: str, fused: bool, rows: int, dtype: torch.dtype, eps: float) -> None:
    """Output and gradients are the formula's; trained factors, magnitude among them, are wide."""
    layer = layer_of(method, fused, dtype)
    assert layer.magnitude.shape == (N,)
    assert layer.magnitude.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    x = torch.randn(rows, K).to(dtype)
    close(gradients(layer, layer, x), gradients(lambda x: formula(layer, x), layer, x), eps)


@methods
def test_starts_as_the_base_does(method: str) -> None:
    """The magnitude is the norm of W + ΔW at the start: the gain is 1."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    keywords = {**SETTINGS[method], "dora": True}
    layer: Any = METHODS[method][1].from_linear(linear, **keywords)
    plain: Any = METHODS[method][1].from_linear(linear, **SETTINGS[method])
    for name in plain.factors:
        getattr(plain, name).data.copy_(getattr(layer, name))
    torch.testing.assert_close(layer(torch.eye(K)), plain(torch.eye(K)))
    torch.testing.assert_close(layer.magnitude, (linear.weight + plain.delta_weight()).norm(dim=1))
    assert layer.train_names == (*plain.train_names, "magnitude")
    assert layer.state_dict().keys() == {*plain.state_dict(), "magnitude"}


class Doubled(nn.Module):
    """A parametrisation: twice the Parameter."""

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        """(...) → (...)."""
        return 2.0 * own


@methods
@pytest.mark.parametrize("which", ["magnitude", "down", "up"])
@pytest.mark.parametrize("how", ["parametrised", "pruned"])
def test_factors_that_are_computed(method: str, which: str, how: str) -> None:
    """What stands in a factor's place is what the layer and its norms are computed of."""
    layer = layer_of(method, True)
    if which not in layer.factors:
        pytest.skip(f"{method} has no {which}")
    x = torch.randn(M, K)
    layer(x)
    if how == "parametrised":
        parametrize.register_parametrization(layer, which, Doubled())
    else:
        prune.random_unstructured(layer, which, 0.5)
    torch.testing.assert_close(layer(x), formula(layer, x).float())


def test_under_autocast() -> None:
    """The norm is taken in float32, whatever autocast makes of products."""
    layer, x = layer_of("lora_xs"), torch.randn(M, K)
    parts = layer.parts()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.parts().gain.values, parts.gain.values)
        assert layer(x).dtype == torch.bfloat16


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that constants are computed."""
    calls: list[bool] = []
    constants = dora.constants

    def count(*args: Any) -> Any:
        calls.append(True)
        return constants(*args)

    monkeypatch.setattr(dora, "constants", count)
    return calls


@methods
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["weight", "down"])
def test_constants_are_kept_until_something_changes(
    method: str, which: str, change: Callable[..., None], counted: list[bool]
) -> None:
    """Once a layer, not once a call; and anew after whatever writes W or down."""
    layer, x = layer_of(method), torch.randn(M, K)
    layer(x)
    counted.clear()
    layer(x), layer(x).sum().backward()
    assert not counted
    name = layer.row.down_of[0] if which == "down" else which
    if getattr(layer, name).requires_grad and change is replaced:
        pytest.skip("a trained down is no constant")
    if change is load and name not in layer.state_dict():
        pytest.skip("no state_dict has it")
    change(layer, name)
    close([layer(x)], [formula(layer, x)], 1e-5)
    layer(x)
    assert len(counted) <= 1


def test_a_trained_weight_has_no_constants() -> None:
    """Of a weight that is trained the norm is taken in every call."""
    layer = layer_of("lora_xs", train=("core", "magnitude", "weight"))
    x = torch.randn(M, K)
    for _ in range(2):
        close([layer(x)], [formula(layer, x)], 1e-5)
        with torch.no_grad():
            layer.weight.data.mul_(1.5)
            layer.weight[3] += 1.0


@methods
@pytest.mark.parametrize("rows", [3, M])
def test_compiled(method: str, rows: int, counted: list[bool]) -> None:
    """One graph, the eager numbers, and constants that are kept as in eager calls."""
    torch.compiler.reset()
    layer, x = layer_of(method), torch.randn(rows, K)
    expected = gradients(layer, layer, x)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(gradients(compiled, layer, x), expected, 1e-6)
    counted.clear()
    gradients(compiled, layer, x)
    assert not counted
    in_place(layer, "weight")
    close([compiled(x)], [formula(layer, x)], 1e-5)


@methods
def test_saved_for_backward(method: str) -> None:
    """M × P and N numbers, the parts where a layer makes them, x where down is trained, and the
    result; nothing else.
    """
    layer, x = layer_of(method), torch.randn(M, K)
    x.requires_grad_()
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    sizes: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        y = layer(x)
    down, _, up, _ = layer.parts()
    made = sum(part.numel() for part in (down, up) if part.data_ptr() not in own)
    own |= {x.data_ptr(), y.data_ptr()}
    rest = sum(count for place, count in sizes.items() if place not in own)
    assert rest == M * len(down) + N + made  # t and the gain
    assert (x.data_ptr() in sizes) == down.requires_grad


@methods
def test_merging(method: str) -> None:
    """W' = gain ⊙ (W + ΔW), and back again, bit for bit."""
    layer, x = layer_of(method), torch.randn(M, K)
    expected, before = layer(x), layer.weight.detach().clone()
    close(
        [before + layer.delta_weight()],
        [formula(layer, torch.eye(K)).t() - layer.bias[:, None]],
        1e-6,
    )
    layer.merge()
    close([layer(x)], [expected], 1e-5)
    state = layer.state_dict()
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    twin = layer_of(method)
    twin.load_state_dict(state)
    close([twin(x)], [expected], 1e-6)
    other = METHODS[method][1](K, N, **{**SETTINGS[method], "alpha": 6.0, "dora": True})
    with pytest.raises(RuntimeError, match=r"nobody can tell W: unmerge\(model\)"):
        other.load_state_dict(state)


@methods
def test_dropouts(method: str) -> None:
    """Of the low-rank path alone; the norm is that of W + ΔW whole."""
    layer, x = layer_of(method, dropout=0.5, rank_dropout=0.5), torch.randn(M, K)
    gain = layer.parts().gain.values
    base = x @ layer.weight.t()
    y = layer(x)
    low = (y - layer.bias) / gain - base
    assert not torch.equal(layer(x), y)
    assert int(torch.linalg.matrix_rank(low.double(), tol=1e-3)) <= len(layer.parts().down)
    layer.eval()
    close([layer(x)], [formula(layer, x)], 1e-5)


def test_explain() -> None:
    """The plans are those of a call with a gain."""
    layer = layer_of("lora")
    said = explain(layer, 4096)
    assert [one.problem.gain for one in said.passes] == [True, False]
