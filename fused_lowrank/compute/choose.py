"""The choice of a pass's plan, and its reason: the one place, which `explain` asks too.

An implementation is what a caller asks for:

triton     this library's kernels: a GPU, or Triton's interpreter
aten       library products and an in-place addmm_, with our own backward: any device
auto       whatever is fastest on the device: kernels or library products; the reference within
           torch.func's grad, vmap, jvp, …
reference  the equation in plain torch, differentiated by autograd: any device
isolated   what a bank makes of auto and aten on a CPU whose products mix rows (`isolation`)

Within it a plan is chosen for each `Problem`: the one that `config` names; those for batch
invariance; what was measured (`measured`); the least cost on paper (`costs`). A problem keeps its
plan while the process lives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Config, current
from . import costs, devices, isolation, measured
from .operands import Problem
from .plans import PLANS, Plan

IMPLEMENTATIONS = ("auto", "triton", "aten", "reference")
SMALL = 1 << 16  # elements of x up to which, on a CPU, the host's work is most of a call's


def small(x: Tensor) -> bool:
    """Whether a call of "auto" is one whose time is the host's, not the arithmetic's.

    It is then computed by a chain of library operations, and no plan is chosen.
    """
    if torch.compiler.is_compiling() or not x.is_cpu or x.numel() > SMALL:
        return False
    config = current()
    return (
        config.plan is None
        and not config.batch_invariance
        and not torch.is_autocast_enabled("cpu")
        and not transformed()
    )


def short(x: Tensor) -> bool:
    """Whether a call is `small`, whatever the context asks for: that may be another one where a
    checkpoint computes the call again, and what is drawn at random must be the same there.
    """
    if torch.compiler.is_compiling() or not x.is_cpu or x.numel() > SMALL:
        return False
    return not torch.is_autocast_enabled("cpu") and not transformed()


def transformed() -> bool:
    """Whether this is inside a transform of torch.func: grad, vmap, jvp, …"""
    return torch._C._are_functorch_transforms_active()


def implementation(asked: str, x: Tensor, p: int, q: int) -> str:
    """`asked`, checked, or "reference" where something has to see into the call.

    That is within torch.func's transforms, for "auto", and within torch.jit.trace, which records
    library operations alone, for "aten" too.

    Raises ValueError for an unknown one, RuntimeError if "triton" is asked for and cannot do it.
    """
    check_known(asked)
    if torch.compiler.is_compiling():
        return "reference" if asked == "auto" and transformed() else asked
    if torch.jit.is_tracing():
        if asked == "triton":
            raise RuntimeError("torch.jit.trace records no kernels: impl='auto' can be traced")
        return "reference"
    if asked == "triton":
        require_triton(x, p, q)
    return "reference" if asked == "auto" and transformed() else asked


def check_known(impl: str) -> None:
    """Raise ValueError unless it is one of the implementations."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")


def require_triton(x: Tensor, p: int, q: int) -> None:
    """Raise RuntimeError where the kernels cannot compute a call of x."""
    if reason := devices.why_not_triton(x.device, x.dtype, p, q):
        raise RuntimeError(f"impl='triton' cannot compute this: {reason}. impl='auto' can.")


