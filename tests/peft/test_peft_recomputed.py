"""What a checkpoint computes again of a PEFT model is computed as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model

from fused_lowrank.integrations.peft import LoraMiniConfig, LoraXSConfig, fuse_lora

CONFIGS: dict[str, Callable[..., Any]] = {
    "lora_xs": lambda **more: LoraXSConfig(r=3, init_weights=False, **more),
    "lora_mini": lambda **more: LoraMiniConfig(r=2, a=4, b=4, init_weights=False, **more),
    "fuse_lora": lambda **more: LoraConfig(r=3, init_lora_weights=False, **more),
}


class Model(nn.Module):
    """Two layers in a checkpoint, of which the second sees time first, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head, self.reentrant = nn.Linear(8, 4), None

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)).transpose(0, 1)).transpose(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return self.head(self.block(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


def tuned(method: str, **more: Any) -> Any:
    """With adapters a1 and b1, of which a1 is active."""
    torch.manual_seed(0)
    settings = {"target_modules": ["first", "second"], **more}
    model = get_peft_model(Model().double(), CONFIGS[method](**settings), adapter_name="a1")
    model.add_adapter("b1", CONFIGS[method](**settings))
    if method == "fuse_lora":
        fuse_lora(model)
    return model.eval()


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
