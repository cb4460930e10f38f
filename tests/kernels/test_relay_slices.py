"""t by slices of K over several columns of tiles: executed as compiled, and its launch.

Each case is run by as many programs as t has makers, or more, of random sizes and schedules, three
launches in a row, the last of which must give the bits of the first; y and t are held to float64.
What none of this shows is said in ttgir_run.py.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("triton")

import hopper_runs
import torch
from hopper_runs import Case, Planted
from ttgir_memory import Fault

from fused_lowrank.compute import devices
from fused_lowrank.compute.operands import Problem
from fused_lowrank.compute.plans import PLANS
from fused_lowrank.kernels import relay_slices_hopper
from fused_lowrank.kernels.relay import relay, spec_of
from fused_lowrank.kernels.tile_choice import SLICES, experimental_tile, hopper_tile, select
from fused_lowrank.kernels.tiles import TARGETS, Spec, TileConfig, is_valid, most_makers

pytestmark = pytest.mark.cpu("what the kernels for Hopper compute as compiled, without a GPU")

SM_90 = TARGETS["sm_90"]
RUNS = 6  # of a case, of three launches each
SECONDS = 600  # that a case may take, on a busy machine

CASES = (
    Case("relay", makers=2),
    Case("relay", makers=2, transposed=True, width=256, parts=4),
    Case("relay", makers=3, p=24, q=40, width=64, stages=2, bias=True),
    Case("relay", makers=4, transposed=True, p=64, q=64, width=64, bias=True),
    Case("relay", makers=2, gain=True, bias=True, p=24, q=40, width=64),
    Case("relay", makers=2, core="one", p=32, q=32, want_t=False),
    Case("relay", makers=3, transposed=True, core="one", p=16, q=16, width=64, turned=True),
    Case("relay", makers=2, core="diagonal fp32", p=24, q=24),
    Case("relay", makers=3, transposed=True, core="diagonal", p=64, q=64, width=64, infinite=True),
    Case("relay", makers=2, core="fp32", p=40, q=16, turned=True),
    Case("relay", makers=4, transposed=True, core="fp32", p=16, q=64, width=64),
    Case("relay", makers=2, core="pair", p=48, q=64, group_m=1),
    Case("relay", makers=3, transposed=True, core="pair fp32", p=32, q=24, width=64),
    Case("relay", makers=2, dtype="fp16", core="fp16", p=64, q=24, parts=4),
    Case("relay", makers=3, transposed=True, dtype="fp16", core="fp32", p=24, q=32, width=64),
    Case("relay", makers=2, core="fp32", infinite=True),
    Case("relay", makers=2, dtype="fp16", core="fp32", infinite=True),
)

TWO, FOUR = Case("relay", makers=2), Case("relay", makers=4, width=64)
DEEP = 300, 264, 400  # many tiles and steps: stages and flags are used again
FILE = "relay_slices_hopper.py"
OVERWRITTEN, HANGS = "is overwritten while it is read", "nothing moves"
LATE = """
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(index), count=1)
        mbarrier.arrive(u_empty.index(GROUP), count=1)
"""
EARLY = """
        mbarrier.arrive(u_empty.index(GROUP), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(index), count=1)
