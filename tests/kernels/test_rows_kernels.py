"""shrink and decode with a core for each row, against fp64; rows do not meet."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_lowrank.compute.reference import (
    NONE,
    SLOT_BITS,
    RowCores,
    lowrank_linear_reference,
    through_rows,
)
from fused_lowrank.kernels import decode as decode_module
from fused_lowrank.kernels import launch
from fused_lowrank.kernels import shrink as shrink_module
from fused_lowrank.kernels.common import arrivals
from fused_lowrank.kernels.tiles import TileConfig, padded
from fused_lowrank.testing import check_pooled, measure

SLOTS = 5
TILE = TileConfig(16, 32, 32, 4, 1)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Operands = dict[str, Tensor | None]


def choose(spec: object, m: int) -> TileConfig:
    """Tiles of 16 rows, or as many as decode needs."""
    return TileConfig(max(16, padded(m)), 32, 32, 4, 1) if spec.kernel == "decode" else TILE


def operands(
    device: torch.device,
    r: int = 0,
    *,
    entries: int = 11,
    repeat: int = 1,
    k: int = 1,
    weighted: bool = False,
    p: int = 20,
    q: int = 25,
    dtype: torch.dtype = torch.float32,
    other: torch.dtype = torch.float32,
) -> tuple[Operands, Callable[..., RowCores]]:
    """Operands of a layer; what makes `RowCores` of those named table, right, weights and scales.

    The handles are random; the last slot, no adapter and each kind of refused handle occur.
    """

    def values(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, device=device) * size[-1] ** -0.5).to(dtype)

    made: Operands = {
        "x": torch.randn(entries * repeat, 139, device=device).to(dtype),
        "weight": values(43, 139),
        "down": values(p, 139),
        "table": values(SLOTS, p, r or q, dtype=other),
        "right": values(SLOTS, r, q, dtype=other) if r else None,
        "weights": torch.rand(entries, k, device=device) if weighted else None,
        "scales": torch.rand(SLOTS, device=device) + 0.5,
        "up": values(43, q),
        "bias": values(43),
    }
    generations = torch.arange(SLOTS, dtype=torch.int32, device=device) + 2**30
    slots = torch.randint(0, SLOTS, (entries, k), device=device)
    slots[0] = SLOTS - 1
    handles = generations[slots].long() << SLOT_BITS | slots
    handles[3] = NONE
    handles[4, 0] += 1 << SLOT_BITS  # of another generation
    handles[5, -1] += SLOTS  # outside
    handles[6, 0] = handles[6, 0] | -(2**63)
    handles[7, -1] = NONE

    def rows(
        table: Tensor, right: Tensor | None, weights: Tensor | None, scales: Tensor
    ) -> RowCores:
        refused = torch.zeros(1, dtype=torch.int32, device=device)
        scales = scales.to(torch.promote_types(table.dtype, torch.float32))
        return RowCores(table, right, handles, weights, scales, generations, refused, repeat)

    return made, rows


def by_kernel(
    rows: Callable[..., RowCores], plan: str, transposed: bool = False, keep: list | None = None
) -> Callable[..., Tensor]:
    """A call of a kernel, or of two, for y; its t and RowCores go into `keep`."""

    def call(x, weight, down, table, right, weights, scales, up, bias):
        core = rows(table, right, weights, scales)
        if transposed:  # as the backward has it: the factors turned, the bank as it is
            down, up = down.t().contiguous(), up.t().contiguous()
            turned = core.turned()
            core = core._replace(
                table=turned.table.contiguous(),
                right=None if right is None else turned.right.contiguous(),
            )
        if plan == "decode":
            y, t = decode_module.decode(
                x, weight, down, core, up, bias, 0.5, transposed, True, choose
            )
        else:
            t, u = shrink_module.shrink(x, down, core, 0.5, transposed, True, True, None, choose)
            q = (table if right is None else right).shape[-1]
            assert not u[:, q:].any()
            y = u[:, :q]
        assert not arrivals(x.device).any()
        if keep is not None:
            keep[:] = t, core
        return y

    return call


def by_reference(rows: Callable[..., RowCores], plan: str) -> Callable[..., Tensor]:
    def call(x, weight, down, table, right, weights, scales, up, bias):
        core = rows(table, right, weights, scales)
        if plan == "decode":
            return lowrank_linear_reference(x, weight, down, core, up, bias, scale=0.5)
        return through_rows(x @ down.to(x.dtype).t(), core, 0.5)

    return call


def check(
    made: Operands, rows: Callable[..., RowCores], plan: str, transposed: bool = False
) -> list:
    keep: list = []
    measured = measure(
        by_kernel(rows, plan, transposed, keep), by_reference(rows, plan), made, torch.ones(())
    )
    assert all(m.within for m in measured), measured
    t, core = keep
    expected = made["x"].double() @ made["down"].double().t()
    assert torch.allclose(t.double(), expected, rtol=0.02, atol=0.02)
    assert core.refused.item() == 1
    return measured


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("r", [0, 7])
@pytest.mark.parametrize("plan", ["shrink", "decode"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget(
    dtype: torch.dtype, plan: str, r: int, transposed: bool, device: torch.device, monkeypatch
) -> None:
    """By one program and by several, an entry for each row and for three, one core and mixtures."""
    module = decode_module if plan == "decode" else shrink_module
    measured = []
    for asked, other, shape in (
        (1, dtype, {}),
        (3, torch.float32, {"repeat": 3, "k": 2, "weighted": True}),
        (1, torch.float32, {"k": 3}),
    ):
        monkeypatch.setattr(module, "splits", lambda *_, asked=asked: asked)
        made, rows = operands(device, r, dtype=dtype, other=other, **shape)
        measured += check(made, rows, plan, transposed)
    check_pooled(measured)


@pytest.mark.parametrize(
    "sizes",
    [
        {"p": 1, "q": 1, "entries": 8},
        {"p": 16, "q": 64, "r": 16},
        {"p": 150, "q": 3, "k": 2},
        {"p": 3, "q": 150, "r": 1},
        {"p": 256, "q": 256, "r": 3, "entries": 8},
        {"p": 64, "q": 64, "entries": 8, "repeat": 8},
        {"p": 17, "q": 33, "r": 257, "entries": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("plan", ["shrink", "decode"])
def test_sizes(plan: str, sizes: dict, device: torch.device) -> None:
    check(*operands(device, dtype=torch.bfloat16, other=torch.float32, **sizes), plan)


@pytest.mark.parametrize("other", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [0, 7])
def test_fp64(r: int, other: torch.dtype, device: torch.device) -> None:
    """To an error that float32 would not have."""
    made, rows = operands(device, r, k=2, dtype=torch.float64, other=other)
    y = by_kernel(rows, "shrink")(**made)
    for name in ("table", "right"):
        made[name] = made[name] if made[name] is None else made[name].double()
    assert torch.allclose(y, by_reference(rows, "shrink")(**made), rtol=1e-13, atol=1e-13)


def test_dropout(device: torch.device) -> None:
    made, rows = operands(device, dtype=torch.float64, other=torch.float64)
    core = rows(*(made[name] for name in ("table", "right", "weights", "scales")))
    dropout = torch.tensor([7], device=device), 0.5
    call = made["x"], made["down"], core, 0.5, False, True, True
    t, u = shrink_module.shrink(*call, dropout, choose)
    assert not torch.allclose(t, shrink_module.shrink(*call, None, choose)[0])
    assert torch.allclose(u[:, :25], through_rows(t, core, 0.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", [0, 7])
@pytest.mark.parametrize("plan", ["shrink", "decode"])
def test_a_row_keeps_its_bits_whatever_the_others_are(
    plan: str, r: int, device: torch.device
) -> None:
    """Their x, their handles and weights, the adapters that are not its own: all NaN or others."""
    entry, repeat = 8, 3
    shape = {"k": 2, "repeat": repeat, "weighted": True}
    made, rows = operands(device, r, dtype=torch.bfloat16, other=torch.float32, **shape)
    before = rows(*(made[name] for name in ("table", "right", "weights", "scales")))
    mine = before.slots()[0][:, entry]
    others = torch.arange(len(before.handles), device=device) != entry
    changed = {name: value if value is None else value.clone() for name, value in made.items()}
    changed["x"].view(-1, repeat, 139)[others] = torch.nan
    changed["weights"][others] = torch.nan
    foreign = torch.ones(SLOTS, dtype=torch.bool, device=device).index_fill(0, mine, False)
    assert foreign.any()
    for name in ("table", "right", "scales"):
        if changed[name] is not None:
            changed[name][foreign] = torch.nan
    own = slice(entry * repeat, (entry + 1) * repeat)
    y = by_kernel(rows, plan)(**made)[own]
    assert y.isfinite().all()

    for handle in (NONE, before.handles[entry, 0], 2**62, before.handles[0, 0]):

        def elsewhere(*parts: Tensor, handle: int = handle) -> RowCores:
            core = rows(*parts)
            entries = core.handles.clone()
            entries[others] = handle
            return core._replace(handles=entries)

        assert torch.equal(by_kernel(elsewhere, plan)(**changed)[own], y)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("r", [0, 7])
@pytest.mark.parametrize("plan", ["shrink", "decode"])
def test_nan_and_inf_go_where_the_reference_puts_them(
    plan: str, r: int, value: float, device: torch.device
) -> None:
    """Padding turns no Inf into NaN."""
    made, rows = operands(device, r)
    made["x"][1, 70] = value
    for name in ("table", "right"):  # of one sign: sums of Inf that are no NaN
        made[name] = made[name] if made[name] is None else made[name].abs()
    made["down"].abs_()
    y, expected = (call(rows, plan)(**made) for call in (by_kernel, by_reference))
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(y), kind(expected))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("plan", ["shrink", "decode"])
def test_a_row_without_an_adapter_has_the_bits_of_a_zero_core(
    plan: str, k: int, device: torch.device
) -> None:
    """Though all adapters are NaN; and u is zero though its t is NaN."""
    made, rows = operands(device, k=k, dtype=torch.bfloat16)
    made["table"].fill_(torch.nan)
    made["scales"].fill_(torch.inf)
    zero = torch.zeros(made["table"].shape[1:], dtype=torch.bfloat16, device=device)
    y = by_kernel(rows, plan)(**made)
    shared = [made["x"], made["down"], zero]
    if plan == "decode":
        shared[1:1] = [made["weight"]]
        call = (*shared, made["up"], made["bias"], 0.5, False, True, choose)
        expected = decode_module.decode(*call)[0]
    else:
        call = (*shared, 0.5, False, True, True, None, choose)
        expected = shrink_module.shrink(*call)[1][:, :25]
    assert torch.equal(y[3], expected[3])
    assert y[0].isnan().all()
    made["x"][3] = torch.nan
    if plan == "shrink":
        assert not by_kernel(rows, plan)(**made)[3].any()


@pytest.mark.parametrize("r", [0, 7])
@pytest.mark.parametrize("plan", ["shrink", "decode"])
def test_refused_handles_read_nothing_outside_the_tables(
    plan: str, r: int, device: torch.device
) -> None:
    """Around each table lies what would show: NaN, and the generation that is asked for."""
    made, rows = operands(device, r)
    generation = 2**30

    def within(table: Tensor, around: float) -> Tensor:
        wide = torch.full((3 * SLOTS, *table.shape[1:]), around, device=device).to(table.dtype)
        return wide[SLOTS : 2 * SLOTS].copy_(table)

    for name in ("table", "right", "scales"):
        made[name] = made[name] if made[name] is None else within(made[name], torch.nan)

    def refused(handle: int) -> tuple[Tensor, int]:
        def changed(*parts: Tensor) -> RowCores:
            core = rows(*parts)
            handles = core.handles[:1].expand(core.handles.shape).clone()
            handles[4] = handle
            generations = within(core.generations, generation)
            generations[1] = -5
            return core._replace(handles=handles, generations=generations)

        keep: list = []
        y = by_kernel(changed, plan, keep=keep)(**made)
        assert torch.equal(keep[1].handles[4], torch.full_like(keep[1].handles[4], handle))
        return y, keep[1].refused.item()

    y, said = refused(NONE)
    assert said == 0
    assert y.isfinite().all()
    for slot in (SLOTS, SLOTS + 1, 2 * SLOTS - 1, 2**31, 2**32 - 1):
        again, said = refused(generation << SLOT_BITS | slot)
        assert said == 1
        assert torch.equal(again, y)
    for handle in (-2, -(2**63), (-5 << SLOT_BITS) + 1, 1, (generation << SLOT_BITS) + 2):
        again, said = refused(handle)
        assert said == 1
        assert torch.equal(again, y)


def test_slots_beyond_int32(device: torch.device) -> None:
    """An adapter 2³¹ numbers into the table is read where it is."""
    p, slots = 128, 2**17 + 3
    made, rows = operands(device, p=p, q=p, entries=8, other=torch.bfloat16)
    small = rows(*(made[name] for name in ("table", "right", "weights", "scales")))
    storage = torch.empty(0, dtype=torch.bfloat16, device=device)
    storage.untyped_storage().resize_(2 * slots * p * p)  # pages are touched where written
    table = storage.as_strided((slots, p, p), (p * p, p, 1))
    table[-SLOTS:] = small.table
    far = small._replace(
        table=table,
        handles=small.handles.where(small.handles == NONE, small.handles + slots - SLOTS),
        scales=small.scales.new_ones(slots).index_copy(
            0, torch.arange(slots - SLOTS, slots, device=device), small.scales
        ),
        generations=torch.cat([small.generations.new_zeros(slots - SLOTS), small.generations]),
    )
    call = 0.5, False, False, True, None, choose
    u, again = (
        shrink_module.shrink(made["x"], made["down"], core, *call)[1] for core in (small, far)
    )
    assert torch.equal(u[[0, 1, 2, 3]], again[[0, 1, 2, 3]])


@pytest.mark.parametrize("plan", ["shrink", "decode"])
def test_a_launch_does_not_depend_on_handles(
    plan: str, device: torch.device, counted_launches, monkeypatch
) -> None:
    """One, of one grid, constants and integers; t is given only where it is wanted."""
    module = decode_module if plan == "decode" else shrink_module
    made, rows = operands(device, k=2)
    seen = []

    class Recorded:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid):
            def launched(**named):
                plain = {n: value for n, value in named.items() if not isinstance(value, Tensor)}
                seen.append((grid, plain))
                return self.kernel[grid](**named)

            return launched

    kernels = {aligned: Recorded(kernel) for aligned, kernel in module.KERNELS.items()}
    monkeypatch.setattr(module, "KERNELS", kernels)
    monkeypatch.setattr(launch, "POSSIBLE", False)  # the ordinary way, where it is seen
    with counted_launches() as counts:
        by_kernel(rows, plan)(**made)
        by_kernel(lambda *parts: rows(*parts)._replace(handles=rows(*parts).handles * 0 - 1), plan)(
            **made
        )
    assert counts == {f"{plan}_kernel": 2}
    assert seen[0] == seen[1]
    if plan == "shrink":
        core = rows(*(made[name] for name in ("table", "right", "weights", "scales")))
        call = made["x"], made["down"], core, 0.5, False
        t, u = module.shrink(*call, True, True, None, choose)
        none, again = module.shrink(*call, False, True, None, choose)
        assert none is None
        assert torch.equal(u, again)
        again, none = module.shrink(*call, True, False, None, choose)
        assert none is None
        assert torch.equal(t, again)


def test_as_many_programs_make_u_as_there_is_room_for() -> None:
    """Of 132 multiprocessors, at 64 rows, those beside 4 slices of x·downᵀ and the slices of y."""
    for most, least, slices, expected in (
        (8, 1, 3 * 64, 1),  # 4096 columns
        (8, 1, 224, 2),  # 14336: 36 programs more would be a third to a multiprocessor
        (8, 4, 3 * 64, 4),
        (16, 16, 3 * 64, 16),
        (8, 1, 270, 8),
    ):
        room = 2 * 132 - 4 - slices
        assert decode_module.rows_each(64, most, least, room) == expected
    assert decode_module.rows_each(3, 8, 1, 3) == 1
    assert decode_module.rows_each(3, 8, 1, 2) == 2


@pytest.mark.cpu("the order in which programs start")
@pytest.mark.parametrize(("r", "least"), [(0, 1), (7, 4)])
def test_the_bits_do_not_depend_on_how_many_programs_make_u(
    r: int, least: int, device: torch.device, monkeypatch
) -> None:
    """One row to each, or several; also where those with the last tickets start first."""
    from triton.runtime.interpreter import interpreter_builder

    shape = {"entries": 11, "repeat": 3, "p": 64, "q": 64, "k": 2}
    made, rows = operands(device, r, dtype=torch.bfloat16, other=torch.float32, **shape)
    monkeypatch.setattr(decode_module, "splits", lambda *_: 2)
    found, programs, start = [], [], interpreter_builder.set_grid_idx

    def backwards(x: int, *rest: int) -> None:
        start(interpreter_builder.grid_dim[0] - 1 - x, *rest)

    for each in (least, 8, 16, least):
        monkeypatch.setattr(decode_module, "rows_each", lambda *_, each=each: each)
        found.append(by_kernel(rows, "decode")(**made))
        programs.append(interpreter_builder.grid_dim[0])
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    assert all(torch.equal(found[0], other) for other in found)
    makers = [-(-33 // each) for each in (least, 8, 16, least)]
    assert [count - makers[0] for count in makers] == [count - programs[0] for count in programs]
