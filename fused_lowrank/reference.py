"""The equation in plain torch, on any device and in any float dtype: the truth that the rest is
measured against.

    y = x·Wᵀ + bias + scale · ((x·downᵀ) · core) · upᵀ
"""

import torch
from torch.nn.functional import linear

Core = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


def like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in this dtype. `.to` costs the host, also where there is nothing to convert."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def product(core: Core) -> torch.Tensor | None:
    """The core as one matrix: itself, or a·b in the wider of their dtypes."""
    if not isinstance(core, tuple):
        return core
    a, b = core
    if a.dtype == b.dtype:
        return a @ b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype) @ b.to(dtype)


def through_core(t: torch.Tensor, core: Core, scale: float) -> torch.Tensor:
    """u = scale · t · core, computed in core's dtype and returned in t's."""
    matrix = product(core)
    if matrix is None:
        return t * scale
    return like(like(t, matrix.dtype) @ matrix * scale, t.dtype)


def lowrank_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    up: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    low: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x·Wᵀ + bias + scale · ((low·downᵀ) · core) · upᵀ, where low is x, or x after dropout.

    x (..., K), weight (N, K), down (P, K), core (P, Q) or the pair (P, r), (r, Q) or None, up
    (N, Q), bias (N,) → (..., N). down and up are used in x's dtype; the product with core is taken
    in core's. Differentiable any number of times.
    """
    t = linear(x if low is None else low, like(down, x.dtype))
    u = through_core(t, core, scale)
    return linear(x, weight, bias) + linear(u, like(up, x.dtype))
