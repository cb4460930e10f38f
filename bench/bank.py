"""Measure mixed batches, a row of x to an adapter: python bench/bank.py --set smoke

The forward of one layer, for inference, with a cold cache. Every provider is checked against the
equation in fp64 first. Results go to a file bank-… in --out, one line per case as soon as it is
measured; what was cut off goes on with --resume.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.support import cases, harness, timers
from bench.support.bank_cases import BANK_SETS, SCALE, BankCase, Batch, make_batch, select
from bench.support.bank_providers import BANK_PROVIDERS, BankProvider
from bench.support.store import BANK_PREFIX, Line, Refused, Store, make_key

CHUNK = 256  # rows whose factors are gathered in fp64 at a time


def equation(batch: Batch, which: str, convert: Callable[[Tensor], Tensor], scale: float) -> Tensor:
    """y of the first x, each operand converted first."""
    x, weight = convert(batch.xs[0]), convert(batch.weight.detach())
    y = linear(x, weight)
    if which == "bare":
        return y
    for rows in torch.arange(len(x), device=x.device).split(CHUNK):
        ids = batch.ids[rows]
        if which == "method":
            t = x[rows] @ convert(batch.down).T
            u = torch.einsum("mp,mpq->mq", t, convert(batch.cores[ids]))
            y[rows] += scale * (u @ convert(batch.up).T)
        else:
            a, b = (convert(factor[ids]) for factor in batch.pairs())
            t = torch.einsum("mk,mrk->mr", x[rows], a)
            y[rows] += scale * torch.einsum("mr,mnr->mn", t, b)
    return y


def make_truth(batch: Batch, which: str) -> harness.Truth:
    """The result of an equation in fp64, and in the case's dtype."""
    same = equation(batch, which, lambda tensor: tensor, SCALE)
    exact = equation(batch, which, Tensor.double, SCALE)
    sizes = equation(batch, which, lambda tensor: tensor.double().abs(), SCALE)
    return harness.Truth({"y": exact}, {"y": same}, {"y": float(sizes.norm())})


@dataclass
class Runner:
    """One provider on one case, as `harness.time_all` times it."""

    provider: BankProvider
    batch: Batch
    call: Callable[[Tensor], Tensor]
    hold: float = 0.0

    def forward(self, i: int) -> Callable[[], Tensor]:
        """The forward of the i-th repetition."""
        x = self.batch.xs[i % len(self.batch.xs)]
        return lambda: self.call(x)

    def backward(self, i: int) -> Callable[[Tensor], Any]:
        """Nothing."""
        return lambda y: None

    def check(self, truth: harness.Truth) -> harness.Row:
        """The row's `error`; raises WrongResult."""
        (measured,) = truth.compare({"y": self.call(self.batch.xs[0])})
        self.batch.bank.check()
        if not measured.within:
            most = harness.limit(measured)
            raise harness.WrongResult(f"error of y is {measured.error:.3g}, at most {most:.3g}")
        norm = float(truth.exact["y"].norm())
        ratio = measured.error / measured.reference if measured.reference else 1.0
        return {"y": measured.error / norm, "reference": measured.reference / norm, "ratio": ratio}


@torch.no_grad()
def measure_case(
    case: BankCase,
    providers: Sequence[BankProvider],
    timer: timers.Timer,
    device: torch.device,
    settings: harness.Settings | None = None,
) -> list[harness.Row]:
    """One row per provider: figures, or why there are none."""
    rows: dict[str, harness.Row] = {}
    runners: list[Runner] = []
    truths: dict[str, harness.Truth] = {}
    batch = make_batch(case, device)
    for provider in providers:
        if why := provider.why_absent(case, device):
            rows[provider.name] = {"provider": provider.name, "status": "absent", "why": why}
            continue
        try:
            which = provider.equation
            if which not in truths:
                truths[which] = make_truth(batch, which)
            with provider.pinned():
                runner = Runner(provider, batch, provider.build(batch))
                error = runner.check(truths[which])
            rows[provider.name] = {"provider": provider.name, "status": "ok", "error": error}
            runners.append(runner)
        except Exception as error:
            rows[provider.name] = harness.failure(cast(Any, provider), error, device)
    truths.clear()
    with harness.no_collection():
        several = cast(list[harness.Runner], runners)
        harness.time_all(several, rows, timer, settings or harness.Settings(), device)
    for row in rows.values():  # the step is the forward here
        for part in ("backward", "step"):
            row.pop(part, None)
            row.get("relative", {}).pop(part, None)
    return [rows[provider.name] for provider in providers]


