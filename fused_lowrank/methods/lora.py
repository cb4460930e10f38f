"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x·Wᵀ + bias + scale · (x·downᵀ)·upᵀ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .initialisers import kaiming
from .keywords import Shared, check_rank, takes_shared
from .layer import LowRankLinear

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LoraLinear(LowRankLinear):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) in plain PyTorch.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,), down (r, in), which
    is LoRA's A, and up (out, r), its B. down starts Kaiming-uniform (a = √5), up at zero.
    scale = alpha / r; alpha None means r. `dropout` acts on the input of down,
    `rank_dropout` on the columns of u.
    x (..., in) → y (..., out), as `lowrank_linear` takes them. `dtype` is that of a new layer;
    `from_linear` makes trained factors in `dtype`, by default float32 or wider, and frozen ones in
    the weight's.
    `impl` is that of `lowrank_linear`; None is the class's own. Files do not keep it.

    Raises ValueError for r outside 1 … min(in, out), an alpha that is not finite, a dropout or
    rank_dropout outside [0, 1), an unknown impl, and a `train` that could never learn or names what
    is not there.
    """

    method = "lora"
    factors = ("down", "up")
    learning_rate = 5e-4

    @takes_shared
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        train: tuple[str, ...] = ("down", "up"),
        **shared: Unpack[Shared],
    ) -> None:
        r = check_rank("r", r, min(in_features, out_features), "the layer's smaller side")
        self._check_learns(train, "up")
        super().__init__(
            in_features,
            out_features,
            bias,
            {"down": (r, in_features), "up": (out_features, r)},
            r=r,
            train=train,
            **shared,
        )
        if not self.bases_pending:
            self.init_factors()

    def _init_factors(self) -> None:
        kaiming(self.down)
        self.up.zero_()

    @property
    def core_factors(self) -> None:
        """The core is the identity."""
        return None


class FusedLoraLinear(LoraLinear):
    """`LoraLinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
