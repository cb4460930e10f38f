"""shrink with K split over programs: its sums, their order, and the counters it leaves behind."""

import pytest
import torch
import triton

from fused_lowrank.compute.reference import Core, like, through_core
from fused_lowrank.kernels import shrink as module
from fused_lowrank.kernels.common import N_ARRIVALS, arrivals, multiprocessors
from fused_lowrank.kernels.tiles import TileConfig
from fused_lowrank.testing import measure

ROWS, DEPTH, Q = 37, 203, 20  # three row tiles; thirteen blocks of K, the last of them cut
TILE = TileConfig(16, 16, 16, 4, 1)
Result = tuple[torch.Tensor, torch.Tensor]


def operands(device: torch.device, core: str, p: int, dtype: torch.dtype) -> dict:
    """x, down, and a core in fp32."""
    made = {
        "x": torch.randn(ROWS, DEPTH, device=device).to(dtype),
        "down": (torch.randn(p, DEPTH, device=device) * DEPTH**-0.5).to(dtype),
        "core": None,
    }
    sizes = {"core": [(p, Q)], "pair": [(p, 7), (7, Q)], "none": []}[core]
    factors = tuple(torch.randn(size, device=device) * p**-0.5 for size in sizes)
    if factors:
        made["core"] = factors if core == "pair" else factors[0]
    return made


def launched(
    x: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    transposed: bool = False,
    tile: TileConfig = TILE,
) -> Result:
    """(t, u) by the kernel, without u's padding."""
    q = down.shape[0] if core is None else Q
    if transposed:
        factors = core if isinstance(core, tuple) else (core,) if core is not None else ()
        turned = tuple(factor.t().contiguous() for factor in reversed(factors))
        core = turned if isinstance(core, tuple) else turned[0] if turned else None
        down = down.t().contiguous()
    choose = lambda *_: tile  # noqa: E731
    t, u = module.shrink(x, down, core, 0.5, transposed, True, True, None, choose)
    assert not u[:, q:].any()
    return t, u[:, :q]


def expected(x: torch.Tensor, down: torch.Tensor, core: Core) -> Result:
    """(t, u) by the reference."""
    t = x @ like(down, x.dtype).t()
    return t, through_core(t, core, 0.5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("core", "p"), [("core", 20), ("pair", 40), ("none", 20), ("core", 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [1, 3, 6, 13])
def test_split_over_k(
    asked: int,
    dtype: torch.dtype,
    core: str,
    p: int,
    transposed: bool,
    device: torch.device,
    monkeypatch,
) -> None:
    """Whatever the number of programs: t and u, the counters at zero, the same bits."""
    monkeypatch.setattr(module, "splits", lambda *_: asked)
    made = operands(device, core, p, dtype)
    first = launched(**made, transposed=transposed)
    assert not arrivals(device).any()
    for i in (0, 1):
        errors = measure(
            lambda i=i, **_: first[i],
            lambda i=i, **call: expected(**call)[i],
            made,
            torch.ones(()),
        )
        assert all(m.within for m in errors), errors
    again = launched(**made, transposed=transposed)
    assert not arrivals(device).any()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a GPU has an order of its own")
def test_the_order_of_the_programs_changes_no_bit(device: torch.device, monkeypatch) -> None:
    """Parts of all row tiles come in turn, last to first."""
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(module, "splits", lambda *_: 4)
    made = operands(device, "core", 20, torch.float32)
    first = launched(**made)
    start = interpreter_builder.set_grid_idx

    def other(x: int, y: int, z: int) -> None:
        tiles, parts, _ = interpreter_builder.grid_dim
        at = tiles * parts - 1 - (x * parts + y)
        start(at % tiles, at // tiles, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", other)
    assert all(torch.equal(a, b) for a, b in zip(first, launched(**made), strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_nan_and_inf_stay_in_their_row(value: float, device: torch.device, monkeypatch) -> None:
    monkeypatch.setattr(module, "splits", lambda *_: 4)
    made = operands(device, "core", 20, torch.float32)
    made["x"][18, 100] = value
    for ours, theirs in zip(launched(**made), expected(**made), strict=True):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours), kind(theirs))


def test_splits_about_fill_the_device(device: torch.device) -> None:
    """None where the row tiles do; never less than MIN_BLOCKS of K to a program."""
    there = multiprocessors(device)
    assert there <= N_ARRIVALS
    for tiles in (1, 2, 3, there // 2, there - 1, there, there + 1, 10 * there):
        for blocks in (1, 3, 4, 7, 8, 64, 10_000):
            found = module.splits(tiles, blocks, device)
            assert 1 <= found <= module.MAX_SPLITS
            assert found == 1 or found * module.MIN_BLOCKS <= blocks
            assert found == 1 or tiles * found <= there
    assert module.splits(1, 10_000, device) == min(there, module.MAX_SPLITS)
