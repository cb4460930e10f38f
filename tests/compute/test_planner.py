"""Which plan computes a pass: by cost on paper, by measured times, and when things go wrong."""

import json
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from planner_cases import CPU, OutOfResources, at
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lowrank import config
from fused_lowrank.compute import choose, costs, operands
from fused_lowrank.compute import measured as tuning
from fused_lowrank.compute.operands import Operands, Problem
from fused_lowrank.compute.plans import PLANS, Plan
from fused_lowrank.compute.run import run


@pytest.fixture
def tune(tmp_path, monkeypatch):
    """tune(mode): FUSED_LOWRANK_TUNE in a process that has just started, its cache of its own."""

    def start(mode: str) -> None:
        monkeypatch.setenv("FUSED_LOWRANK_TUNE", mode)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        choose.CHOSEN.clear()
        for cached in (tuning.times_of, tuning.identity, tuning.warn_once):
            cached.cache_clear()

    yield start
    start("off")


class Fake:
    """Plans "a" and "b" of a pass: how long each takes, or what it raises."""

    def __init__(self, **behaviour: float | Exception) -> None:
        self.behaviour = behaviour
        self.calls: list[str] = []

    def compute(self, name: str) -> str:
        self.calls.append(name)
        does = self.behaviour[name]
        if isinstance(does, Exception):
            raise does
        time.sleep(does)
        return name

    def plan(self, name: str) -> Plan:
        """One whose y is its name."""
        step = SimpleNamespace(
            run=lambda *_: (self.compute(name), None),
            why_not=lambda problem: None,
            work=lambda problem: [costs.Work(COSTS[name], 1.0)],
        )
        return Plan(name, down=None, whole=step)

    def carry_out(self, of: Problem) -> str:
        """What `run` gives for operands of that pass, of these plans alone."""
        x, weight, down, up = (
            torch.zeros(1, columns).expand(rows, columns)
            for rows, columns in ((of.m, of.k), (of.n, of.k), (of.p, of.k), (of.n, of.q))
        )
        plans = {name: self.plan(name) for name in self.behaviour}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choose, "candidates", lambda problem, impl: list(plans))
            for name, plan in plans.items():
                patch.setitem(PLANS, name, plan)
            # As of a layout that is regular, whether kernels are there or not.
            patch.setattr(operands, "has_kernels", lambda device: True)
            of_pass = Operands(x, weight.contiguous(), down, None, up, None, 1.0)
            return run(of_pass, "auto", config.Config(), True, False).y


COSTS = {"a": 1e9, "b": 2e9, "aten": 3e9}  # on paper "a" is cheaper than "b"


def test_off_depends_on_paper_alone(tune) -> None:
    """Nothing is measured, no file is read or written."""
    tune("full")
    Fake(a=0.01, b=0.0).carry_out(at())
    tune("off")
    fake = Fake(a=0.01, b=0.0)
    assert fake.carry_out(at()) == "a"
    assert fake.calls == ["a"]


def test_full_measures_once_and_cached_reads_it(tune) -> None:
    """The faster plan is taken, and taken again by a process that measures nothing."""
    tune("full")
    fake = Fake(a=0.01, b=0.0)
    assert fake.carry_out(at()) == "b"
    assert fake.calls.count("a") == 1 + tuning.REPETITIONS
    fake.calls.clear()
    assert fake.carry_out(at()) == "b"
    assert fake.calls == ["b"]
    tune("cached")
    later = Fake(a=0.01, b=0.0)
    assert later.carry_out(at()) == "b"
    assert later.calls == ["b"]
    assert later.carry_out(at(m=1024)) == "a"  # of which nothing is known
    assert later.calls == ["b", "a"]


def test_full_measures_again_what_the_file_lacks(tune) -> None:
    """A new plan beside the known ones, in one run; a plan that cannot be launched once only."""
    tune("full")
    Fake(b=0.01, a=OutOfResources()).carry_out(at())
    tune("full")
    fake = Fake(a=OutOfResources(), b=0.01)
    assert fake.carry_out(at()) == "b"
    assert fake.calls == ["b"]
    tune("full")
    fake = Fake(a=0.02, b=0.01, aten=0.0)
    assert fake.carry_out(at()) == "aten"
    assert set(fake.calls) == {"a", "b", "aten"}


