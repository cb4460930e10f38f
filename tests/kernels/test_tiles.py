"""The tiles: whatever `select` gives is valid, and it gives something for every launch."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from fused_lowrank.kernels.common import N_ARRIVALS, aligned
from fused_lowrank.kernels.tile_choice import DEFAULTS, select
from fused_lowrank.kernels.tiles import (
    KERNELS,
    MAX_RANK,
    RELAY_RANK,
    SMALL_M,
    TARGETS,
    Spec,
    TileConfig,
    has_hopper,
    is_bulk,
    is_valid,
    padded,
)

PADDED = (16, 32, 64, 128, 256)
ROWS = (1, SMALL_M, SMALL_M + 1, 256, 512, 1 << 20)
COLUMNS = (0, 16, 1024, 4096, 16384)
# (itemsize of x, of the widest factor): fp64 is for gradcheck alone, in the interpreter.
ITEMSIZES = ((2, 2), (2, 4), (4, 2), (4, 4), (8, 8))


def specs(target):
    """What can be launched there."""
    sides = itertools.product(KERNELS, ITEMSIZES, (True, False), PADDED, PADDED, (False, True))
    every = [Spec(kernel, *sizes, even, p, q, drop) for kernel, sizes, even, p, q, drop in sides]
    gemms = [spec for spec in every if spec.kernel == "gemm_tail" and spec.pad_p == 16]
    every += [replace(spec, n=n) for spec in gemms for n in COLUMNS]
    narrow = [s for s in every if s.itemsize == 2 and s.kernel in ("gemm_tail", "relay")]
    every += [replace(spec, bulk=True, n=n) for spec in narrow for n in COLUMNS]
    return [spec for spec in every if spec.kernel != "relay" or has_hopper(target, spec)]


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_default_is_valid(target):
    for spec, m in itertools.product(specs(target), ROWS):
        tile = select(target, spec, m)
        assert spec.kernel == "decode" or is_valid(tile, target, spec), (spec, m, tile)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_decode_has_a_tile_for_the_usual_ranks_and_none_where_its_sums_do_not_fit(target):
    for spec, m in itertools.product(specs(target), (1, 16, 17, 32, SMALL_M)):
        if spec.kernel == "decode":
            tile = select(target, spec, m)
            assert tile.block_m == max(16, m if m != 17 else 32)
            if (m <= 16 and spec.pad_p <= 64) or (m <= 32 and spec.pad_p <= 32):
                assert is_valid(tile, target, spec), (spec, m, tile)
            if m == SMALL_M and spec.pad_p == MAX_RANK:
                assert not is_valid(tile, target, spec), (spec, m, tile)


def test_a_device_with_less_shared_memory_gets_smaller_tiles():
    less = replace(TARGETS["sm_90"], shared=64 * 1024)
    smaller = 0
    for spec, m in itertools.product(specs(less), ROWS):
        tile = select(less, spec, m)
        assert spec.kernel == "decode" or is_valid(tile, less, spec), (spec, m, tile)
        smaller += tile != select(TARGETS["sm_90"], spec, m)
    assert smaller


def test_every_line_is_the_default_of_something():
    reached = {
        next(line for line in DEFAULTS if line.covers(name, spec, m))
        for name, target in TARGETS.items()
        for spec, m in itertools.product(specs(target), ROWS)
        if spec.kernel != "relay"  # its tiles follow the shape
    }
    assert reached == set(DEFAULTS)


@pytest.mark.parametrize(
    ("m", "n", "sides"),
    [
        (64, 4096, (64, 32, 128)),
        (128, 4096, (64, 64, 128)),  # the fastest on an H200, at 4096 columns
        (256, 4096, (128, 64, 128)),
        (512, 4096, (128, 128, 64)),
        (1024, 4096, (128, 256, 64)),
        (8192, 4096, (128, 256, 64)),
        (512, 14336, (128, 256, 64)),
        (2048, 1024, (128, 128, 64)),
        (512, 1024, (64, 64, 128)),
    ],
)
def test_tiles_of_a_gemm_fill_the_device(m, n, sides):
    """On sm_90 the largest of which there are enough."""
    for spec in (replace(GEMM, n=n), replace(GEMM, n=n, factor_itemsize=4)):
        tile = select(TARGETS["sm_90"], spec, m)
        assert (tile.block_m, tile.block_n, tile.block_k) == sides
        assert select(TARGETS["sm_100"], spec, m) == select(TARGETS["sm_100"], spec, 1 << 20) or (
            m == SMALL_M
        )


def test_padded_is_a_power_of_two_that_holds_the_rank():
    for rank in range(1, MAX_RANK + 1):
        pad = padded(rank)
        assert pad in PADDED
        assert rank <= pad < max(2 * rank, 17)


VALID = TileConfig(128, 128, 32, 8, 3)
GEMM = Spec("gemm_tail", 2, 2, True, 16, 16)
SHRINK = replace(GEMM, kernel="shrink")
BULK = replace(GEMM, bulk=True)
RELAY = replace(BULK, kernel="relay")
PERSISTENT = TileConfig(128, 256, 64, 8, 3, persistent=True)
HOPPER = TileConfig(128, 256, 64, 4, 3, hopper=True)


@pytest.mark.parametrize(
    ("tile", "spec"),
    [
        (replace(VALID, block_m=96), GEMM),  # no power of two
        (replace(VALID, block_k=8), GEMM),  # smaller than a dot
        (replace(VALID, num_warps=3), GEMM),
        (replace(VALID, num_stages=0), GEMM),
        (replace(VALID, block_m=256, block_n=256, num_warps=4), GEMM),  # sums beyond registers
        (replace(VALID, num_stages=16), GEMM),  # shared memory
        (replace(VALID, block_k=128), replace(GEMM, aligned=False)),  # pointers beyond registers
        (replace(VALID, block_m=256, num_warps=4), replace(SHRINK, pad_p=256)),
        (VALID, replace(SHRINK, pad_p=2 * MAX_RANK)),
        (PERSISTENT, RELAY),
        (replace(HOPPER, block_m=64), BULK),
        (replace(HOPPER, block_n=512), BULK),
        (replace(HOPPER, block_k=32), BULK),
        (replace(HOPPER, num_warps=8), BULK),
        (replace(HOPPER, num_stages=1), BULK),  # nothing would be brought ahead
        (replace(HOPPER, num_stages=4), BULK),  # shared memory
        (replace(HOPPER, parts=1), BULK),  # of one buffer two stores would be under way
        (replace(HOPPER, parts=16), BULK),
        (HOPPER, GEMM),  # what bulk copies cannot move
        (HOPPER, replace(BULK, dropout=True)),
        (HOPPER, replace(BULK, by_row=True)),
        (HOPPER, replace(RELAY, pad_p=2 * RELAY_RANK)),
        (HOPPER, replace(RELAY, pad_q=2 * RELAY_RANK)),
        (HOPPER, replace(RELAY, pad_p=64, pad_q=64)),  # shared memory, in parts of 128 columns
        (replace(HOPPER, parts=8), replace(RELAY, pad_p=64, factor_itemsize=6)),  # registers
        (HOPPER, replace(SHRINK, bulk=True)),
    ],
)
def test_what_cannot_run_is_not_valid(tile, spec):
    assert is_valid(VALID, TARGETS["sm_90"], GEMM)
    assert is_valid(HOPPER, TARGETS["sm_90"], BULK)
    assert is_valid(HOPPER, TARGETS["sm_90"], RELAY)
    assert is_valid(replace(HOPPER, parts=8), TARGETS["sm_90"], replace(RELAY, pad_p=64, pad_q=64))
    assert not is_valid(HOPPER, TARGETS["sm_100"], RELAY)
    assert not is_valid(HOPPER, replace(TARGETS["sm_90"], gluon=False), BULK)
    assert not is_valid(tile, TARGETS["sm_90"], spec)


def test_what_bulk_copies_can_move():
    """One dtype of 16 bits, rows and addresses in 16 bytes, a stride of 1 in x and in W."""

    def made(*size: int, dtype: torch.dtype = torch.bfloat16, first: int = 0) -> torch.Tensor:
        flat = torch.zeros(first + math.prod(size), dtype=dtype)
        return flat[first:].view(size)

    x, w, down, up = made(40, 64), made(48, 64), made(16, 64), made(48, 16)
    assert is_bulk(x, w)
    assert is_bulk(x, w, down, up)
    assert is_bulk(made(40, 128)[:, :64], made(64, 48).t(), down, up)
    assert is_bulk(x, w, made(17, 72)[1:, 8:])  # made contiguous first
    wrong = [
        (x.float(), w.float()),
        (x, w.half()),
        (x, w, down.float()),
        (made(40, 64, first=1), w),
        (x, made(48, 64, first=4)),
        (x, w, made(16, 64, first=1)),
        (x, w, down, made(48, 12)),
        (x, made(44, 64)),
        (made(40, 68)[:, :64], w),
        (made(40, 128)[:, ::2], w),
        (x, made(48, 128)[:, ::2]),
        (made(1, 64).expand(40, 64), w),
    ]
    assert not any(is_bulk(*operands) for operands in wrong)


def test_tiles_for_hopper_follow_the_shape():
    """Wide where they fill the device, with a stage less where they are many; a relay's narrower
    where they are few, where `gemm_tail` by itself has Triton's, which were measured."""

    def chosen(m: int, n: int, spec: Spec = BULK) -> tuple[int, int]:
        tile = select(TARGETS["sm_90"], replace(spec, n=n), m)
        return tile.block_n, tile.num_stages

    assert chosen(8192, 4096) == (256, 3)
    assert chosen(2048, 4096) == chosen(8192, 1024) == chosen(1024, 4096) == (256, 4)
    assert chosen(2176, 2048) == (128, 5)  # two turns of wide tiles, or three of half of them
    assert chosen(8192, 4096, RELAY) == chosen(2048, 4096, RELAY) == (256, 3)
    assert chosen(512, 4096, RELAY) == (128, 4)
    assert chosen(256, 4096, RELAY) == chosen(65, 4096, RELAY) == (64, 4)
    assert not any(select(TARGETS["sm_90"], replace(BULK, n=4096), m).hopper for m in (64, 512))
    assert not select(TARGETS["sm_100"], BULK, 8192).hopper


def test_core_grad_has_a_counter_for_every_tile():
    for target in TARGETS.values():
        for spec in (spec for spec in specs(target) if spec.kernel == "core_grad"):
            side = select(target, spec, 1).block_n
            tiles = max(1, spec.pad_p // side) * max(1, spec.pad_q // side)
            assert tiles + 1 <= N_ARRIVALS


def test_a_core_of_64_has_an_adder_for_each_quarter():
    """One for the whole would read 512 KB of partial sums; by adapter there are enough programs."""
    spec = Spec("core_grad", 2, 4, True, 64, 64)
    assert select(TARGETS["sm_90"], spec, 8192).block_n == 32
    assert select(TARGETS["sm_90"], replace(spec, by_row=True), 8192).block_n == 64


def test_aligned():
    torch = pytest.importorskip("torch")
    whole = torch.empty(64, dtype=torch.bfloat16)
    assert whole.data_ptr() % 16 == 0
    assert aligned((whole, None), (16, 0, 4096))
    assert not aligned((whole,), (16, 24))
    assert not aligned((whole, whole[1:]), (16,))
