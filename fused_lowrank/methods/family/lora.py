"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x·Wᵀ + bias + scale · (x·downᵀ)·upᵀ."""

from __future__ import annotations

from ..layer import LowRankLinear
from ..method import Factor, Method

RESIDUAL = ("pissa", "pissa_niter_N", "milora", "olora", "corda", "corda_kpm")
NUMBER = "; N is a number, as in 'pissa_niter_16'"

LORA = Method(
    name="lora",
    title="LoRA",
    ranks={"r": 16},
    factors={"down": Factor("rK", "kaiming", trained=True), "up": Factor("Nr", "zeros", True)},
    learning_rate=5e-4,
    options={"init": ("kaiming", "gaussian", "orthogonal", "eva", *RESIDUAL, "loftq")},
    hints={"init": NUMBER},
    residual=RESIDUAL,
    starts={
        "gaussian": {"down": "gaussian"},
        "eva": {"down": "lora"},
        **{init: {"down": "lora", "up": "lora"} for init in ("orthogonal", *RESIDUAL, "loftq")},
    },
    dora=False,
)


class LoraLinear(LowRankLinear, row=LORA):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) in plain PyTorch.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,), down (r, in), which
    is LoRA's A, and up (out, r), its B. `init` says how these start: down Kaiming-uniform (a = √5)
    and up zero with "kaiming"; others are in `methods.initial.values`. Where they start as a part
    of W, start_down (r, in) and start_up (out, r) keep what they started as, up's negated, which is
    taken from W: see `methods.variants`.
    scale = alpha / r; alpha None means r. `dropout` acts on the input of down,
    `rank_dropout` on the columns of u.
    `dora`: DoRA (Liu et al. 2024, arXiv 2402.09353), with a trained factor magnitude (out,) that
    starts as the norms of the rows of W + ΔW, all of which must be above 0: y is multiplied by
    magnitude over these norms before the bias, and the norms are constants in the gradient.
    x (..., in) → y (..., out), as `lowrank_linear` takes them. `dtype` is that of a new layer;
    `from_linear` makes trained factors in `dtype`, by default float32 or wider, and frozen ones in
    the weight's.
    `impl` is that of `lowrank_linear`; None is the class's own. Files do not keep it.

    Raises ValueError for r outside 1 … min(in, out), an alpha that is not finite, a dropout or
    rank_dropout outside [0, 1), an unknown impl or init, and a `train` that could never learn or
    names what is not there.
    """


class FusedLoraLinear(LoraLinear):
    """`LoraLinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
