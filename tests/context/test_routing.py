"""Which adapters a call's rows go to: shapes, contexts, threads, checkpoints, compiled graphs."""

import asyncio
import contextvars
import threading

import pytest
import torch
from block_cases import WIDTH, Model, banked, in_another_thread, inputs
from block_checkpoints import CHECKPOINTS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fused_lowrank import disable_adapters, merge
from fused_lowrank.bank.recompute import MEMORIES


@pytest.fixture
def model(device: torch.device) -> Model:
    """A model with a bank."""
    made = Model()
    made.bank = (banked(made, device),)
    return made


def rows(model: Model, x: torch.Tensor, names: list) -> torch.Tensor:
    """Each sequence by itself, with its adapter for the whole call."""
    outputs = []
    for row, name in zip(x, names, strict=True):
        with model.bank[0].use(name):
            outputs.append(model(row[None]))
    return torch.cat(outputs)


def test_shapes_that_are_understood(model: Model, device: torch.device) -> None:
    """Sequences, however many positions they have; packed rows."""
    (bank,) = model.bank
    names, x = ["2", None, "4"], inputs(device, 3, 7)
    expected = rows(model, x, names)
    with bank.use(names):
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x[:, -1]), expected[:, -1])
        torch.testing.assert_close(model(x.view(3, 7, 1, WIDTH)).view_as(x), expected)
        assert model(x[:, :0]).shape == (3, 0, WIDTH)
    packed = torch.cat([x[0, :2], x[1, :5], x[2, :1]])[None]
    with bank.use(["2"] * 2 + [None] * 5 + ["4"]):
        y = model(packed)
    together = torch.cat([expected[0, :2], expected[1, :5], expected[2, :1]])
    torch.testing.assert_close(y[0], together)
    with bank.use("2"):
        torch.testing.assert_close(model(x[0]), expected[0])
        torch.testing.assert_close(model(x[0, 0]), expected[0, 0])


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (21,), (7,), (1, 9), (2,), ()])
def test_other_shapes_are_an_error_that_names_the_module(
    shape: tuple, model: Model, device: torch.device
) -> None:
    (bank,) = model.bank
    with bank.use(["0", "1", "2"]), pytest.raises(ValueError, match=r"blocks\.0\.first .* 3 adap"):
        model(inputs(device, *shape))


def test_outside_use_and_disabled_and_merged(model: Model, device: torch.device) -> None:
    """A bank changes nothing outside; disabled layers are bare in it; merged ones are refused."""
    (bank,), x = model.bank, inputs(device, 2, 3)
    before = model(x)
    with bank.use(["0", "1"]):
        assert not torch.equal(model(x), before)
        with disable_adapters(model):
            bare = model(x)
        with bank.use(None):
            assert torch.equal(model(x), bare)
        with bank.use(["1", "0"]):
            inner = model(x)
        torch.testing.assert_close(rows(model, x, ["1", "0"]), inner)
    assert torch.equal(model(x), before)
    merge(model)
    with bank.use(["0", "1"]), pytest.raises(RuntimeError, match=r"blocks\.0\.first is merged"):
        model(x)


