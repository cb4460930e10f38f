"""The bench tells the truth: times, bytes, wrong results, failures; its files are checked."""

import copy
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import block, host, report, run
from bench.support import cases, harness, timers, warm
from bench.support.providers import PROVIDERS, Provider, layer
from bench.support.store import Refused, Store, key_id, read
from bench.support.tensors import make_tensors
from fused_lowrank import config

CPU = torch.device("cpu")
CASE = cases.parse("tiny", "square", 8, "fp32")
QUICK = harness.Settings(seconds=0.0, min_reps=5, max_reps=5)
MIB = 1 << 20


def on_top(extra):
    """A builder: the reference layer, with `extra(y)` after it."""

    def build(case, tensors):
        call = layer("", False, "reference", "method")(case, tensors)
        return lambda x: extra(call(x))

    return build


def sleeps(y: torch.Tensor) -> torch.Tensor:
    time.sleep(0.02)
    return y


class Allocating(torch.autograd.Function):
    """Adds nothing, takes 3 MiB in the forward and saves 1 MiB for the backward."""

    @staticmethod
    def forward(ctx, y):
        torch.empty(3 * MIB, dtype=torch.uint8)
        ctx.save_for_backward(torch.empty(MIB, dtype=torch.uint8))
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy


def raises(y: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("nothing to divide")


def exhausts(y: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("no memory left")


class Nth:
    """Works when it is checked, and fails when it is timed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return raises(y) if self.calls > 8 else y


FAKES = {
    "sleeps": on_top(sleeps),
    "allocates": on_top(Allocating.apply),
    "wrong": on_top(lambda y: y * 1.01),
    "nan": on_top(lambda y: y * float("nan")),
    "raises": on_top(raises),
    "exhausts": on_top(exhausts),
    "fails late": on_top(Nth()),
}


@pytest.fixture(scope="module", autouse=True)
def no_rehearsal():
    """What rehearses a measurement must not change the tests of one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BENCH_TIMER", "BENCH_SHRINK", "BENCH_COMMIT"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def rows() -> dict:
    fakes = [Provider(name, "method", build) for name, build in FAKES.items()]
    names = ("bare", "eager", "auto", "split")
    several = [*(PROVIDERS[n] for n in names), *fakes]
    measured = harness.measure_case(CASE, several, timers.HostTimer(CPU), CPU, QUICK)
    return {row["provider"]: row for row in measured}


def test_a_known_time_is_reported(rows):
    slept, eager = rows["sleeps"], rows["eager"]
    assert 20 <= slept["forward"][1] < 40
    assert slept["backward"][1] < 10
    assert 20 <= slept["step"][0] <= slept["step"][1] <= slept["step"][2]
    assert slept["relative"]["step"][1] > eager["relative"]["step"][1]


def test_known_bytes_are_reported(rows):
    eager, more = rows["eager"], rows["allocates"]
    y = CASE.rows * CASE.n * 4
    assert more["saved"] == eager["saved"] + MIB
    # At the peak: the 3 MiB beside y and what eager had kept by then.
    assert harness.peak_bytes(lambda: torch.empty(5 * MIB, dtype=torch.uint8), CPU) == 5 * MIB
    assert 3 * MIB + y <= more["peak"] <= 3 * MIB + eager["peak"] + y
    dx = CASE.rows * CASE.k * 4
    assert rows["bare"]["peak"] == y + dx


def test_saved_bytes_are_exactly_t(rows):
    assert rows["auto"]["saved"] == CASE.rows * CASE.p * 4
    assert rows["bare"]["saved"] == 0


@pytest.mark.parametrize(
    ("name", "status", "why"),
    [
        ("wrong", "wrong", "error of y is"),
        ("nan", "wrong", "error of y is nan"),
        ("raises", "error", "ZeroDivisionError: nothing to divide"),
        ("exhausts", "out of memory", "no memory left"),
        ("fails late", "error", "ZeroDivisionError"),
        ("split", "absent", "needs a GPU"),
    ],
)
def test_a_failure_is_a_row_that_says_so(rows, name, status, why):
    assert rows[name]["status"] == status
    assert why in rows[name]["why"]
    assert "step" not in rows[name]


def test_the_rest_goes_on(rows):
    assert all(rows[name]["status"] == "ok" for name in ("bare", "eager", "auto", "sleeps"))
    assert {rows[name]["reps"] for name in ("bare", "eager", "auto")} == {5}


def test_a_plan_is_pinned_while_its_provider_runs():
    seen = []

    def build(case, tensors):
        call = PROVIDERS["eager"].build(case, tensors)
        return lambda x: seen.append(config.current().plan) or call(x)

    pinned = Provider("pinned", "method", build, plan="first")
    harness.measure_case(CASE, [PROVIDERS["bare"], pinned], timers.HostTimer(CPU), CPU, QUICK)
    assert len(seen) > QUICK.min_reps
    assert all(there == "first" for there in seen)
    assert config.current().plan is None


@pytest.mark.parametrize("case", cases.SETS["smoke"], ids=lambda case: case.name)
def test_dropout_and_every_method_are_checked(case):
    """A provider that forgets the low-rank term is refused in every kind of case."""
    tensors = make_tensors(case, CPU)
    for name in ("aten", "eager"):
        truth = harness.make_truth(case, tensors, "method", not PROVIDERS[name].own_mask)
        call = PROVIDERS[name].build(case, tensors)
        with PROVIDERS[name].pinned():
            harness.Runner(PROVIDERS[name], case, tensors, call).check(truth)
    bare = PROVIDERS["bare"].build(case, tensors)

    def forgets(x: torch.Tensor) -> torch.Tensor:
        return bare(x) + sum(0.0 * p.sum() for p in tensors.trained("method").values())

    with pytest.raises(harness.WrongResult, match="error of y"):
        harness.Runner(PROVIDERS["eager"], case, tensors, forgets).check(truth)


def test_a_fused_block_is_checked_and_measured_beside_the_others(tmp_path):
    arguments = ["--sequences", "16", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path)]
    names = ["frozen", "fused-xs", "eager-mini", "fused-mini", "fused-lora"]
    assert block.main([*arguments, "--providers", ",".join(names)]) == 0
    (path,) = tmp_path.iterdir()
    lines = [line for line in read(path)[1] if line["kind"] == "block"]
    assert [(line["provider"], line["status"]) for line in lines[:5]] == [(n, "ok") for n in names]
    plain, checkpointed = lines[1], lines[6]
    assert checkpointed["checkpoint"]
    assert checkpointed["held"] < plain["held"] <= plain["peak"]
    assert all(0.0 < line["wall"][0] <= line["wall"][1] for line in lines)


def test_the_clock_on_the_wall_counts_the_host(monkeypatch):
    """A loop of steps is timed from its begin to its end, the waiting for the host included."""
    monkeypatch.setattr(block, "LOOP", 4)
    calls = {"slow": lambda: time.sleep(0.01), "fast": lambda: None}
    walls = block.by_the_wall(calls, CPU, rounds=4)
    assert [len(each) for each in walls.values()] == [2, 2]
    assert min(walls["slow"]) >= 10.0
    assert max(walls["fast"]) < 5.0


def test_a_wrong_block_is_refused():
    torch.manual_seed(0)
    base = block.Block(block.SMALL)
    made = block.BUILDERS["fused-lora"][0](copy.deepcopy(base))
    made.o.up.data.fill_(0.1)
    with pytest.raises(harness.WrongResult, match="error of y"):
        block.check(made, base, block.frozen, block.SMALL.hidden)


@pytest.mark.parametrize("kind", host.KINDS)
def test_host_times_every_part(kind):
    figures = host.measure(kind, 3)
    assert set(figures) == {"forward", "forward + backward"}
    assert all(value > 0 for several in figures.values() for value in several.values())


def test_sizes_of_the_sets():
    assert sum(not case.base for case in cases.SETS["core"]) <= 40
    for chosen in cases.SETS.values():
        assert len({case.name for case in chosen}) == len(chosen)
    assert all(max(c.k, c.n) <= 4096 and min(c.k, c.n) >= 768 for c in cases.SETS["cpu"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "nope"], "unknown set nope; known: smoke, cpu, core, full"),
        (["--case", "nope"], "unknown case nope; known: tiny.square/lora_xs"),
        (["--providers", "bare,nope"], "unknown provider nope; known: bare, gemm"),
        (["--timer", "nope"], "unknown timer nope; known: host, device"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(arguments, said, tmp_path, capsys):
    assert run.main([*arguments, "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def measure(folder: Path, *more: str) -> int:
    """A run of the command line, quickly."""
    arguments = ["--device", "cpu", "--timer", "host", "--seconds", "0", "--out", str(folder)]
    return run.main([*arguments, "--providers", "bare,eager,auto,first,split", *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    assert measure(folder) == 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the one results file."""
    (source,) = finished.iterdir()
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    return copy


def test_a_resume_does_only_the_rest(copied):
    lines = copied.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["kind"] for line in lines][:3] == ["header", "ceiling", "case"]
    cut = b"".join(lines[:3]) + lines[3][:50]  # one case whole, the next one torn
    copied.write_bytes(cut)
    with pytest.raises(Refused, match="truncated"):
        read(copied)
    assert measure(copied.parent, "--resume", "--minutes", "0") == 1
    _, kept = read(copied)
    assert [line["kind"] for line in kept] == ["header", "ceiling", "case", "end"]
    assert kept[-1]["missing"] == len(cases.SETS["smoke"]) - 1
    assert measure(copied.parent, "--resume") == 0
    after = copied.read_bytes()
    assert after.startswith(b"".join(lines[:3]))
    key, kept = read(copied)
    names = [line["case"] for line in kept if line["kind"] == "case"]
    assert names == [case.name for case in cases.SETS["smoke"]]
    assert key == kept[0]["key"]
    assert measure(copied.parent, "--resume") == 0
    assert copied.read_bytes()[: len(after)] == after
    assert len(read(copied)[1]) == len(kept) + 1  # nothing but another end


def test_steps_are_taken_before_anything_is_timed(monkeypatch, tmp_path, capsys):
    """By every provider that can; one that fails keeps no other from it."""
    monkeypatch.setitem(PROVIDERS, "raises", Provider("raises", "method", on_top(raises)))
    task = CASE, ["bare", "raises", "eager", "split"], "cpu"
    assert warm.steps(task) == ["bare", "eager"] + ["split"] * (
        PROVIDERS["split"].why_absent(CASE, CPU) is None
    )
    case = cases.SETS["smoke"][0].name
    names = "bare,first,compiled"  # the last is slow to set up
    assert measure(tmp_path, "--case", case, "--warm", "2", "--providers", names) == 0
    said = capsys.readouterr().out
    assert "2 steps taken" in said
    assert said.index("steps taken") < said.index("err/ref")


def test_a_second_run_is_a_second_file(copied):
    assert measure(copied.parent, "--case", cases.SETS["smoke"][0].name) == 0
    assert len(list(copied.parent.iterdir())) == 2


def rewrite(path: Path, change) -> None:
    """Put a file's lines through `change`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def another_commit(lines: list[dict]) -> None:
    key = {**lines[0]["key"], "commit": "0123456789ab"}
    lines[2]["run"] = key_id(key)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines.pop(), "was cut off"),
        (lambda lines: lines.pop(2), "was cut off"),
        (lambda lines: lines[0].update(schema=99), "schema 99"),
        (lambda lines: lines.__setitem__(0, {"some": "json"}), "schema None"),
        (lambda lines: lines[0]["key"].pop("commit"), "does not say its commit"),
        (another_commit, "of another run"),
    ],
)
def test_foreign_and_truncated_files_are_refused(copied, change, said, capsys):
    rewrite(copied, change)
    assert report.main(["--results", str(copied.parent), "--readme", "none"]) == 2
    assert said in capsys.readouterr().err


def test_files_of_different_code_are_not_mixed(copied, capsys):
    lines = [json.loads(line) for line in copied.read_text().splitlines()]
    key = {**lines[0]["key"], "code": "0123456789ab"}
    store = Store.new(copied.parent, key)
    for line in lines[1:-1]:
        store.add(line)
    store.end(0)
    assert report.main(["--results", str(copied.parent), "--readme", "none"]) == 2
    assert "different code" in capsys.readouterr().err


def test_the_readme_has_a_later_commits_results_first(copied):
    readme = copied.parent / "README.md"
    readme.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    arguments = ["--results", str(copied.parent), "--readme", str(readme)]
    later = copied.parent / "later"
    later.mkdir()
    shutil.copy(copied, later)
    commit = json.loads(copied.read_text().splitlines()[0])["key"]["commit"]
    assert report.main(arguments) == 0
    assert readme.read_text().count(f"commit {commit}") == 2
    own, other = map(readme.read_text().index, ("later/RESULTS.md", "./RESULTS.md"))
    assert own < other


def test_the_report_is_the_same_twice_and_is_checked(copied, capsys):
    readme = copied.parent / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    arguments = ["--results", str(copied.parent), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text()

    def files() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in copied.parent.rglob("*") if p.is_file()}

    assert report.main(arguments) == 0
    first = files()
    assert any(name.endswith(".png") for name in first)
    assert report.main(arguments) == 0
    assert files() == first
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    readme.write_text(text.replace("| ", "|  ", 1))
    assert report.main([*arguments, "--check"]) == 1
    assert "README.md" in capsys.readouterr().err
