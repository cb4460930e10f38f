"""Which plan computes a pass: by cost on paper, by measured times, and when things go wrong."""

import concurrent.futures
import contextlib
import json
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lowrank import (
    AdapterBank,
    FusedLoraXSLinear,
    LoraXSLinear,
    config,
    explain,
    lowrank_linear,
    use_batch_invariance,
)
from fused_lowrank.compute import choose, costs, devices, operands
from fused_lowrank.compute import measured as tuning
from fused_lowrank.compute.operands import Operands, Problem, has_doubles, problem_of
from fused_lowrank.compute.plans import PLANS, Plan
from fused_lowrank.compute.run import run
from fused_lowrank.kernels.tiles import TileConfig
from fused_lowrank.testing import pinned_plan

CPU = torch.device("cpu")
H200 = costs.of_gpu("NVIDIA H200", 9, 132)


def at(m: int = 512, k: int = 1024, n: int = 1024, rank: int = 16, **other: object) -> Problem:
    """A pass on the CPU, in float32, unless said otherwise."""
    values = {"device": CPU, "dtype": torch.float32, "transposed": False, "regular": True}
    values |= {"dropout": False, "want_u": False, **other}
    return Problem(m=m, k=k, n=n, p=rank, q=rank, **values)


class OutOfResources(Exception):
    """As Triton says that a launch wants more than there is."""


@pytest.fixture
def tune(tmp_path, monkeypatch):
    """tune(mode): FUSED_LOWRANK_TUNE in a process that has just started, its cache of its own."""

    def start(mode: str) -> None:
        monkeypatch.setenv("FUSED_LOWRANK_TUNE", mode)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        choose.CHOSEN.clear()
        for cached in (tuning.known, tuning.identity, tuning.warn_once):
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
    known = dict(tuning.known(CPU))
    tune("full")
    tuning.known(CPU).clear()  # read before the other wrote
    Fake(a=0.0, b=0.0).carry_out(at(m=64))
    assert set(tuning.read(CPU)) == {*known, tuning.name_of(at(m=64))}
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


def test_a_product_takes_waves_of_tiles(hopper: torch.device) -> None:
    """One tile more than a GPU has multiprocessors is another wave; a CPU has none."""
    of = at(128, 4096, 132 * 256, device=hopper, dtype=torch.bfloat16)
    one, two = (costs.waves(at, (128, 256), 4096) for at in (of, of._replace(n=of.n + 1)))
    assert two == 2 * one == 2 * costs.of_tile(of, (128, 256), 4096)
    pure = 2.0 * 128 * 256 * 4096 * 132 / H200.narrow
    assert one == pytest.approx(pure)
    assert costs.of_tile(of, (64, 64), 4096) > pure / 8  # which is fed no faster


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


def test_the_choice_on_paper_for_a_gpu(hopper: torch.device) -> None:
    """Few rows in one launch where there is such a plan; library steps lose to fused ones."""
    for m in (1024, 8192):
        of = at(m, 4096, 4096, device=hopper, dtype=torch.bfloat16)
        seconds = {
            name: choose.predict(PLANS[name], of).seconds for name in ("split", "first", "aten")
        }
        assert min(seconds.values()) < seconds["aten"]
    assert seconds["split"] < 1.15 * costs.total([costs.base(of)], of).seconds


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


@pytest.fixture
def hopper(monkeypatch) -> torch.device:
    """A device that the planner takes for an H200."""
    tiles = pytest.importorskip("fused_lowrank.kernels.tiles")
    monkeypatch.setattr(devices, "target", lambda device: tiles.TARGETS["sm_90"])
    monkeypatch.setattr(costs, "peaks", lambda device: H200)
    return torch.device("cuda:0")


