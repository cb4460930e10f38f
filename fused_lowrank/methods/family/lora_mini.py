"""LoRA-Mini (Singh et al. 2024, arXiv 2411.15804): two small trained factors between frozen ones.

y = x·Wᵀ + bias + scale · x·Aaux·Atrain·Btrain·Baux

down = Aauxᵀ (a, in)    core = a_train (a, r) · b_train (r, b)    up = Bauxᵀ (out, b)
"""

from __future__ import annotations

from torch import nn

from ..initial.bases import SEEDED
from ..layer import LowRankLinear
from ..method import Factor, Method

OF_WEIGHT = {"down": "lora_mini", "b_train": "drawn_zeros", "up": "lora_mini"}

LORA_MINI = Method(
    name="lora_mini",
    title="LoRA-Mini",
    ranks={"r": 8, "a": 64, "b": 64},
    limits={"a": "K", "b": "N", "r": "ab"},
    factors={
        "down": Factor("aK", "kaiming"),
        "a_train": Factor("ar", "kaiming_in", trained=True),
        "b_train": Factor("rb", "kaiming_in", trained=True),
        "up": Factor("Nb", "kaiming"),
    },
    learning_rate=1e-2,
    outputs=("b_train", "up"),
    core=("a_train", "b_train"),
    options={"init": ("identity", "paper", "qr", "svd", "eva")},
    hints={
        "init": " (with both trained factors zero, both gradients would be zero and nothing would "
        "ever be learned)"
    },
    starts={
        "identity": {"b_train": "drawn_zeros"},
        **dict.fromkeys(("qr", "svd", "eva"), OF_WEIGHT),
    },
    bases=SEEDED,
    dora=False,
)


class LoraMiniLinear(LowRankLinear, row=LORA_MINI):
    """LoRA-Mini (Singh et al. 2024, arXiv 2411.15804) in plain PyTorch.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,), down (a, in), which
    is Aauxᵀ, a_train (a, r), b_train (r, b) and up (out, b), which is Bauxᵀ. All four start
    Kaiming-uniform (a = √5, fan-in of the map x·F) with init="paper", so that ΔW ≠ 0 at the start;
    init="identity" sets b_train to zero, so that training starts from the base model, and so do
    "qr", "svd" and "eva", whose down and up are of the weight and the inputs.
    scale = alpha / r; alpha None means r. `dropout` acts on the input of down,
    `rank_dropout` on the columns of u.
    x (..., in) → y (..., out), as `lowrank_linear` takes them. `dtype` is that of a new layer;
    `from_linear` makes trained factors in `dtype`, by default float32 or wider, and frozen ones in
    the weight's.
    `impl` is that of `lowrank_linear`; None is the class's own. Files do not keep it.

    Raises ValueError for a outside 1 … in, b outside 1 … out, r outside 1 … min(a, b), an unknown
    init or impl, an alpha that is not finite, a dropout or rank_dropout outside [0, 1), and a
    `train` that could never learn or names what is not there.
    """

    a_train: nn.Parameter
    b_train: nn.Parameter


class FusedLoraMiniLinear(LoraMiniLinear):
    """`LoraMiniLinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
