"""The example that compares the family of methods, on a tiny random encoder and made-up results."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fused_lowrank.methods import METHODS

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENS, SIZE = 500, 72


@pytest.fixture(scope="module")
def family():
    """The example as a module; it finds its siblings as it does when run as a script."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("family")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def results(family):
    """What makes the table."""
    return sys.modules["family_results"]


@pytest.fixture(scope="module")
def every(family):
    """All ways to train."""
    return family.variants()


@pytest.fixture(scope="module")
def task(family):
    """Three steps of two layers, wide enough for LoRA-Mini's 64, on random hidden states."""
    torch.manual_seed(0)
    sizes = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=50, intermediate_size=80, **sizes)
    layers = transformers.BertModel(config, add_pooling_layer=False).eval()
    layers.embeddings = torch.nn.Identity()
    rng = np.random.default_rng(0)

    def texts() -> list[list[int]]:
        return [rng.integers(0, TOKENS, rng.integers(8, 14)).tolist() for _ in range(60)]

    return family.Task(
        layers=layers.requires_grad_(False),
        table=torch.randn(TOKENS, SIZE),
        queries=texts(),
        codes=texts(),
        batches={seed: family.make_batches(40, 3, 8, seed) for seed in family.SEEDS},
        validation=list(range(40, 50)),
        held_out=list(range(50, 60)),
        setup={},
    )