@pytest.mark.parametrize("transposed", [False, True])
def test_plans_of_a_gpu(transposed: bool, hopper: torch.device) -> None:
    """Library steps and kernels; in one launch where rows are few; none that is not proven."""
    pair = {"device": hopper, "dtype": torch.bfloat16, "transposed": transposed}
    many, few = at(8192, **pair), at(64, **pair)
    assert choose.candidates(many, "auto") == ["aten", "first", "split", "mixed"]
    assert choose.candidates(few, "auto") == ["aten", "first", "split", "mixed", "decode"]
    assert choose.candidates(few, "triton") == ["split", "decode"]
    assert choose.candidates(few._replace(p=300), "auto") == ["aten", "first"]
    assert choose.candidates(few._replace(want_u=True), "auto") == choose.candidates(many, "auto")
    assert choose.decide(few, "auto", mode="off").plans[0] == "decode"
    assert choose.decide(many, "auto", mode="off").plans[0] != "aten"


@pytest.mark.parametrize("transposed", [False, True])
def test_float32_on_a_gpu(transposed: bool, hopper: torch.device) -> None:
    """aten, unless there is a mask or a core for each row; TF32 only by its name."""
    for m in (1, 64, 8192):
        of = at(m, 4096, 4096, device=hopper, transposed=transposed)
        assert choose.candidates(of, "auto") == ["aten"]
        assert "split" in choose.candidates(of, "triton")
        assert "split" in choose.candidates(of._replace(by_row=True), "auto")
        assert "split" in choose.candidates(of._replace(dropout=True), "auto")
    narrow = PLANS["split:tf32x3"]
    assert not narrow.automatic
    assert narrow.why_not(of) is None
    for other in ({"m": 64}, {"dropout": True}, {"regular": False}, {"dtype": torch.bfloat16}):
        assert "is for float32 without dropout" in narrow.why_not(of._replace(**other))
    assert "is for 16 bits" in PLANS["split:deep"].why_not(of)


def test_compiled_kernels_take_no_factor_in_float64(
    hopper: torch.device, device: torch.device, monkeypatch
) -> None:
    """Whatever the plan: Triton cannot compile some of them. It is the interpreter's alone."""
    made = {"x": (5, 16), "weight": (8, 16), "down": (4, 16), "core": (4, 6), "up": (8, 6)}
    made = {name: torch.zeros(size, device=device).bfloat16() for name, size in made.items()}
    pair = made["core"].double(), made["up"][:6]
    changes = [{}, *({name: made[name].double()} for name in ("down", "core", "up"))]
    changes += [{"core": None}, {"core": pair}, {"core": pair[::-1]}]
    found = [has_doubles(Operands(**{**made, **c}, bias=None, scale=1.0)) for c in changes]
    assert found == [False, True, True, True, False, True, True]
    whole = {name: tensor.double() for name, tensor in made.items()}
    assert not has_doubles(Operands(**whole, bias=None, scale=1.0))
    for by_row, m in ((False, 8), (False, 8192), (True, 8)):
        of = at(m, device=hopper, dtype=torch.bfloat16, doubles=True, by_row=by_row, bulk=m > 64)
        monkeypatch.setattr(devices, "interpreted", lambda: True)
        assert any(PLANS[name].ours for name in choose.candidates(of, "auto"))
        monkeypatch.setattr(devices, "interpreted", lambda: False)
        assert not any(PLANS[name].ours for name in choose.candidates(of, "auto"))
        assert "torch.float64" in PLANS["decode"].why_not(of)
        with pytest.raises(RuntimeError, match=r"impl='triton' cannot.*torch\.float64.*'auto' can"):
            choose.decide(of, "triton", mode="off")
    x = made["x"]
    monkeypatch.setattr(choose, "takes_kernels", lambda *_: True)
    for doubles, name in ((False, "split"), (True, "aten")):
        given = "auto", config.Config(), x, 4, 6, doubles
        assert choose.for_single_steps(*given).name == name


@pytest.mark.parametrize("rank", [16, 300])
def test_dropout_has_one_mask_forward_and_backward(rank: int, hopper: torch.device) -> None:
    """The kernels' and torch's differ: whichever plans two passes take, they are of one kind."""
    kinds = set()
    for transposed in (False, True):
        kind = {"dtype": torch.bfloat16, "transposed": transposed, "dropout": True}
        of = at(8192, rank=rank, device=hopper, **kind)
        names = choose.candidates(of, "auto")
        kinds |= {PLANS[name].ours for name in names}
    assert kinds == {rank == 16}


