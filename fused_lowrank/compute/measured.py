"""Measured times of plans, kept in a file of the user's.

FUSED_LOWRANK_TUNE  off     costs on paper decide: the choice depends on shape and device alone
                    cached  what the file has decides, costs on paper where it has nothing (default)
                    full    what the file lacks is measured, once, and put into it

There is a file for each device, `plans-<device>.json` in $XDG_CACHE_HOME/fused_lowrank (by default
~/.cache/fused_lowrank). It is of one driver, one set of versions and one state of the kernels'
sources; a file of others is not used, and replaced when something is measured.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

if TYPE_CHECKING:
    from .operands import Problem

MODES = ("off", "cached", "full")
REPETITIONS = 7
Times = dict[str, float]  # a plan's name → its median seconds
NEVER = float("inf")
FLAGS = {  # of a problem → as the file has it
    "transposed": "back",
    "regular": "regular",
    "dropout": "dropout",
    "want_u": "want_u",
    "by_row": "rows",
    "bulk": "bulk",
    "diagonal": "diagonal",
    "gain": "gain",
}


def mode() -> str:
    """The value of FUSED_LOWRANK_TUNE. Raises ValueError for an unknown one."""
    value = os.environ.get("FUSED_LOWRANK_TUNE", "cached")
    if value not in MODES:
        raise ValueError(f"FUSED_LOWRANK_TUNE is {value!r}: it must be one of {', '.join(MODES)}")
    return value


def name_of(problem: Problem) -> str:
    """A pass as the file names it; its device is the file's."""
    flags = [word for name, word in FLAGS.items() if getattr(problem, name)]
    sizes = " ".join(f"{name}{getattr(problem, name)}" for name in "mknpq")
    flags += [problem.base] if problem.base else []
    return " ".join([str(problem.dtype).removeprefix("torch."), sizes, *flags])


def device_name(device: torch.device) -> str:
    """A GPU's name, or a CPU's architecture, capability and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {threads} threads"


@functools.cache
def identity(device: torch.device) -> dict[str, str]:
    """The names and versions that measured times are valid for."""
    from .. import kernels

    digest = hashlib.sha256()
    sources = sorted(Path(kernels.__path__[0]).glob("*.py"))
    plans = sorted(Path(__file__).parent.rglob("*.py"))
    for path in [*sources, *plans]:
        digest.update(path.name.encode() + path.read_bytes())
    driver = "none"
    if device.type == "cuda":
        driver = str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())
    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:
        triton = "absent"
    return {
        "device": device_name(device),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton,
        "sources": digest.hexdigest()[:16],
    }


def path_of(device: torch.device) -> Path:
    """The file of a device."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return Path(root) / "fused_lowrank" / f"plans-{slug}.json"


@functools.cache
def warn_once(text: str) -> None:
    """A UserWarning, the first time that this text is to be said."""
    warnings.warn(text, stacklevel=2)


def read(device: torch.device) -> dict[str, Times]:
    """The times in the file of a device, or nothing and a warning if it cannot be used."""
    path = path_of(device)
    try:
        content = json.loads(path.read_text())
        theirs, passes = dict(content["identity"]), content["passes"]
        entries = {
            str(name): {str(plan): float(seconds) for plan, seconds in times.items()}
            for name, times in passes.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warn_once(f"{path} is not used: it cannot be read ({type(error).__name__}: {error})")
        return {}
    changed = [name for name, ours in identity(device).items() if theirs.get(name) != ours]
    if changed:
        warn_once(
            f"{path} is not used: its {', '.join(changed)} is not that of here and now; "
            "FUSED_LOWRANK_TUNE=full measures again"
        )
        return {}
    return entries


@functools.cache
def times_of(device: torch.device) -> dict[str, Times]:
    """The times in the file when it was first asked for, and those measured since."""
    return read(device)


def write(device: torch.device, name: str, times: Times) -> None:
    """Put one pass into the file, atomically, beside what other processes have put there."""
    times_of(device)[name] = times
    path = path_of(device)
    content = {"identity": identity(device), "passes": {**read(device), **times_of(device)}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warn_once(f"{path} cannot be written ({error}): what is measured is kept for this process")


def possible(device: torch.device) -> bool:
    """Whether something may be measured now: not in a captured graph nor in a trace."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def measure(device: torch.device, names: Sequence[str], compute: Callable[[str], Any]) -> Times:
    """Median seconds of each plan; the plans take turns, with a cold cache on a GPU.

    A plan for which the device has too little takes for ever; one that finds no memory now is left
    out.
    """
    clock = _gpu_clock(device) if device.type == "cuda" else _host_clock
    times: Times = {}
    samples: dict[str, list[float]] = {}
    for name in names:
        try:
            compute(name)  # compiles, and warms up
            samples[name] = []
        except (torch.OutOfMemoryError, MemoryError):
            release(device)
        except Exception as error:
            if not is_lack(error):
                raise
            times[name] = NEVER
    for _ in range(REPETITIONS):
        for name in list(samples):
            try:
                samples[name].append(clock(lambda name=name: compute(name)))  # type: ignore[misc]
            except torch.OutOfMemoryError:
                del samples[name]
                release(device)
    return {**times, **{name: statistics.median(several) for name, several in samples.items()}}


def is_lack(error: Exception) -> bool:
    """Whether an error says that the device has too little for a launch: registers, …"""
    if "cooperative launch" in str(error):  # no room for all programs at once
        return True
    return type(error).__name__ in ("OutOfResources", "PTXASError")  # Triton's, if it is there


def release(device: torch.device) -> None:
    """Give back what the allocator holds."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _host_clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_clock(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(size, dtype=torch.int8, device=device)

    def clock(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock
