"""Checks and times the providers of one case, all in one process, on the same tensors.

Nothing is timed before its result has been checked. Repetitions of the providers alternate, so
that a drift of the clock hits all alike, and ratios to the bare layer are taken within a round.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fused_lowrank.compute.reference import (
    TORCH,
    Products,
    lowrank_linear_reference,
    through_core,
)
from fused_lowrank.methods import METHODS
from fused_lowrank.methods.method import MAGNITUDE, Parts
from fused_lowrank.testing import Measured, Results, mapped, pooled_ratio, results

from .cases import Case
from .providers import Absent, Provider
from .tensors import DORA, Call, Tensors, make_tensors, within
from .timers import Sample, Timer, synchronise

Row = dict[str, Any]
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler writes a line per call
SEED = 20
NO_DROPOUT = 1e-9  # a probability that drops nothing, for those whose masks are not torch's
PARTS = ("forward", "backward", "step")


@dataclass
class Settings:
    """The bounds of a case's repetitions: as many as `seconds` allow, within them."""

    seconds: float = 10.0
    min_reps: int = 5
    max_reps: int = 50


def memory(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """(at the peak, at the end) bytes above what was allocated before; the result is kept alive."""
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        synchronise(device)
        peak, end = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        del kept
        return peak - before, end - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        kept = call()
    del kept
    events: Any = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak, held


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes allocated at the peak of `call`, above what was there before."""
    return memory(call, device)[0]


def saved_bytes(forward: Callable[[], Tensor], fixed: set[int]) -> int:
    """Bytes of the distinct storages that the backward keeps, less those that are there anyway."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        for plain in within([tensor]):
            storage = plain.untyped_storage()
            kept.setdefault(storage.data_ptr(), storage)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    total = sum(storage.nbytes() for address, storage in kept.items() if address not in fixed)
    del y
    return total


@dataclass
class Truth:
    """The result of an equation in fp64, and the error of the reference in the case's dtype."""

    exact: Results
    same: Results
    sizes: dict[str, float]  # norm of the equation on absolute values

    def compare(self, got: Results) -> list[Measured]:
        """The error of each result beside the reference's; other shapes or dtypes raise."""
        measured = []
        for name, same in self.same.items():
            tensor = got[name]
            if tensor.shape != same.shape or tensor.dtype != same.dtype:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} {tensor.dtype}, "
                    f"the reference's {tuple(same.shape)} {same.dtype}"
                )
            unit = max(torch.finfo(d).eps for d in (tensor.dtype, self.same["y"].dtype)) / 2
            error, reference = ((t.double() - self.exact[name]).norm() for t in (tensor, same))
            floor = 2 * unit * self.sizes[name]
            measured.append(Measured(name, same.numel(), float(error), float(reference), floor))
        return measured


def keep_mask(case: Case, x: Tensor) -> Tensor:
    """The mask that torch's dropout draws for x with our seed."""
    torch.manual_seed(SEED)
    return torch.nn.functional.dropout(torch.ones_like(x), case.dropout) != 0


@torch.no_grad()
def row_norms(weight: Tensor, parts: Parts, scale: float) -> Tensor:
    """‖W + ΔW‖ of each row, of the matrix itself: a constant in DoRA's gradient."""
    turned = through_core(parts.down.t(), parts.core, scale) @ parts.up.t()
    return (weight + turned.t()).norm(dim=1)


def by_module(tensors: Tensors) -> Products:
    """Products in which that with W is the quantised module's."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is tensors.weight:
            return tensors.module(x)  # type: ignore[misc]
        return TORCH.linear(x, weight, bias)

    return TORCH._replace(linear=linear)


def make_truth(case: Case, tensors: Tensors, equation: str, masked: bool) -> Truth:
    """The truth for the first set of inputs, by the row of the method that the equation is of.

    It is of the values of a quantised W. The reference's error beside it is that of the library's
    own product where x is quantised as well.
    """
    factors, scale = tensors.factors(equation), tensors.scale
    row = METHODS["lora"][0].row if equation.startswith("lora") else case.row
    keep = keep_mask(case, tensors.xs[0]) if masked and case.dropout and factors else None

    def reference(x: Tensor, weight: Tensor, products: Products = TORCH, **own: Tensor) -> Tensor:
        if not own:
            return products.linear(x, weight, None)
        magnitude = own.pop(MAGNITUDE, None)
        down, core, up, gain = row.made(own, weight, scale)
        if magnitude is not None:
            gain = magnitude / norm.to(torch.promote_types(magnitude.dtype, torch.float32))
        low = None if keep is None else x * keep / (1 - case.dropout)
        given = {"scale": scale, "low": low, "gain": gain, "products": products}
        return lowrank_linear_reference(x, weight, down, core, up, **given)  # type: ignore

    dy, base = tensors.dys[0], tensors.base
    operands: dict[str, Any] = {"x": tensors.xs[0], "weight": tensors.weight, **factors}
    wide = mapped(operands, torch.Tensor.double)
    if base is not None:
        wide["weight"] = base.values(torch.float64)
    if equation.endswith(DORA):
        plain = {name: own for name, own in wide.items() if name in factors and name != MAGNITUDE}
        norm = row_norms(wide["weight"], row.made(plain, wide["weight"], scale), scale)
    products = TORCH if base is None or base.is_exact() else by_module(tensors)
    same = results(partial(reference, products=products), operands, dy)
    exact = results(reference, wide, dy.double())
    absolute = mapped(wide, torch.abs)
    sizes = results(reference, absolute, dy.double().abs())
    return Truth(exact, same, {name: float(size.norm()) for name, size in sizes.items()})


@dataclass
class Runner:
    """One provider on one case: its call, and the step that is timed."""

    provider: Provider
    case: Case
    tensors: Tensors
    call: Call
    hold: float = 0.0

    @property
    def trained(self) -> dict[str, Any]:
        """The trained factors by name."""
        return self.tensors.trained(self.provider.equation)

    def forward(self, i: int) -> Callable[[], Tensor]:
        """The forward of the i-th repetition."""
        x = self.tensors.xs[i % len(self.tensors.xs)]
        return lambda: self.call(x)

    def backward(self, i: int) -> Callable[[Tensor], Any]:
        """The backward of the i-th repetition: dx and the gradients of what is trained."""
        x, dy = (several[i % len(several)] for several in (self.tensors.xs, self.tensors.dys))
        leaves = [x, *self.trained.values()]
        return lambda y: torch.autograd.grad(y, leaves, dy)

    def step(self, i: int = 0) -> None:
        """Forward and backward."""
        self.backward(i)(self.forward(i)())

    def results(self, call: Call) -> Results:
        """y and the gradients by the operands' names, for the first inputs."""
        torch.manual_seed(SEED)
        y = call(self.tensors.xs[0])
        grads = self.backward(0)(y)
        named = {f"d{name}": g for name, g in zip(["x", *self.trained], grads, strict=True)}
        return {"y": y.detach(), **named}

    def check(self, truth: Truth) -> Row:
        """The row's `error`; raises WrongResult."""
        call = self.call
        if self.provider.own_mask and self.case.dropout:
            call = self.provider.build(replace(self.case, dropout=NO_DROPOUT), self.tensors)
        measured = truth.compare(self.results(call))
        if bad := [m for m in measured if not m.within]:
            said = [f"error of {m.name} is {m.error:.3g}, at most {limit(m):.3g}" for m in bad]
            raise WrongResult("; ".join(said))
        y = measured[0]
        norm = float(truth.exact["y"].norm())
        return {
            "y": y.error / norm,
            "reference": y.reference / norm,
            "ratio": pooled_ratio(measured),
        }


def limit(m: Measured) -> float:
    """The largest error that `Measured.within` lets pass."""
    return max(2.5 * m.reference, m.floor)


class WrongResult(Exception):
    """A provider's result is not the equation's."""


class Poisoned(Exception):
    """The device takes no more work in this process; `row` says who was running."""

    def __init__(self, row: Row) -> None:
        super().__init__(row["why"])
        self.row = row


