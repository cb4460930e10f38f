"""Adapters in common batches: each one's gradient is what it would be alone; and `commit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bank_cases import bank_of, kinds
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from training_cases import (
    NAMES,
    Setting,
    inputs,
    losses_of,
    methods,
    rows_of,
    setting,
)

from fused_lowrank.bank.training import Trainable

LINES = ["cat", "ann", None, "ann", "dan", "cat", "ann", "eve"]  # ben is not there


def gradients(trainable: Trainable) -> dict[str, Tensor]:
    """Each Parameter's gradient, and none left behind."""
    found = {}
    for name, parameter in trainable.named_parameters():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad, None
    return found


def batch(s: Setting, x: Tensor, call: Callable | None = None) -> dict[str, Tensor]:
    """The gradients of one batch of `LINES`."""
    with s.trainable.use(LINES):
        losses = losses_of((call or s.model)(x))
    s.trainable.loss(losses).backward()
    return gradients(s.trainable)


@pytest.fixture
def s(device: torch.device) -> Iterator[Setting]:
    """LoRA-XS in fp64."""
    made = setting("lora_xs", device)
    yield made
    made.trainable.close()


WAYS = {"aten": (True, False), "reference": (False, False), "compiled": (True, True)}
ways = pytest.mark.parametrize("way", WAYS)


def made_by(way: str, method: str, device: torch.device) -> tuple[Setting, Callable]:
    fused, compiled = WAYS[way]
    made = setting(method, device, fused=fused)
    if not compiled:
        return made, made.model
    torch._dynamo.reset()
    return made, torch.compile(made.model, fullgraph=True, backend="aot_eager")


# --- gradients ---


@methods
@ways
def test_gradients_are_those_of_each_alone(method: str, way: str, device: torch.device) -> None:
    """Of any number of rows, among others in any order, under the mean over its own."""
    s, call = made_by(way, method, device)
    x = inputs(len(LINES), device)
    got = batch(s, x, call)
    for i, name in enumerate(NAMES):
        own = rows_of(name, LINES)
        if not own:
            assert all(not grad[i].any() for grad in got.values())
            continue
        model = s.alone(name)
        losses_of(model(x[own])).mean().backward()
        for layer, parameter in model.named_parameters():
            if layer in got:
                torch.testing.assert_close(got[layer][i], parameter.grad, rtol=1e-11, atol=1e-14)
    own_cores = [p for p in s.model.parameters() if p.requires_grad]
    assert len(own_cores) == len(got)
    assert all(p.grad is None or not p.grad.any() for p in own_cores)


@methods
@ways
@pytest.mark.parametrize("other", ["nan", "inf", "changed"])
def test_isolation(method: str, way: str, other: str, device: torch.device) -> None:
    """What an adapter's or nobody's rows are does not show in another's gradient, bit for bit."""
    s, call = made_by(way, method, device)
    x = inputs(len(LINES), device)
    before = batch(s, x, call)
    value = {"nan": torch.nan, "inf": torch.inf, "changed": 3.0}[other]
    for line in (2, 3):  # nobody's, ann's
        x[line, 1] = value
    after = batch(s, x, call)
    for layer, grad in before.items():
        assert not torch.equal(after[layer][0], grad[0])
        assert torch.equal(after[layer][1:], grad[1:])


@methods
def test_nan_in_one_loss(method: str, device: torch.device) -> None:
    """A NaN loss, with a NaN gradient, is its adapter's own affair; None's is nobody's."""
    s = setting(method, device)
    x = inputs(len(LINES), device)
    before = batch(s, x)

    def poisoned(line: int) -> dict[str, Tensor]:
        with s.trainable.use(LINES):
            losses = losses_of(s.model(x))
        factor = torch.ones_like(losses)
        factor[line] = torch.nan
        loss = s.trainable.loss(losses * factor)
        assert bool(loss.isfinite()) is (LINES[line] is None)
        loss.backward()
        return gradients(s.trainable)

    for layer, grad in poisoned(4).items():  # dan's
        assert torch.equal(grad.isnan().flatten(1).any(1), torch.arange(5, device=device) == 3)
        others = [0, 1, 2, 4]
        assert torch.equal(grad[others], before[layer][others])
    for layer, grad in poisoned(2).items():
        assert torch.equal(grad, before[layer])