def test_a_bucket_keeps_its_plan_while_the_process_lives(tune) -> None:
    """Whatever a file says later."""
    tune("cached")
    fake = Fake(a=0.0, b=0.0)
    assert fake.carry_out(at()) == "a"
    tuning.write(CPU, tuning.name_of(at()), {"a": 2.0, "b": 1.0})
    assert fake.carry_out(at()) == "a"


def test_rows_share_a_bucket() -> None:
    """Up to a power of two."""
    assert [operands.bucket(m) for m in (1, 2, 3, 4, 5, 8, 9, 4097)] == [1, 2, 4, 4, 8, 8, 16, 8192]


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"identity": {"device": "x"',
        "[1, 2]",
        '{"identity": {}, "passes": {"p": {"a": "fast"}}}',
        '{"identity": 3, "passes": {}}',
        '{"identity": {"torch": "1.0"}, "passes": {}}',
    ],
)
def test_a_file_that_cannot_be_used_is_ignored_with_one_warning(content: str, tune) -> None:
    """Truncated, foreign, of other versions: calls work, and what is measured replaces it."""
    tune("cached")
    path = tuning.path_of(CPU)
    path.parent.mkdir()
    path.write_text(content)
    fake = Fake(a=0.0, b=0.0)
    with pytest.warns(UserWarning, match="is not used") as caught:
        assert [fake.carry_out(at(m=m)) for m in (512, 64)] == ["a", "a"]
    assert len(caught) == 1
    assert path.read_text() == content
    tune("full")
    with pytest.warns(UserWarning, match="is not used"):
        assert Fake(a=0.01, b=0.0).carry_out(at()) == "b"
    assert list(json.loads(path.read_text())["passes"]) == [tuning.name_of(at())]


def test_a_file_of_other_sources_is_not_used(tune) -> None:
    """Times are those of the kernels that were measured."""
    tune("full")
    Fake(a=0.01, b=0.0).carry_out(at())
    path = tuning.path_of(CPU)
    path.write_text(path.read_text().replace(tuning.identity(CPU)["sources"], "others"))
    tune("cached")
    with pytest.warns(UserWarning, match="its sources is not that of here"):
        assert Fake(a=0.0, b=0.0).carry_out(at()) == "a"


def test_a_folder_that_cannot_be_written_is_said_once(tune, tmp_path) -> None:
    """What was measured still counts in this process."""
    tune("full")
    (tmp_path / "fused_lowrank").write_text("a file where the folder should be")
    fake = Fake(a=0.01, b=0.0)
    with pytest.warns(UserWarning, match="cannot be") as caught:
        assert [fake.carry_out(at(m=m)) for m in (512, 64)] == ["b", "b"]
    assert len({str(warning.message) for warning in caught}) == len(caught) <= 2


def test_two_processes_write_beside_each_other(tune) -> None:
    """Neither loses what the other has put there; nothing half-written is left."""
    tune("full")
    Fake(a=0.0, b=0.0).carry_out(at())
    times = dict(tuning.times_of(CPU))
    tune("full")
    tuning.times_of(CPU).clear()  # read before the other wrote
    Fake(a=0.0, b=0.0).carry_out(at(m=64))
    assert set(tuning.read(CPU)) == {*times, tuning.name_of(at(m=64))}
    assert [p.name for p in tuning.path_of(CPU).parent.iterdir()] == [tuning.path_of(CPU).name]


class Traced(TorchDispatchMode):
    """What a tracer looks like."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_nothing_is_measured_in_a_trace(tune) -> None:
    """A trace would take the measured calls for the program's own."""
    tune("full")
    fake = Fake(a=0.0, b=0.0)
    with Traced():
        assert fake.carry_out(at()) == "a"
    assert fake.calls == ["a"]


def test_out_of_memory_while_measuring_leaves_the_call_working(tune) -> None:
    """The plan that fits is taken; where none could be measured, the one of least cost is tried."""
    tune("full")
    fake = Fake(a=torch.OutOfMemoryError("full"), b=0.0)
    assert fake.carry_out(at()) == "b"
    fake = Fake(a=torch.OutOfMemoryError("full"), b=MemoryError())
    with pytest.raises(torch.OutOfMemoryError):
        fake.carry_out(at(m=64))
    (decision,) = [chosen for (of, _), chosen in choose.CHOSEN.items() if of.m == 64]
    assert decision.plans == ("a", "b")


