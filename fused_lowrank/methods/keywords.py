"""The keywords of layers: those that a method has, the names others give them, and the ranks."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
from collections.abc import Callable, Iterable
from inspect import Parameter
from typing import Any, TypedDict, TypeVar, cast

import torch
from torch import nn

PEFT = "the configurations of fused_lowrank.integrations.peft have it"
ELSEWHERE = {  # what users of other libraries call things, and what they are here
    "lora_alpha": "it is called alpha",
    "lora_dropout": "it is called dropout",
    "lora_r": "it is called r",
    "rank": "it is called r",
    "use_rslora": "adapt takes it; of one layer it is alpha = lora_alpha·√r",
    "rank_pattern": "adapt takes it; one layer has one r",
    "alpha_pattern": "adapt takes it; one layer has one alpha",
    "bias": 'biases are trained if train names them, as train=("core", "bias") does',
    "layers_to_transform": "adapt takes it",
    "layers_pattern": "adapt takes it",
    "rank_dropout_scale": "rank_dropout scales what it keeps by 1 / (1 - p)",
    "init_lora_weights": "how factors start is init, which LoRA-Mini has",
    "init_weights": "how factors start is init, which LoRA-Mini has",
    "fan_in_fan_out": f"only nn.Linear is adapted here; {PEFT}",
    "save_projection": "it is bases, of save_adapter",
    "projection_seed": f"torch.manual_seed is what decides here; {PEFT}",
    "use_dora": "DoRA is not one of the methods",
    "task_type": f"adapt takes any model and asks for no task; {PEFT}",
    "inference_mode": f"model.requires_grad_(False) trains nothing; {PEFT}",
    "device": "a layer stays where its weight is",
}
HIDDEN = {"self", "in_features", "out_features", "bias", "device", "_linear", "_defer"}


class Shared(TypedDict, total=False):
    """The keywords that the constructors of all methods have, beside their own."""

    alpha: float | None
    dropout: float
    rank_dropout: float
    impl: str | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    _linear: nn.Linear | None  # whose Parameters the layer takes; None: new ones
    _defer: bool  # whether the factors get their values later


DEFAULTS: Shared = {
    "alpha": None,
    "dropout": 0.0,
    "rank_dropout": 0.0,
    "impl": None,
    "device": None,
    "dtype": None,
    "_linear": None,
    "_defer": False,
}
Constructor = TypeVar("Constructor", bound=Callable[..., None])


def takes_shared(constructor: Constructor) -> Constructor:
    """The constructor of a method, with the shared keywords in the place of its `**shared`.

    Its signature names them where users look for them: ranks, alpha, dropouts, what is the method's
    own, the rest. Others are a TypeError, as in Python, before anything is looked at.
    """
    signature = inspect.signature(constructor)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    first = sum(p.kind is not p.KEYWORD_ONLY or type(p.default) is int for p in own)
    annotations: dict[str, Any] = Shared.__annotations__
    kinds = {name: kind.__forward_arg__ for name, kind in annotations.items()}
    shared = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=value, annotation=kinds[name])
        for name, value in DEFAULTS.items()
    ]
    known = signature.replace(parameters=[*own[:first], *shared[:3], *own[first:], *shared[3:]])

    @functools.wraps(constructor)
    def checked(self: Any, *sizes: Any, **keywords: Any) -> None:
        for name in keywords:
            if name not in known.parameters:
                called = f"{constructor.__qualname__}()"
                raise TypeError(f"{called} got an unexpected keyword argument {name!r}")
        constructor(self, *sizes, **keywords)

    checked.__signature__ = known  # type: ignore[attr-defined]
    return cast(Constructor, checked)


def known_keywords(cls: type) -> list[str]:
    """The keywords of a layer that is made around a linear one, in their order."""
    return [name for name in inspect.signature(cls).parameters if name not in HIDDEN]


def check_keywords(cls: Any, given: Iterable[str]) -> None:
    """Raise TypeError for a keyword that this method's layers do not have."""
    known = known_keywords(cls)
    for name in given:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, 1)
        hint = ELSEWHERE.get(name) or (f"did you mean {close[0]}?" if close else "")
        raise TypeError(
            f"{cls.method} has no keyword {name!r}{': ' if hint else ''}{hint}"
            f"{'' if hint.endswith('?') else '.'} It has {', '.join(known)}"
        )


def integer(name: str, value: Any) -> int:
    """An integer of any kind, numpy's too, as Python's; ValueError for what is none, or bool."""
    if type(value) is int:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}: it must be an integer") from None


def check_rank(name: str, value: Any, limit: int, of: str) -> int:
    """The value as an int; ValueError unless it is an integer and 1 ≤ value ≤ limit."""
    value = integer(name, value)
    if not 1 <= value <= limit:
        raise ValueError(f"{name} is {value}: it must be at least 1 and at most {limit}, {of}")
    return value
