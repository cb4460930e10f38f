"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): LoRA whose down is frozen as it starts.

y = x·Wᵀ + bias + scale · (x·downᵀ)·upᵀ. Its backward needs x·downᵀ of r columns, and not x.
"""

from __future__ import annotations

from dataclasses import replace

from ..layer import LowRankLinear
from ..method import Factor
from .lora import LORA

LORA_FA = replace(
    LORA,
    name="lora_fa",
    title="LoRA-FA",
    factors={"down": Factor("rK", "kaiming"), "up": Factor("Nr", "zeros", trained=True)},
)


class LoraFALinear(LowRankLinear, row=LORA_FA):
    """LoRA-FA (Zhang et al. 2023, arXiv 2308.03303) in plain PyTorch: LoRA with down frozen.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,), down (r, in), random
    (Kaiming-uniform, a = √5), and up (out, r), which starts at zero and is trained.
    scale = alpha / r; alpha None means r. Shapes, dtypes, other keywords and errors are those of
    `LoraLinear`.
    """


class FusedLoraFALinear(LoraFALinear):
    """`LoraFALinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
