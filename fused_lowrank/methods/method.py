"""A method as a row of data: its factors, their sides and first values, and the parts they make.

Constructors, rank checks, files, PEFT's configurations and layers, sharding and inspection read the
row; nothing else says what a method is. `fused_lowrank.methods.METHODS` has all rows' layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..compute.reference import Core

SIDES = {"K": "the layer's in_features", "N": "the layer's out_features"}
SHARED = "*"  # in place of a layer's name, in keys of files
BOTH = "the layer's smaller side"
MAGNITUDE = "magnitude"  # DoRA's factor


class Parts(NamedTuple):
    """The factors of y = gain ⊙ (x·Wᵀ + scale · ((x·downᵀ) · core) · upᵀ) + bias."""

    down: Tensor  # (P, K)
    core: Core  # (P, Q), or the pair (P, r), (r, Q), or a diagonal (P,), or None: P = Q, 1
    up: Tensor  # (N, Q)
    gain: Tensor | None = None  # (N,); None: 1


@dataclass(frozen=True)
class Factor:
    """One tensor of a method.

    `sides` has a letter for each dimension: K is in_features, N out_features, others are ranks or
    what `Method.sizes` makes of them. A `shared` factor is one for all layers of a model: K and N
    are then the largest of theirs.
    """

    sides: str
    init: str  # of `starts.FILLS`, `starts.PAIRS` or, of a shared one, `starts.DRAWS`
    trained: bool = False
    shared: bool = False
    saved: bool = True  # whether files and a state_dict have it; otherwise it is made from a seed
    like: str = ""  # the factor that it starts as and has the dtype of; files always have it


@dataclass(frozen=True)
class PeftNames:
    """The names that PEFT's own implementation of a method has, in files, read and written."""

    kind: str  # its PeftType
    factors: Mapping[str, str]  # factor → the last part of PEFT's key
    settings: Callable[[Mapping[str, Any], int], dict[str, Any]]  # (config, rank) → keywords
    config: Callable[[Mapping[str, Any], int, int, float], dict[str, Any]]  # (keywords, highest
    # rank, mean of those left, scale of all layers) → what the config has of its own
    prefix: str  # of the config's dropout and of its word for biases
    scaled: str  # the factor that takes what is left of a layer's scale
    scale: float | None = None  # of all layers; None: the config says it
    shared: Mapping[str, str] = field(default_factory=dict)  # factor → PEFT's key
    columns: tuple[str, ...] = ()  # factors that are (r, 1) there
    masked: str = ""  # the factor whose zeros are ranks that a budget took away: its rank_pattern


Sizes = Mapping[str, int]  # letter → size


def numbered(word: Any) -> Any:
    """A word with N in place of the number that it ends with, if any: "pissa_niter_N"."""
    return re.sub(r"_[1-9]\d*$", "_N", word) if isinstance(word, str) else word


