"""Banks over quantised and opaque bases: training, compiled models, checkpoints, files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from base_cases import METHODS, D, Net, adapted, inputs, kinds, layers_of, model_of, needs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fused_lowrank import AdapterBank, adapt, load_adapter, save_adapter
from fused_lowrank.bank.training import Trainable

NAMES = ["ann", "ben", "cat"]
LINES = ["cat", "ann", None, "ann", "cat", "ann"]  # ben is not there
methods = pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])
some_kinds = pytest.mark.parametrize(
    "kind",
    [
        "opaque",
        pytest.param("nf4", marks=needs("bitsandbytes")),
    ],
)


class Setting(NamedTuple):
    """A model in a bank of `NAMES`, and what the core of each layer is, by name."""

    model: Any
    bank: AdapterBank
    cores: dict[str, list[dict[str, Tensor]]]

    def take(self, name: str) -> None:
        """Give the model's own layers the core of an adapter."""
        for layer, core in zip(layers_of(self.model), self.cores[name], strict=True):
            with torch.no_grad():
                for part, value in core.items():
                    getattr(layer, part).copy_(value)


def setting(kind: str, method: str = "lora_xs", dtype: torch.dtype = torch.float32) -> Setting:
    """Adapters that are far from each other."""
    model = adapted(kind, method, dtype)
    bank, cores = AdapterBank.from_model(model, slots=5), {}
    draw = torch.Generator().manual_seed(1)
    for name in NAMES:
        cores[name] = [
            {part: torch.randn(getattr(layer, part).shape, generator=draw) for part in row}
            for layer in layers_of(model)
            for row in [layer.row.core]
        ]
        Setting(model, bank, cores).take(name)
        bank.add(name, model)
    return Setting(model, bank, cores)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    """Hidden states of `LINES`, (lines, 2, D)."""
    draw = torch.Generator().manual_seed(2)
    return torch.randn(len(LINES), 2, D, generator=draw).to(dtype)


def gradients(trainable: Trainable, call: Any, x: Tensor) -> dict[str, Tensor]:
    """Those of a batch of `LINES`, and none left behind."""
    with trainable.use(LINES):
        losses = call(x).sin().mean((1, 2))
    trainable.loss(losses).backward()
    found = {}
    for name, parameter in trainable.named_parameters():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad, None
    return found


@kinds
@methods
def test_gradients_are_those_of_each_alone(kind: str, method: str) -> None:
    """In common batches, under the mean over its own rows; also of x."""
    s = setting(kind, method)
    x = batch().requires_grad_()
    got = gradients(s.bank.trainable(NAMES), s.model, x)
    for i, name in enumerate(NAMES):
        own = [line for line, given in enumerate(LINES) if given == name]
        if not own:
            assert all(not grad[i].any() for grad in got.values())
            continue
        s.take(name)
        s.model.zero_grad()
        leaf = x.detach()[own].requires_grad_()
        s.model(leaf).sin().mean((1, 2)).mean().backward()
        for layer, found in zip(("first", "second"), layers_of(s.model), strict=True):
            for part in found.row.core:
                alone = getattr(found, part).grad
                torch.testing.assert_close(
                    got[f"{layer}.{part}"][i], alone, rtol=1e-4, atol=1e-5 * float(alone.norm())
                )
        torch.testing.assert_close(x.grad[own], leaf.grad, rtol=1e-4, atol=1e-6)


@kinds
def test_isolation(kind: str) -> None:
    """What an adapter's or nobody's rows are does not show in another's gradient, bit for bit."""
    s = setting(kind)
    trainable, x = s.bank.trainable(NAMES), batch()
    before = gradients(trainable, s.model, x)
    for line in (2, 3):  # nobody's, ann's
        x[line, 1] = torch.nan
    after = gradients(trainable, s.model, x)
    for layer, grad in before.items():
        assert after[layer][0].isnan().any()
        assert torch.equal(after[layer][1:], grad[1:])


