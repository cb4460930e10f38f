"""The relay's launch, as far as it can be looked at without a GPU: who may have it, and how.

Triton's interpreter does not run Gluon. The compile gate compiles the kernel. One test is of a GPU.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from fused_lowrank import lowrank_linear
from fused_lowrank.compute import devices
from fused_lowrank.compute.plans import PLANS
from fused_lowrank.compute.reference import RowCores
from fused_lowrank.kernels import gemm_tail_hopper, relay_hopper
from fused_lowrank.kernels import relay as module
from fused_lowrank.kernels.common import N_ARRIVALS, multiprocessors
from fused_lowrank.kernels.relay import has_flags, is_possible, relay, spec_of
from fused_lowrank.kernels.rows import POINTERS
from fused_lowrank.kernels.tile_choice import select
from fused_lowrank.kernels.tiles import TARGETS, TileConfig, is_valid
from fused_lowrank.testing import measure, pinned_plan, results

SM_90 = TARGETS["sm_90"]
TILE = TileConfig(128, 64, 64, 4, 2, hopper=True)
M, N, K = 201, 144, 80
BF16, F32 = torch.bfloat16, torch.float32


def operands(p: int = 16, q: int = 16, rows: int = M, core: torch.dtype = F32) -> dict:
    """As `spec_of` takes them, of bfloat16 but for the core."""
    sizes = {"x": (rows, K), "weight": (N, K), "down": (p, K), "up": (N, q), "bias": (N,)}
    made = {name: torch.zeros(size, dtype=BF16) for name, size in sizes.items()}
    return {**made, "core": torch.zeros(p, q, dtype=core)}


def planned(made: dict, transposed: bool = False, want_t: bool = True):
    spec = spec_of(**made, transposed=transposed)
    inputs = (made[name] for name in ("x", "weight", "down", "core", "up", "bias"))
    return relay_hopper.planned(*inputs, transposed, want_t, spec.wide, TILE)


def test_the_interpreter_is_refused_and_told_why() -> None:
    if devices.target(torch.device("cpu")) is None:
        pytest.skip("kernels are compiled here")
    made = operands()
    with pinned_plan("relay"), pytest.raises(RuntimeError, match=r"sm_90.*interpreter"):
        lowrank_linear(**made, scale=0.5, impl="triton")


def test_what_it_cannot_do_is_refused() -> None:
    made = operands()
    spec = spec_of(**made, transposed=False)
    assert spec.bulk
    assert is_valid(TILE, SM_90, spec)
    most = N_ARRIVALS // 2 * 128
    assert is_possible(SM_90, spec, most)
    assert not is_possible(SM_90, spec, most + 1)
    wide = operands(p=80, q=80)
    for change in (
        {name: made[name][:, 1:] for name in ("x", "weight", "down")},  # addresses
        {"x": made["x"].new_zeros(M, K + 4)[:, :K]},  # 8 bytes more in a row
        {"weight": made["weight"][:-4], "up": made["up"][:-4]},  # rows of y
        {"x": made["x"].float(), "weight": made["weight"].float()},
        {"down": made["down"].float()},
        {"up": made["up"].half()},
        {"up": made["up"].new_zeros(N, 12), "core": made["core"].new_zeros(16, 12)},
        {name: wide[name] for name in ("down", "core", "up")},
    ):
        other = spec_of(**{**made, **change}, transposed=False)
        assert not is_possible(SM_90, other, M), change.keys()
        assert not is_valid(TILE, SM_90, other)
    for target in ("sm_80", "sm_100"):
        assert not is_possible(TARGETS[target], spec, M)
    call = {**made, "x": made["x"].float(), "weight": made["weight"].float()}
    with pytest.raises(ValueError, match="relay cannot"):
        relay(**call, scale=1.0, transposed=False, want_t=True, choose=lambda *_: TILE)


def test_sizes_need_be_multiples_of_eight_alone() -> None:
    """And M, P and a pair's r of nothing."""
    made = operands(p=13, q=24)
    made = {**made, "core": (torch.zeros(13, 5), torch.zeros(5, 24))}
    assert is_possible(SM_90, spec_of(**made, transposed=False), M)
    odd = {name: made[name][..., :72].contiguous() for name in ("x", "weight", "down")}
    assert is_possible(SM_90, spec_of(**{**made, **odd}, transposed=False), M)


def test_more_rows_than_flags_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "N_ARRIVALS", 7)  # three rows of tiles
    assert has_flags(384, TILE)
    assert not has_flags(385, TILE)
    made = operands(rows=385)
    with pytest.raises(ValueError, match="relay cannot"):
        relay(**made, scale=1.0, transposed=False, want_t=True, choose=lambda *_: TILE)


