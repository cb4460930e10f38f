"""The relay with a core for each row, executed as compiled: numbers, handles, rows apart.

As in `test_hopper_kernels`, whose cases are of one core for all; what is drawn is in
`hopper_banks`. Faults planted in the kernel's source must each be seen.
"""

from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

import hopper_runs
from hopper_runs import Case, Planted
from ttgir_memory import Fault

pytestmark = pytest.mark.cpu("what the relay computes for a bank as compiled, without a GPU")

RUNS = 6  # of a case, of three launches each
SECONDS = 600  # that a case may take, on a busy machine
SIZES = 200, 168, 136  # of the faults' runs: two rows of tiles, and two columns

ROWS = Case("relay", mix=1, core="fp32")
PAIR = Case("relay", mix=2, core="pair", p=24, q=16, weighted=True)
LARGE = Case("relay", mix=1, core="pair", p=16, q=16, r=192)
CASES = (
    ROWS,
    Case("relay", transposed=True, mix=1, core="fp32", p=24, q=40),
    Case("relay", mix=2, core="fp32", p=40, q=64, weighted=True, repeat=3, bias=True, want_t=False),
    Case("relay", transposed=True, mix=3, core="bf16", p=64, q=16, repeat=7, turned=True),
    Case("relay", mix=1, core="fp32", gain=True, bias=True),
    PAIR,
    Case("relay", mix=1, core="pair fp32", p=16, q=32, r=72, group_m=1, width=64, stages=2),
    Case("relay", transposed=True, mix=2, core="pair fp32", p=32, q=24, r=3, weighted=True),
    LARGE,
    Case("relay", mix=1, dtype="fp16", core="fp16", p=48, q=16, width=256, parts=4, stages=4),
    Case("relay", transposed=True, mix=1, dtype="fp16", core="fp32", p=64, q=64, turned=True),
    Case("relay", mix=1, core="diagonal", p=40, q=40),
    Case(
        "relay", transposed=True, mix=2, core="diagonal fp32", p=64, q=64, weighted=True, repeat=3
    ),
)
APART = (
    ROWS,
    Case("relay", transposed=True, mix=2, core="bf16", p=40, q=64, weighted=True, bias=True),
    Case("relay", mix=2, core="pair", p=24, q=16, r=72, weighted=True, repeat=3),
    Case("relay", transposed=True, mix=1, dtype="fp16", core="pair fp32", q=24, width=64),
    Case("relay", mix=1, core="fp32", p=24, q=24),
    Case("relay", transposed=True, mix=2, core="diagonal", p=24, q=24, weighted=True),
)

