"""Host time of a call, layer by layer: python bench/host.py

Tiny tensors on the CPU, where the arithmetic is nothing: what is left is what a call costs the
host. Each line is a fused layer's path cut one step lower; the last column compares it with the
eager chain of operations that it replaces.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cases import Case, parse
from bench.providers import PROVIDERS, Tensors, make_tensors
from fused_lowrank import functional, ops, planner
from fused_lowrank.functional import lowrank_linear

Calls = dict[str, Callable[[], Any]]
KINDS = ("xs4", "mini4x8", "lora4")


def parts(case: Case, tensors: Tensors) -> tuple[Calls, Calls]:
    """(forward without gradients, forward and backward) by name, from the layer downwards."""
    x, dy, weight = tensors.xs[0], tensors.dys[0], tensors.weight
    eager, fused = (PROVIDERS[name].build(case, tensors) for name in ("eager", "auto"))
    bare = PROVIDERS["bare"].build(case, tensors)
    factors, scale = tensors.method, tensors.scale
    down, up = factors["down"], factors["up"]
    a = factors["core"] if "core" in factors else factors.get("a_train")
    b = factors.get("b_train")
    core = ops.join(a, b)
    operands = (x, None, weight, down, a, b, up, None)
    leaves = [x, *tensors.trained("method").values()]

    def function() -> torch.Tensor:
        return lowrank_linear(x, weight, down, core, up, scale=scale)

    def chain() -> torch.Tensor:
        t = torch.nn.functional.linear(x, down)
        u = t if a is None else (t @ a if b is None else t @ (a @ b))
        return torch.nn.functional.linear(x, weight) + torch.nn.functional.linear(u * scale, up)

    def checks() -> None:
        functional.check(x, weight, down, a, b, up, None, scale, 0.0)
        planner.implementation("auto", x, case.p, case.p)

    def primitives() -> torch.Tensor:
        _, u = ops.Aten.shrink(x, down, core, scale, False, True, True)
        return ops.Aten.gemm_tail(x, weight, u, up, None, False)

    def apply() -> torch.Tensor:
        return ops.LowRankLinear.apply(*operands, scale, "aten")

    def step(call: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(), leaves, dy)

    forward: Calls = {
        "eager layer": lambda: eager(x),
        "eager chain, no module": chain,
        "fused layer": lambda: fused(x),
        "lowrank_linear": function,
        "checks and choice": checks,
        "ops.forward": lambda: ops.forward(*operands, scale, "aten", False),
        "primitives": primitives,
        "bare layer": lambda: bare(x),
    }
    both: Calls = {
        "eager layer": step(lambda: eager(x)),
        "eager chain, no module": step(chain),
        "fused layer": step(lambda: fused(x)),
        "lowrank_linear": step(function),
        "Function.apply": step(apply),
    }
    return forward, both


def medians(calls: Calls, reps: int) -> dict[str, float]:
    """Median microseconds of each, the repetitions alternating in a random order."""
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
    return {name: statistics.median(several) / 1e3 for name, several in times.items()}


def measure(kind: str, reps: int, dtype: str = "fp32") -> dict[str, dict[str, float]]:
    """{"forward": …, "forward + backward": …}, microseconds by part."""
    case = parse("tiny", "square", 2, kind, dtype)
    forward, both = parts(case, make_tensors(case, torch.device("cpu")))
    with torch.no_grad():
        first = medians(forward, reps)
    return {"forward": first, "forward + backward": medians(both, reps)}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--reps", type=int, default=3000)
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for kind in KINDS:
        for what, figures in measure(kind, args.reps, args.dtype).items():
            print(f"\n{kind}, {what}{'':>20} µs   / eager layer")
            for name, value in figures.items():
                print(f"  {name:28}{value:10.1f}{value / figures['eager layer']:14.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
