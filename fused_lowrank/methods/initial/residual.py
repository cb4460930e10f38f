"""Layers whose factors start as a part of W: what they started as is kept, and taken from W.

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

from ..method import Factor, Method, Parts


def under(row: Method, init: Any) -> Method:
    """The row of layers that start so: the row itself or, with a residual, one of more factors.

    These are start_down (r, K) and start_up (N, r): the first down, and the first -up.
    """
    if not (isinstance(init, str) and init.startswith(row.residual)):
        return row
    first = {
        f"start_{name}": Factor(factor.sides, "lora", like=name)
        for name, factor in row.factors.items()
    }
    return replace(row, factors={**row.factors, **first}, parts=less_start)


def less_start(factors: Mapping[str, Tensor], weight: Tensor, scale: float) -> Parts:
    """The equation's parts, of twice the rank, with what the factors started as taken away."""
    down = torch.cat([factors["down"], factors["start_down"]])
    return Parts(down, None, torch.cat([factors["up"], factors["start_up"]], 1))
