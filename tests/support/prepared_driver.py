"""The drivers under launches prepared and ordinary, and calls of each kind (prepared_checks.py)."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver as drivers
from triton.runtime.jit import JITFunction

from bench.support import stub as stubs
from fused_lowrank.kernels import common, launch
from fused_lowrank.kernels.core_grad import core_grad
from fused_lowrank.kernels.core_grad_rows import core_grad_rows
from fused_lowrank.kernels.decode import decode
from fused_lowrank.kernels.dropout import drawn_bits, dropped
from fused_lowrank.kernels.gain_back import gain_back
from fused_lowrank.kernels.gemm_tail import gemm_tail
from fused_lowrank.kernels.relay import relay
from fused_lowrank.kernels.shrink import shrink
from fused_lowrank.kernels.tile_choice import experimental_tile, select
from fused_lowrank.kernels.tiles import TARGETS, Spec, TileConfig

HERE = Path(__file__).parent
BYTES = sys.argv[1:2] == ["bytes"]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
P = 16
Call = Callable[[], Any]


class Replayed:
    """torch.empty, which gives the same tensors again after each `rewind`."""

    def __init__(self) -> None:
        self.real, self.kept, self.next = torch.empty, list[torch.Tensor](), 0

    def rewind(self, forget: bool = False) -> None:
        """Begin again."""
        self.next = 0
        if forget:
            self.kept.clear()

    def __call__(self, size: Any, **options: Any) -> torch.Tensor:
        if options.get("device") == "meta":
            return self.real(size, **options)
        if self.next == len(self.kept):
            self.kept.append(self.real(size, **options))
        made, self.next = self.kept[self.next], self.next + 1
        assert made.shape == torch.Size((size,) if isinstance(size, int) else size)
        assert made.dtype == options["dtype"]
        return made


EMPTY = Replayed()


def maker(device: torch.device) -> Callable[[Any, Any, torch.dtype], torch.Tensor]:
    """In place of the library's, by EMPTY."""

    def make(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made = EMPTY(shape, dtype=dtype, device=device)
        assert made.stride() == strides
        return made

    return make


DRIVER: list[Any] = []
CALLS: list[tuple[Any, ...]] = []  # of the function in C, where that is Python
COMPILED: list[Any] = []  # what ordinary launches have launched


class Map(tuple):
    """A tensor map: its arguments."""

    __slots__ = ()


def plain(value: Any) -> Any:
    """An argument of the function in C, to be compared: an address for a tensor."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    quiet = hasattr(value, "calls") and not value.calls  # a chain of no hooks
    return None if quiet or type(value).__name__ == "LazyDict" else value


def taken(call: Call) -> Any:
    """All that the one launch of a call is made with."""
    EMPTY.rewind()
    CALLS.clear()
    before = LIBCUDA.stub_launches() if BYTES else 0
    call()
    if BYTES:
        assert LIBCUDA.stub_launches() == before + 1
        buffer = ctypes.create_string_buffer(2**14)
        size = LIBCUDA.stub_read(buffer)
        return buffer.raw[:size]
    (args,) = CALLS
    return plain(args)


def ordinary(call: Call) -> Any:
    """The same of an ordinary launch; what is remembered stays as it is."""
    EMPTY.rewind(forget=True)
    with mock.patch.object(launch, "POSSIBLE", False):
        if BYTES:
            LIBCUDA.stub_layout(0, None)
            call()
            kinds = COMPILED[-1].src.signature.values()
            sizes = list(itertools.chain(*map(bytes_of, kinds)))
            LIBCUDA.stub_layout(len(sizes) + 2, (ctypes.c_int * (len(sizes) + 2))(*sizes, 8, 8))
        return taken(call)


def bytes_of(kind: str) -> list[int]:
    """The sizes of a kernel's parameters that an argument becomes."""
    if kind == "constexpr":
        return []
    if kind.startswith("tensordesc"):  # of two dimensions
        return [128, 4, 4, 8, 8]
    return [8 if kind[0] == "*" else {"i32": 4, "fp32": 4, "i64": 8, "fp64": 8}[kind]]


def agrees(label: str, call: Call, prepared: bool = True) -> Any:
    """A call is launched as an ordinary one is, again and again; what with."""
    expected = ordinary(call)
    assert taken(call) == expected, label
    for _ in range(2):
        count = len(COMPILED)
        assert taken(call) == expected, label
        assert (len(COMPILED) == count) == prepared, f"{label}: {len(COMPILED) - count} ordinary"
    return expected


# --- the drivers ---


class Driver(nvidia.CudaDriver):
    """Triton's own driver, and its function in C, over libcuda.c."""

    def __init__(self) -> None:
        super().__init__()
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_stream = lambda device: 0
        self.get_current_device = lambda: stubs.DEVICE
        self.set_current_device = lambda device: None

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def recording(stack: ExitStack) -> None:
    """Let the stub's driver keep what its function in C is called with."""

    def in_c(self: Any, *args: Any) -> None:
        CALLS.append(args)

    def fill(self: Any, *args: Any) -> Map:
        return Map(plain(args))

    handles = itertools.count(2)  # every kernel is a function of its own
    binary = lambda self, *args: (1, next(handles), 64, 0, 1024)  # noqa: E731
    for name, value in (
        ("launch", in_c),
        ("load_binary", binary),
        ("fill_tma_descriptor_tiled", fill),
    ):
        stack.enter_context(mock.patch.object(stubs.Utils, name, value))


@contextmanager
def started() -> Iterator[None]:
    """Inside, kernels are launched on CPU tensors, by one of the two drivers."""
    run = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        COMPILED.append(run(self, *args, **kwargs))
        return COMPILED[-1]

    with ExitStack() as stack:
        if not BYTES:
            recording(stack)
        driver: Any = stack.enter_context(stubs.stub())
        if BYTES:
            stack.enter_context(in_place_of_stub())
            driver = drivers.active
        DRIVER.append(driver)
        stack.enter_context(mock.patch.object(torch, "empty", EMPTY))
        stack.enter_context(mock.patch.object(launch, "maker", maker))
        stack.enter_context(mock.patch.object(JITFunction, "run", counted))
        yield


@contextmanager
def in_place_of_stub() -> Iterator[None]:
    """Inside, Triton's own driver is active; the stub still replaces parts of the library."""
    before = drivers.active
    vars(nvidia).update(IN_C)
    drivers.set_active(Driver())
    try:
        yield
    finally:
        drivers.set_active(before)


# --- the calls ---


def zeros(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype)


def by_default(spec: Spec, m: int) -> TileConfig:
    return select(TARGETS["sm_90"], spec, m)


def by_descriptors(spec: Spec, m: int) -> TileConfig:
    """Triton's persistent kernel where the default is Gluon's."""
    return select(TARGETS["sm_90"], replace(spec, bulk=False), m)


def by_slices(spec: Spec, m: int) -> TileConfig:
    """Several makers of t in a relay."""
    tile = experimental_tile("slices4", TARGETS["sm_90"], spec, m)
    if tile is None or tile.makers == 1:
        raise ValueError(f"no tile of several makers for {spec}")
    return tile


class Rows:
    """A core for each row, as kernels know it."""

    def __init__(self, m: int, slots: int, mix: int = 1, weighted: bool = False) -> None:
        self.table, self.right, self.repeat = zeros(slots, P, P, dtype=F32), None, 1
        self.handles = torch.zeros(m, mix, dtype=torch.int64)
        self.weights = zeros(m, mix, dtype=F32) if weighted else None
        self.scales = zeros(slots, dtype=F32)
        self.generations, self.refused = (zeros(n, dtype=torch.int32) for n in (slots, 1))


def calls(m: int, few: int, n: int, k: int) -> Iterator[tuple[str, Call]]:
    """A call of every kind of launch; `few` rows are at most 64, m are more."""
    x, some, weight, turned = zeros(m, k), zeros(few, k), zeros(n, k), zeros(k, n).t()
    odd = zeros(m + 1, k + 3)[1:, 1 : k + 1]
    down, up, core, bias = zeros(P, k), zeros(n, P), zeros(P, P, dtype=F32), zeros(n)
    back = zeros(k, P), zeros(P, n)
    pair = zeros(P, 8, dtype=F32), zeros(8, P, dtype=F32)
    u, seed, choose = zeros(m, P), torch.zeros(1, dtype=torch.int64), by_default
    whole, bits = (down, core, up), torch.zeros(m, common.mask_width(n), dtype=torch.uint8)
    launches = {
        "shrink": (shrink, x, down, core, 0.5, False, True, True, None),
        "shrink, a pair, back": (shrink, x, back[0], pair, 0.5, True, True, False, None),
        "shrink, no core": (shrink, x, down, None, 0.5, False, False, True, None),
        "shrink, dropout": (shrink, x, down, core, 0.5, False, True, True, (seed, 0.1)),
        "shrink, rows": (shrink, x, down, Rows(m, 9), 0.5, False, False, True, None),
        "shrink, split": (shrink, some, down, core, 0.5, False, True, True, None),
        "shrink, odd": (shrink, odd, down, core, 0.5, False, True, True, None),
        "gemm_tail": (gemm_tail, some, weight, u[:few], up, bias, False, None),
        "gemm_tail, odd": (gemm_tail, odd, weight, u, up, None, False, None),
        "gemm_tail, hopper": (gemm_tail, x, weight, u, up, bias, False, None),
        "gemm_tail, back": (gemm_tail, x, turned, u, back[1], None, True, bits),
        "gemm_tail, base": (gemm_tail, x, weight, None, None, None, False, None),
        "core_grad": (core_grad, u, zeros(m, P), core, 0.5, (True, True)),
        "core_grad, a pair": (core_grad, u, zeros(m, P), pair, 0.5, (True, False)),
        "core_grad_rows": (core_grad_rows, u, zeros(m, P), Rows(m, 9, 2, True), 0.5),
        "core_grad_rows, split": (core_grad_rows, u, zeros(m, P), Rows(m, 1), 0.5),
        "decode": (decode, some, weight, *whole, bias, 0.5, False, True),
        "decode, back": (decode, some, turned, back[0], core, back[1], None, 0.5, True, False),
        "decode, rows": (decode, some, weight, down, Rows(few, 3), up, None, 0.5, False, False),
        "relay": (relay, x, weight, *whole, bias, 0.5, False, True),
        "relay, back": (relay, x, turned, back[0], pair, back[1], None, 0.5, True, False),
        "relay, rows": (relay, x, weight, down, Rows(m, 9, 2, True), up, bias, 0.5, False, False),
        "dropped": (dropped, x, torch.zeros(m, common.mask_width(k), dtype=torch.uint8)),
        "drawn": (drawn_bits, seed, 0.1, m, k),
        "gain_back": (gain_back, zeros(m, n), zeros(m, n), zeros(n, dtype=F32), bias),
        "gain_back, dz alone": (gain_back, zeros(m, n), None, zeros(n, dtype=F32), None),
    }
    for label, (function, *operands) in launches.items():
        yield label, partial(function, *operands, choose)
    yield (
        "relay, slices",
        partial(relay, x, weight, *whole, bias, 0.5, False, True, by_slices),
    )
    slices = relay, x, turned, back[0], pair, back[1], None, 0.5, True, False, by_slices
    yield "relay, slices, back", partial(*slices)
    low = x, down, core, 0.5, False, True, True, (seed, 0.1), choose
    yield "shrink, bits", partial(shrink, *low, want_bits=True)
    made = gemm_tail, x, weight, u, up, bias, False, None
    yield "gemm_tail, persistent", partial(*made, by_descriptors)
    gain = zeros(n, dtype=F32)
    yield "gemm_tail, persistent, gain", partial(*made, by_descriptors, gain)
    yield "gemm_tail, hopper, gain", partial(*made, choose, gain)
    layer = *whole, bias, 0.5, False, True
    yield "decode, gain", partial(decode, some, weight, *layer, choose, gain)
    yield "relay, gain", partial(relay, x, weight, *layer, choose, gain)
    yield "relay, slices, gain", partial(relay, x, weight, *layer, by_slices, gain)


def built() -> str:
    """A folder with a libcuda.so.1 of ours."""
    folder = tempfile.mkdtemp()
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    out = Path(folder) / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    command += [str(HERE / "libcuda.c"), "-o", str(out)]
    subprocess.run(command, check=True)
    return folder


IN_C = {n: v for n, v in vars(nvidia).items() if n == "PyKernelArg" or n.startswith("ARG_")}
if BYTES:
    os.environ["TRITON_LIBCUDA_PATH"] = built()
    path = Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1"
    LIBCUDA = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    LIBCUDA.stub_launches.restype = ctypes.c_uint64