def test_a_pinned_plan_that_cannot_says_why(device: torch.device) -> None:
    """Rather than another one's result under its name."""
    layer = FusedLoraXSLinear(96, 64, r=4, dropout=0.5, device=device)
    with pinned_plan("first"):
        y = layer(torch.randn(5, 96, device=device, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"first cannot.*dropout"):
        y.sum().backward()


def taken() -> dict[bool, str]:
    """transposed → the plan that calls have been given since `choose.CHOSEN` was cleared."""
    return {of.transposed: decision.plans[0] for (of, _), decision in choose.CHOSEN.items()}


@pytest.mark.parametrize(
    ("tiles", "said"),
    [
        ({"shrunk": TileConfig(16, 16, 16, 4, 1)}, r"'shrunk': it must have .* shrink, gemm_tail"),
        ({"shrink": 3}, r"tiles has 3 for 'shrink'"),
    ],
)
def test_tiles_that_are_none_are_refused(tiles: dict, said: str) -> None:
    """Before anything is computed with them, and the context stays as it was."""
    before = config.current()
    with pytest.raises(ValueError, match=said), config.use(tiles=tiles):
        pass
    assert config.current() == before


@pytest.mark.cpu("a plan for a GPU, asked for on a CPU")
def test_a_plan_that_is_not_for_this_device_says_so(device: torch.device) -> None:
    layer, x = FusedLoraXSLinear(64, 64, r=8, device=device), torch.randn(65, 64, device=device)
    said = "relay cannot compute this: it is a kernel for Hopper .* Without config.use"
    with config.use(plan="relay"), pytest.raises(RuntimeError, match=said):
        layer(x)


@pytest.mark.parametrize("rows", ["8", 8.5, torch.tensor(8), None])
def test_explain_wants_a_number_of_rows(rows: object) -> None:
    with pytest.raises(TypeError, match=r"rows is a .*: it must be an int"):
        explain(FusedLoraXSLinear(8, 8, r=2), rows)


def test_why_float32_takes_library_products_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(choose.devices, "why_not_triton", lambda *args: None)
    problem = at(device=torch.device("cuda"))
    assert "in float32" in choose.decide(problem, "auto", mode="off").why
    assert "impl='aten'" in choose.decide(problem, "aten", mode="off").why


def test_explain_says_what_a_call_does(device: torch.device) -> None:
    """Plan, costs, floor, tiles and why, for both passes; a call then takes that plan."""
    choose.CHOSEN.clear()
    layer = FusedLoraXSLinear(256, 512, r=8, device=device)
    layer.impl = "triton"
    explanation = explain(layer, 300)
    said = str(explanation)
    wanted = "256 → 512|P = 8|300 rows|rows up to 512|forward: |backward: |why: |GFLOP|MB|floor"
    for text in [*wanted.split("|"), "bare layer", "shrink: ", "gemm_tail: "]:
        assert text in said, text
    choose.CHOSEN.clear()
    layer(torch.randn(300, 256, device=device, requires_grad=True)).sum().backward()
    assert taken() == {one.problem.transposed: one.plan for one in explanation.passes}
    assert len(taken()) == 2


def plans_of(call) -> set[str]:
    """The names of the plans that passes of a call were computed by."""
    from fused_lowrank.compute import autograd

    names = set()

    def noted(*args):
        done = run(*args)
        names.add(done.plan.name)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "run", noted)
        call()
    return names


@pytest.mark.parametrize("impl", ["auto", "aten", "triton"])
@pytest.mark.parametrize("way", ["plain", "invariant", "bank", "bank, invariant", "pinned"])
def test_explain_names_the_plans_that_are_run(way: str, impl: str, device: torch.device) -> None:
    """Under batch invariance, in a bank and under a pin, forward and backward."""
    layer = FusedLoraXSLinear(96, 64, r=8, device=device)
    layer.impl, model = impl, torch.nn.Sequential(layer)
    x = torch.randn(700, 96, device=device, requires_grad=True)
    if "bank" in way:
        bank = AdapterBank.from_model(model, slots=2)
        bank.add("a")

    def call() -> None:
        with bank.use(["a", None] * 350) if "bank" in way else contextlib.nullcontext():
            y = model(x)
        y.sum().backward()

    use_batch_invariance("invariant" in way)
    try:
        with config.use(plan="split" if way == "pinned" else None):
            expected = {one.plan for one in explain(layer, 700).passes}
            assert plans_of(call) == expected
    finally:
        use_batch_invariance(False)
    if "invariant" in way:
        assert expected <= {"fixed", "alone"}