@pytest.mark.parametrize("rows", [1, 201, 5000])
def test_all_programs_run_at_once(rows: int) -> None:
    """As many as the device has multiprocessors, at most, and the driver is told to refuse more."""
    launch = planned(operands(rows=rows))
    tiles = -(-rows // 128) * -(-N // 64)
    assert launch.grid == (min(tiles, multiprocessors(torch.device("cpu"))),)
    assert launch.constants["launch_cooperative_grid"] is True
    assert launch.meets


def test_t_is_stored_only_if_asked() -> None:
    assert planned(operands()).results["t_ptr"] == ((M, 16), BF16)
    launch = planned(operands(), want_t=False)
    assert launch.results["t_ptr"] is None
    assert not launch.constants["STORE_T"]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_single_row_may_have_any_stride(transposed: bool) -> None:
    """It is contiguous all the same; a descriptor takes multiples of 16 bytes alone."""
    row = torch.zeros(1, max(K, N) + 1, dtype=BF16)
    x, weight = torch.zeros(M, K, dtype=BF16), torch.zeros(N, K, dtype=BF16)
    core = torch.zeros((16, 1) if transposed else (1, 16), dtype=BF16)
    wide = torch.zeros((K if transposed else N), 16, dtype=BF16)
    down, up = (wide, row[:, :N]) if transposed else (row[:, :K], wide)
    made = {"x_desc": x, "w_desc": weight, "down_desc": down, "up_desc": up}
    launches = [
        relay_hopper.planned(x, weight, down, core, up, None, transposed, True, False, TILE),
        gemm_tail_hopper.planned(x, weight, up, None, transposed, TILE),
    ]
    for launch in launches:
        for name in made.keys() & launch.blocks.keys():
            shape, strides, block = launch.blocks[name]
            found = launch.describe(made[name], list(shape), list(strides), block)
            assert found.shape == list(made[name].shape)


def own(p: int, q: int, r: int = 0, core: torch.dtype = F32) -> RowCores:
    """A core for each of the M rows, of two slots; a pair if there is an r."""
    table = torch.zeros(2, p, r or q, dtype=core)
    right = torch.zeros(2, r, q, dtype=core) if r else None
    handles = torch.zeros(M, 3, dtype=torch.int64)
    generations, refused = (torch.zeros(n, dtype=torch.int32) for n in (2, 1))
    return RowCores(table, right, handles, None, torch.ones(2), generations, refused, 1)


def test_a_core_for_each_row_takes_no_shared_memory() -> None:
    """Whatever its dtype: y is stored in larger parts than beside one in float32 for all."""
    made, parts = operands(p=64, q=64), {}
    for core in (made["core"], own(64, 64), own(64, 64, core=BF16)):
        spec = replace(spec_of(**{**made, "core": core}, transposed=False), n=4096)
        assert is_possible(SM_90, spec, M)
        parts[spec.by_row, spec.wide] = select(SM_90, spec, 8192).parts
    assert parts == {(False, True): 8, (True, False): 4}


@pytest.mark.parametrize("transposed", [False, True])
def test_a_core_for_each_row_is_made_of_t_in_memory(transposed: bool) -> None:
    """So t is stored where it is not wanted, too, and a pair's first product with it."""
    p, q, r = 24, 16, 40
    made = operands(p=p, q=q)
    if transposed:
        made = {**made, "down": torch.zeros(K, p, dtype=BF16), "up": torch.zeros(q, N, dtype=BF16)}
    sides = (q, p) if transposed else (p, q)
    for size in (0, r):
        core = own(*sides, size)
        for want_t in (True, False):
            launch = planned({**made, "core": core}, transposed, want_t)
            assert launch.constants["STORE_T"]
            assert launch.constants["MIX"] == 3
            assert launch.constants["R"] == size
            assert (launch.results["t_ptr"] is not None) == want_t
            assert ("t_ptr" in launch.scratch) == (not want_t)
            assert launch.scratch.get("v_ptr") == (((M, 3, 64), F32) if size else None)
            assert ("v_ptr" in launch.numbers) == (not size)
            assert launch.numbers["slots"] == 2
            assert launch.inputs[-5:] == POINTERS


def test_a_core_of_another_dtype_is_multiplied_as_two() -> None:
    """And takes the room of two: y is then stored in smaller parts."""
    parts = {}
    for core in (BF16, F32):
        made = operands(p=64, q=64, core=core)
        assert planned(made).constants["SPLIT"] == (core == F32)
        spec = replace(spec_of(**made, transposed=False), n=4096)
        parts[core] = select(SM_90, spec, 8192).parts
    assert parts == {BF16: 4, F32: 8}


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("core", ["matrix", "diagonal", "none"])
@pytest.mark.parametrize("sizes", [(77, 1024, 1032), (300, 4096, 1024), (2500, 1160, 2056)])
@pytest.mark.parametrize("plan", [name for name in PLANS if name.startswith("relay")])
def test_on_a_gpu_it_is_right_and_reproducible(
    plan: str, sizes: tuple[int, int, int], core: str, gain: bool, device: torch.device
) -> None:
    """Both ways, whoever makes t: within the error budget, and the same bits again and again."""
    where = devices.target(device)
    if where is None or not where.gluon:
        pytest.skip("there are no kernels for Hopper here")
    m, k, n = sizes
    shapes = {"x": (m, k), "weight": (n, k), "down": (16, k), "up": (n, 16), "bias": (n,)}
    made = {
        name: (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(BF16)
        for name, shape in shapes.items()
    }
    size = {"matrix": (16, 16), "diagonal": (16,)}.get(core)
    made["core"] = torch.randn(size, device=device).requires_grad_() if size else None
    if gain:
        made["gain"] = (0.5 + torch.rand(n, device=device)).requires_grad_()
    made["x"].requires_grad_()
    dy = torch.randn(m, n, device=device).to(BF16)
    ours = partial(lowrank_linear, scale=0.5, impl="triton")
    with pinned_plan(plan):
        reference = partial(lowrank_linear, scale=0.5, impl="reference")
        errors = measure(ours, reference, made, dy)
        assert all(error.within for error in errors), errors
        first = results(ours, made, dy)
        for _ in range(20):
            again = results(ours, made, dy)
            assert all(torch.equal(again[name], first[name]) for name in ("y", "dx"))
