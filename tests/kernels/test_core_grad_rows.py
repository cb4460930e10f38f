"""core_grad_rows: the gradients of a bank's cores, against those of the reference."""

import pytest
import torch
import triton
from torch import Tensor

from fused_lowrank.compute.reference import NONE, SLOT_BITS, RowCores, through_rows
from fused_lowrank.kernels import core_grad_rows as module
from fused_lowrank.kernels.common import arrivals, multiprocessors
from fused_lowrank.kernels.tiles import TileConfig
from fused_lowrank.testing import measure

SLOTS, ENTRIES, REPEAT = 4, 17, 3
TILE = TileConfig(16, 16, 16, 4, 1)


def operands(
    device: torch.device, dtype: torch.dtype, k: int = 1, weighted: bool = False
) -> tuple[Tensor, Tensor, RowCores]:
    """t, g and cores; some handles are refused, some entries have no adapter, no row has slot 1."""
    slots = torch.randint(0, SLOTS, (ENTRIES, k), device=device)
    generations = torch.arange(SLOTS, dtype=torch.int32, device=device) + 2**30
    handles = (generations[slots].long() << SLOT_BITS | slots).where(slots != 1, NONE)
    handles[3] = NONE
    handles[4, 0] = (7 << SLOT_BITS) + 2  # of another generation
    handles[5, 0] = (2**30 << SLOT_BITS) + SLOTS
    core = RowCores(
        torch.randn(SLOTS, 20, 25, device=device),
        None,
        handles,
        torch.rand(ENTRIES, k, device=device) if weighted else None,
        torch.rand(SLOTS, device=device) + 0.5,
        generations,
        torch.zeros(1, dtype=torch.int32, device=device),
        REPEAT,
    )
    t, g = (torch.randn(ENTRIES * REPEAT, n, device=device).to(dtype) for n in (20, 25))
    return t, g, core


def launched(t: Tensor, g: Tensor, core: RowCores) -> Tensor:
    """dcore by the kernel, in several tiles."""
    dcore = module.core_grad_rows(t, g, core, 0.5, lambda *_: TILE)
    assert not arrivals(t.device).any()
    return dcore


def by_autograd(x: Tensor, g: Tensor, core: RowCores) -> Tensor:
    """The gradient of the table for u's gradient g; x is t, as `measure` names it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    table = core.table.to(wide).requires_grad_()
    scales = core.scales.to(wide)
    u = through_rows(x.to(wide), core._replace(table=table, scales=scales), 0.5)
    return torch.autograd.grad(u, table, g.to(wide))[0]


@pytest.mark.parametrize("asked", [1, 4])
@pytest.mark.parametrize(("k", "weighted"), [(1, False), (1, True), (2, True), (3, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_core_grad(
    dtype: torch.dtype, k: int, weighted: bool, asked: int, device: torch.device, monkeypatch
) -> None:
    """By adapter, in several tiles; an adapter without rows gets zeros, whatever its scale."""
    monkeypatch.setattr(module, "splits", lambda *_: asked)
    t, g, core = operands(device, dtype, k, weighted)
    core.scales[1] = torch.nan

    def ours(x: Tensor, g: Tensor) -> Tensor:
        return launched(x, g, core)

    def reference(x: Tensor, g: Tensor) -> Tensor:
        kept = core._replace(scales=core.scales.nan_to_num())
        if x.dtype == torch.float64:
            kept = kept._replace(table=kept.table.double())
        return by_autograd(x, g, kept)

    made = {"x": t, "g": g}
    if dtype != torch.float64:  # in which the truth has errors of the same size
        measured = measure(ours, reference, made, torch.ones(()))
        assert all(m.within for m in measured), measured
    dcore, expected = ours(**made), reference(**made)
    if dtype != torch.bfloat16 or (k == 1 and not weighted):  # products are exact in bfloat16
        # Each is off by the unit roundoff for each sum and each factor, times absolute values.
        operations, unit = ENTRIES * REPEAT * k + 5, torch.finfo(dcore.dtype).eps / 2
        sizes = reference(t.double().abs(), g.double().abs())
        assert ((dcore - expected).abs() <= 2 * operations * unit * sizes).all()
    assert dcore[0].any()
    assert not dcore[1].any()
    assert torch.equal(dcore, ours(**made))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a GPU has an order of its own")
def test_the_order_of_the_programs_changes_no_bit(device: torch.device, monkeypatch) -> None:
    """Parts of all adapters and tiles come in turn, last to first."""
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(module, "splits", lambda *_: 4)
    made = operands(device, torch.float32)
    first = launched(*made)
    start = interpreter_builder.set_grid_idx

    def other(x: int, y: int, z: int) -> None:
        slots, tiles, parts = interpreter_builder.grid_dim
        assert parts > 1
        at = slots * tiles * parts - 1 - ((x * tiles + y) * parts + z)
        start(at % slots, at // slots % tiles, at // slots // tiles)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", other)
    assert torch.equal(first, launched(*made))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("asked", [1, 4])
def test_another_adapters_rows_do_not_reach_a_gradient(
    asked: int, k: int, device: torch.device, monkeypatch
) -> None:
    """Nor do those without one: NaN in their t, g and weights changes no bit."""
    monkeypatch.setattr(module, "splits", lambda *_: asked)
    t, g, core = operands(device, torch.bfloat16, k, weighted=k > 1)

    def dcore() -> Tensor:
        return launched(t, g, core)

    before = dcore()
    slots, valid = (part.t() for part in core.slots())
    mine = (slots == 2) & valid
    others = ~mine.any(1)
    assert 0 < others.sum() < len(others)
    for rows in (t, g):
        rows.view(len(others), core.repeat, -1)[others] = torch.nan
    if core.weights is not None:
        core.weights[~mine] = torch.nan
    core.scales[[0, 1, 3]] = torch.nan
    assert torch.equal(dcore()[2], before[2])
    assert not dcore()[1].any()


def test_core_grad_is_one_launch(device: torch.device, counted_launches) -> None:
    """On a negative generation, too, which no handle has."""
    t, g, core = operands(device, torch.float32)
    core.generations[2] = -5
    core.handles[9:12] = (-5 << SLOT_BITS) + 2
    with counted_launches() as counts:
        dcore = launched(t, g, core)
    assert counts == {"core_grad_rows_kernel": 1}
    assert not dcore[2].any()
    assert dcore[0].any()


def test_splits_of_core_grad_about_fill_the_device(device: torch.device) -> None:
    there = multiprocessors(device)
    for tiles in (1, 2, there, there + 1, 10 * there):
        for m in (1, 256, 257, 10**6):
            found = module.splits(tiles, m, device)
            assert 1 <= found <= module.MAX_SPLITS
            assert found == 1 or (tiles * found <= there and found <= -(-m // 256))
    assert module.splits(1, 10**6, device) == min(there, module.MAX_SPLITS)
