"""Which implementation computes a call, and with which tiles.

triton     this library's kernels: a GPU, or Triton's interpreter
aten       the framework's GEMM and an in-place addmm_, with our own backward: any device
reference  the equation in plain torch, differentiated by autograd: any device
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .kernels.tiles import Choice, Spec, Target, TileConfig

IMPLEMENTATIONS = ("auto", "triton", "aten", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = 1 << 16  # elements of x up to which, on a CPU, the host's work is most of a call's
PINNED: dict[str, TileConfig] = {}  # kernel name → tile, by testing.pinned_tiles


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter (TRITON_INTERPRET=1)."""
    from .kernels.common import INTERPRETED

    return bool(INTERPRETED.value)


@functools.cache
def target(device: torch.device) -> Target | None:
    """The device kind whose tiles `device` takes, or None where the kernels do not run."""
    from .kernels.tiles import TARGETS

    if device.type != "cuda":
        return TARGETS["sm_90"] if device.type == "cpu" and interpreted() else None
    if torch.version.hip:
        return TARGETS["gfx942"]
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return None
    # Consumer parts (8.6, 8.9, 12.x) have 99 KiB of shared memory, data-centre parts more.
    exact = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    return TARGETS[exact.get(capability, "sm_89")]


@functools.cache
def tiles(device: torch.device) -> Choice:
    """How the launches on `device` choose their tiles."""
    from .kernels.tiles import is_valid, select

    where = target(device)

    def choose(spec: Spec, m: int) -> TileConfig:
        pinned = PINNED.get(spec.kernel)
        if pinned is None:
            return select(where, spec, m)
        if not is_valid(pinned, where, spec):
            raise ValueError(f"the pinned {pinned} is not valid for {spec}")
        return pinned

    return choose


def why_not_triton(x: torch.Tensor, p: int, q: int) -> str | None:
    """Why the kernels cannot compute this call, or None if they can."""
    if not has_triton():
        return "Triton is not installed (pip install triton)"
    from .kernels.tiles import MAX_RANK

    if target(x.device) is None:
        if x.device.type == "cuda":
            return f"{torch.cuda.get_device_name(x.device)} is older than compute capability 8.0"
        return (
            f"x is on {x.device}: the kernels need a GPU, or TRITON_INTERPRET=1 in the environment "
            "before triton is imported"
        )
    if x.dtype not in KERNEL_DTYPES and not interpreted():
        return f"x is {x.dtype}: the kernels take float32, float16 and bfloat16"
    if max(p, q) > MAX_RANK:
        return f"down has P={p} and up has Q={q}: the kernels take at most {MAX_RANK}"
    return None


def small(x: torch.Tensor) -> bool:
    """Whether a call of "auto" is one whose time is the host's, not the arithmetic's."""
    return (
        x.is_cpu
        and x.numel() <= SMALL
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def implementation(asked: str, x: torch.Tensor, p: int, q: int) -> str:
    """The implementation for `asked`: "auto" is triton on a GPU where it can, otherwise aten.

    Raises ValueError for an unknown one, RuntimeError if "triton" is asked for and cannot do it.
    """
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {asked!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")
    if asked == "auto":
        return "triton" if x.device.type == "cuda" and not why_not_triton(x, p, q) else "aten"
    if asked == "triton" and (reason := why_not_triton(x, p, q)):
        raise RuntimeError(f"impl='triton' cannot compute this: {reason}. impl='auto' can.")
    return asked
