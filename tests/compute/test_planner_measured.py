"""The plans that are chosen on paper for an H200, held against what plans took on one.

The times are those of `bench/results/nvidia-h200-*`. Those of `relay` are of the prototype that its
present kernel is written after (`h200_prototypes.json`): the kernel of then has gone.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.support.cases import SETS, parse
from bench.support.providers import passes as problems_of
from bench.support.store import BANK_PREFIX
from bench.support.tables import Device, load
from fused_lowrank.compute import choose, costs, devices
from fused_lowrank.compute.operands import Problem
from fused_lowrank.compute.plans import PLANS
from fused_lowrank.compute.steps.kernels import tile_of
from fused_lowrank.kernels.tiles import SMALL_M, TARGETS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PROTOTYPES = json.loads((ROOT / "tests/support/h200_prototypes.json").read_text())
THEN = "1cd22e10c3c9"  # the commit at which relay was another kernel, and tiles were these:
SIDES = {False: (128, 256), True: (64, 32)}  # of gemm_tail without dropout, up to SMALL_M rows
LATER = "c733a46"  # and one at which banks were measured again
GPU, PARTS = torch.device("cuda:0"), ("forward", "backward")
DEAREST, MEAN = 1.03, 1.01  # of what is chosen over the best: in one pass, over all


class Measured(NamedTuple):
    """A pass, and what it took by each plan, as a multiple of the bare layer's."""

    case: str
    problem: Problem
    times: dict[str, float]


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that the planner takes for an H200."""
    peaks = costs.of_gpu("NVIDIA H200", 9, 132)
    monkeypatch.setattr(costs, "peaks", lambda device: peaks)
    monkeypatch.setattr(devices, "target", lambda device: TARGETS["sm_90"])


def device_of(prefix: str = "", folder: str = "") -> Device:
    """What was measured on the H200."""
    found = load(RESULTS / folder, prefix)
    (device,) = (d for d in found if d.key["device"] == "NVIDIA H200")
    return device


def able(problem: Problem) -> list[str]:
    """The plans that can compute a pass, whether it is left to them or not."""
    return [name for name, plan in PLANS.items() if plan.is_candidate(problem)]


def passes(device: Device) -> list[Measured]:
    """All passes of the cases of layers of which two plans or more were measured."""
    found = []
    known_cases = {case.name: case for case in SETS["full"]}
    for case, line in device.cases.items():
        problems = problems_of(known_cases[case], GPU)
        for part, problem, then in zip(PARTS, problems, line["planned"], strict=True):
            names = able(problem)
            known = {name: device.relative(case, name, part) for name in names}
            if known.get(then, 1.0) is None:  # a plan that has no other pass, but was chosen here
                known[then] = device.relative(case, "auto", part)
            if device.key["commit"] == THEN:
                known["relay"] = of_prototype(device, case, problem)
                known |= {} if has_tile_of_then(problem) else {"split": None}
            times = {name: value for name, value in known.items() if value and name in names}
            if len(times) > 1:
                found.append(Measured(f"{case} {part}", problem, times))
    return found


def of_prototype(device: Device, case: str, problem: Problem) -> float | None:
    """What the prototype of `relay` took for a pass of LoRA-XS, which is what it computes.

    A backward is measured with the core's gradient in it, which the prototype does not make.
    """
    if "/lora_xs/" not in case or problem.dtype != torch.bfloat16 or problem.dropout:
        return None
    row = device.row(case, "bare")
    assert row is not None
    for *sizes, transposed, ratio in PROTOTYPES["relay"]:
        if (*sizes, transposed) == (*problem[2:6], problem.transposed):
            if not transposed:
                return ratio
            return ratio + PROTOTYPES["core_grad_us"][str(problem.p)] / 1e3 / row["backward"][1]
    return None


def has_tile_of_then(problem: Problem) -> bool:
    """Whether `split` launches `gemm_tail` with the tile with which it was measured."""
    tile = tile_of("gemm_tail", problem)
    assert tile is not None
    few, dropped = problem.m <= SMALL_M, problem.dropout and problem.transposed
    sixteen = problem.dtype.itemsize == 2 and not dropped
    return not sixteen or (tile.block_m, tile.block_n) == SIDES[few]


def by_row(device: Device) -> list[Measured]:
    """The forwards of a bank's layer of 4096 × 4096, each row with a core of its own."""
    found = []
    for case, line in device.cases.items():
        if line["k"]:  # not many projections at once
            case_of_one = parse("llama-3.1-8b", "q", line["m"])
            assert (line["k"], line["dtype"]) == (case_of_one.k, case_of_one.dtype)
            problem = problems_of(case_of_one, GPU)[0]._replace(by_row=True)
            names = able(problem)
            known = {name: device.relative(case, name, "forward") for name in names}
            if device.key["commit"] == THEN:  # decode had one program for all u
                known |= {"relay": None, "decode": None}
                known |= {} if has_tile_of_then(problem) else {"split": None}
            times = {name: value for name, value in known.items() if value}
            if len(times) > 1:
                found.append(Measured(case, problem, times))
    return found