def test_other_errors_are_not_hidden(tune) -> None:
    """A bug of a plan is not a lack of the device's."""
    tune("full")
    with pytest.raises(ZeroDivisionError):
        Fake(a=ZeroDivisionError(), b=0.0).carry_out(at())


@pytest.mark.parametrize("mode", ["off", "full"])
def test_a_plan_that_cannot_be_launched_is_skipped(mode: str, tune) -> None:
    """With one warning and for good, or without a word where it shows in measuring."""
    tune(mode)
    fake = Fake(a=OutOfResources("shared memory, required 300000, limit 232448"), b=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [fake.carry_out(at()) for _ in range(3)] == ["b"] * 3
    assert fake.calls.count("a") == 1
    assert [("b takes its place" in str(w.message)) for w in caught] == [True] * (mode == "off")


def test_the_last_plan_says_why_it_cannot(tune) -> None:
    """There is nothing left to take."""
    tune("off")
    with pytest.raises(OutOfResources):
        Fake(a=OutOfResources()).carry_out(at())


def test_an_unknown_mode_is_refused(tune) -> None:
    """By name."""
    tune("sometimes")
    with pytest.raises(ValueError, match=r"FUSED_LOWRANK_TUNE is 'sometimes'.*off, cached, full"):
        Fake(a=0.0, b=0.0).carry_out(at())


@pytest.mark.parametrize("rank", [4, 16, 256])
@pytest.mark.parametrize("transposed", [False, True])
def test_costs_grow_with_the_work(transposed: bool, rank: int) -> None:
    """Each plan's cost is above the floor, and the floor above that of the bare layer."""
    for m in (1, 16, 512, 8192):
        of = at(m, 4096, 1024, rank, transposed=transposed)
        floor, bare = costs.least(of), costs.least(of, adapted=False)
        assert bare.seconds < floor.seconds
        for plan in PLANS.values():
            cost, more = (choose.predict(plan, one) for one in (of, of._replace(n=2048)))
            assert floor.operations <= cost.operations * 1.0001
            assert cost.seconds < more.seconds
            assert floor.seconds <= cost.seconds


def test_tiles_do_not_count_on_a_cpu() -> None:
    """A plan's time there is that of its operations and its bytes."""
    for plan in ("aten", "first", "split"):
        assert not any(work.tiles for work in PLANS[plan].work(at()))


@pytest.mark.parametrize("name", ["aten", "first"])
def test_the_bytes_of_a_layer_that_is_not_square(name: str) -> None:
    """y is M × N: the library's tail goes over it once more, not over x."""
    of = at(512, k=1024, n=4096)
    parts = PLANS[name].up.work(of)
    y, x, w = 4 * 512 * 4096, 4 * 512 * 1024, 4 * 4096 * 1024
    u, up = 4 * 512 * 16, 4 * 4096 * 16
    assert sum(part.bytes for part in parts) == x + w + 3 * y + u + up


def test_an_unknown_gpu_has_peaks(monkeypatch) -> None:
    """From its multiprocessors and generation."""

    class Properties:
        name, major, multi_processor_count = "NVIDIA Z1000", 10, 100

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    peaks = costs.peaks.__wrapped__(torch.device("cuda:0"))
    assert 0 < peaks.wide < peaks.narrow
    assert peaks.bandwidth > 0
    Properties.name = "NVIDIA H200"
    listed = costs.peaks.__wrapped__(torch.device("cuda:0"))
    assert listed.bandwidth == pytest.approx(4.8e12 * costs.FILLED)
    assert listed.processors == 100


def test_names_that_hold_other_names_have_peaks_of_their_own() -> None:
    """GH200 holds H200, H200 holds H20, H100 PCIe holds H100; a device's own figures count."""
    listed = {"NVIDIA GH200 480GB": 4.0, "NVIDIA H200": 4.8, "NVIDIA H20": 4.0,
              "NVIDIA H100 PCIe": 2.0, "NVIDIA H100 80GB HBM3": 3.35}  # fmt: skip
    for name, terabytes in listed.items():
        assert costs.of_gpu(name, 9, 132).bandwidth == pytest.approx(
            terabytes * 1e12 * costs.FILLED
        )


def test_plans_of_a_cpu() -> None:
    """Library steps in either order, in one order where a mask lies between them."""
    assert choose.candidates(at(), "auto") == ["aten", "first"]
    assert choose.candidates(at(transposed=True, dropout=True), "auto") == ["aten"]
    assert choose.candidates(at(), "aten") == ["aten"]
