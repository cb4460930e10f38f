"""The keywords of layers: those that a method has, the names others give them, and the ranks."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from typing import Any, TypedDict

import torch
from torch import nn

from ..compute import choose
from .initial.values import Inputs, needs
from .method import MAGNITUDE, Method, numbered

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
    "init_lora_weights": "how factors start is init",
    "init_weights": "how factors start is init",
    "fan_in_fan_out": f"only nn.Linear is adapted here; {PEFT}",
    "init_r": "it is called r",
    **dict.fromkeys(
        ("target_r", "total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2"),
        "it is RankBudget's, which takes ranks from the layers in training",
    ),
    "orth_reg_weight": "it is what the loss adds orthogonality(model) times",
    "eva_config": "adapt takes the batches that init='eva' needs, as data",
    "corda_config": "adapt takes the batches that init='corda' needs, as data",
    "loraplus_ratio": "it is parameter_groups', for the optimiser",
    "vera_dropout": "it is called dropout",
    "projection_prng_key": "it is called seed, which vera has",
    "save_projection": "it is bases, of save_adapter",
    "projection_seed": f"torch.manual_seed is what decides here; {PEFT}",
    "use_dora": "it is called dora",
    "task_type": f"adapt takes any model and asks for no task; {PEFT}",
    "inference_mode": f"model.requires_grad_(False) trains nothing; {PEFT}",
    "device": "a layer stays where its weight is",
}
HIDDEN = {"self", "in_features", "out_features", "bias", "device"}


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
    _inputs: Inputs | None  # what is known of a layer's inputs
    _shared: dict[str, nn.Parameter] | None  # the factors that other layers have as well, by name


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


def signature_of(row: Method) -> inspect.Signature:
    """The signature of a method's constructor: sizes, ranks, alpha, dropouts, its own, the rest."""
    annotations: dict[str, Any] = Shared.__annotations__
    kinds = {name: kind.__forward_arg__ for name, kind in annotations.items()}
    own: list[tuple[str, Any, str]] = [("train", row.trained, "tuple[str, ...]")]
    for name, values in row.options.items():
        value = values[0] if isinstance(values, tuple) else values
        own.insert(0 if name == "init" else len(own), (name, value, type(value).__name__))
    shared = [(name, value, kinds[name]) for name, value in DEFAULTS.items()]
    keywords = [*((name, rank, "int") for name, rank in row.ranks.items()), *shared[:3], *own]
    keywords += [("dora", False, "bool")] if row.dora is not None else []
    keywords += shared[3:]
    hidden = {"_inputs": any(map(needs, row.inits_known)), "_shared": row.shared}
    keywords += [(name, None, kinds[name]) for name, there in hidden.items() if there]
    return inspect.Signature(
        [
            Parameter("self", Parameter.POSITIONAL_OR_KEYWORD),
            Parameter("in_features", Parameter.POSITIONAL_OR_KEYWORD, annotation="int"),
            Parameter("out_features", Parameter.POSITIONAL_OR_KEYWORD, annotation="int"),
            Parameter("bias", Parameter.POSITIONAL_OR_KEYWORD, default=True, annotation="bool"),
            *(
                Parameter(name, Parameter.KEYWORD_ONLY, default=value, annotation=kind)
                for name, value, kind in keywords
            ),
        ],
        return_annotation="None",
    )


def constructor_of(cls: type, row: Method) -> Callable[..., None]:
    """The `__init__` of a method's layer class, whose signature names all that it takes.

    Other keywords are a TypeError, as in Python, before anything is looked at.
    """
    signature = signature_of(row)
    defaults = {
        name: p.default for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY
    }

    def __init__(
        self: Any, in_features: int, out_features: int, bias: bool = True, **keywords: Any
    ) -> None:
        for name in keywords:
            if name not in defaults:
                called = f"{cls.__qualname__}.__init__()"
                raise TypeError(f"{called} got an unexpected keyword argument {name!r}")
        given = {**defaults, **keywords}
        if given.get("dora") is True and "train" not in keywords:
            given["train"] = (*row.trained, MAGNITUDE)
        self.build(in_features, out_features, bias, given)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    return __init__


