"""Tables and plots from the results: python bench/report.py

Reads every results file in --results; writes RESULTS.md and the plots beside them and the README's
text between its markers, with the tables of the folders in it: those of later commits. A file that
is truncated, of another schema or of other code is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.support import bank_report, plots
from bench.support.store import BANK_PREFIX, HOST_PREFIX, ROOT, Line, Refused, slug
from bench.support.tables import (
    Device,
    about,
    by_case,
    failures,
    grid,
    load,
    number,
    spread_line,
)
from fused_lowrank.compute.plans import PLANS

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
HEADLINE = 8  # cases in the README's table, and those with a provider that none of them have
OURS = "auto"
QUANTISED = "dense", "peft-lora", "peft-lora-fused", "called", "auto"  # those the README shows
WITH_DORA = {"auto-dora": "auto", "eager-dora": "eager", "peft-dora": "peft-lora"}  # and without
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


def is_plan(name: str) -> bool:
    """Whether a provider is one of our plans, or was: with other tiles they are `plan:tiles`."""
    return name.split(":")[0] in PLANS


def floor_ms(device: Device, case: Line) -> float | None:
    """The least time of a forward: its operations or its bytes at the measured ceilings."""
    rate, bandwidth = device.ceiling.get(case["dtype"]), device.ceiling.get("bytes")
    if not rate or not bandwidth:
        return None
    m, k, n, p = (case[name] for name in "mknp")
    operations = 2 * m * (k * n + k * p + p * n + p * p)
    size = ITEMSIZE[case["dtype"]] * (m * k + n * k + m * n + p * k + p * n)
    return 1e3 * max(operations / rate, size / bandwidth)


def note_of(device: Device, folder: Path) -> str:
    """The note on a device's results for as long as they are of that code, if any."""
    path = folder / f"{slug(device.key['device'])}-{device.key['code']}.md"
    return f"\n{path.read_text().strip()}\n" if path.exists() else ""


def full_text(device: Device, figures: Sequence[str], note: str = "") -> str:
    """A device's section of RESULTS.md."""
    every, device = device, device.part(quantised=False)
    rows, names = device.row, device.providers
    others = [name for name in names if name != "bare"]
    peers = [n for n in others if n != OURS and not is_plan(n) and not n.startswith("gemm")]

    def cell(get: Callable[[Line], float], digits: int = 2) -> Callable[[str, str], str]:
        return lambda case, name: number(get(row) if (row := rows(case, name)) else None, digits)

    def against(case: str, name: str) -> str:
        own, other = device.relative(case, OURS), device.relative(case, name)
        return number(own / other if own and other else None)

    def near_floor(case: str, name: str) -> str:
        row, least = rows(case, name), floor_ms(device, device.cases[case])
        return f"{least / row['forward'][1]:.0%}" if row and least else "–"

    parts = [
        f"## {device.key['device']}\n\n{about(device)}\n{note}{spread_line(every)}",
        "### Step, as a multiple of the bare layer's time\n",
        by_case(device, others, lambda case, name: number(device.relative(case, name))),
        "### Forward, as a multiple of the bare layer's time\n",
        by_case(device, others, lambda case, name: number(device.relative(case, name, "forward"))),
        "### Step, milliseconds (median)\n",
        by_case(device, names, cell(lambda row: row["step"][1], 3)),
        f"### `{OURS}` as a multiple of each peer's step\n",
        by_case(device, peers, against),
        "### Peak memory of a step above the baseline, MiB\n",
        by_case(device, names, cell(lambda row: row["peak"] / 2**20)),
        "### Saved for the backward, KiB\n",
        by_case(device, names, cell(lambda row: row["saved"] / 1024, 1)),
        "### Error against fp64, as a multiple of the same-dtype reference's\n",
        by_case(device, names, cell(lambda row: row["error"]["ratio"])),
        "### Forward: least possible time over measured time\n\nThe least is the operations or "
        "the bytes at the bandwidth and the matrix rate measured in the same run.\n",
        by_case(device, names, near_floor),
        dora_text(every),
        quantised_text(every.part(quantised=True)),
        planner_text(every),
        block_text(device),
        failures(every),
        *(f"![{name}]({name})\n" for name in figures),
    ]
    return "\n".join(part for part in parts if part)


