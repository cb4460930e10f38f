"""The code-search example's data and metrics."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tqdm")
EXAMPLES = Path(__file__).parents[2] / "examples"

SOURCE = '''
def outer(path, mode="r"):
    """Open the file and
    count its lines.

    A second paragraph.
    """
    def inner(line):
        """Say whether this line is counted."""
        return bool(line)
    return sum(inner(x) for x in open(path, mode)) or outer(path)

def short():
    """Too short."""
    return 1

def empty():
    """A docstring but nothing besides it."""

def undocumented():
    return 2
'''


@pytest.fixture(scope="module")
def demo():
    """The example as a module; it finds its sibling as it does when run as a script."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("code_search", EXAMPLES / "code_search.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["code_search"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def data(demo):
    """The module the example takes its pairs from."""
    return sys.modules["code_search_data"]


@pytest.fixture(scope="module")
def pairs(demo):
    """Pairs from a few small packages of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        pair
        for package in ("json", "logging", "email", "asyncio", "urllib", "xml")
        for pair in demo.collect_pairs(root / package)
    ]


def test_query_and_code(data):
    found = dict(data.read_functions(SOURCE))
    assert set(found) == {
        "Open the file and count its lines.",
        "Say whether this line is counted.",
    }
    outer = found["Open the file and count its lines."]
    assert outer.startswith("def f(path, mode='r'):")
    assert outer.endswith("or f(path)")
    for gone in ("outer", "Open the file", "second paragraph", "Say whether"):
        assert gone not in outer


def test_no_docstring_in_its_code(pairs):
    assert len(pairs) > 200
    for pair in pairs:
        assert pair.query not in " ".join(pair.code.split())


def test_no_duplicates_and_deterministic(demo):
    root = Path(sysconfig.get_path("stdlib")) / "logging"
    pairs = demo.collect_pairs(root)
    assert pairs == demo.collect_pairs(root)
    assert len({p.query for p in pairs}) == len({p.code for p in pairs}) == len(pairs)


def test_skips_what_is_not_the_library(data, tmp_path):
    for folder in ("site-packages", "test", "package"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "module.py").write_text(
            f'def g(x):\n    """Return x from {folder}."""\n    return x, "{folder}"\n'
        )
    (tmp_path / "broken.py").write_text("def (")
    assert [(p.module, p.query) for p in data.collect_pairs(tmp_path)] == [
        ("package", "Return x from package.")
    ]


def test_no_module_on_both_sides(demo, data):
    pairs = [data.Pair(f"module{i % 50}", f"query {i}", f"code {i}") for i in range(500)]
    training, held_out = demo.split_pairs(pairs)
    assert training
    assert held_out
    assert len(training) + len(held_out) == len(pairs)
    assert not {p.module for p in training} & {p.module for p in held_out}
    assert demo.split_pairs(pairs) == (training, held_out)


def test_ranks(demo):
    assert demo.answer_ranks(np.eye(4)).tolist() == [1, 1, 1, 1]
    scores = np.array([[0.5, 0.9, 0.1], [0.3, 0.2, 0.4], [0.0, 0.1, 0.1]])
    assert demo.answer_ranks(scores).tolist() == [2, 3, 2]  # the last is a tie


def test_interval(demo):
    assert demo.mean_interval(np.ones(10), seed=0) == (1.0, 1.0, 1.0)
    values = np.random.default_rng(1).normal(size=400)
    mean, low, high = demo.mean_interval(values, seed=0)
    assert mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (mean - low, high - mean) == (pytest.approx(half, rel=0.15),) * 2
    assert demo.mean_interval(values, seed=0) == (mean, low, high)


def test_batches(demo):
    batches = demo.make_batches(300, steps=20, batch=7, seed=3)
    again = demo.make_batches(300, steps=20, batch=7, seed=3)
    assert [b.tolist() for b in batches] == [b.tolist() for b in again]
    assert [len(b) for b in batches] == [7] * 20
    assert len(set(np.concatenate(batches).tolist())) == 140  # no pair twice in a pass
    with pytest.raises(SystemExit, match="training pairs"):
        demo.make_batches(3, steps=1, batch=4, seed=0)
