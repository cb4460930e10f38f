"""Linear layers with a forward of their own: adapted if it is nn.Linear's in other words."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import CONFIGS, peft
from torch import Tensor, nn
from torch.nn import functional

from fused_lowrank import adapt, load_adapter, merge, save_adapter, unload
from fused_lowrank.methods.accept import has_product
from fused_lowrank.models.adapt import adapted_layers

D = 8


class Product(nn.Linear):
    """As Falcon's is."""

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Called(nn.Linear):
    """A function does it; its sizes are asked for."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError("it does not fit")
        return functional.linear(x, self.weight, self.bias)


class Passing(nn.Linear):
    """Its parent's forward does it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Heir(Product):
    """Its parent has the forward, and it has something to itself."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.label = "of no matter"


class Scaled(nn.Linear):
    """Something else, by its values."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * functional.linear(x, self.weight, self.bias)


class Detached(nn.Linear):
    """Something else, by its gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.detach(), self.weight, self.bias)


class Rounding(nn.Linear):
    """Something else in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.float(), self.weight.float(), self.bias).to(x)


class Switched(nn.Linear):
    """Something else in training."""

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        return y + 1 if not self.training else y


class Adding(nn.Linear):
    """Something else where a layer has an adapter of another library's."""

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        more = getattr(self, "more", None)
        return y if more is None else y + more


class Asked(nn.Linear):
    """Something else where it is asked for."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * functional.linear(x, self.weight, self.bias)


class Heavier(Adding):
    """Its parent's forward does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


SAME: list[type[Any]] = [Product, Called, Passing, Heir]
OTHER: list[type[Any]] = [Scaled, Detached, Rounding, Switched, Adding, Asked, Heavier]


class Model(nn.Module):
    """One such layer between plain ones."""

    def __init__(self, kind: type[Any]) -> None:
        super().__init__()
        self.first, self.own, self.last = nn.Linear(D, D), kind(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.own(self.first(x)).tanh())


def native(model: nn.Module, targets: Any) -> nn.Module:
    """By `adapt`."""
    return adapt(model, "lora_xs", r=4, target_modules=targets, progress=False)


def in_peft(model: nn.Module, targets: Any) -> nn.Module:
    """By PEFT."""
    config = CONFIGS["lora_xs"](r=4, target_modules=targets)
    return peft.get_peft_model(model, config).base_model.model


WAYS = pytest.mark.parametrize("way", [native, in_peft])


def randomised(model: nn.Module) -> nn.Module:
    """The model, all that is trained random."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


@WAYS
@pytest.mark.parametrize("kind", SAME)
def test_the_same_forward_is_adapted(way: Callable[..., nn.Module], kind: type[Any]) -> None:
    """Such a layer is taken by "all-linear" without a word, as PEFT's LoRA takes it."""
    model = Model(kind).double()
    x = torch.linspace(-1, 1, 5 * D, dtype=torch.float64).view(5, D)
    before = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = way(model, "all-linear")
    assert "own" in str([name for name, p in model.named_parameters() if p.requires_grad])
    randomised(model)
    y = model(x)
    assert not torch.allclose(y, before)
    if way is native:
        merge(model)
        torch.testing.assert_close(model(x), y)
        plain = unload(model)
        assert type(plain.own) is kind
        torch.testing.assert_close(plain(x), before)
        assert [name for name, _ in adapted_layers(native(plain, ["own"]))] == ["own"]
    else:
        model.own.merge()
        torch.testing.assert_close(model(x), y)
        assert type(model.own.get_base_layer()) is kind


@WAYS
@pytest.mark.parametrize("kind", OTHER)
def test_another_forward_is_left_alone(way: Callable[..., nn.Module], kind: type[Any]) -> None:
    """And by name it is called as it is, by `adapt` and by PEFT, if that can be trained over."""
    with pytest.warns(UserWarning, match=r"own \(layers with a forward of their own\)"):
        model = way(Model(kind), "all-linear")
    assert type(model.own) is kind
    if way is native:
        if kind is Detached:
            with pytest.raises(TypeError, match=r"own is a Detached, which makes no .*differ"):
                native(Model(kind), ["own"])
            return
        plain = Model(kind)
        x, own = torch.randn(5, D), plain.own
        y0, model = own(x), randomised(native(plain, ["own"]))
        layer: Any = model.own
        tail = layer.scale * x @ layer.down.t() @ layer.core @ layer.up.t()
        torch.testing.assert_close(layer(x), y0 + tail)
        assert unload(model).own is own


def test_a_forward_without_source_is_left_alone() -> None:
    """Nothing is known of what it reads: it is called as it is."""
    space: dict[str, Any] = {"nn": nn}
    exec(
        "class Unknown(nn.Linear):\n    def forward(self, x):\n        return x @ self.weight.T\n",
        space,
    )
    with pytest.warns(UserWarning, match=r"own \(layers with a forward of their own\)"):
        assert type(native(Model(space["Unknown"]), "all-linear").own) is space["Unknown"]
    model = native(Model(space["Unknown"]), ["own"])
    assert type(model.own.base_layer) is space["Unknown"]


def test_nothing_is_drawn() -> None:
    """Trying a forward leaves the generators as they were, in inference mode as well."""
    kind = type("Another", (Product,), {})
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert has_product(kind(D, D, device="meta"))
    assert torch.equal(torch.get_rng_state(), state)


def test_falcon(tmp_path: Path) -> None:
    """The model of transformers, all of whose layers are of such a class; its files come back."""
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.FalconForCausalLM(config).eval()
    base = copy.deepcopy(model)
    own = [name for name, m in model.named_modules() if type(m).__name__ == "FalconLinear"]
    assert own
    adapted = native(model, "all-linear")
    assert [name for name, _ in adapted_layers(adapted)] == own
    ids = torch.arange(6).view(1, 6)
    y = randomised(adapted)(ids).logits
    save_adapter(adapted, tmp_path / "one")
    loaded = load_adapter(base, tmp_path / "one", progress=False)
    torch.testing.assert_close(loaded(ids).logits, y)
    merge(adapted)
    torch.testing.assert_close(adapted(ids).logits, y, atol=1e-4, rtol=1e-4)
