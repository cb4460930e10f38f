"""Which implementation computes a call, by which plan, and with which tiles.

triton     this library's kernels: a GPU, or Triton's interpreter
aten       the framework's GEMM and an in-place addmm_, with our own backward: any device
auto       whatever is fastest on the device: the kernels or library GEMMs; the reference within
           torch.func's grad, vmap, jvp, …
reference  the equation in plain torch, differentiated by autograd: any device

Within an implementation a plan is chosen for each `Pass`: by what was measured, where something
was (`tuning`), otherwise by its cost on paper (`costs`). A pass keeps its plan while the process
lives.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from . import costs, isolation, tuning
from .costs import Pass

if TYPE_CHECKING:
    from .kernels.tiles import Choice, Spec, Target, TileConfig

IMPLEMENTATIONS = ("auto", "triton", "aten", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = 1 << 16  # elements of x up to which, on a CPU, the host's work is most of a call's
PINNED: dict[str, TileConfig] = {}  # kernel name → tile, by testing.pinned_tiles
PINNED_PLAN: list[str] = []  # at most one, by testing.pinned_plan
INVARIANT = [False]  # by use_batch_invariance


def use_batch_invariance(mode: bool) -> None:
    """Compute a row to the same bits in a batch of any size, from now on, in the whole process.

    Otherwise a row's bits may depend on how many rows there are, though never on what they hold:
    tiles, the splitting of K and libraries' own kernels follow the shape. With this a GPU takes the
    tiles for many rows always, and library GEMMs are called for one row at a time, which is many
    times slower than the batch. It is of y and of dx; a core's gradient is a sum over the rows.
    """
    INVARIANT[0] = bool(mode)


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
def has_kernels(device: torch.device) -> bool:
    """Whether kernels may run on the device, asked without importing Triton for it."""
    simulated = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return has_triton() and (device.type == "cuda" or simulated)


@functools.cache
def target(device: torch.device) -> Target | None:
    """The device kind whose tiles `device` takes, or None where the kernels do not run."""
    from .kernels.tiles import TARGETS

    if device.type != "cuda":
        return TARGETS["sm_90"] if device.type == "cpu" and interpreted() else None
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
    return replace(taken, shared=min(taken.shared, shared))


@functools.cache
def tiles(device: torch.device, variant: str = "") -> Choice:
    """How the launches on `device` choose their tiles; `variant` names a set instead."""
    from .kernels.tiles import SMALL_M, VARIANTS, is_valid, select

    where = target(device)
    assert where is not None, "whoever plans a launch has asked why_not_triton"
    instead = VARIANTS.get(variant, {})

    def choose(spec: Spec, m: int) -> TileConfig:
        pinned = PINNED.get(spec.kernel)
        if pinned is None and variant == "fixed":
            many = select(where, spec, SMALL_M + 1)
            return replace(many, whole_k=True) if spec.kernel == "shrink" else many
        if pinned is None:
            other = instead.get(spec.kernel)
            return other if other and is_valid(other, where, spec) else select(where, spec, m)
        if not is_valid(pinned, where, spec):
            raise ValueError(f"the pinned {pinned} is not valid for {spec}")
        return pinned

    return choose


def why_not_triton(device: torch.device, dtype: torch.dtype, p: int, q: int) -> str | None:
    """Why the kernels cannot compute this, or None if they can."""
    if not has_triton():
        return "Triton is not installed (pip install triton)"
    from .kernels.tiles import MAX_RANK

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


def spec_of(kernel: str, at: Pass) -> Spec:
    """A launch of a pass, its factors in x's dtype."""
    from .kernels.tiles import Spec, padded

    size = at.dtype.itemsize
    p = 16 if kernel == "gemm_tail" else padded(at.p)
    masked = at.dropout and at.back == (kernel == "gemm_tail")
    by_row = at.rows and kernel != "gemm_tail"
    return Spec(kernel, size, size, at.regular, p, padded(at.q), masked, by_row)


def why_not_variant(at: Pass, variant: str) -> str | None:
    """Why a pass cannot take the tiles of that name, or None if it can."""
    from .kernels.tiles import SMALL_M, VARIANTS, is_valid

    where = target(at.device)
    fits = where is not None and all(
        is_valid(tile, where, spec_of(kernel, at)) for kernel, tile in VARIANTS[variant].items()
    )
    if not fits or at.dtype.itemsize != 2 or not at.regular or at.m <= SMALL_M:
        return f"{variant!r} is for 16 bits, multiples of 16 and more than {SMALL_M} rows"
    return None


