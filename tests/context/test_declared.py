"""Whose rows a layer's input has, as the caller says it: what each alone gets, or an error.

Of two and of three tenants, in a bank and by PEFT's adapter_names.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from declared_cases import (
    LAYERS,
    RIGHT,
    Rows,
    doubled,
    expected,
    said,
)
from rows_cases import NAMES, K, Model, Native, ways
from torch import Tensor, nn

from fused_lowrank import declare_rows

SHAPES = [(2, 2), (3, 3), (3, 5), (2, 5)]  # sequences, positions
NEVER = {"doubled by a kernel", "doubled by a kernel, in words", "turned and flat"}
NEVER |= {"the other way round"}  # known without being said; the others where sizes are alike


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


# --- what is refused ---

X = torch.randn(3, 2, K, dtype=torch.float64)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "too few": ([0, 1], ValueError, r"lin, .*x of \(6, K\).* numbers of \(2,\), .*first dim"),
    "too many": ([0] * 7, ValueError, r"lin, .*numbers of \(7,\)"),
    "unflattened": (torch.zeros(3, 2).long(), ValueError, r"lin, .*numbers of \(3, 2\)"),
    "a stranger": ([0, 1, 2, 3, 0, 1], ValueError, r"lin, .*sequence 3, .*names for 0 to 2"),
    "below": ([0, 1, 2, -1, 0, 1], ValueError, "has -1: sequences are counted from 0"),
    "a fraction": ([0.0] * 6, TypeError, r"integers .*not torch.float32"),
    "a mask": (torch.ones(6).bool(), TypeError, r"integers .*not torch.bool"),
    "one number": (torch.tensor(1), TypeError, r"integers .*not torch.int64 of \(\)"),
    "a truth": (True, TypeError, "integers .*not True"),
    "a word": ("rows", TypeError, "integers .*not 'rows'"),
    "names": (["a", "b"] * 3, TypeError, "integers .*not .*'a', 'b'"),
    "nothing": (None, TypeError, "integers .*not None"),
    "no dimension": (1, ValueError, r"lin, .*dimensions 0 to 0 before K, and it names 1"),
    "the last dimension": (-1, ValueError, r"lin, .*it names -1"),
    "a dimension of more": (0, ValueError, r"lin, .*dimension 0 of x is 6, and there are 3 seq"),
    "a function of too few": (lambda x: [0], ValueError, r"lin, .*numbers of \(1,\)"),
    "a function of nothing": (lambda x: None, TypeError, r"lin, called with x of \(6, K\): rows"),
}


@ways
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_an_error(case: str, way: Any) -> None:
    """And the next call is as if it had not been."""
    served = way(Model(RIGHT["turned and flat"][0]), LAYERS)
    rows, kind, message = WRONG[case]
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(kind, match=message), said(served, rows):
                served(NAMES[:3], X)
            with said(served, [0, 1, 2] * 2):
                y = served(NAMES[:3], X)
            torch.testing.assert_close(y, expected(served, NAMES[:3], X))


@ways
@pytest.mark.parametrize("first", [True, False])
def test_what_is_known_to_be_otherwise_is_an_error(first: bool, way: Any) -> None:
    """In the first call, which is followed, and in later ones."""
    served = way(Model(lambda lin, x: lin(x.transpose(0, 1)).transpose(0, 1)), LAYERS)
    x = torch.randn(3, 3, K, dtype=torch.float64)
    right = expected(served, NAMES[:3], x)
    agreeing = (1, torch.arange(3).expand(3, 3), lambda x: 1)
    if not first:
        with said(served, agreeing[1]):
            torch.testing.assert_close(served(NAMES[:3], x), right)
    for rows in (0, [0, 1, 2], [2, 1, 0], torch.tensor([[0, 1, 2], [0, 1, 2], [0, 2, 1]])):
        with pytest.raises(ValueError, match="something else of lin"), said(served, rows):
            served(NAMES[:3], x)
    for rows in agreeing:
        with said(served, rows):
            torch.testing.assert_close(served(NAMES[:3], x), right)
    torch.testing.assert_close(served(NAMES[:3], x), right)


@ways
def test_other_layers_are_not_meant(way: Any) -> None:
    """What is said of one, or was said before, is nothing that another may go by."""
    served = way(Model(lambda lin, x: lin(doubled(x)).chunk(2)[1]), LAYERS)
    x = torch.randn(2, 2, K, dtype=torch.float64)
    for _ in range(2):
        with declare_rows(served.model.last, 0), pytest.raises(ValueError, match="lin was called"):
            served(NAMES[:2], x)
        with said(served, [0, 1, 0, 1]):
            served(NAMES[:2], x)
        with pytest.raises(ValueError, match="lin was called"):
            served(NAMES[:2], x)
        with declare_rows(nn.Linear(2, 2), 0), pytest.raises(ValueError, match="lin was called"):
            served(NAMES[:2], x)


@ways
def test_what_was_said_is_not_taken_for_known(way: Any) -> None:
    """Rows in an order of their own, as many as sequences: errors again when nothing is said."""
    served = way(Model(lambda lin, x: lin(x[x[:, 0, 0].argsort()])), LAYERS)
    x = torch.randn(3, 2, K, dtype=torch.float64)
    for _ in range(3):
        with said(served, lambda x: [0, 1, 2]):
            served(NAMES[:3], x)
        for other in (served.model.last, nn.Linear(2, 2)):
            with declare_rows(other, 0), pytest.raises(ValueError, match="lin was called"):
                served(NAMES[:3], x)
        with pytest.raises(ValueError, match="lin was called"):
            served(NAMES[:3], x)


def test_how_it_is_entered() -> None:
    lin = nn.Linear(2, 2)
    once = declare_rows(lin, 0)
    with once, pytest.raises(RuntimeError, match="entered already"), once:
        raise AssertionError
    other: Any = "lin"
    with pytest.raises(TypeError, match="module is a str"), declare_rows(other, 0):
        raise AssertionError


@ways
def test_what_was_said_last_counts(way: Any) -> None:
    """Of a module and what is in it; numbers that change afterwards are as they were."""
    served = way(Model(lambda lin, x: lin(doubled(x)).chunk(2)[1]), LAYERS)
    x = torch.randn(2, 3, K, dtype=torch.float64)
    right = expected(served, NAMES[:2], x)
    numbers = torch.tensor([0, 1, 0, 1])
    with (
        declare_rows(served.model, [1, 1, 1, 1]),
        said(served, [1, 1, 1, 1]),
        said(served, numbers),
    ):
        numbers.fill_(1)
        with declare_rows(served.model.first, 0), declare_rows(served.model.last, 0):
            torch.testing.assert_close(served(NAMES[:2], x), right)


# --- whose batch the model's is not ---


@ways
def test_a_batch_that_the_caller_has_made(way: Any) -> None:
    """Doubled for guidance, or pieces of documents: of the whole model at once."""
    served = way(Model(lambda lin, x: lin(x)), LAYERS)
    x = torch.randn(5, 4, K, dtype=torch.float64)
    for whose in ([0, 0, 1, 2, 2], [2, 1, 0, 0, 0], torch.tensor([0, 1, 2, 0, 1])):
        with declare_rows(served.model, whose):
            y = served(NAMES[:3], x)
        torch.testing.assert_close(y, expected(served, [NAMES[i] for i in whose], x))
    pair = torch.cat([x[:2], x[:2]])
    with declare_rows(served.model, [0, 1, 0, 1]):
        y = served(NAMES[:2], pair)
    torch.testing.assert_close(y, expected(served, NAMES[:2] * 2, pair))


# --- mixtures, handles, training ---


def test_mixtures_and_handles() -> None:
    """A buffer of handles is read when a layer runs."""
    served = Native(Model(lambda lin, x: lin(doubled(x)).chunk(2)[1]), LAYERS)
    x = torch.randn(2, 2, K, dtype=torch.float64)
    pairs, weights = [["a", "b"], ["c", None]], torch.tensor([[0.5, 2.0], [-1.0, 1.0]])
    with served.bank.use(pairs, weights), said(served, [0, 1, 0, 1]):
        y = served.model(x)
    for i in range(2):
        with served.bank.use(pairs[i : i + 1], weights[i : i + 1]):
            torch.testing.assert_close(y[i : i + 1], served.model(x[i : i + 1]))
    buffer = served.bank.handles(["a", "b"])
    with torch.no_grad(), served.bank.use(buffer), said(served, [0, 1, 0, 1]):
        for names in (["a", "b"], ["d", "c"], ["b", "b"]):
            buffer.copy_(served.bank.handles(names))
            torch.testing.assert_close(served.model(x), expected(served, names, x))


@pytest.mark.parametrize("case", ["experts", "doubled by a kernel", "turned by a kernel"])
def test_training_many(case: str) -> None:
    """Each adapter's gradient is of its own rows, and an adapter without rows has none."""
    call, rows = RIGHT[case]
    served = Native(Model(call), LAYERS)
    x = torch.randn(3, 3, K, dtype=torch.float64)
    trained = served.bank.trainable(NAMES)
    with trained.use(NAMES[:3]):
        if rows is None:
            loss = served.model(x).square().sum()
        else:
            with said(served, rows(3, 3)):
                loss = served.model(x).square().sum()
    loss.backward()
    mixed = [parameter.grad.clone() for parameter in trained.parameters()]
    for parameter in trained.parameters():
        parameter.grad = None
    for i, name in enumerate(NAMES[:3]):
        with trained.use([name]):
            served.model(x[i : i + 1]).square().sum().backward()
    alone = [parameter.grad for parameter in trained.parameters()]
    torch.testing.assert_close(mixed, alone)
