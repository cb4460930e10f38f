"""The benchmark of mixed batches refuses wrong results, and its figures reach the report."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import bank, bank_stack, report
from bench.support import bank_report, harness, tables, timers
from bench.support.bank_cases import BANK_SETS, BankCase, make_batch, select
from bench.support.bank_providers import BANK_PROVIDERS, BankProvider, gather_cores, no_peft
from bench.support.store import BANK_PREFIX, Store, make_key

CPU = torch.device("cpu")
CASE = BankCase("tiny", 24, 5, 40)
QUICK = harness.Settings(seconds=0.0, min_reps=5, max_reps=5)


def one_row_wrong(batch):
    """Right but for one row, which gets its neighbour's adapter."""
    ids = batch.ids.clone()
    ids[7] = (ids[7] + 1) % batch.case.distinct
    return gather_cores(replace(batch, ids=ids))


def refused(batch):
    """The bank by handles of which one is of no adapter, where it is checked late."""
    handles = batch.bank.handles(batch.names)
    handles[3] = 1 << 40

    def call(x):
        with batch.bank.use(handles):
            return batch.model(x)

    return call


@pytest.fixture(scope="module")
def rows() -> dict:
    fakes = [BankProvider(f.__name__, "method", f) for f in (one_row_wrong, refused)]
    several = [*BANK_PROVIDERS.values(), *fakes]
    measured = bank.measure_case(CASE, several, timers.ColdTimer(CPU), CPU, QUICK)
    return {row["provider"]: row for row in measured}


def test_every_provider_is_measured_or_says_why_not(rows):
    for name, row in rows.items():
        if name in ("one_row_wrong", "refused"):
            continue
        if row["status"] == "ok":
            low, middle, high = row["relative"]["forward"]
            assert 0 < low <= middle <= high
            assert set(row) == {
                "provider",
                "status",
                "error",
                "reps",
                "host",
                "forward",
                "relative",
            }
        else:
            assert row["status"] == "absent"
            assert row["why"]
    there = {name for name, row in rows.items() if row["status"] == "ok"}
    ours = {"bank", "bank:layer", "bank:invariant", "aten"}
    assert {"bare", *ours, "gather-cores", "gather-lora"} <= there
    assert rows["bare"]["relative"]["forward"] == [1.0] * 3


def test_a_row_with_another_adapter_is_wrong(rows):
    assert rows["one_row_wrong"]["status"] == "wrong"
    assert rows["refused"]["status"] == "error"
    assert "a handle was not of this bank" in rows["refused"]["why"]


def test_the_adapters_of_a_batch():
    batch = make_batch(CASE, CPU)
    assert len(set(batch.names)) == CASE.distinct
    assert len(batch.bank) == CASE.resident
    table = batch.bank.store.tables["0"].left
    for row, name in enumerate(batch.names):
        assert torch.equal(table[int(name)], batch.cores[batch.ids[row]])


def test_the_two_equations_agree_where_they_are_the_same():
    """A core for each row is plain LoRA with A = core·down, up to its own rounding."""
    batch = make_batch(CASE, CPU)
    a = batch.cores.double().mT @ batch.down.double()
    batch._pairs = [a, batch.up.double().expand(CASE.distinct, -1, -1)]
    method, lora = (
        bank.equation(batch, kind, torch.Tensor.double, 0.5) for kind in ("method", "lora")
    )
    torch.testing.assert_close(method, lora)
    assert not torch.allclose(method, bank.equation(batch, "bare", torch.Tensor.double, 0.5))


def test_sizes_of_the_sets():
    for chosen in BANK_SETS.values():
        assert len({case.name for case in chosen}) == len(chosen)
        assert all(case.distinct <= min(case.rows, case.resident) for case in chosen)
    assert all(case.distinct <= case.resident for case in select("gpu", shrink=64))
    assert len(BANK_SETS["gpu"]) < 30


def test_what_would_not_fit_says_so():
    many = BankCase("llama-3.1-8b", 8192, 8192, 100_000)
    assert "not waited for" in (no_peft(many, CPU) or "")


