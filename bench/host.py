"""Host time of a call, layer by layer: python bench/host.py

Tiny tensors on the CPU, where the arithmetic is nothing: what is left is what a call costs the
host. The last column compares it with a module of the eager operations that the fused layer
replaces; below the fused layer stand the steps that it is made of.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cases import Case, parse
from bench.providers import PROVIDERS, Tensors, layer, make_tensors
from fused_lowrank import lowrank_linear, ops

Calls = dict[str, Callable[[], Any]]
KINDS = ("xs4", "mini4x8", "lora4")
EAGER = "eager module"


class Chain(torch.nn.Module):
    """The case's layer as one would write it: a module around the chain of operations."""

    weight: torch.nn.Parameter
    down: torch.nn.Parameter
    core: torch.nn.Parameter
    a_train: torch.nn.Parameter
    b_train: torch.nn.Parameter
    up: torch.nn.Parameter

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.weight, self.scale = tensors.weight, tensors.scale
        self.names = tuple(tensors.method)
        for name, factor in tensors.method.items():
            self.register_parameter(name, factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W·x and the low-rank path, added."""
        u = linear(x, self.down)
        if "core" in self.names:
            u = u @ self.core
        elif "a_train" in self.names:
            u = u @ (self.a_train @ self.b_train)
        return linear(x, self.weight) + linear(u * self.scale, self.up)


def parts(case: Case, tensors: Tensors) -> tuple[Calls, Calls]:
    """(forward without gradients, forward and backward) by name, from the layer downwards."""
    x, dy, weight, scale = tensors.xs[0], tensors.dys[0], tensors.weight, tensors.scale
    factors = tensors.method
    down, up = factors["down"], factors["up"]
    a = factors["core"] if "core" in factors else factors.get("a_train")
    core = ops.join(a, factors.get("b_train"))
    leaves = [x, *tensors.trained("method").values()]
    layers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        EAGER: Chain(tensors),
        "fused layer": PROVIDERS["auto"].build(case, tensors),
        "lowrank_linear": lambda x: lowrank_linear(x, weight, down, core, up, scale=scale),
        "its operations": lambda x: ops.small(x, weight, down, core, up, None, scale),
        "fused layer, aten": layer("", True, "aten", "method")(case, tensors),
        "reference layer": PROVIDERS["eager"].build(case, tensors),
        "bare layer": PROVIDERS["bare"].build(case, tensors),
    }

    def step(call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(x), leaves, dy)

    forward: Calls = {name: partial(call, x) for name, call in layers.items()}
    both: Calls = {name: step(call) for name, call in layers.items() if name != "bare layer"}
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
            print(f"\n{kind}, {what}{'':>20} µs   / {EAGER}")
            for name, value in figures.items():
                print(f"  {name:28}{value:10.1f}{value / figures[EAGER]:15.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