def case_line(case: BankCase, rows: list[harness.Row], seconds: float) -> Line:
    """A case and its rows, as the file keeps them."""
    about = {
        "group": case.group,
        "m": case.rows,
        "k": case.k,
        "distinct": case.distinct,
        "resident": case.resident,
        "dtype": case.dtype,
    }
    return {"kind": "case", "case": case.name, **about, "seconds": seconds, "rows": rows}


def table(lines: Sequence[Line]) -> str:
    """The rows as text."""
    out = []
    for line in lines:
        out.append(f"\n{line['case']}\n  {'provider':>13}{'ms':>11}{'x bare':>9}{'quartiles':>16}")
        for row in line["rows"]:
            if row["status"] != "ok":
                out.append(f"  {row['provider']:>13}{row['status']:>11}: {row['why']}")
                continue
            low, middle, high = row.get("relative", {}).get("forward", [0.0] * 3)
            spread = f"{low:.3f}–{high:.3f}"
            ms = row["forward"][1]
            out.append(f"  {row['provider']:>13}{ms:11.3f}{middle:9.3f}{spread:>16}")
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 0 if everything asked for has a row, 1 if time ran out, 2 for bad arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--set", default="smoke", help=f"one of {', '.join(BANK_SETS)}")
    add("--case", action="append", default=[], help="only this case of the set; may be repeated")
    add("--out", type=Path, default=Path("bench_results"), help="folder of the results files")
    add("--resume", action="store_true", help="do what the latest file of this run lacks")
    add("--minutes", type=float, default=float("inf"), help="stop cleanly after these")
    add("--seconds", type=float, help="per case, for timing")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--timer", default=os.environ.get("BENCH_TIMER"))
    add("--shrink", type=int, default=int(os.environ.get("BENCH_SHRINK", "1")),
        help="divide every size by this: a rehearsal; also BENCH_SHRINK")  # fmt: skip
    args = parser.parse_args(argv)
    begun, device = time.monotonic(), torch.device(args.device)
    try:
        chosen = select(args.set, args.case, args.shrink)
        timer_name = args.timer or ("device" if device.type == "cuda" else "cold")
        cases.known([timer_name], timers.TIMERS, "timer")
        key = make_key(device)
        resumed = Store.resume(args.out, key, BANK_PREFIX) if args.resume else None
    except (ValueError, Refused) as error:
        print(f"bank.py: {error}", file=sys.stderr)
        return 2
    store = resumed or Store.new(args.out, key, BANK_PREFIX)
    left = [case for case in chosen if not store.measured(case.name)]
    first, done = len(store.lines), 0
    settings = harness.Settings(args.seconds or (1.0 if device.type == "cuda" else 3.0), min_reps=9)
    print(f"{store.path}: {len(left)} of {len(chosen)} cases to measure on {key['device']}")
    timer = timers.TIMERS[timer_name](device)
    for case in tqdm(left, unit="case", disable=None):
        if time.monotonic() - begun > 60 * args.minutes:
            break
        started = time.monotonic()
        providers = list(BANK_PROVIDERS.values())
        try:
            rows = measure_case(case, providers, timer, device, settings)
        except harness.Poisoned as poisoned:  # keep what is known; go on in a fresh process
            store.add(case_line(case, [poisoned.row], time.monotonic() - started))
            print(f"{case.name}: {poisoned}: starting again", file=sys.stderr)
            spent = (time.monotonic() - begun) / 60
            again = sys.argv if argv is None else [__file__, *argv]
            os.execv(sys.executable, [sys.executable, *again, "--resume", "--minutes",
                                      str(max(0.0, args.minutes - spent))])  # fmt: skip
        store.add(case_line(case, rows, time.monotonic() - started))
        done += 1
    store.end(len(left) - done)
    print(table([line for line in store.lines[first:] if line["kind"] == "case"]))
    if done < len(left):
        print(f"{len(left) - done} cases left: run again with --resume")
    return 1 if done < len(left) else 0


if __name__ == "__main__":
    sys.exit(main())
