"""Factors that a seed determines: which seeds there are, and state_dicts, which have no such."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_lowrank import adapt, init_bases
from fused_lowrank.methods import METHODS

K, N = 8, 6


def net() -> nn.Module:
    """The same two layers at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, K))


def nola(seed: int) -> Any:
    """Adapted by NOLA, the trained factors away from their start."""
    model = adapt(net(), "nola", target_modules=["0", "2"], r=2, m=5, seed=seed, progress=False)
    for own in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(own)
    return model


def x() -> Tensor:
    return torch.randn(4, K, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["nola", "vera"])
@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**40])
def test_seeds_that_torch_does_not_take(method: str, seed: int) -> None:
    """Refused where a layer or a model is made, which is as it was."""
    said = f"seed is {seed}: it must be at least -2\\*\\*63 and below 2\\*\\*64"
    with pytest.raises(ValueError, match=f"^{said}"):
        METHODS[method][1](K, N, r=2, seed=seed)
    model = net()
    with pytest.raises(ValueError, match=f"^0: {said}"):
        adapt(model, method, target_modules=["0"], r=2, seed=seed, progress=False)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63), -1])
def test_the_last_seeds_that_it_takes(seed: int) -> None:
    """They are as good as others, in a state_dict, too."""
    model, other = nola(seed), nola(seed)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x()), model(x()))


@pytest.mark.parametrize("strict", [True, False])
def test_state_dicts_of_another_seed(strict: bool) -> None:
    """Refused before anything is loaded, by a whole model, a part of one and a layer."""
    model, other = nola(3), nola(4)
    before, y = {k: v.clone() for k, v in other.state_dict().items()}, other(x())
    state = model.state_dict()
    said = r"has seed=4, and the state_dict is of seed=3: .* Adapt with seed=3"
    with pytest.raises(RuntimeError, match=f"^0 {said}"):
        other.load_state_dict(state, strict=strict)
    with pytest.raises(RuntimeError, match=f"^nola {said}"):
        other[2].load_state_dict(model[2].state_dict(), strict=strict)
    holder = nn.Sequential(other)  # which has no hook of ours
    with pytest.raises(RuntimeError, match=said):
        holder.load_state_dict({f"0.{key}": v for key, v in state.items()}, strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    assert torch.equal(other(x()), y)


def test_state_dicts_without_a_seed() -> None:
    """As they were before, or of the factors as well: taken, and nothing is missing."""
    model, other = nola(3), nola(3)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("_extra_state")}
    assert len(state) == len(model.state_dict()) - 2
    found = other.load_state_dict(state)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert torch.equal(other(x()), model(x()))
    whole = dict(model.state_dict())
    for place in (0, 2):
        whole |= {f"{place}.{n}": getattr(model[place], n) for n in ("down_bases", "up_bases")}
    other = nola(4)
    other.load_state_dict(whole)
    assert torch.equal(other(x()), model(x()))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "nola"])
def test_other_methods_have_no_seed_in_theirs(method: str) -> None:
    """Their state_dicts have what they had."""
    layer: Any = METHODS[method][1](K, N, **dict.fromkeys(METHODS[method][0].row.ranks, 2))
    assert list(layer.state_dict()) == ["weight", "bias", *layer.factors]


def test_loaded_onto_the_meta_device() -> None:
    """What no state_dict has is drawn when the rest is there, and is one for all layers."""
    model = nola(3)
    with torch.device("meta"):
        empty = net()
    targets = {"target_modules": ["0", "2"], "r": 2, "m": 5, "seed": 3}
    other = adapt(empty, "nola", **targets, defer_bases=True, progress=False)
    other.to_empty(device="cpu")
    for own in other.parameters():
        own.data.fill_(float("nan"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x()), model(x()))
    assert other[0].down_bases is other[2].down_bases
    init_bases(other, progress=False)  # nothing is left to do
    assert torch.equal(other(x()), model(x()))


def test_ranks_above_the_sides() -> None:
    """NOLA's rank is one for all layers, whatever their sides."""
    model = adapt(net(), "nola", r=30, m=3, target_modules=["0", "2"], progress=False)
    assert [layer.r for layer in (model[0], model[2])] == [30, 30]
    assert model[0].down_bases.shape == (3, 30, K)
    assert model(x()).shape == (4, K)
