"""Diagonal cores: one for each row, in compiled graphs, in keys of launches and on paper.

As one core of a call they are in the tests of calls: test_ops.py, test_numerics.py, test_plans.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planner_cases import at
from torch import Tensor

from fused_lowrank import functional, lowrank_linear
from fused_lowrank.compute import choose, costs, devices, measured
from fused_lowrank.compute.operands import Operands, problem_of
from fused_lowrank.compute.plans import PLANS
from fused_lowrank.compute.reference import NONE, SLOT_BITS, RowCores
from fused_lowrank.kernels import core_grad, core_grad_rows, decode, launch, relay, shrink
from fused_lowrank.testing import pinned_plan

K, N, SLOTS = 23, 19, 4
WAYS = ["reference", "aten", "split", "decode"]  # implementations, and plans of the kernels


def rows_of(table: Tensor, lines: list[list[int]], repeat: int, weighted: bool) -> RowCores:
    """The core of each row: those of `lines`, slots or NONE, for `repeat` rows each."""
    device = table.device
    made = torch.Generator(device).manual_seed(len(lines))
    generations = torch.arange(1, SLOTS + 1, dtype=torch.int32, device=device)
    handles = [[s if s == NONE else s + (s + 1 << SLOT_BITS) for s in line] for line in lines]
    weights = torch.rand(len(lines), len(lines[0]), generator=made, device=device) - 0.5
    return RowCores(
        table,
        None,
        torch.tensor(handles, device=device),
        weights if weighted else None,
        0.5 + torch.rand(SLOTS, generator=made, device=device),
        generations,
        torch.zeros(1, dtype=torch.int32, device=device),
        repeat,
    )


def operands(
    device: torch.device, lines: list[list[int]], *, r: int, dtype: torch.dtype, repeat: int = 3
) -> Operands:
    """Operands of a call with a diagonal for each row; x and the table require a gradient."""
    made = torch.Generator(device).manual_seed(r)

    def values(*size: int) -> Tensor:
        tensor = torch.randn(size, generator=made, device=device, dtype=torch.float64) / 2
        return tensor.to(dtype)

    x = values(len(lines) * repeat, K).requires_grad_()
    core = rows_of(values(SLOTS, r).requires_grad_(), lines, repeat, len(lines[0]) > 1)
    return Operands(x, values(N, K), values(r, K), core, values(N, r), values(N), 0.5)


def step(given: Operands, way: str, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, the gradient of the table) by an implementation, or by a plan of the kernels."""
    ours = way in PLANS and PLANS[way].ours
    call = functional.prepared(given)
    if ours:
        with pinned_plan(way):
            y = functional.compute(call, "triton")
            return y.detach(), *torch.autograd.grad(y, (given.x, given.core.table), dy)
    y = functional.compute(call, way)
    return y.detach(), *torch.autograd.grad(y, (given.x, given.core.table), dy)


