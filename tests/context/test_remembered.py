"""What is remembered of a call for its backward: dropped in time, and never taken for another's."""

import gc

import pytest
import torch
from block_cases import Model, banked, inputs
from block_checkpoints import CHECKPOINTS
from torch.utils.checkpoint import checkpoint

from fused_lowrank.bank.recompute import MEMORIES, remember_storage


@pytest.mark.parametrize("how", ["eager", "compiled", *CHECKPOINTS])
def test_handles_written_to_before_the_backward_are_an_error(
    how: str, device: torch.device
) -> None:
    """The gradients would be another adapter's; in inference a buffer is there to be written to."""
    model = Model(CHECKPOINTS.get(how)).train()
    bank = banked(model, device)
    call = model
    if how == "compiled":
        call = torch.compile(model, fullgraph=True, backend="aot_eager")
    buffer, other = bank.handles(["0", "1"]), bank.handles(["2", None])
    x = inputs(device, 2, 3).requires_grad_()
    with bank.use(buffer):
        call(x)  # a bank's first use runs nothing compiled
    with bank.use(buffer):
        y = call(x)
    buffer.copy_(other)
    with pytest.raises(RuntimeError, match=r"inplace operation|were written to"):
        y.sum().backward()
    with torch.no_grad(), bank.use(buffer):
        first = call(x)
        buffer.copy_(bank.handles(["0", "1"]))
        torch.testing.assert_close(call(x), y.detach())
    assert not torch.allclose(first, y)


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_one_input_before_and_after_handles_are_written_to(kind: str, device: torch.device) -> None:
    """The first call is an error, for its handles are gone; the second has what was written."""
    model = Model().train()
    bank = banked(model, device)
    block, recomputed = model.blocks[0], CHECKPOINTS[kind]
    x, buffer = inputs(device, 2, 3).requires_grad_(), bank.handles(["0", "1"])
    with bank.use(buffer):
        first = recomputed(block, x)
        buffer.copy_(bank.handles(["2", None]))
        second = recomputed(block, x)
        with pytest.raises(RuntimeError, match=r"were written to"):
            first.sum().backward()
        x.grad = None
        second.square().sum().backward()
        found = x.grad
    with bank.use(["2", None]):
        (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.testing.assert_close(found, expected)
    del first, second
    x.grad = None
    with bank.use(buffer):
        recomputed(block, x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_an_input_of_two_kinds_of_calls(device: torch.device) -> None:
    """A reentrant checkpoint finds its routing, also where a call with gradients came before."""
    model = Model().train()
    bank = banked(model, device)
    block, x = model.blocks[0], inputs(device, 2, 3).requires_grad_()
    with bank.use(["2", None]):
        (expected,) = torch.autograd.grad(block(x).square().sum(), x)
        y = checkpoint(block, x, use_reentrant=True)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_what_is_remembered_again(device: torch.device) -> None:
    """The same call on the same storage leaves what is remembered as it is; another does not."""
    bank = banked(model := Model(), device)
    x, buffer = inputs(device, 2, 3).requires_grad_(), bank.handles(["0", "1"])
    address = x.untyped_storage()._cdata

    def remembered(y: torch.Tensor = x):
        remember_storage(y)
        return MEMORIES[address]

    outside = remembered()
    assert outside.certain
    assert remembered(x[0]) is outside
    with bank.use(buffer):
        first = remembered()
        assert first is not outside
        assert not first.certain
        assert remembered(x.detach()) is first
        buffer.copy_(bank.handles(["1", "0"]))
        second = remembered()
        assert second.version == first.version + 1
        with torch.no_grad():
            assert remembered().kept is not None
        assert remembered().kept is None
        assert not remembered().certain
        model(x)
    assert remembered().assignment is None


def test_a_storage_is_taken_while_it_is_remembered(device: torch.device) -> None:
    """No other storage comes to the address of one that is gone."""
    bank = banked(model := Model(), device)
    with bank.use(["0", "1"]):
        for _ in range(300):
            x = inputs(device, 2, 3).requires_grad_()
            remember_storage(x)
            memory = MEMORIES[x.untyped_storage()._cdata]
            assert memory.certain
            assert not memory.storage.expired()
        model(inputs(device, 2, 3))


def test_a_routing_is_gone_with_its_last_call(device: torch.device) -> None:
    """Nothing that it has found keeps it: its slots are to be free at once."""
    model = Model().eval()
    bank = banked(model, device)
    gc.disable()
    try:
        for names in (["0", "1"], [["0", "1"], [None, "2"]], bank.handles(["0", "1"]), "0", None):
            with bank.use(names):
                model(inputs(device, 2, 3))
                model(inputs(device, 2))
            assert not bank.store._running
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_one_input_of_three_uses(kind: str, device: torch.device) -> None:
    """A use that is over hides none before it, whose graph is still there; nor is it in the way."""
    model = Model().train()
    bank = banked(model, device)
    block, recomputed, x = model.blocks[0], CHECKPOINTS[kind], inputs(device, 2, 3).requires_grad_()
    with bank.use(["0", "1"]):
        first = recomputed(block, x)
    with bank.use(["2", None]):
        recomputed(block, x)  # and its graph is gone
    with bank.use(["3", "3"]):
        last = recomputed(block, x)
    for y, names in (first, ["0", "1"]), (last, ["3", "3"]):
        x.grad = None
        y.square().sum().backward()
        with bank.use(names):
            torch.testing.assert_close(x.grad, torch.autograd.grad(block(x).square().sum(), x)[0])
    del first, last, y
    x.grad = None
    with bank.use(["3", "3"]):
        (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    with bank.use(["3", "3"]):
        recomputed(block, x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_one_input_inside_and_around_a_use(kind: str, device: torch.device) -> None:
    """A use within another is over: what the outer one has called again is certain."""
    model = Model().train()
    bank = banked(model, device)
    block, recomputed, x = model.blocks[0], CHECKPOINTS[kind], inputs(device, 2, 3).requires_grad_()
    with bank.use(["0", "1"]):
        (expected,) = torch.autograd.grad(2 * block(x).square().sum(), x)
    with bank.use(["0", "1"]):
        first = recomputed(block, x)
        with bank.use(["2", None]):
            block(x)
        second = recomputed(block, x)
        (first.square().sum() + second.square().sum()).backward()
    torch.testing.assert_close(x.grad, expected)