@kinds
def test_trained_committed_saved(kind: str, tmp_path: Path) -> None:
    """The bank serves what was trained; its file goes into a bank over the same base."""
    s = setting(kind)
    save_adapter(s.model, tmp_path / "adapter.safetensors")
    trainable, x = s.bank.trainable(NAMES), batch()
    optimizer = trainable.optimizer(lr=0.1)
    for _ in range(2):
        with trainable.use(LINES):
            losses = s.model(x).sin().mean((1, 2))
        trainable.loss(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    with s.bank.use(LINES):
        before = s.model(x).detach()
    with trainable.use(LINES):
        trained = s.model(x).detach()
    assert not torch.allclose(before, trained)
    trainable.commit()
    trainable.close()
    s.bank.save(tmp_path / "bank.safetensors")
    other = load_adapter(model_of(kind), tmp_path / "adapter.safetensors", progress=False)
    served = AdapterBank.from_model(other, slots=3)
    served.load(tmp_path / "bank.safetensors", progress=False)
    for bank in (s.bank, served):
        with bank.use(LINES):
            torch.testing.assert_close(bank.model(x).detach(), trained)


@some_kinds
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(kind: str, reentrant: bool) -> None:
    """Computed again in the backward, rows go to the adapters of the forward."""
    s = setting(kind)
    trainable, x = s.bank.trainable(NAMES), batch().requires_grad_()

    def call(x: Tensor) -> Tensor:
        return checkpoint(s.model, x, use_reentrant=reentrant)

    plain, again = (gradients(trainable, one, x) for one in (s.model, call))
    for layer, grad in plain.items():
        torch.testing.assert_close(again[layer], grad)


# --- compiled models ---


@some_kinds
def test_compiled(kind: str) -> None:
    """Each layer's call is between two graphs, which serve every assignment, and training."""
    s = setting(kind)
    x = inputs(torch.float32, 4).requires_grad_()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(s.model, backend=counter)
    routes: list[tuple[Any, ...]] = [
        (["ann", "ben", None, "ann"],),
        (["cat", None, None, "ben"],),
        ([["ann", "ben"]] * 4, torch.tensor([[0.3, 0.7]] * 4)),
        ("ben",),
        (None,),
    ]
    for route in routes:
        with s.bank.use(*route):
            ours, theirs = compiled(x), s.model(x)
        torch.testing.assert_close(ours, theirs)
        (dx,), (expected,) = (torch.autograd.grad(y.square().sum(), x) for y in (ours, theirs))
        torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(compiled(x), s.model(x))
    assert counter.frame_count == 1  # what is between the two layers
    trainable, x = s.bank.trainable(NAMES), batch()
    for (layer, grad), eager in zip(
        gradients(trainable, compiled, x).items(),
        gradients(trainable, s.model, x).values(),
        strict=True,
    ):
        torch.testing.assert_close(grad, eager, msg=layer)


def test_compiled_checkpoint() -> None:
    """It computes the layers again with the adapters of the forward."""
    s = setting("opaque")
    x = inputs(torch.float32, 4).requires_grad_()

    def call(x: Tensor) -> Tensor:
        return checkpoint(s.model, x, use_reentrant=False)

    torch._dynamo.reset()
    found = []
    for one in (s.model, torch.compile(call, backend="aot_eager")):
        with s.bank.use(["ann", "ben", None, "ann"]):
            y = one(x)
        with s.bank.use(["cat", None, "ben", "ann"]):
            one(x)
            found.append(torch.autograd.grad(y.square().sum(), x))
    torch.testing.assert_close(found[0], found[1])


@some_kinds
def test_what_would_need_one_graph(kind: str) -> None:
    """It is an error that says so: nothing is baked into a graph."""
    s = setting(kind)
    x = inputs(torch.float32, 4)
    names = ["ann", "ben", None, "ann"]
    with s.bank.use(names):  # the first use runs compiled models as they were written
        s.model(x)
    torch._dynamo.reset()
    whole = torch.compile(s.model, backend="aot_eager", fullgraph=True)
    one_graph = pytest.raises(torch._dynamo.exc.Unsupported, match="bank over a quantised base")
    with one_graph, s.bank.use(names):
        whole(x)
    refused = pytest.raises(RuntimeError, match=r"first is in a bank, over a .*close\(\) the bank")
    with refused, s.bank.use(names):
        torch.export.export(s.model, (x,), strict=False)


# --- other bases ---


def original(method: str) -> nn.Module:
    """What was quantised."""
    torch.manual_seed(0)
    return Net(nn.Linear)


@pytest.mark.parametrize("kind", [pytest.param("nf4", marks=needs("bitsandbytes"))])
@methods
def test_adapters_of_another_base(kind: str, method: str, tmp_path: Path) -> None:
    """Those of the quantised base are refused over its original, and taken with a warning."""
    s, x = setting(kind, method), batch()
    s.take("ann")
    alone, file = tmp_path / "ann.safetensors", tmp_path / "bank.safetensors"
    save_adapter(s.model, alone)
    s.bank.save(file)
    settings: Any = {"target_modules": ["first", "second"], "alpha": 6.0, **METHODS[method]}
    other = AdapterBank.from_model(
        adapt(original(method), method, progress=False, **settings), slots=5
    )
    with pytest.raises(ValueError, match=r"weight of first is .* there, a plain matrix here"):
        other.add("ann", alone)
    assert other.names == []
    with pytest.warns(UserWarning, match="another base model"):
        plain = load_adapter(original(method), alone, progress=False, on_other_base="warn")
    bank = AdapterBank.from_model(plain, slots=5)
    for refused in (lambda: bank.add("own", alone), lambda: bank.load(file, progress=False)):
        with pytest.raises(ValueError, match="made for another base"):
            refused()
    with pytest.warns(UserWarning, match="another base model"):
        bank.add("own", alone, on_other_base="warn")
    with pytest.warns(UserWarning, match="another base model"):
        bank.load(file, progress=False, on_other_base="warn")
    expected = plain(x).detach()
    for name in ("own", "ann"):
        with bank.use([name, "cat"] * 3):
            y = bank.model(x).detach()
        torch.testing.assert_close(y[::2], expected[::2], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(y[1::2], expected[1::2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.bank.add("own", alone)  # over its own base