def test_routing_is_of_the_thread_and_of_the_task(model: Model, device: torch.device) -> None:
    """Threads and asyncio tasks that take turns inside their own `use`."""
    (bank,), x = model.bank, inputs(device, 1, 4)
    expected = {name: rows(model, x, [name]) for name in ("0", "1", "2", None)}
    barrier, wrong = threading.Barrier(4), []

    def thread(name: str | None) -> None:
        for _ in range(20):
            with bank.use([name]):
                barrier.wait()
                if not torch.allclose(model(x), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=thread, args=(name,)) for name in expected]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    async def task(name: str | None) -> None:
        for _ in range(20):
            with bank.use([name]):
                await asyncio.sleep(0)
                if not torch.allclose(model(x), expected[name]):
                    wrong.append(name)

    async def tasks() -> None:
        await asyncio.gather(*(task(name) for name in expected))

    asyncio.run(tasks())
    assert not wrong


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_recomputes_with_its_own_adapters(kind: str, device: torch.device) -> None:
    """On another thread, outside `use`, two calls of different adapters in one backward."""
    model = Model(CHECKPOINTS[kind]).train()
    bank = banked(model, device)
    first, second = inputs(device, 2, 3).requires_grad_(), inputs(device, 3, 2).requires_grad_()

    def loss() -> torch.Tensor:
        with bank.use(["0", None]):
            total = model(first).square().sum()
        with bank.use(["3", "1", "3"]):
            total = total + model(second).square().sum()
        return total + model(second).sum()  # and one of no adapters

    together = loss()
    in_another_thread(together.backward)
    grads = first.grad.clone(), second.grad.clone()
    first.grad = second.grad = None
    plain = {
        "layer": lambda block, x: block.first(x),
        "function": lambda block, x: block(x * 2.0),
    }
    model.checkpointed = plain.get(kind, lambda block, x: block(x))
    loss().backward()
    torch.testing.assert_close(grads, (first.grad, second.grad))
    first.grad, model.checkpointed = None, CHECKPOINTS[kind]
    together = loss()
    with bank.use(["4", "4"]):  # what is recomputed inside another `use` keeps its own
        model(inputs(device, 2, 3))
        together.backward()
    torch.testing.assert_close(grads[0], first.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_whose_adapters_are_lost_is_an_error(
    reentrant: bool, device: torch.device
) -> None:
    """Of what no checkpoint that is found computes again; one that is found knows its own."""
    hidden = lambda block, x: checkpoint(lambda h: block(h * 2.0), x, use_reentrant=reentrant)  # noqa: E731
    model = Model(hidden)
    bank = banked(model.train(), device)
    x = inputs(device, 2, 3).requires_grad_()
    block = model.blocks[0]
    grads = []
    for call in hidden, lambda block, x: block(x * 2.0):
        with bank.use(["0", None]):
            y = call(block, x)
        with bank.use(["1", "2"]):
            z = call(block, x)
        x.grad = None
        (y * 3 + z).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
    with bank.use(["0", None]):
        y = model(x)
    y.register_hook(lambda _: block(torch.zeros_like(x)).detach())
    with pytest.raises(RuntimeError, match=r"context_fn=bank\.checkpoint_context"):
        y.sum().backward()


def test_what_is_remembered_is_dropped(model: Model, device: torch.device) -> None:
    """Storages that are gone take their memories with them; inference leaves none."""
    (bank,) = model.bank
    for _ in range(200):
        x = inputs(device, 2, 3).requires_grad_()
        with bank.use(["0", "1"]):
            model(x)
    assert len(MEMORIES) < 300
    before = len(MEMORIES)
    with torch.no_grad(), bank.use(["0", "1"]):
        model.eval()(inputs(device, 2, 3))
    assert len(MEMORIES) == before


def test_one_compiled_graph_serves_every_routing(model: Model, device: torch.device) -> None:
    """Forward and backward, changing ids, mixtures, one adapter for all, none, outside."""
    (bank,), x = model.bank, inputs(device, 4, 3).requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    half = torch.full((4, 2), 0.5)
    routes = [
        (["0", "1", "2", None],),
        (["3", "3", None, "4"],),
        ([["0", "1"], ["2", None], ["4", "4"], [None, None]], half),
        ("2",),
        (None,),
        (bank.handles(["4", None, "1", "1"])[:, 0].clone(),),
    ]
    for route in routes:
        with bank.use(*route):
            ours, theirs = compiled(x), model(x)
        torch.testing.assert_close(ours, theirs)
        (dx,), (expected,) = (torch.autograd.grad(y.square().sum(), x) for y in (ours, theirs))
        torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition", "inductor"])
def test_a_compiled_checkpoint_recomputes_with_its_own_adapters(
    backend: str, device: torch.device
) -> None:
    """Also where a partitioner decides what is computed again."""
    model = Model(CHECKPOINTS["non-reentrant"]).train()
    bank = banked(model, device)
    x = inputs(device, 2, 3).requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    grads = []
    for call in (model, compiled):
        with bank.use(["0", "2"]):
            y = call(x)
        with bank.use(["1", None]):  # and not with these
            call(x)
            grads += torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("names", [["1", None], "1"])
def test_dropout_is_on_while_training(names, model: Model, device: torch.device) -> None:
    """With gradients and without, and off in eval."""
    (bank,), x = model.bank, inputs(device, 2, 40)
    for module in model.blocks.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    with bank.use(names):
        expected = model.eval()(x)
        torch.testing.assert_close(model(x), expected)
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                y, z = model.train()(x), model(x)
            assert not torch.allclose(y[0], expected[0])
            assert not torch.allclose(y[0], z[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_and_under_autocast(mode, model: Model, device: torch.device) -> None:
    """What is made for one call does not stand in the way of the next."""
    (bank,), x = model.bank, inputs(device, 3, 2)
    names = ["1", None, "1"]
    expected = rows(model, x, names)
    with bank.use(names):
        with mode():
            torch.testing.assert_close(model(x), expected)
        grad = x.clone().requires_grad_()
        model(grad).sum().backward()
    with bank.use("1"):
        with mode():
            torch.testing.assert_close(model(x)[0], expected[0])
        model(grad).sum().backward()
    model.float()
    with bank.use(names), mode(), torch.autocast(device.type, torch.bfloat16):
        y = model(x.float())
        assert model.blocks[0].first(x.float()).dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_nothing_keeps_a_slot_after_the_backward(kind: str, device: torch.device) -> None:
    """What recalls a routing does not keep it, nor the graph."""
    bank = banked(model := Model(CHECKPOINTS[kind]).train(), device)
    for names in (["0", "1"], ["0", None]):
        x = inputs(device, 2, 3).requires_grad_()
        with bank.use(names):
            model(x).sum().backward()
    del x
    bank.remove("0")
    assert list(bank.store._free) == [0]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_go_to_whom_the_call_was_of(compiled: bool, device: torch.device) -> None:
    """To the model's own cores outside `use`, to those in training inside theirs, or to nobody."""
    model = Model()
    bank = banked(model, device)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = inputs(device, 2, 3)
    own = model.blocks[0].first.core
    trained = bank.trainable(["1", "0"])
    (cores, *_) = trained.parameters()
    for own_too in (False, True):
        for layer in bank.layers.values():
            layer.core.requires_grad_(own_too)
        with trained.use(["0", None]):
            call(x).square().sum().backward()
        assert cores.grad[1].any()
        assert not cores.grad[0].any()
        assert own.grad is None or not own.grad.any()
        cores.grad = None
        if own_too:
            with bank.use(["0", "1"]):
                y = call(x).square().sum()
            if y.requires_grad:
                y.backward()
            assert own.grad is None or not own.grad.any()
            assert cores.grad is None or not cores.grad.any()
            call(x).square().sum().backward()
            assert own.grad.any()


def test_layers_on_threads_that_share_a_use(model: Model, device: torch.device) -> None:
    """Calls of other lengths at once, of one routing: each layer's rows are its own call's."""
    (bank,), wrong = model.bank, []
    given = [inputs(device, 2, length) for length in (1, 2, 5, 7)]
    with torch.no_grad(), bank.use(["1", None]):
        expected = [model(x) for x in given]
        contexts = [contextvars.copy_context() for _ in given]

    def call(x: torch.Tensor, y: torch.Tensor) -> None:
        for _ in range(30):
            with torch.no_grad():
                if not torch.allclose(model(x), y):
                    wrong.append(len(x[0]))

    threads = [
        threading.Thread(target=context.run, args=(call, x, y))
        for context, x, y in zip(contexts, given, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
