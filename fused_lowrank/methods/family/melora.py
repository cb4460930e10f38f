"""MELoRA (Ren et al. 2024, arXiv 2402.17263): n small LoRAs side by side, each on its own features.

y = x·Wᵀ + bias + scale · (x·downᵀ)·upᵀ, where down and up are block-diagonal: a rank of n · r for
the parameters of r.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..layer import LowRankLinear
from ..method import Factor, Method, Parts


def melora_parts(factors: Mapping[str, Tensor], weight: Tensor, scale: float) -> Parts:
    """The blocks on the diagonals of down (n·r, K) and up (N, n·r)."""
    down, up = factors["down"], factors["up"]
    count = weight.shape[1] // down.shape[1]
    downs = down.view(count, -1, down.shape[1])
    ups = up.view(count, -1, up.shape[1])
    return Parts(torch.block_diag(*downs), None, torch.block_diag(*ups))


def melora_sizes(own: dict[str, int]) -> dict[str, int]:
    """The sizes by letter, with R, the ranks of all blocks, and k, the features of one."""
    return {**own, "R": own["n"] * own["r"], "k": own["K"] // own["n"]}


MELORA = Method(
    name="melora",
    title="MELoRA",
    ranks={"r": 4, "n": 4},
    limits={"n": "KN", "r": "KN"},
    factors={"down": Factor("Rk", "kaiming", trained=True), "up": Factor("Nr", "zeros", True)},
    learning_rate=5e-4,
    parts=melora_parts,
    divides="n",
    sizes=melora_sizes,
    slices=False,
    dora=False,
)


class MeloraLinear(LowRankLinear, row=MELORA):
    """MELoRA (Ren et al. 2024, arXiv 2402.17263) in plain PyTorch.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,), down (n · r, in / n)
    and up (out, r). The n-th part of down's rows takes the n-th part of the input's features, and
    gives the n-th part of the output's by that of up's rows. down starts Kaiming-uniform (a = √5),
    up at zero. scale = alpha / r; alpha None means r.
    Shapes, dtypes, other keywords and errors are those of `LoraLinear`. Raises ValueError where n
    does not divide both of the layer's sides.
    """


class FusedMeloraLinear(MeloraLinear):
    """`MeloraLinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
