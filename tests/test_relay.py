"""The relay launch against the equation, its tile order, and the state that it must leave zero."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fused_lowrank import lowrank_linear
from fused_lowrank.compute import devices
from fused_lowrank.kernels import relay as module
from fused_lowrank.kernels.common import N_ARRIVALS, arrivals
from fused_lowrank.kernels.relay import first_column_first, has_flags, is_possible, relay, spec_of
from fused_lowrank.kernels.tiles import TARGETS, TileConfig, is_valid
from fused_lowrank.testing import check_pooled, measure

SM_90 = TARGETS["sm_90"]
TILE = TileConfig(64, 64, 32, 4, 2, group_m=2, persistent=True)
M, N, K = 201, 144, 80  # 4 × 3 tiles, none of the last ones whole
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _has_descriptors(device: torch.device) -> None:
    target = devices.target(device)
    if target.name not in ("sm_90", "sm_100"):
        pytest.skip(f"{target.name} has no tensor descriptors")


def operands(
    device: torch.device,
    dtype: torch.dtype,
    p: int,
    q: int,
    core: str,
    core_dtype: torch.dtype,
    rows: int = M,
) -> dict:
    """As `lowrank_linear` takes them."""
    sizes = {"x": (rows, K), "weight": (N, K), "down": (p, K), "up": (N, q), "bias": (N,)}
    made = {name: torch.randn(s, device=device).to(dtype) for name, s in sizes.items()}
    for name, width in (("weight", K), ("down", K), ("up", q)):
        made[name] *= width**-0.5
    parts = {"core": [(p, q)], "pair": [(p, 24), (24, q)], "none": []}[core]
    factors = [(torch.randn(s, device=device) * s[0] ** -0.5).to(core_dtype) for s in parts]
    made["core"] = {"core": factors[:1], "pair": [tuple(factors)], "none": [None]}[core][0]
    return {**made, "scale": 0.7}


def turned(core):
    """The core of the transposed launch."""
    if isinstance(core, tuple):
        return tuple(factor.t().contiguous() for factor in reversed(core))
    return None if core is None else core.t().contiguous()


def launched(transposed: bool, want_t: bool = True):
    """relay as a function of `lowrank_linear`'s operands: (y, t)."""

    def call(x, weight, down, core, up, bias, scale):
        if transposed:  # the same equation, its operands laid out as the backward has them
            weight = weight.t().contiguous().t()
            down, up, core = down.t().contiguous(), up.t().contiguous(), turned(core)
        choose = lambda *_: TILE  # noqa: E731
        return relay(x, weight, down, core, up, bias, scale, transposed, want_t, choose)

    return call


def reference(**operands) -> torch.Tensor:
    return lowrank_linear(**operands, impl="reference")


def t_reference(x, down, **_) -> torch.Tensor:
    return x @ down.t()


