"""The executor of compiled kernels, on texts and memory made for it."""

import numpy as np
import pytest
import torch
from ttgir_kernel import Kernel
from ttgir_memory import Array, Barrier, Deadlock, Fault, Shared, rounded
from ttgir_parse import Type
from ttgir_run import launch

SHARED = "#ttg.nvmma_shared<{{swizzlingByteWidth = {}, transposed = {}, elementBitWidth = 16}}>"


def kernel(parameters: str, body: str) -> Kernel:
    lines = "\n".join(f"    {line.strip()} loc(#loc1)" for line in body.strip().splitlines())
    return Kernel(
        '#loc1 = loc("/somewhere/kernel.py":7:3)\n'
        "#shared = #ttg.swizzled_shared<{vec = 1, perPhase = 1, maxPhase = 1, order = [0]}>\n"
        "#smem = #ttg.shared_memory\n"
        "module {\n"
        f"  tt.func public @kernel({parameters}) attributes {{noinline = false}} {{\n"
        f"{lines}\n    tt.return loc(#loc)\n  }} loc(#loc)\n}}\n"
    )


def test_loops_and_branches() -> None:
    """Carried values change at once; a loop's and a branch's results go on."""
    made = kernel(
        "%out: !tt.ptr<i32>, %n: i32",
        """
        %c0 = arith.constant 0 : i32
        %c1 = arith.constant 1 : i32
        %c2 = arith.constant 2 : i32
        %f:2 = scf.for %i = %c0 to %n step %c1 iter_args(%a = %c0, %b = %c1) -> (i32, i32)  : i32 {
        %sum = arith.addi %a, %b : i32
        scf.yield %b, %sum : i32, i32
        }
        %steps:2 = scf.while (%x = %n, %k = %c0) : (i32, i32) -> (i32, i32) {
        %more = arith.cmpi sgt, %x, %c1 : i32
        scf.condition(%more) %x, %k : i32, i32
        } do {
        ^bb0(%y: i32, %j: i32):
        %rest = arith.remsi %y, %c2 : i32
        %odd = arith.cmpi ne, %rest, %c0 : i32
        %next = scf.if %odd -> (i32) {
        %less = arith.subi %y, %c1 : i32
        scf.yield %less : i32
        } else {
        %half = arith.divsi %y, %c2 : i32
        scf.yield %half : i32
        }
        %count = arith.addi %j, %c1 : i32
        scf.yield %next, %count : i32, i32
        }
        tt.store %out, %f#0 : !tt.ptr<i32>
        %second = tt.addptr %out, %c1 : !tt.ptr<i32>, i32
        tt.store %second, %steps#1 : !tt.ptr<i32>
        """,
    )
    out = np.zeros(2, np.int32)
    launch(made, {"out": out, "n": 10}, grid=1, seed=0)
    assert out.tolist() == [55, 4]  # 10, 5, 4, 2, 1


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(
        NotImplementedError, match=r"ttgir operation tt\.histogram: add it to tests"
    ):
        kernel("%n: i32", "%a = tt.histogram %n : i32 -> i32")
    assembly = 'tt.elementwise_inline_asm "bar.sync 0;" {constraints = "=r"} %n : i32 -> i32'
    with pytest.raises(NotImplementedError, match=r"'bar\.sync 0;'.*kernel\.py:7, ttgir line 6"):
        kernel("%n: i32", f"%a = {assembly}")


WAIT = """
    %c0 = arith.constant 0 : i32
    %bar = ttg.local_alloc : () -> !ttg.memdesc<1xi64, #shared, #smem, mutable>
    ttng.init_barrier %bar, 2 : !ttg.memdesc<1xi64, #shared, #smem, mutable>
"""


def test_who_waits_for_what_is_said() -> None:
    arrive = "ttng.arrive_barrier %bar, 1 : !ttg.memdesc<1xi64, #shared, #smem, mutable>\n"
    wait = "ttng.wait_barrier %bar, %c0 : !ttg.memdesc<1xi64, #shared, #smem, mutable>"
    launch(kernel("%n: i32", WAIT + 2 * arrive + wait), {"n": 1}, grid=2, seed=0)
    with pytest.raises(
        Deadlock, match=r"program 1.* 1xi64\[0\] of kernel\.py:7:3 .*1 of 2 arrivals"
    ):
        launch(kernel("%n: i32", WAIT + arrive + wait), {"n": 1}, grid=2, seed=0)


def test_a_flag_looked_at_for_ever_is_a_deadlock() -> None:
    body = """
        %zero = arith.constant 0 : i32
        %true = arith.constant true
        %last = scf.while (%x = %zero) : (i32) -> i32 {
        %seen = tt.atomic_rmw add, acquire, gpu, %f, %zero, %true : (!tt.ptr<i32>, i32, i1) -> i32
        %go_on = arith.cmpi eq, %seen, %zero : i32
        scf.condition(%go_on) %seen : i32
        } do {
        ^bb0(%y: i32):
        scf.yield %y : i32
        }
    """
    looking = kernel("%f: !tt.ptr<i32>", body)
    launch(looking, {"f": np.ones(1, np.int32)}, grid=1, seed=0)
    with pytest.raises(Deadlock, match=r"another value of f\[0\] than 0"):
        launch(looking, {"f": np.zeros(1, np.int32)}, grid=3, seed=0)


