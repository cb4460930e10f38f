"""The term that an adapter adds to each layer, as it is exported: factors, a scale, a magnitude."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..bank.sources import holds
from ..compute.autograd import places
from ..compute.reference import Core
from .adapter import own_copy


@dataclass
class Part:
    """The term that an adapter adds to one layer: alpha / r · up·coreᵀ·down."""

    down: Tensor
    core: Core
    up: Tensor
    alpha: float
    r: int
    dropout: float
    bias: Tensor | None = None  # where it is trained
    magnitude: Tensor | None = None  # (N,) of DoRA


@dataclass
class Adapter:
    """An adapter of any origin."""

    parts: dict[str, Any]  # by layer: a `Part`, or what else was taken of it
    modules: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)  # trained whole: states
    model: nn.Module | None = None
    turned: bool = False  # whether its weights are stored (in, out)


def own_part(part: Part) -> Part:
    """The part with copies of its own, of what is here for now only."""
    maybe = *places(part.core), part.bias, part.magnitude
    a, b, bias, magnitude = (t if t is None else own_copy(t) for t in maybe)
    core, down, up = a if a is None or b is None else (a, b), own_copy(part.down), own_copy(part.up)
    return replace(part, down=down, core=core, up=up, bias=bias, magnitude=magnitude)


def check_dora(adapter: Adapter, asked: bool) -> None:
    """Raise ValueError unless all layers are with DoRA if it is asked for, and none otherwise."""
    having = [name for name, part in adapter.parts.items() if part.magnitude is not None]
    if having and not asked:
        raise ValueError(
            f"{having[0]} is with dora, which plain LoRA cannot hold: merge it into the model, or "
            "write it with dora=True (convert --to peft-dora), for PEFT and who else knows DoRA"
        )
    if asked and len(having) < len(adapter.parts):
        without = next(name for name in adapter.parts if name not in having)
        raise ValueError(f"{without} is without dora: with dora=False it is plain LoRA")


def common_scale(parts: Any) -> Fraction:
    """The scale of the first layer that has one: engines know only one, so B takes the rest."""
    scales = (Fraction(part.alpha) / part.r for part in parts)
    return next((scale for scale in scales if scale), Fraction(0))


@torch.no_grad()
def factored(
    part: Part, scale: Fraction, dtype: torch.dtype | None, name: str
) -> tuple[Tensor, Tensor]:
    """A (r, K) and B (N, r) on the CPU, with scale · B·A = alpha / r · up·coreᵀ·down."""
    core = part.core
    cores = core if isinstance(core, tuple) else () if core is None else (core,)
    if dtype is None:
        kinds = [factor.dtype for factor in (part.down, *cores, part.up)]
        dtype = functools.reduce(torch.promote_types, kinds)
    a, b, *wide = (  # copies, for bits depend on how memory is aligned, which in a file it is not
        factor.detach().cpu().to(torch.float64, copy=True)
        for factor in (part.down, part.up, *cores)
    )
    if len(wide) == 2:
        a, b = wide[0].t() @ a, b @ wide[1].t()
    elif wide and wide[0].dim() == 1:
        b = b * wide[0]
    elif wide and a.shape[0] <= b.shape[1]:
        b = b @ wide[0].t()
    elif wide:
        a = wide[0].t() @ a
    own = Fraction(part.alpha) / part.r
    if own != scale:
        b = b * float(own / scale)
    if not (holds(dtype, a) and holds(dtype, b)):
        raise ValueError(f"the factors of {name} hold NaN, Inf, or more than {dtype} can hold")
    return a.to(dtype), b.to(dtype)


def number(value: Fraction) -> int | float:
    """A whole number as such."""
    return int(value) if value.denominator == 1 else float(value)
