"""Models whose rows cannot be followed, and what is said of them. One copy: ops have one name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rows_cases import K, experts
from torch import Tensor, nn

from fused_lowrank import declare_rows

LAYERS = ["first", "lin", "last"]


@torch.library.custom_op("fused_lowrank_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return torch.cat([x, 2 * x])


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(2 * len(x), *x.shape[1:])


doubled.register_autograd(
    lambda ctx, grad: grad.chunk(2)[0] + 2 * grad.chunk(2)[1], setup_context=lambda *_, **__: None
)


@torch.library.custom_op("fused_lowrank_tests::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format)


turned.register_fake(lambda x: x.new_empty(x.shape[1], x.shape[0], *x.shape[2:]))
turned.register_autograd(
    lambda ctx, grad: turned(grad.contiguous()), setup_context=lambda *_, **__: None
)


def chosen(x: Tensor) -> Tensor:
    return torch.where(x.reshape(-1, K)[:, 0] > 0)[0]


def experts_that_say_it(lin: nn.Module, x: Tensor) -> Tensor:
    with declare_rows(lin, chosen(x) // x.shape[1]):
        return experts(lin, x)


def sorted_by_value(lin: nn.Module, x: Tensor) -> Tensor:
    order = x[..., 0].flatten().argsort()
    with declare_rows(lin, order // x.shape[1]):
        y = lin(x.reshape(-1, K)[order])
    return torch.empty_like(y).index_copy(0, order, y).view_as(x)


# A model, and what is said of its middle layer: rows of (sequences, positions), None: it says so.
Rows = Callable[[int, int], Any]
RIGHT: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Rows | None]] = {
    "experts": (experts_that_say_it, None),
    "sorted": (sorted_by_value, None),
    "doubled by a kernel": (
        lambda lin, x: lin(doubled(x)).chunk(2)[1],
        lambda b, t: torch.arange(b).repeat(2),
    ),
    "doubled by a kernel, in words": (
        lambda lin, x: lin(doubled(x)).chunk(2)[1],
        lambda b, t: [*range(b), *range(b)],
    ),
    "turned by a kernel": (lambda lin, x: turned(lin(turned(x))), lambda b, t: 1),
    "turned by a kernel, by number": (
        lambda lin, x: turned(lin(turned(x))),
        lambda b, t: torch.arange(b, dtype=torch.int32).expand(t, b),
    ),
    "turned and flat": (
        lambda lin, x: turned(lin(turned(x).view(-1, K)).view(x.shape[1], len(x), K)),
        lambda b, t: lambda x: torch.arange(len(x)) % b,
    ),
    "the other way round": (
        lambda lin, x: lin(x.flip(0)).flip(0),
        lambda b, t: lambda x: torch.arange(b).flip(0),
    ),
    "of a kernel, as it was": (lambda lin, x: lin(turned(turned(x))), lambda b, t: lambda x: 0),
}


def said(served: Any, rows: Any) -> Any:
    return declare_rows(served.model.lin, rows)


def expected(served: Any, names: list[str], x: Tensor) -> Tensor:
    return torch.cat([served.alone(name, row[None]) for name, row in zip(names, x, strict=True)])
