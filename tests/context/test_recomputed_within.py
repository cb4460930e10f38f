"""A `with` within what a checkpoint computes again: entered again, and each call is as it was."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from bank_cases import bank_of, x_of
from checkpoint_kinds import CHECKPOINTS, Call
from peft_checkpoint_cases import CONFIGS, tuned
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_lowrank import disable_adapters


def grads(call: Call, x: Tensor, within: Callable[[Call, Tensor], Tensor]) -> list[Any]:
    x = x.detach().requires_grad_()
    within(call, x).square().sum().backward()
    return [x.grad]


def check(call: Call, x: Tensor) -> None:
    """The same gradient under each checkpoint as under none."""
    expected = grads(call, x, lambda call, x: call(x))
    for kind, within in CHECKPOINTS.items():
        torch.testing.assert_close(grads(call, x, within), expected, msg=lambda m, k=kind: k + m)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_disabled_beside_enabled(first: bool, outer: bool, compiled: bool) -> None:
    """As of a policy and its reference in one checkpoint, eagerly and as a graph of a bank."""
    model, bank = bank_of("cores", 4, names="a")
    torch._dynamo.reset()
    served: Call = torch.compile(model, backend="aot_eager") if compiled else model

    def pair(call: Call, x: Tensor) -> Tensor:
        y = call(x) if first else 1.0
        with disable_adapters(model):
            z = call(x)
        return z * (y if first else call(x))

    x = x_of(2, 3)
    with bank.use("a" if outer else None):
        expected = grads(lambda x: pair(model, x), x, lambda call, x: call(x))
        for within in CHECKPOINTS.values():
            found = grads(lambda x: pair(served, x), x, within)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("train", [True, False])
def test_uses_of_a_bank(train: bool) -> None:
    """One and two, of names for each sequence, of which the layers do not know the model's call."""
    model, bank = bank_of("cores", 4, names="ab")
    model.train(train)

    def once(x: Tensor) -> Tensor:
        with bank.use(["a", "b", None]):
            return model(x)

    def twice(x: Tensor) -> Tensor:
        with bank.use(["b", "a", "a"]):
            return once(x) * model(x)

    for call in once, twice:
        check(call, x_of(3, 4))
        with bank.use("a"):
            check(call, x_of(3, 3))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("names", ["a", ["b", None, "a"], None])
def test_a_use_around_that_is_over(names: Any, train: bool) -> None:
    """Before the backward, which is in nobody's use or in another: it is known by what was noted
    beside a use within the checkpoint, whichever of the two came first.
    """
    model, bank = bank_of("cores", 4, names="ab")
    model.train(train)

    def once(x: Tensor) -> Tensor:
        with bank.use(["a", "b", None]):
            return model(x)

    calls: list[Call] = [
        lambda x: once(x) * model(x),
        lambda x: model(x) * once(x),
        lambda x: once(x.tanh()) * model(once(x).sum() * x),
    ]
    x = x_of(3, 4)

    def grad(call: Call, within: Callable[[Call, Tensor], Tensor], another: bool) -> Any:
        own = x.clone().requires_grad_()
        with bank.use(names):
            loss = within(call, own).square().sum()
        with bank.use("b") if another else nullcontext():
            model(x)
            loss.backward()
        return own.grad

    for call in calls:
        expected = grad(call, lambda call, x: call(x), another=False)
        for within in CHECKPOINTS.values():
            for another in False, True:
                torch.testing.assert_close(grad(call, within, another), expected)


def test_uses_of_a_bank_in_a_graph() -> None:
    """Of single adapters; of names for each sequence where the checkpoint has one such use."""
    model, bank = bank_of("cores", 4, names="ab")
    torch._dynamo.reset()
    graph: Call = torch.compile(model, backend="aot_eager")

    def of(*uses: Any) -> Call:
        def call(x: Tensor) -> Tensor:
            y = torch.ones((), dtype=x.dtype)
            for names in uses:
                with bank.use(names):
                    y = y * graph(x)
            return y

        return call

    for uses in (["a", "b"],), ("a", "b"), ("a", None):
        check(of(*uses), x_of(2, 3))
    x = x_of(2, 3).requires_grad_()
    y = checkpoint(of(["a", "b"], ["b", "a"]), x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="its adapters are not known any more"):
        y.sum().backward()
    y = checkpoint(lambda x: of("a")(x) * graph(x), x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="its adapters are not known any more"):
        y.sum().backward()


