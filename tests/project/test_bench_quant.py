"""The bench tells the truth of any method of the table, and of quantised bases."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import host, report, run
from bench.support import bases, cases, harness, timers
from bench.support.providers import PROVIDERS, passes, planned
from bench.support.store import read
from bench.support.tensors import make_tensors
from fused_lowrank import methods
from fused_lowrank.methods.method import Factor, Method, Parts

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
QUICK = harness.Settings(seconds=0.0, min_reps=2, max_reps=2)
SIZES = "tiny", "even", 24
WORDS = {"vera": "vera8", "nola": "nola4x3"}  # of ranks that suit the tiny layer


def checked(case, *names: str) -> None:
    """The results of these providers are the equation's, and those of a bare layer are not."""
    tensors = make_tensors(case, CPU)
    for name in names:
        provider = PROVIDERS[name]
        assert provider.why_absent(case, CPU) is None
        truth = harness.make_truth(case, tensors, provider.equation, not provider.own_mask)
        with provider.pinned():
            runner = harness.Runner(provider, case, tensors, provider.build(case, tensors))
            runner.check(truth)
        if provider.equation != "bare":
            with pytest.raises(harness.WrongResult, match="error of y"):
                replace(runner, call=forgetful(runner)).check(truth)


def forgetful(runner):
    """A call that forgets the low-rank term."""
    bare = PROVIDERS["bare"].build(runner.case, runner.tensors)
    nothing = [0.0 * factor.sum() for factor in runner.trained.values()]
    return lambda x: bare(x) + sum(nothing)


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_of_the_table_can_be_measured(method):
    """By its row alone: operands, truth, plans, the host's time."""
    case = cases.parse(*SIZES, WORDS.get(method, method), "fp32")
    assert case.method == method
    checked(case, "eager", "aten")
    assert all(len(plans) > 0 for plans in planned(case, CPU))
    forward, both = host.parts(case, make_tensors(case, CPU))
    with torch.no_grad():
        y = [forward[name]() for name in (host.EAGER, "fused layer", "lowrank_linear")]
    torch.testing.assert_close(y[1:], [y[0]] * 2)
    for call in both.values():
        call()


