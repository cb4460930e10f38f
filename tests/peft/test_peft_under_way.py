"""Adapters in a mixed batch of PEFT's are not taken away under it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_cases import config, inputs, layers, methods, mlp, peft

X = inputs(4)
NAMES = ["two", "__base__", "default", "two"]
TAKEN: dict[str, Callable[[Any], Any]] = {
    "delete": lambda model: model.delete_adapter("two"),
    "delete the active one": lambda model: model.delete_adapter("default"),
    "unload": lambda model: model.unload(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
}


def made(method: str) -> Any:
    """A model with three adapters, of which a mixed batch names two."""
    model = peft.get_peft_model(mlp(), config(method))
    for name in ("two", "three"):
        model.add_adapter(name, config(method))
    return model.eval()


def within(model: Any, call: Callable[[], None]) -> torch.Tensor:
    """A mixed batch, in the middle of which something is called."""
    handle = layers(model).popitem()[1].register_forward_pre_hook(lambda *_: call())
    try:
        with torch.no_grad():
            return model(X, adapter_names=NAMES)
    finally:
        handle.remove()


@methods
@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("case", TAKEN)
def test_adapters_under_way_stay(case: str, thread: bool, method: str) -> None:
    """The error names one of them, on whatever thread, and nothing has changed."""
    model, errors = made(method), []
    with torch.no_grad():
        before = model(X, adapter_names=NAMES)
    modules, adapters = list(model.modules()), list(model.peft_config)

    def take() -> None:
        try:
            TAKEN[case](model)
        except RuntimeError as error:
            errors.append(str(error))

    def elsewhere() -> None:
        other = threading.Thread(target=take)
        other.start()
        other.join()

    y = within(model, elsewhere if thread else take)
    assert len(errors) == 1
    assert "adapter_names" in errors[0]
    assert ("two" if case == "delete" else "default") in errors[0]
    assert torch.equal(y, before)
    assert list(model.peft_config) == adapters
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    TAKEN[case](model)  # the call is over


@methods
def test_others_may_go(method: str) -> None:
    """An adapter that no call names, and one of another model."""
    model, other = made(method), made(method)
    with torch.no_grad():
        before = model(X, adapter_names=NAMES)

    def take() -> None:
        model.delete_adapter("three")
        other.delete_adapter("two")
        other.unload()

    assert torch.equal(within(model, take), before)
    assert list(model.peft_config) == ["default", "two"]


def test_a_call_that_fails_is_over() -> None:
    """It holds nothing any more."""
    model = made("lora_xs")

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        within(model, fail)
    model.delete_adapter("two")
