"""Rows that settings add factors to: DoRA's magnitude, and what residual inits started as.

PiSSA and its kin start up·down as some of the triples of W, and train beside W - scale·up·down.
Here W itself stays the layer's weight, bit for bit and one with whatever it is tied to, and what
the factors started as is kept beside them, frozen, up's negated. The layer computes

    x·Wᵀ + scale · (x·[down; start_down]ᵀ)·[up, start_up]ᵀ

That keeps r·(K + N) numbers, where W beside a residual would be K·N; W is given back without a
rounding, and in 16 bits none of it is lost to that of a residual. Dropout acts on what was learned
alone, for it acts on both products alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .method import MAGNITUDE, Factor, Method, Parts, numbered

START = "down", "start_down"  # what the down of a residual init is made of


def variant(row: Method, settings: Mapping[str, Any]) -> Method:
    """The row of layers with these settings: the row itself, or one of more factors.

    dora=True adds magnitude (N,). An init that starts as a part of W adds start_down (r, K) and
    start_up (N, r): the first down, and the first -up.
    """
    init = settings.get("init")
    if numbered(init) in row.residual:
        first = {
            f"start_{name}": Factor(factor.sides, "lora", like=name)
            for name, factor in row.factors.items()
        }
        row = replace(row, factors={**row.factors, **first}, parts=less_start, down_of=START)
    if settings.get("dora") and row.dora is False:
        magnitude = {MAGNITUDE: Factor("N", "norms", trained=True)}
        row = replace(row, factors={**row.factors, **magnitude}, dora=True, peft=None)
    return row


def less_start(factors: Mapping[str, Tensor], weight: Tensor, scale: float) -> Parts:
    """The equation's parts, of twice the rank, with what the factors started as taken away."""
    down = torch.cat([factors["down"], factors["start_down"]])
    return Parts(down, None, torch.cat([factors["up"], factors["start_up"]], 1))
