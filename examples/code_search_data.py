"""Pairs of a description and a function, from the source of Python's own standard library."""

from __future__ import annotations

import ast
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}


@dataclass(frozen=True)
class Pair:
    """A docstring's first paragraph and the function it describes."""

    module: str
    query: str
    code: str


def read_functions(source: str) -> list[tuple[str, str]]:
    """(query, code) of every documented function in a module's source.

    The code has no docstring (nor have the functions nested in it), and the function's own name
    reads ``f`` wherever it stands as a word.
    """
    tree = ast.parse(source)
    documented = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        if not isinstance(node, ast.ClassDef) and len(node.body) > 1:
            documented.append((node, docstring))
        node.body = node.body[1:] or [ast.Pass()]
    found = []
    for node, docstring in documented:
        query = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())
        code = re.sub(rf"\b{re.escape(node.name)}\b", "f", ast.unparse(node))
        if len(query.split()) >= 4:
            found.append((query, code))
    return found


def collect_pairs(root: Path) -> list[Pair]:
    """Pairs from all modules under ``root``; no query and no code comes twice."""
    pairs: list[Pair] = []
    queries: set[str] = set()
    codes: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED.intersection(parts):
            continue
        try:
            found = read_functions(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for query, code in found:
            if query not in queries and code not in codes:
                queries.add(query)
                codes.add(code)
                pairs.append(Pair(parts[0].removesuffix(".py"), query, code))
    return pairs


def split_pairs(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: a checksum of its name puts a module on one side."""
    held_out = {p.module for p in pairs if zlib.crc32(p.module.encode()) % 5 == 0}
    return (
        [p for p in pairs if p.module not in held_out],
        [p for p in pairs if p.module in held_out],
    )
