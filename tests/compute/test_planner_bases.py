"""Which plan computes a pass over a quantised W, on paper: a device is taken for an H200."""

from __future__ import annotations

import pytest
import torch
from planner_cases import CPU, H200, at

from fused_lowrank.compute import choose, costs, devices
from fused_lowrank.compute.operands import Problem
from fused_lowrank.compute.plans import PLANS

K = N = 4096
GPU = torch.device("cuda:0")
FEW, SOME, MANY = (1, costs.FUSED_ROWS), (8, 16, 64, 512), (2048, 8192)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the planner takes for an H200; the CPU stays one."""
    tiles = pytest.importorskip("fused_lowrank.kernels.tiles")
    peaks = costs.peaks
    monkeypatch.setattr(devices, "target", lambda device: tiles.TARGETS["sm_90"])
    monkeypatch.setattr(costs, "peaks", lambda d: H200 if d.type == "cuda" else peaks(d))


def over(base: str, m: int, transposed: bool = False, **other: object) -> Problem:
    """A pass over such a W."""
    kind = {"device": GPU, "dtype": torch.bfloat16, "transposed": transposed, "bulk": m > 64}
    return at(m, K, N, **{**kind, "base": base, **other})


def chosen(problem: Problem) -> str:
    """The plan that is taken without measuring."""
    return choose.decide(problem, "auto", mode="off").plans[0]


def cost(name: str, problem: Problem) -> costs.Cost:
    """What it costs."""
    return choose.predict(PLANS[name], problem)


def test_few_rows_go_through_four_bits_as_they_are_stored() -> None:
    """By the library's kernel; more rows, and the way back, by the values and our kernels."""
    for m in FEW:
        assert chosen(over("4bit", m)) == "called"
        assert cost("called", over("4bit", m)).bytes < 0.6 * N * K
    for m in (*SOME, *MANY):
        assert PLANS[chosen(over("4bit", m))].ours
        assert cost("called", over("4bit", m)).bytes > (0.5 + 2 + 2) * N * K
    for m in (*FEW, *SOME, *MANY):
        assert PLANS[chosen(over("4bit", m, transposed=True))].ours


@pytest.mark.parametrize("base", ["4bit", "8bit", "subclass"])
@pytest.mark.parametrize("transposed", [False, True])
def test_plans_of_plain_matrices_cost_the_values_more(base: str, transposed: bool) -> None:
    """The values are read as they are stored, and written, before all that a plain W takes."""
    for m in (*FEW, *SOME, *MANY):
        problem = over(base, m, transposed)
        made = costs.total([costs.dequantised(problem)], problem)
        assert made.bytes == N * K * (costs.stored(problem) + 2)
        for name in choose.candidates(problem, "auto"):
            if name != "called":
                own = cost(name, problem._replace(base=""))
                assert cost(name, problem).seconds == pytest.approx(made.seconds + own.seconds)
                assert cost(name, problem).launches == own.launches + 1
        # On the way back, and where no kernel reads what is stored, the base's product is by them.
        if base != "4bit" or transposed or m > costs.FUSED_ROWS:
            assert cost("called", problem).seconds == pytest.approx(cost("aten", problem).seconds)


def test_the_maxima_of_four_bits_are_launches_before_the_values() -> None:
    """Two of them on a GPU."""
    four, eight = (costs.dequantised(over(base, 1)) for base in ("4bit", "8bit"))
    assert four.waits == 2 * H200.start
    assert eight.waits == 0.0
    assert costs.dequantised(over("4bit", 1, device=CPU)).waits == 0.0


def test_what_is_only_called_is_not_priced_by_values() -> None:
    """An 8-bit forward quantises x; its way back is by the values, through our kernels."""
    for m in (*FEW, *SOME, *MANY):
        forward = over("8bit", m, called=True)
        assert choose.candidates(forward, "auto") == ["called"]
        plain = cost("aten", forward._replace(base="", called=False))
        assert cost("called", forward).bytes == plain.bytes + m * K * (2 + 1)
        opaque = forward._replace(base="opaque")
        assert cost("called", opaque) == plain
        assert PLANS[chosen(over("8bit", m, transposed=True))].ours


@pytest.mark.parametrize("base", ["", "4bit", "8bit", "subclass"])
def test_no_plan_costs_less_than_the_floor(base: str) -> None:
    """Which reads W as it is stored."""
    for m in (*FEW, *SOME, *MANY):
        for transposed in (False, True):
            problem = over(base, m, transposed)
            floor = costs.least(problem)
            assert floor.bytes >= costs.least(problem, adapted=False).bytes > N * K * 0.5
            for name in choose.candidates(problem, "auto"):
                found = cost(name, problem)
                assert found.seconds >= floor.seconds
                assert found.bytes >= costs.least(problem, adapted=False).bytes


def test_a_cpu_calls_the_base() -> None:
    """Its library's product is by the values there, in the same order: nothing else is tried."""
    for m in (*FEW, *SOME):
        for base in ("4bit", "8bit", "subclass"):
            problem = over(base, m, device=CPU, dtype=torch.float32)
            assert choose.candidates(problem, "auto") == ["called"]
            assert cost("called", problem).seconds == pytest.approx(cost("aten", problem).seconds)
