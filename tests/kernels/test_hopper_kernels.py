"""The kernels for Hopper, executed as compiled: numbers, barriers, bulk copies, flags.

Each case is run by one to five programs, of random sizes and schedules, three launches in a row,
and y, t and u are held to float64. Faults planted in the kernels' sources must each be seen.
What none of this shows is said in ttgir_run.py.
"""

from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

import hopper_runs
from hopper_runs import Case, Planted
from ttgir_memory import Fault

pytestmark = pytest.mark.cpu("what the kernels for Hopper compute as compiled, without a GPU")

RUNS = 16  # of a case, of three launches each
SECONDS = 600  # that a case may take, on a busy machine

GEMMS = (
    Case("gemm_tail"),
    Case("gemm_tail", transposed=True, bias=True),
    Case("gemm_tail", q=8, width=64, stages=2, bias=True),
    Case("gemm_tail", transposed=True, q=200, width=64),
    Case("gemm_tail", q=64, dtype="fp16", parts=4),
    Case("gemm_tail", q=0, width=256, parts=4, stages=4),
    Case("gemm_tail", transposed=True, q=40, width=256),
    Case("gemm_tail", q=24, turned=True),
    Case("gemm_tail", transposed=True, q=24, turned=True),
    Case("gemm_tail", gain=True, bias=True, width=256, parts=4, stages=4),
    Case("gemm_tail", gain=True, q=40, dtype="fp16"),
)
RELAYS = (
    Case("relay"),
    Case("relay", transposed=True),
    Case("relay", bias=True, p=24, q=40, width=64, stages=2),
    Case("relay", transposed=True, bias=True, p=64, q=64),
    Case("relay", core="one", want_t=False),
    Case("relay", transposed=True, core="one", p=32, q=32, width=64, bias=True),
    Case("relay", core="fp32", p=16, q=32),
    Case("relay", transposed=True, core="fp32", p=64, q=16, want_t=False),
    Case("relay", core="pair", p=48, q=64, group_m=1),
    Case("relay", transposed=True, core="pair fp32", p=32, q=24),
    Case("relay", dtype="fp16", core="fp16", p=64, q=64, width=256),
    Case("relay", transposed=True, dtype="fp16", core="fp32", width=64, parts=2),
    Case("relay", p=24, q=24, turned=True),
    Case("relay", transposed=True, p=24, q=24, turned=True),
    Case("relay", core="diagonal", p=24, q=24, want_t=False),
    Case("relay", transposed=True, core="diagonal fp32", p=64, q=64, width=256, parts=4),
    Case("relay", core="diagonal", p=40, q=40, infinite=True),
    Case("relay", width=256, parts=4, stages=4),
    Case("relay", transposed=True, width=256, stages=4, bias=True, want_t=False),
    Case("relay", gain=True, bias=True, core="fp32", p=24, q=40),
    Case("relay", gain=True, width=256, parts=4, stages=4),
)
CASES = GEMMS + RELAYS

GEMM, RELAY = Case("gemm_tail"), Case("relay")
DEEP = 300, 264, 400  # many tiles and steps: stages and flags are used again