def test_compiled_before_training(device: torch.device) -> None:
    """A graph from before the training serves it, and the next one."""
    s = setting("lora_xs", device)
    s.trainable.close()
    torch._dynamo.reset()
    call = torch.compile(s.model, fullgraph=True, backend="aot_eager")
    x = inputs(len(LINES), device)
    with s.bank.use(LINES):
        served = call(x)
    for names in (NAMES, ["eve", "dan", "cat", "ann"]):
        t = s._replace(trainable=s.bank.trainable(names))
        for (layer, grad), eager in zip(
            batch(t, x, call).items(), batch(t, x).values(), strict=True
        ):
            torch.testing.assert_close(grad, eager, msg=layer)
        t.trainable.close()
    with s.bank.use(LINES):
        torch.testing.assert_close(call(x), served)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing(s: Setting, reentrant: bool, inside: bool, device: torch.device) -> None:
    """Recomputed in the backward, in or after `use`, rows go to the adapters of the forward."""

    def call(x: Tensor) -> Tensor:
        for block in s.model:  # type: ignore[attr-defined]
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    x = inputs(len(LINES), device).requires_grad_()
    plain = batch(s, x)
    with s.trainable.use(LINES):
        loss = s.trainable.loss(losses_of(call(x)))
        if inside:
            with s.trainable.use(LINES[::-1]):
                s.model(inputs(len(LINES), device))
                loss.backward()
    if not inside:
        loss.backward()
    for layer, grad in gradients(s.trainable).items():
        assert torch.equal(grad, plain[layer])


PARTS = {"cores": ["core"], "pairs": ["a_train", "b_train"], "products": ["core_product"]}


@kinds
def test_names_of_the_parameters(kind: str) -> None:
    """They are the layer's own where the Parameters are its factors, otherwise no factor's."""
    model, bank = bank_of(kind, names="ab")
    trainable = bank.trainable(["b", "a"])
    found = dict(trainable.named_parameters())
    assert list(found) == [f"{layer}.{part}" for layer in bank.layers for part in PARTS[kind]]
    assert [id(p) for p in found.values()] == [id(p) for p in trainable.parameters()]
    state = model.state_dict()
    for name, parameter in found.items():
        if kind == "products":
            assert name not in state
            layer = model.get_submodule(name.rpartition(".")[0])
            assert parameter.shape == (2, layer.a_train.shape[0], layer.b_train.shape[1])
        else:
            assert parameter.shape == (2, *state[name].shape)
    trainable.close()


def test_sum_and_one_name(s: Setting, device: torch.device) -> None:
    """The sum over an adapter's own; one name for the whole batch."""
    x = inputs(4, device)
    with s.trainable.use("cat"):
        losses = losses_of(s.model(x))
    assert len(losses) == 4
    s.trainable.loss(losses, reduction="sum").backward(retain_graph=True)
    summed = gradients(s.trainable)
    s.trainable.loss(losses).backward()
    for layer, grad in gradients(s.trainable).items():
        torch.testing.assert_close(grad * 4, summed[layer])
        assert grad[2].any()
        assert not grad[[0, 1, 3, 4]].any()
    with s.trainable.use(None):
        base = s.model(x)
    with s.bank.use(None):
        assert torch.equal(base, s.model(x))


# --- the end ---


def step(s: Setting, optimizer: torch.optim.Optimizer, lines: list[str | None], x: Tensor) -> None:
    with s.trainable.use(lines):
        losses = losses_of(s.model(x))
    s.trainable.loss(losses).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained_setting(device: torch.device, method: str = "lora_xs", **options: Any) -> Setting:
    """After one step of all adapters."""
    s = setting(method, device, **options)
    dtype = options.get("dtype", torch.float64)
    step(s, s.trainable.optimizer(0.1), [*NAMES], inputs(5, device, dtype))
    return s


@methods
@pytest.mark.parametrize("spare", [1, 2, 5])
def test_commit(method: str, spare: int, device: torch.device) -> None:
    """The bank serves what was trained, and before that what it had; one free slot is enough."""
    s = trained_setting(device, method, spare=spare)
    x = inputs(len(LINES), device)
    with s.trainable.use(LINES):
        trained = s.model(x)
    with s.bank.use(LINES):
        before = s.model(x)
    assert not torch.allclose(trained, before)
    with s.trainable.use(LINES):  # a graph of the training's keeps no slot of the bank's
        graph = s.model(x)
    s.trainable.commit()
    s.trainable.close()
    with s.bank.use(LINES):
        assert torch.equal(s.model(x), trained)
    assert sorted(s.bank.names) == NAMES
    assert graph.requires_grad


