"""What a call saves, launches, refuses and promises, beside being right (test_numerics)."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lowrank import lowrank_linear
from fused_lowrank.compute import devices
from fused_lowrank.compute.autograd import backward_op, forward_op
from fused_lowrank.compute.dropout import Dropout
from fused_lowrank.compute.plans import PLANS
from fused_lowrank.compute.run import on_device
from fused_lowrank.kernels.tiles import TileConfig
from fused_lowrank.testing import measure, pinned_plan, pinned_tiles

CORES = ("core", "pair", "diagonal", "none")
FUSED = ("triton", "aten")
EAGER = (*FUSED, "auto")  # few rows on a CPU go a way of their own
INTERPRETED = triton.knobs.runtime.interpret


def operands(
    device: torch.device,
    core: str = "core",
    *,
    m: int = 37,
    k: int = 24,
    n: int = 20,
    p: int = 5,
    q: int = 6,
    r: int = 3,
    dtype: torch.dtype = torch.float32,
    train: tuple[str, ...] = ("x", "core"),
) -> dict:
    """Operands of a call; those named in `train` require a gradient."""
    q = p if core in ("diagonal", "none") else q
    sizes = {"x": (m, k), "weight": (n, k), "down": (p, k), "up": (n, q), "bias": (n,)}
    made = {name: torch.randn(size, dtype=dtype, device=device) for name, size in sizes.items()}
    parts = {"core": [(p, q)], "pair": [(p, r), (r, q)], "diagonal": [(p,)], "none": []}[core]
    factors = tuple(torch.randn(size, dtype=dtype, device=device) for size in parts)
    made["core"] = factors if core == "pair" else factors[0] if factors else None
    for name in train:
        for tensor in made[name] if isinstance(made[name], tuple) else (made[name],):
            if tensor is not None:
                tensor.requires_grad_()
    return made


class DeviceOps(TorchDispatchMode):
    """Records the operations that would run on the device: all but views and allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        free = ("empty", "empty_like", "empty_strided", "detach", "_unsafe_view")
        if not func.is_view and name not in free:
            self.ran.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def interpreter_runs_natively(mode: DeviceOps) -> Iterator[None]:
    """Leave out of `mode` what Triton's interpreter itself does with tensors."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    original = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        ran = list(mode.ran)
        result = original(self, *args, **kwargs)
        mode.ran[:] = ran
        return result

    interpreter.GridExecutor.__call__ = call
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = original


@pytest.mark.parametrize("core", CORES)
@pytest.mark.skipif(not INTERPRETED, reason="the compiled kernels have no fp64")
def test_gradcheck_through_the_kernels(core: str, device: torch.device) -> None:
    """Numerical differentiation of the kernels themselves, in fp64, with several tiles."""
    train = ("x", "weight", "down", "core", "up", "bias")
    made = operands(device, core, m=5, k=6, n=4, p=3, q=2, r=2, dtype=torch.float64, train=train)
    names = [name for name in made if name != "core"]
    parts = made["core"] if core == "pair" else (made["core"],)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        rest = tensors[len(names) :]
        value = rest if core == "pair" else rest[0] if rest else None
        named = dict(zip(names, tensors, strict=False))
        return lowrank_linear(core=value, scale=0.5, impl="triton", **named)

    inputs = [made[name] for name in names] + [part for part in parts if part is not None]
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("core", CORES)
def test_gradgradcheck_of_the_reference(core: str, device: torch.device) -> None:
    """The reference is differentiable twice."""
    made = operands(device, core, m=2, k=3, n=2, p=2, q=2, r=1, dtype=torch.float64)

    def call(x: torch.Tensor) -> torch.Tensor:
        return lowrank_linear(**{**made, "x": x}, impl="reference") ** 2

    assert torch.autograd.gradcheck(call, [made["x"]])
    assert torch.autograd.gradgradcheck(call, [made["x"]])


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("lead", [(7,), (2, 3)])
def test_the_output_may_be_written_to(
    lead: tuple[int, ...], impl: str, device: torch.device
) -> None:
    """y += residual, an in-place activation: as after any linear layer."""
    made = operands(device, "core", m=1)
    made["x"] = torch.randn(*lead, made["x"].shape[-1], device=device)
    gradients = []
    for in_place in (False, True):
        y = lowrank_linear(**made, impl=impl)
        y = y.add_(1).relu_() if in_place else (y + 1).relu()
        gradients.append(torch.autograd.grad(y.square().sum(), made["core"])[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("core", ["core", "pair", "diagonal"])
def test_saves_t_and_nothing_else_of_m(core: str, impl: str, device: torch.device) -> None:
    """M·P elements, and the same few others whatever M is."""

    def saved(m: int) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        made = operands(device, core, m=m)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            lowrank_linear(**made, impl=impl)
        return kept

    small, large = saved(64), saved(101)
    assert [t.shape for t in large if 101 in t.shape] == [(101, 5)]
    others = [t.shape for t in large if 101 not in t.shape]
    assert others == [t.shape for t in small if 64 not in t.shape]
    storage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in large}
    growing = next(t for t in large if 101 in t.shape)
    assert storage[growing.untyped_storage().data_ptr()] == 101 * 5 * growing.element_size()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(
    ("train", "rows_of"),
    [
        (("x",), []),
        (("x", "up"), ["t"]),
        (("core",), ["t"]),
        (("bias",), []),
        (("down",), ["x"]),
        (("weight",), ["x"]),
    ],
)
def test_saves_only_what_the_gradients_need(
    train: tuple[str, ...], rows_of: list[str], impl: str, device: torch.device
) -> None:
    """No t without a trained core or up, no x without a trained down or weight."""
    kept: list[torch.Size] = []
    made = operands(device, m=64, train=train)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        lowrank_linear(**made, impl=impl)
    widths = {"t": 5, "x": 24}
    assert [shape for shape in kept if 64 in shape] == [(64, widths[name]) for name in rows_of]


LAUNCHES = {  # of a pass, and of a backward's shrink by itself
    "split": {"shrink_kernel": 1, "gemm_tail_kernel": 1},
    "decode": {"decode_kernel": 1},
}


@pytest.mark.parametrize("plan", LAUNCHES)
@pytest.mark.parametrize("core", CORES)
def test_launches(core: str, plan: str, device: torch.device, counted_launches) -> None:
    """At most two forward and three backward, fewer where a gradient is not needed."""
    grad = {"core_grad_kernel": 1} if core != "none" else {}
    for train, backward in (
        (("x", "core"), {**LAUNCHES[plan], **grad}),
        (("core",), {"shrink_kernel": 1, **grad}),
        (("x",), LAUNCHES[plan]),
    ):
        if core == "none" and "x" not in train:
            continue
        made = operands(device, core, train=train)
        with pinned_plan(plan):
            with counted_launches() as counts:
                y = lowrank_linear(**made, impl="triton")
            assert counts == LAUNCHES[plan]
            with counted_launches() as counts:
                y.backward(torch.randn_like(y))
            assert counts == backward


@pytest.mark.parametrize("plan", LAUNCHES)
@pytest.mark.parametrize("core", CORES)
def test_nothing_else_runs_on_the_device(core: str, plan: str, device: torch.device) -> None:
    """Beside the launches there are views and allocations, forward and backward."""
    made = operands(device, core)
    leaves = [t for t in (made["x"], made["core"]) if isinstance(t, torch.Tensor)]
    leaves += [*made["core"]] if core == "pair" else []
    dy = torch.randn(37, 20, device=device)
    with pinned_plan(plan):
        lowrank_linear(**made, impl="triton")  # the first on a stream clears its counters
        with DeviceOps() as mode, interpreter_runs_natively(mode):
            y = lowrank_linear(**made, scale=0.5, impl="triton")
            torch.autograd.grad(y, leaves, dy)
    assert mode.ran == []
    with DeviceOps() as mode:  # the mode does see what runs
        lowrank_linear(**made, scale=0.5, impl="aten")
    assert "addmm_" in mode.ran


def test_a_kernel_is_launched_where_its_operands_are(monkeypatch) -> None:
    """A model that lies on several GPUs is called with whichever is current."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or device)
    for index, expected in ((0, []), (1, [torch.device("cuda:1")])):
        on_device(SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)))
        assert entered == expected
    on_device(torch.empty(0))
    assert len(entered) == 1


