"""The example over an nf4 base, on a tiny random encoder, and its committed results."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
for package in ("bitsandbytes", "accelerate", "tqdm"):
    pytest.importorskip(package)
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def qlora() -> Any:
    """The example as a module; it finds its siblings as it does when run as a script."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("qlora")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def lines(qlora: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All runs of one seed: two steps of one layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=90, intermediate_size=128, **sizes)
    folder = tmp_path_factory.mktemp("encoder")
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    rng = np.random.default_rng(0)

    def texts() -> list[list[int]]:
        return [rng.integers(1, 90, rng.integers(6, 12)).tolist() for _ in range(30)]

    setup = {"held_out_pairs": 10, "steps": 2, "batch": 8}
    batches = {0: qlora.make_batches(20, 2, 8, 0)}
    task = qlora.Task(folder, "cpu", texts(), texts(), batches, range(20, 30), setup)
    machine = {"cpu": "some CPU", "threads": "1", "torch": "0", "bitsandbytes": "0", "commit": "0"}
    runs = [run for run in qlora.wanted_runs() if run[2] == 0]
    return [{**qlora.run(task, *run), "setup": setup, "machine": machine} for run in runs]


def test_runs(lines: list[dict[str, Any]]) -> None:
    """Each method trains over both bases, of which nf4 is a quarter, and moves its results."""
    found = {(line["base"], line["method"]): line for line in lines}
    assert len(found) == len(lines) == 8
    for (base, method), line in found.items():
        assert json.loads(json.dumps(line)) == line
        frozen, other = found[base, "frozen"], found["bf16", method]
        assert line["linear_bytes"] == frozen["linear_bytes"]
        ratio = line["linear_bytes"] / other["linear_bytes"]
        assert 0.25 < ratio < 0.3 if base == "nf4" else ratio == 1
        if base == "nf4":
            assert line["loss"] != other["loss"]
            gone = other["linear_bytes"] - line["linear_bytes"]
            assert other["model_bytes"] - line["model_bytes"] == gone
            assert line["saved_bytes"] <= other["saved_bytes"]  # nothing of W
        if method != "frozen":
            assert len(line["losses"]) == 2
            assert np.isfinite(line["losses"]).all()
            assert line["loss"] != frozen["loss"]
            assert line["peak_bytes"] > 0.5 * line["saved_bytes"] > 0


def test_results(qlora: Any, lines: list[dict[str, Any]], tmp_path: Path) -> None:
    """The files that a run writes."""
    pytest.importorskip("matplotlib")
    text = sys.modules["qlora_results"].write_results(lines, tmp_path)
    assert (tmp_path / "qlora.md").read_text() == text
    assert (tmp_path / "qlora.png").stat().st_size > 10_000


def test_the_tables_are_those_of_the_runs(qlora: Any) -> None:
    """What is committed beside the runs is made of them."""
    folder = EXAMPLES / "results"
    runs = [json.loads(line) for line in (folder / "qlora.jsonl").read_text().splitlines()]
    assert (folder / "qlora.md").read_text() == sys.modules["qlora_results"].make_table(runs)