MULTIPLY = """
    mbarrier.wait(ready.index(index), phase)
    x, w = x_bufs.index(index * GROUPS + GROUP), right(w_bufs.index(index), W_ROWS_ARE_K)
    acc = warpgroup_mma(x, w, acc, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    index, phase = advance(index, phase, STAGES)
    for _ in range(1, steps):
        mbarrier.wait(ready.index(index), phase)
        x, w = x_bufs.index(index * GROUPS + GROUP), right(w_bufs.index(index), W_ROWS_ARE_K)
        acc = warpgroup_mma(x, w, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])  # the step before has been multiplied
        mbarrier.arrive(empty.index(behind(index, STAGES)), count=1)
        index, phase = advance(index, phase, STAGES)
"""
BEFORE = """
    before = index
    for step in range(steps):
        mbarrier.wait(ready.index(index), phase)
        x, w = x_bufs.index(index * GROUPS + GROUP), right(w_bufs.index(index), W_ROWS_ARE_K)
        acc = warpgroup_mma(x, w, acc, use_acc=step > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(before), count=1, pred=step > 0)
        before = index
        index, phase = advance(index, phase, STAGES)
"""
LATE = """
            mbarrier.arrive(empty.index(behind(index, STAGES)), count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(index), count=1)
            mbarrier.arrive(u_empty.index(GROUP), count=1)
"""
EARLY = """
            mbarrier.arrive(empty.index(behind(index, STAGES)), count=1)
            mbarrier.arrive(u_empty.index(GROUP), count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(index), count=1)
"""
RING, GEMM_FILE = "hopper.py", "gemm_tail_hopper.py"
RELAY_FILE, WARPS_FILE = "relay_hopper.py", "relay_warps_hopper.py"
OVERWRITTEN = "is overwritten while it is read"
HANGS = "nothing moves"
FAULTS = {
    "a flag not reset": Planted(
        WARPS_FILE, "count_reader(flag_ptr, tiles_n - 1)", "count_reader(flag_ptr, tiles_n)",
        RELAY, "flags are not zero again",
    ),
    "a flag not waited for": Planted(
        WARPS_FILE, "while seen(flag_ptr) == 0:", "while seen(flag_ptr) < 0:",
        RELAY, r"(y|u)\[.*\] is nan|flags are not zero again",
    ),
    "a flag raised without a release": Planted(
        RELAY_FILE, 'sem="release"', 'sem="relaxed"',
        RELAY, r"(y|u)\[.*\] is nan",
    ),
    "an arrival too few for a stage": Planted(
        RING, "        mbarrier.arrive(empty.index(behind(index, STAGES)), count=1)\n", "",
        GEMM, f"{HANGS}(.|\n)*waits for 3x1xi64.* of 2 arrivals missing",
    ),
    "an arrival too few for u": Planted(
        WARPS_FILE, "                mbarrier.arrive(u_ready.index(group), count=1)\n", "",
        RELAY, f"{HANGS}(.|\n)*waits for 2x1xi64.* 1 of 1 arrivals missing",
    ),
    "an arrival too many": Planted(
        GEMM_FILE, "barriers(STAGES, GROUPS)", "barriers(STAGES, GROUPS - 1)",
        GEMM, f"{OVERWRITTEN}|more arrivals than the barrier counts|{HANGS}",
    ),
    "a stage freed early": Planted(
        RING, "warpgroup_mma_wait(1, deps=[acc])  # the step before has been multiplied",
        "warpgroup_mma_wait(2, deps=[acc])",
        GEMM, f"(6x64|3x128)x64xbf16.* {OVERWRITTEN}",
    ),
    "the stages of t freed early": Planted(
        RELAY_FILE, "warpgroup_mma_wait(2, deps=[acc, low])  # both of the step before are done",
        "warpgroup_mma_wait(3, deps=[acc, low])",
        RELAY, f"(6x64|3x128|3x16)x64xbf16.* {OVERWRITTEN}",
    ),
    "u freed early": Planted(RELAY_FILE, LATE, EARLY, RELAY, f"2x64x16xbf16.* {OVERWRITTEN}"),
    "a wait for a later tile": Planted(
        WARPS_FILE, "    rest = gl.maximum(tile - tiles_m, 0)\n",
        "    tile = tiles_m * tiles_n - 1 - tile\n    rest = gl.maximum(tile - tiles_m, 0)\n",
        RELAY, rf"{HANGS}(.|\n)*waits for another value of arrivals_ptr\[\d+\] than 0",
    ),
    "a carried name lost": Planted(
        RING, MULTIPLY, BEFORE,
        GEMM, f"{OVERWRITTEN}|{HANGS}|more arrivals",
    ),
    "bytes too few": Planted(
        WARPS_FILE, "mbarrier.expect(bar, BYTES + down_desc.block_type.nbytes, pred=first)",
        "mbarrier.expect(bar, BYTES, pred=first)",
        RELAY, "is read while a bulk copy into it is in flight|more land than the barrier expects",
    ),
    "bytes too many": Planted(
        GEMM_FILE,
        "mbarrier.expect(bar, GROUPS * x_desc.block_type.nbytes + w_desc.block_type.nbytes)",
        "mbarrier.expect(bar, 3 * x_desc.block_type.nbytes + w_desc.block_type.nbytes)",
        GEMM, f"{HANGS}(.|\n)*waits for 3x1xi64.* 8192 bytes still to land",
    ),
    "a phase not turned": Planted(
        RELAY_FILE, "            u_phase = u_phase ^ 1\n", "",
        RELAY, f"{HANGS}|{OVERWRITTEN}|was never written",
    ),
    "a fence left out": Planted(
        RING, "fence_async_shared()\n        tma.async_copy_sh", "tma.async_copy_sh",
        GEMM, "4x64x64xbf16.* was stored without a fence_async_shared",
    ),
    "a buffer of y used again too soon": Planted(
        RING, "tma.store_wait(BUFFERS - 1)", "tma.store_wait(BUFFERS)",
        Case("gemm_tail", parts=4), f"4x64x32xbf16.* {OVERWRITTEN}",
    ),
    "an end before y has left": Planted(
        GEMM_FILE, "    tma.store_wait(0)\n", "    pass\n",
        GEMM, "ends while its bulk stores read shared memory",
    ),
    "sums read too early": Planted(
        GEMM_FILE, "warpgroup_mma_wait(0, deps=[acc])", "warpgroup_mma_wait(1, deps=[acc])",
        GEMM, "a sum is read before its products were waited for",
    ),
    "t stored where it is not wanted": Planted(
        RELAY_FILE, "            if STORE_T:\n", "            if True:\n",
        Case("relay", want_t=False), "t_ptr is written, where another argument lies",
    ),
    "a mask left out": Planted(
        RING, "bias_ptr + offs_n, mask=offs_n < N, other=0.0", "bias_ptr + offs_n",
        Case("gemm_tail", bias=True), "bias_ptr of 264 elements is reached outside",
    ),
    "a mask of the gain left out": Planted(
        RING, "gain_ptr + gain_n, mask=gain_n < N, other=0.0", "gain_ptr + gain_n",
        Case("gemm_tail", gain=True), "gain_ptr of 264 elements is reached outside",
    ),
    "the first part's gain for all": Planted(
        RING, "gain_n = first_n + gl.arange", "gain_n = n + gl.arange",
        Case("relay", gain=True), r"y\[.*\] is .*, not",
    ),
    "a gain of the bias too": Planted(
        RING, "acc += bias.to(gl.float32)[None, :]",
        "acc += bias.to(gl.float32)[None, :] * (gain[None, :] if HAS_GAIN else 1.0)",
        Case("relay", gain=True, bias=True), r"y\[.*\] is .*, not",
    ),
    "a tile left out": Planted(
        RING, "tile // per_group) * GROUP_M", "tile // per_group) * 1",
        GEMM, r"y\[.*\] is nan",
    ),
}  # fmt: skip


