"""What a checkpoint computes again is computed as it was, whatever has changed since."""

import pytest
import torch
from test_routing import Block, Model, banked, inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

REENTRANT = {
    "block": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "two blocks": lambda block, x: checkpoint(lambda h: block(block(h)), x, use_reentrant=True),
    "a layer": lambda block, x: checkpoint(block.first, x, use_reentrant=True),
    "a mask first": lambda block, x: checkpoint(
        lambda mask, h: block(h, scale=2.0) * mask, torch.ones(()), x, use_reentrant=True
    ),
    "nested": lambda block, x: checkpoint(
        lambda h: checkpoint(block, h, use_reentrant=True), x, use_reentrant=True
    ),
}
PLAIN = {
    "two blocks": lambda block, x: block(block(x)),
    "a layer": lambda block, x: block.first(x),
    "a mask first": lambda block, x: block(x, scale=2.0),
}


class Offloaded(torch.autograd.Function):
    """A checkpoint as others write them, with its own class."""

    @staticmethod
    def forward(ctx, block, x):  # type: ignore[no-untyped-def]
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


REENTRANT["another library's"] = Offloaded.apply


@pytest.mark.parametrize("names", [["0", None], "3", None])
@pytest.mark.parametrize("kind", REENTRANT)
def test_a_reentrant_checkpoint_in_eval_mode(kind: str, names, device: torch.device) -> None:
    """Its forward is without gradients and in eval mode, as inference is; its backward is not."""
    model = Model(REENTRANT[kind]).eval()
    bank, x = banked(model, device), inputs(device, 2, 3).requires_grad_()

    def grad() -> torch.Tensor:
        with bank.use(names):
            y = model(x)
        x.grad = None
        y.square().sum().backward()
        return x.grad

    ours, model.checkpointed = grad(), PLAIN.get(kind)
    torch.testing.assert_close(ours, grad())


def test_a_reentrant_checkpoint_in_eval_mode_whose_adapters_are_lost(device: torch.device) -> None:
    """Of a function that hides the hidden states from modules: an error; outside `use`, none."""
    hidden = lambda block, x: checkpoint(lambda h: block(h * 2.0), x, use_reentrant=True)  # noqa: E731
    model = Model(hidden).eval()
    bank, x = banked(model, device), inputs(device, 2, 3).requires_grad_()
    model(x).sum().backward()
    with bank.use(["0", None]):
        y = model(x)
    with pytest.raises(RuntimeError, match=r"context_fn=bank\.checkpoint_context"):
        y.sum().backward()