def why_not_one_launch(at: Pass, kernel: str) -> str | None:
    """Why `decode` or `relay` cannot compute a pass, or None if it can."""
    from .kernels.relay import is_possible
    from .kernels.tiles import SMALL_M, is_valid, select

    where, spec = target(at.device), spec_of(kernel, at)
    if at.dropout or at.want_u:
        return "has no dropout, and gives no u"
    if at.rows and kernel == "relay":
        return "has no core for each row"
    if (at.m <= SMALL_M) != (kernel == "decode"):
        return f"is for {'at most' if kernel == 'decode' else 'more than'} {SMALL_M} rows"
    if kernel == "decode":
        # A core in float32 beside 16 bits is usual, and takes more.
        several = (spec, replace(spec, factor_itemsize=max(4, spec.itemsize)))
        fits = where and all(is_valid(select(where, each, at.m), where, each) for each in several)
        return None if fits else "holds no such P beside its part of y"
    if at.p % 8 or at.q % 8 or where is None or not is_possible(where, spec, at.m):
        return "is for 16 bits, multiples of 16, ranks in 8s and P up to 64, on sm_90 and sm_100"
    return None


def small(x: torch.Tensor) -> bool:
    """Whether a call of "auto" is one whose time is the host's, not the arithmetic's."""
    return (
        x.is_cpu
        and not PINNED_PLAN
        and not INVARIANT[0]
        and x.numel() <= SMALL
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not transformed()
    )


def transformed() -> bool:
    """Whether this is inside a transform of torch.func: grad, vmap, jvp, …"""
    return torch._C._are_functorch_transforms_active()


def bucket(rows: int) -> int:
    """The numbers of rows that share a plan: up to a power of two."""
    return 1 << max(0, rows - 1).bit_length()


def implementation(asked: str, x: torch.Tensor, p: int, q: int) -> str:
    """`asked`, checked; "auto" is "reference" within torch.func's transforms, which see into that.

    Raises ValueError for an unknown one, RuntimeError if "triton" is asked for and cannot do it.
    """
    if asked not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {asked!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")
    if asked == "triton" and (reason := why_not_triton(x.device, x.dtype, p, q)):
        raise RuntimeError(f"impl='triton' cannot compute this: {reason}. impl='auto' can.")
    return "reference" if asked == "auto" and transformed() else asked


def isolates(impl: str, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether the library's products of a call have to be padded for its rows to stay apart.

    x (…, K) or dy (…, N), down (P, K), up (N, Q): the inner sizes, forward and backward.
    """
    sizes = *down.shape, *up.shape
    return impl != "triton" and isolation.is_needed(x, sizes)


@dataclass(frozen=True)
class Decision:
    """The plan of a pass, and why."""

    plans: tuple[str, ...]  # the best first; the others are for when it cannot be launched
    why: str


CHOSEN: dict[tuple[Pass, str], Decision] = {}
Names = Callable[[str, Pass], list[str]]


def decide(
    at: Pass, impl: str, names: Names, compute: Callable[[str], Any] | None, mode: str = ""
) -> Decision:
    """The decision for a pass, made anew. Nothing is measured without `compute`.

    `mode` is that of FUSED_LOWRANK_TUNE, and read from there if it is not given.
    """
    candidates = names(impl, at)
    if len(candidates) == 1:
        return Decision(tuple(candidates), "no other plan computes this")
    on_paper = sorted(candidates, key=lambda name: costs.predict(name, at).seconds)
    mode = mode or tuning.mode()
    if mode == "off":
        return Decision(tuple(on_paper), "least cost on paper; FUSED_LOWRANK_TUNE is off")
    times = tuning.known(at.device).get(tuning.name_of(at), {})
    lacking = any(name not in times for name in candidates)
    if lacking and mode == "full" and compute and tuning.possible(at.device):
        times = tuning.measure(at.device, candidates, compute)
        tuning.write(at.device, tuning.name_of(at), times)
    there = [name for name in candidates if times.get(name, tuning.NEVER) < tuning.NEVER]
    measured = sorted(there, key=lambda name: times[name])
    if not measured:
        return Decision(tuple(on_paper), "least cost on paper; nothing has been measured")
    said = ", ".join(f"{name} {times[name] * 1e3:.3f} ms" for name in measured)
    rest = [name for name in on_paper if name not in measured]
    return Decision((*measured, *rest), f"measured: {said}")


def carry_out(at: Pass, impl: str, names: Names, compute: Callable[[str], Any]) -> Any:
    """compute(plan) by the plan of the pass.

    A plan that the device turns out to have too little for (shared memory, registers) is given up
    with a warning; its place is taken by the next.
    """
    key = at, impl
    decision = CHOSEN.get(key)
    if decision is None:
        decision = CHOSEN.setdefault(key, decide(at, impl, names, compute))
    try:
        return compute(decision.plans[0])
    except Exception as error:
        if not tuning.is_lack(error) or len(decision.plans) == 1:
            raise
        left = decision.plans[1:]
        given_up = f"{decision.plans[0]} cannot be launched here ({error})"
        tuning.warn_once(f"{given_up}: {left[0]} takes its place")
        CHOSEN[key] = replace(decision, plans=left)
        return carry_out(at, impl, names, compute)