def dora_text(device: Device) -> str:
    """The steps with DoRA over those without it, of each provider that has both."""
    body = []
    for case in device.cases:
        row = []
        for name, plain in WITH_DORA.items():
            own, other = device.relative(case, name), device.relative(case, plain)
            row.append(own / other if own and other else None)
        if any(row):
            body.append([case, *map(number, row)])
    said = "Each provider's step with DoRA over its step without it.\n\n"
    return "### DoRA\n\n" + said + grid(["case", *WITH_DORA], body) if body else ""


def quantised_text(device: Device) -> str:
    """The tables of the cases over a quantised W."""
    if not device.cases:
        return ""
    names = device.providers
    others = [name for name in names if name != "bare"]

    def cell(get: Callable[[Line], float], digits: int = 2) -> Callable[[str, str], str]:
        return lambda case, name: number(get(row) if (row := device.row(case, name)) else None,
                                         digits)  # fmt: skip

    said = (
        "`bare` is the quantised layer of its own library, `dense` the library's GEMM on its "
        "values, which are there anyway for it alone; `peft-lora` is QLoRA as PEFT has it, `auto` "
        "what this library chooses, `called` the base's own product with the term added, and the "
        "other plans compute on values that are made for a pass."
    )
    parts = [
        f"### Over a quantised W\n\n{said}\n",
        "Step, as a multiple of the bare quantised layer's time:\n",
        by_case(device, others, lambda case, name: number(device.relative(case, name))),
        "Forward, likewise:\n",
        by_case(device, others, lambda case, name: number(device.relative(case, name, "forward"))),
        "Step, milliseconds (median):\n",
        by_case(device, names, cell(lambda row: row["step"][1], 3)),
        "Peak memory of a step above the baseline, MiB:\n",
        by_case(device, names, cell(lambda row: row["peak"] / 2**20)),
        "Saved for the backward, KiB:\n",
        by_case(device, names, cell(lambda row: row["saved"] / 1024, 1)),
        "Error against fp64 on the values, as a multiple of the same-dtype reference's:\n",
        by_case(device, names, cell(lambda row: row["error"]["ratio"])),
    ]
    return "\n".join(parts)


def planner_text(device: Device) -> str:
    """The plans chosen on paper against the fastest of those that were measured."""
    body, extra = [], []
    for case, line in device.cases.items():
        for part, chosen in zip(("forward", "backward"), line["planned"], strict=True):
            there = {name for name in device.providers if is_plan(name)} | {chosen}
            known = [(device.relative(case, name, part), name) for name in sorted(there)]
            times = {name: value for value, name in known if value is not None}
            if chosen not in times or len(times) < 2:
                continue
            best = min(times, key=lambda name: times[name])
            extra.append(times[chosen] / times[best] - 1)
            body.append([case, part, chosen, best, f"{extra[-1]:.1%}"])
    if not body:
        return ""
    off = sorted(cost for cost in extra if cost)
    said = f"The choice is the fastest in {len(extra) - len(off)} of {len(extra)} passes"
    if off:
        said += (
            f"; elsewhere it costs {off[len(off) // 2]:.1%} in the median, {off[-1]:.1%} at most"
        )
    head = ["case", "pass", "chosen", "fastest", "costs"]
    text = "“auto” is the chain of library operations that small calls on a CPU take"
    return f"### The plans chosen on paper\n\n{said}. {text}.\n\n{grid(head, body)}"