@pytest.fixture(scope="module")
def runs(family, task, every):
    """A run of each way to train, one after the other."""
    return {variant.name: family.run(task, variant, 0, 0) for variant in every}


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two runs are one but for the time that they took."""
    return all(one[key] == two[key] for key in one if "seconds" not in key)


def test_every_method_init_and_factor_is_there(every):
    methods = {variant.method for variant in every}
    assert methods == {*METHODS, "dora", None}
    for method in ("lora_xs", "lora_mini"):
        inits = METHODS[method][1].row.inits_known
        own = {v.options.get("init", inits[0]) for v in every if v.method == method}
        assert own == {*inits}
    trained = {v.options["train"] for v in every if "train" in v.options}
    assert {name for names in trained for name in names} == {*METHODS["lora_mini"][1].row.factors}
    names = [variant.name for variant in every]
    assert len({*names}) == len(names)
    assert {variant.against for variant in every} <= {*names}


def test_every_way_trains(runs, every):
    """What each trains is of the size that it says, and a step moves it."""
    frozen = runs["frozen encoder"]
    for variant in every:
        line = runs[variant.name]
        assert np.isfinite(line["losses"]).all()
        assert json.loads(json.dumps(line))["ranks"] == line["ranks"]
        if variant.name != "frozen encoder":
            assert line["trained"] > 0
            assert len(line["losses"]) == 3
            assert abs(line["loss"] - frozen["loss"]) > 1e-6, variant.name
    assert frozen["trained"] == 0
    assert (
        runs["LoRA-FA"]["trained"] < runs["LoRA"]["trained"] < runs["all of the layers"]["trained"]
    )
    both, one = (runs[f"LoRA-Mini{more}"]["trained"] for more in ("", ", train b_train"))
    assert one == both // 2


@pytest.mark.parametrize("name", ["all of the layers", "AdaLoRA", "LoRA-Mini, eva", "NOLA"])
def test_no_run_knows_of_another(family, task, runs, every, name):
    """The same numbers whatever ran before."""
    variant = next(v for v in every if v.name == name)
    assert same(family.run(task, variant, 0, 0), runs[name])


def test_seed_and_rate_count(family, task, runs, every):
    variant = next(v for v in every if v.name == "VeRA")
    for power, seed in ((0, 1), (1, 0)):
        line = family.run(task, variant, power, seed)
        assert line["losses"] != runs["VeRA"]["losses"]
        assert line["lr"] == pytest.approx(runs["VeRA"]["lr"] * 3**power)


@pytest.mark.parametrize("name", ["VeRA", "NOLA"])
def test_random_bases_are_of_the_seed(family, task, every, name):
    """Those that a keyword of the method draws differ between the seeds as well."""
    variant = next(v for v in every if v.name == name)
    models = [family.make(task.fresh(), variant, seed, ()) for seed in (0, 1, 1)]
    bases = [
        next(p for n, p in model.named_parameters() if n.endswith(("down", "down_bases")))
        for model in models
    ]
    assert torch.equal(bases[1], bases[2])
    assert not torch.equal(bases[0], bases[1])


def test_hidden_states_by_number(family, task):
    """Texts as numbers of hidden states are embedded as the hidden states themselves."""
    many, search = sys.modules["train_many"], sys.modules["code_search"]
    upper = task.fresh()
    hidden = {i: torch.randn(3 + i % 5, SIZE) for i in (0, 2, 5, 6)}
    texts = family.numbered(hidden, 7, start=4)
    assert [len(text) for text in texts] == [3, 0, 5, 0, 0, 3, 4]
    upper.embeddings = family.Known(torch.cat([torch.randn(4, SIZE), *hidden.values()]))
    got = search.embed(upper, [text for text in texts if text])
    upper.embeddings = many.Given()
    torch.testing.assert_close(got, many.embed(upper, [*hidden.values()]))


def test_no_module_on_two_sides(family):
    pair = sys.modules["code_search_data"].Pair
    pairs = [pair(f"module{i % 90}", f"query {i}", f"code {i}") for i in range(900)]
    sides = family.split(pairs)
    modules = [{p.module for p in side} for side in sides]
    assert all(modules)
    assert not modules[0] & modules[1] | modules[0] & modules[2] | modules[1] & modules[2]


# ----------------------------------------------------------------------------- which run is next


def searched(family, every, best: dict[str, int]) -> list[dict[str, Any]]:
    """All runs in their order, where the validation loss is least at a power by name."""
    done: list[dict[str, Any]] = []
    while (wanted := family.next_run(done, every)) is not None:
        variant, power, seed = wanted
        loss = abs(power - best.get(variant.name, 0)) / 10
        done.append(
            {"variant": variant.name, "power": power, "seed": seed, "validation_loss": loss}
        )
        assert len(done) < 1000
    return done


def test_the_order_of_runs(family, every):
    """The first seed of all before any other, and no run twice."""
    done = searched(family, every, {"LoRA": 2, "VeRA": -1})
    keys = [(line["variant"], line["power"], line["seed"]) for line in done]
    assert len({*keys}) == len(keys)
    assert [line["seed"] for line in done] == sorted(line["seed"] for line in done)
    assert [line["power"] for line in done[: len(every)]] == [0] * len(every)
    assert [power for name, power, _ in keys if name == "frozen encoder"] == [0]
    for name, powers in (("LoRA", [0, 1, 2, 3, 2, 2]), ("VeRA", [0, 1, -1, -2, -1, -1])):
        assert [power for own, power, _ in keys if own == name] == powers
    assert [power for own, power, _ in keys if own == "NOLA"] == [0, 1, -1, 0, 0]


def test_the_search_stays_within_its_limits(family, every):
    done = searched(family, every, {"LoRA": 9})
    powers = [line["power"] for line in done if line["variant"] == "LoRA"]
    assert powers == [0, 1, 2, 3, 4, 5, 5, 5]


def test_a_cut_off_line_is_made_again(family, tmp_path):
    path = tmp_path / "family.jsonl"
    assert family.read_lines(path, {"steps": 3}) == []
    line = json.dumps({"variant": "LoRA", "setup": {"steps": 3}}) + "\n"
    path.write_text(2 * line + line[:20])
    assert len(family.read_lines(path, {"steps": 3})) == 2
    assert path.read_text() == 2 * line
    with pytest.raises(SystemExit, match="another task"):
        family.read_lines(path, {"steps": 4})
    assert path.read_text() == 2 * line


# ---------------------------------------------------------------------------------- the results


def line_of(name: str, seed: int, ranks: list[int], **more: Any) -> dict[str, Any]:
    """A line of the results."""
    setup = {"held_out_pairs": len(ranks), "steps": 3, "batch": 8, "layers": 2}
    mrr = float(np.mean(1 / np.array(ranks)))
    own = {"variant": name, "seed": seed, "power": 0, "lr": 1e-3, "trained": 5, "ranks": ranks}
    own |= {"mrr": mrr, "loss": 2 - mrr, "validation_loss": 1.0, "processor_seconds": 3600.0}
    return {**own, "setup": setup, "machine": {"cpu": "some CPU"}, **more}


@pytest.fixture
def made(results):
    """LoRA is better than frozen in all seeds and queries, VeRA is as LoRA but for one seed."""
    good = [1, 2, 4, 4] * 20
    lines = [line_of("frozen encoder", 0, [4, 5, 5, 5] * 20, trained=0)]
    lines += [line_of("LoRA", seed, good) for seed in range(3)]
    lines += [line_of("LoRA", 0, [9] * 80, power=1, validation_loss=2.0)]
    lines += [line_of("VeRA", seed, good if seed else [2, 2, 4, 4] * 20) for seed in range(3)]
    return lines


def test_differences(results, every, made):
    rows = results.make_rows(made, every)
    assert [*rows] == ["frozen encoder", "LoRA", "VeRA"]
    assert rows["LoRA"].mrr == {seed: pytest.approx(0.5) for seed in range(3)}
    gain = results.difference(rows["LoRA"], rows, "frozen encoder")
    assert gain.mrr == (pytest.approx(0.2875), pytest.approx(0, abs=1e-9))
    assert gain.verdict == "better"
    assert results.difference(rows["LoRA"], rows, "LoRA") is None
    other = results.difference(rows["VeRA"], rows, "LoRA")
    assert other.mrr[0] == pytest.approx(-0.125 / 3)
    assert other.mrr[1] == pytest.approx(4.303 * 0.125 / 3, rel=1e-3)  # of a deviation 0.125/√3
    assert other.loss[0] == pytest.approx(0.125 / 3)
    assert other.queries[2] < 0
    assert other.verdict == "not told apart"  # one seed is not enough, whatever the queries say


def test_differences_are_of_the_seeds_that_both_have(results, every, made):
    """Of two seeds and of one, and not of LoRA's third, which is another."""
    made[3] = line_of("LoRA", 2, [9] * 80)
    rows = results.make_rows(made[:-1], every)
    other = results.difference(rows["VeRA"], rows, "LoRA")
    assert other.mrr[0] == pytest.approx(other.queries[0]) == pytest.approx(-0.125 / 2)
    rows = results.make_rows(made[:-2], every)
    other = results.difference(rows["VeRA"], rows, "LoRA")
    assert other.mrr[0] == pytest.approx(other.queries[0]) == pytest.approx(-0.125)


