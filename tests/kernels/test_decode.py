"""decode: a layer of few rows in one launch, against fp64, and the counters it leaves behind."""

import itertools
from dataclasses import replace

import pytest
import torch
import triton

from fused_lowrank.compute.reference import Core, lowrank_linear_reference
from fused_lowrank.kernels import decode as module
from fused_lowrank.kernels import decode_shares
from fused_lowrank.kernels.common import N_ARRIVALS, arrivals, multiprocessors
from fused_lowrank.kernels.shrink import MAX_SPLITS, MIN_BLOCKS
from fused_lowrank.kernels.tiles import SMALL_M, TileConfig, padded
from fused_lowrank.testing import check_pooled, measure

TILE = TileConfig(16, 32, 32, 4, 1)  # of at most 16 rows
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CORES = ("core", "pair", "diagonal", "none")
Result = tuple[torch.Tensor, torch.Tensor | None]


def operands(
    device: torch.device,
    core: str = "core",
    *,
    m: int = 5,
    k: int = 139,
    n: int = 43,
    p: int = 20,
    q: int = 25,
    dtype: torch.dtype = torch.float32,
    other: torch.dtype = torch.float32,
) -> dict:
    """Operands of a call, as the forward has them: two column tiles, five blocks of K."""
    q = p if core in ("diagonal", "none") else q

    def values(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(size, device=device) * size[-1] ** -0.5).to(dtype)

    factors = {
        "core": values(p, q, dtype=other),
        "pair": (values(p, 7, dtype=other), values(7, q, dtype=other)),
        "diagonal": values(p, dtype=other) * p**0.5,
        "none": None,
    }
    return {
        "x": torch.randn(m, k, device=device).to(dtype),
        "weight": values(n, k),
        "down": values(p, k),
        "core": factors[core],
        "up": values(n, q),
        "bias": values(n),
    }


def turned(factor: Core) -> Core:
    """A factor as a transposed call takes it."""
    if isinstance(factor, tuple):
        return tuple(part.t().contiguous() for part in reversed(factor))
    return None if factor is None else factor.t().contiguous()


def launched(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    transposed: bool = False,
    want_t: bool = True,
    tile: TileConfig = TILE,
) -> Result:
    """(y, t) by the kernel, which leaves its counters at zero."""
    if transposed:
        down, core, up = turned(down), turned(core), turned(up)
    # As many rows as hold them, as `select` does.
    choose = lambda spec, m: TileConfig(  # noqa: E731
        max(tile.block_m, min(padded(m), SMALL_M)), tile.block_n, tile.block_k, 4, tile.num_stages
    )
    result = module.decode(x, weight, down, core, up, bias, 0.5, transposed, want_t, choose)
    assert not arrivals(x.device).any()
    return result


