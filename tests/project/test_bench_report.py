"""The report of the bench, of made-up devices."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import report
from bench.support.store import KEY


def test_the_choice_on_paper_is_held_against_the_fastest_plan():
    device = report.Device({"device": "x"})
    rows = []
    for name, forward, backward in (("aten", 1.2, 1.5), ("first", 1.5, 1.2), ("eager", 1.0, 1.0)):
        relative = {"forward": [forward] * 3, "backward": [backward] * 3, "step": [1.0] * 3}
        rows.append({"provider": name, "status": "ok", "step": [1.0] * 3, "relative": relative})
    line = {"kind": "case", "case": "c", "rows": rows, "planned": ["aten", "aten"]}
    device.add([line, {"kind": "end", "missing": 0}])
    text = report.planner_text(device)
    assert "the fastest in 1 of 2 passes; elsewhere it costs 25.0% in the median" in text
    assert "| c | backward | aten | first | 25.0% |" in text


def made_up(cases: int, of_a_peer: int) -> report.Device:
    """A device on which a peer was measured in one case alone."""
    device = report.Device({**dict.fromkeys(KEY, ""), "device": "My GPU", "code": "0123"})
    lines = []
    for i in range(cases):
        names = ("bare", "auto", "peer") if i == of_a_peer else ("bare", "auto")
        rows = [
            {"provider": n, "status": "ok", "step": [1.0] * 3, "relative": {"step": [1.0] * 3}}
            for n in names
        ]
        lines.append({"kind": "case", "case": f"c{i}", "rows": rows})
    device.add([*lines, {"kind": "end", "missing": 5}])
    return device


@pytest.mark.parametrize(("of_a_peer", "more"), [(3, []), (11, ["c11"])])
def test_the_short_table_has_every_provider(of_a_peer, more):
    shown = report.headline(made_up(20, of_a_peer))
    assert shown == [*(f"c{i}" for i in range(report.HEADLINE)), *more]


def test_a_smaller_run_leaves_what_was_not_reached():
    device = made_up(20, 0)
    device.add([{"kind": "block", "provider": "x", "sequence": 1, "checkpoint": False},
                {"kind": "end", "missing": 0}])  # fmt: skip
    assert device.missing == 5


def test_a_note_is_of_the_code_that_it_names(tmp_path):
    (tmp_path / "my-gpu-0123.md").write_text("Said of it.\n")
    device = made_up(1, 0)
    assert report.note_of(device, tmp_path) == "\nSaid of it.\n"
    assert "Said of it." in report.short_text(device, "there", [], report.note_of(device, tmp_path))
    device.key["code"] = "4567"
    assert report.note_of(device, tmp_path) == ""


def test_a_plan_that_has_gone_is_no_peer():
    assert all(report.is_plan(name) for name in ("aten", "split:of-old", "relay"))
    assert not any(report.is_plan(name) for name in ("gemm:deep", "unsloth", "eager"))