def sized(
    row: Method, in_features: int, out_features: int, given: Mapping[str, Any]
) -> dict[str, int]:
    """The sizes of K, N and a method's ranks, by letter; ValueError for a rank out of range."""
    sizes = {"K": in_features, "N": out_features}
    for name in (*row.limits, *(name for name in row.ranks if name not in row.limits)):
        sizes[name] = check_rank(name, given[name], row.limit(name, sizes), row.limit_is(name))
    if n := sizes.get(row.divides):
        for side, size in (("in_features", in_features), ("out_features", out_features)):
            if size % n:
                raise ValueError(f"{row.divides} is {n}: it must divide {side}, which is {size}")
    return sizes


def chosen(row: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a method's own options, by keyword; ValueError for an unknown one."""
    found = {}
    if not isinstance(dora := given.get("dora", False), bool):
        raise ValueError(f"dora is {dora!r}: it must be True or False")
    for name, values in row.options.items():
        value = given[name]
        if isinstance(values, tuple):
            if numbered(value) not in values or str(value).endswith("_N"):
                known = " or ".join(map(repr, values))
                hint = row.hints.get(name, "")
                raise ValueError(f"{name} is {value!r}: it must be {known}{hint}")
        elif isinstance(values, int):
            value = seed(name, value)
        else:
            value = number(name, value)
        found[name] = value
    return found


def getter(names: tuple[str, ...]) -> property:
    """The property that gives one Parameter, or the pair, of these names; of none it is None."""
    if not names:
        return property(lambda self: None)
    first, last = names[0], names[-1]
    if len(names) == 2:
        return property(lambda self: (getattr(self, first), getattr(self, last)))
    return property(lambda self: getattr(self, first))


def picker(names: tuple[str, ...]) -> Callable[[Any], Any]:
    """The function that takes one Parameter, or the pair, of these names from a table of them.

    Dynamo traces these, and `operator.itemgetter` it does not.
    """
    if not names:
        return lambda own: None
    first, last = names[0], names[-1]
    if len(names) == 2:
        return lambda own: (own[first], own[last])
    return lambda own: own[first]


def check_settings(layer: Any) -> None:
    """Raise ValueError for settings that all methods have, and that are out of range."""
    saved = (name for name, f in layer.row.factors.items() if f.saved and not f.like)
    known = ("weight", "bias", *saved)
    if unknown := [name for name in layer.train_names if name not in known]:
        raise ValueError(f"train names {unknown}: it may name {', '.join(known)}")
    choose.check_known(layer.impl)
    if not math.isfinite(layer.alpha):
        raise ValueError(f"alpha is {layer.alpha}: it must be finite")
    if not 0.0 <= layer.dropout < 1.0:
        raise ValueError(f"dropout is {layer.dropout}: it must be at least 0 and below 1")
    if not 0.0 <= layer.rank_dropout < 1.0:
        said = f"rank_dropout is {layer.rank_dropout}"
        raise ValueError(f"{said}: it must be at least 0 and below 1")
    if layer.rank_dropout and any(factor.like for factor in layer.row.factors.values()):
        raise ValueError(
            f"rank_dropout is {layer.rank_dropout}, and init {layer.init!r}: what is dropped would "
            "be missing from W; take dropout, which acts on what was learned alone"
        )


def known_keywords(cls: type) -> list[str]:
    """The keywords of a layer that is made around a linear one, in their order."""
    names = inspect.signature(cls).parameters
    return [name for name in names if name not in HIDDEN and not name.startswith("_")]


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


def seed(name: str, value: Any) -> int:
    """An integer that torch takes for a seed; ValueError for what is none."""
    value = integer(name, value)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} is {value}: it must be at least -2**63 and below 2**64")
    return value


def number(name: str, value: Any) -> float:
    """A finite number as Python's float; ValueError for what is none."""
    try:
        found = float(value)
        if isinstance(value, str | bool) or not math.isfinite(found):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}: it must be a finite number") from None
    return found


def check_rank(name: str, value: Any, limit: int, of: str) -> int:
    """The value as an int; ValueError unless it is an integer and 1 ≤ value ≤ limit."""
    value = integer(name, value)
    if not 1 <= value <= limit:
        raise ValueError(f"{name} is {value}: it must be at least 1 and at most {limit}, {of}")
    return value
