"""The table and the figures of a comparison of adapters (code_search.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def print_table(rows: list[dict[str, Any]]) -> None:
    """The results as aligned text."""

    def interval(triple: tuple[float, float, float], sign: str = "") -> str:
        mean, low, high = triple
        return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    head = ("", "trained", "recall@1 [95%]", "MRR [95%]", "MRR gain [95%]", "s/step", "saved MiB")
    table = [head]
    for row in rows:
        gain = step = saved = "-"
        if row["trained"]:
            gain = interval(row["mrr_gain"], "+")
            step = f"{row['seconds_per_step']:.3f}"
            saved = f"{row['bytes_saved_for_backward'] / 2**20:.0f}"
        recall, mrr = interval(row["recall@1"]), interval(row["mrr"])
        table.append((row["run"], f"{row['trained']:,}", recall, mrr, gain, step, saved))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for label, *cells in table:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join((label.ljust(widths[0]), *right)))


def draw_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss over the steps: each step pale, the mean of the last ten strong."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        losses = row["losses"]
        if not losses:
            continue
        window = min(10, len(losses))
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        steps = np.arange(1, len(losses) + 1)
        label = f"{row['run']} ({row['trained']:,} trained)"
        axes.plot(steps, losses, color=f"C{i}", alpha=0.2, linewidth=1)
        axes.plot(steps[window - 1 :], smooth, color=f"C{i}", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("contrastive loss [nats]")
    axes.set_title("Training loss (pale: each step, strong: mean of the last 10)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def draw_quality(rows: list[dict[str, Any]], queries: int, path: Path) -> None:
    """MRR of each run, and its gain over the frozen encoder, with 95% intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[4, 3])
    for axes, key, shown in ((left, "mrr", rows), (right, "mrr_gain", rows[1:])):
        means, lows, highs = np.array([row[key] for row in shown]).T
        colors = [f"C{rows.index(row)}" for row in shown]
        bars = axes.bar(
            [f"{row['run']}\n{row['trained']:,} trained" for row in shown],
            means,
            yerr=[means - lows, highs - means],
            color=colors,
            width=0.65,
            capsize=5,
        )
        sign = "+" if key == "mrr_gain" else ""
        for bar, mean, high in zip(bars, means, highs, strict=True):
            middle = bar.get_x() + bar.get_width() / 2
            text = f"{mean:{sign}.3f}"
            axes.annotate(
                text, (middle, max(high, 0)), xytext=(0, 4), textcoords="offset points", ha="center"
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.margins(y=0.12)
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
        axes.tick_params(axis="x", labelsize=9)
    left.set_ylabel("MRR")
    left.set_title(f"Held-out search, {queries} queries")
    right.set_ylabel("MRR minus frozen")
    right.set_title("Gain over the frozen encoder (paired by query)")
    figure.savefig(path, dpi=150)