def test_commit_beside_calls(device: torch.device) -> None:
    """A call under way keeps what it had; too few slots for that are an error before any write."""
    s = trained_setting(device, spare=4)
    x = inputs(len(LINES), device).requires_grad_()
    with s.bank.use(LINES):
        under_way = s.model(x)
    (expected,) = torch.autograd.grad(under_way.sum(), x, retain_graph=True)
    with s.bank.use(NAMES):
        before = s.model(x[:5].detach()).detach()
    with pytest.raises(RuntimeError, match="the bank is full: 5 slots are needed"):
        s.trainable.commit()
    with s.bank.use(NAMES):
        assert torch.equal(s.model(x[:5].detach()), before)
    s.trainable.commit(NAMES[:4])
    (grad,) = torch.autograd.grad(under_way.sum(), x)
    assert torch.equal(grad, expected)


def test_commit_of_nan(device: torch.device) -> None:
    """An adapter that has diverged is refused by name, and the others can be written."""
    s = trained_setting(device)
    with torch.no_grad():
        next(s.trainable.parameters())[1, 0, 0] = torch.nan
    x = inputs(5, device)
    with s.bank.use(NAMES):
        before = s.model(x)
    with pytest.raises(ValueError, match="'ben' would be NaN or Inf"):
        s.trainable.commit()
    with s.bank.use(NAMES):
        assert torch.equal(s.model(x), before)
    others = ["eve", "ann"]
    s.trainable.commit(others)
    with s.trainable.use(others):
        trained = s.model(x[:2])
    with s.bank.use(others):
        assert torch.equal(s.model(x[:2]), trained)


def test_tables_of_16_bits(device: torch.device) -> None:
    """They are trained in float32, and rounded when they are committed."""
    s = trained_setting(device, dtype=torch.float32, table=torch.bfloat16)
    for (_, parameter), stored in zip(
        s.trainable.named_parameters(), s.bank.store.tables.values(), strict=True
    ):
        assert parameter.dtype == torch.float32
        slots = [s.bank.store._slots[name] for name in NAMES]
        assert not torch.equal(stored.left[slots], parameter.bfloat16())
    s.trainable.commit()
    slots = [s.bank.store._slots[name] for name in NAMES]
    for (_, parameter), stored in zip(
        s.trainable.named_parameters(), s.bank.store.tables.values(), strict=True
    ):
        assert torch.equal(stored.left[slots], parameter.bfloat16())


# --- bad input ---


def test_bad_names(s: Setting, device: torch.device) -> None:
    """Unknown, twice, none; a second training before the first is closed; use after that."""
    bank, x = s.bank, inputs(2, device)
    with pytest.raises(RuntimeError, match="in training: close"):
        bank.trainable(["ann"])
    for names in (["zoe"], "zoe", ["ann", ["ben"]], [3]):
        with pytest.raises(ValueError, match="not in training"), s.trainable.use(names):
            s.model(x)
    with pytest.raises(ValueError, match="names is empty"), s.trainable.use([]):
        s.model(x)
    with pytest.raises(ValueError, match="3 adapters"), s.trainable.use(["ann", "ben", None]):
        s.model(x)
    with pytest.raises(ValueError, match="'zoe' is not in training"):
        s.trainable.commit(["zoe"])
    s.bank.remove("ben")
    with pytest.raises(ValueError, match="'ben' is not in the bank"):
        s.trainable.commit()
    s.trainable.close()
    with pytest.raises(RuntimeError, match="training is closed"), s.trainable.use(["ann"]):
        s.model(x)
    for names, message in (
        ([], "at least one"),
        ("ann", "a list of names"),
        (["ann", "zoe"], "'zoe' is not in the bank"),
        (["ann", "eve", "ann"], "comes twice"),
        ([None], "None is not in the bank"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.trainable(names)
    bank.trainable(["eve", "ann"]).close()
    s.trainable.close()  # again, and beside nobody


def test_bad_losses(s: Setting, device: torch.device) -> None:
    """Losses before any call, of another shape, for other lines; settings that are none."""
    with pytest.raises(RuntimeError, match="losses of what"):
        s.trainable.loss(torch.ones(2, device=device))
    with s.trainable.use(["ann", None]):
        losses = losses_of(s.model(inputs(2, device)))
    for wrong, message in ((losses.sum(), "a number for each"), (losses[:1], "2 sequences")):
        with pytest.raises(ValueError, match=message):
            s.trainable.loss(wrong)
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        s.trainable.loss(losses, reduction="none")
    for settings in ({"lr": -1.0}, {"lr": 0.1, "eps": -1.0}, {"lr": 0.1, "weight_decay": -0.1}):
        with pytest.raises(ValueError, match="at least 0"):
            s.trainable.optimizer(**settings)
    with pytest.raises(ValueError, match="betas"):
        s.trainable.optimizer(0.1, betas=(0.9, 1.0))
