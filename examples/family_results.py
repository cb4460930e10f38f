"""The table and the figure of the comparison of the family (family.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from code_search import mean_interval
from family_runs import FROZEN, Variant

Lines = list[dict[str, Any]]
Interval = tuple[float, float]  # mean, half of the 95% interval over the seeds; NaN with one seed
STUDENT = {2: 12.706, 3: 4.303}  # the 97.5% quantile of Student's t for so many values

HEAD = """\
MRR is the mean of 1 / rank of a held-out query's own function among {held_out_pairs}; the loss is
that of choosing it, in nats. After ± is half of the 95% interval over {seeds} seeds (Student's t),
which differ in first values and batches; in brackets is the 95% interval over the queries
(bootstrap) of the mean over the seeds. Differences are paired, by seed and by query. Two are told
apart where both intervals of their MRR's difference are on one side of zero; * is at a difference
in loss whose interval over the seeds is. Of {compared} comparisons some may be so by chance.

{steps} steps of {batch} pairs, in the last {layers} of the encoder's layers. {runs} runs, with
those that search for learning rates: {hours:.1f} hours of one thread ({machine}).
"""


def by_rate(lines: Lines, name: str, seed: int) -> dict[int, dict[str, Any]]:
    """The runs of a variant with a seed, by the power of the learning rate."""
    return {x["power"]: x for x in lines if x["variant"] == name and x["seed"] == seed}


def best_power(rows: dict[int, dict[str, Any]]) -> int:
    """The power of the learning rate with the least validation loss."""
    return min(rows, key=lambda power: (rows[power]["validation_loss"], abs(power)))


@dataclass
class Row:
    """What the runs of a variant at its learning rate gave."""

    variant: Variant
    lr: float
    trained: int
    seeds: list[int]
    mrr: dict[int, float]  # by seed
    loss: dict[int, float]
    queries: dict[int, np.ndarray]  # 1 / rank by query


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean with half of its 95% interval by Student's t."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(STUDENT[len(values)] * spread)


def make_rows(lines: Lines, every: Sequence[Variant]) -> dict[str, Row]:
    """The rows of those that have runs, by name, in the order of `every`."""
    seeds = sorted({line["seed"] for line in lines})
    rows = {}
    for variant in every:
        searched = by_rate(lines, variant.name, seeds[0])
        if not searched:
            continue
        power = best_power(searched)
        runs = {s: by_rate(lines, variant.name, s).get(power) for s in seeds}
        found = {s: line for s, line in runs.items() if line is not None}
        first = found[seeds[0]]
        rows[variant.name] = Row(
            variant,
            first["lr"],
            first["trained"],
            list(found),
            {s: line["mrr"] for s, line in found.items()},
            {s: line["loss"] for s, line in found.items()},
            {s: 1 / np.array(line["ranks"]) for s, line in found.items()},
        )
    return rows


@dataclass
class Difference:
    """A row less the one that it is held against."""

    mrr: Interval
    loss: Interval
    queries: tuple[float, float, float]

    @property
    def verdict(self) -> str:
        """Better or worse where both intervals of the MRR say so."""
        mean, half = self.mrr
        _, low, high = self.queries
        if not abs(mean) > half or not (low > 0 or high < 0):
            return "not told apart"
        return "better" if mean > 0 else "worse"


def difference(row: Row, rows: dict[str, Row], against: str) -> Difference | None:
    """The difference from another row, over the seeds that both have; None from itself."""
    other = rows.get(against)
    if other is None or other is row:
        return None
    frozen = against == FROZEN  # it has no seeds
    seeds = [s for s in row.seeds if frozen or s in other.seeds]
    first = other.seeds[0]

    def of(one: dict[int, Any], two: dict[int, Any]) -> list[Any]:
        return [one[s] - two[first if frozen else s] for s in seeds]

    return Difference(
        over_seeds(of(row.mrr, other.mrr)),
        over_seeds(of(row.loss, other.loss)),
        mean_interval(np.mean(of(row.queries, other.queries), axis=0), seed=0),
    )


# --------------------------------------------------------------------------------------- table


def shown(interval: Interval, sign: str = "") -> str:
    """A mean with its interval over the seeds, if there is one."""
    mean, half = interval
    return f"{mean:{sign}.3f}" if np.isnan(half) else f"{mean:{sign}.3f} ± {half:.3f}"


def bracketed(triple: tuple[float, float, float]) -> str:
    """The interval over the queries."""
    return f"[{triple[1]:+.3f}, {triple[2]:+.3f}]"


def cells(row: Row, rows: dict[str, Row], seeds: int) -> list[str]:
    """A line of the table."""
    name = row.variant.name
    few = row.trained and len(row.seeds) < seeds
    gain, other = (difference(row, rows, base) for base in (FROZEN, row.variant.against))
    return [
        f"{name} ({len(row.seeds)} of {seeds} seeds)" if few else name,
        f"{row.trained:,}" if row.trained else "-",
        f"{row.lr:.1e}" if row.trained else "-",
        shown(over_seeds([*row.mrr.values()])),
        shown(over_seeds([*row.loss.values()])),
        f"{shown(gain.mrr, '+')} {bracketed(gain.queries)}" if gain else "-",
        *(
            (
                row.variant.against,
                f"{shown(other.mrr, '+')} {bracketed(other.queries)}",
                shown(other.loss, "+") + (" *" if abs(other.loss[0]) > other.loss[1] else ""),
                other.verdict,
            )
            if other and row.trained
            else ("-",) * 4
        ),
    ]


def make_table(lines: Lines, every: Sequence[Variant]) -> str:
    """All results as Markdown, a table for each question."""
    rows = make_rows(lines, every)
    seeds = len({line["seed"] for line in lines})
    trained = [row for row in rows.values() if row.trained]
    differences = [difference(row, rows, row.variant.against) for row in trained]
    machines = sorted({line["machine"]["cpu"] for line in lines})
    parts = [
        "# Every method on code search\n",
        HEAD.format(
            **{name: lines[0]["setup"][name] for name in ("held_out_pairs", "steps", "batch")},
            layers=lines[0]["setup"]["layers"],
            seeds=seeds,
            compared=sum(d is not None for d in differences),
            runs=len(lines),
            hours=sum(line["processor_seconds"] for line in lines) / 3600,
            machine=", ".join(machines),
        ),
    ]
    for question, group in groupby(rows.values(), lambda row: row.variant.question):
        head = ["", "trained", "learning rate", "MRR", "loss", "MRR gain over frozen"]
        head += ["against", "MRR difference", "loss difference", "told apart"]
        own = [head, ["---"] * len(head), *(cells(row, rows, seeds) for row in group)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in own)
        parts.append(f"## {question}\n\n{table}\n")
    return "\n".join(parts)


# -------------------------------------------------------------------------------------- figure


def draw(rows: dict[str, Row], path: Path) -> None:
    """MRR of each row with its seeds, and the difference from the one it is held against."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.34 * len(rows) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    questions = list(dict.fromkeys(row.variant.question for row in rows.values()))
    labels = []
    for y, row in enumerate(rows.values()):
        color = f"C{questions.index(row.variant.question)}"
        labels.append(f"{row.variant.name} ({row.trained:,})")
        mean, half = over_seeds([*row.mrr.values()])
        left.scatter([*row.mrr.values()], [y] * len(row.mrr), color=color, alpha=0.35, s=14)
        left.errorbar(mean, y, xerr=np.nan_to_num(half), color=color, fmt="o", capsize=3)
        other = difference(row, rows, row.variant.against)
        if other is None or not row.trained:
            continue
        mean, low, high = other.queries
        right.plot([low, high], [y, y], color=color, alpha=0.3, linewidth=6)
        half = np.nan_to_num(other.mrr[1])
        right.errorbar(other.mrr[0], y, xerr=half, color=color, fmt="o", capsize=3)
        text = f" against {row.variant.against}"
        right.annotate(text, (1, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    left.axvline(np.mean([*rows[FROZEN].mrr.values()]), color="black", linewidth=0.8, linestyle=":")
    right.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(rows)), labels)
    left.invert_yaxis()
    left.set_xlabel("MRR (dotted: the frozen encoder)")
    right.set_xlabel("MRR difference, paired")
    left.set_title("Each seed, the mean, 95% over seeds", fontsize=10)
    right.set_title("95%: thin over seeds, thick over queries", fontsize=10)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)


def write_results(lines: Lines, every: Sequence[Variant], folder: Path) -> str:
    """Write family.md and family.png; the text of the former."""
    table = make_table(lines, every)
    (folder / "family.md").write_text(table)
    draw(make_rows(lines, every), folder / "family.png")
    return table
