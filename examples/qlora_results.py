"""The table and the figure of adapters over an nf4 and a 16-bit base (qlora.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from code_search import mean_interval
from family_results import Difference, Lines, bracketed, over_seeds, shown

BASES = ("bf16", "nf4")
FROZEN = "frozen"
MIB = 2**20
WINDOW = 7  # steps that a curve is smoothed over: batches differ more than methods do

HEAD = """\
MRR is the mean of 1 / rank of a held-out query's own function among {held_out_pairs}; the loss is
that of choosing it, in nats. After ± is half of the 95% interval over {seeds} seeds (Student's t),
which differ in first values and batches; in brackets is the 95% interval over the queries
(bootstrap) of the mean over the seeds. Differences are paired, by seed and by query: nf4 less bf16,
and a method less the frozen encoder of its own base. Two are told apart where both intervals of
their MRR's difference are on one side of zero.

Memory is in MiB. *Linear weights* are those of the encoder's linear layers as they are stored:
codes, maxima and tables of nf4. *Model* has everything else of the encoder too, its embeddings
above all, which stay in 16 bits. *Saved* is what a step of {batch} pairs keeps for the backward,
without the model's own tensors; *peak* is the most that such a step, with AdamW's, allocates at a
time beside the model and the optimiser's state. The last column is the model and the peak.

{steps} steps of {batch} pairs, all linear layers adapted. {runs} runs, {minutes:.0f} minutes of
processor time ({machine}).
"""


@dataclass
class Row:
    """What the runs of a method over a base gave."""

    base: str
    method: str
    lines: dict[int, dict[str, Any]]  # by the seed

    def of(self, key: str) -> dict[int, Any]:
        """A value of each seed."""
        return {seed: line[key] for seed, line in self.lines.items()}

    @property
    def first(self) -> dict[str, Any]:
        """The line of the first seed: sizes are those of all."""
        return next(iter(self.lines.values()))


Rows = dict[tuple[str, str], Row]  # by base and method


def make_rows(lines: Lines) -> Rows:
    """The rows of all lines, by method and base, in the order of the lines."""
    names = dict.fromkeys(line["method"] for line in lines)
    rows: Rows = {}
    for name in names:
        for base in BASES:
            own = [line for line in lines if (line["base"], line["method"]) == (base, name)]
            if own:
                rows[base, name] = Row(base, name, {line["seed"]: line for line in own})
    return rows


def difference(one: Row, two: Row | None) -> Difference | None:
    """One row less another, over the seeds that both have; a frozen encoder has no seeds."""
    if two is None or two is one:
        return None
    constant = [row.first if row.method == FROZEN else None for row in (one, two)]
    seeds = [*one.lines] if constant[1] else [s for s in one.lines if s in two.lines]
    if not seeds:
        return None
    pairs = [(constant[0] or one.lines[s], constant[1] or two.lines[s]) for s in seeds]
    queries = [1 / np.array(a["ranks"]) - 1 / np.array(b["ranks"]) for a, b in pairs]
    return Difference(
        over_seeds([a["mrr"] - b["mrr"] for a, b in pairs]),
        over_seeds([a["loss"] - b["loss"] for a, b in pairs]),
        mean_interval(np.mean(queries, axis=0), seed=0),
    )


# --------------------------------------------------------------------------------------- table


def quality(row: Row, rows: Rows) -> list[str]:
    """A line of the table of quality."""
    gain = difference(row, rows.get((row.base, FROZEN)))
    other = difference(row, rows.get((BASES[0], row.method)))
    trained = row.first["trained"]
    return [
        f"{row.method}, {row.base}",
        f"{trained:,}" if trained else "-",
        f"{row.first['lr']:.1e}" if trained else "-",
        shown(over_seeds([*row.of("mrr").values()])),
        shown(over_seeds([*row.of("loss").values()])),
        f"{shown(gain.mrr, '+')} {bracketed(gain.queries)}" if gain else "-",
        *(
            (
                f"{shown(other.mrr, '+')} {bracketed(other.queries)}",
                shown(other.loss, "+"),
                told_apart(other, row),
            )
            if other
            else ("-",) * 3
        ),
    ]


def told_apart(other: Difference, row: Row) -> str:
    """The verdict; of frozen encoders by the queries alone, for they have no seeds."""
    if row.method != FROZEN:
        return other.verdict
    mean, low, high = other.queries
    if not (low > 0 or high < 0):
        return "not told apart"
    return "better" if mean > 0 else "worse"


def memory(row: Row) -> list[str]:
    """A line of the table of memory."""
    line = row.first
    own = [line[f"{part}_bytes"] / MIB for part in ("linear", "model", "saved", "peak")]
    return [f"{row.method}, {row.base}", *(f"{n:.1f}" for n in (*own, own[1] + own[3]))]


def table(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def make_table(lines: Lines) -> str:
    """All results as Markdown."""
    rows = make_rows(lines)
    setup = lines[0]["setup"]
    versions = {
        f"{line['machine']['cpu']}, threads: {line['machine']['threads']}, "
        f"torch {line['machine']['torch']}, bitsandbytes {line['machine']['bitsandbytes']}, "
        f"commit {line['machine']['commit']}"
        for line in lines
    }
    head = HEAD.format(
        **{name: setup[name] for name in ("held_out_pairs", "steps", "batch")},
        seeds=len({line["seed"] for line in lines}),
        runs=len(lines),
        minutes=sum(line["processor_seconds"] for line in lines) / 60,
        machine="; ".join(sorted(versions)),
    )
    of_quality = ["", "trained", "learning rate", "MRR", "loss", "MRR gain over frozen"]
    of_quality += ["MRR, nf4 less bf16", "loss, nf4 less bf16", "told apart"]
    of_memory = ["", "linear weights", "model", "saved", "peak", "model and peak"]
    trained = [row for row in rows.values() if row.method != FROZEN]
    return "\n".join(
        (
            "# Code search over an nf4 base\n",
            head,
            "## Quality\n",
            table(of_quality, [quality(row, rows) for row in rows.values()]) + "\n",
            "## Memory\n",
            table(of_memory, [memory(row) for row in trained]) + "\n",
        )
    )


# -------------------------------------------------------------------------------------- figure


def draw(rows: Rows, path: Path) -> None:
    """Loss curves, MRR with its seeds, and memory, of each method over each base."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    losses, found, sizes = figure.subplots(1, 3, width_ratios=[4, 3, 3])
    methods = list(dict.fromkeys(row.method for row in rows.values()))
    names = []
    for y, row in enumerate(rows.values()):
        color, dashed = f"C{methods.index(row.method)}", row.base != BASES[0]
        names.append(f"{row.method}, {row.base}")
        own = [*row.of("mrr").values()]
        mean, half = over_seeds(own)
        found.scatter(own, [y] * len(own), color=color, alpha=0.35, s=14)
        mark = {"fmt": "D" if dashed else "o", "fillstyle": "none" if dashed else "full"}
        found.errorbar(mean, y, xerr=np.nan_to_num(half), color=color, capsize=3, **mark)
        if row.method == FROZEN:
            continue
        curve = np.mean([*row.of("losses").values()], axis=0)
        window = min(WINDOW, len(curve))
        smooth = np.convolve(curve, np.full(window, 1 / window), mode="valid")
        style = "--" if dashed else "-"
        losses.plot(range(window, len(curve) + 1), smooth, style, color=color, label=names[-1])
        parts = [row.first["linear_bytes"], row.first["model_bytes"], row.first["peak_bytes"]]
        left = 0.0
        stacked = (parts[0], parts[1] - parts[0], parts[2])
        for size, alpha in zip(stacked, (1.0, 0.55, 0.25), strict=True):
            sizes.barh(y, size / MIB, left=left, color=color, alpha=alpha)
            left += size / MIB
    for axes in (found, sizes):
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    found.set_yticks(range(len(rows)), names)
    sizes.set_yticks(range(len(rows)), [])
    losses.set_xlabel("step")
    losses.set_ylabel("contrastive loss [nats]")
    losses.set_title(f"Training loss, mean of {WINDOW} steps and the seeds", fontsize=10)
    losses.grid(alpha=0.3)
    losses.legend(fontsize=8)
    found.set_xlabel("MRR")
    found.set_title("Held-out search: seeds, mean, 95%", fontsize=10)
    sizes.set_xlabel("MiB")
    sizes.set_title("Linear weights, rest of model, peak of a step", fontsize=10)
    figure.savefig(path, dpi=130)


def write_results(lines: Lines, folder: Path) -> str:
    """Write qlora.md and qlora.png; the text of the former."""
    text = make_table(lines)
    (folder / "qlora.md").write_text(text)
    draw(make_rows(lines), folder / "qlora.png")
    return text