def block_text(device: Device) -> str:
    """The whole-step table."""
    if not device.blocks:
        return ""
    body = []
    for (name, sequence, checkpoint), line in sorted(device.blocks.items(), key=lambda e: e[0][1:]):
        ok = line["status"] == "ok"
        tokens = f"{line['tokens_per_s']:.0f}" if ok else line["status"]
        memory = number(line["peak"] / 2**20, 1) if ok else line["why"]
        held = number(line["held"] / 2**20, 1) if ok else "–"
        wall = number(line["wall"][1], 2) if ok and "wall" in line else "–"
        way = "yes" if checkpoint else "no"
        body.append([name, str(sequence), way, tokens, wall, memory, held])
    head = ["block", "sequence", "checkpointing", "tokens/s", "ms a step by the wall"]
    head += ["peak MiB", "held for backward MiB"]
    shape = next(iter(device.blocks.values()))["shape"]
    return f"### One transformer block, whole step ({shape})\n\n{grid(head, body)}"


def host_text(device: Device) -> str:
    """The table of the host's times."""
    body = []
    for (plan, what, rows), lines in device.host.items():
        runs = ", ".join(number(line["ratio"]) for line in lines)
        quartiles = [number(lines[-1][name], 1) for name in ("q1", "us", "q3")]
        body.append([plan, what, str(rows), *quartiles, runs, str(lines[-1]["launches"])])
    head = ["plan", "what", "rows", "µs, lower quartile", "median", "upper quartile"]
    head += ["× eager LoRA-XS, each run", "launches"]
    return (
        f"## The host's time of a GPU's plans, {device.key['device']}\n\n{about(device)}\n\n"
        "By `bench/host.py --stub`, without a GPU: kernels are compiled for sm_90 and launched by "
        "a driver that does nothing. Tiny tensors on the CPU; `eager`, `peft-lora` and `bare` "
        "really compute them.\n\n"
        f"{grid(head, body)}"
    )


def headline(device: Device) -> list[str]:
    """The cases of the README's table: together they have every provider."""
    cases = list(device.cases)
    chosen = cases[:HEADLINE]
    shown = {name for name in device.providers for case in chosen if device.row(case, name)}
    rest = [name for name in device.providers if name not in shown]
    return [case for case in cases if case in chosen or any(device.row(case, n) for n in rest)]


def short_text(device: Device, folder: str, figures: Sequence[str], note: str = "") -> str:
    """A device's part of the README."""
    every, device = device, device.part(quantised=False)
    others = [name for name in device.providers if name != "bare"]
    body = [
        [case, *(number(device.relative(case, name)) for name in others)]
        for case in headline(device)
    ]
    table = grid(["forward + backward, × bare layer", *others], body)
    shown = "".join(f"\n![{name}]({folder}/{name})\n" for name in figures[:1])
    over = quantised_short(every.part(quantised=True))
    return f"{about(device)}\n{note}\n{table}{over}{spread_line(every)}{shown}"


def quantised_short(device: Device) -> str:
    """A short table of the cases over a quantised W, if there are any."""
    names = [name for name in QUANTISED if name in device.providers]
    head = ["over a quantised W: forward + backward, × bare quantised layer", *names]
    body = [[case, *(number(device.relative(case, n)) for n in names)] for case in device.cases]
    return f"\n{grid(head, body)}" if body else ""