"""
FAULTS = {
    "a slice a step off": Planted(
        FILE, "gl.where(making, pid_n * steps // MAKERS, 0)",
        "gl.where(making, pid_n * (steps + 1) // MAKERS, 0)", TWO, r"t\[.*\] is .*, not",
    ),
    "a step left out of the turn": Planted(
        FILE, "first + turn < steps, first", "first + turn <= steps, first", TWO,
        r"y\[.*\] is .*, not",
    ),
    "a turn that does not come round": Planted(
        FILE, "first + turn - steps)", "turn)", TWO, r"y\[.*\] is .*, not",
    ),
    "a flag not reset": Planted(
        FILE, "MAKERS + tiles_n - 1)", "MAKERS + tiles_n)", TWO, "flags are not zero again",
    ),
    "sums read before their flag": Planted(
        FILE, "while seen(flag_ptr) < MAKERS:", "while seen(flag_ptr) < 0:",
        TWO, r"[ty]\[.*\] is nan|flags are not zero again",
    ),
    "a maker not waited for": Planted(
        FILE, "while seen(flag_ptr) < MAKERS:", "while seen(flag_ptr) < MAKERS - 1:",
        FOUR, r"[ty]\[.*\] is nan",
    ),
    "a flag raised without a release": Planted(
        FILE, 'sem="release"', 'sem="relaxed"', TWO, r"[ty]\[.*\] is nan",
    ),
    "a flag raised before the warps have met": Planted(
        FILE, "            job_barrier()  # all of the group's sums are stored\n", "",
        TWO, r"[ty]\[.*\] is nan",
    ),
    "a maker that raises no flag": Planted(
        FILE, "        if pid_n < MAKERS:\n", "        if pid_n < MAKERS - 1:\n",
        FOUR, f"{HANGS}|{OVERWRITTEN}",
    ),
    "all makers' sums in one place": Planted(
        FILE, "* MAKERS + pid_n\n", "* MAKERS\n", TWO, r"[ty]\[.*\] is nan",
    ),
    "an arrival too few for u": Planted(
        FILE, "            mbarrier.arrive(u_ready.index(group), count=1)\n", "",
        TWO, f"{HANGS}(.|\n)*waits for 2x1xi64.* 1 of 1 arrivals missing",
    ),
    "an arrival too few for a stage": Planted(
        FILE, "count=1, pred=turn > done", "count=1, pred=turn < done", TWO,
        f"{HANGS}(.|\n)*waits for 3x1xi64.* of 2 arrivals missing",
    ),
    "a stage freed twice": Planted(
        FILE, "pred=turn > done", "pred=turn >= done", TWO,
        f"{OVERWRITTEN}|more arrivals than the barrier counts|{HANGS}",
    ),
    "a stage freed early": Planted(
        FILE, "warpgroup_mma_wait(1, deps=[acc])  # the step before has been multiplied",
        "warpgroup_mma_wait(2, deps=[acc])", TWO, f"(6x64|3x128)x64xbf16.* {OVERWRITTEN}",
    ),
    "u freed early": Planted(FILE, LATE, EARLY, TWO, f"4x32x16xbf16.* {OVERWRITTEN}"),
    "bytes too few": Planted(
        FILE, "mbarrier.expect(bar, BYTES + down_desc.block_type.nbytes, pred=turn < count)",
        "mbarrier.expect(bar, BYTES, pred=turn < count)",
        TWO, "is read while a bulk copy into it is in flight|more land than the barrier expects",
    ),
    "down brought once too often": Planted(
        FILE, "down_bufs.index(index), turn < count)", "down_bufs.index(index), turn <= count)",
        TWO, f"more land than the barrier expects|{HANGS}|in flight",
    ),
    "a phase not turned": Planted(
        FILE, "        u_phase = u_phase ^ 1\n", "", TWO,
        f"{HANGS}|{OVERWRITTEN}|was never written",
    ),
    "a fence left out": Planted(
        FILE, "            fence_async_shared()  # by every thread, for what it has stored\n", "",
        TWO, "4x32x16xbf16.* was stored without a fence_async_shared",
    ),
    "fewer programs than makers": Planted(
        FILE, "        (programs,),\n", "        (makers - 1,),\n",
        TWO, rf"{HANGS}(.|\n)*waits for another value of arrivals_ptr\[\d+\] than [01]",
    ),
    "t stored where it is not wanted": Planted(
        FILE, "                    if STORE_T:  #", "                    if True:  #",
        replace(TWO, want_t=False), "t_ptr is written, where another argument lies",
    ),
    "an infinity by nothing": Planted(
        "warp_core_hopper.py", "mma_v2(finite(large), finite(core_small), sums)",
        "mma_v2(large, core_small, sums)", replace(TWO, core="fp32", infinite=True),
        r"y\[.*\] is nan",
    ),
}  # fmt: skip


def name(case: Case) -> str:
    layout = "backward" if case.transposed else "forward"
    ranks = f"{case.p}-{case.q}-{case.core}" + ("-inf" if case.infinite else "")
    return f"{layout}-{case.dtype}-{ranks}-{case.width}-{case.makers}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_y_and_t_by_every_schedule(beside: ProcessPoolExecutor, case: Case) -> None:
    seed = CASES.index(case)
    launches, worst = beside.submit(hopper_runs.execute_case, case, RUNS, seed).result(SECONDS)
    assert launches == RUNS * hopper_runs.LAUNCHES
    assert 0.1 < worst <= 1  # else nothing was compared


def test_there_are_cases_enough() -> None:
    """Each way with each kind of core, of both dtypes, and two to four makers."""
    kinds = {(case.transposed, case.core.split()[0]) for case in CASES}
    assert kinds >= {(way, core) for way in (False, True) for core in ("one", "fp32", "pair")}
    assert {case.makers for case in CASES} == {2, 3, 4}
    assert {case.dtype for case in CASES} == {"bf16", "fp16"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(beside: ProcessPoolExecutor, fault: str) -> None:
    with pytest.raises(Fault, match=FAULTS[fault].seen):
        beside.submit(hopper_runs.execute_planted, FAULTS[fault], DEEP).result(SECONDS)


def test_without_a_fault_the_same_runs_pass(beside: ProcessPoolExecutor) -> None:
    for case in {fault.case for fault in FAULTS.values()}:
        beside.submit(hopper_runs.execute_case, case, hopper_runs.TRIES, 0, DEEP).result(SECONDS)


# ---------------------------------------------------------------------------- the launch

BF16, F32 = torch.bfloat16, torch.float32
TILE = TileConfig(128, 64, 64, 4, 3, hopper=True, makers=3)
M, N, K = 201, 144, 200  # two rows and three columns of tiles, four steps


def operands(n: int = N, k: int = K, core: torch.dtype = F32) -> dict:
    """As `spec_of` takes them."""
    sizes = {"x": (M, k), "weight": (n, k), "down": (24, k), "up": (n, 40), "bias": (n,)}
    made = {name: torch.zeros(size, dtype=BF16) for name, size in sizes.items()}
    return {**made, "core": torch.zeros(24, 40, dtype=core)}


def planned(tile: TileConfig = TILE, want_t: bool = True, **sizes: int):
    made = operands(**sizes)
    inputs = (made[name] for name in ("x", "weight", "down", "core", "up", "bias"))
    return relay_slices_hopper.planned(*inputs, False, want_t, True, tile)


def test_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All programs run at once; every maker has a place for its sums, and u has none."""
    monkeypatch.setattr(relay_slices_hopper, "multiprocessors", lambda device: 5)
    launch = planned()
    assert launch.kernel is relay_slices_hopper.relay_slices_hopper_kernel
    assert launch.grid == (5,)
    assert launch.constants["launch_cooperative_grid"] is True
    assert launch.meets
    assert launch.scratch == {"sums_ptr": ((2, 2, 3, 64, 32), F32)}
    assert launch.results == {"y_desc": ((M, N), BF16), "t_ptr": ((M, 24), BF16)}
    assert (launch.constants["MAKERS"], launch.constants["SPLIT"]) == (3, True)
    assert planned(want_t=False).results["t_ptr"] is None
    assert not planned(want_t=False).constants["STORE_T"]


