"""The layers: merging, copies, and what is loaded while they are merged."""

import copy
import io
import warnings

import pytest
import torch
from layer_cases import SETTINGS, K, N, classes, delta, delta_abs, error_budget, layer_of, methods
from torch import nn

from fused_lowrank.methods import METHODS, LowRankLinear
from fused_lowrank.methods.computer import Computer

# --- merging ---


@classes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merge(
    method: str, cls: type[LowRankLinear], dtype: torch.dtype, device: torch.device
) -> None:
    """Merged and unmerged forward agree, the loss is the right one, unmerge is bit for bit."""
    layer = layer_of(cls, device, dtype=dtype)
    x = torch.randn(11, K, device=device, dtype=dtype)
    parameter, values, y = layer.weight, layer.weight.detach().clone(), layer(x)
    expected = delta(layer)
    torch.testing.assert_close(
        layer.delta_weight().double().cpu(),
        expected,
        rtol=0,
        atol=float(8 * 2**-23 * delta_abs(layer).max()),
    )
    assert layer.delta_weight().dtype == torch.promote_types(dtype, torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lost = layer.merge()
    assert layer.merged
    assert layer.weight is not parameter
    assert layer.weight.dtype == dtype
    assert torch.equal(parameter, values)
    assert ((layer(x) - y).double().cpu().abs() <= error_budget(layer, x)).all()
    if dtype.itemsize < 4:
        kept = layer.weight.double().cpu() - values.double().cpu()
        assert lost == pytest.approx(float((expected - kept).norm() / expected.norm()), rel=1e-3)
        assert 0 < lost < 1
        assert f"{lost:.2%}" in str(caught[0].message)
    else:
        assert lost == 0
        assert not caught
    assert layer.merge() == 0
    layer.unmerge()
    assert layer.weight is parameter
    assert torch.equal(parameter, values)
    assert torch.equal(layer(x), y)
    layer.unmerge()
    assert not layer.merged


def test_merge_that_loses_everything(device: torch.device) -> None:
    """A ΔW below half a unit in the last place of every weight is lost, and the figure says so."""
    layer = METHODS["lora"][1](K, N, r=1, device=device, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.down, 2**-6)
    nn.init.constant_(layer.up, 2**-6)
    with pytest.warns(UserWarning, match=r"100\.00%"):
        assert layer.merge() == 1.0


def copied(layer: LowRankLinear) -> LowRankLinear:
    """The layer through torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@methods
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, copied])
def test_copies(method: str, merged: bool, copy_of: object, device: torch.device) -> None:
    """A copy computes the same, is as merged as the original and shares nothing with it."""
    layer = layer_of(METHODS[method][1], device)
    x = torch.randn(3, K, device=device)
    y = layer(x)
    if merged:
        layer.merge()
    clone = copy_of(layer)
    assert clone.merged == merged
    assert torch.equal(clone(x), layer(x))
    clone.unmerge()
    assert torch.equal(clone(x), y)
    assert clone.weight.data_ptr() != layer.base_weight.data_ptr()


@methods
def test_loading_its_own_tensors_gives_no_values(method: str) -> None:
    """As torch's checkpoints hand a model what they lack; a layer's factors are pending then."""
    linear, cls = nn.Linear(K, N), METHODS[method][1]
    layer = cls.from_linear(linear, defer_bases=True, **SETTINGS[method])
    layer.load_state_dict(layer.state_dict())
    assert layer.bases_pending
    layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
    assert not layer.bases_pending


class Doubling(Computer):
    """Gives twice what the layer gives, and remembers what it is told."""

    def __init__(self) -> None:
        self.looks, self.values = 0, None

    def __call__(self, layer: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
        return 2 * layer.own(x)

    def look_again(self, moved: bool = False) -> None:
        self.looks += 1

    def refuse_other(self, values: dict) -> None:
        self.values = sorted(values)


class Bank(Doubling):
    """The same, which no copy of a layer is part of."""

    is_bank = True


@methods
@pytest.mark.parametrize("kind", [Doubling, Bank])
@pytest.mark.parametrize("copy_of", [copy.deepcopy, copied])
def test_computed_by_another(method: str, kind: type[Doubling], copy_of: object) -> None:
    """Who has the layer's slot computes it, and is told of what happens to its Parameters."""
    layer, x = layer_of(METHODS[method][1], "cpu"), torch.randn(3, K)
    y = layer(x)
    other = layer.computed_by = kind()
    assert torch.equal(layer(x), 2 * y)
    assert layer.in_bank == other.is_bank
    assert torch.equal(copy_of(layer)(x), y if kind is Bank else 2 * y)
    layer.float()
    last = layer.train_names[-1]
    setattr(layer, last, nn.Parameter(getattr(layer, last).detach()))
    assert other.looks == 2
    layer.load_state_dict(layer.state_dict())
    assert other.values == sorted({*(n for n, f in layer.row.factors.items() if f.saved), "weight"})
    layer.merge()
    assert torch.allclose(layer(x), 2 * y, atol=1e-5)  # who computes it is asked first
    layer.computed_by = None
    assert torch.allclose(layer(x), y, atol=1e-5)


@methods
def test_conversion_while_merged(method: str, device: torch.device) -> None:
    """.to(dtype) and .to(device) of a merged layer convert the kept weight too."""
    layer = layer_of(METHODS[method][1], "cpu")
    x = torch.randn(3, K, device=device, dtype=torch.double)
    layer.merge()
    assert layer.to(device).double()(x).dtype == torch.double
    layer.unmerge()
    assert layer.weight.dtype == torch.double
    assert layer.weight.device.type == device.type
    assert layer(x).dtype == torch.double


@methods
def test_load_state_dict_while_merged(method: str, device: torch.device) -> None:
    """A merged layer refuses a state_dict: it could not say which weight is meant."""
    layer = layer_of(METHODS[method][1], device)
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.load_state_dict(state)
    layer.unmerge()
    layer.load_state_dict(state)