def test_a_context_of_a_checkpoint_does_not_hide_a_use_within() -> None:
    """`bank.checkpoint_context` has what was around the checkpoint."""
    model, bank = bank_of("cores", 4, names="ab")

    def call(x: Tensor) -> Tensor:
        y = model(x)
        with bank.use(["a", "b"]):
            return y * model(x)

    def within(call: Call, x: Tensor) -> Tensor:
        return checkpoint(call, x, use_reentrant=False, context_fn=bank.checkpoint_context)

    x = x_of(2, 3)
    for names in None, ["b", "a"]:
        with bank.use(names):
            expected = grads(call, x, lambda call, x: call(x))
            torch.testing.assert_close(grads(call, x, within), expected)


@pytest.mark.parametrize("time", [3, 4])
@pytest.mark.parametrize("method", CONFIGS)
def test_of_peft(method: str, time: int) -> None:
    """Names twice, names beside none, disabled beside enabled, once within the other."""
    model = tuned(method)
    names = ["a1", "b1", "__base__", "b1"], ["b1", "a1", "a1", "__base__"]

    def disabled(x: Tensor) -> Tensor:
        with model.disable_adapter():
            return model(x)

    calls: list[Call] = [
        lambda x: model(x, adapter_names=names[0]) * model(x, adapter_names=names[1]),
        lambda x: model(x, adapter_names=names[0]) * model(x),
        lambda x: disabled(x) * model(x),
        lambda x: model(x) * disabled(x),
        lambda x: disabled(x) * model(x, adapter_names=names[1]) * disabled(x),
    ]
    for call in calls:
        check(call, torch.randn(4, time, 8, dtype=torch.float64))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_two_layouts_of_one_shape_of_peft(method: str, reentrant: bool) -> None:
    """A layer that is called with time first, too: an error where only that could tell the two."""
    model, names = tuned(method), ["a1", "b1", "__base__", "b1"]
    base = model.get_base_model()
    base.second = base.first

    def grad(x: Tensor, names: list[str], checkpointed: bool | None = None) -> Any:
        own = x.clone().requires_grad_()
        base.reentrant = checkpointed
        model(own, adapter_names=names).square().sum().backward()
        return own.grad

    for time in 3, 4:
        x = torch.randn(4, time, 8, dtype=torch.float64)
        each = [grad(one[None], [name]) for one, name in zip(x, names, strict=True)]
        torch.testing.assert_close(grad(x, names), torch.cat(each))
        if time != len(names):
            torch.testing.assert_close(grad(x, names, reentrant), torch.cat(each))
            continue
        with pytest.raises(RuntimeError, match="is not known any more"):
            grad(x, names, reentrant)


@pytest.mark.parametrize("method", CONFIGS)
def test_disabled_within_disabled_of_peft(method: str) -> None:
    """One `with` around the checkpoint and one within it."""
    model, x = tuned(method), torch.randn(4, 3, 8, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        with model.disable_adapter():
            y = model(x)
        return y * model(x)

    found = []
    for within in (lambda call, x: call(x)), CHECKPOINTS["reentrant"]:
        own = x.clone().requires_grad_()
        with model.disable_adapter():
            y = within(call, own).square().sum()
        y.backward()
        found.append(own.grad)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_compiled_layer_that_is_disabled(method: str, fullgraph: bool) -> None:
    """Its graph is whole, and notes it for checkpoints around it."""
    layer = tuned(method).get_base_model().first
    torch._dynamo.reset()
    graph: Call = torch.compile(layer, backend="aot_eager", fullgraph=fullgraph)
    x = torch.randn(4, 3, 8, dtype=torch.float64)

    def grad(call: Call, within: Callable[[Call, Tensor], Tensor]) -> Any:
        own = x.clone().requires_grad_()
        layer.enable_adapters(False)
        y = within(call, own).square().sum()
        layer.enable_adapters(True)
        y.backward()
        return own.grad

    kinds = [lambda call, x: call(x)]
    kinds += [] if fullgraph else [*CHECKPOINTS.values()]
    expected = grad(layer, kinds[0])
    for within in (*kinds, *kinds):
        torch.testing.assert_close(grad(graph, within), expected)