def dearer(measured: Measured) -> tuple[float, str]:
    """How much dearer the choice is than the best, and which they are; of measured plans alone."""
    plans = choose.decide(measured.problem, "auto", mode="off").plans
    chosen = next(name for name in plans if name in measured.times)
    best = min(measured.times, key=lambda name: measured.times[name])
    said = (
        f"{measured.case}: {chosen} {measured.times[chosen]:.3f}, {best} {measured.times[best]:.3f}"
    )
    return measured.times[chosen] / measured.times[best], said


def test_what_is_chosen_on_paper_is_nearly_the_best() -> None:
    """At most 3% dearer in any pass, 1% in the mean."""
    measured = passes(device_of())
    assert len(measured) >= 50
    assert any(min(one.times, key=one.times.get) == "relay" for one in measured)
    several = sorted((dearer(one) for one in measured), reverse=True)
    mean = statistics.mean(ratio for ratio, _ in several)
    off = sum(ratio > 1.0 for ratio, _ in several)
    said = [f"mean {mean:.4f}, {off} of {len(several)} not the best; dearest {several[0][0]:.3f}"]
    said += [text for ratio, text in several if ratio > 1.0]
    print("\n".join(said))
    assert mean <= MEAN and several[0][0] <= DEAREST, "\n".join(said)  # noqa: PT018


def test_rows_with_cores_of_their_own() -> None:
    """The same for a bank's forward, of then and at the commit whose name the folder has."""
    measured = [one for of in ("", LATER) for one in by_row(device_of(BANK_PREFIX, of))]
    several = sorted(map(dearer, measured))
    assert {"decode", "relay", "split"} <= {name for one in measured for name in one.times}
    said = "\n".join(text for _, text in several)
    print(said)
    assert len(several) >= 5
    assert several[-1][0] <= DEAREST, said


def test_times_on_paper_are_those_that_were_measured() -> None:
    """Of forwards in 16 bits without dropout, within 5% in the mean."""
    device, errors = device_of(), []
    for one in passes(device):
        problem, (case, part) = one.problem, one.case.split()
        bare = device.row(case, "bare")
        assert bare is not None
        if part == "forward" and problem.dtype.itemsize == 2 and not problem.dropout:
            for name, ratio in one.times.items():
                took = ratio * bare["forward"][1] / 1e3
                on_paper = choose.predict(PLANS[name], problem).seconds
                errors.append((abs(on_paper / took - 1.0), f"{case} {name}"))
    mean, (worst, which) = statistics.mean(error for error, _ in errors), max(errors)
    said = f"{len(errors)} times: off by {mean:.3f} in the mean, by {worst:.3f} for {which}"
    print(said)
    assert len(errors) >= 80, said
    assert mean <= 0.05 and worst <= 0.25, said  # noqa: PT018


def test_what_steps_in_float32_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forwards: `mixed` differs from `first` by our shrink, `first` from `aten` by adding to y.

    On paper it is 0.6 to 1.6 of what was measured; with half or twice of its constant it is not.
    """
    device = device_of()
    wide = [one for one in passes(device) if one.problem.dtype == torch.float32]
    wide = [one for one in wide if one.case.endswith("forward") and not one.problem.dropout]
    assert len(wide) >= 2

    def ratios(more: str, less: str) -> list[float]:
        found = []
        for one in wide:
            bare = device.row(one.case.split()[0], "bare")
            assert bare is not None
            took = (one.times[more] - one.times[less]) * bare["forward"][1] / 1e3
            several = (choose.predict(PLANS[name], one.problem).seconds for name in (more, less))
            found.append((next(several) - next(several)) / took)
        return found

    def are_near(found: list[float]) -> bool:
        return all(0.6 <= ratio <= 1.6 for ratio in found)

    pairs = {"FFMA_SHRINK": ("mixed", "first"), "ADDED_TO": ("first", "aten")}
    for name, pair in pairs.items():
        assert are_near(ratios(*pair)), (name, ratios(*pair))
        for factor in (0.5, 2.0):
            with monkeypatch.context() as context:
                context.setattr(costs, name, getattr(costs, name) * factor)
                assert not are_near(ratios(*pair)), (name, factor, ratios(*pair))