KERNEL = "relay_rows_hopper.py"
RELAY_FILE, WARPS_FILE = "relay_hopper.py", "relay_warps_hopper.py"
WRONG = r"u\[.*\] is (nan|-?\d)"
MET = "is read before the warps that stored it have met"
OUTSIDE = "is reached outside of them"
FAULTS = {
    "a refused handle taken": Planted(
        KERNEL, "    valid = inside & (generation == handle >> 32)\n", "    valid = inside\n",
        ROWS, WRONG,
    ),
    "a refusal not said": Planted(
        KERNEL, "1, mask=refused)", "0, mask=refused)", ROWS, "refused is 0, not True",
    ),
    "no adapter said to be refused": Planted(
        KERNEL, "refused = (valid == 0) & (handle != -1)", "refused = valid == 0",
        Case("relay", mix=1, core="fp32", repeat=200), "refused is 1, not False|" + WRONG,
    ),
    "weights left out": Planted(
        KERNEL, "            if weights_ptr is not None:\n", "            if False:\n", PAIR, WRONG,
    ),
    "a mixture's first alone": Planted(
        KERNEL, "(offs_m.to(gl.int64) * MIX + j) * PAD_R", "(offs_m.to(gl.int64) * MIX) * PAD_R",
        PAIR, WRONG,
    ),
    "a line for each row": Planted(
        KERNEL, "line = line_of(offs_m, repeat) * MIX + j\n    handle = ",
        "line = line_of(offs_m, 1) * MIX + j\n    handle = ",
        Case("relay", mix=1, core="fp32", repeat=3), OUTSIDE,
    ),
    "a core that lies the other way": Planted(
        KERNEL, "            ptrs += gl.expand_dims((offs_q * P)[None, :], 1)\n",
        "            ptrs += gl.expand_dims((offs_q * Q)[None, :], 1)\n",
        Case("relay", transposed=True, mix=1, core="fp32", p=24, q=16), WRONG,
    ),
    "a table read where it is not": Planted(
        KERNEL, "mask, source_mask = inside[:, None, None], ",
        "mask, source_mask = mask_m[:, None, None], ", ROWS, OUTSIDE,
    ),
    "a core fetched where none is": Planted(
        KERNEL, "fetch(matrix_ptr + slot * SIZE + line * step, inside)",
        "fetch(matrix_ptr + slot * SIZE + line * step, slot >= 0)", ROWS, OUTSIDE,
    ),
    "t read before it is there": Planted(
        RELAY_FILE, "                job_barrier()  # t is stored", "                # t is stored",
        ROWS, f"t_ptr {MET}",
    ),
    "v read before it is there": Planted(
        KERNEL, "        job_barrier()  # it is read by", "        # it is read by",
        PAIR, f"v_ptr {MET}",
    ),
    "u read before it is there": Planted(
        RELAY_FILE, "            job_barrier()  # all of the group's u is stored\n", "",
        ROWS, f"u_ptr {MET}|y\\[.*\\] is nan",
    ),
    "a flag not waited for": Planted(
        WARPS_FILE, "while seen(flag_ptr) == 0:", "while seen(flag_ptr) < 0:",
        ROWS, r"y\[.*\] is nan|flags are not zero again",
    ),
    "columns that are not there": Planted(
        KERNEL, "range(0, times(R), COUNT)", "range(0, times(PAD_R), COUNT)", LARGE, OUTSIDE,
    ),
    "columns left out": Planted(
        KERNEL, "range(0, times(PAD_P), STEP)", "range(0, times(PAD_P - STEP), STEP)", ROWS, WRONG,
    ),
}  # fmt: skip
PARTIAL = Case("relay", mix=1, core="fp32", p=24, q=24)
MEETING = {  # of rows with each other, of zeros with what is not finite
    "a sum over rows": Planted(
        KERNEL, "    return sums\n",
        "    return sums + 0.0 * gl.sum(sums, 0)[None, :]\n", ROWS, "beside nan",
    ),
    "a product with zero for a selection": Planted(
        KERNEL, "gl.where(gl.convert_layout(valid, by_row)[:, None], part, 0.0)",
        "part * gl.where(gl.convert_layout(valid, by_row)[:, None], 1.0, 0.0)",
        ROWS, "without an adapter",
    ),
    "padding that is not zero": Planted(
        KERNEL, "        u = gl.where((offs_q < Q)[None, :], u, 0.0)\n", "",
        PARTIAL, "Inf beside padding",
    ),
}  # fmt: skip


def name(case: Case) -> str:
    layout = "backward" if case.transposed else "forward"
    return f"{layout}-{case.dtype}-{case.p}-{case.q}-{case.core}-{case.mix}-{case.width}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_y_t_and_u_by_every_schedule(beside: ProcessPoolExecutor, case: Case) -> None:
    """t, u and y against float64; handles of all kinds, and NaN in all that none of them names."""
    seed = CASES.index(case)
    launches, worst = beside.submit(hopper_runs.execute_case, case, RUNS, seed).result(SECONDS)
    assert launches == RUNS * hopper_runs.LAUNCHES
    assert 0.1 < worst <= 1  # else nothing was compared


@pytest.mark.parametrize("case", APART, ids=name)
def test_a_row_keeps_its_bits_whatever_the_others_are(
    beside: ProcessPoolExecutor, case: Case
) -> None:
    """NaN and Inf in their x, weights and cores, handles of any kind; alone; without an adapter the
    bits of the base, though all adapters are NaN; and Inf in its own x makes no NaN."""
    beside.submit(hopper_runs.execute_apart, case, APART.index(case)).result(SECONDS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(beside: ProcessPoolExecutor, fault: str) -> None:
    with pytest.raises(Fault, match=FAULTS[fault].seen):
        beside.submit(hopper_runs.execute_planted, FAULTS[fault], SIZES).result(SECONDS)


@pytest.mark.parametrize("fault", MEETING)
def test_rows_that_meet_are_seen(beside: ProcessPoolExecutor, fault: str) -> None:
    with pytest.raises(Fault, match=MEETING[fault].seen):
        beside.submit(hopper_runs.execute_planted_apart, MEETING[fault]).result(SECONDS)


def test_without_a_fault_the_same_runs_pass(beside: ProcessPoolExecutor) -> None:
    """What the faults' runs are, on the sources as they are."""
    tries = hopper_runs.TRIES
    for case in {fault.case for fault in FAULTS.values()}:
        beside.submit(hopper_runs.execute_case, case, tries, 0, SIZES).result(SECONDS)
