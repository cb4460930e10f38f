"""The results files, read for each device, and its figures as tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.support.store import BANK_PREFIX, HOST_PREFIX, KEY, Line, Refused, read


class Device:
    """All that was measured on one device by one code. A later run's figures count."""

    def __init__(self, key: Line) -> None:
        self.key = key
        self.cases: dict[str, Line] = {}
        self.rows: dict[tuple[str, str], list[Line]] = {}  # (case, provider) → one row per run
        self.ceiling: Line = {}
        self.blocks: dict[tuple[str, int, bool], Line] = {}
        self.host: dict[tuple[str, str, int], list[Line]] = {}  # (plan, what, rows) → one a run
        self.missing = self.most = 0  # cases that were not reached by the run that reached most

    def add(self, lines: Sequence[Line]) -> None:
        """Take in one file."""
        own: dict[tuple[str, str], Line] = {}
        for line in lines:
            if line["kind"] == "case":
                self.cases[line["case"]] = line
                for row in line["rows"]:
                    own.setdefault((line["case"], row["provider"]), row)
            elif line["kind"] == "ceiling":
                self.ceiling = line
            elif line["kind"] == "block":
                self.blocks[line["provider"], line["sequence"], line["checkpoint"]] = line
            elif line["kind"] == "host":
                self.host.setdefault((line["plan"], line["what"], line["m"]), []).append(line)
        for where, row in own.items():
            self.rows.setdefault(where, []).append(row)
        reached = sum(line["kind"] == "case" for line in lines)
        if reached >= self.most:
            self.most, self.missing = reached, lines[-1]["missing"]

    def part(self, quantised: bool) -> Device:
        """The same device with the cases over a quantised W alone, or with the others."""
        made = copy.copy(self)
        made.cases = {n: line for n, line in self.cases.items() if ("base" in line) == quantised}
        made.rows = {where: rows for where, rows in self.rows.items() if where[0] in made.cases}
        return made

    @property
    def providers(self) -> list[str]:
        """Those with a figure, in the order in which they were first measured."""
        names = [name for (_, name), rows in self.rows.items() if rows[-1]["status"] == "ok"]
        return list(dict.fromkeys(names))

    def row(self, case: str, provider: str) -> Line | None:
        """The latest row that has figures."""
        rows = self.rows.get((case, provider), [])
        timed = rows and rows[-1]["status"] == "ok" and not {"step", "forward"}.isdisjoint(rows[-1])
        return rows[-1] if timed else None

    def relative(self, case: str, provider: str, part: str = "step") -> float | None:
        """Time over the bare layer's, the median of ratios within a round."""
        row = self.row(case, provider)
        return row["relative"][part][1] if row and "relative" in row else None

    def spread(self, part: str = "step") -> tuple[int, float, float] | None:
        """(ratios, median, largest) difference of a ratio to bare between the last two runs."""
        differences = []
        for (_, provider), rows in self.rows.items():
            pair = [row["relative"][part][1] for row in rows[-2:] if "relative" in row]
            if len(pair) == 2 and provider != "bare":
                differences.append(abs(pair[1] / pair[0] - 1))
        differences.sort()
        count = len(differences)
        return (count, differences[count // 2], differences[-1]) if count else None


def load(folder: Path, prefix: str = "") -> list[Device]:
    """The devices of all files in a folder, of layers or with a prefix. Raises Refused."""
    devices: dict[str, Device] = {}
    files = sorted(folder.glob(f"{prefix}*.jsonl"), key=lambda p: (len(p.name), p.name))
    others = tuple(other for other in (BANK_PREFIX, HOST_PREFIX) if other != prefix)
    files = [path for path in files if not path.name.startswith(others)]
    if not files and not prefix:
        raise Refused(f"no results files in {folder.name}")
    for path in files:
        key, lines = read(path)
        device = devices.setdefault(key["device"], Device(key))
        if changed := [name for name in KEY if key[name] != device.key[name]]:
            said = ", ".join(f"{name} {device.key[name]} and {key[name]}" for name in changed)
            raise Refused(f"{path.name} is of different code or versions than the files before it "
                          f"of the same device ({said}): remove one of them")  # fmt: skip
        device.add(lines)
    return list(devices.values())


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body)) + "\n"


def by_case(device: Device, names: Sequence[str], figure: Callable[[str, str], str]) -> str:
    """A table of one figure: cases down, providers across."""
    head = ["case", *names]
    return grid(head, [[case, *(figure(case, name) for name in names)] for case in device.cases])


def about(device: Device) -> str:
    """One line that says what was measured."""
    key = device.key
    driver = "" if key["driver"] == "none" else f", driver {key['driver']}"
    threads = f", {key['threads']} CPU thread(s)" if key["threads"] else ""
    changed = " with changes" if key["dirty"] else ""
    left = f"; {device.missing} cases not reached" if device.missing else ""
    return (
        f"{key['device']}{threads}{driver}, torch {key['torch']}, triton {key['triton']}, "
        f"Python {key['python']}, commit {key['commit']}{changed}{left}."
    )


def spread_line(device: Device, part: str = "step") -> str:
    """A line on the distance that the ratios moved between two runs."""
    spread = device.spread(part)
    if not spread:
        return ""
    count, median, largest = spread
    return (
        f"\nBetween the last two runs the {count} ratios to bare moved by {median:.1%} in the "
        f"median and by {largest:.1%} at most.\n"
    )


def failures(device: Device) -> str:
    """The rows without figures, and why."""
    why: dict[tuple[str, str], list[str]] = {}
    for (case, name), rows in device.rows.items():
        if rows[-1]["status"] != "ok":
            why.setdefault((name, f"{rows[-1]['status']}: {rows[-1]['why']}"), []).append(case)
    body = [
        [name, text, cases[0] if len(cases) == 1 else f"{len(cases)} cases"]
        for (name, text), cases in why.items()
    ]
    return "### Not measured\n\n" + grid(["provider", "why", "where"], body) if body else ""
