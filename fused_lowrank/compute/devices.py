"""Devices: whether Triton and the kernels run on one, and the tiles that it takes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from dataclasses import replace

import torch

from ..kernels.tile_choice import experimental_tile, select
from ..kernels.tiles import MANY, MAX_RANK, TARGETS, Choice, Spec, Target, TileConfig, is_valid

HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Pins = tuple[tuple[str, TileConfig], ...]  # (kernel, the tile that it is launched with)


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter (TRITON_INTERPRET=1)."""
    from ..kernels.common import INTERPRETED

    return bool(INTERPRETED.value)


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether kernels may run on the device, asked without importing Triton for it."""
    simulated = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return HAS_TRITON and (device.type == "cuda" or simulated)


@functools.cache
def target(device: torch.device) -> Target | None:
    """The device kind whose tiles `device` takes, or None where the kernels do not run."""
    if device.type != "cuda":
        simulated = replace(TARGETS["sm_90"], gluon=False)  # which nothing interprets
        return simulated if device.type == "cpu" and interpreted() else None
    if torch.version.hip:
        return TARGETS["gfx942"]
    properties = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return None
    # Consumer parts (8.6, 8.9, 12.x) have 99 KiB of shared memory, data-centre parts more.
    exact = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    taken = TARGETS[exact.get(capability, "sm_89")]
    shared = getattr(properties, "shared_memory_per_block_optin", taken.shared)
    return with_gluon(replace(taken, shared=min(taken.shared, shared)))


@functools.cache
def with_gluon(target: Target) -> Target:
    """The target, without the kernels for Hopper where they are not to be had, with a warning."""
    kind = TARGETS[target.name]
    if not kind.gluon:
        return target
    lacks = ""
    if target.shared < kind.shared:
        lacks = f"this device has {target.shared} bytes of shared memory, they take {kind.shared}"
    else:
        try:
            importlib.import_module("fused_lowrank.kernels.hopper")
        except Exception as error:  # whatever it is, Triton's other language does without
            lacks = f"this Triton has no Gluon as they need it ({type(error).__name__}: {error})"
    if lacks:
        warnings.warn(f"the kernels for Hopper are not used: {lacks}", stacklevel=2)
    return replace(target, gluon=not lacks)


def why_not_triton(device: torch.device, dtype: torch.dtype, p: int, q: int) -> str | None:
    """The reason why the kernels cannot compute this, or None if they can."""
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if target(device) is None:
        if device.type == "cuda":
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        return (
            f"x is on {device}: the kernels need a GPU, or TRITON_INTERPRET=1 in the environment "
            "before triton is imported"
        )
    if dtype not in KERNEL_DTYPES and not interpreted():
        return f"x is {dtype}: the kernels take float32, float16 and bfloat16"
    if max(p, q) > MAX_RANK:
        return f"down has P={p} and up has Q={q}: the kernels take at most {MAX_RANK}"
    return None


@functools.lru_cache(maxsize=256)
def tiles(device: torch.device, name: str = "", pins: Pins = ()) -> Choice:
    """The choice of tiles for launches on `device`: by a set of that name, and by pins before that.

    One object for the same device, name and pins. The names are those of `EXPERIMENTAL_TILES` and
    `SLICES` in kernels/tile_choice.py, "" for the defaults and "fixed" for tiles that do not follow
    the rows.

    Raises ValueError, when a launch chooses, for a pinned tile that is not valid for it.
    """
    where = target(device)
    assert where is not None, "whoever plans a launch has asked why_not_triton"
    pinned_tiles = dict(pins)

    def choose(spec: Spec, m: int) -> TileConfig:
        pinned = pinned_tiles.get(spec.kernel)
        if pinned is None and name == "fixed":
            many = select(where, replace(spec, n=MANY), MANY)
            return replace(many, whole_k=True) if spec.kernel == "shrink" else many
        if pinned is None:
            other = experimental_tile(name, where, spec, m)
            return other if other and is_valid(other, where, spec) else select(where, spec, m)
        if not is_valid(pinned, where, spec):
            raise ValueError(f"the pinned {pinned} is not valid for {spec}")
        return pinned

    return choose
