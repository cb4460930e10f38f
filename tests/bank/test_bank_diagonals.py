"""A bank whose cores are diagonals, tables (slots, r), against one of the same as matrices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bank_cases import D, bank_of, close, model_of, x_of
from torch import nn

from fused_lowrank import AdapterBank, explain

NAMES = "abc"


def diagonal_model(seed: int | None = None) -> Any:
    """`model_of("cores")` with diagonals of its layers' cores in their place."""
    model = model_of("cores", seed)
    for layer in (model.first, model.second):
        layer.core = nn.Parameter(layer.core.detach().diagonal().clone())
    return model


def diagonal_bank() -> tuple[Any, AdapterBank]:
    """(model, bank), with adapters "a" from a model, "b" from a state_dict, and "c"."""
    model = diagonal_model()
    bank = AdapterBank.from_model(model, slots=4)
    bank.add("a", diagonal_model(1))
    bank.add("b", diagonal_model(2).state_dict())
    bank.add("c", diagonal_model(3))
    return model, bank


def matrix_bank(like: AdapterBank) -> tuple[Any, AdapterBank]:
    """The same adapters as matrices."""
    model, bank = bank_of("cores", names=NAMES)
    for layer, table in bank.store.tables.items():
        ours = like.store.tables[layer]
        for name in NAMES:
            slot, there = bank.store._slots[name], like.store._slots[name]
            table.left.data[slot] = torch.diag(ours.left[there])
            table.scales.data[slot] = ours.scales[there]
    return model, bank


def test_tables_of_diagonals() -> None:
    """They are r numbers to an adapter; a fresh one is as the layer starts it."""
    _, bank = diagonal_bank()
    assert {table.left.shape for table in bank.store.tables.values()} == {(4, 4)}
    bank.add("fresh")
    slot = bank.store._slots["fresh"]
    assert all(table.left[slot].any() for table in bank.store.tables.values())
    assert (
        bank.store.tables["first"]
        .left[bank.store._slots["b"]]
        .equal(diagonal_model(2).first.core.detach())
    )


@pytest.mark.parametrize("impl", ["auto", "aten", "triton", "reference"])
@pytest.mark.parametrize(
    "names", ["b", ["a", None, "c", "a", "b"], [["a", "b"], [None, "c"]]], ids=str
)
def test_calls_are_those_of_matrices(names: Any, impl: str) -> None:
    """Of one adapter, a mixed batch, and mixtures; y and dx."""
    results = []
    (ours, bank), x = diagonal_bank(), x_of(2 if isinstance(names[0], list) else 5, 3)
    for model, held in ((ours, bank), matrix_bank(bank)):
        for layer in (model.first, model.second):
            layer.impl = impl
        own = x.clone().requires_grad_()
        with held.use(names):
            y = model(own)
        results.append((y, *torch.autograd.grad(y.square().sum(), own)))
        held.check()
    for mine, expected in zip(*results, strict=True):
        close(mine, expected)


@pytest.mark.parametrize("impl", ["aten", "triton"])
def test_training_is_that_of_matrices(impl: str) -> None:
    """Gradients, their norms and what is committed are the diagonals of those of matrices."""
    lines, results = ["a", "b", None, "a"], []
    (ours, bank), x = diagonal_bank(), x_of(4, 3)
    for model, held in ((ours, bank), matrix_bank(bank)):
        for layer in (model.first, model.second):
            layer.impl = impl
        trainable = held.trainable(["b", "a"])
        with trainable.use(lines):
            trainable.loss(model(x).square().mean((1, 2))).backward()
        for parameter in trainable.parameters():
            if parameter.dim() == 3:  # of a matrix only its diagonal is trained beside ours
                parameter.grad.mul_(torch.eye(4))
        norms = trainable.clip_grad_norm_(1e-3)
        with torch.no_grad():
            for parameter in trainable.parameters():
                parameter.sub_(parameter.grad)
        trainable.commit()
        results.append((norms, held))
        trainable.close()
    (norms, held), (matrix_norms, matrices) = results
    assert norms.shape == (2,)
    close(norms, matrix_norms)
    for layer, table in held.store.tables.items():
        for name in NAMES:
            mine = table.left[held.store._slots[name]]
            other = matrices.store.tables[layer].left[matrices.store._slots[name]]
            close(torch.diag(mine), other)


def test_a_file_of_diagonals(tmp_path: Path) -> None:
    """It holds (adapters, r) of each layer; a bank of matrices does not take it."""
    model, bank = diagonal_bank()
    bank.save(tmp_path / "bank.safetensors")
    other = diagonal_model()
    loaded = AdapterBank.from_model(other, slots=3)
    loaded.load(tmp_path / "bank.safetensors", progress=False)
    x = x_of(3, 2)
    with bank.use(list(NAMES)), loaded.use(list(NAMES)):
        assert torch.equal(model(x), other(x))
    matrices = AdapterBank.from_model(model_of("cores"), slots=3)
    with pytest.raises(ValueError, match="the core of first is damaged"):
        matrices.load(tmp_path / "bank.safetensors", progress=False)
    assert not matrices.names


def test_a_matrix_is_no_diagonal() -> None:
    """It is refused, and nothing is put in."""
    _, bank = diagonal_bank()
    with pytest.raises(ValueError, match=r"the core of first is \(4, 4\) there and .*\(4,\) here"):
        bank.add("d", model_of("cores", 4))
    assert bank.names == list(NAMES)


def test_explain_of_a_bank_of_diagonals() -> None:
    """It is the problem that a call poses."""
    model, _ = diagonal_bank()
    model.first.impl = "triton"
    assert all(one.problem.diagonal for one in explain(model.first, 300).passes)
    assert explain(model.first, 300).passes[0].problem.k == D
