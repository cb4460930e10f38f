"""The plots of the report. Each carries a digest of the figures that it shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Points = dict[str, list[tuple[Any, float]]]  # a curve's name → its (x, y)
Plot = dict[str, Any]
MARKERS = "osD^vP*X<>d"


def over(
    title: str, y_label: str, panels: dict[str, Points], *, log_y: bool = False, line: bool = False
) -> Plot:
    """Curves over the rows M, one panel per layer and method."""
    return {
        "kind": "over",
        "title": title,
        "y": y_label,
        "panels": panels,
        "log_y": log_y,
        "line": line,
    }


def dots(title: str, x_label: str, points: Points) -> Plot:
    """One line of dots per case."""
    return {"kind": "dots", "title": title, "x": x_label, "points": points}


def digest(plot: Plot) -> str:
    """A digest of the data that a plot is drawn from."""
    return hashlib.sha256(json.dumps(plot, sort_keys=True).encode()).hexdigest()


def shows(path: Path, plot: Plot) -> bool:
    """Whether a file is there and was drawn from this."""
    return path.exists() and digest(plot).encode() in path.read_bytes()


def save(path: Path, plot: Plot) -> None:
    """Draw a plot; the same bytes each time."""
    draw = {"over": draw_over, "dots": draw_dots}[plot["kind"]]
    figure = draw(plot)
    figure.suptitle(plot["title"], fontsize=11)
    figure.tight_layout()
    metadata = {"Software": None, "Description": digest(plot)}
    figure.savefig(path, format="png", dpi=110, metadata=metadata)
    plt.close(figure)


def legend(axes: Any, names: Iterable[str]) -> None:
    """A legend beside the axes, if there is anything to name."""
    if list(names):
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def draw_over(plot: Plot) -> Any:
    """Panels side by side, logarithmic in M."""
    panels = plot["panels"]
    figure, row = plt.subplots(1, len(panels), figsize=(1.5 + 4.5 * len(panels), 3.6))
    for axes, (name, curves) in zip(
        [row] if len(panels) == 1 else row, panels.items(), strict=True
    ):
        for marker, (curve, points) in zip(MARKERS, curves.items(), strict=False):
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, marker=marker, markersize=4, linewidth=1, label=curve)
        if plot["line"]:
            axes.axhline(1.0, color="0.5", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log" if plot["log_y"] else "linear")
        axes.set_xlabel("rows M")
        axes.set_ylabel(plot["y"])
        axes.set_title(name, fontsize=9)
        legend(axes, curves)
    return figure


def draw_dots(plot: Plot) -> Any:
    """Cases down, the figure across."""
    cases = list(dict.fromkeys(case for points in plot["points"].values() for case, _ in points))
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.3 * len(cases)))
    for marker, (name, points) in zip(MARKERS, plot["points"].items(), strict=False):
        places = [len(cases) - 1 - cases.index(case) for case, _ in points]
        axes.plot([y for _, y in points], places, marker, markersize=5, label=name)
    axes.axvline(1.0, color="0.5", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(cases)), cases[::-1], fontsize=7)
    axes.set_ylim(-1, len(cases))
    axes.set_xlabel(plot["x"])
    axes.grid(axis="y", linewidth=0.3)
    legend(axes, plot["points"])
    return figure
