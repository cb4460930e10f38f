"""What test_prepared.py runs in processes of their own: launches prepared and ordinary.

    python tests/support/prepared_checks.py arguments  what the function in C is called with
    python tests/support/prepared_checks.py bytes      what that gives to the driver (libcuda.c)

Nothing is launched. Every function named check_… is run, or those named behind, and a line says how
it went.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.support import stub as stubs
from fused_lowrank.kernels import common, launch
from fused_lowrank.kernels.core_grad import core_grad
from fused_lowrank.kernels.core_grad_rows import core_grad_rows
from fused_lowrank.kernels.decode import decode
from fused_lowrank.kernels.dropout import drawn_bits, dropped
from fused_lowrank.kernels.gemm_tail import gemm_tail
from fused_lowrank.kernels.prepared import Mark
from fused_lowrank.kernels.relay import relay
from fused_lowrank.kernels.shrink import shrink
from fused_lowrank.kernels.tiles import TARGETS, Spec, TileConfig, select, variant

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
    tile = variant("slices4", TARGETS["sm_90"], spec, m)
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


def drawn(rng: random.Random) -> tuple[int, int, int, int]:
    """(m, few, n, k) of calls whose code is the same: tiles are as many as one likes."""
    few, parts = rng.randint(33, 64), rng.choice((8, 16, 24))
    return rng.randint(65, 2000), few, 256 * rng.randint(1, 9), 64 * parts


def check_every_launch_is_the_ordinary_one() -> None:
    rng = random.Random(0)
    for _ in range(3):
        for label, call in calls(*drawn(rng)):
            agrees(label, call)


def check_what_is_remembered_is_not_taken_for_another() -> None:
    """Calls of all sizes in any order, none forgotten; what differs between them shows."""
    rng, made = random.Random(1), []
    for i in range(3):
        made += [(f"{label} {i}", call) for label, call in calls(*drawn(rng))]
    for _ in range(2):
        rng.shuffle(made)
        for label, call in made:
            assert ordinary(call) == taken(call), label


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like this, at an address that is no multiple of 16."""
    return zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


def others(function: Callable[..., Any], made: dict[str, Any]) -> Iterator[tuple[str, Call]]:
    """Calls that differ from one in one thing each."""

    def call(**change: Any) -> Call:
        return partial(function, **{**made, **change})

    yield "itself", call()
    yield "moved", call(**{n: v.clone() for n, v in made.items() if isinstance(v, torch.Tensor)})
    yield "other tiles", call(choose=lambda spec, m: replace(by_default(spec, m), num_stages=2))
    rows = made.get("x", made.get("t"))
    m, width = rows.shape
    for name, value in made.items():
        if isinstance(value, torch.Tensor):
            if name != "seed":
                yield f"{name} misaligned", call(**{name: misaligned(value)})
            if name in ("core", "up", "down"):
                yield f"{name} in fp16", call(**{name: value.to(F16)})
        elif isinstance(value, bool) and name != "transposed":
            yield f"not {name}", call(**{name: not value})
    if "x" in made:
        wide = zeros(m, 2 * width)
        yield "x wide", call(x=wide[:, :width])
        yield "x strided", call(x=wide[:, ::2])
    if "weight" in made:
        n, k = made["weight"].shape
        yield "W of columns", call(weight=zeros(k, n).t())
        yield "W wide", call(weight=zeros(n, 2 * k)[:, :k])
        if "u" not in made:
            yield "no bias", call(bias=None)
    if "scale" in made:
        yield "another scale", call(scale=3.0)
    if "core" in made:
        square = zeros(P, P, dtype=F32)
        yield "a pair of squares", call(core=(made["core"], square))
        yield "a pair of one square", call(core=(made["core"],) * 2)
        if "x" in made:
            yield "no core", call(core=None)
            yield (
                "transposed",
                call(
                    transposed=True,
                    **{n: v.t().contiguous() for n, v in made.items() if n in ("down", "up")},
                ),
            )
    if "dropout" in made:
        seed = torch.zeros(1, dtype=torch.int64)
        for p in (0.1, 0.25):
            yield f"dropout {p}", call(dropout=(seed, p))
            yield f"dropout {p}, bits", call(dropout=(seed, p), want_bits=True)
    if "bits" in made:
        width = common.mask_width(len(made["weight"]))
        bits = torch.zeros(m, width, dtype=torch.uint8)
        yield "bits", call(bits=bits)
        yield "bits misaligned", call(bits=misaligned(bits))
    if "want" in made:
        pair = zeros(P, 8, dtype=F32), zeros(8, P, dtype=F32)
        for want in itertools.product((False, True), repeat=2):
            yield f"a pair, {want}", call(core=pair, want=want)


