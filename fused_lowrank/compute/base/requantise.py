"""W + ΔW stored as W is, by the library of the base, and what is lost by that."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .protocol import Base, shell

ROWS = 1024  # of a quantised W that are compared at a time


class Requantised(NamedTuple):
    """A module like the base's that stores W + ΔW, and how far it is off that.

    `lost` is ‖difference‖/‖ΔW‖, `off` is ‖difference‖/‖W + ΔW‖.
    """

    module: nn.Module
    lost: float
    off: float


@torch.no_grad()
def requantised(base: Base, wanted: Tensor, delta: Tensor) -> Requantised:
    """W + ΔW (N, K), in float32 or wider, stored as W is.

    Where ΔW is zero what is stored stays as it is, for nothing is added. Raises ValueError where
    ΔW, or what would be stored, is not finite.
    """
    if not delta.any():
        return Requantised(shell(base.module), 0.0, 0.0)
    if not is_finite(delta):
        raise ValueError("cannot merge: the adapter holds NaN or Inf")
    module = base.requantised(wanted)
    square = 0.0
    for first, rows in enumerate(type(base)(module).split(ROWS)):
        part = wanted[first * ROWS :][: len(rows)]
        square += float((rows.to(part.dtype) - part).norm()) ** 2
    if not math.isfinite(square) and is_finite(wanted):
        kind = type(base.module).__name__
        raise ValueError(f"cannot merge: W + ΔW is more than a {kind} can hold")
    difference = math.sqrt(square)
    return Requantised(
        module, difference / float(delta.norm()), difference / (float(wanted.norm()) or math.inf)
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf."""
    return math.isfinite(float((tensor * 0).sum()))


def exchange(base: Base, one: Any, other: Any) -> None:
    """Have two modules of the base's kind store what the other one does."""
    for name in base.holders:
        first, second = getattr(one, name), getattr(other, name)
        setattr(one, name, second)
        setattr(other, name, first)


def said_off(off: float) -> str:
    """How far a weight is off by merging, and where it would not be."""
    return (
        f"the weight, quantised anew, is {off:.2%} off W + ΔW; merged into a dequantised model it "
        "would be kept"
    )
