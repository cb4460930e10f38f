"""The table and the figure of the comparison of the family (family.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from family_runs import Variant

Lines = list[dict[str, Any]]


def by_rate(lines: Lines, name: str, seed: int) -> dict[int, dict[str, Any]]:
    """The runs of a variant with a seed, by the power of the learning rate."""
    return {x["power"]: x for x in lines if x["variant"] == name and x["seed"] == seed}


def write_results(lines: Lines, every: list[Variant], folder: Path) -> str:
    """Write family.md and family.png; the former's text."""
    return ""
