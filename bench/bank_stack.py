"""Mixed batches through as many projections of Llama-3.1-8B as fit: python bench/bank_stack.py

Each projection has a table of a million slots of its own, and every row another adapter. The
forward of all of them, one after the other, is compared with that of the bare ones; on a GPU both
also as CUDA graphs. The results are lines of the file bank-… in --out, as those of `bench/bank.py`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.support import harness, timers
from bench.support.bank_cases import BLOCK, RANK, SCALE
from bench.support.bank_providers import memory
from bench.support.cases import known
from bench.support.store import BANK_PREFIX, Line, Refused, Store, make_key
from fused_lowrank import AdapterBank, adapt
from fused_lowrank.methods import LowRankLinear

LAYER = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)]  # (K, N) of q, k, v, o
LAYER += [(4096, 14336), (4096, 14336), (14336, 4096)]  # and of gate, up, down
LAYERS, RESIDENT, SHARE = 32, 1_000_000, 0.85  # of the device's memory
ROWS = (1, 16, 64, 256)


@dataclass
class Stack:
    """Projections with random weights, in a bank that is full."""

    layers: list[LowRankLinear]
    bank: AdapterBank
    block: Tensor  # (up to BLOCK, r, r): the adapters' cores, repeated
    dtype: torch.dtype

    def inputs(self, rows: int) -> dict[int, Tensor]:
        """An x for each width."""
        widths = {layer.weight.shape[1] for layer in self.layers}
        device = self.bank.device
        return {k: torch.randn(rows, k, device=device).to(self.dtype) for k in widths}

    def bare(self, xs: dict[int, Tensor]) -> Tensor:
        """The frozen projections alone; the last one's y."""
        for layer in self.layers:
            y = linear(xs[layer.weight.shape[1]], layer.weight)
        return y

    def routed(self, xs: dict[int, Tensor], handles: Tensor) -> Tensor:
        """The same with an adapter for each row."""
        with self.bank.use(handles):
            for layer in self.layers:
                y = layer(xs[layer.weight.shape[1]])
        return y

    def equation(self, xs: dict[int, Tensor], slots: Tensor, dtype: torch.dtype) -> Tensor:
        """The result of the last projection, in another dtype."""
        layer = self.layers[-1]
        x, w = xs[layer.weight.shape[1]].to(dtype), layer.weight.to(dtype)
        t = (x @ layer.down.to(dtype).t())[:, None]
        u = torch.bmm(t, self.block[slots % len(self.block)].to(dtype))[:, 0] * SCALE
        return x @ w.t() + u @ layer.up.to(dtype).t()