def test_worse_is_worse(results, every, made):
    made += [line_of("NOLA", seed, [3, 5, 5, 5 + seed] * 20) for seed in range(3)]
    rows = results.make_rows(made, every)
    assert results.difference(rows["NOLA"], rows, "LoRA").verdict == "worse"
    apart = results.difference(rows["NOLA"], rows, "frozen encoder")
    assert apart.mrr[0] > 0


def test_files_of_results(results, every, made, tmp_path):
    pytest.importorskip("matplotlib")
    text = results.write_results(made[:-1], every, tmp_path)
    assert (tmp_path / "family.md").read_text() == text
    assert (tmp_path / "family.png").stat().st_size > 10_000
    assert "| LoRA | 5 | 1.0e-03 | 0.500 ± 0.000 | 1.500 ± 0.000 | +0.287 ± 0.000 [" in text
    assert "| VeRA (2 of 3 seeds) |" in text
    assert "7 runs" in text


def test_a_star_is_at_what_the_seeds_agree_in(results, every, made):
    """VeRA's loss is LoRA's in two seeds of three, NOLA's is higher in all."""
    made += [line_of("NOLA", seed, [3, 5, 5, 5 + seed] * 20) for seed in range(3)]
    stars = {
        line.split("|")[1].strip(): line.split("|")[-3].strip().endswith("*")
        for line in results.make_table(made, every).splitlines()
        if line.startswith("| ")
    }
    assert stars["NOLA"]
    assert not stars["VeRA"]
    assert not stars["LoRA"]


def test_the_tables_are_those_of_the_runs(results, every):
    """What is committed beside the runs is made of them."""
    folder = EXAMPLES / "results"
    lines = [json.loads(line) for line in (folder / "family.jsonl").read_text().splitlines()]
    assert (folder / "family.md").read_text() == results.make_table(lines, every)