def failure(provider: Provider, error: Exception, device: torch.device) -> Row:
    """The row of a provider that failed; raises Poisoned if the device is lost with it."""
    if isinstance(error, Absent):
        return {"provider": provider.name, "status": "absent", "why": str(error)}
    status = "wrong" if isinstance(error, WrongResult) else "error"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        status = "out of memory"
    text = str(error).strip().splitlines() or [""]
    name = "" if isinstance(error, WrongResult) else f"{type(error).__name__}: "
    row: Row = {"provider": provider.name, "status": status, "why": f"{name}{text[0]}"[:200]}
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except Exception:
            raise Poisoned(row) from error
    return row


def summary(values: Sequence[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def prepare(runner: Runner, truth: Truth, device: torch.device) -> Row:
    """Check the result, measure the memory, warm up: everything but the timing."""
    error = runner.check(truth)
    for i in range(2):
        runner.step(i)
    synchronise(device)
    return {
        "provider": runner.provider.name,
        "status": "ok",
        "error": error,
        "peak": peak_bytes(runner.step, device),
        "saved": saved_bytes(runner.forward(0), runner.tensors.fixed_storages()),
    }


def time_all(
    runners: list[Runner], rows: dict[str, Row], timer: Timer, settings: Settings, device: Any
) -> None:
    """Time the runners in turn and put the figures into their rows."""
    samples: dict[str, list[Sample]] = {runner.provider.name: [] for runner in runners}
    reps, done, start, order = settings.max_reps, 0, 0.0, random.Random(SEED)
    while done < reps:
        for runner in order.sample(runners, len(runners)):  # nobody always follows the same
            name = runner.provider.name
            try:
                with runner.provider.pinned():
                    sample = timer.sample(runner.forward(done), runner.backward(done), runner.hold)
            except Exception as error:
                rows[name] = failure(runner.provider, error, device)
                runners.remove(runner)
                continue
            samples[name].append(sample)
            runner.hold = min(5.0, 1.5 * min(s.host for s in samples[name]) + 0.05)
        done += 1
        if done == 1:  # the first round is a rehearsal: it says how many there is time for
            start, samples = time.perf_counter(), {name: [] for name in samples}
        elif done == 2:
            each = time.perf_counter() - start
            wanted = int(settings.seconds / max(each, 1e-9))
            reps = 1 + max(settings.min_reps, min(settings.max_reps, wanted))
    floor = samples.get("bare", [])
    for runner in runners:
        own, row = samples[runner.provider.name], rows[runner.provider.name]
        row["reps"], row["host"] = len(own), summary([s.host for s in own])
        for part in PARTS:
            row[part] = summary([duration(s, part) for s in own])
        if len(floor) == len(own):
            row["relative"] = {
                part: summary([duration(s, part) / duration(f, part)
                               for s, f in zip(own, floor, strict=True)])
                for part in PARTS
            }  # fmt: skip


def duration(sample: Sample, part: str) -> float:
    """A part of a repetition, in milliseconds."""
    both = sample.forward + sample.backward
    return both if part == "step" else max(getattr(sample, part), 1e-9)


def measure_case(
    case: Case,
    providers: Sequence[Provider],
    timer: Timer,
    device: torch.device,
    settings: Settings | None = None,
) -> list[Row]:
    """One row per provider: figures, or why there are none."""
    torch._dynamo.reset()
    rows: dict[str, Row] = {}
    runners: list[Runner] = []
    truths: dict[tuple[str, bool], Truth] = {}
    there = []
    for provider in providers:
        if why := provider.why_absent(case, device):
            rows[provider.name] = {"provider": provider.name, "status": "absent", "why": why}
        else:
            there.append(provider)
    if not there:
        return [rows[provider.name] for provider in providers]
    tensors = make_tensors(case, device)
    for provider in there:
        try:
            key = provider.equation, not provider.own_mask
            if key not in truths:
                truths[key] = make_truth(case, tensors, *key)
            runner = Runner(provider, case, tensors, provider.build(case, tensors))
            with provider.pinned():
                rows[provider.name] = prepare(runner, truths[key], device)
            runners.append(runner)
        except Exception as error:
            rows[provider.name] = failure(provider, error, device)
    truths.clear()
    with no_collection():
        time_all(runners, rows, timer, settings or Settings(), device)
    return [rows[provider.name] for provider in providers]
