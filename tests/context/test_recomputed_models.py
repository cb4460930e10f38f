"""Models of transformers that checkpoint themselves: with a bank, as without checkpoints.

Theirs checkpoint a block's `forward`, of which the recomputation runs no hook of the block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from block_cases import in_another_thread
from checkpoint_kinds import CHECKPOINTS
from torch import Tensor, nn

from fused_lowrank import AdapterBank, adapt, disable_adapters

transformers = pytest.importorskip("transformers")
TEXT = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Llama": (
        "ForCausalLM",
        {**TEXT, "intermediate_size": 24, "initializer_range": 0.2},
        ["q_proj", "v_proj", "down_proj"],
    ),
    "Falcon": (
        "ForCausalLM",
        {**TEXT, "hidden_dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.2},
        ["query_key_value", "dense_4h_to_h"],
    ),
    "T5": (
        "ForConditionalGeneration",
        {"vocab_size": 37, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0},
        ["q", "v", "wo"],
    ),
}
models = pytest.mark.parametrize("name", MODELS)


def model_of(name: str) -> Any:
    kind, options, targets = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(3)
    model = getattr(transformers, name + kind)(config).double()
    adapt(model, "lora_xs", target_modules=targets, r=4, progress=False)
    return model


def bank_on(model: nn.Module) -> AdapterBank:
    """With the adapters "a" and "b", whose cores are not small."""
    bank = AdapterBank.from_model(model, slots=2)
    cores = {
        layer: (torch.randn(2, *stored.left.shape[1:]).double() / 2, None, torch.tensor([1.0, 2.0]))
        for layer, stored in bank.store.tables.items()
    }
    bank.put(["a", "b"], cores)
    return bank


def loss_of(model: nn.Module, x: Tensor, seed: Tensor) -> Tensor:
    """A number for each sequence, of a call with embeddings."""
    given: dict[str, Any] = {"inputs_embeds": x}
    if model.config.is_encoder_decoder:
        given["decoder_inputs_embeds"] = x.flip(1)
    return (model(**given).logits.sin() * seed).mean((1, 2))


@pytest.mark.parametrize("names", [["a", "b", None], "a", None])
@pytest.mark.parametrize("train", [True, False])
@models
def test_a_model_that_checkpoints_itself(name: str, train: bool, names: Any) -> None:
    """The gradients of embeddings, of two tenants, of one and of none, on any thread; nested."""
    model = model_of(name).train(train)
    bank = bank_on(model)
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(3, 5, 37, dtype=torch.float64)

    def grad(context: Any = None, within: Callable[..., Tensor] | None = None) -> Tensor:
        x.grad = None
        with bank.use(names) if context is None else context:
            call = lambda x: loss_of(model, x, seed)  # noqa: E731
            loss = (call(x) if within is None else within(call, x)).sum()
        with bank.use("b"):
            loss_of(model, x, seed)
        in_another_thread(loss.backward)
        assert x.grad is not None
        return x.grad

    expected = grad(), grad(nullcontext()), grad(disable_adapters(model))
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = grad(), grad(nullcontext()), grad(disable_adapters(model))
        torch.testing.assert_close(found, expected)
        for within in CHECKPOINTS.values():
            torch.testing.assert_close(grad(within=within), expected[0])


@pytest.mark.parametrize("entries", [["a", "b", "a"], "b"])
@models
def test_training_a_model_that_checkpoints_itself(name: str, entries: Any) -> None:
    """The gradients of trained cores."""
    model = model_of(name).train()
    trainable = bank_on(model).trainable(["a", "b"])
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(3, 5, 37, dtype=torch.float64)

    def grads() -> dict[str, Tensor]:
        for parameter in trainable.parameters():
            parameter.grad = None
        with trainable.use(entries):
            loss = trainable.loss(loss_of(model, x, seed))
        loss.backward()
        return {n: copy.copy(p.grad) for n, p in trainable.named_parameters()}

    expected = grads()
    assert all(grad is not None and grad.any() for grad in expected.values())
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(grads(), expected)


class Methods(nn.Module):
    """One that checkpoints its own method, which hides what its layers are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.within: Any = None

    def mid(self, x: Tensor) -> Tensor:
        return self.second(self.first(x * 2.0).tanh() * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mid(x) if self.within is None else self.within(self.mid, x)


@pytest.mark.parametrize("names", [["a", "b"], "b", None])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_method_that_is_checkpointed(kind: str, train: bool, names: Any) -> None:
    """With one use, two, and one within the checkpoint beside what is around it."""
    model = Methods().double()
    adapt(model, "lora_xs", target_modules="all-linear", r=4, progress=False)
    bank = bank_on(model.train(train))
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    mid = model.mid

    def beside(x: Tensor) -> Tensor:
        with bank.use(["b", None]):
            y = mid(x)
        return y * mid(x) if names == "b" else mid(x) * y

    def grad(mid: Any, within: Any) -> Tensor:
        model.mid, model.within, x.grad = mid, within, None
        with bank.use(names):
            y = model(x)
        with bank.use("a"):
            y = y + model(x)
        y.square().sum().backward()
        assert x.grad is not None
        return x.grad

    for call in mid, beside:
        torch.testing.assert_close(grad(call, CHECKPOINTS[kind]), grad(call, None))