def test_explain_where_no_plan_is_chosen() -> None:
    """Small calls on a CPU, and the reference layers; other things are refused."""
    assert "chain of library operations" in str(explain(FusedLoraXSLinear(64, 64, r=4), 1))
    assert "no plan" in str(explain(LoraXSLinear(64, 64, r=4), 1))
    merged = FusedLoraXSLinear(64, 64, r=4)
    merged.merge()
    assert "bare layer" in str(explain(merged, 1000))
    with pytest.raises(TypeError, match="layer is a Linear"):
        explain(torch.nn.Linear(4, 4), 1)
    with pytest.raises(ValueError, match="rows is 0"):
        explain(FusedLoraXSLinear(64, 64, r=4), 0)


def test_config_is_of_its_context() -> None:
    """It nests, is left again, and is not seen by another thread; a backward has its forward's."""
    layer = FusedLoraXSLinear(96, 64, r=8)
    x = torch.randn(700, 96, requires_grad=True)
    with config.use(plan="first"):
        with config.use(batch_invariance=True):
            assert config.current() == config.Config("first", (), True)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                assert pool.submit(config.current).result() == config.Config()
        y = layer(x)
    assert config.current() == config.Config()
    assert plans_of(lambda: y.sum().backward()) == {"first"}
    with config.use(plan="frist"), pytest.raises(ValueError, match=r"plan is 'frist'.*aten, first"):
        layer(x)