@dataclass(frozen=True)
class Method:
    """A method: a row. `factors` are in the order of the state_dict.

    `parts` makes the equation's parts of (factors by name, weight, scale), differentiably; None:
    they are the factors "down", "up" and those named in `core`.
    """

    name: str
    title: str  # as papers write it
    ranks: Mapping[str, int]  # keyword → default
    factors: Mapping[str, Factor]
    learning_rate: float  # to start from, with AdamW
    outputs: tuple[str, ...] = ("up",)  # the factors on the output's side of the core
    core: tuple[str, ...] = ()  # the factors that the core is made of
    parts: Callable[[Mapping[str, Tensor], Tensor, float], Parts] | None = None
    down_of: tuple[str, ...] = ("down",)  # the factors that the equation's down is made of
    limits: Mapping[str, str] = field(default_factory=lambda: {"r": "KN"})  # rank → the sides above
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword → its values, the first
    # the default, where it is a tuple; otherwise a number, the default itself, an int of a seed
    hints: Mapping[str, str] = field(default_factory=dict)  # option → why it has no other values
    starts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # word → other inits
    peft: PeftNames | None = None  # where PEFT has the method as well
    bases: Any = None  # `bases.Bases` of down and up, where a seed and the weight determine them
    divides: str = ""  # the rank of which K and N must be multiples
    sizes: Callable[[dict[str, int]], dict[str, int]] = dict  # of letters, with others added
    slices: bool = True  # whether a rank with a slice of K or N computes a slice of the layer
    residual: tuple[str, ...] = ()  # the inits that start as a part of W
    dora: bool | None = None  # whether there is DoRA's magnitude; None: there cannot be

    @property
    def label(self) -> str:
        """The name, and whether it is with DoRA."""
        return f"{self.name} with dora" if self.dora else self.name

    @property
    def trained(self) -> tuple[str, ...]:
        """The factors that are trained unless `train` names others."""
        return tuple(name for name, factor in self.factors.items() if factor.trained)

    @property
    def inits_known(self) -> tuple[str, ...]:
        """The values of the option "init", the default first."""
        return tuple(self.options.get("init", ()))

    @property
    def common(self) -> set[str]:
        """The names of what all adapters in a bank have in common: all but the core."""
        return {*self.factors, "weight", "bias"} - {*self.core}

    @property
    def shared(self) -> tuple[str, ...]:
        """The factors that all layers of a model have in common."""
        return tuple(name for name, factor in self.factors.items() if factor.shared)

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """The factors that a layer's own state_dict or file part need not have."""
        return tuple(name for name, f in self.factors.items() if f.shared or not f.saved)

    def key(self, layer: str, part: str) -> str:
        """The key that a part of a layer has in a file: its own, or that of all layers."""
        factor = self.factors.get(part)
        return f"{SHARED}.{part}" if factor is not None and factor.shared else f"{layer}.{part}"

    def inits(self, word: Any = None) -> dict[str, str]:
        """The first values of the factors, by name, under a word of `starts`."""
        own = {name: factor.init for name, factor in self.factors.items()}
        return {**own, **self.starts.get(numbered(word), {})}

    def shape(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """The shape of a factor, of the sizes of K, N and the ranks."""
        letters = self.sizes(dict(sizes))
        return tuple(letters[side] for side in self.factors[name].sides)

    def limit(self, rank: str, sizes: Sizes) -> int:
        """The most that a rank can be; `sizes` has K, N and the ranks that limit it."""
        return min((sizes[side] for side in self.limits.get(rank, "")), default=2**31 - 1)

    def fitted(self, k: int, n: int, ranks: Sizes) -> dict[str, int]:
        """The sizes of K, N and the ranks, these taken down to what such a layer has room for."""
        sizes = {"K": k, "N": n}
        for name in (*self.limits, *(name for name in ranks if name not in self.limits)):
            sizes[name] = min(ranks[name], self.limit(name, sizes))
        return sizes

    def limit_is(self, rank: str) -> str:
        """The limit of a rank in words."""
        sides = self.limits.get(rank, "")
        if sides == "KN":
            return BOTH
        if sides in SIDES:
            return SIDES[sides]
        return f"the smaller of {' and '.join(sides)}" if sides else "what a tensor can hold"

    def made(self, factors: Mapping[str, Tensor], weight: Tensor, scale: float) -> Parts:
        """The equation's parts of these factors."""
        if self.parts is not None:
            return self.parts(factors, weight, scale)
        return Parts(factors["down"], self.core_of(factors), factors["up"])

    def core_of(self, factors: Mapping[str, Tensor]) -> Core:
        """The core of these factors as `lowrank_linear` takes it."""
        if len(self.core) == 2:
            return factors[self.core[0]], factors[self.core[1]]
        return factors[self.core[0]] if self.core else None

    def bases_of(self, factors: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """down (P, K) and up (N, Q) among these factors, cut to the weight's sides; or of no rows.

        They are what a fingerprint is of: a file's factors are known by it where it lacks them.
        """
        n, k = weight.shape
        down, up = factors.get("down"), factors.get("up")
        has_down = down is not None and self.factors["down"].sides[1:] == "K"
        has_up = up is not None and self.factors["up"].sides[:1] == "N"
        return (
            down[:, :k] if has_down and down is not None else weight.new_empty(0, k),
            up[:n] if has_up and up is not None else weight.new_empty(n, 0),
        )