@pytest.mark.parametrize("impl", FUSED)
def test_double_backward_is_refused(impl: str, device: torch.device) -> None:
    """A second differentiation says what to do instead."""
    made = operands(device, train=("x", "core"))
    y = lowrank_linear(**made, impl=impl)
    (dx,) = torch.autograd.grad(y.square().sum(), made["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice.*impl='reference' can"):
        dx.sum().backward()


@pytest.mark.parametrize("impl", EAGER)
def test_backward_twice_over_a_retained_graph(impl: str, device: torch.device) -> None:
    """Saved tensors are not written to: a second pass gives the same bits."""
    made = operands(device, "pair")
    y = lowrank_linear(**made, impl=impl)
    dy = torch.randn_like(y)
    leaves = [made["x"], *made["core"]]
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(
    "train", [(), ("x", "core"), ("x", "weight", "down", "core", "up", "bias")]
)
def test_opcheck(train: tuple[str, ...], impl: str, core: str, device: torch.device) -> None:
    """Schema, fake tensors, autograd and AOT dispatch of the library ops."""
    made = operands(device, core, train=train)
    a, b = made["core"] if core == "pair" else (made["core"], None)
    want_t = any(t is not None and t.requires_grad for t in (a, b, made["up"]))
    args = (made["x"], made["weight"], made["down"], a, b, made["up"], made["bias"])
    torch.library.opcheck(forward_op, (*args, None, 0.5, 0.0, impl, want_t))

    with torch.no_grad():
        y, t = forward_op(*args, None, 0.5, 0.0, impl, True)
    needs = [True, True, True, a is not None, b is not None, True, True]
    rest = (made["weight"], made["down"], a, b, made["up"])
    rest = tuple(None if part is None else part.detach() for part in rest)
    torch.library.opcheck(
        backward_op, (y, t, made["x"].detach(), *rest, None, 0.5, 0.0, impl, needs)
    )


@pytest.mark.parametrize("impl", EAGER)
def test_operands_are_not_written_to(impl: str, device: torch.device) -> None:
    """Forward and backward leave every operand, and dy, as it was."""
    made = operands(device, train=("x", "weight", "down", "core", "up", "bias"))
    before = {name: tensor.detach().clone() for name, tensor in made.items()}
    dy = torch.randn(37, 20, device=device)
    dy_before = dy.clone()
    lowrank_linear(**made, impl=impl).backward(dy)
    assert all(torch.equal(made[name], before[name]) for name in made)
    assert torch.equal(dy, dy_before)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_nan_and_inf_go_where_the_reference_puts_them(
    value: float, impl: str, core: str, device: torch.device
) -> None:
    """Padding turns no Inf into NaN, and no other row is touched."""
    made = operands(device, core)
    with torch.no_grad():
        made["x"][3, 7] = value
    factors = made["core"] if core == "pair" else [made["core"]] * (core != "none")
    leaves = [made["x"], *factors]
    dy = torch.randn(37, 20, device=device)
    dy[11, 2] = value
    got, expected = (
        (y := lowrank_linear(**made, impl=i), *torch.autograd.grad(y, leaves, dy))
        for i in (impl, "reference")
    )
    for ours, theirs in zip(got, expected, strict=True):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours), kind(theirs))


