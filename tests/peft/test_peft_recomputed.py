"""What a checkpoint computes again of a PEFT model is computed as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_checkpoint_cases import CONFIGS, tuned
from torch.utils.checkpoint import checkpoint


def grads(
    model: Any, x: torch.Tensor, call: Callable[[], Any], kinds: tuple[bool, ...] = (True, False)
) -> list[torch.Tensor]:
    """Without a checkpoint, and with one of each kind, reentrant or not."""
    found = []
    for reentrant in (None, *kinds):
        model.get_base_model().reentrant = reentrant
        x.grad = None
        call()
        found.append(x.grad)
    return found


@pytest.mark.parametrize("time", [4, 3])
@pytest.mark.parametrize("method", CONFIGS)
def test_adapter_names(method: str, time: int) -> None:
    """After the call, in which PEFT's hooks stand, and beside other calls."""
    model, x = tuned(method), torch.randn(4, time, 8, dtype=torch.float64, requires_grad=True)

    def call() -> None:
        y = model(x, adapter_names=["a1", "b1", "__base__", "b1"]).square().sum()
        z = model(x).square().sum()
        (y + 2.0 * z).backward()

    expected, *others = grads(model, x, call)
    torch.testing.assert_close(others, [expected] * 2)


@pytest.mark.parametrize("method", CONFIGS)
def test_disabled(method: str) -> None:
    """The backward after the call's `with`, and within another one."""
    model, x = tuned(method), torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)

    def after() -> None:
        with model.disable_adapter():
            y = model(x).square().sum()
        y.backward()

    def within() -> None:
        y = model(x).square().sum()
        with model.disable_adapter():
            y.backward()

    for call in (after, within, after):
        # Of the kind that is not reentrant torch sees that PEFT has frozen the factors meanwhile.
        kinds = (True,) if call is within else (True, False)
        expected, *others = grads(model, x, call, kinds)
        torch.testing.assert_close(others, [expected] * len(kinds))


def test_modules_to_save_are_refused() -> None:
    """PEFT's wrapper would compute with the active adapter: an error before that."""
    model = tuned("lora_xs", modules_to_save=["head"])
    x = torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    names = ["a1", "b1", "a1", "b1"]
    model(x, adapter_names=names).sum().backward()
    with pytest.raises(RuntimeError, match="one adapter at a time, or without the checkpoint"):
        checkpoint(lambda x: model(x, adapter_names=names), x, use_reentrant=True)
