"""Tied-LoRA (Renduchintala et al. 2023, arXiv 2311.09578): all layers train one pair of factors.

y = x·Wᵀ + bias + scale · v ⊙ (((x·downᵀ) ⊙ u)·upᵀ)

u and v are each layer's own.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..layer import LowRankLinear
from ..method import Factor, Method, Parts


def tied_parts(factors: Mapping[str, Tensor], weight: Tensor, scale: float) -> Parts:
    """down and up cut to the layer's sides, u as a diagonal core, and v on the rows of up."""
    n, k = weight.shape
    up = factors["v"][:, None] * factors["up"][:n]
    return Parts(factors["down"][:, :k], factors["u"], up)


TIED_LORA = Method(
    name="tied_lora",
    title="Tied-LoRA",
    ranks={"r": 16},
    limits={},
    factors={
        "down": Factor("rK", "kaiming", trained=True, shared=True),
        "up": Factor("Nr", "zeros", trained=True, shared=True),
        "u": Factor("r", "ones", trained=True),
        "v": Factor("N", "ones", trained=True),
    },
    learning_rate=5e-4,
    outputs=("up", "v"),
    parts=tied_parts,
    slices=False,
    dora=False,
)


class TiedLoraLinear(LowRankLinear, row=TIED_LORA):
    """Tied-LoRA (Renduchintala et al. 2023, arXiv 2311.09578) in plain PyTorch.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,); down (r, K) and
    up (N, r), which all layers of a model have in common, K and N being the largest of their
    sides: a layer uses the first columns of the one, and the first rows of the other; u (r,) and
    v (out,), which start at one. down starts Kaiming-uniform (a = √5), up at zero. A layer made
    alone has a pair of its own. scale = alpha / r; alpha None means r.
    Shapes, dtypes, other keywords and errors are those of `LoraLinear`; r may be more than the
    layer's sides.
    """

    u: nn.Parameter
    v: nn.Parameter


class FusedTiedLoraLinear(TiedLoraLinear):
    """`TiedLoraLinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
