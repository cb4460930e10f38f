"""The launches of prepared_checks.py, changed in what is looked up each time, or is not known."""

from __future__ import annotations

import threading
import warnings
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from prepared_driver import (
    BYTES,
    CALLS,
    COMPILED,
    DRIVER,
    EMPTY,
    Call,
    P,
    agrees,
    by_default,
    taken,
    zeros,
)
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

from fused_lowrank.kernels import common, launch
from fused_lowrank.kernels.decode import decode
from fused_lowrank.kernels.gemm_tail import gemm_tail
from fused_lowrank.kernels.prepared import Mark
from fused_lowrank.kernels.shrink import shrink

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
