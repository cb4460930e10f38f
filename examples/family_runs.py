"""Ways to train that the comparison of the family has (family.py): methods, inits, frozen parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fused_lowrank import adapt
from fused_lowrank.methods import METHODS, named

FROZEN, FULL = "frozen encoder", "all of the layers"
OUTER_RATE = 1e-3  # to start from, where LoRA-Mini's large factors are trained
FULL_RATE = 1e-4


@dataclass(frozen=True)
class Variant:
    """One way to train, and the one that it is held against."""

    name: str
    question: str
    method: str | None = None  # None: no adapters, all or nothing is trained
    options: dict[str, Any] = field(default_factory=dict)
    against: str = "LoRA"
    lr: float | None = None  # to start from; None: the method's own

    @property
    def rate(self) -> float:
        """The learning rate to start from; 0 where nothing is trained."""
        if self.lr is not None or self.method is None:
            return self.lr or 0.0
        return METHODS[named(self.method, {})[0]][1].row.learning_rate


METHOD = "Which method"
DORA = "With DoRA"
XS = "LoRA-XS: which bases"
MINI = "LoRA-Mini: which decomposition to start from"
PARTS = "LoRA-Mini: which factors to freeze"


def variants() -> list[Variant]:
    """All of them, each method as `adapt` has it by default."""
    a, b, down, up = "a_train", "b_train", "down", "up"
    mini, paper = "LoRA-Mini", "LoRA-Mini, paper"
    methods = [
        Variant(METHODS[name][1].row.title, METHOD, name)
        for name in METHODS
        if name not in ("lora_xs", "lora_mini")
    ]
    return [
        Variant(FROZEN, METHOD),
        Variant(FULL, METHOD, lr=FULL_RATE),
        *methods,
        Variant("LoRA-XS", METHOD, "lora_xs"),
        Variant(mini, METHOD, "lora_mini"),
        Variant("DoRA", DORA, "dora"),
        Variant("LoRA-XS, dora", DORA, "lora_xs", {"dora": True}, "LoRA-XS"),
        Variant("LoRA-Mini, dora", DORA, "lora_mini", {"dora": True}, mini),
        *(
            Variant(f"LoRA-XS, {init}", XS, "lora_xs", {"init": init}, "LoRA-XS")
            for init in METHODS["lora_xs"][1].row.inits_known[1:]
        ),
        *(
            Variant(f"LoRA-Mini, {init}", MINI, "lora_mini", {"init": init}, mini)
            for init in METHODS["lora_mini"][1].row.inits_known[1:]
        ),
        *(
            Variant(
                f"LoRA-Mini, train {' '.join(train)}{', paper' if against == paper else ''}",
                PARTS,
                "lora_mini",
                {"train": train, **({"init": "paper"} if against == paper else {})},
                against,
                OUTER_RATE if {down, up} & {*train} else None,
            )
            for train, against in (
                ((b,), mini),
                ((a,), paper),  # with b_train at zero it would have no gradient
                ((a, b, up), mini),
                ((down, a, b), mini),
                ((down, a, b, up), mini),
                ((down, up), paper),
            )
        ),
    ]


def make(model: nn.Module, variant: Variant, seed: int, data: Iterable[Any]) -> nn.Module:
    """Adapt the model, in place; of `data`, batches of inputs, no more is read than is needed."""
    if variant.method is None:
        return model.requires_grad_(variant.name == FULL)
    options = dict(variant.options)
    row = METHODS[named(variant.method, options)[0]][1].row
    if "seed" in row.options:
        options["seed"] = seed
    if options.get("init") == "eva":
        options["data"] = data
    return adapt(model, variant.method, target_modules="all-linear", progress=False, **options)
