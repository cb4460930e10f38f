"""`measure` takes the host time of a call, layer by layer: python bench/host.py

Tiny tensors on the CPU, where the arithmetic is nothing: what is left is what a call costs the
host. The last column compares it with a module of the eager operations that the fused layer
replaces; below the fused layer stand the steps that it is made of.

    python bench/host.py --stub [--reps N] [--out FILE]

measures what every plan costs the host of an H100 instead, on a machine without a GPU: Triton
compiles the kernels, and `bench/support/stub.py` launches none of them. It prints JSON, one line
for each plan, or layer without one, and `what` is called: its "forward" without gradients; a
"step", which is the forward and the gradients of x and of what is trained, the core or PEFT's two
factors; or a single "launch", its results allocated. us, q1 and q3 are the median and the quartiles
of microseconds, ratio is to the eager layer's same call, for a launch to its forward, m is the rows
of x and launches are the kernel launches in one call.

K = N = 32, r = 16 and bf16 throughout: what is really computed, by the layers without a plan and
by the library GEMMs of `aten` and `mixed`, then takes about a microsecond an operation, and x is a
multiple of 16, as the kernels' plans want it. oneDNN is off, whose own host work in 16 bits is
several times that of a small GEMM. The layers without a plan have 2 rows. Each plan has a number
of rows of its own, and whatever the library remembers of a signature is remembered of that plan:
`decode` is for at most 64 rows, `relay` for more, and `split` is there with few, where it reads by
pointers, and with so many that y fills the device, where it reads by tensor maps. No K is so long
that it is split over programs; a call in which it is makes one or two more tensors.

"banked" is a layer in a bank, by handles made once, every row its own adapter; its step has the
gradient of x alone. "bank.use" is to enter and leave `bank.use` of 256 names of a full bank.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.support.bank_cases import BankCase, make_batch
from bench.support.cases import Case, parse
from bench.support.providers import PROVIDERS, layer
from bench.support.store import HOST_PREFIX, Store, make_key
from bench.support.tensors import Tensors, make_tensors
from fused_lowrank import lowrank_linear
from fused_lowrank.compute.reference import chain, through_core
from fused_lowrank.testing import pinned_plan

if TYPE_CHECKING:
    from bench.support.stub import Stub

Calls = dict[str, Callable[[], Any]]
KINDS = ("xs4", "mini4x8", "lora4")
EAGER = "eager module"
CPU = torch.device("cpu")
SHRUNK = 3  # of the tiny layer's 96: K = N = 32
LAYERS = ("eager", "peft-lora", "bare")
ROWS = (("aten", 2), ("mixed", 1), ("split", 8), ("split", 12288), ("decode", 16), ("relay", 256))
BANKED_ROWS = (("decode", 16), ("split", 128))
NAMES, SLOTS = 256, 100_000  # of bank.use


class Chain(torch.nn.Module):
    """The case's layer as one would write it: a module around the chain of operations.

    Its core is written out where the row of the method names the factors of it.
    """

    weight: torch.nn.Parameter
    down: torch.nn.Parameter
    up: torch.nn.Parameter

    def __init__(self, case: Case, tensors: Tensors) -> None:
        super().__init__()
        self.weight, self.scale, self.row = tensors.weight, tensors.scale, case.row
        self.names, self.middle = tuple(tensors.method), case.row.core
        for name, factor in tensors.method.items():
            self.register_parameter(name, factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W·x and the low-rank path, added."""
        if self.row.parts is not None:
            factors = {name: getattr(self, name) for name in self.names}
            down, core, up, _ = self.row.parts(factors, self.weight, self.scale)
            u = through_core(linear(x, down), core, self.scale)
            return linear(x, self.weight) + linear(u, up)
        u = linear(x, self.down)
        if len(self.middle) == 1:
            u = u @ getattr(self, self.middle[0])
        elif self.middle:
            u = u @ (getattr(self, self.middle[0]) @ getattr(self, self.middle[1]))
        return linear(x, self.weight) + linear(u * self.scale, self.up)


