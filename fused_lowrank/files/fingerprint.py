"""A fingerprint of a layer's weight and frozen factors, for a file to know its base model by."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..compute.base.protocol import Base
from ..context.elsewhere import here
from ..methods import LowRankLinear
from ..methods.tensors import whole

FINGERPRINT = "fingerprint"  # the name of it in a file
WEIGHT_PROBES = 3
ROWS = 1024  # of a quantised W that are dequantised at a time
BASES_TOLERANCE = 1e-2  # relative to the fingerprint: float16 and bfloat16 rounding stay below
NEAR = 0.4  # relative to ‖W‖; four bits are off by about 0.1, three by 0.2
WEIGHT_TOLERANCE = 2e-2  # relative to ‖W‖; another weight of the same size differs by about 1


@torch.no_grad()
def fingerprint(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """down·z, zᵀ·up, ‖W‖ and three zᵀ·W·z, with standard normal z of fixed seed: (P + Q + 4,).

    Computed in float32 or wider, in float64 for the factors; in float64 on the CPU.
    """
    weight, down, up = map(whole, (weight, down, up))
    wide = torch.promote_types(weight.dtype, torch.float32)
    down, up = down.double(), up.double()
    stream = np.random.RandomState(0)  # this stream is the same in every version of numpy

    def probe(size: int, like: Tensor) -> Tensor:
        return torch.from_numpy(stream.standard_normal(size)).to(like)

    n, k = weight.shape
    values = [down @ probe(k, down), probe(n, up) @ up]
    wide_one = torch.empty(0, dtype=wide, device=weight.device)
    probes = [(probe(n, wide_one), probe(k, wide_one)) for _ in range(WEIGHT_PROBES)]
    if isinstance(weight, Base):
        values += of_blocks(weight, probes, wide)
    else:
        weight = weight.to(wide)
        values += [weight.norm()[None], *((left @ weight @ right)[None] for left, right in probes)]
    return torch.cat([value.double().cpu() for value in values])


def of_blocks(
    weight: Base, probes: list[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> list[Tensor]:
    """‖W‖ and the zᵀ·W·z of a W that is dequantised some rows at a time."""
    square, sums, first = 0.0, [0.0] * len(probes), 0
    for rows in weight.split(ROWS):
        rows, last = rows.to(dtype), first + len(rows)
        square += float(rows.norm()) ** 2
        for i, (left, right) in enumerate(probes):
            sums[i] += float(left[first:last] @ rows @ right)
        first = last
    return [torch.tensor([value], dtype=torch.float64) for value in (square**0.5, *sums)]


def fingerprint_of(layer: LowRankLinear, originals: Mapping[Tensor, Tensor] = {}) -> Tensor:
    """The fingerprint of an adapted layer, with the weight it had before, where that is trained."""
    with here(layer):
        weight = originals.get(layer.base_weight, layer.base_weight)
        return fingerprint(weight, *layer.bases)


def alike(ours: Tensor, theirs: Tensor, tolerance: float = BASES_TOLERANCE) -> bool:
    """Whether two tensors are of one shape and differ by no more than rounding."""
    if ours.shape != theirs.shape:
        return False
    a, b = ours.detach().double(), theirs.detach().to(ours.device).double()
    return bool((a - b).norm() <= tolerance * b.norm())


def is_near(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two fingerprints are of weights as near as the quantised forms of one are."""
    ours, theirs = ours[-1 - WEIGHT_PROBES :], theirs[-1 - WEIGHT_PROBES :]
    return bool((ours - theirs).abs().max() <= NEAR * theirs[0])


def differing(ours: Tensor, theirs: Tensor, p: int, q: int) -> list[str]:
    """The ones of "weight", "down", "up" in which two fingerprints of the same P and Q differ."""
    (down, up, weight), (their_down, their_up, their_weight) = (
        one.split([p, q, 1 + WEIGHT_PROBES]) for one in (ours, theirs)
    )
    other = not (weight - their_weight).abs().max() <= WEIGHT_TOLERANCE * their_weight[0]
    found = {"weight": other, "down": not alike(down, their_down), "up": not alike(up, their_up)}
    return [name for name, differs in found.items() if differs]
