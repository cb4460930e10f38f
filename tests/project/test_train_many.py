"""The pieces of the example that trains many adapters, on a tiny random encoder."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_lowrank import AdapterBank, adapt

transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def many():
    """The example as a module; it finds its siblings as it does when run as a script."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("train_many", EXAMPLES / "train_many.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["train_many"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture
def encoder(many, monkeypatch):
    """A BERT of three layers in float64, which the example loads in place of the real one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=50, intermediate_size=32, **sizes)
    bert = transformers.BertModel(config, add_pooling_layer=False).eval().double()
    monkeypatch.setattr(many, "load_encoder", lambda folder, device: copy.deepcopy(bert))
    return bert


def texts_of(count: int, seed: int) -> dict[int, list[int]]:
    """Token ids of 3 to 12 tokens."""
    rng = np.random.default_rng(seed)
    return {i: rng.integers(0, 50, rng.integers(3, 13)).tolist() for i in range(count)}


def test_split_encoder(many, encoder):
    """The upper layers on the lower ones' hidden states are the whole encoder."""
    lower, upper = many.split_encoder(Path(), "cpu")
    texts = texts_of(70, 0)
    hidden = many.hidden_states(lower, texts, "texts")
    got = many.embed(upper, [hidden[i] for i in texts])
    for row, text in zip(got, texts.values(), strict=True):
        states = encoder(input_ids=torch.tensor([text])).last_hidden_state
        expected = torch.nn.functional.normalize(states[0].mean(0), dim=-1)
        torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-9)


def test_packages_and_batches(many):
    """The largest packages, with no pair on both sides, nor twice in a pass."""
    sizes = {"big": 60, "middle": 40, "small": many.HELD_OUT + many.PAIRS}
    pairs = [many.Pair(name, f"{name} {i}", "") for name, n in sizes.items() for i in range(n)]
    found = many.choose_packages(pairs, 5)
    assert list(found) == ["big", "middle"]
    assert list(many.choose_packages(pairs, 1)) == ["big"]
    for name, (training, held_out) in found.items():
        assert len(held_out) == many.HELD_OUT
        assert len(training) == min(many.TRAINING, sizes[name] - many.HELD_OUT)
        assert not set(training) & set(held_out)
        assert {pairs[i].module for i in (*training, *held_out)} == {name}
    adapters = many.make_adapters(found, seeds=2, steps=5)
    assert [a.name for a in adapters] == ["big/0", "big/1", "middle/0", "middle/1"]
    for adapter in adapters:
        assert [len(batch) for batch in adapter.batches] == [many.PAIRS] * 5
        assert set(np.concatenate(adapter.batches)) <= set(adapter.training)
        assert len(set(np.concatenate(adapter.batches))) == 5 * many.PAIRS
    with pytest.raises(SystemExit, match="documented functions"):
        many.choose_packages(pairs[-5:], 1)


def test_cut(many):
    assert many.cut([1, 2, 3], 3) == [1, 2, 3]
    assert many.cut([1, 2, 3, 4], 3) == [1, 2, 4]


def test_together_is_alone(many, encoder, monkeypatch):
    """Both ways to train give the same adapters, and the bank has them when it is searched."""
    monkeypatch.setattr(many, "GROUP", 2)
    monkeypatch.setattr(many, "HELD_OUT", 4)
    steps, pairs = 3, [many.Pair("ab"[i % 2], str(i), "") for i in range(40)]
    adapters = many.make_adapters(many.choose_packages(pairs, 2), seeds=2, steps=steps)
    lower, model = many.split_encoder(Path(), "cpu")
    texts = tuple(many.hidden_states(lower, texts_of(40, seed), "") for seed in (1, 2))
    targets = r".*(query|key|value|dense)"
    adapt(model, "lora_xs", target_modules=targets, r=4, progress=False).eval()
    starts = [many.fresh_cores(model, seed) for seed in range(4)]
    alone = []
    for adapter, start in zip(adapters, starts, strict=True):
        model.load_state_dict(start, strict=False)
        many.train_alone(model, adapter, texts, steps)
        alone.append(many.cores_of(model))
    bank = AdapterBank.from_model(model, slots=5)
    for adapter, start in zip(adapters, starts, strict=True):
        bank.add(adapter.name, start)
    _, trained = many.train_together(model, bank, adapters, texts, steps)
    for i, cores in enumerate(alone):
        difference = many.compare({name: core[i] for name, core in trained.items()}, cores)
        assert difference["relative"] < 1e-9  # rounding, of which Adam may make larger steps
        assert all(core.abs().max() > many.LEARNING_RATE / 2 for core in cores.values())
        assert len(adapters[i].losses) == steps
    many.evaluate(model, bank, adapters, texts)
    for adapter, cores in zip(adapters, alone, strict=True):
        with bank.use([adapter.name] * 4):
            (personal,) = many.reciprocal_ranks(model, texts, [adapter])
        assert adapter.personal == personal
        model.load_state_dict(cores, strict=False)
        assert adapter.personal == pytest.approx(many.reciprocal_ranks(model, texts, [adapter])[0])
        with bank.use(None):
            assert adapter.frozen == pytest.approx(
                many.reciprocal_ranks(model, texts, [adapter])[0]
            )
