"""LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): a trained r × r core between frozen bases.

y = x·Wᵀ + bias + scale · ((x·downᵀ)·core)·upᵀ,    W = S·Σ·Dᵀ,   down = Σᵣ·Dᵣᵀ,   up = Sᵣ
"""

from __future__ import annotations

from torch import nn

from ..initial.bases import SVD
from ..layer import LowRankLinear
from ..method import Factor, Method

LORA_XS = Method(
    name="lora_xs",
    title="LoRA-XS",
    ranks={"r": 16},
    factors={
        "down": Factor("rK", "lora_xs"),
        "core": Factor("rr", "noise", trained=True),
        "up": Factor("Nr", "lora_xs"),
    },
    learning_rate=4e-3,
    core=("core",),
    options={"svd": ("krylov", "exact", "randomized"), "init": ("svd", "minor", "random", "eva")},
    starts={"identity": {"core": "silence"}, "far": {"core": "normal"}},
    bases=SVD,
    dora=False,
)


class LoraXSLinear(LowRankLinear, row=LORA_XS):
    """LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604) in plain PyTorch.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,), down (r, in) and
    up (out, r), the leading singular vectors of the weight with Σ wholly in down, and core (r, r),
    which starts as N(0, 1e-5²). In terms of the authors' code, down is lora_A, up is lora_B and
    core is the transpose of their latent mapping's weight. scale = alpha / r; alpha None means r.
    `svd` is how these are found: "krylov", "exact", or "randomized" as LoRA-XS's authors do; `init`
    "minor", "random" and "eva" have other bases (`methods.initial.values`).
    `dropout` acts on the input of down, `rank_dropout` on the columns of u.
    x (..., in) → y (..., out), as `lowrank_linear` takes them. `dtype` is that of a new layer;
    `from_linear` makes trained factors in `dtype`, by default float32 or wider, and frozen ones in
    the weight's.
    `impl` is that of `lowrank_linear`; None is the class's own. Files do not keep it.

    Raises ValueError for r outside 1 … min(in, out), an unknown svd, init or impl, an alpha that is
    not finite, a dropout or rank_dropout outside [0, 1), a `train` of other names, and a weight
    with NaN or Inf.
    """

    core: nn.Parameter


class FusedLoraXSLinear(LoraXSLinear):
    """`LoraXSLinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
