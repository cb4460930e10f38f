"""`Stub` is a driver for Triton that prepares launches on an H100 (sm_90) and launches nothing.

    with stub() as driver:
        layer(x)  # of CPU tensors, through the kernels' code for a GPU; y is whatever lay there
    driver.launches

What the host does for a launch is done, up to the call of the CUDA driver: arguments are bound and
specialised, kernels are looked up, compiled where they are new, and handed to Triton's launcher,
which does its part in Python. Left out is what only a GPU's machine has: the launcher's part in C,
which packs the arguments, makes tensor maps and launches; the look-up of the current stream; and
the GPU's allocator, for which stands the CPU's. Kernels are compiled as far as LLVM's code, not
optimised: nothing later says anything of a launch. They are kept in a cache of their own.

The library is told that CPU tensors lie on an H100 by replacing a few of its functions, found by
their names wherever they stand. `replacements` and `REMEMBERED` have those names.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDABackend, llvm
from triton.runtime import driver as drivers

PROCESSORS = 132  # multiprocessors of an H100
DEVICE = -1  # no GPU has this number: what is compiled here is launched by nobody else
REMEMBERED = ("CHOSEN", "LAUNCHES")  # the library's dicts of what it decided by signature


class Utils:
    """The functions that Triton asks of CUDA; every launch ends in `launch`, which counts it."""

    def __init__(self) -> None:
        self.launches = 0

    def launch(self, *args: Any, **kwargs: Any) -> None:
        """Launch nothing."""
        self.launches += 1

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        """A module, a function, registers, spills and threads at most of a compiled kernel."""
        return 1, 2, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Those of an H100, as far as Triton asks for them."""
        return {
            "max_shared_mem": 232_448,
            "max_num_regs": 65_536,
            "multiprocessor_count": PROCESSORS,
            "warpSize": 32,
        }

    def fill_tma_descriptor_tiled(self, *args: Any) -> object:
        """In place of a tensor map."""
        return object()

    def build_signature_metadata(self, signature: Any) -> bytes:
        """No signature: nothing is packed."""
        return b""


class Launcher:
    """A kernel's launcher where Triton's own is of another kind than `Stub` can use."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.launch = drivers.active.utils.launch

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Launch nothing."""
        self.launch()


class Stub(DriverBase):
    """The driver: an H100 that takes every launch and does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.utils, self.plan = Utils(), ""
        own = hasattr(nvidia, "PyKernelArg")  # as from Triton 3.7
        self.launcher_cls: Any = nvidia.CudaLauncher if own else Launcher
        self.get_current_device = lambda: DEVICE
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device=DEVICE: (9, 0)
        self.set_current_device = lambda device: None

    @property
    def launches(self) -> int:
        """The number of launches so far."""
        return self.utils.launches

    @contextmanager
    def chooses(self, plan: str) -> Iterator[None]:
        """Inside, a pass that has no plan yet is given this one, and keeps it afterwards.

        So its later calls go the way of a user's, by what the library remembers of the pass.
        """
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before

    @classmethod
    def is_active(cls) -> bool:
        """Always."""
        return True

    def get_current_target(self) -> GPUTarget:
        """The target that kernels are compiled for."""
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors really are."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """The type in C of one of Triton's."""
        return nvidia.ty_to_cpp(ty)

    def get_benchmarker(self) -> Any:
        """There is none: nothing runs."""
        raise RuntimeError("a stub launches nothing that could be timed")


def no_ptx(backend: CUDABackend, code: str, metadata: dict[str, Any], *others: Any) -> str:
    """In place of PTX of LLVM's code: nothing. The kernel's name is noted, as Triton notes it."""
    (metadata["name"],) = re.findall(r"^define ptx_kernel void @(\w+)\(", code, re.MULTILINE)
    return "none"


def no_binary(backend: CUDABackend, code: str, *others: Any) -> bytes:
    """In place of a binary of PTX: nothing."""
    return b"none"


@contextmanager
def half_compiled() -> Iterator[None]:
    """Inside, kernels are compiled as far as LLVM's code, and looked for in a cache of such."""
    cache = triton.knobs.cache
    with cache.scope(), ExitStack() as stack:
        cache.dir = str(Path(cache.dir) / "of_stub")
        stack.enter_context(mock.patch.object(llvm, "optimize_module"))
        stack.enter_context(mock.patch.object(CUDABackend, "make_ptx", no_ptx))
        stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", no_binary))
        yield


def library() -> list[ModuleType]:
    """The modules of this library that have been imported."""
    named = [(name, module) for name, module in sys.modules.items() if module is not None]
    return [module for name, module in named if name.split(".")[0] == "fused_lowrank"]


@contextmanager
def replaced(name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the library's `name` is `replacement` of what it was, in every module that has it."""
    found = [vars(module)[name] for module in library() if name in vars(module)]
    if not found or any(value is not found[0] for value in found):
        raise LookupError(f"the library has {len(found)} different {name}: it must have one")
    original, new = found[0], replacement(found[0])

    def put(old: Any, instead: Any) -> None:
        for module in library():
            if vars(module).get(name) is old:
                setattr(module, name, instead)

    put(original, new)
    try:
        yield
    finally:
        put(new, original)


def forget() -> None:
    """Empty what the library has cached and remembered."""
    for module in library():
        for name, value in list(vars(module).items()):
            if callable(clear := getattr(value, "cache_clear", None)):
                clear()
            elif name in REMEMBERED:
                value.clear()


def replacements(driver: Stub) -> dict[str, Callable[[Any], Any]]:
    """name → what takes the place of the library's function, or number, of that name."""
    from fused_lowrank.kernels.tiles import TARGETS

    def decide(original: Callable[..., Any]) -> Callable[..., Any]:
        def by_name(*args: Any, **kwargs: Any) -> Any:
            decision = original(*args, **kwargs)
            return dataclasses.replace(decision, plans=(driver.plan,)) if driver.plan else decision

        return by_name

    def always(answer: Any) -> Callable[[Any], Any]:
        return lambda original: functools.cache(lambda device: answer)

    return {
        "has_kernels": always(True),
        "target": always(TARGETS["sm_90"]),
        "multiprocessors": always(PROCESSORS),
        "SMALL": lambda original: -1,  # no x is so small that a chain of operations takes it
        "is_needed": lambda original: lambda x, sizes: not x.is_cpu,  # no, as it says of a GPU
        "decide": decide,
    }


@contextmanager
def stub() -> Iterator[Stub]:
    """Inside, kernels are launched on CPU tensors as on an H100, and do nothing.

    Raises RuntimeError where Triton interprets its kernels.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter launches nothing to be timed")
    kernels = importlib.import_module("fused_lowrank.kernels")
    for found in pkgutil.iter_modules(kernels.__path__):  # all who have one of the names
        importlib.import_module(f"{kernels.__name__}.{found.name}")
    driver, names = Stub(), ("PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE")
    before, parts = getattr(drivers, "_active", None), vars(nvidia)
    in_c = {name: parts[name] for name in names if name in parts}
    with half_compiled(), ExitStack() as stack:
        for name, replacement in replacements(driver).items():
            stack.enter_context(replaced(name, replacement))
        forget()
        parts.update({name: SimpleNamespace if name == "PyKernelArg" else name for name in in_c})
        drivers.set_active(driver)
        try:
            yield driver
        finally:
            drivers.set_active(before)
            parts.update(in_c)
            forget()
