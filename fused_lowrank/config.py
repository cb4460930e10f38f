"""The configuration of calls in a context: plan, tiles by kernel, batch invariance, dropout.

    with config.use(plan="split"):
        layer(x)  # and its backward, whenever and on whichever thread that runs

A `Config` belongs to the calling context, a thread or an asyncio task. An eager call takes it along
for its backward. A compiled graph reads it when its forward runs; its backward, and a checkpoint's
recomputation, read that of the thread that they run on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from .kernels.tiles import KERNELS, TileConfig


@dataclass(frozen=True)
class Config:
    """The settings of `use`. The default leaves everything to `choose`."""

    plan: str | None = None  # of every pass; None: the fastest
    tiles: tuple[tuple[str, TileConfig], ...] = ()  # (kernel, its tile)
    batch_invariance: bool | None = None  # None: as the process has it
    redraw_dropout: bool = False  # in the backward, and keep no bits of its mask


DEFAULT = [Config()]  # of the process: where no context has its own
CONTEXT: ContextVar[Config | None] = ContextVar("fused_lowrank_config", default=None)


def current() -> Config:
    """The configuration of this context."""
    here, process = CONTEXT.get(), DEFAULT[0]
    if here is None:
        return process
    if here.batch_invariance is None and process.batch_invariance:
        return replace(here, batch_invariance=True)
    return here


@contextmanager
def use(
    *,
    plan: str | None = None,
    tiles: Mapping[str, TileConfig] | None = None,
    batch_invariance: bool | None = None,
    redraw_dropout: bool | None = None,
) -> Iterator[None]:
    """A context in which calls are computed as told; an argument that is None changes nothing.

    Args:
        plan: the name of a plan (`fused_lowrank.compute.plans.PLANS`: "aten", "split", "decode", …)
            for every pass of every layer, whatever its `impl` is, "reference" excepted.
        tiles: the tile with which a kernel is launched, by the kernel's name.
        batch_invariance: as `use_batch_invariance`, but for this context alone.
        redraw_dropout: draw a dropout's mask again in the backward, by a launch more. Otherwise
            the mask of our kernels is kept as bits from the forward, M·K/8 bytes a layer. The
            numbers are the same. Compiled graphs and library products always draw it again. A
            checkpoint's recomputation may keep the bits, for as long as its own backward takes.

    Raises ValueError for an unknown plan or an invalid tile, and RuntimeError for a plan that
    cannot compute a pass, when a layer is called.
    """
    for kernel, tile in ({} if tiles is None else tiles).items():
        if kernel not in KERNELS or not isinstance(tile, TileConfig):
            raise ValueError(
                f"tiles has {tile!r} for {kernel!r}: it must have a TileConfig for any of "
                f"{', '.join(KERNELS)}"
            )
    before = CONTEXT.get() or Config()
    changes: dict[str, object] = {"plan": plan, "batch_invariance": batch_invariance}
    changes["redraw_dropout"] = redraw_dropout
    if tiles is not None:
        changes["tiles"] = tuple(sorted({**dict(before.tiles), **tiles}.items()))
    changed = {name: value for name, value in changes.items() if value is not None}
    entered = CONTEXT.set(replace(before, **changed))  # type: ignore[arg-type]
    try:
        yield
    finally:
        CONTEXT.reset(entered)


def use_batch_invariance(mode: bool) -> None:
    """Compute a row to the same bits in a batch of any size, from now on, in the whole process.

    Otherwise a row's bits may depend on how many rows there are, though never on what they hold:
    tiles, the splitting of K and libraries' own kernels follow the shape. With this a GPU takes the
    tiles for many rows always, and library GEMMs are called for one row at a time, which is many
    times slower than the batch. It holds for y and for dx; a core's gradient is a sum over the
    rows. `config.use(batch_invariance=True)` is for one context.

    Args:
        mode: True switches it on, False off again.

    A layer's call raises RuntimeError where it cannot be kept: by library GEMMs with dropout.
    """
    DEFAULT[0] = replace(DEFAULT[0], batch_invariance=True if mode else None)