def isolates(impl: str, x: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether the library's products of a call have to be padded for its rows to stay apart.

    x (…, K) or dy (…, N), down (P, K), up (N, Q): the inner sizes, forward and backward.
    """
    sizes = *down.shape, *up.shape
    return impl != "triton" and isolation.is_needed(x, sizes)


@dataclass(frozen=True)
class Decision:
    """The plan of a pass, and why."""

    plans: tuple[str, ...]  # the best first; the others are for when it cannot be launched
    why: str


CHOSEN: dict[tuple[Problem, str], Decision] = {}
Compute = Callable[[str], Any]  # computes the pass by the plan of that name


def choose(problem: Problem, impl: str, config: Config, compute: Compute | None = None) -> Decision:
    """The decision for a pass. Nothing is measured without `compute`.

    Raises ValueError for an unknown plan in `config`, RuntimeError where the plan that is named, or
    batch invariance, cannot compute the pass.
    """
    if config.batch_invariance:
        return invariant(problem, impl)
    if config.plan is not None:
        return named(config.plan, problem, impl)
    key = problem, impl
    decision = CHOSEN.get(key)
    if decision is None:
        if config.tiles:  # times with pinned tiles are not those of the plan
            compute = None
        decision = CHOSEN.setdefault(key, decide(problem, impl, compute))
    return decision


def invariant(problem: Problem, impl: str) -> Decision:
    """The plan that gives a row the same bits in batches of any size."""
    kernels = impl == "triton" or (impl == "auto" and problem.device.type == "cuda")
    if kernels and not PLANS["fixed"].why_not(problem):
        return Decision(("fixed",), "batch invariance: tiles that do not follow the rows")
    if problem.called:
        raise RuntimeError(
            "batch invariance takes no base whose module or library computes its product: it may "
            "do so in another way in batches of another size"
        )
    if PLANS["alone"].why_not(problem):
        raise RuntimeError("batch invariance by library GEMMs has no dropout: switch it off")
    return Decision(("alone",), "batch invariance: library products of a row at a time")


def named(name: str, problem: Problem, impl: str) -> Decision:
    """The plan that is asked for by name."""
    if name not in PLANS:
        raise ValueError(f"plan is {name!r}: it must be one of {', '.join(PLANS)}")
    if impl == "isolated" and name == "aten":
        name = impl
    if reason := PLANS[name].why_not(problem):
        raise RuntimeError(
            f"the pinned plan {name} cannot compute this: {reason}. Without config.use(plan=…) one "
            "that can is chosen"
        )
    return Decision((name,), "asked for by config.use(plan=…)")


def candidates(problem: Problem, impl: str) -> list[str]:
    """The plans that an implementation may take for a pass."""
    if problem.base:
        return over_base(problem, impl)
    if impl in ("aten", "isolated"):
        return [impl]
    ours = {name for name, plan in PLANS.items() if plan.ours}
    if impl == "triton":
        names = [name for name in PLANS if name in ours and name != "mixed"]
    elif problem.device.type == "cuda":
        names = ["aten"] if is_aten_best(problem) else list(PLANS)
    else:
        names = [name for name in PLANS if name not in ours]
    names = [name for name in names if PLANS[name].is_candidate(problem)]
    # Those whose own mask it is (`takes_kernels`): for others it has to be made.
    masked = [name for name in names if name in ours] if problem.dropout else []
    return masked or names


def over_base(problem: Problem, impl: str) -> list[str]:
    """The plans for a W that is no plain matrix: its library's product; or, on a GPU or where
    kernels or isolated products are asked for, those of a plain one, which it is made for them.
    """
    values = candidates(problem._replace(base="", called=False), impl)
    if problem.called:
        return [impl] if impl == "isolated" else ["called"]
    if impl in ("triton", "isolated"):
        return values
    return ["called", *values] if problem.device.type == "cuda" else ["called"]


def is_aten_best(problem: Problem) -> bool:
    """Whether on a GPU "auto" takes no other plan: in float32, with one core and no mask.

    On an H200, at commit 1cd22e1, it was the fastest, and its sums are the library's, as the
    reference's are. The kernels had 1.3 to 1.5 of its error there, with one chain of sums along K;
    no GPU has measured what they have had since.
    """
    return problem.dtype.itemsize > 2 and not problem.by_row and not problem.dropout


def decide(problem: Problem, impl: str, compute: Compute | None = None, mode: str = "") -> Decision:
    """The decision for a pass, made anew from what was measured and from costs on paper.

    `mode` is that of FUSED_LOWRANK_TUNE, and read from there if it is not given.
    """
    names = candidates(problem, impl)
    if not names:
        why = PLANS["split"].why_not(problem) or f"no plan is for {problem}"
        raise RuntimeError(f"impl={impl!r} cannot compute this: {why}. impl='auto' can.")
    if len(names) == 1:
        why = f"the only plan that impl={impl!r} takes for this"
        if problem.device.type == "cuda" and impl == "auto" and is_aten_best(problem):
            why = "the fastest known in float32; others by config.use(plan=…)"
        return Decision(tuple(names), why)
    on_paper = sorted(names, key=lambda name: predict(PLANS[name], problem).seconds)
    mode = mode or measured.mode()
    if mode == "off":
        return Decision(tuple(on_paper), "least cost on paper; FUSED_LOWRANK_TUNE is off")
    times = measured.times_of(problem.device).get(measured.name_of(problem), {})
    lacking = any(name not in times for name in names)
    if lacking and mode == "full" and compute and measured.possible(problem.device):
        times = measured.measure(problem.device, names, compute)
        measured.write(problem.device, measured.name_of(problem), times)
    there = [name for name in names if times.get(name, measured.NEVER) < measured.NEVER]
    fastest = sorted(there, key=lambda name: times[name])
    if not fastest:
        return Decision(tuple(on_paper), "least cost on paper; nothing has been measured")
    said = ", ".join(f"{name} {times[name] * 1e3:.3f} ms" for name in fastest)
    rest = [name for name in on_paper if name not in fastest]
    return Decision((*fastest, *rest), f"measured: {said}")


def predict(plan: Plan, problem: Problem) -> costs.Cost:
    """The cost of a plan on paper."""
    return costs.total(plan.work(problem), problem)


def give_up(
    problem: Problem, impl: str, config: Config, decision: Decision, error: Exception
) -> Decision:
    """The decision without its first plan, for which the device has too little.

    It holds for the process, unless it is tiles pinned in `config` that are too large. Raises the
    error again where it is another one, or no plan is left.
    """
    if not measured.is_lack(error) or len(decision.plans) == 1:
        raise error
    left = decision.plans[1:]
    given_up = f"{decision.plans[0]} cannot be launched here ({error})"
    measured.warn_once(f"{given_up}: {left[0]} takes its place")
    changed = replace(decision, plans=left)
    if not config.tiles:
        CHOSEN[problem, impl] = changed
    return changed


def for_single_steps(
    impl: str, config: Config, x: Tensor, p: int, q: int, doubles: bool = False
) -> Plan:
    """The plan whose steps a backward uses where x needs no gradient.

    `doubles` is that of the problem: compiled kernels take no factor in float64.
    """
    if not x.numel():  # nothing to launch
        return PLANS["aten"]
    if config.plan is not None and not config.batch_invariance:
        return PLANS["isolated" if impl == "isolated" and config.plan == "aten" else config.plan]
    if impl == "isolated":
        return PLANS[impl]
    kernels = takes_kernels(impl, x, p, q) and (not doubles or devices.interpreted())
    return PLANS["split" if kernels else "aten"]


def takes_kernels(impl: str, x: Tensor, p: int, q: int) -> bool:
    """Whether a call is for kernels by its implementation, whatever plan a context names.

    Then the mask of its dropout is the one that kernels draw, and else that of library products:
    a checkpoint may compute again under another plan, or under none, and must see the same mask.
    """
    return impl == "triton" or (
        impl == "auto" and x.is_cuda and not devices.why_not_triton(x.device, x.dtype, p, q)
    )