@pytest.mark.parametrize("impl", EAGER)
def test_bitwise_reproducible(impl: str, device: torch.device) -> None:
    """The same call gives the same bits, the split sums of the core gradient included."""
    made = operands(device, "pair", m=1500, k=16, n=16)
    dy = torch.randn(1500, 16, device=device)
    leaves = [made["x"], *made["core"]]

    def run() -> tuple[torch.Tensor, ...]:
        y = lowrank_linear(**made, impl=impl)
        return (y, *torch.autograd.grad(y, leaves, dy))

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("big", ["x", "weight"])
def test_offsets_beyond_int32(big: str, device: torch.device) -> None:
    """Rows that lie more than 2³¹ elements apart are read where they are."""
    made = operands(device, m=3, k=4, n=3, dtype=torch.float16, train=())
    rows = made[big]
    stride = 2**30 + 8
    storage = torch.empty(0, dtype=torch.float16, device=device)
    storage.untyped_storage().resize_(2 * (2 * stride + 4))  # pages are touched where written
    far = storage.as_strided(rows.shape, (stride, 1))
    far.copy_(rows)
    expected = lowrank_linear(**made, impl="triton")
    assert torch.equal(lowrank_linear(**{**made, big: far}, impl="triton"), expected)


@pytest.mark.parametrize("core", ["core", "diagonal"])
@pytest.mark.parametrize("impl", [*FUSED, "reference"])
def test_dropout(impl: str, core: str, device: torch.device) -> None:
    """On the low-rank input alone, in training alone, with one mask forward and backward."""
    made = operands(device, core, train=("x", "down", "core"))
    ones = torch.ones_like(made["x"])
    torch.manual_seed(1)
    if impl == "reference":
        mask = torch.nn.functional.dropout(ones, 0.25)
    else:
        plan = PLANS["split" if impl == "triton" else "aten"]
        seed = torch.randint(2**62, (1,), device=device)
        tiles = devices.tiles(device) if plan.ours else None
        mask = plan.masked.run(ones, Dropout(seed, 0.25), tiles) / 0.75
    assert 0.6 < (mask > 0).float().mean() < 0.9

    def dropped(**call: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return lowrank_linear(**call, impl=impl, dropout_p=0.25, training=True)

    def expected(x, weight, down, core, up, bias):
        matrix = torch.diag(core) if core.dim() == 1 else core
        low = x * mask.to(x.dtype)
        return torch.nn.functional.linear(x, weight, bias) + low @ down.t() @ matrix @ up.t()

    dy = torch.randn(37, 20, device=device)
    errors = measure(dropped, expected, made, dy)
    assert [m.name for m in errors] == ["y", "dx", "ddown", "dcore"]
    assert all(m.within for m in errors), errors
    off = lowrank_linear(**made, impl=impl, dropout_p=0.25, training=False)
    assert torch.equal(off, lowrank_linear(**made, impl=impl))


@pytest.mark.parametrize("impl", [*FUSED, "reference"])
@pytest.mark.parametrize("core", ["core", "pair", "diagonal"])
def test_autocast(core: str, impl: str, device: torch.device) -> None:
    """fp32 parameters under bf16 autocast: bf16 out, fp32 gradients, the core product in fp32."""
    made = operands(device, core)
    leaves = [made["x"], *(made["core"] if core == "pair" else [made["core"]])]
    with torch.autocast(device.type, torch.bfloat16):
        y = lowrank_linear(**made, impl=impl)
    assert y.dtype == torch.bfloat16
    dy = torch.randn_like(y)
    with torch.autocast(device.type, torch.bfloat16):  # backward under autocast too
        gradients = torch.autograd.grad(y, leaves, dy)
    assert all(g.dtype == torch.float32 for g in gradients)
    half = {name: made[name].detach().bfloat16() for name in ("x", "weight", "bias")}
    exact = lowrank_linear(**{**made, **half}, impl=impl)
    assert torch.equal(y, exact)


def test_pinned_tiles_are_launched(device: torch.device) -> None:
    """The grid follows the pinned tile, so tests that pin small tiles do cover several."""
    made = operands(device, m=100)
    with pinned_tiles(shrink=TileConfig(16, 16, 16, 4, 1)):
        small = lowrank_linear(**made, impl="triton")
    torch.testing.assert_close(small, lowrank_linear(**made, impl="triton"))
