"""Calibration: what is known of inputs is PEFT's, masks count, and the model is as it was."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

from fused_lowrank import adapt
from fused_lowrank.models.calibration import Covariance, Directions, calibrate

K, R = 24, 4


class Model(nn.Module):
    """Two linear layers, one of which draws and drops."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, K)
        steep = 0.7 ** torch.arange(K)
        self.embed.weight.data *= steep
        self.first, self.last = nn.Linear(K, K), nn.Linear(K, 3)
        self.first.weight.data = torch.eye(K)[torch.randperm(K)] + 0.01 * torch.randn(K, K)
        self.drop, self.unused = nn.Dropout(0.5), nn.Linear(K, K)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
        x = self.drop(self.first(self.embed(input_ids)))
        torch.rand(3)  # whoever draws in a forward
        y: Tensor = self.last(x)
        return y


def batches(count: int = 6, masked: bool = True) -> list[dict[str, Tensor]]:
    """Batches of 5 sequences of 7, of which some elements are padding or not answered."""
    found = []
    for _ in range(count):
        mask = (torch.arange(7) < torch.randint(4, 8, (5, 1))).long()
        ids = torch.randint(0, 50, (5, 7))
        labels = torch.where(torch.arange(7) < 1, -100, ids)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found if masked else [{"input_ids": batch["input_ids"]} for batch in found]


def inputs_of(model: Model, data: list[dict[str, Tensor]]) -> Tensor:
    """The rows of the first layer's inputs that count."""
    rows = []
    for batch in data:
        x = model.embed(batch["input_ids"])
        if "attention_mask" in batch:
            x = x[batch["attention_mask"].bool() & (batch["labels"] != -100)]
        rows.append(x.reshape(-1, K))
    return torch.cat(rows).detach()


def picture(model: nn.Module) -> Any:
    """All that calibration could change."""
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    return (
        [m.training for m in model.modules()],
        hooks,
        {key: str(value.tolist()) for key, value in model.state_dict().items()},
        torch.get_rng_state().tolist(),
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
    )


@pytest.mark.parametrize("masked", [True, False])
def test_directions(masked: bool, device: torch.device) -> None:
    """The principal directions of all rows that count, whatever batches they came in."""
    model, data = Model().to(device), batches(masked=masked)
    rows = inputs_of(model.cpu(), data)
    model.to(device).train()
    model.drop.eval()
    before = picture(model)
    found = calibrate(model, {"first": Directions(R)}, iter(data), progress=False)["first"]
    assert picture(model) == before
    _, sigma, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    right = right[:R] * right[:R].gather(1, right[:R].abs().argmax(1, keepdim=True)).sign()
    assert found.directions is not None
    assert found.strengths is not None
    torch.testing.assert_close(found.strengths.cpu(), sigma[:R], rtol=1e-2, atol=0)
    assert ((found.directions.cpu() * right).sum(1) > 0.999).all()
    assert found.covariance is None


def test_directions_as_peft() -> None:
    """PEFT's EVA, without its redistribution of ranks, has the same directions."""
    model, data = Model(), batches()
    config = LoraConfig(
        r=R,
        target_modules=["first", "last"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=0.9999),
    )
    theirs = get_eva_state_dict(model, data, config, show_progress_bar=False)
    gatherers = {"first": Directions(R), "last": Directions(R)}
    ours = calibrate(model, gatherers, data, progress=False)
    for name, expected in theirs.items():
        directions = ours[name].directions
        assert directions is not None
        cosines = torch.nn.functional.cosine_similarity(directions, expected).abs()
        assert (cosines > 0.99).all(), (name, cosines)


def test_covariance_as_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's CorDA, of sequences that come one at a time, has the same covariance."""
    if importlib.util.find_spec("attr") is None:  # PEFT has a dataclass from it, and no more
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, data = Model(), batches(masked=False)
    config = LoraConfig(
        r=R,
        target_modules=["first"],
        init_lora_weights="corda",
        corda_config=CordaConfig(prune_temporary_fields=False),
    )

    def run() -> None:
        for batch in data:
            for ids in batch["input_ids"]:
                model(ids[None])

    ours = calibrate(model, {"first": Covariance()}, data, progress=False)["first"]
    preprocess_corda(model, config, run_model=run)
    assert ours.covariance is not None
    torch.testing.assert_close(ours.covariance, model.first.covariance_matrix)


