"""LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): a trained r × r core between frozen bases.

y = x·Wᵀ + bias + scale · ((x·downᵀ)·core)·upᵀ,    W = S·Σ·Dᵀ,   down = Σᵣ·Dᵣᵀ,   up = Sᵣ
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .initialisers import svd_bases
from .keywords import Shared, check_rank, takes_shared
from .layer import LowRankLinear

CORE_STD = 1e-5

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LoraXSLinear(LowRankLinear):
    """LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604) in plain PyTorch.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,), down (r, in) and
    up (out, r), the leading singular vectors of the weight with Σ wholly in down, and core (r, r),
    which starts as N(0, 1e-5²). In terms of the authors' code, down is lora_A, up is lora_B and
    core is the transpose of their latent mapping's weight. scale = alpha / r; alpha None means r.
    `svd`: "randomized" (fixed seed) or "exact". `dropout` acts on the input of down,
    `rank_dropout` on the columns of u.
    x (..., in) → y (..., out), as `lowrank_linear` takes them. `dtype` is that of a new layer;
    `from_linear` makes trained factors in `dtype`, by default float32 or wider, and frozen ones in
    the weight's.
    `impl` is that of `lowrank_linear`; None is the class's own. Files do not keep it.

    Raises ValueError for r outside 1 … min(in, out), an unknown svd or impl, an alpha that is not
    finite, a dropout or rank_dropout outside [0, 1), a `train` of other names, and a weight with
    NaN or Inf.
    """

    method = "lora_xs"
    factors = ("down", "core", "up")
    learning_rate = 4e-3

    core: nn.Parameter

    @takes_shared
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        train: tuple[str, ...] = ("core",),
        svd: str = "randomized",
        **shared: Unpack[Shared],
    ) -> None:
        r = check_rank("r", r, min(in_features, out_features), "the layer's smaller side")
        if svd not in ("randomized", "exact"):
            raise ValueError(f"svd is {svd!r}: it must be 'randomized' or 'exact'")
        super().__init__(
            in_features,
            out_features,
            bias,
            {"down": (r, in_features), "core": (r, r), "up": (out_features, r)},
            r=r,
            train=train,
            **shared,
        )
        self.svd = svd
        if not self.bases_pending:
            self.init_factors()

    def _init_factors(self) -> None:
        down, up = svd_bases(self.weight, self.r, self.svd)
        self.down.copy_(down)
        self.up.copy_(up)
        self.fill_core(self.core)

    def fill_core(self, core: Any) -> None:
        """Give a core (r, r) its initial values."""
        nn.init.normal_(core, std=CORE_STD)

    @property
    def core_factors(self) -> Tensor:
        """The core, (r, r)."""
        return self.core

    def settings(self) -> dict[str, Any]:
        """The keywords that `from_linear` needs to make such a layer again."""
        return {**super().settings(), "svd": self.svd}


class FusedLoraXSLinear(LoraXSLinear):
    """`LoraXSLinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
