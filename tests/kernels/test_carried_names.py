"""No kernel has a name that Triton would forget to carry round a loop.

A name that is set before a loop, and again in its body, is carried round the loop if its value
after one visit of the body is another. In that visit what the body copies still has the value from
before the loop. So where `a = b` stands both before the loop and in it, a is taken for a constant,
without a word, whatever b becomes (read in Triton 3.6 and 3.7, and seen in what they compiled).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).resolve().parents[2] / "kernels").glob("*.py"))
Alike = frozenset[frozenset[str]]  # pairs of names of one value


def assigned(node: ast.stmt) -> Iterator[tuple[str, str | None]]:
    """(name, the name that it is made a copy of, or None) of each assignment in a statement."""
    for part in ast.walk(node):
        if isinstance(part, ast.Assign):
            for target in part.targets:
                yield from pairs(target, part.value)
        elif isinstance(part, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)):
            same = None if isinstance(part, ast.AugAssign) or part.value is None else part.value
            yield from pairs(part.target, same)
        elif isinstance(part, ast.For):
            yield from pairs(part.target, None)


def pairs(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[str, str | None]]:
    """The assignments in one target: of tuples, element by element where both sides have them."""
    if isinstance(target, ast.Name):
        yield target.id, value.id if isinstance(value, ast.Name) else None
    elif isinstance(target, (ast.Tuple, ast.List)):
        known = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
        for i, element in enumerate(target.elts):
            yield from pairs(element, value.elts[i] if known else None)


def after(node: ast.stmt, alike: Alike) -> Alike:
    """Which names may be copies of each other after a statement, given those before it."""
    for name, source in assigned(node):
        copies = {pair for pair in alike if name not in pair}
        if source is not None and source != name:
            copies |= {(pair - {source}) | {name} for pair in copies if source in pair}
            copies.add(frozenset((name, source)))
        alike = frozenset(pair for pair in copies if len(pair) == 2)
    return alike


def lost(body: list[ast.stmt], alike: Alike = frozenset()) -> Iterator[tuple[int, str]]:
    """(line, name) of each name that a loop copies where it was a copy of the same before it."""
    for node in body:
        if isinstance(node, (ast.For, ast.While)):
            for name, source in assigned(node):
                if source is not None and frozenset((name, source)) in alike:
                    yield node.lineno, name
        inside = frozenset() if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else alike
        for inner in ("body", "orelse"):
            yield from lost(getattr(node, inner, []), inside)
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            alike = after(node, alike)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_name_is_lost(path: Path) -> None:
    assert not list(lost(ast.parse(path.read_text()).body))


@pytest.mark.parametrize(
    "lines",
    [
        "before = index|for _ in range(n):|  free(before)|  before = index|  index = index + 1",
        "index, before = 0, index|while index < n:|  index, before = index + 1, index",
        "index = before|for _ in range(n):|  before = index|  index += 1",
        "a = b|c = a|for _ in range(n):|  c = b|  b += 1",
        "a = b|if x:|  for _ in range(n):|    if y:|      a = b|    b += 1",
    ],
)
def test_a_planted_one_is_found(lines: str) -> None:
    assert list(lost(ast.parse(lines.replace("|", "\n")).body))


@pytest.mark.parametrize(
    "lines",
    [
        "index = 0|for _ in range(n):|  free(behind(index))|  index = index + 1",
        "before = index|index = index + 1|for _ in range(n):|  before = index|  index += 1",
        "before = index|for _ in range(n):|  index = index + 1",
        "def f():|  a = b|def g():|  for _ in range(n):|    a = b",
    ],
)
def test_others_are_not(lines: str) -> None:
    assert not list(lost(ast.parse(lines.replace("|", "\n")).body))


def test_it_is_found_in_a_kernel() -> None:
    """The stage that is to be set free, in a name of its own instead of reckoned."""
    source = next(path for path in KERNELS if path.stem == "hopper").read_text()
    loop = "    for _ in range(1, steps):\n"
    planted = source.replace(loop, f"    before = index\n{loop}        before = index\n")
    assert planted != source
    assert list(lost(ast.parse(planted).body))