@pytest.mark.parametrize("plan", [None, "aten", "split", "first"])
@pytest.mark.parametrize("impl", ["auto", "aten", "triton"])
@pytest.mark.parametrize("dx", [False, True])
def test_a_pinned_plan_keeps_one_mask(
    dx: bool, impl: str, plan: str | None, device: torch.device
) -> None:
    """Also where x needs no gradient: y is linear in down, so a difference is its gradient."""
    if plan == "first" and dx:
        pytest.skip("it has no dropout on the way back")
    torch.manual_seed(0)
    sizes = {"x": (70, 48), "weight": (32, 48), "down": (8, 48), "core": (8, 8), "up": (32, 8)}
    made = {n: torch.randn(s, device=device, dtype=torch.float64) for n, s in sizes.items()}
    if device.type == "cuda":
        made = {name: tensor.float() for name, tensor in made.items()}
    seed = torch.tensor([7], device=device)
    step, dy = torch.randn_like(made["down"]), torch.randn_like(made["x"][:, :32])

    def call(down: torch.Tensor) -> torch.Tensor:
        given = {**made, "down": down, "x": made["x"].detach().requires_grad_(dx)}
        with config.use(plan=plan):
            y = lowrank_linear(**given, dropout_p=0.5, training=True, impl=impl, seed=seed)
        return (y * dy).sum()

    leaf = made["down"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(call(leaf), leaf)
    difference = call(made["down"] + step).detach() - call(made["down"]).detach()
    rtol = 1e-9 if grad.dtype == torch.float64 else 1e-3
    torch.testing.assert_close((grad * step).sum(), difference, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize("plan", ["aten", "first", "split", "mixed"])
def test_a_pinned_plan_of_no_rows(plan: str, dx: bool, device: torch.device) -> None:
    """Nothing is launched, and the gradients are zero."""
    layer = FusedLoraXSLinear(96, 64, r=8, train=("down", "core", "up"), device=device)
    x = torch.randn(0, 96, device=device, requires_grad=dx)
    with config.use(plan=plan):
        y = layer(x)
    y.sum().backward()
    assert not any(p.grad.any() for p in (layer.down, layer.core, layer.up))


@pytest.mark.parametrize("train", ["x core", "down core up", "x weight down core up bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(("m", "n", "k"), [(5, 7, 0), (5, 0, 7), (100, 7, 0), (100, 0, 9)])
def test_an_empty_layer(
    m: int, n: int, k: int, dropout_p: float, train: str, device: torch.device
) -> None:
    """Without columns of x, or of y: y is the bias, or nothing, and no gradient is lost."""
    sizes = {"x": (m, k), "weight": (n, k), "down": (3, k), "core": (3, 4), "up": (n, 4)}
    made = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    made["bias"] = torch.randn(n, device=device)
    leaves = [made[name].requires_grad_() for name in train.split()]
    y = lowrank_linear(**made, dropout_p=dropout_p, training=True, impl="triton")
    assert torch.equal(y, made["bias"].expand(m, n))
    grads = torch.autograd.grad(y.sum(), leaves)
    for name, grad in zip(train.split(), grads, strict=True):
        assert torch.equal(grad, torch.full_like(grad, m if name == "bias" else 0))


def test_batch_invariance_of_the_process_reaches_into_contexts() -> None:
    """Switched on or off inside a context that says nothing of it."""
    with config.use(plan="aten"):
        use_batch_invariance(True)
        assert config.current() == config.Config("aten", (), True)
        with config.use(batch_invariance=False):
            assert not config.current().batch_invariance
        use_batch_invariance(False)
        assert not config.current().batch_invariance


def test_a_pinned_tile_that_is_too_large_takes_no_plan_from_others(monkeypatch) -> None:
    """What is pinned in a context counts there alone."""
    choose.CHOSEN.clear()
    decision = choose.decide(at(m=64), "auto", mode="off")
    pinned = config.Config(tiles=(("shrink", None),))
    error = OutOfResources("shared memory")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = choose.give_up(at(m=64), "auto", pinned, decision, error)
        assert left.plans == decision.plans[1:]
        assert not choose.CHOSEN
        choose.give_up(at(m=64), "auto", config.Config(), decision, error)
    assert choose.CHOSEN[at(m=64), "auto"] == left
    choose.CHOSEN.clear()


def test_explain_of_what_cannot_run_says_so(monkeypatch) -> None:
    """As a call does."""
    layer = FusedLoraXSLinear(96, 64, r=8, impl="triton")
    monkeypatch.setattr(devices, "target", lambda device: None)
    for asked in (lambda: explain(layer, 700), lambda: layer(torch.randn(700, 96))):
        with pytest.raises(RuntimeError, match="impl='triton' cannot compute this"):
            asked()


@pytest.mark.cpu("kernels for tensors that lie on it")
def test_a_core_for_each_row_is_for_some_plans_only(monkeypatch) -> None:
    """For those that give the bare layer's bits where it is zero, where there is room for it."""
    from fused_lowrank.kernels.tiles import TARGETS

    rows, one = (at(m=16, dtype=torch.bfloat16, by_row=value) for value in (True, False))
    assert choose.candidates(rows, "triton") == ["split", "decode"]
    assert choose.candidates(rows, "aten") == ["aten"]
    assert choose.candidates(rows, "auto") == ["aten"]
    assert choose.candidates(one, "auto") == ["aten", "first"]
    assert all(PLANS[name].why_not(rows) for name in ("first", "mixed"))
    monkeypatch.setattr(devices, "target", lambda device: TARGETS["gfx942"])
    assert choose.candidates(rows, "triton") == ["split"]
    assert choose.candidates(one, "triton") == ["split", "decode"]


def test_the_relay_is_chosen_by_itself_where_it_can_be_had(monkeypatch) -> None:
    """On Hopper, of what bulk copies can move, above the rows that `decode` is for."""
    from fused_lowrank.kernels.tiles import TARGETS, Target

    def offered(target: Target, **other: object) -> bool:
        monkeypatch.setattr(devices, "target", lambda device: target)
        problem = at(**{"m": 8192, "dtype": torch.bfloat16, "bulk": True, **other})
        there = "relay" in choose.candidates(problem, "triton")
        assert there == (PLANS["relay"].why_not(problem) is None)
        return there

    hopper = TARGETS["sm_90"]
    assert offered(hopper)
    assert offered(hopper, m=128, transposed=True)
    assert not offered(hopper, m=64)
    assert not offered(hopper, m=1 << 20)  # more rows than flags
    assert not offered(hopper, rank=100)
    for other in ("dropout", "want_u"):
        assert not offered(hopper, **{other: True})
    assert not offered(hopper, bulk=False)
    assert not offered(replace(hopper, gluon=False))
    assert not offered(TARGETS["sm_100"])


def test_the_relay_of_a_bank_is_taken_by_its_name(monkeypatch) -> None:
    """With a core for each row it has not run yet: `split` is chosen until it has."""
    from fused_lowrank.kernels.tiles import TARGETS

    hopper = TARGETS["sm_90"]
    monkeypatch.setattr(devices, "target", lambda device: hopper)
    rows = at(m=8192, dtype=torch.bfloat16, bulk=True, by_row=True)
    for problem in (rows, rows._replace(m=128, transposed=True)):
        assert choose.candidates(problem, "triton") == ["split"]
        assert choose.named("relay", problem, "triton").plans == ("relay",)
    for change in ({"p": 100}, {"m": 64}, {"bulk": False}, {"dropout": True}):
        with pytest.raises(RuntimeError, match="the pinned plan relay cannot compute this"):
            choose.named("relay", rows._replace(**change), "triton")


def test_what_cores_of_their_own_cost_a_relay_on_paper(hopper: torch.device) -> None:
    """What the first column's tiles read between their K-loop and the flag, once in each turn."""

    def seconds(m: int, p: int, name: str, by_row: bool) -> float:
        problem = at(m, 4096, 4096, device=hopper, dtype=torch.bfloat16, bulk=True, by_row=by_row)
        return choose.predict(PLANS[name], problem._replace(p=p, q=p)).seconds

    def added(m: int, p: int) -> float:
        return seconds(m, p, "relay", True) - seconds(m, p, "relay", False)

    assert added(8192, 16) == pytest.approx(added(256, 16))
    assert added(32768, 16) == pytest.approx(2 * added(8192, 16))
    assert added(8192, 64) > 10 * added(8192, 16)


def test_bulk_is_of_all_operands() -> None:
    """x, W, down and up of one dtype, and rows of 16 bytes each way."""
    made = [torch.zeros(size, dtype=torch.bfloat16) for size in ((300, 72), (40, 72), (9, 72))]
    x, weight, down = made
    operands = Operands(x, weight, down, None, torch.zeros_like(weight[:, :8]), None, 1.0)
    assert problem_of(operands, False).bulk
    assert problem_of(operands.of_backward(x.new_zeros(300, 40)), False).bulk
    assert not problem_of(operands.of_backward(x.new_zeros(300, 44)[:, :40]), False).bulk
    for change in (
        {"down": down.float()},
        {"up": weight[:, :9].contiguous()},
        {"x": x.new_zeros(300, 76)[:, :72]},
        {"x": x.new_zeros(300 * 72 + 1)[1:].view(300, 72)},
    ):
        assert not problem_of(operands._replace(**change), False).bulk


def test_a_device_without_the_kernels_for_hopper_is_told_once(monkeypatch) -> None:
    """With less shared memory than they take, or a Triton that has no Gluon."""
    from fused_lowrank.kernels.tiles import TARGETS

    hopper = TARGETS["sm_90"]
    devices.with_gluon.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.with_gluon(hopper) == hopper
        assert devices.with_gluon(TARGETS["sm_100"]) == TARGETS["sm_100"]
    less = replace(hopper, shared=100_000)
    with pytest.warns(UserWarning, match="100000 bytes of shared memory"):
        assert not devices.with_gluon(less).gluon

    def missing(name: str) -> None:
        raise ImportError("no module of that name")

    devices.with_gluon.cache_clear()
    monkeypatch.setattr(devices.importlib, "import_module", missing)
    with pytest.warns(UserWarning, match="has no Gluon"):
        assert devices.with_gluon(hopper) == replace(hopper, gluon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        devices.with_gluon(hopper)
    devices.with_gluon.cache_clear()


def test_a_refused_cooperative_launch_is_a_lack() -> None:
    """So the next plan takes its place."""
    said = "Triton Error [CUDA]: too many blocks in cooperative launch"
    assert tuning.is_lack(RuntimeError(said))
    assert not tuning.is_lack(RuntimeError("Triton Error [CUDA]: an illegal memory access"))