@pytest.mark.parametrize(
    ("makers", "sizes", "programs"),
    [(4, {}, 9), (3, {"n": 128}, 9), (3, {"k": 128}, 9), (3, {}, 2), (1, {}, 9)],
)
def test_more_makers_than_can_be_are_refused(
    makers: int, sizes: dict, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of columns, of steps, of programs; and one is another kernel's."""
    monkeypatch.setattr(relay_slices_hopper, "multiprocessors", lambda device: programs)
    with pytest.raises(ValueError, match="makers of t are too many"):
        planned(replace(TILE, makers=makers), **sizes)


def test_a_tile_with_makers_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list = []
    refusing = lambda *args: seen.append(args) or 1 / 0  # noqa: E731
    monkeypatch.setattr(relay_slices_hopper, "planned", refusing)
    call = {**operands(), "scale": 1.0, "transposed": False, "want_t": True}
    with pytest.raises(ZeroDivisionError):
        relay(**call, choose=lambda *_: TILE)
    assert len(seen) == 1


def test_what_cannot_have_makers() -> None:
    made = spec_of(**operands(), transposed=False)
    assert (made.n, made.k) == (N, K)
    assert is_valid(TILE, SM_90, made)
    assert not is_valid(replace(TILE, makers=0), SM_90, made)
    for change in ({"n": 128}, {"k": 128}, {"by_row": True}, {"kernel": "gemm_tail"}):
        assert not is_valid(TILE, SM_90, replace(made, **change)), change
        assert most_makers(TILE, replace(made, **change)) < 3, change
    many = replace(made, n=0, k=0)  # as many as one likes
    assert is_valid(replace(TILE, makers=8), SM_90, many)
    assert not is_valid(replace(TILE, makers=9), SM_90, many)
    assert str(TILE) == "128x64x64 w4 s3 hopper m3"


@pytest.mark.parametrize(
    ("m", "n", "k", "width", "makers"),
    [
        (65, 4096, 4096, 64, (4, 8)),
        (512, 4096, 4096, 128, (4, 8)),
        (8192, 4096, 4096, 256, (4, 8)),
        (8192, 1024, 4096, 256, (4, 4)),
        (8192, 4096, 128, 256, (2, 2)),
        (8192, 64, 4096, 64, (1, 1)),
    ],
)
def test_the_named_sets(m: int, n: int, k: int, width: int, makers: tuple[int, int]) -> None:
    """The tiles of `relay`, with as many makers as the name says, or as there can be."""
    spec = Spec("relay", 2, 4, True, 16, 16, bulk=True, n=n, k=k)
    assert select(SM_90, spec, m).makers == 1
    for set_name, count in zip(SLICES, makers, strict=True):
        tile = experimental_tile(set_name, SM_90, spec, m)
        assert tile == replace(hopper_tile(spec, m), makers=count)
        assert tile.block_n == width
        assert is_valid(tile, SM_90, spec)
        assert experimental_tile(set_name, SM_90, replace(spec, kernel="gemm_tail"), m) is None
    assert experimental_tile("slices4", TARGETS["sm_100"], spec, m) is None


def test_the_plans_are_taken_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And say where they cannot be had."""
    monkeypatch.setattr(devices, "target", lambda device: SM_90)
    devices.tiles.cache_clear()
    cuda = torch.device("cuda")
    problem = Problem(cuda, BF16, 8192, 4096, 4096, 16, 16, False, True, False, False, bulk=True)
    for set_name in SLICES:
        plan = PLANS[f"relay:{set_name}"]
        assert plan.whole is PLANS["relay"].whole
        assert not plan.automatic
        assert plan.why_not(problem) is None
        for change in ({"n": 64}, {"k": 64}):
            assert f"{set_name!r} is for" in plan.why_not(problem._replace(**change))
        for change in ({"m": 64}, {"dropout": True}, {"bulk": False}):
            assert plan.why_not(problem._replace(**change))
        choose = devices.tiles(cuda, plan.tiles)
        spec = Spec("relay", 2, 2, True, 16, 16, bulk=True, n=4096, k=4096)
        assert choose(spec, 8192).makers == SLICES[set_name]
        assert choose(replace(spec, kernel="gemm_tail"), 8192).makers == 1
    devices.tiles.cache_clear()
