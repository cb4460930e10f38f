"""Settings of `adapt` that differ from layer to layer, by the rules of PEFT.

rank_pattern, alpha_pattern   {regular expression: value}, which a layer's name must match from its
                              beginning or from a dot on to its end; the first that matches counts
layers_to_transform           the numbers of the layers to adapt, which stand in their names
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..context.called import shown
from ..methods.keywords import integer

Layers = tuple[set[int], list[str]]  # the numbers, and the names of the lists that they count
Keywords = dict[str, Any]


def check_rank(name: str, value: Any) -> int:
    """A rank as Python's integer; ValueError if it is none."""
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"{name} is {value!r}: it must be an integer of at least 1")
    return value


def check_number(name: str, value: Any) -> float:
    """A finite number as one of Python's, which a config's file can hold; ValueError otherwise."""
    try:
        number = value if isinstance(value, int) else float(value)
        if isinstance(value, str | bool) or not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}: it must be a finite number") from None
    return number


# --- ranks and alphas ---


def matches_end(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name, whole or from a dot on to its end."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def pattern_of(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value that a rank_pattern or alpha_pattern has for a layer; the first match counts."""
    for pattern, value in (patterns or {}).items():
        if matches_end(pattern, name):
            return value
    return default


def check_patterned(
    argument: str, patterns: Any, check: Callable[[str, Any], Any]
) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern, its values as `check` returns them; raises for any other."""
    if patterns is None:
        return {}
    if not isinstance(patterns, Mapping) or not all(isinstance(key, str) for key in patterns):
        raise TypeError(
            f"{argument} is {patterns!r}: it must be a dict of names, or regular expressions, to "
            "values"
        )
    for key in patterns:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{argument}: {key!r} is no regular expression ({error})") from None
    return {key: check(f"{argument}[{key!r}]", value) for key, value in patterns.items()}


def check_reached(argument: str, patterns: Mapping[str, Any], targets: list[str]) -> None:
    """Raise ValueError for a pattern that matches no target, and warn of one that never counts."""
    for pattern in patterns:
        found = [name for name in targets if matches_end(pattern, name)]
        if not found:
            raise ValueError(
                f"{argument}: {pattern!r} matches none of the layers to adapt, which are "
                f"{shown(targets)}. It must match a name whole, or its end from a dot on"
            )
        first = [next(other for other in patterns if matches_end(other, name)) for name in found]
        if pattern not in first:
            warnings.warn(
                f"{argument}: {pattern!r} decides nothing, for {first[0]!r} comes before it and "
                "matches the same layers; put it first",
                stacklevel=4,
            )


def own_keywords(
    targets: list[str],
    cls: Any,
    keywords: Keywords,
    ranks: Any,
    alphas: Any,
    use_rslora: Any,
) -> dict[str, Keywords]:
    """The keywords of each of these layers, by a rank_pattern, an alpha_pattern and rsLoRA.

    Of rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) the scale is alpha / √r. A layer has one
    meaning of alpha, scale = alpha / r, as files, banks and exports have: so it gets alpha · √r.
    """
    if not isinstance(use_rslora, bool):
        raise TypeError(f"use_rslora is {use_rslora!r}: it must be True or False")
    ranks = check_patterned("rank_pattern", ranks, check_rank)
    alphas = check_patterned("alpha_pattern", alphas, check_number)
    check_reached("rank_pattern", ranks, targets)
    check_reached("alpha_pattern", alphas, targets)
    if ranks and cls.row.shared:
        raise ValueError(
            f"rank_pattern is {dict(ranks)}: all layers of {cls.method} share factors of one rank, "
            "r"
        )
    if not (ranks or alphas or use_rslora):
        return dict.fromkeys(targets, keywords)
    default = keywords.get("r", inspect.signature(cls).parameters["r"].default)
    found = {}
    for name in targets:
        r = check_rank("r", pattern_of(ranks, name, default))
        alpha = pattern_of(alphas, name, keywords.get("alpha"))
        if use_rslora:
            alpha = (r if alpha is None else check_number("alpha", alpha)) * math.sqrt(r)
        found[name] = {**keywords, "r": r, "alpha": alpha}
    return found


# --- which layers ---


def check_layers(target_modules: Any, numbers: Any, lists: Any) -> Layers | None:
    """layers_to_transform and layers_pattern, checked; None where all layers are meant."""
    many = isinstance(numbers, list | tuple | set | range)
    if numbers is None or (many and not numbers):
        if lists:
            raise ValueError("layers_pattern is given: layers_to_transform must be, too")
        return None
    if isinstance(target_modules, str):
        raise ValueError(
            f"layers_to_transform goes with a list of names, and target_modules is "
            f"{target_modules!r}: name the modules in a list, or the layers in a regular expression"
        )
    own = {integer("layers_to_transform", n) for n in (numbers if many else (numbers,))}
    names = [lists] if isinstance(lists, str) else list(lists or ())
    for name in names:
        try:
            re.compile(name)
        except (TypeError, re.error) as error:
            raise ValueError(
                f"layers_pattern is {lists!r}: it must be a name, or a list of them ({error})"
            ) from None
    return own, [name for name in names if name]


def number_of(name: str, lists: list[str]) -> int | None:
    """The number of the layer that a module is in: of one of these lists, or of the first."""
    patterns = [rf"(?:^|.*?\.){own}\.(?P<number>\d+)\." for own in lists]
    for pattern in patterns or [r".*?\.[^.]*\.(?P<number>\d+)\."]:
        if match := re.match(pattern, name):
            return int(match["number"])
    return None


def in_layers(targets: list[str], patterns: Any, layers: Layers | None) -> list[str]:
    """Those of the targets that are in these layers, or are named whole in `patterns`.

    Raises ValueError for a number that no target has.
    """
    if layers is None or not targets:
        return targets
    numbers, lists = layers
    found = {name: number_of(name, lists) for name in targets}
    there = {number for number in found.values() if number is not None}
    if not there:
        where = f"after {' or '.join(lists)}" if lists else "after two other parts"
        raise ValueError(
            f"layers_to_transform: {shown(targets)} have no number {where} in their names; "
            "layers_pattern is the name of the nn.ModuleList that numbers the layers"
        )
    if missing := numbers - there:
        absent, present = (", ".join(map(str, sorted(own))) for own in (missing, there))
        raise ValueError(
            f"layers_to_transform: no target is in layer {absent}; they are in {present}"
        )
    return [name for name in targets if name in patterns or found[name] in numbers]
