"""Which rows of a layer's input are whose: right wherever the sequences are in it, or an error.

Every model is called by a bank and by PEFT's adapter_names, with as many positions as sequences and
with others, in its first call and in later ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rows_cases import NAMES, K, Model, experts, ways
from torch import Tensor, nn

SHAPES = [(4, 4), (2, 6), (3, 3), (4, 1), (4, 2)]  # sequences, positions


def buffered(lin: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[1], x.shape[0], K, dtype=x.dtype)
    for position in range(x.shape[1]):
        out[position] = torch.tanh(x[:, position])
    return lin(out).transpose(0, 1)


def windows(lin: nn.Module, x: Tensor) -> Tensor:
    """Pairs of columns of each sequence, beside each other."""
    b, t, _ = x.shape
    wide = x[:, :, None].expand(b, t, 4, K).reshape(b, t, 2, 2, K).permute(0, 2, 1, 3, 4)
    out = lin(wide.reshape(b * 2, t * 2, K))
    return out.view(b, 2, t, 2, K).mean((1, 3))


def by_numbers(lin: nn.Module, x: Tensor) -> Tensor:
    rows = x[torch.arange(len(x)), torch.full((len(x),), x.shape[1] - 1)]
    return lin(rows)[:, None]


def in_two_ways(lin: nn.Module, x: Tensor) -> Tensor:
    return lin(lin(x).transpose(0, 1)).transpose(0, 1)


def attended(lin: nn.Module, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    q = lin(x).reshape(x.shape[0], x.shape[1] * 2, K // 2).transpose(0, 1)
    out = (q @ q.transpose(1, 2)).softmax(-1) @ q
    out = out.transpose(0, 1).reshape(x.shape)
    return lin(nn.functional.layer_norm(out, (K,))).transpose(0, 1)


def written(out: Tensor, x: Tensor) -> Tensor:
    """x, copied into `out` one sequence after the other, each to its own place."""
    return out.index_put((torch.arange(len(x)),), x)


def last_replaced(lin: nn.Module, x: Tensor) -> Tensor:
    rows, column = torch.arange(len(x)), torch.tensor([x.shape[1] - 1])
    out = x.clone()
    out[rows, column] = lin(x[:, -1])
    out[:, column] = lin(out[:, column])
    return lin(out.index_copy(1, column, -x[:, -1:]))


RIGHT: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "batch first": lambda lin, x: lin(x),
    "time first": lambda lin, x: lin(x.transpose(0, 1)).transpose(0, 1),
    "time first, copied": lambda lin, x: lin(x.transpose(0, 1).contiguous()).transpose(0, 1),
    "flat": lambda lin, x: lin(x.reshape(-1, K)).view_as(x),
    "flat, time first": lambda lin, x: (
        lin(x.transpose(0, 1).reshape(-1, K)).view(x.shape[1], x.shape[0], K).transpose(0, 1)
    ),
    "doubled": lambda lin, x: lin(torch.cat([x, 2 * x])).chunk(2)[1],
    "repeated": lambda lin, x: lin(x.repeat(3, 1, 1))[: len(x)],
    "interleaved": lambda lin, x: lin(x.repeat_interleave(2, 0))[::2],
    "stacked": lambda lin, x: lin(torch.stack([x, -x])).sum(0),
    "last": lambda lin, x: lin(x[:, -1])[:, None],
    "mean": lambda lin, x: lin(x.mean(1, keepdim=True)),
    "buffered": buffered,
    "windows": windows,
    "by numbers": by_numbers,
    "written by numbers": lambda lin, x: lin(written(torch.zeros_like(x), x)),
    "overwritten by numbers": lambda lin, x: lin(written(x.clone(), -x)),
    "last replaced": last_replaced,
    "in two ways": in_two_ways,
    "attended": attended,
}


def expected(served: Any, names: list[str], x: Tensor) -> Tensor:
    return torch.cat([served.alone(name, row[None]) for name, row in zip(names, x, strict=True)])


@ways
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", RIGHT)
def test_rows_are_their_own(case: str, mode: Any, way: Any) -> None:
    """In any order of calls, the first one where sizes say nothing."""
    served = way(Model(RIGHT[case]), ["first", "lin", "last"])
    with mode():
        for sequences, positions in (*SHAPES, *reversed(SHAPES)):
            x = torch.randn(sequences, positions, K, dtype=torch.float64)
            names = NAMES[-sequences:]
            torch.testing.assert_close(served(names, x), expected(served, names, x))


def turned(x: Tensor) -> Tensor:
    return torch.arange(len(x) - 1, -1, -1)


def swapped(x: Tensor) -> Tensor:
    x = x.clone()
    x[[0, 1]] = x[[1, 0]]
    return x


REFUSED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "experts": experts,
    "in another order": lambda lin, x: lin(x[torch.randperm(len(x))]),
    "sorted": lambda lin, x: lin(x.sort(0).values),
    "the other way round": lambda lin, x: lin(x.flip(0)),
    "written in another order": lambda lin, x: lin(torch.zeros_like(x).index_copy(0, turned(x), x)),
    "put in another order": lambda lin, x: lin(torch.empty_like(x).index_put((turned(x),), x)),
    "overwritten in another order": lambda lin, x: lin(x.clone().index_put((turned(x),), x)),
    "added in another order": lambda lin, x: lin(torch.zeros_like(x).index_add(0, turned(x), x)),
    "scattered in another order": lambda lin, x: lin(
        x.clone().scatter_(0, turned(x).view(-1, 1, 1).expand_as(x), x)
    ),
    "swapped": lambda lin, x: lin(swapped(x)),
    "shifted": lambda lin, x: lin(x.roll(1, 0)),
    "of all": lambda lin, x: lin(x.mean(0, keepdim=True).expand_as(x)),
    "some": lambda lin, x: lin(torch.cat([x[1:], x[:1]])),
    "of the weights": lambda lin, x: lin(
        lin.base_layer.weight if hasattr(lin, "base_layer") else lin.weight
    )[: x.shape[1]],
}


@ways
@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_are_of_no_one_sequence_are_an_error(case: str, way: Any) -> None:
    """It names the layer, and nothing else is disturbed by it."""
    served = way(Model(REFUSED[case]), ["first", "lin", "last"])
    for sequences, positions in ((4, 4), (2, 8), (4, 4)):
        x = torch.randn(sequences, positions, K, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"lin was called with x of .*exclude_modules"):
            served(NAMES[:sequences], x)
        assert served.alone("a", x).shape == x.shape
    served = way(Model(REFUSED[case]), ["first", "last"])
    if case == "experts":  # what comes back to its place may go on
        x = torch.randn(4, 4, K, dtype=torch.float64)
        y = served(NAMES, x)
        for i, name in enumerate(NAMES):
            torch.testing.assert_close(y[i], served.alone(name, x)[i])


@ways
def test_a_batch_that_is_not_named_row_by_row(way: Any) -> None:
    """Doubled, repeated, flattened or turned before it: the caller knows whose rows they are."""
    served = way(Model(lambda lin, x: lin(x)), ["first", "lin", "last"])
    x = torch.randn(2, 3, K, dtype=torch.float64)
    for given in (
        torch.cat([x, x]),
        x.repeat_interleave(2, 0),
        x.reshape(-1, K),
        x.transpose(0, 1),
        x.repeat(3, 1, 1),
    ):
        with pytest.raises(ValueError, match=r"first was called with x of .*2 adapters"):
            served(["a", "b"], given)
        names = ["a", "b"] * len(given)
        y = served(names[: len(given)], given)
        torch.testing.assert_close(y, expected(served, names[: len(given)], given))


class Chosen(Model):
    """A model whose layer has the sequences in another dimension if the caller says so."""

    def forward(self, x: Tensor, way: Any = None) -> Tensor:
        call = RIGHT[{True: "time first", 2: "flat, time first"}.get(way, way) or "flat"]
        return self.last(self.first(x) + call(self.lin, x))


@ways
@pytest.mark.parametrize("by_name", [True, False])
def test_what_an_argument_chooses_is_followed_anew(by_name: bool, way: Any) -> None:
    """Sizes would not show that the layer is called in another way now."""
    served = way(Chosen(), ["first", "lin", "last"])
    for choice in (False, True, 2, "batch first", "flat, time first", "flat", True, False):
        for sequences, positions in ((2, 2), (2, 4)):
            x = torch.randn(sequences, positions, K, dtype=torch.float64)
            args, kwargs = ((x,), {"way": choice}) if by_name else ((x, choice), {})
            y = served(["a", "b"], *args, **kwargs)
            for i, name in enumerate("ab"):
                torch.testing.assert_close(y[i], served.alone(name, *args, **kwargs)[i])


@ways
def test_windows_that_were_one_in_the_first_call(way: Any) -> None:
    """It is an error once; from then on every call is followed."""

    def windowed(lin: nn.Module, x: Tensor) -> Tensor:
        return lin(x.reshape(-1, 3, K)).view_as(x)

    served = way(Model(windowed), ["first", "lin", "last"])
    x = torch.randn(2, 6, K, dtype=torch.float64)
    served(["a", "b"], x[:, :3])
    with pytest.raises(ValueError, match="every call is followed, so call it again"):
        served(["a", "b"], x)
    for given in (x, x[:, :3], x):
        torch.testing.assert_close(served(["a", "b"], given), expected(served, ["a", "b"], given))
