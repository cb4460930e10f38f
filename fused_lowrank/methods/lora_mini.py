"""LoRA-Mini (Singh et al. 2024, arXiv 2411.15804): two small trained factors between frozen ones.

y = x·Wᵀ + bias + scale · x·Aaux·Atrain·Btrain·Baux

down = Aauxᵀ (a, in)    core = a_train (a, r) · b_train (r, b)    up = Bauxᵀ (out, b)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .initialisers import kaiming
from .keywords import Shared, check_rank, takes_shared
from .layer import LowRankLinear

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LoraMiniLinear(LowRankLinear):
    """LoRA-Mini (Singh et al. 2024, arXiv 2411.15804) in plain PyTorch.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,), down (a, in), which
    is Aauxᵀ, a_train (a, r), b_train (r, b) and up (out, b), which is Bauxᵀ. All four start
    Kaiming-uniform (a = √5, fan-in of the map x·F) with init="paper", so that ΔW ≠ 0 at the start;
    init="identity" sets b_train to zero, so that training starts from the base model.
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

    method = "lora_mini"
    factors = ("down", "a_train", "b_train", "up")
    output_factors = ("b_train", "up")
    learning_rate = 1e-2

    a_train: nn.Parameter
    b_train: nn.Parameter

    @takes_shared
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        a: int = 64,
        b: int = 64,
        init: str = "identity",
        train: tuple[str, ...] = ("a_train", "b_train"),
        **shared: Unpack[Shared],
    ) -> None:
        a = check_rank("a", a, in_features, "the layer's in_features")
        b = check_rank("b", b, out_features, "the layer's out_features")
        r = check_rank("r", r, min(a, b), "the smaller of a and b")
        if init not in ("identity", "paper"):
            raise ValueError(
                f"init is {init!r}: it must be 'identity' or 'paper' (with both trained factors "
                "zero, both gradients would be zero and nothing would ever be learned)"
            )
        if init == "identity":
            self._check_learns(train, "b_train")
        super().__init__(
            in_features,
            out_features,
            bias,
            {
                "down": (a, in_features),
                "a_train": (a, r),
                "b_train": (r, b),
                "up": (out_features, b),
            },
            r=r,
            train=train,
            **shared,
        )
        self.a, self.b, self.init = a, b, init
        if not self.bases_pending:
            self.init_factors()

    def _init_factors(self) -> None:
        kaiming(self.down)
        self.fill_core(self.core_factors)
        kaiming(self.up)

    def fill_core(self, core: Any) -> None:
        """Give a pair (a, r), (r, b) its initial values."""
        a_train, b_train = core
        kaiming(a_train.t())
        kaiming(b_train.t())
        if self.init == "identity":
            b_train.zero_()

    @property
    def core_factors(self) -> tuple[Tensor, Tensor]:
        """The core as the pair (a, r), (r, b)."""
        return self.a_train, self.b_train

    def settings(self) -> dict[str, Any]:
        """The keywords that `from_linear` needs to make such a layer again."""
        return {**super().settings(), "a": self.a, "b": self.b, "init": self.init}


class FusedLoraMiniLinear(LoraMiniLinear):
    """`LoraMiniLinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