def test_a_new_row_is_measured_without_a_change_here(monkeypatch):
    """A method that nobody has heard of: a down in two halves, and a scale for each output."""

    def parts(factors, weight, scale):
        down = torch.cat([factors["left"], factors["right"]], 1)
        return Parts(down, None, factors["gate"][:, None] * factors["up"])

    row = Method(
        name="halves",
        title="Halves",
        ranks={"r": 4},
        factors={
            "left": Factor("rh", "kaiming"),
            "right": Factor("rh", "kaiming", trained=True),
            "up": Factor("Nr", "kaiming"),
            "gate": Factor("N", "zeros", trained=True),
        },
        learning_rate=1e-3,
        outputs=("up", "gate"),
        parts=parts,
        sizes=lambda own: {**own, "h": own["K"] // 2},
        slices=False,
    )
    layer = type("HalvesLinear", (methods.LowRankLinear,), {"__doc__": "Halves."}, row=row)
    fused = type("FusedHalvesLinear", (layer,), {"__doc__": "Halves.", "impl": "auto"})
    monkeypatch.setitem(methods.METHODS, "halves", (layer, fused))
    case = cases.parse(*SIZES, "halves6", "fp32")
    assert (case.p, case.name) == (6, "tiny.even/halves/r6/m24/fp32")
    checked(case, "eager", "aten", "first")
    assert passes(case, GPU)[1].want_u  # a part of down is trained


@pytest.mark.parametrize("base", bases.BASES)
def test_quantised_bases(base):
    """All are checked against the values; ours saves t and x and keeps no W."""
    pytest.importorskip(bases.BASES[base].package)
    case = cases.parse(*SIZES, "lora8", base, "fp32")
    checked(case, "bare", "dense", "eager", "aten", "first", "called", "auto")
    tensors = make_tensors(case, CPU)
    plain = make_tensors(replace(case, base=""), CPU).weight
    assert 0.001 < float((tensors.weight - plain).norm() / plain.norm()) < 0.2
    auto = harness.Runner(PROVIDERS["auto"], case, tensors, PROVIDERS["auto"].build(case, tensors))
    saved = harness.saved_bytes(auto.forward(0), tensors.fixed_storages())
    assert saved == case.rows * (case.k + case.p) * 4
    assert auto.call.base_layer is tensors.module is PROVIDERS["bare"].build(case, tensors)


@pytest.mark.parametrize("base", bases.BASES)
def test_qlora_by_peft(base):
    """PEFT's layer of that kind, not of nn.Linear; what is not fused is not said to be."""
    pytest.importorskip(bases.BASES[base].package)
    pytest.importorskip("peft")
    case = cases.parse(*SIZES, "lora8", base, "fp32")
    checked(case, "peft-lora")
    tensors = make_tensors(case, CPU)
    layer = PROVIDERS["peft-lora"].build(case, tensors)
    assert type(layer).__name__ in ("Linear4bit", "Linear8bitLt", "TorchaoLoraLinear")
    assert layer.base_layer is tensors.module
    rows = harness.measure_case(
        case, [PROVIDERS[n] for n in ("bare", "peft-lora", "peft-lora-fused", "peft-dora")],
        timers.HostTimer(CPU), CPU, QUICK,
    )  # fmt: skip
    assert [row["status"] for row in rows[:2]] == ["ok", "ok"]  # whatever the others did to it
    left = rows[2]["status"] == "absent" and "left to PEFT's own forward" in rows[2]["why"]
    assert left or rows[2]["status"] == "ok"


def test_what_is_not_there_is_a_row_that_says_so(monkeypatch):
    nowhere = bases.BASES["nf4"]._replace(package="no_such_package")
    monkeypatch.setitem(bases.BASES, "nf4", nowhere)
    case = cases.parse(*SIZES, "lora8", "nf4", "fp32")
    rows = harness.measure_case(case, list(PROVIDERS.values()), timers.HostTimer(CPU), CPU, QUICK)
    assert [row["provider"] for row in rows] == list(PROVIDERS)
    assert {row["why"] for row in rows} == {"no_such_package is not installed"}
    plain = cases.parse(*SIZES, "lora8", "fp32")
    assert PROVIDERS["called"].why_absent(plain, CPU) == "is for a quantised W"
    monkeypatch.undo()
    pytest.importorskip("bitsandbytes")
    assert PROVIDERS["unsloth"].why_absent(case, GPU) == "takes a plain W only"


def test_where_x_is_quantised_too_the_library_is_the_measure(monkeypatch):
    """The reference beside the truth is then what the library computes, and not the values."""
    pytest.importorskip("bitsandbytes")
    case = cases.parse(*SIZES, "lora8", "int8", "fp32")
    tensors = make_tensors(case, CPU)
    monkeypatch.setattr(type(tensors.base), "is_exact", lambda self: False)
    rounded = tensors.module.forward
    monkeypatch.setattr(tensors.module, "forward", lambda x: rounded(x + 0.01 * x.detach().sign()))
    truth = harness.make_truth(case, tensors, "method", False)
    y = truth.same["y"]
    assert 1e-3 < float((y.double() - truth.exact["y"]).norm() / truth.exact["y"].norm()) < 0.1


@pytest.mark.parametrize("base", bases.BASES)
def test_the_planner_is_asked_of_the_base(base):
    """As it is of a layer over one: on a GPU the 8-bit forward is its library's."""
    case = cases.parse("llama-3.1-8b", "q", 8192, "lora16", base)
    pair = passes(case, GPU)
    assert {problem.base for problem in pair} == {bases.BASES[base].planned}
    assert [problem.called for problem in pair] == [base == "int8", False]
    kind = pytest.importorskip(bases.BASES[base].package) and bases.BASES[base].planned
    tiny = make_tensors(cases.parse(*SIZES, "lora8", base, "fp32"), CPU)
    assert tiny.base.kind == kind
    assert planned(replace(case, model="tiny", layer="even"), CPU) == ["called", "called"]


def test_the_report_has_them_apart(tmp_path):
    """The tables of plain layers have no quantised case, and theirs no plain one."""
    pytest.importorskip("bitsandbytes")
    chosen = [cases.SETS["smoke"][2].name, cases.SETS["smoke"][4].name]
    given = ["--case", chosen[0], "--case", chosen[1], "--providers", "bare,dense,called,auto"]
    quick = ["--device", "cpu", "--timer", "host", "--seconds", "0", "--out", str(tmp_path)]
    assert run.main([*given, *quick]) == 0
    (path,) = tmp_path.glob("*.jsonl")
    about = [line.get("base") for line in read(path)[1] if line["kind"] == "case"]
    assert about == [None, "nf4"]
    (device,) = report.load(tmp_path)
    plain, over = report.full_text(device, []).split("### Over a quantised W")
    assert chosen[0] in plain
    assert chosen[1] not in plain
    assert f"| {chosen[1]} |" in over
    assert "| called | absent: is for a quantised W | tiny.wide" in over
    assert f"| {chosen[1]} |" in report.short_text(device, "there", [])
