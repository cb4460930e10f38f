"""Layers of every class, and what their ΔW and its error may be."""

import copy
import math

import pytest
import torch
from torch import nn

from fused_lowrank.methods import METHODS, LowRankLinear

K, N = 24, 20


SETTINGS = {
    "lora": {"r": 4, "alpha": 6.0},
    "lora_xs": {"r": 4, "alpha": 6.0},
    "lora_mini": {"r": 3, "a": 6, "b": 5, "alpha": 6.0},
    "lora_fa": {"r": 4, "alpha": 6.0},
    "vera": {"r": 4, "alpha": 6.0},
    "tied_lora": {"r": 4, "alpha": 6.0},
    "melora": {"r": 2, "n": 2, "alpha": 6.0},
    "nola": {"r": 4, "m": 5, "alpha": 6.0},
    "adalora": {"r": 4, "alpha": 6.0},
}


CLASSES = [(method, cls) for method, pair in METHODS.items() for cls in pair]


methods = pytest.mark.parametrize("method", METHODS)


classes = pytest.mark.parametrize(("method", "cls"), CLASSES)


def layer_of(cls: type[LowRankLinear], device: torch.device, **keywords: object) -> LowRankLinear:
    """A layer with every factor random, so that ΔW is of the size of W."""
    layer = cls(K, N, device=device, **{**SETTINGS[cls.method], **keywords})
    for name in (name for name, factor in layer.row.factors.items() if factor.saved):
        nn.init.normal_(getattr(layer, name), std=0.5)
    return layer


def delta(layer: LowRankLinear) -> torch.Tensor:
    """ΔW in float64, written out here."""
    wide = {name: factor.double() for name, factor in layer.factors_now().items()}
    down, core, up, _ = layer.row.made(wide, layer.base_weight, layer.scale)
    if isinstance(core, tuple):
        core = core[0].double().cpu() @ core[1].double().cpu()
    core = torch.eye(len(down)) if core is None else core
    core = torch.diag(core) if core.dim() == 1 else core
    up, down = up.double().cpu(), down.double().cpu()
    return (layer.alpha / layer.r * up @ core.double().cpu().T @ down).detach()


def error_budget(layer: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
    """How far apart two ways of summing y may lie: unit roundoff · terms · |formula|."""
    weight = layer.base_weight.detach().double().cpu().abs()
    absolute = x.double().cpu().abs() @ (weight + delta_abs(layer)).T
    return 4 * torch.finfo(x.dtype).eps * math.sqrt(K) * (absolute + 1)


def delta_abs(layer: LowRankLinear) -> torch.Tensor:
    """ΔW of the absolute values."""
    clone = copy.deepcopy(layer)
    for name in layer.factors:
        getattr(clone, name).data.abs_()
    return delta(clone).abs()