def make_plots(device: Device) -> dict[str, plots.Plot]:
    """The plots of a device by file name: of the cases over a plain W."""
    device = device.part(quantised=False)
    stem, name = slug(device.key["device"]), device.key["device"]
    shown = [provider for provider in device.providers if provider != "bare"]
    time: dict[str, plots.Points] = {}
    memory: dict[str, plots.Points] = {}
    for case, line in device.cases.items():
        panel = line["series"]
        for provider in device.providers:
            row, relative = device.row(case, provider), device.relative(case, provider)
            if row:
                curve = memory.setdefault(panel, {}).setdefault(provider, [])
                curve.append((line["m"], row["peak"] / 2**20))
            if relative and provider != "bare":
                curve = time.setdefault(panel, {}).setdefault(provider, [])
                curve.append((line["m"], relative))

    def several(panels: dict[str, plots.Points]) -> dict[str, plots.Points]:
        kept = [p for p in panels if max(len(points) for points in panels[p].values()) > 1]
        return {panel: panels[panel] for panel in kept[:3]}

    by_provider: plots.Points = {}
    for provider in shown:
        known = [(case, device.relative(case, provider)) for case in device.cases]
        by_provider[provider] = [(case, value) for case, value in known if value]
    label = "step, × bare layer"
    made = {f"{stem}-cases.png": plots.dots(f"Every provider, {name}", label, by_provider)}
    if several(time):
        made[f"{stem}-rows.png"] = plots.over(
            f"Time over rows, {name}", label, several(time), line=True
        )
        made[f"{stem}-memory.png"] = plots.over(
            f"Peak memory of a step, {name}", "MiB", several(memory), log_y=True
        )
    return made


def later(folder: Path) -> list[Path]:
    """The folders within one of results: each has those of a later commit."""
    return sorted({path.parent for path in folder.glob("*/*.jsonl")})


def later_text(folder: Path, place: Path) -> str:
    """The part of the README on a later commit: what was measured of it."""
    parts = [short_text(device, "", (), note_of(device, folder)) for device in load(folder)]
    parts += [bank_report.short_text(device) for device in load(folder, BANK_PREFIX)]
    inner = "\n\n".join(part.strip() for part in parts)
    return f"{inner}\n\nEvery table: [RESULTS.md]({place.as_posix()}/RESULTS.md).\n"


def between_markers(text: str, inner: str) -> str:
    """The text with what lies between the markers replaced. Raises Refused without markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise Refused(f"the README lacks the markers {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{inner}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report, or --check it: 0 as it should be, 1 out of date, 2 refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--readme", default=str(ROOT / "README.md"), help='"none" for none')
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args(argv)
    folder: Path = args.results
    texts: dict[Path, str] = {}
    drawn: dict[str, plots.Plot] = {}
    try:
        devices = load(folder)
        named = [(d, make_plots(d), note_of(d, folder)) for d in devices]
        sections = [full_text(device, list(made), note) for device, made, note in named]
        head = "# Results\n\nMade by `bench/report.py` from the files beside this one.\n"
        banks = load(folder, BANK_PREFIX)
        sections += [bank_report.full_text(device) for device in banks]
        sections += [host_text(device) for device in load(folder, HOST_PREFIX)]
        texts[folder / "RESULTS.md"] = "\n".join([head, *sections])
        drawn = {name: plot for _, made, _ in named for name, plot in made.items()}
        if args.readme != "none":
            readme = Path(args.readme)
            place = Path(str(folder.resolve().relative_to(readme.resolve().parent)))
            inner = "\n".join(
                short_text(device, place.as_posix(), list(made), note)
                for device, made, note in named
            )
            inner += "".join(bank_report.short_text(device) for device in banks)
            inner += f"\nEvery table: [RESULTS.md]({place.as_posix()}/RESULTS.md)."
            newest = "".join(later_text(own, place / own.name) for own in later(folder))
            inner = f"{newest}\n{inner}" if newest else inner
            texts[readme] = between_markers(readme.read_text(), inner)
    except (Refused, OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    old: list[Any] = [
        p.name for p, text in texts.items() if not p.exists() or p.read_text() != text
    ]
    old += [name for name, plot in drawn.items() if not plots.shows(folder / name, plot)]
    if args.check:
        if old:
            print(f"report.py: not what the results give: {', '.join(old)}", file=sys.stderr)
        return 1 if old else 0
    for path, text in texts.items():
        path.write_text(text)
    for name, plot in drawn.items():
        plots.save(folder / name, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