def all_zero(device: torch.device) -> bool:
    return not arrivals(device).any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("core", "p", "q"),
    [("core", 16, 16), ("core", 64, 48), ("pair", 48, 64), ("pair", 16, 16), ("none", 64, 64)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_equation(
    dtype: torch.dtype, core: str, p: int, q: int, transposed: bool, device: torch.device
) -> None:
    """y and t, by several programs of several tiles, with a core of x's dtype and of fp32."""
    for core_dtype, rows, bias in ((dtype, M, True), (torch.float32, 65, False)):
        made = operands(device, dtype, p, q, core, core_dtype, rows)
        made["bias"] = made["bias"] if bias else None
        call = launched(transposed)
        dy = torch.zeros(rows, N, device=device)
        errors = measure(lambda c=call, **o: c(**o)[0], reference, made, dy)
        errors += measure(lambda c=call, **o: c(**o)[1], t_reference, made, dy)
        assert all(m.within for m in errors), [m for m in errors if not m.within]
        check_pooled(errors)
        assert all_zero(device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_launch_finds_the_state_as_the_first_did(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Other data, other sizes, the same counters and flags: zero before and after."""
    for rows in (M, 320, 65):
        made = operands(device, dtype, 16, 16, "core", torch.float32, rows)
        first, second = launched(False)(**made), launched(False)(**made)
        assert all_zero(device)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        errors = measure(
            lambda **o: launched(False)(**o)[0],
            reference,
            made,
            torch.zeros(rows, N, device=device),
        )
        assert all(m.within for m in errors), errors


def test_t_is_stored_only_if_asked(device: torch.device) -> None:
    made = operands(device, torch.bfloat16, 16, 16, "core", torch.float32)
    y, t = launched(False, want_t=False)(**made)
    assert t is None
    assert torch.equal(y, launched(False)(**made)[0])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["x", "down", "up", "weight"])
def test_nan_and_inf_go_where_the_reference_puts_them(
    name: str, transposed: bool, device: torch.device
) -> None:
    """Of rank 40, so that there is padding for an Inf in x to meet.

    The reference is in float32: in bfloat16 some CPUs' library spreads them (`isolation`).
    """
    made = operands(device, torch.bfloat16, 40, 40, "none", torch.float32)
    for factor in ("weight", "down", "up"):
        made[factor].abs_()  # an Inf in x is then one in y: only the padding could make it NaN
    made[name][3, 5], made[name][-1, -2] = torch.inf, torch.nan
    y, t = launched(transposed)(**made)
    wide = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in made.items()}
    for ours, theirs in ((y, reference(**wide)), (t, t_reference(**wide))):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert torch.equal(ours[ours.isinf()], theirs[ours.isinf()])


@triton.jit
def order_kernel(out_ptr, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    for ticket in range(tiles_m * tiles_n):
        pid_m, pid_n = first_column_first(ticket, tiles_m, tiles_n, GROUP_M)
        tl.store(out_ptr + 2 * ticket, pid_m)
        tl.store(out_ptr + 2 * ticket + 1, pid_n)


@pytest.mark.parametrize("tiles", [(1, 1), (5, 1), (1, 4), (5, 2), (8, 3), (7, 4)])
def test_every_tile_is_made_once_and_the_first_column_first(
    tiles: tuple[int, int], device: torch.device
) -> None:
    """So a tile's ticket is larger than that of the tile that makes its u."""
    tiles_m, tiles_n = tiles
    out = torch.empty((tiles_m * tiles_n, 2), dtype=torch.int32, device=device)
    order_kernel[(1,)](out, tiles_m, tiles_n, 4)
    order = [tuple(pair) for pair in out.tolist()]
    assert order[:tiles_m] == [(row, 0) for row in range(tiles_m)]
    assert sorted(order) == sorted(itertools.product(range(tiles_m), range(tiles_n)))
    # The rest follows in groups of rows: a group is done before the next begins.
    groups = [row // 4 for row, _ in order[tiles_m:]]
    assert groups == sorted(groups)


def test_what_it_cannot_do_is_refused(device: torch.device) -> None:
    made = operands(device, torch.bfloat16, 16, 16, "core", torch.float32)
    made.pop("scale")
    spec = spec_of(**made, transposed=False)
    assert spec.aligned
    assert is_valid(TILE, SM_90, spec)
    most = (N_ARRIVALS - 2) * 128
    assert is_possible(SM_90, spec, most)
    assert not is_possible(SM_90, spec, most + 1)
    assert has_flags((N_ARRIVALS - 2) * 64, TILE)
    assert not has_flags((N_ARRIVALS - 2) * 64 + 1, TILE)
    for change in (
        {"x": made["x"][:, 1:], "weight": made["weight"][:, 1:], "down": made["down"][:, 1:]},
        {"weight": made["weight"][:-1], "up": made["up"][:-1]},
        {"x": made["x"].float(), "weight": made["weight"].float()},
        {"down": made["down"].repeat(5, 1), "core": made["core"].repeat(5, 1)},
        {"core": (made["core"].repeat(1, 5), made["core"].repeat(5, 1))},
    ):
        other = spec_of(**{**made, **change}, transposed=False)
        assert not is_possible(SM_90, other, M)
        assert not is_valid(TILE, SM_90, other)
    odd = {"down": made["down"][:9], "core": made["core"][:9]}
    assert not spec_of(**{**made, **odd}, transposed=False).aligned
    assert not is_possible(TARGETS["sm_80"], spec, M)
    with pytest.raises(ValueError, match="relay cannot"):
        launched(False)(**{**made, "x": made["x"][:, 1:], "scale": 1.0})


def test_more_rows_than_flags_are_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "N_ARRIVALS", 7)  # five rows of tiles
    made = operands(device, torch.bfloat16, 16, 16, "core", torch.float32, 321)
    launched(False)(**{**made, "x": made["x"][:320]})
    with pytest.raises(ValueError, match="relay cannot"):
        launched(False)(**made)
