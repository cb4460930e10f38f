"""Groups of parameters for an optimiser: learning rates of LoRA+, and what has no weight decay."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..context.elsewhere import FSDP1, ZERO, sharder_in
from ..methods import LowRankLinear
from .adapt import require_adapted
from .targets import named_modules


def parameter_groups(
    model: nn.Module,
    lr: float | Tensor,
    *,
    loraplus_ratio: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The trained parameters of an adapted model, as groups for an optimiser of torch's kind.

        optimizer = torch.optim.AdamW(parameter_groups(model, 2e-4, loraplus_ratio=16))

    LoRA+ (Hayou, Ghosh and Yu 2024, arXiv 2402.12354) has the factors on the output's side learn
    faster than those on the input's, 16 times say: LoRA's up beside down, LoRA-Mini's b_train
    beside a_train. LoRA-XS trains one core, which has no partner: its rate is lr.

    Args:
        model: what `adapt` or `load_adapter` returned, also in wrappers such as DDP.
        lr: the learning rate.
        loraplus_ratio: the factors on the output's side have lr times this.
        weight_decay: of all parameters but those of one dimension, which are biases and the scales
            of norms.

    Returns:
        A list of dicts with `name`, `params`, `lr` and `weight_decay`, without empty groups, each
        parameter once. The names are "factors", "output_factors" and "others", which is all that is
        trained and no factor (lr, not lr times the ratio); and these with "_no_decay" at the end.

    Raises ValueError for a model without adapted layers, or of which nothing is trained, or that
    FSDP1 or ZeRO-3 has cut up (fully_shard leaves shapes as they are); and for a number out of
    range.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            "the model is one of PEFT's: peft.optimizers.create_loraplus_optimizer makes an "
            "optimiser for its LoRA"
        )
    require_adapted(model)
    if (sharder := sharder_in(model)) in (FSDP1, ZERO):
        raise ValueError(
            f"{sharder} has cut up the parameters, whose shapes are not known here: take "
            "fully_shard, or make the groups before"
        )
    check_range("loraplus_ratio", loraplus_ratio, above=True)
    check_range("weight_decay", weight_decay)
    if not isinstance(lr, Tensor):
        check_range("lr", lr)
    found: dict[str, list[nn.Parameter]] = {}
    seen = set()
    for _, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = kind_of(module, name) + ("" if parameter.dim() > 1 else "_no_decay")
            found.setdefault(kind, []).append(parameter)
    if not found:
        raise ValueError("nothing in the model is trained: its parameters do not require gradients")
    return [
        {
            "name": kind,
            "params": found[kind],
            "lr": lr * loraplus_ratio if kind.startswith("output") else lr,
            "weight_decay": 0.0 if kind.endswith("_no_decay") else weight_decay,
        }
        for kind in sorted(found)
    ]


def kind_of(module: nn.Module, name: str) -> str:
    """The group of a module's parameter, as far as it is one of decay."""
    if not isinstance(module, LowRankLinear) or name not in module.factors:
        return "others"
    return "output_factors" if name in module.output_factors else "factors"


def check_range(name: str, value: float, above: bool = False) -> None:
    """Raise ValueError unless a number is finite and at least, or above, 0."""
    if not (math.isfinite(value) and value >= 0 and (value > 0 or not above)):
        raise ValueError(f"{name} is {value}: it must be {'above' if above else 'at least'} 0")