def parts(case: Case, tensors: Tensors) -> tuple[Calls, Calls]:
    """(forward without gradients, forward and backward) by name, from the layer downwards."""
    x, dy, weight, scale = tensors.xs[0], tensors.dys[0], tensors.weight, tensors.scale
    leaves = [x, *tensors.trained("method").values()]
    of_row = case.row.made(tensors.method, weight, scale)[:3]

    def made() -> Any:
        """down, core and up, which a row whose parts are computed makes at each call."""
        return (
            of_row if case.row.parts is None else case.row.made(tensors.method, weight, scale)[:3]
        )

    def operations(x: torch.Tensor) -> torch.Tensor:
        down, core, up = made()
        return chain(x, weight, down, core, up, None, scale)

    layers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        EAGER: Chain(case, tensors),
        "fused layer": PROVIDERS["auto"].build(case, tensors),
        "lowrank_linear": lambda x: lowrank_linear(x, weight, *made(), scale=scale),
        "its operations": operations,
        "fused layer, aten": layer("", True, "aten", "method")(case, tensors),
        "reference layer": PROVIDERS["eager"].build(case, tensors),
        "bare layer": PROVIDERS["bare"].build(case, tensors),
    }

    def step(call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(x), leaves, dy)

    forward: Calls = {name: partial(call, x) for name, call in layers.items()}
    both: Calls = {name: step(call) for name, call in layers.items() if name != "bare layer"}
    return forward, both