def name(case: Case) -> str:
    layout = "backward" if case.transposed else "forward"
    gain = "-gain" if case.gain else ""
    return f"{case.kernel}-{layout}-{case.dtype}-{case.p}-{case.q}-{case.core}-{case.width}{gain}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_y_t_and_u_by_every_schedule(beside: ProcessPoolExecutor, case: Case) -> None:
    seed = CASES.index(case)
    launches, worst = beside.submit(hopper_runs.execute_case, case, RUNS, seed).result(SECONDS)
    assert launches == RUNS * hopper_runs.LAUNCHES
    assert 0.1 < worst <= 1  # else nothing was compared


def test_there_are_runs_enough() -> None:
    """Both kernels, both layouts, and 500 runs."""
    assert len(CASES) * RUNS >= 500
    assert {(case.kernel, case.transposed) for case in CASES} == {
        (kernel, transposed) for kernel in ("gemm_tail", "relay") for transposed in (False, True)
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(beside: ProcessPoolExecutor, fault: str) -> None:
    with pytest.raises(Fault, match=FAULTS[fault].seen):
        beside.submit(hopper_runs.execute_planted, FAULTS[fault], DEEP).result(SECONDS)


def test_without_a_fault_the_same_runs_pass(beside: ProcessPoolExecutor) -> None:
    """What the faults' runs are, on the sources as they are."""
    for case in (GEMM, RELAY):
        beside.submit(hopper_runs.execute_case, case, hopper_runs.TRIES, 0, DEEP).result(SECONDS)


def test_the_same_loop_with_its_stage_reckoned_passes(beside: ProcessPoolExecutor) -> None:
    """So what is seen of the lost name is that it was lost, and nothing else of that loop."""
    lines = [line for line in BEFORE.splitlines(keepends=True) if "before = index" not in line]
    reckoned = "".join(lines).replace("empty.index(before)", "empty.index(behind(index, STAGES))")
    control = Planted(RING, MULTIPLY, reckoned, GEMM, "")
    beside.submit(hopper_runs.execute_planted, control, DEEP).result(SECONDS)