def test_addresses_outside_are_seen() -> None:
    outside = "%c9 = arith.constant 9 : i32\n%p = tt.addptr %out, %c9 : !tt.ptr<i32>, i32\n"
    made = kernel("%out: !tt.ptr<i32>", outside + "tt.store %p, %c9 : !tt.ptr<i32>")
    launch(made, {"out": np.zeros(10, np.int32)}, grid=1, seed=0)
    with pytest.raises(Fault, match="out of 9 elements is reached outside"):
        launch(made, {"out": np.zeros(9, np.int32)}, grid=1, seed=0)


def test_barriers_count() -> None:
    barrier = Barrier(2)
    barrier.expect(100)
    barrier.land(60)
    barrier.arrive(1)
    assert barrier.phase == 0
    barrier.land(40)
    assert (barrier.phase, barrier.missing, barrier.bytes) == (1, 2, 0)
    with pytest.raises(Fault, match="more arrivals than the barrier counts, which is 2"):
        barrier.arrive(3)
    barrier.expect(8)
    barrier.arrive(1)
    with pytest.raises(Fault, match="8 bytes more land"):
        barrier.land(16)


@pytest.mark.parametrize(("element", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_casts_are_to_nearest_even(element: str, dtype: torch.dtype) -> None:
    """As torch's, ties, infinities and NaN included."""
    some = torch.randn(100_000) * torch.tensor(10.0) ** torch.randint(-6, 5, (100_000,))
    ties = torch.arange(1, 4096).float() / 2048
    values = torch.cat([some, ties, torch.tensor([torch.inf, -torch.inf, torch.nan, 65520.0])])
    assert torch.equal(
        torch.from_numpy(rounded(values.numpy(), element)).nan_to_num(nan=7.0),
        values.to(dtype).float().nan_to_num(nan=7.0),
    )


def tile(rows: int, columns: int, swizzle: int, transposed: bool = False) -> Type:
    layout = SHARED.format(swizzle, str(transposed).lower())
    return Type("memdesc", (rows, columns), "bf16", layout)


def place(row: int, column: int, rows: int, swizzle: int) -> int:
    """Where an element of a tile lies, in elements, before its 16-byte pieces are swizzled."""
    width = swizzle // 2
    return column // width * rows * width + row * width + column % width


@pytest.mark.parametrize(("columns", "swizzle"), [(16, 32), (64, 128), (256, 128)])
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_lie_as_hopper_has_them(columns: int, swizzle: int, transposed: bool) -> None:
    """A tile is read as it was written, lies where it should, and is of one swizzle."""
    memory = Shared("buf", Type("memdesc", (1, 32, columns), "bf16"))
    values = np.arange(32 * columns, dtype=np.float32).reshape(32, columns)
    whole = memory.view(0, tile(32, columns, swizzle))
    there = memory.view(0, tile(columns, 32, swizzle, True)) if transposed else whole
    there.write(values.T if transposed else values, unfenced=False)
    assert np.array_equal(whole.read(asynchronous=True), values)
    for row, column in ((0, 0), (5, 3), (31, columns - 1), (17, columns // 2)):
        assert memory.values[place(row, column, 32, swizzle)] == values[row, column]
    other = memory.view(0, tile(32, columns, 64))
    with pytest.raises(Fault, match="another layout"):
        other.read(asynchronous=False)


@pytest.mark.parametrize("columns", [64, 128])
def test_chunks_of_rows_are_a_tile_only_if_no_wider_than_their_swizzle(columns: int) -> None:
    memory = Shared("u", Type("memdesc", (4, 16, columns), "bf16"))
    values = np.arange(64 * columns, dtype=np.float32).reshape(64, columns)
    chunk = tile(16, columns, 128)
    for i in range(4):
        memory.view(i * 16 * columns, chunk).write(values[i * 16 : i * 16 + 16], unfenced=False)
    read = memory.view(0, tile(64, columns, 128)).read(asynchronous=True)
    assert np.array_equal(read, values) == (columns == 64)


def test_shared_memory_in_use_is_not_overwritten() -> None:
    memory = Shared("buf", Type("memdesc", (2, 16, 64), "bf16"))
    kind = tile(16, 64, 128)
    first, second = memory.view(0, kind), memory.view(16 * 64, kind)
    with pytest.raises(Fault, match=r"buf\[0\] is read and was never written"):
        first.read(asynchronous=False)
    first.begin_copy()
    with pytest.raises(Fault, match=r"buf\[0\] is read while a bulk copy into it is in flight"):
        first.read(asynchronous=False)
    with pytest.raises(Fault, match=r"buf\[0\] is overwritten while a bulk copy"):
        first.begin_copy()
    first.write(np.ones((16, 64), np.float32), unfenced=False)
    first.hold()
    first.hold()
    first.release()
    with pytest.raises(Fault, match=r"buf\[0\] is overwritten while it is read"):
        first.begin_copy()
    first.release()
    first.begin_copy()
    second.write(np.ones((16, 64), np.float32), unfenced=True)
    with pytest.raises(Fault, match=r"buf\[1\] was stored without a fence"):
        second.read(asynchronous=True)
    second.fence()
    assert second.read(asynchronous=True).all()


def test_bulk_copies_stop_at_the_edges() -> None:
    values = np.arange(15, dtype=np.float32).reshape(3, 5)
    array = Array("x", values, "bf16")
    expected = np.zeros((2, 4), np.float32)
    expected[0, :3] = values[2, 2:]
    assert np.array_equal(array.load((2, 4), [2, 2]), expected)
    assert not array.load((2, 4), [3, 0]).any()
    array.store(np.full((2, 4), -1, np.float32), [2, 4])
    assert (values < 0).sum() == 1
    assert values[2, 4] == -1