def make_stack(device: torch.device, resident: int, shrink: int) -> Stack:
    """As many projections as fit, in the order of the model."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [tuple(max(32, side // shrink) for side in shape) for shape in LAYER] * LAYERS
    left, fit = SHARE * memory(device), []
    for k, n in shapes:
        left -= (k * n + (k + n + resident * RANK) * RANK) * dtype.itemsize
        if left > 0:
            fit.append((k, n))

    def normal(*size: int) -> Tensor:
        values = torch.empty(size, dtype=dtype, device=device)
        return values.normal_(std=1 / math.sqrt(size[-1]))

    linears = []
    for k, n in fit:
        bare = nn.Linear(k, n, bias=False, device="meta")
        bare.weight = nn.Parameter(normal(n, k), requires_grad=False)
        linears.append(bare)
    keywords: dict[str, Any] = {"r": RANK, "alpha": SCALE * RANK, "progress": False}
    model: Any = nn.Sequential(*linears)
    names = [str(i) for i in range(len(linears))]
    adapt(model, "lora_xs", target_modules=names, defer_bases=True, **keywords).eval()
    for layer in model:
        layer.down = nn.Parameter(normal(*layer.down.shape), requires_grad=False)
        layer.up = nn.Parameter(normal(*layer.up.shape), requires_grad=False)
        layer.bases_pending = False
    bank = AdapterBank.from_model(model, slots=resident, dtype=dtype)
    block = normal(min(resident, BLOCK), RANK, RANK)
    for first in tqdm(range(0, resident, BLOCK), "filling", disable=None):
        count = min(BLOCK, resident - first)
        part = block[:count], None, torch.full((count,), SCALE)
        bank.put([str(i) for i in range(first, first + count)], dict.fromkeys(names, part))
    return Stack(list(model), bank, block, dtype)


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


@torch.no_grad()
def measure(stack: Stack, rows: int, timer: timers.Timer, rounds: int) -> Line:
    """One case: a line as `bench/bank.py` writes it."""
    xs, resident, device = stack.inputs(rows), stack.bank.slots, stack.bank.device
    slots = torch.randperm(resident)[:rows]
    handles = stack.bank.handles([str(int(slot)) for slot in slots])
    calls: dict[str, Callable[[], Tensor]] = {"bare": partial(stack.bare, xs)}
    calls["bank:handles"] = partial(stack.routed, xs, handles)
    exact, same = (stack.equation(xs, slots, d) for d in (torch.float64, stack.dtype))
    error, reference = (float((y.double() - exact).norm()) for y in (calls["bank:handles"](), same))
    stack.bank.check()
    if not error <= max(2.5 * reference, float(torch.finfo(stack.dtype).eps * exact.norm())):
        raise harness.WrongResult(f"error of y is {error:.3g}, the reference's {reference:.3g}")
    if device.type == "cuda":
        calls["bare:graph"], calls["graph"] = (captured(call) for call in list(calls.values()))
    samples: dict[str, list[timers.Sample]] = {name: [] for name in calls}
    hold = dict.fromkeys(calls, 0.0)
    for i in range(rounds + 1):
        for name, call in calls.items():
            sample = timer.sample(call, lambda y: None, hold[name])
            hold[name] = min(50.0, 1.5 * sample.host)
            if i:  # the first warms up
                samples[name].append(sample)
    base = [sample.forward for sample in samples["bare"]]
    made: list[harness.Row] = []
    for name, several in samples.items():
        spent = [sample.forward for sample in several]
        ratios = [own / other for own, other in zip(spent, base, strict=True)]
        row = {"provider": name, "status": "ok", "reps": len(spent)}
        row["error"] = {"ratio": 1.0 if name.startswith("bare") else error / max(reference, 1e-30)}
        row["host"] = harness.summary([sample.host for sample in several])
        row |= {"forward": harness.summary(spent)}
        made.append({**row, "relative": {"forward": harness.summary(ratios)}})
    dtype = "bf16" if stack.dtype == torch.bfloat16 else "fp32"
    group = f"{len(stack.layers)} projections of llama-3.1-8b/m{rows}/d{rows}/{dtype}"
    case = group.replace(f"/{dtype}", f"/of{resident}/{dtype}")
    about = {"group": group, "m": rows, "k": 0, "distinct": rows, "resident": resident}
    about |= {"dtype": dtype, "bytes": stack.bank.nbytes}
    return {"kind": "case", "case": case, **about, "seconds": 0.0, "rows": made}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 2 for bad arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("bench_results"), help="folder of the results files")
    add("--rounds", type=int, default=20)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--timer", default=os.environ.get("BENCH_TIMER"))
    add("--shrink", type=int, default=int(os.environ.get("BENCH_SHRINK", "1")),
        help="divide every size by this: a rehearsal; also BENCH_SHRINK")  # fmt: skip
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    try:
        timer_name = args.timer or ("device" if device.type == "cuda" else "host")
        known([timer_name], timers.TIMERS, "timer")
        key = make_key(device)
        store = Store.resume(args.out, key, BANK_PREFIX) or Store.new(args.out, key, BANK_PREFIX)
    except (ValueError, Refused) as error:
        print(f"bank_stack.py: {error}", file=sys.stderr)
        return 2
    missing = next((e["missing"] for e in reversed(store.lines) if e["kind"] == "end"), 0)
    stack = make_stack(device, max(ROWS[-1], RESIDENT // args.shrink), args.shrink)
    print(f"{len(stack.layers)} projections; {stack.bank}; {stack.bank.nbytes / 2**30:.1f} GiB")
    timer = timers.TIMERS[timer_name](device)
    for rows in ROWS:
        line = measure(stack, rows, timer, args.rounds)
        store.add(line)
        figures = (f"{r['provider']} {r['relative']['forward'][1]:.3f}" for r in line["rows"])
        print(f"{line['case']}: × bare: {', '.join(figures)}")
    store.end(missing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