def check_nothing_else_is_taken_for_it() -> None:
    """Not with another dtype, stride, alignment, flag or tile, nor elsewhere in memory."""
    k, n, choose = 512, 256, by_default
    down, core, up, bias = zeros(P, k), zeros(P, P, dtype=F32), zeros(n, P), zeros(n)
    flags = {"scale": 0.5, "transposed": False, "choose": choose}
    layer = {"weight": zeros(n, k), "down": down, "core": core, "up": up, "bias": bias, **flags}
    tail = {"weight": layer["weight"], "up": up, "bias": bias, "transposed": False}
    tail |= {"bits": None, "choose": choose}
    low = {"down": down, "core": core, "want_t": True, "want_u": True, "dropout": None, **flags}
    grad = {"t": zeros(300, P), "g": zeros(300, P), "core": core, "scale": 0.5}
    kinds: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (shrink, {"x": zeros(128, k), **low}),
        (shrink, {"x": zeros(16, k), **low}),
        (gemm_tail, {"x": zeros(128, k), "u": zeros(128, P), **tail}),
        (gemm_tail, {"x": zeros(16, k), "u": zeros(16, P), **tail}),
        (core_grad, {**grad, "want": (True, True), "choose": choose}),
        (decode, {"x": zeros(16, k), "want_t": False, **layer}),
        (relay, {"x": zeros(128, k), "want_t": False, **layer}),
        (relay, {"x": zeros(128, k), "want_t": False, **layer, "choose": by_slices}),
    ]
    rng = random.Random(2)
    for function, made in kinds:
        several = []
        for label, call in others(function, made):
            try:
                several.append((f"{function.__name__}, {label}", call, ordinary(call)))
            except (ValueError, StopIteration):  # there is no tile
                assert function is relay, label
        for (one, _, first), (other, _, second) in itertools.combinations(several, 2):
            assert first != second, (one, other)
        for _ in range(3):
            rng.shuffle(several)
            for label, call, _ in several:
                assert ordinary(call) == taken(call), (function.__name__, label)


