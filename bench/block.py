"""The whole step: one transformer block of Llama-3.1-8B's shape, all seven projections adapted.

Forward, backward and AdamW, with and without checkpointing: python bench/block.py. On a CPU a small
block of the same form. Figures go to the latest results file of this code (run.py), or a new one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.support import cases, harness, timers
from bench.support.store import Refused, Store, make_key
from fused_lowrank import adapt

PROJECTIONS = ["q", "k", "v", "o", "gate", "up", "down"]
CHECK_ROWS = 32
LOOP = 5  # steps of a loop that is timed as a whole


class Shape(NamedTuple):
    """The sizes of a block."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int

    def __str__(self) -> str:
        return f"hidden {self.hidden}, ffn {self.ffn}, {self.heads} heads, {self.kv_heads} kv heads"


LLAMA = Shape(4096, 14336, 32, 8)
SMALL = Shape(256, 896, 8, 2)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of (batch, heads, sequence, size), base 500,000."""
    half = x.shape[-1] // 2
    rate = 500_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """RMSNorm, rotary grouped-query attention, RMSNorm, SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.size = shape.hidden // shape.heads
        self.groups = shape.heads // shape.kv_heads
        kv = shape.kv_heads * self.size
        self.norm1, self.norm2 = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.q = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k = nn.Linear(shape.hidden, kv, bias=False)
        self.v = nn.Linear(shape.hidden, kv, bias=False)
        self.o = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """(batch, sequence, heads · size) as (batch, heads, sequence, size)."""
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden), the same."""
        h = self.norm1(x)
        q, k, v = (
            rotate(self.split(self.q(h))),
            rotate(self.split(self.k(h))),
            self.split(self.v(h)),
        )
        k, v = (part.repeat_interleave(self.groups, dim=1) for part in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def adapted(method: str, fused: bool, **keywords: Any) -> Callable[[Block], nn.Module]:
    """A builder by this library."""

    def build(block: Block) -> nn.Module:
        with contextlib.redirect_stdout(io.StringIO()):
            adapt(
                block, method, target_modules=PROJECTIONS, fused=fused, progress=False, **keywords
            )
        return block

    return build


def frozen(block: Block) -> nn.Module:
    """The block without adapters; x alone has a gradient."""
    return block.requires_grad_(False)


def peft_lora(block: Block) -> nn.Module:
    """PEFT's LoRA, its factors in the block's dtype."""
    from peft import LoraConfig, inject_adapter_in_model

    dtype = block.q.weight.dtype
    config = LoraConfig(r=16, lora_alpha=16, target_modules=PROJECTIONS)
    return inject_adapter_in_model(config, block).to(dtype)


MINI = {"r": 8, "a": 64, "b": 64}
# name → (builder, the builder that says what is right)
BUILDERS: dict[str, tuple[Callable[[Block], nn.Module], Callable[[Block], nn.Module]]] = {
    "frozen": (frozen, frozen),
    "fused-xs": (adapted("lora_xs", True, r=16), adapted("lora_xs", False, r=16)),
    "fused-mini": (adapted("lora_mini", True, **MINI), adapted("lora_mini", False, **MINI)),
    "eager-xs": (adapted("lora_xs", False, r=16),) * 2,
    "eager-mini": (adapted("lora_mini", False, **MINI),) * 2,
    "peft-lora": (peft_lora, frozen),  # starts as the frozen block
    "fused-lora": (adapted("lora", True, r=16), frozen),
}


def check(block: nn.Module, base: Block, right: Callable[[Block], nn.Module], hidden: int) -> None:
    """Raise WrongResult unless y is as near to fp64 as the reference's of the same dtype."""
    twin = right(copy.deepcopy(base))
    own = dict(block.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(own.get(name, parameter))
    like = next(base.parameters())
    x = torch.randn(1, CHECK_ROWS, hidden, device=like.device).to(like.dtype)
    with torch.no_grad():
        y, same, exact = block(x), twin(x), copy.deepcopy(twin).double()(x.double())
    error, reference = (float((value.double() - exact).norm()) for value in (y, same))
    least = float(torch.finfo(like.dtype).eps * exact.norm())
    if not error <= max(2.5 * reference, least):
        raise harness.WrongResult(f"error of y is {error:.3g}, the reference's {reference:.3g}")


class Step:
    """Forward, backward and AdamW of one adapted block."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.checkpointed = block, False
        trained = [p for p in block.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        self.hold = 0.0
        self.samples: list[timers.Sample] = []

    def forward(self, x: Tensor) -> Tensor:
        """y, checkpointed or not."""
        if self.checkpointed:
            return checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)

    def backward(self, x: Tensor, dy: Tensor, y: Tensor) -> None:
        """The gradients and the optimiser's step."""
        y.backward(dy)
        x.grad = None
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def whole(self, x: Tensor, dy: Tensor) -> None:
        """One step."""
        self.backward(x, dy, self.forward(x))


def measure(
    steps: dict[str, Step], x: Tensor, dy: Tensor, timer: timers.Timer, rounds: int
) -> list[harness.Row]:
    """One row per block, the repetitions alternating."""
    rows: dict[str, harness.Row] = {}
    for i in range(rounds + 2):
        for name, step in steps.items():
            if rows.get(name, {}).get("status", "ok") != "ok":
                continue
            try:
                if i == 0:  # warm up, and the optimiser's state comes to be
                    step.samples = []
                    step.whole(x, dy)
                elif i == 1:
                    peak = harness.peak_bytes(partial(step.whole, x, dy), x.device)
                    held = harness.memory(partial(step.forward, x), x.device)[1] - dy.nbytes
                    rows[name] = {"provider": name, "status": "ok", "peak": peak, "held": held}
                else:
                    sample = timer.sample(
                        partial(step.forward, x), partial(step.backward, x, dy), step.hold
                    )
                    step.samples.append(sample)
                    step.hold = min(50.0, 1.5 * sample.host)
            except Exception as error:
                x.grad = None
                step.samples = []
                why = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
                oom = isinstance(error, torch.OutOfMemoryError)
                status = "out of memory" if oom else "error"
                rows[name] = {"provider": name, "status": status, "why": why}
    for name, row in rows.items():
        if row["status"] == "ok":
            spent = [harness.duration(sample, "step") for sample in steps[name].samples]
            row["step"] = harness.summary(spent)
            row["tokens_per_s"] = x.shape[1] / row["step"][1] * 1e3
    there = {name: partial(steps[name].whole, x, dy) for name, row in rows.items() if "step" in row}
    for name, walls in by_the_wall(there, x.device, rounds).items():
        rows[name]["wall"] = harness.summary(walls)
    return list(rows.values())


def by_the_wall(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds a step of a user's loop, by the clock on the wall, the loops in turn.

    Nothing is held back and nothing is waited for but the end of a loop of `LOOP` steps: where the
    host is slower than the device, this is the host's time, which `step` leaves out.
    """
    walls: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(1, rounds // 2)):
        for name, call in calls.items():
            timers.synchronise(device)
            start = time.perf_counter()
            for _ in range(LOOP):
                call()
            timers.synchronise(device)
            walls[name].append((time.perf_counter() - start) * 1e3 / LOOP)
    return walls


def build(names: Sequence[str], shape: Shape, device: torch.device) -> tuple[dict[str, Step], list]:
    """The blocks that can be built and are right, and the rows of those that are not."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = Block(shape).to(device, dtype)
    steps, failed = {}, []
    for name in names:
        make, right = BUILDERS[name]
        try:
            block = make(copy.deepcopy(base))
            if name.endswith(("xs", "mini")):
                with torch.no_grad():  # a core that shows
                    for parameter in block.parameters():
                        if parameter.requires_grad:
                            parameter.normal_(std=1 / math.sqrt(parameter.shape[0]))
            check(block, base, right, shape.hidden)
            steps[name] = Step(block)
        except Exception as error:
            wrong = isinstance(error, harness.WrongResult)
            why = f"{'' if wrong else type(error).__name__ + ': '}{error}"[:200]
            failed.append({"provider": name, "status": "wrong" if wrong else "error", "why": why})
    return steps, failed


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 2 for bad arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--providers", default="all", help=f"of {','.join(BUILDERS)}")
    add("--sequences", help="lengths, by commas; default 2048,4096,8192 on a GPU, 128,256 on a CPU")
    add("--rounds", type=int, default=10)
    add("--out", type=Path, default=Path("bench_results"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--timer", default=os.environ.get("BENCH_TIMER"))
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    wanted = list(BUILDERS) if args.providers == "all" else args.providers.split(",")
    try:
        names = cases.known(wanted, BUILDERS, "provider")
        timer_name = args.timer or ("device" if gpu else "host")
        cases.known([timer_name], timers.TIMERS, "timer")
        key = make_key(device)
        store = Store.resume(args.out, key) or Store.new(args.out, key)
    except (ValueError, Refused) as error:
        print(f"block.py: {error}", file=sys.stderr)
        return 2
    shape, timer = LLAMA if gpu else SMALL, timers.TIMERS[timer_name](device)
    lengths = args.sequences or ("2048,4096,8192" if gpu else "128,256")
    steps, failed = build(names, shape, device)
    dtype = torch.bfloat16 if gpu else torch.float32
    missing = next((e["missing"] for e in reversed(store.lines) if e["kind"] == "end"), 0)
    jobs = [(int(length), on) for length in lengths.split(",") for on in (False, True)]
    for length, on in tqdm(jobs, unit="setting", disable=None):
        x = torch.randn(1, length, shape.hidden, device=device).to(dtype).requires_grad_()
        dy = torch.randn(1, length, shape.hidden, device=device).to(dtype)
        for step in steps.values():
            step.checkpointed = on
        for row in [*measure(steps, x, dy, timer, args.rounds), *failed]:
            about = {"sequence": length, "checkpoint": on, "shape": str(shape)}
            store.add({"kind": "block", **about, **row})
            figures = row.get("why") or (
                f"{row['tokens_per_s']:10.0f} tokens/s {row['wall'][1]:9.2f} ms by the wall "
                f"{row['peak'] / 2**20:10.1f} MiB peak"
                f"{row['held'] / 2**20:10.1f} MiB held"
            )
            marked = "checkpointed" if on else ""
            print(f"{length:6} {marked:13} {row['provider']:>11} {row['status']:>6} {figures}")
    store.end(missing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
