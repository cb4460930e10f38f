"""Whose rows a layer's input has, said by the caller: as each alone, or an error by the layer's name.

Of two and of three tenants, in a bank and by PEFT's adapter_names.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_whose_rows import NAMES, K, Model, Native, Peft, experts, ways
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_lowrank import declare_rows

LAYERS = ["first", "lin", "last"]
SHAPES = [(2, 2), (3, 3), (3, 5), (2, 5)]  # sequences, positions


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


NEVER = {"doubled by a kernel", "doubled by a kernel, in words", "turned and flat"}
NEVER |= {"the other way round"}  # known without being said; the others where sizes are alike


def said(served: Any, rows: Any) -> Any:
    return declare_rows(served.model.lin, rows)


def expected(served: Any, names: list[str], x: Tensor) -> Tensor:
    return torch.cat([served.alone(name, row[None]) for name, row in zip(names, x, strict=True)])


@ways
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", RIGHT)
def test_rows_are_their_own(case: str, mode: Any, way: Any) -> None:
    """In any order of calls, each tenant's row also its own gradient."""
    call, rows = RIGHT[case]
    # With nothing beside the middle layer, what it makes is nobody's that following knows.
    served = way(Model(call), LAYERS)
    with mode():
        for b, t in (*SHAPES, *reversed(SHAPES)):
            x = torch.randn(b, t, K, dtype=torch.float64)
            x.requires_grad_(torch.is_grad_enabled())
            for names in (NAMES[:b], NAMES[-b:]):
                alone = torch.cat(
                    [
                        said_alone(served, rows, name, row[None])
                        for name, row in zip(names, x, strict=True)
                    ]
                )
                if rows is None:
                    mixed = served(names, x)
                else:
                    with said(served, rows(b, t)):
                        mixed = served(names, x)
                torch.testing.assert_close(mixed, alone)
                if torch.is_grad_enabled():
                    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (mixed, alone)]
                    torch.testing.assert_close(*grads)
                if rows is not None and (b == t or case in NEVER):
                    with pytest.raises(ValueError, match=r"lin was called with x.*declare_rows"):
                        served(names, x)


def said_alone(served: Any, rows: Rows | None, name: str, x: Tensor) -> Tensor:
    """By one adapter, of which nothing need be said, and nothing said is an error."""
    y = served.alone(name, x)
    if rows is not None:
        with said(served, rows(1, x.shape[1])):
            assert torch.equal(served.alone(name, x), y)
            if isinstance(served, Native):
                torch.testing.assert_close(served([name], x), y)
    return y
