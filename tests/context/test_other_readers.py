"""Weights that a model takes in other ways than by `layer.weight`: known, or noticed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from called_cases import merged, save
from reader_cases import randomise, ways
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lowrank import adapt
from fused_lowrank.models.adapt import adapted_layers

D = 12
Way = Callable[..., nn.Module]


class Taken(nn.Module):
    """Calls `first`; what it does with `last` is its kinds'."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.first(x))

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ByClass(Taken):
    def product(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self.last, x)


class ByOwnClass(Taken):
    def product(self, x: Tensor) -> Tensor:
        return (
            type(self.last).forward(self.last, x)
            if x.dim() < 1
            else F.linear(x, self.last._parameters["weight"])
        )


class ByDict(Taken):
    def product(self, x: Tensor) -> Tensor:
        return x @ dict(self.last.named_parameters())["weight"].t()


class ByState(Taken):
    def product(self, x: Tensor) -> Tensor:
        return x @ self.last.state_dict()["weight"].t()


class ByNext(Taken):
    def product(self, x: Tensor) -> Tensor:
        weight = next(self.last.parameters())
        return x @ weight.t()


class ByList(Taken):
    def product(self, x: Tensor) -> Tensor:
        return x @ list(self.last.parameters())[0].t()  # noqa: RUF015


class ByGetattr(Taken):
    def product(self, x: Tensor) -> Tensor:
        return x @ getattr(self.last, "weight").t()  # noqa: B009


KNOWN = [ByClass, ByOwnClass, ByDict, ByState, ByNext, ByList, ByGetattr]


@ways
@pytest.mark.parametrize("kind", KNOWN)
def test_known_before_anything_is_changed(kind: type[nn.Module], way: Way) -> None:
    """An error names the layer and its reader; "all-linear" leaves it out."""
    with pytest.raises(ValueError, match=rf"last.*{kind.__name__}.product reads the weight"):
        way(kind(), "lora_xs", ["first", "last"])
    with pytest.warns(UserWarning, match="weights that the model reads"):
        model = adapt(nn.Sequential(kind(), nn.Linear(D, D)), target_modules="all-linear", r=2)
    assert [name for name, _ in adapted_layers(model)] == ["0.first"]


class Harmless(Taken):
    """What asks of a layer's parameters and computes with none."""

    def product(self, x: Tensor) -> Tensor:
        dtype, device = next(self.last.parameters()).dtype, "cpu"
        if "weight" in self.last._parameters:  # in PEFT's it is not
            device = self.last._parameters["weight"].device
            bias = self.last._parameters["bias"]
            assert bias is list(self.last.parameters())[1]
        assert [name for name, _ in self.last.named_parameters()]
        assert getattr(self.last, "weight") is not None  # noqa: B009
        return nn.Module.__call__(self.last, x.to(device, dtype)) + getattr(self.last, "offset", 0)


@ways
def test_what_asks_is_no_reader(way: Way) -> None:
    """It is adapted, and merges as it is."""
    model = randomise(way(Harmless(), "lora_xs", ["first", "last"]).eval())
    x = torch.randn(3, D)
    with torch.no_grad():
        y = model(x)
        merged(model)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


class Hidden(Taken):
    """Under another name, which its code does not show."""

    def product(self, x: Tensor) -> Tensor:
        own = self.last
        return nn.Linear.forward(own, x)


@ways
def test_noticed_where_it_is_not_known(way: Way, tmp_path: Path) -> None:
    """By its class's forward: one warning when it is saved, an error when it is merged."""
    model = randomise(way(Hidden(), "lora_xs", ["first", "last"]))
    model(torch.randn(3, D)).sum().backward()
    with pytest.warns(UserWarning, match=r"last by product .*no effect"):
        save(model, tmp_path / "file")
    with pytest.raises(ValueError, match=r"last by product .*merging would change"):
        merged(model)
