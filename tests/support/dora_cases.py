"""Layers and models with dora=True, and the formula that they compute."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_lowrank import adapt
from fused_lowrank.methods import METHODS, LowRankLinear

K, N, M = 40, 48, 70
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora_fa": {"r": 4},
    "lora_xs": {"r": 4},
    "lora_mini": {"r": 3, "a": 6, "b": 5, "init": "paper"},
    "vera": {"r": 6, "seed": 3},
    "adalora": {"r": 4},
    "tied_lora": {"r": 6},
    "melora": {"r": 2, "n": 4},
    "nola": {"r": 5, "m": 7, "seed": 3},
}
SHARING = [name for name in SETTINGS if METHODS[name][0].row.shared]
methods = pytest.mark.parametrize("method", SETTINGS)
fused = pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])


def layer_of(
    method: str, fused: bool = True, dtype: torch.dtype = torch.float32, **keywords: Any
) -> Any:
    """A layer with dora, all of whose trained values are away from their start."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N).to(dtype)
    keywords = {**SETTINGS[method], "alpha": 6.0, "dora": True, **keywords}
    layer = METHODS[method][fused].from_linear(linear, **keywords)
    shift(layer)
    return layer


@torch.no_grad()
def shift(layer: nn.Module) -> None:
    """Move what is trained."""
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn_like(parameter))


def product(method: str, wide: Any, n: int, k: int) -> Tensor:
    """ΔW / scale of a layer's factors, as the papers write it."""
    if method == "nola":
        down, up = (
            sum(c * base for c, base in zip(wide[name], bases, strict=True))
            for name, bases in (("a", wide["down_bases"]), ("b", wide["up_bases"]))
        )
        return up[:n] @ down[:, :k]
    if method == "melora":
        pairs = zip(wide["up"].chunk(4), wide["down"].chunk(4), strict=True)
        return torch.block_diag(*(up @ down for up, down in pairs))
    up, down = wide["up"][:n], wide["down"][:, :k]
    if method in ("vera", "tied_lora"):
        rows, ranks = ("b", "d") if method == "vera" else ("v", "u")
        return wide[rows].diag() @ up @ wide[ranks].diag() @ down
    if "a_train" in wide:
        return up @ (wide["a_train"] @ wide["b_train"]).t() @ down
    core = wide.get("core")
    if core is None:
        return up @ down
    return up @ (core.diag() if core.dim() == 1 else core.t()) @ down


def formula(layer: LowRankLinear, x: Tensor) -> Tensor:
    """y in float64 as the paper writes it, the norm a constant in the gradient."""
    wide: Any = {name: factor.double() for name, factor in layer.factors_now().items()}
    weight = layer.weight.double()
    whole = weight + layer.scale * product(layer.method, wide, *weight.shape)
    gain = wide["magnitude"] / whole.norm(dim=1).detach()
    y = x.double() @ (gain[:, None] * whole).t()
    return y if layer.bias is None else y + layer.bias.double()


def gradients(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """[y, dx, the gradients of what is trained]."""
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    torch.manual_seed(1)
    dy = torch.randn(y.shape).to(y.dtype)
    leaves = [leaf, *(own for own in layer.parameters() if own.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def close(found: list[Tensor], expected: list[Tensor], eps: float) -> None:
    """Whether tensors agree, by their norms."""
    for ours, truth in zip(found, expected, strict=True):
        ours, truth = ours.detach().double(), truth.detach().double()
        off = float((ours - truth).norm())
        assert off <= eps * float(truth.norm()) + 1e-30, (off, ours.shape)


# --- whatever writes to a factor or the weight, so that it is twice what it was ---


def load(layer: Any, name: str) -> None:
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    state[name] = state[name] * 2
    layer.load_state_dict(state)


def replaced(layer: Any, name: str) -> None:
    own = getattr(layer, name)
    value = nn.Parameter(own.detach() * 2, requires_grad=own.requires_grad)
    setattr(layer, name, value)


def in_place(layer: Any, name: str) -> None:
    with torch.no_grad():
        getattr(layer, name).mul_(2)


def moved(layer: Any, name: str) -> None:
    layer.double()
    in_place(layer, name)
    layer.float()


def swapped(layer: Any, name: str) -> None:
    own = getattr(layer, name)
    own.data = own.data * 2


def swapped_again(layer: Any, name: str) -> None:
    own = getattr(layer, name)
    for factor in (4.0, 0.5):  # the second may be where the first value was
        own.data = own.data * factor


CHANGES = [load, replaced, in_place, moved, swapped, swapped_again]


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(net: nn.Module, method: str, **keywords: Any) -> Any:
    """A copy of a model, with dora, away from its start."""
    keywords = {**SETTINGS[method], "dora": True, **keywords}
    targets = ["first", "second"]
    model = adapt(copy.deepcopy(net), method, target_modules=targets, progress=False, **keywords)
    shift(model)
    return model
