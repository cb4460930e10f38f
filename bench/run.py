"""Measure a set of cases: python bench/run.py --set smoke

Results go to a file in --out, one line per case as soon as it is measured. What was cut off goes
on with --resume; a second run without it makes a second file. Compiled providers come last.

The sets cpu and core have plain and quantised bases; family has every method of the table.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.support import cases, harness, timers
from bench.support.providers import PROVIDERS, Provider, planned
from bench.support.store import Line, Refused, Store, make_key
from bench.support.warm import warm

Job = tuple[cases.Case, list[Provider]]


def jobs(store: Store, chosen: Sequence[cases.Case], names: Sequence[str]) -> list[Job]:
    """The jobs that are left to do. The bare layer is measured beside whatever is."""
    left: list[Job] = []
    for slow in (False, True):
        for case in chosen:
            measured = store.measured(case.name)
            todo = [PROVIDERS[n] for n in names if n not in measured and PROVIDERS[n].slow == slow]
            if todo:
                anchor = [PROVIDERS["bare"]] if todo[0].name != "bare" else []
                left.append((case, [*anchor, *todo]))
    return left


def case_line(
    case: cases.Case, rows: list[harness.Row], seconds: float, device: torch.device
) -> Line:
    """A case and its rows, as the file keeps them."""
    about = {
        "series": case.name.replace(f"/m{case.m}/", "/"),
        "m": case.rows,
        "k": case.k,
        "n": case.n,
        "p": case.p,
        "method": case.method,
        "dtype": case.dtype,
        "dropout": case.dropout,
        "planned": planned(case, device),
    }
    about |= {"base": case.base} if case.base else {}
    return {"kind": "case", "case": case.name, **about, "seconds": seconds, "rows": rows}


def ceilings(
    device: torch.device, timer: timers.Timer, chosen: Sequence[cases.Case], shrink: int
) -> Line:
    """The measured copy bandwidth in bytes/s and matrix rates in operations/s of the device."""
    big = device.type == "cuda" and shrink == 1
    source = torch.randn(1 << (28 if big else 22), device=device)
    target = torch.empty_like(source)

    def best(call: Callable[[], torch.Tensor]) -> float:
        several = [timer.sample(call, lambda y: None, 1.0).forward for _ in range(10)]
        return harness.summary(several)[1] / 1e3

    line: Line = {"kind": "ceiling", "timer": timer.name}
    line["bytes"] = 2 * source.nbytes / best(lambda: target.copy_(source))
    size = 8192 if big else 1024 if shrink == 1 else 256
    for name in sorted({case.dtype for case in chosen}):
        dtype = cases.DTYPES[name]
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        line[name] = 2 * size**3 / best(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    return line


def table(lines: Sequence[Line]) -> str:
    """The rows as text."""
    head = ("provider", "fwd ms", "step ms", "x bare", "peak KiB", "saved KiB", "err/ref")
    out = []
    for line in lines:
        out.append(f"\n{line['case']}\n  " + "".join(f"{word:>13}" for word in head))
        for row in line["rows"]:
            out.append(f"  {row['provider']:>13}" + cells(row))
    return "\n".join(out)


def cells(row: harness.Row) -> str:
    """The figures of a row, or why there are none."""
    if row["status"] != "ok":
        return f"{row['status']:>13}: {row['why']}"
    relative = row.get("relative", {}).get("step", [0, 0, 0])[1]
    return (
        f"{row['forward'][1]:13.3f}{row['step'][1]:13.3f}{relative:13.2f}"
        f"{row['peak'] / 1024:13.1f}{row['saved'] / 1024:13.1f}{row['error']['ratio']:13.2f}"
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--set", default="smoke", help=f"one of {', '.join(cases.SETS)}")
    add("--case", action="append", default=[], help="only this case of the set; may be repeated")
    add("--providers", default="all", help=f"of {','.join(PROVIDERS)}")
    add("--out", type=Path, default=Path("bench_results"), help="folder of the results files")
    add("--resume", action="store_true", help="do what the latest file of this run lacks")
    add("--close", action="store_true", help="measure nothing: make a cut-off file readable")
    add("--minutes", type=float, default=float("inf"), help="stop cleanly after these")
    add("--seconds", type=float, help="per case, for timing")
    add("--warm", type=int, default=0, help="compile what is launched in so many processes first")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--timer", help=f"one of {', '.join(timers.TIMERS)}; also BENCH_TIMER")
    add("--shrink", type=int, default=int(os.environ.get("BENCH_SHRINK", "1")),
        help="divide every size by this: a rehearsal; also BENCH_SHRINK")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 0 if everything asked for has a row, 1 if time ran out, 2 for bad arguments."""
    args = arguments(argv)
    begun, device = time.monotonic(), torch.device(args.device)
    timer_name = args.timer or os.environ.get("BENCH_TIMER")
    timer_name = timer_name or ("device" if device.type == "cuda" else "host")
    try:
        chosen = cases.select(args.set, args.case, args.shrink)
        wanted = list(PROVIDERS) if args.providers == "all" else args.providers.split(",")
        names = [n for n in PROVIDERS if n in cases.known(wanted, PROVIDERS, "provider")]
        cases.known([timer_name], timers.TIMERS, "timer")
        key = make_key(device)
        resumed = Store.resume(args.out, key) if args.resume or args.close else None
    except (ValueError, Refused) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    store = resumed or Store.new(args.out, key)
    left = [] if args.close else jobs(store, chosen, names)
    first, done = len(store.lines), 0
    settings = harness.Settings(args.seconds or (2.0 if device.type == "cuda" else 6.0))
    print(f"{store.path}: {len(left)} of {len(chosen)} cases to measure on {key['device']}")
    if left and args.warm:
        quick = [(case, several) for case, several in left if not several[-1].slow]
        tasks = [(case, [p.name for p in several], args.device) for case, several in quick]
        began = time.monotonic()
        print(
            f"{warm(tasks, args.warm)} steps taken in {time.monotonic() - began:.0f} s to compile"
        )
    if left:
        timer = timers.TIMERS[timer_name](device)
        if not any(line["kind"] == "ceiling" for line in store.lines):
            store.add(ceilings(device, timer, chosen, args.shrink))
    for case, providers in tqdm(left, unit="case", disable=None):
        if time.monotonic() - begun > 60 * args.minutes:
            break
        started = time.monotonic()
        try:
            rows = harness.measure_case(case, providers, timer, device, settings)
        except harness.Poisoned as poisoned:  # keep what is known; go on in a fresh process
            store.add(case_line(case, [poisoned.row], time.monotonic() - started, device))
            print(f"{case.name}: {poisoned}: starting again", file=sys.stderr)
            spent = (time.monotonic() - begun) / 60
            again = sys.argv if argv is None else [__file__, *argv]
            os.execv(sys.executable, [sys.executable, *again, "--resume", "--minutes",
                                      str(max(0.0, args.minutes - spent))])  # fmt: skip
        store.add(case_line(case, rows, time.monotonic() - started, device))
        done += 1
    store.end(len(left) - done)
    print(table([line for line in store.lines[first:] if line["kind"] == "case"]))
    if done < len(left):
        print(f"{len(left) - done} cases left: run again with --resume")
    return 1 if done < len(left) else 0


if __name__ == "__main__":
    sys.exit(main())