def test_covariance_leaves_padding_out() -> None:
    """Rows that are masked out, and sequences of nothing else, are not in it."""
    x, kept = torch.randn(3, 5, K), torch.ones(3, 5, dtype=torch.bool)
    kept[0, 3:], kept[1] = False, False
    padded, alone = Covariance(), Covariance()
    padded.add(x, kept)
    alone.add(x[0, :3], None)
    alone.add(x[2], None)
    assert padded.seen == alone.seen == 2
    a, b = padded.known().covariance, alone.known().covariance
    assert a is not None
    torch.testing.assert_close(a, b)


def test_many_rows_and_few() -> None:
    """A batch of one row, of fewer rows than directions, of more than the spaces are exact for."""
    rows = torch.randn(1500, 600) * torch.arange(1.0, 601) ** -0.5
    for sizes in ([1, 3, 1496], [700, 800]):
        gatherer = Directions(8)
        for part in rows.split(sizes):
            gatherer.add(part, None)
        found = gatherer.known()
        assert found.directions is not None
        assert gatherer.weighted.shape == (64, 600)
        best = torch.linalg.svdvals(rows - rows.mean(0))[:8].square().sum()
        along = ((rows - rows.mean(0)) @ found.directions.t()).square().sum()
        assert along > 0.999 * best
        gram = found.directions @ found.directions.t()
        torch.testing.assert_close(gram, torch.eye(8), rtol=0, atol=1e-4)


def test_directions_that_are_not_there() -> None:
    """Inputs of few directions give so many, and no more."""
    gatherer = Directions(6)
    gatherer.add(torch.randn(50, 2) @ torch.randn(2, K), None)
    directions = gatherer.known().directions
    assert directions is not None
    assert len(directions) == 2


def test_batches_of_every_kind() -> None:
    """Mappings go as keywords, tuples as arguments, others as they are; or as forward_fn says."""
    model, ids = Model(), [batch["input_ids"] for batch in batches(masked=False)]
    asked = lambda model, batch: model(input_ids=batch["x"][0])  # noqa: E731
    results = []
    for data, how in (
        ([{"input_ids": i} for i in ids], None),
        ([(i, None) for i in ids], None),
        (ids, None),
        ([{"x": [i]} for i in ids], asked),
    ):
        found = calibrate(model, {"first": Directions(R)}, data, forward_fn=how, progress=False)
        results.append(found["first"].directions)
    assert all(torch.equal(result, results[0]) for result in results)


def test_adapted_model() -> None:
    """The adapters of a model are disabled meanwhile, and enabled again."""
    model, data = Model(), batches()
    expected = calibrate(model, {"last": Directions(R)}, data, progress=False)["last"]
    adapt(model, "lora", target_modules=["first"], r=2, progress=False)
    nn.init.normal_(model.first.up)
    y = model.eval()(data[0]["input_ids"])
    found = calibrate(model, {"last": Directions(R)}, data, progress=False)["last"]
    assert torch.equal(found.directions, expected.directions)  # type: ignore[arg-type]
    assert torch.equal(model(data[0]["input_ids"]), y)


def wrong(model: nn.Module, data: Any, error: type[Exception], message: str, **more: Any) -> None:
    """An error of this kind and message, after which the model is as it was."""
    model.train()
    before = picture(model)
    with pytest.raises(error, match=message):
        calibrate(model, {"first": Directions(R)}, data, progress=False, **more)
    assert picture(model) == before


def test_refuses() -> None:
    """Data that is none, that the model does not take, that says nothing; errors half way."""
    model, data = Model(), batches()
    wrong(model, data[0], TypeError, r"data is a dict: .*\[batch\]")
    wrong(model, "text", TypeError, "data is a str")
    wrong(model, None, TypeError, "data is a NoneType")
    wrong(model, [], ValueError, "data has no batches")
    wrong(model, [{"x": data[0]["input_ids"]}], TypeError, "give forward_fn=")
    masked = {**data[0], "attention_mask": torch.zeros(5, 7)}
    wrong(model, [masked], ValueError, "no row of first's inputs counts")
    with pytest.raises(ValueError, match=r"unused was not called.*exclude_modules"):
        calibrate(model, {"unused": Covariance()}, data, progress=False)

    def breaks() -> Iterator[Any]:
        yield data[0]
        raise OSError("the disk is full")

    wrong(model, breaks(), OSError, "disk")
    wrong(model, data, ZeroDivisionError, "division", forward_fn=lambda m, b: (m(**b), 1 / 0))
    model.embed.weight.data[:] = float("nan")
    wrong(model, data, ValueError, "input of first holds NaN or Inf")


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """A bar over the batches, on stderr."""
    calibrate(Model(), {"first": Covariance()}, batches())
    assert "calibration" in capsys.readouterr().err
