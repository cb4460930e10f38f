"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): ΔW as up·diag(core)·down, its rank a budget.

y = x·Wᵀ + bias + scale · ((x·downᵀ) ⊙ core)·upᵀ

`fused_lowrank.RankBudget` gives the ranks to the layers that use them, in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layer import LowRankLinear
from ..method import Factor, Method, Parts, PeftNames

EPS = 1e-5  # PEFT divides by the first rank and this


def adalora_parts(factors: Mapping[str, Tensor], weight: Tensor, scale: float) -> Parts:
    """The factors, with a diagonal core."""
    return Parts(factors["down"], factors["core"], factors["up"])


def adalora_settings(config: Mapping[str, Any], r: int) -> dict[str, Any]:
    """The keywords of a layer of PEFT's, of which r ranks are left: it divides by the first r."""
    first = int(config["init_r"])
    alpha = float(config["lora_alpha"])
    scale = (alpha if alpha > 0 else float(first)) / (first + EPS)
    return {"alpha": scale * r, "dropout": float(config.get("lora_dropout") or 0.0)}


def adalora_config(keywords: Mapping[str, Any], r: int, left: int, scale: float) -> dict[str, Any]:
    """PEFT's settings of layers that began with r ranks. The budget is done with after one step."""
    return {
        "init_r": r,
        "target_r": left,
        "lora_alpha": scale * (r + EPS),
        "total_step": 1,
    }


ADALORA = Method(
    name="adalora",
    title="AdaLoRA",
    ranks={"r": 12},
    factors={
        "down": Factor("rK", "small", trained=True),
        "core": Factor("r", "zeros", trained=True),
        "up": Factor("Nr", "small", trained=True),
    },
    learning_rate=1e-3,
    core=("core",),
    parts=adalora_parts,
    peft=PeftNames(
        "ADALORA",
        {"down": "lora_A", "core": "lora_E", "up": "lora_B"},
        adalora_settings,
        adalora_config,
        prefix="lora",
        scaled="core",
        columns=("core",),
        masked="core",
    ),
    dora=False,
)


class AdaLoraLinear(LowRankLinear, row=ADALORA):
    """AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) in plain PyTorch.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,), down (r, in), core
    (r,) and up (out, r): in PEFT lora_A, lora_E (r, 1) and lora_B. down and up start as
    N(0, 0.02²), the core at zero. scale = alpha / r; alpha None means r; PEFT divides by r + 1e-5.
    r is the initial rank: training with `RankBudget` sets entries of the core to zero.
    Shapes, dtypes, other keywords and errors are those of `LoraLinear`.
    """

    core: nn.Parameter


class FusedAdaLoraLinear(AdaLoraLinear):
    """`AdaLoraLinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