def samples(calls: Calls, reps: int) -> dict[str, list[int]]:
    """Nanoseconds of each, the repetitions alternating in a random order."""
    times: dict[str, list[int]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    clock, order = time.perf_counter_ns, random.Random(0)
    try:
        for i in range(reps + reps // 10):
            for name, call in order.sample(list(calls.items()), len(calls)):
                start = clock()
                call()
                spent = clock() - start
                if i >= reps // 10:
                    times[name].append(spent)
    finally:
        gc.enable()
    return times


def medians(calls: Calls, reps: int) -> dict[str, float]:
    """Median microseconds of each."""
    times = samples(calls, reps)
    return {name: statistics.median(several) / 1e3 for name, several in times.items()}


def measure(kind: str, reps: int, dtype: str = "fp32") -> dict[str, dict[str, float]]:
    """{"forward": …, "forward + backward": …}, microseconds by part."""
    case = parse("tiny", "square", 2, kind, dtype)
    forward, both = parts(case, make_tensors(case, CPU))
    with torch.no_grad():
        first = medians(forward, reps)
    return {"forward": first, "forward + backward": medians(both, reps)}


# --- with the stub ---


@dataclass(frozen=True)
class Row:
    """A call to be measured with the stub, and the plan that its passes are to have."""

    plan: str
    what: str  # "forward", "step" or "launch"
    m: int
    call: Callable[[], Any]
    forced: str = ""

    @property
    def name(self) -> str:
        """A name that no other row has."""
        return f"{self.plan}/{self.what}/{self.m}"


def calls_of(
    plan: str, module: Callable[[torch.Tensor], Any], leaves: Any, dy: Any, forced: str = ""
) -> list[Row]:
    """Forward and step of what is called with the first of `leaves`."""
    x = leaves[0]

    def step() -> Any:
        return torch.autograd.grad(module(x), leaves, dy)

    forward = Row(plan, "forward", len(x), lambda: module(x), forced)
    return [forward, replace(forward, what="step", call=step)]


def layer_rows() -> Iterator[Row]:
    """The layers without a plan, then ours by each plan."""

    def tensors(m: int) -> Tensors:
        case = replace(parse("tiny", "square", SHRUNK * m, "xs16"), shrunk=SHRUNK)
        return make_tensors(case, CPU)

    for name in LAYERS:
        provider, of = PROVIDERS[name], tensors(2)
        if provider.why_absent(of.case, CPU) is None:
            leaves = [of.xs[0], *of.trained(provider.equation).values()]
            yield from calls_of(name, provider.build(of.case, of), leaves, of.dys[0])
    for plan, m in ROWS:
        of = tensors(m)
        leaves = [of.xs[0], *of.trained("method").values()]
        build = PROVIDERS["auto"].build
        yield from calls_of(plan, build(of.case, of), leaves, of.dys[0], plan)
        if plan in ("split", "decode"):
            yield from launches(of)


def launches(of: Tensors) -> Iterator[Row]:
    """Single launches, by the functions that the plans call: of `decode` where it has its rows."""
    from fused_lowrank.compute import devices
    from fused_lowrank.kernels.core_grad import core_grad
    from fused_lowrank.kernels.decode import decode
    from fused_lowrank.kernels.gemm_tail import gemm_tail
    from fused_lowrank.kernels.shrink import shrink

    choose, x, weight, scale = devices.tiles(CPU), of.xs[0].detach(), of.weight, of.scale
    down, core, up = of.method["down"], of.method["core"], of.method["up"]
    t = x.new_zeros(len(x), of.case.p)
    calls: Calls = {
        "shrink": partial(shrink, x, down, core, scale, False, True, True, None, choose),
        "gemm_tail": partial(gemm_tail, x, weight, t, up, None, False, None, choose),
        "core_grad": partial(core_grad, t, t, core, scale, (True, False), choose),
    }
    if len(x) == dict(ROWS)["decode"]:
        factors = down, core, up, None
        calls = {"decode": partial(decode, x, weight, *factors, scale, False, False, choose)}
    for name, call in calls.items():
        yield Row(name, "launch", len(x), call)


def bank_rows(stack: ExitStack) -> Iterator[Row]:
    """A layer in a bank, which is entered until `stack` ends, and the entering of one."""
    from fused_lowrank.bank.recompute import current

    for plan, m in BANKED_ROWS:
        batch = make_batch(BankCase("tiny", m, m, 1000, "bf16", SHRUNK), CPU)
        stack.enter_context(batch.bank.use(batch.bank.handles(batch.names)))
        x = batch.xs[0].detach().requires_grad_()
        dy = torch.randn_like(x)
        yield from calls_of(f"banked:{plan}", batch.model[0], [x], dy, plan)  # type: ignore[index]
    many = make_batch(BankCase("tiny", NAMES, NAMES, SLOTS, "bf16", SHRUNK), CPU)

    def use() -> None:
        with many.bank.use(many.names):
            current(many.bank.store.key)  # as a layer does: a use without one is an error

    yield Row("bank.use", "forward", NAMES, use)


def warmed(row: Row, driver: Stub) -> int:
    """The launches in a call, after the passes of it have been given their plan."""
    if row.forced:
        with pinned_plan(row.forced):
            row.call()  # says so, where the plan cannot compute it
    with driver.chooses(row.forced):
        row.call()
    before = driver.launches
    row.call()
    return driver.launches - before


def measure_stub(reps: int) -> list[dict[str, Any]]:
    """The lines that --stub prints."""
    from bench.support.stub import stub

    os.environ["FUSED_LOWRANK_TUNE"] = "off"
    lines: list[dict[str, Any]] = []
    eager: dict[str, float] = {}
    with stub() as driver, ExitStack() as stack:
        on, *_ = torch.backends.mkldnn.set_flags(False)
        stack.callback(torch.backends.mkldnn.set_flags, on)
        rows = [*layer_rows(), *bank_rows(stack)]
        for step in (False, True):
            some = [row for row in rows if (row.what == "step") == step]
            with torch.set_grad_enabled(step):
                counts = {row.name: warmed(row, driver) for row in some}
                times = samples({row.name: row.call for row in some}, reps)
            for row in some:
                q1, us, q3 = (n / 1e3 for n in statistics.quantiles(times[row.name], n=4))
                base = eager.setdefault("step" if step else "forward", us)  # the first row is eager
                figures = {"us": us, "q1": q1, "q3": q3, "ratio": us / base}
                lines.append(
                    {"plan": row.plan, "what": row.what, "m": row.m}
                    | {name: round(value, 3) for name, value in figures.items()}
                    | {"launches": counts[row.name]}
                )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--reps", type=int, default=3000)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--stub", action="store_true", help="every plan, as on a GPU's host")
    parser.add_argument("--out", type=Path, help="with --stub: a file for the lines as well")
    parser.add_argument("--results", type=Path, help="with --stub: a folder for a results file")
    args = parser.parse_args(argv)
    if (args.out or args.results) and not args.stub:
        parser.error("--out and --results go with --stub")
    torch.set_num_threads(1)
    if args.stub:
        key = make_key(CPU)
        lines = measure_stub(args.reps)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        print(text, end="")
        if args.out is not None:
            args.out.write_text(text)
        if args.results is not None:
            store = Store.new(args.results, key, HOST_PREFIX)
            for line in lines:
                store.add({"kind": "host", **line})
            store.end(0)
        return 0
    for kind in KINDS:
        for what, figures in measure(kind, args.reps, args.dtype).items():
            print(f"\n{kind}, {what}{'':>20} µs   / {EAGER}")
            for name, value in figures.items():
                print(f"  {name:28}{value:10.1f}{value / figures[EAGER]:15.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