def check(made: dict, **how: object) -> list:
    """y and t are within the budget; what was measured."""
    low = {name: made[name] for name in ("x", "down")}
    y = measure(
        lambda **call: launched(**call, **how)[0],
        lambda **call: lowrank_linear_reference(**call, scale=0.5),
        made,
        torch.ones(()),
    )
    t = measure(
        lambda **call: launched(**{**made, **call}, **how)[1],
        lambda x, down: x @ down.to(x.dtype).t(),
        low,
        torch.ones(()),
    )
    assert all(m.within for m in y + t), y + t
    return y + t


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("asked", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget(
    dtype: torch.dtype, asked: int, core: str, transposed: bool, device: torch.device, monkeypatch
) -> None:
    """Of one program to a column tile, and of several, the last of which has less to do."""
    monkeypatch.setattr(module, "splits", lambda *_: asked)
    measured = []
    for other, m in ((dtype, 5), (torch.float32, 33)):
        made = operands(device, core, m=m, dtype=dtype, other=other)
        measured += check(made, transposed=transposed)
    check_pooled(measured)


@pytest.mark.parametrize(
    "sizes",
    [
        {"m": 1, "k": 1, "n": 1, "p": 1, "q": 1},
        {"m": 64, "k": 96, "n": 64, "p": 16, "q": 32},
        {"p": 150, "q": 3},
        {"p": 3, "q": 150},
        {"p": 256, "q": 256},
        {"k": 64, "n": 301},
        {"k": 700, "n": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(dtype: torch.dtype, sizes: dict, device: torch.device) -> None:
    """With as many programs as the device asks for."""
    check(operands(device, dtype=dtype, **sizes))


@pytest.mark.parametrize("asked", [1, 4])
@pytest.mark.parametrize("layout", ["column-major", "sliced", "broadcast"])
@pytest.mark.parametrize("name", ["x", "weight"])
def test_strides(name: str, layout: str, asked: int, device: torch.device, monkeypatch) -> None:
    """x and W are read where they lie."""
    monkeypatch.setattr(module, "splits", lambda *_: asked)
    made = operands(device, dtype=torch.bfloat16)
    rows = made[name]
    if layout == "broadcast":
        made[name] = rows[:1].expand(rows.shape)
    else:
        wide = torch.full((rows.shape[0], 2 * rows.shape[1] + 3), torch.nan, device=device)
        wide = wide.to(rows.dtype)[:, 2:-1:2] if layout == "sliced" else rows.t().contiguous().t()
        made[name] = wide.copy_(rows)
    expected = launched(**{**made, name: made[name].contiguous()})
    assert all(torch.equal(*pair) for pair in zip(launched(**made), expected, strict=True))


@pytest.mark.parametrize("asked", [1, 4])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_nan_and_inf_go_where_the_reference_puts_them(
    value: float, core: str, asked: int, device: torch.device, monkeypatch
) -> None:
    """Padding turns no Inf into NaN, and no other row is touched."""
    monkeypatch.setattr(module, "splits", lambda *_: asked)
    made = operands(device, core)
    made["x"][3, 70] = value
    y, t = launched(**made)
    expected = lowrank_linear_reference(**made, scale=0.5), made["x"] @ made["down"].t()
    for ours, theirs in zip((y, t), expected, strict=True):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours), kind(theirs))


@pytest.mark.parametrize("asked", [1, 4])
def test_the_same_bits_whatever_else_is_wanted(
    asked: int, device: torch.device, monkeypatch
) -> None:
    """Again, and without t; bias is added once."""
    monkeypatch.setattr(module, "splits", lambda *_: asked)
    made = operands(device, p=150, dtype=torch.bfloat16)
    y, t = launched(**made)
    again = launched(**made)
    assert torch.equal(y, again[0])
    assert torch.equal(t, again[1])
    other, none = launched(**made, want_t=False)
    assert none is None
    assert torch.equal(y, other)
    check({**made, "bias": None})


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a GPU has an order of its own")
def test_no_order_of_the_programs_is_assumed(device: torch.device, monkeypatch) -> None:
    """Started last to first, those that make u still hold the first tickets: nobody waits."""
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(module, "splits", lambda *_: 4)
    made = operands(device)
    y, t = launched(**made)
    start = interpreter_builder.set_grid_idx
    monkeypatch.setattr(
        interpreter_builder,
        "set_grid_idx",
        lambda x, *rest: start(interpreter_builder.grid_dim[0] - 1 - x, *rest),
    )
    again = launched(**made)
    assert torch.equal(y, again[0])
    assert torch.equal(t, again[1])


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a GPU has an order of its own")
def test_tiles_do_not_meet_each_other(device: torch.device, monkeypatch) -> None:
    """The slices of the two tiles arrive in turn, as they do where programs run side by side; so do
    those of x·downᵀ before them, and the rows of u.
    """
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(module, "splits", lambda *_: 4)
    monkeypatch.setattr(module, "lows", lambda *_: 5)
    made = operands(device, m=33)
    y, t = launched(**made)
    # Five slices of a block, three groups of rows, three slices of two blocks at most to a tile.
    tickets = (3, 4, 0, 2, 1, 6, 5, 7, 11, 10, 12, 8, 9, 13)
    start = interpreter_builder.set_grid_idx

    def dealt(x: int, *rest: int) -> None:
        assert interpreter_builder.grid_dim[0] == len(tickets)
        arrivals(device)[module.TICKETS.value] = tickets[x]
        start(x, *rest)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", dealt)
    again = launched(**made)
    assert torch.equal(y, again[0])
    assert torch.equal(t, again[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_launch(dtype: torch.dtype, device: torch.device, counted_launches) -> None:
    made = operands(device, dtype=dtype)
    with counted_launches() as counts:
        launched(**made)
    assert counts == {"decode_kernel": 1}


def test_more_rows_than_a_tile_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="65 rows"):
        launched(**operands(device, m=65))


def test_programs_fill_the_device_about_twice(device: torch.device) -> None:
    """No more than that if K is split; never less than MIN_BLOCKS of K to a program."""
    there = multiprocessors(device)
    for tiles, blocks in itertools.product((1, 2, 5, there, 3 * there, 50 * there), (1, 7, 8, 999)):
        lows = module.lows(tiles, blocks, device)
        found = module.splits(tiles, blocks, lows + 1, device)
        for shares in (lows, found):
            assert 1 <= shares <= MAX_SPLITS
            assert shares == 1 or shares * MIN_BLOCKS <= blocks
        assert found == 1 or tiles * found + lows + 1 <= 2 * there
        assert found == 1 or tiles + module.TILES.value <= N_ARRIVALS


def test_the_shares_of_a_hopper(device: torch.device, monkeypatch) -> None:
    """Of 132 multiprocessors, at 64 rows: two programs to each, those that make u among them."""
    monkeypatch.setattr(decode_shares, "multiprocessors", lambda _: 132)
    for n, k, expected in (
        (4096, 4096, (4, 4)),
        (14336, 4096, (4, 1)),
        (4096, 14336, (4, 4)),
        (1024, 4096, (8, 15)),
    ):
        tiles, blocks = n // 64, k // 64
        lows = module.lows(tiles, blocks, device)
        assert (lows, module.splits(tiles, blocks, lows + 4, device)) == expected


@pytest.mark.parametrize("m", [1, 16, 17, 64])
def test_u_is_made_by_several_programs(m: int, device: torch.device, monkeypatch) -> None:
    """16 rows to each; of rows with cores of their own as few as 8 programs have."""
    monkeypatch.setattr(module, "lows", lambda *_: 3)
    grids = []
    original = module.Launch

    def noted(kernel, grid, *args, **keywords):
        grids.append((grid, keywords["numbers"], keywords["constants"]))
        return original(kernel, grid, *args, **keywords)

    monkeypatch.setattr(module, "Launch", noted)
    check(operands(device, m=m))
    for grid, numbers, values in grids:
        assert (numbers["lows"], numbers["makers"]) == (3, -(-m // 16))
        assert grid == (3 + numbers["makers"] + 2 * numbers["splits"],)
        assert values["BLOCK_T"] == 16
    of = [module.constants(p, p, 0, 64, False, False, False, True, 1, TILE) for p in (16, 64)]
    of += [
        module.constants(p, p, 0, 64, False, False, False, True, 1, replace(TILE, block_m=64))
        for p in (16, 64)
    ]
    assert [values["BLOCK_T"] for values in of] == [16, 2, 16, 8]
