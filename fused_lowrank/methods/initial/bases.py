"""Frozen factors that a seed, and for LoRA-XS the weight, determine: made, made larger, made again.

PEFT's layers have one pair of them for all adapters, and its files may leave them out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .values import seeded_bases, seeded_uniform, svd_bases

Pair = tuple[Tensor, Tensor]


class Source(NamedTuple):
    """The origin of a layer's frozen factors, down (P, K) and up (N, Q)."""

    weight: Tensor  # (N, K)
    key: str  # the layer's name
    seed: int


class Bases(NamedTuple):
    """Functions that make frozen factors."""

    new: Callable[[Source, int, int], Pair]  # (source, P, Q) → down, up
    more: Callable[[Source, Pair, int, int], Pair]  # those that begin with a pair, larger


def triples_of(source: Source, weight: Tensor, rank: int) -> Pair:
    """`svd_bases` of a weight, whose errors name the layer."""
    try:
        return svd_bases(weight, rank, seed=source.seed)
    except ValueError as error:
        raise ValueError(f"{source.key}: {error}") from None


def svd_new(source: Source, p: int, q: int) -> Pair:
    """Σ·Dᵀ and S of the weight's leading triples, in its dtype."""
    return triples_of(source, source.weight, p)


def svd_more(source: Source, there: Pair, p: int, q: int) -> Pair:
    """The bases there are, and the leading triples of what they leave of the weight."""
    down, up = there
    basis, _ = torch.linalg.qr(up.to(torch.promote_types(up.dtype, torch.float32)))
    weight = source.weight.to(basis.dtype)
    rest = weight - basis @ (basis.t() @ weight)
    more_down, more_up = (new.to(up.dtype) for new in triples_of(source, rest, p - len(down)))
    return torch.cat([down, more_down]), torch.cat([up, more_up], 1)


def seeded_new(source: Source, p: int, q: int) -> Pair:
    """Kaiming-uniform (a = √5) in the order of PyTorch, within 1/√K and 1/√Q; float32."""
    (n, k), key = source.weight.shape, source.key
    return seeded_bases(p, k, n, q, key, source.seed)


def seeded_more(source: Source, there: Pair, p: int, q: int) -> Pair:
    """The bases there are, and more of the same size."""
    new, (n, k) = [], source.weight.shape
    for drawn, old in zip(seeded_uniform(p, k, n, q, source.key, source.seed), there, strict=True):
        rows, columns = old.shape
        drawn *= float(old.float().norm() / drawn[:rows, :columns].norm())
        drawn = drawn.to(old)
        drawn[:rows, :columns] = old
        new.append(drawn)
    return new[0], new[1]


SVD = Bases(svd_new, svd_more)
SEEDED = Bases(seeded_new, seeded_more)
