"""VeRA (Kopiczko et al. 2024, arXiv 2310.11454): two trained vectors around factors that all share.

y = x·Wᵀ + bias + scale · b ⊙ (((x·downᵀ) ⊙ d)·upᵀ)

down and up are random, frozen, and one pair for the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..layer import LowRankLinear
from ..method import Factor, Method, Parts, PeftNames


def vera_parts(factors: Mapping[str, Tensor], weight: Tensor, scale: float) -> Parts:
    """down and up cut to the layer's sides, d as a diagonal core, and b on the rows of up."""
    n, k = weight.shape
    up = factors["b"][:, None] * factors["up"][:n]
    return Parts(factors["down"][:, :k], factors["d"], up)


VERA = Method(
    name="vera",
    title="VeRA",
    ranks={"r": 256},
    limits={},
    factors={
        "down": Factor("rK", "kaiming_relu", shared=True),
        "up": Factor("Nr", "kaiming_relu", shared=True),
        "d": Factor("r", "d_initial", trained=True),
        "b": Factor("N", "b_initial", trained=True),
    },
    learning_rate=4e-3,
    outputs=("b",),
    core=("d",),
    parts=vera_parts,
    options={"d_initial": 0.1, "b_initial": 0.0, "seed": 0},
    slices=False,
    peft=PeftNames(
        "VERA",
        {"d": "vera_lambda_d", "b": "vera_lambda_b"},
        lambda config, r: {
            "alpha": float(r),
            "dropout": float(config.get("vera_dropout") or 0.0),
            "d_initial": float(config.get("d_initial", 0.1)) or 0.1,
            "b_initial": 0.0,
            "seed": int(config.get("projection_prng_key") or 0),
        },
        lambda keywords, r, left, scale: {
            "r": r,
            "d_initial": keywords["d_initial"],
            "projection_prng_key": keywords["seed"],
            "save_projection": True,
        },
        prefix="vera",
        scaled="b",
        scale=1.0,
        shared={"down": "base_model.vera_A", "up": "base_model.vera_B"},
    ),
    dora=False,
)


class VeraLinear(LowRankLinear, row=VERA):
    """VeRA (Kopiczko et al. 2024, arXiv 2310.11454) in plain PyTorch.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,); down (r, K) and
    up (N, r), which all layers of a model have in common, K and N being the largest of their
    sides: a layer uses the first columns of the one, and the first rows of the other; d (r,),
    which starts as `d_initial`, and b (out,), as `b_initial`; one of these must not be 0. In PEFT
    they are vera_A, vera_B, vera_lambda_d and vera_lambda_b. down and up are drawn from `seed`
    as PEFT draws them from its projection_prng_key; a layer made alone has a pair of its own.
    scale = alpha / r; alpha None means r, as published. `dropout` acts on the input of down.
    x (..., in) → y (..., out), as `lowrank_linear` takes them. Other keywords and errors are those
    of `LoraLinear`; r may be more than the layer's sides.

    Adapters in a bank have b in common, and each its d: adapt with train=("d",), d_initial=0,
    b_initial=1.
    """

    d: nn.Parameter
    b: nn.Parameter


class FusedVeraLinear(VeraLinear):
    """`VeraLinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