def materialised(given: Operands, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by matrices, a row at a time."""
    x, weight, down, core, up, bias, scale, *_ = given
    y = []
    for m, row in enumerate(x):
        line = m // core.repeat
        whole = weight
        for j, handle in enumerate(core.handles[line].tolist()):
            if handle != NONE:
                slot = handle & (1 << SLOT_BITS) - 1
                factor = scale * core.scales[slot].double()
                factor *= 1.0 if core.weights is None else core.weights[line, j].double()
                whole = whole + factor * up @ torch.diag(core.table[slot]) @ down
        y.append(whole @ row + bias)
    y = torch.stack(y) + 0.0 * core.table.sum()  # which may be in no row
    return y.detach(), *torch.autograd.grad(y, (x, core.table), dy)


@pytest.mark.parametrize("r", [5, 16, 77])
@pytest.mark.parametrize(
    "lines",
    [
        [[0], [3], [0], [1]],
        [[NONE], [2], [NONE]],
        [[0, 1], [NONE, 3], [2, 2], [NONE, NONE]],
        [[NONE]],
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.skipif(not devices.interpreted(), reason="the compiled kernels have no fp64")
def test_rows_with_diagonals_are_materialised_ones(
    way: str, lines: list[list[int]], r: int, device: torch.device
) -> None:
    """y, dx and the gradients of the table in float64: mixtures, none, a rank above a block."""
    given = operands(device, lines, r=r, dtype=torch.float64)
    dy = torch.randn(len(given.x), N, dtype=torch.float64, device=device)
    got = step(given, way, dy)
    assert got[2].shape == (SLOTS, r)
    for ours, expected in zip(got, materialised(given, dy), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    assert not given.core.refused.any()


@pytest.mark.parametrize("way", WAYS)
def test_a_handle_of_another_time_reads_no_diagonal(way: str, device: torch.device) -> None:
    """Its row is the bare layer's, it is seen, and NaN in its slot goes nowhere."""
    given = operands(device, [[0], [1], [2]], r=5, dtype=torch.float32, repeat=2)
    with torch.no_grad():
        given.core.table[1] = torch.nan
    given.core.generations[1] += 1
    dy = torch.ones(6, N, device=device)
    y, dx, grad = step(given, way, dy)
    bare = torch.nn.functional.linear(given.x, given.weight, given.bias)
    torch.testing.assert_close(y[2:4], bare[2:4].detach())
    assert all(tensor.isfinite().all() for tensor in (y, dx, grad))
    assert not grad[1].any()
    assert given.core.refused.item() == 1


def bits(tensor: Tensor) -> Tensor:
    """The bits, in which NaN equals NaN."""
    return tensor.detach().contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_a_row_is_kept_from_the_others(way: str, dtype: torch.dtype, device: torch.device) -> None:
    """Its y, dx and its adapter's gradient have the same bits beside NaN in all others."""
    lines = [[i % SLOTS] for i in range(12)]
    given = operands(device, lines, r=16, dtype=dtype)
    dy = torch.randn(36, N, device=device).to(dtype)
    before = step(given, way, dy)
    mine = torch.tensor([line == [1] for line in lines], device=device).repeat_interleave(3)
    for poison in (torch.nan, torch.inf):
        x = given.x.detach().masked_fill(~mine[:, None], poison).requires_grad_()
        table = given.core.table.detach().clone()
        table[[0, 2, 3]] = poison
        core = given.core._replace(table=table.requires_grad_())
        spoiled = dy.masked_fill(~mine[:, None], poison)
        y, dx, grad = step(given._replace(x=x, core=core), way, spoiled)
        assert torch.equal(bits(y[mine]), bits(before[0][mine]))
        assert torch.equal(bits(dx[mine]), bits(before[1][mine]))
        assert torch.equal(bits(grad[1]), bits(before[2][1]))
        assert y[~mine].isnan().all()


def test_the_gradient_of_a_diagonal_keeps_numbers_apart(device: torch.device) -> None:
    """It is no product of matrices: NaN in one column of t and g reaches one number of it."""
    for name, impl in (("aten", "aten"), ("split", "triton")):
        x = torch.randn(70, K, device=device)
        down = torch.randn(16, K, device=device)
        down[3] = torch.nan
        core = torch.ones(16, device=device, requires_grad=True)
        up = torch.randn(N, 16, device=device)
        with pinned_plan(name):
            y = lowrank_linear(x, torch.randn(N, K, device=device), down, core, up, impl=impl)
            (grad,) = torch.autograd.grad(y, core, torch.ones_like(y))
        assert grad.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_a_diagonal_compiles(impl: str, device: torch.device) -> None:
    """Without a break, for several numbers of rows, beside a matrix of the same numbers."""
    torch._dynamo.reset()
    kernels = impl == "triton" and device.type == "cuda"
    dtype = torch.float32 if kernels else torch.float64

    def values(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    weight, down, up = values(N, K), values(6, K), values(N, 6)
    core = values(6).requires_grad_()
    compiled = torch.compile(lowrank_linear, fullgraph=True)
    for m in (5, 9, 11):
        x, dy = values(m, K).requires_grad_(), values(m, N)
        y = compiled(x, weight, down, core, up, scale=0.5, impl=impl)
        got = y, *torch.autograd.grad(y, (x, core), dy)
        expected = lowrank_linear(x, weight, down, torch.diag(core), up, scale=0.5, impl="aten")
        expected = expected, *torch.autograd.grad(expected, (x, core), dy)
        tolerances = {} if kernels else {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(got, expected, **tolerances)


# --- launches ---


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The keys of launches, none of which is made."""
    seen: list[Any] = []

    def planned(*args: Any) -> Any:
        return lambda key, *rest: seen.append(key) or [None] * 3

    def rows_planned(*args: Any) -> Any:
        return lambda key, *rest: seen.append(key) or [None]

    monkeypatch.setattr(launch, "POSSIBLE", True)
    for module in (shrink, core_grad):
        monkeypatch.setattr(module, "planned", planned)
    for module in (decode, relay):
        monkeypatch.setattr(module, "planned", lambda *a: lambda key, *r: (seen.append(key), None))
    monkeypatch.setattr(core_grad_rows, "planned", rows_planned)
    return seen


@pytest.mark.cpu("tensors without values")
def test_a_launch_of_a_diagonal_is_no_other(keys: list[Any]) -> None:
    """Of all kinds of cores and all kernels, where as many as can be have the same sizes."""
    r = SLOTS
    x, weight, factor = torch.empty(r, r), torch.empty(r, r), torch.empty(r, r)
    by_row = rows_of(torch.empty(r, r), [[0]] * r, 1, False)
    cores = [None, torch.empty(r), factor, (factor, factor), by_row]
    cores += [by_row._replace(table=torch.empty(r, r, r))]
    cores += [by_row._replace(table=torch.empty(r, r, r), right=torch.empty(r, r, r))]
    choice = lambda spec, m: None  # noqa: E731
    for core in cores:
        shrink.shrink(x, factor, core, 1.0, False, True, True, None, choice)
        for whole in (decode.decode, relay.relay):
            whole(x, weight, factor, core, factor, None, 1.0, False, True, choice)
        if isinstance(core, RowCores):
            if core.right is None:
                core_grad_rows.core_grad_rows(x, x, core, 1.0, choice)
        elif core is not None:
            core_grad.core_grad(x, x, core, 1.0, (True, True), choice)
    assert len(keys) == 3 * 7 + 2 + 3
    assert None not in keys
    assert len(set(keys)) == len(keys)


# --- on paper ---


def test_a_problem_says_that_its_cores_are_diagonals(device: torch.device) -> None:
    """Of one core, and of one for each row; files of measured times have a name of their own."""
    given = operands(device, [[0], [1]], r=5, dtype=torch.float32)
    one = given._replace(core=given.core.table[0])
    matrix = given._replace(core=torch.diag(one.core))
    several = given._replace(core=given.core._replace(table=torch.empty(SLOTS, 5, 5)))
    said = [problem_of(each, False).diagonal for each in (given, one, matrix, several)]
    assert said == [True, True, False, False]
    assert problem_of(one.of_backward(torch.empty(6, N)), False).diagonal
    assert measured.name_of(at()) + " diagonal" == measured.name_of(at(diagonal=True))


def test_a_diagonal_costs_less_on_paper() -> None:
    """Where each row reads its own it is r numbers, not r²; no plan is below the floor."""
    for by_row in (False, True):
        matrix, diagonal = (at(rank=64, by_row=by_row, diagonal=d) for d in (False, True))
        for name in ("aten", "split", "decode"):
            cost, less = (choose.predict(PLANS[name], p) for p in (matrix, diagonal))
            assert less.operations < cost.operations
            assert (less.bytes < cost.bytes) == by_row
            assert less.operations >= costs.least(diagonal).operations
            assert less.bytes >= costs.least(diagonal).bytes
