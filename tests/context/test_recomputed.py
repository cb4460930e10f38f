"""What a checkpoint computes again is computed as it was, whatever has changed since."""

from contextlib import nullcontext

import pytest
import torch
from block_cases import Model, banked, in_another_thread, inputs
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from fused_lowrank import AdapterBank, adapt, disable_adapters
from fused_lowrank.context.disabling import Switch

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
    "hidden": lambda block, x: checkpoint(lambda h: block(h * 2.0), x, use_reentrant=True),
}
PLAIN = {
    "two blocks": lambda block, x: block(block(x)),
    "a layer": lambda block, x: block.first(x),
    "hidden": lambda block, x: block(x * 2.0),
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


@pytest.mark.parametrize(
    ("around", "train", "reentrant"),
    [
        ("blocks", True, True),
        ("blocks", False, True),
        ("the model", False, True),
        ("the model", True, False),
    ],
)
def test_compiled_within_a_checkpoint(
    around: str, train: bool, reentrant: bool, device: torch.device
) -> None:
    """The graph's call is computed again as it was: with adapters, with none, disabled."""
    model = Model().train(train)
    bank, x = banked(model, device), inputs(device, 2, 3).requires_grad_()
    torch._dynamo.reset()
    graphs = {id(m): torch.compile(m, backend="aot_eager") for m in (model, *model.blocks)}

    def checkpointed(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(graphs[id(module)], x, use_reentrant=reentrant)

    def grads(call) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        found = []
        for context in (
            bank.use(["0", "1"]),
            bank.use("2"),
            disable_adapters(model),
            nullcontext(),
        ):
            with context:
                y = call(x)
            x.grad = None
            y.square().sum().backward()
            found.append(x.grad)
        return found

    expected = grads(model)
    if around == "blocks":
        model.checkpointed = checkpointed
        torch.testing.assert_close(grads(model), expected)
    else:
        torch.testing.assert_close(grads(lambda x: checkpointed(model, x)), expected)


def mlp(device: torch.device) -> nn.Module:
    """Two adapted layers, whose adapters do something, and no bank."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(device, torch.float64)
    adapt(model, "lora_xs", target_modules=["0", "2"], r=4, progress=False)
    for name, parameter in model.named_parameters():
        if name.endswith("core"):
            nn.init.normal_(parameter)
    return model


DISABLED = {
    "reentrant": lambda call, x: checkpoint(call, x, use_reentrant=True),
    "not reentrant": lambda call, x: checkpoint(call, x, use_reentrant=False),
    "nested": lambda call, x: checkpoint(
        lambda x: checkpoint(call, x, use_reentrant=False), x, use_reentrant=False
    ),
    "nested, reentrant": lambda call, x: checkpoint(
        lambda x: checkpoint(call, x, use_reentrant=True), x, use_reentrant=True
    ),
    "another library's": Offloaded.apply,
    "a wrapper": lambda call, x: checkpoint_wrapper(call)(x),
}


@pytest.mark.parametrize("where", ["after", "on another thread", "inside"])
@pytest.mark.parametrize("with_bank", [False, True])
@pytest.mark.parametrize("kind", DISABLED)
def test_disabled_adapters(kind: str, with_bank: bool, where: str, device: torch.device) -> None:
    """A call is computed again as it was, disabled or not, wherever its backward runs."""
    model, x = mlp(device), torch.randn(3, 8, device=device, dtype=torch.float64)
    if with_bank:
        model.requires_grad_(False)
        AdapterBank.from_model(model, slots=1)
    x.requires_grad_()

    def grad(call, disabled: bool) -> torch.Tensor:  # type: ignore[no-untyped-def]
        x.grad, other = None, disable_adapters(model)
        if disabled:
            with disable_adapters(model):
                y = call(model, x).square().sum()
                if where == "inside":
                    in_another_thread(y.backward)
                    return x.grad
        else:
            y = call(model, x).square().sum()
        if where == "after":
            y.backward()
        elif where == "on another thread":
            in_another_thread(y.backward)
        else:
            with other:
                y.backward()
        return x.grad

    for disabled in (True, False, True):
        expected = grad(lambda call, x: call(x), disabled)
        torch.testing.assert_close(grad(DISABLED[kind], disabled), expected)
    del expected
    with disable_adapters(model):
        pass
    assert not any(
        isinstance(layer.disabled, Switch) for layer in model if hasattr(layer, "disabled")
    )


def test_a_reference_model_beside_the_policy(device: torch.device) -> None:
    """As DPO has them: in training mode, checkpointed, the reference without gradients."""
    model, x = mlp(device), torch.randn(3, 8, device=device, dtype=torch.float64)
    core, x = model[0].core, x.requires_grad_()
    grads = []
    for call in (lambda call, x: call(x), DISABLED["reentrant"], DISABLED["not reentrant"]):
        y = call(model, x)
        with disable_adapters(model), torch.no_grad():
            reference = call(model, x)
        core.grad = None
        (y - reference).square().sum().backward()
        grads.append(core.grad)
    torch.testing.assert_close(grads[1:], [grads[0]] * 2)