def measure(folder: Path, *more: str) -> int:
    return bank.main(["--device", "cpu", "--seconds", "0", "--out", str(folder), *more])


def test_files_are_resumed_and_reported_apart_from_those_of_layers(tmp_path, capsys):
    case = BANK_SETS["smoke"][0]
    assert measure(tmp_path, "--case", case.name) == 0
    assert measure(tmp_path, "--resume", "--minutes", "0") == 1
    more = BankCase("tiny", case.rows, case.distinct, 100)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(BANK_PREFIX)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["header", "case", "end", "end"]

    store = Store.resume(tmp_path, make_key(CPU), BANK_PREFIX)
    assert store is not None
    store.add(bank.case_line(more, lines[1]["rows"], 1.0))
    store.end(0)
    key = make_key(CPU)
    assert Store.resume(tmp_path, key) is None  # those of layers are others
    layers = Store.new(tmp_path, {**key, "code": "0123456789ab"})  # of other code: no matter
    part = {name: [1.0] * 3 for name in harness.PARTS}
    row = {"provider": "bare", "status": "ok", "peak": 1, "saved": 1, "error": {"ratio": 1.0}}
    about = {"series": "c", "m": 1, "k": 1, "n": 1, "p": 1, "dtype": "fp32"}
    row |= {**part, "relative": part}
    layers.add({"kind": "case", "case": "c", **about, "planned": ["auto"] * 2, "rows": [row]})
    layers.end(0)

    (device,) = tables.load(tmp_path, tables.BANK_PREFIX)
    text = bank_report.full_text(device)
    assert f"| {case.name} | " in text
    assert f"| {case.group} | 100 |" in text
    assert f"| {case.group} | 1,000 |" in text
    assert "needs a GPU" in text

    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}")
    arguments = ["--results", str(tmp_path), "--readme", str(readme)]
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    assert f"| {case.name} | " in readme.read_text()
    assert "## Many adapters" in (tmp_path / "RESULTS.md").read_text()
    lines[1]["rows"][1]["relative"]["forward"] = [7.77] * 3
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    assert report.main([*arguments, "--check"]) == 1


def test_an_excess_is_a_multiple_of_ours():
    device = tables.Device({"device": "x"})
    rows = [
        {"provider": name, "status": "ok", "forward": [1.0] * 3, "relative": {"forward": [v] * 3}}
        for name, v in (("bank", 1.1), ("peft-loop", 1.6), ("gather-cores", 1.2))
    ]
    device.add([{"kind": "case", "case": "c", "rows": rows}, {"kind": "end", "missing": 0}])
    assert bank_report.excess(device, "c", "peft-loop") == "6.0"
    assert bank_report.excess(device, "c", "gather-cores") == "2.0"


def test_unknown_names_are_refused_with_the_known_ones(tmp_path, capsys):
    assert measure(tmp_path, "--set", "nope") == 2
    assert "known: smoke, cpu, gpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_stack_of_projections(tmp_path, monkeypatch):
    monkeypatch.setattr(bank_stack, "LAYERS", 1)
    arguments = ["--device", "cpu", "--shrink", "128", "--rounds", "2", "--out", str(tmp_path)]
    assert bank_stack.main(arguments) == 0
    (path,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["header", *["case"] * 4, "end"]
    assert lines[1]["case"] == "7 projections of llama-3.1-8b/m1/d1/of7812/fp32"
    (device,) = tables.load(tmp_path, tables.BANK_PREFIX)
    assert f"| {lines[4]['case']} | " in bank_report.full_text(device)
    stack = bank_stack.make_stack(CPU, 300, 128)
    timer = timers.TIMERS["host"](CPU)
    assert bank_stack.measure(stack, 16, timer, 2)["resident"] == 300
    stack.bank.store.tables["6"].left.data.mul_(1.01)
    with pytest.raises(harness.WrongResult):
        bank_stack.measure(stack, 16, timer, 2)


def test_a_stack_is_as_large_as_the_memory(monkeypatch):
    monkeypatch.setattr(bank_stack, "memory", lambda device: 4 << 20)
    assert 0 < len(bank_stack.make_stack(CPU, 300, 128).layers) < 224