def check_rows_of_another_kind_are_another_launch() -> None:
    """Adapters to a row, their weights, and the rows to a line: no shape in the key tells them."""
    m, k = 48, 512
    some, whole = (
        zeros(m, k),
        {"down": zeros(P, k), "scale": 0.5, "transposed": False, "want_t": False},
    )
    more = {"weight": zeros(64, k), "up": zeros(64, P), "bias": None}
    kinds = list(itertools.product((1, 2), (1, 2), (False, True)))
    many = zeros(2 * m, k)
    for _ in range(2):
        for repeat, mix, weighted in kinds:
            for function, x, others in (
                (shrink, some, {"want_u": True, "dropout": None}),
                (decode, some, more),
                (relay, many, more),
            ):
                rows = Rows(len(x) // repeat, 3, mix, weighted)
                rows.repeat = repeat
                given = {"x": x, "core": rows, "choose": by_default, **whole}
                call = partial(function, **given, **others)
                assert ordinary(call) == taken(call), (function.__name__, repeat, mix, weighted)


def check_transposed_counts_where_no_shape_shows_it() -> None:
    side, one = 64, zeros(64, 64)
    tensors = {"x": zeros(side, side), "down": one, "up": one.clone(), "weight": zeros(side, side)}
    low = {"core": zeros(side, side), "scale": 0.5}
    for function, names, more in (
        (shrink, ("x", "down"), {**low, "want_t": True, "want_u": True, "dropout": None}),
        (gemm_tail, ("x", "weight", "up"), {"u": zeros(side, side), "bias": None, "bits": None}),
        (decode, ("x", "weight", "down", "up"), {**low, "want_t": True, "bias": None}),
    ):
        operands = {name: tensors[name] for name in names} | more
        for transposed in (False, True, False, True):
            call = partial(function, **operands, transposed=transposed, choose=by_default)
            assert ordinary(call) == taken(call), (function.__name__, transposed)


# --- what is looked up at every launch ---


def decoded(m: int = 16) -> Call:
    """A launch of decode, which meets at `arrivals`."""
    operands = zeros(m, 512), zeros(256, 512), zeros(P, 512), zeros(P, P), zeros(256, P), None
    return partial(decode, *operands, 0.5, False, False, by_default)


def at_counters(call: Call) -> tuple[int, int]:
    """(the stream, the address of the counters) that a launch of `decode` is made with."""
    args = taken(call)
    # grid, stream, …, and the kernel's arguments, flat or as one sequence
    operands = args[-1] if isinstance(args[-1], tuple) else args
    names = list(COMPILED[-1].src.signature)
    return args[3], operands[len(operands) - len(names) + names.index("arrivals_ptr")]


def of_stream(stream: int) -> int:
    """The address of a stream's counters."""
    return common._counters(torch.device("cpu"), stream).data_ptr()


def check_the_stream_and_its_counters_are_those_of_the_moment() -> None:
    call = decoded()
    agrees("decode", call)
    if BYTES:
        return
    driver = DRIVER[0]
    for stream in (0, 7, 0, 8):
        with mock.patch.object(driver, "get_current_stream", lambda device, s=stream: s):
            assert at_counters(call) == (stream, of_stream(stream))
    found = []

    def of_thread(device: int) -> int:
        return threading.get_ident()

    with mock.patch.object(driver, "get_current_stream", of_thread):
        thread = threading.Thread(
            target=lambda: found.append((threading.get_ident(), at_counters(call)))
        )
        thread.start()
        thread.join()
    ((ident, there),) = found
    assert there == (ident, of_stream(ident))
    assert ident != threading.get_ident()


def check_a_graph_that_is_captured_has_counters_of_its_own() -> None:
    call = decoded()
    agrees("decode", call)
    if BYTES:
        return
    made: list[torch.Tensor] = []
    real = torch.zeros

    def kept(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(real(*args, **kwargs))
        return made[-1]

    capturing = mock.patch.object(common, "capturing", return_value=True)
    with capturing, mock.patch.object(torch, "zeros", kept):
        found = [at_counters(call)[1] for _ in range(2)]
    assert found == [tensor.data_ptr() for tensor in made]
    assert len(set(found)) == 2
    assert not any(tensor.any() for tensor in made)
    assert at_counters(call)[1] == of_stream(0)


def check_hooks_that_are_added_later_are_called() -> None:
    call, seen = decoded(), []
    agrees("decode", call)
    runtime = triton.knobs.runtime

    def entered(metadata: Any) -> None:
        seen.append(("in", metadata.get()["name"], metadata.get()["stream"]))

    def left(metadata: Any) -> None:
        seen.append(("out", metadata.get()["name"]))

    runtime.launch_enter_hook.add(entered)
    runtime.launch_exit_hook.add(left)
    try:
        if BYTES:
            taken(call)
        else:
            hooks = [arg for arg in plain_hooks(call) if arg is not None]
            hooks[1](hooks[0])
            hooks[2](hooks[0])
    finally:
        runtime.launch_enter_hook.remove(entered)
        runtime.launch_exit_hook.remove(left)
    assert seen == [("in", "decode_kernel", 0), ("out", "decode_kernel")]
    agrees("decode", call)


def plain_hooks(call: Call) -> list[Any]:
    """(metadata, enter, exit) that a launch is made with."""
    EMPTY.rewind()
    CALLS.clear()
    call()
    ((*args,),) = CALLS
    return [arg for arg in args if hasattr(arg, "calls") or type(arg).__name__ == "LazyDict"]


def check_a_hook_before_runs_keeps_launches_ordinary() -> None:
    call = decoded()
    agrees("decode", call)
    function = COMPILED[-1].src.fn
    function.pre_run_hooks.append(lambda *args, **kwargs: None)
    try:
        count = len(COMPILED)
        taken(call)
        assert len(COMPILED) == count + 1
    finally:
        function.pre_run_hooks.clear()


def check_knobs_are_looked_at() -> None:
    call, runtime = decoded(), triton.knobs.runtime
    agrees("decode", call)
    before = COMPILED[-1]
    runtime.debug = True
    try:
        agrees("decode, to be debugged", call)
        assert COMPILED[-1] is not before
    finally:
        runtime.debug = False
    agrees("decode", call)
    key = launch.key_of("decode", (zeros(16, 16),))[0]
    with mock.patch.object(triton.knobs.compilation, "instrumentation_mode", "else"):
        assert launch.key_of("decode", (zeros(16, 16),))[0] != key
    if hasattr(runtime, "add_stages_inspection_hook"):
        runtime.add_stages_inspection_hook = lambda *args: ("", "")
        try:
            assert launch.key_of("decode", (zeros(16, 16),))[0] is None
        finally:
            runtime.add_stages_inspection_hook = None


class Elsewhere(torch.Tensor):
    """A tensor on another device."""

    def get_device(self) -> int:
        return 1


def check_another_device_is_another_launch() -> None:
    x, down, core = zeros(128, 512), zeros(P, 512), zeros(P, P)
    rest = 0.5, False, True, True, None, by_default
    agrees("shrink", partial(shrink, x, down, core, *rest))
    there = [tensor.as_subclass(Elsewhere) for tensor in (x, down, core)]
    for moved in (there, [x, there[1], core], [x, down, there[2]]):
        count = len(COMPILED)
        taken(partial(shrink, *moved, *rest))
        assert len(COMPILED) == count + 1


# --- what is not known ---


def among_marks(recorded: Any, ordinary: Any) -> Any:
    """A launcher that does another thing where it is given marks."""

    def call(self: Any, *args: Any) -> None:
        (recorded if any(type(arg) is Mark for arg in args) else ordinary)(self, *args)

    return call


def check_an_unknown_launcher_is_left_alone() -> None:
    """Whatever it does differently: with one warning, and launches are made."""

    def dropping(call: Any) -> Any:
        return lambda self, *args: call(self, *args[:11], *args[12:])

    def twice(call: Any) -> Any:
        return lambda self, *args: (call(self, *args), call(self, *args))

    def without_stream(call: Any) -> Any:
        return lambda self, *args: call(self, *args[:3], 0, *args[4:])

    def failing(call: Any) -> Any:
        return lambda self, *args: [].pop()

    real = nvidia.CudaLauncher.__call__
    call, seen = decoded(), []
    launch.WARNED.clear()
    for change in (dropping, twice, without_stream, failing):
        launch.LAUNCHES.clear()

        launcher = among_marks(change(real), real)
        with mock.patch.object(nvidia.CudaLauncher, "__call__", launcher):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                agrees(change.__name__, call, prepared=False)
            seen += caught
        agrees(change.__name__, call, prepared=False)  # it is not asked again
    (warning,) = seen
    assert warning.category is UserWarning
    assert triton.__version__ in str(warning.message)
    launch.LAUNCHES.clear()
    launch.WARNED.clear()
    agrees("as before", call)


def check_what_is_not_compiled_is_not_remembered() -> None:
    """Nor is that a reason for not trying again."""
    call = decoded()
    launch.LAUNCHES.clear()
    with mock.patch.object(JITFunction, "run", return_value=None):
        call()
    assert not launch.LAUNCHES
    agrees("decode", call)


def check_there_are_only_so_many() -> None:
    launch.LAUNCHES.clear()
    with mock.patch.object(launch, "MOST", 3), mock.patch.object(launch, "MOST_MAPS", 2):
        for m in range(100, 108):
            weights = [zeros(256, 512) for _ in range(4)]
            for weight in weights:
                x, u, up = zeros(m, 512), zeros(m, P), zeros(256, P)
                agrees(
                    "gemm_tail",
                    partial(gemm_tail, x, weight, u, up, *(None, False, None), by_default),
                )
            assert len(launch.LAUNCHES) <= 3


def built() -> str:
    """A folder with a libcuda.so.1 of ours."""
    folder = tempfile.mkdtemp()
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    out = Path(folder) / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    command += [str(HERE / "libcuda.c"), "-o", str(out)]
    subprocess.run(command, check=True)
    return folder


if __name__ == "__main__":
    IN_C = {n: v for n, v in vars(nvidia).items() if n == "PyKernelArg" or n.startswith("ARG_")}
    if BYTES:
        os.environ["TRITON_LIBCUDA_PATH"] = built()
        path = Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1"
        LIBCUDA = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        LIBCUDA.stub_launches.restype = ctypes.c_uint64
    with started():
        for name, check in list(globals().items()):
            if name.startswith("check_") and (name in sys.argv[2:] or not sys.argv[2:]):
                try:
                    check()
                    print(name, "passed", flush=True)
                except Exception:
                    print(name, "failed", flush=True)
                    traceback.print_exc()
