"""Steps by this library's kernels: `library` says what a step is.

shrink, gemm_tail    a launch each
decode, relay        the whole pass in one launch: few rows, many rows
core_grad            a launch
gain_back            a launch
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...kernels.tile_choice import EXPERIMENTAL_TILES, SLICES, experimental_tile, select
from ...kernels.tiles import RELAY_RANK, SMALL_M, Spec, TileConfig, is_valid, padded
from .. import costs, devices
from ..costs import Work
from ..dropout import Dropout, dropped
from ..gain import widened
from ..operands import Operands, Problem
from ..reference import RowCores
from .library import Step, Wanted, contiguous, of_tables


class Kernel(Step):
    """A step that is a launch of one of this library's kernels; `choose` gives its tiles."""

    def __init__(self, kernel: str, module: str = "") -> None:
        self.kernels, self.module = (kernel,), module or kernel

    @functools.cached_property
    def launch(self) -> Any:
        """The kernel's function, imported with Triton when it is first needed."""
        module = importlib.import_module(f"fused_lowrank.kernels.{self.module}")
        return getattr(module, self.kernels[0])

    def why_not(self, problem: Problem) -> str | None:
        """The reason why the kernels cannot run, or None if they can."""
        reason = devices.why_not_triton(problem.device, problem.dtype, problem.p, problem.q)
        if not reason and problem.doubles and not devices.interpreted():
            return "a factor is torch.float64: the kernels take float32, float16 and bfloat16"
        return reason


class Shrink(Kernel):
    """t and u in one launch; u is padded to a power of two."""

    def run(
        self, operands: Operands, choose: Any, want_t: bool, want_u: bool, want_bits: bool = False
    ) -> tuple[Wanted, Wanted, Wanted]:
        """(t, u, bits), each if wanted.

        t (M, P), divided by 1 - p where there is dropout; u (M, padded(Q)); the dropout's mask, not
        where that is given.
        """
        x, _, down, core, _, _, scale, dropout, transposed, _ = operands
        down, core = down.contiguous(), contiguous(core)
        masked = None if transposed or dropout is None else dropout
        if masked is not None and masked.bits is not None:  # the kernel draws: it is not given one
            given = operands._replace(x=dropped(x, masked), scale=scale / (1.0 - masked.p))
            t, u, _ = self.run(given._replace(dropout=None), choose, want_t, want_u)
            return (t.div_(1.0 - masked.p) if want_t else None), u, None
        flags = transposed, want_t, want_u, masked and masked[:2], choose, want_bits
        t, u, *bits = self.launch(x, down, core, scale, *flags)
        return t, u, bits[0] if bits else None

    def work(self, problem: Problem) -> list[Work]:
        """x is read once."""
        return [costs.shrink(problem, tile_of("shrink", problem))]


class GemmTail(Kernel):
    """y in one launch; without u and up it is the base by itself."""

    def run(self, operands: Operands, choose: Any, u: Tensor) -> Tensor:
        """y (M, N)."""
        x, weight, _, _, up, bias, _, dropout, transposed, gain = operands
        up = None if up is None else up.contiguous()
        bias = None if bias is None else bias.contiguous()
        bits = bits_of(dropout, (x.shape[0], weight.shape[0]), choose) if transposed else None
        gain = None if gain is None else widened(gain, x.dtype)
        return self.launch(x, weight, u, up, bias, transposed, bits, choose, gain)

    def work(self, problem: Problem) -> list[Work]:
        """A GEMM with some more steps of its loop."""
        return [costs.gemm_tail(problem, tile_of("gemm_tail", problem))]


class OneLaunch(Kernel):
    """The whole pass in one launch: `decode` for few rows, `relay` for many."""

    def run(self, operands: Operands, choose: Any, want_t: bool) -> tuple[Tensor, Wanted]:
        """(y, t), t only if wanted."""
        x, weight, down, core, up, bias, scale, _, transposed, gain = operands
        factors = down.contiguous(), contiguous(core), up.contiguous()
        bias = None if bias is None else bias.contiguous()
        gain = None if gain is None else widened(gain, x.dtype)
        return self.launch(x, weight, *factors, bias, scale, transposed, want_t, choose, gain)

    def why_not(self, problem: Problem) -> str | None:
        """The reason against so many rows, such ranks or this device; None if there is none."""
        (kernel,), reason = self.kernels, super().why_not(problem)
        where = None if reason else devices.target(problem.device)
        if kernel == "relay" and (where is None or not where.gluon):
            alone = "it is a kernel for Hopper (sm_90) alone: no interpreter runs it"
            return reason if reason and problem.device.type == "cuda" else alone
        if reason:
            return reason
        from ...kernels.relay import is_possible

        spec = spec_of(kernel, problem)
        if problem.dropout or problem.want_u:
            return "it has no dropout, and gives no u"
        if (problem.m <= SMALL_M) != (kernel == "decode"):
            return f"it is for {'at most' if kernel == 'decode' else 'more than'} {SMALL_M} rows"
        if kernel == "decode":
            # A core in float32 beside 16 bits is usual, and takes more.
            several = spec, replace(spec, factor_itemsize=max(4, spec.itemsize))
            fits = where and all(
                is_valid(select(where, each, problem.m), where, each) for each in several
            )
            return None if fits else "it holds no such P beside its part of y"
        assert where is not None  # else the kernels cannot run at all
        if not is_possible(where, spec, problem.m):
            return (
                "it is for 16 bits, factors of x's dtype, rows that are multiples of 16 bytes, "
                f"ranks up to {RELAY_RANK}, and no more rows than there are flags for"
            )
        return None

    def work(self, problem: Problem) -> list[Work]:
        """The work of the whole pass: everything once, and a wait."""
        if self.kernels[0] == "decode":
            return [costs.decode(problem)]
        return [costs.relay(problem, tile_of("relay", problem))]


class CoreGrad(Kernel):
    """The core's gradients in one launch."""

    def run(
        self, t: Tensor, g: Tensor, core: Any, scale: float, want: tuple[bool, bool], choose: Any
    ) -> tuple[Wanted, Wanted]:
        """(dcore, None), or for a pair (da, db), those that are wanted."""
        if isinstance(core, RowCores):
            from ...kernels.core_grad_rows import core_grad_rows

            return of_tables(core_grad_rows(t, g, core, scale, choose), core, want)
        return self.launch(t, g, contiguous(core), scale, want, choose)


class GainBack(Kernel):
    """The way back through the gain in one launch."""

    def run(
        self, dy: Tensor, y: Wanted, gain: Tensor, bias: Wanted, choose: Any
    ) -> tuple[Tensor, Wanted]:
        """(dy ⊙ gain, dgain), the latter where y is given; gain is `widened`."""
        y = None if y is None else y.contiguous()
        return self.launch(dy, y, gain, None if bias is None else bias.contiguous(), choose)


class Masked(Kernel):
    """x under the kernels' mask as a whole, for the gradient of a trained down."""

    def run(self, x: Tensor, dropout: Dropout | None, choose: Any) -> Tensor:
        """x as the forward's shrink saw it, but for the factor 1 / (1 - p)."""
        bits = bits_of(dropout, x.shape, choose)
        return x if bits is None else self.launch(x, bits, choose)


def bits_of(dropout: Dropout | None, shape: Sequence[int], choose: Any) -> Tensor | None:
    """The mask of an x of this shape: as the forward has kept it, or else drawn again."""
    if dropout is None or dropout.bits is not None:
        return None if dropout is None else dropout.bits
    from ...kernels.dropout import drawn_bits

    return drawn_bits(dropout.seed, dropout.p, *shape, choose)


def spec_of(kernel: str, problem: Problem) -> Spec:
    """A launch of a pass, its factors in x's dtype."""
    size = problem.dtype.itemsize
    p = 16 if kernel == "gemm_tail" else padded(problem.p)
    masked = problem.dropout and problem.transposed == (kernel == "gemm_tail")
    by_row = problem.by_row and kernel != "gemm_tail"
    n = problem.n if kernel in ("gemm_tail", "relay") else 0
    k = problem.k if kernel == "relay" else 0
    sizes = size, size, problem.regular, p, padded(problem.q)
    return Spec(kernel, *sizes, masked, by_row, n, problem.bulk, k)


def tile_of(kernel: str, problem: Problem) -> TileConfig | None:
    """The default tile of a launch of a pass, or None where tiles do not count: on a CPU."""
    where = devices.target(problem.device) if costs.peaks(problem.device).processors else None
    return None if where is None else select(where, spec_of(kernel, problem), problem.m)


def why_not_tiles(problem: Problem, name: str) -> str | None:
    """The reason why a pass cannot take the set of tiles of that name, or None if it can."""
    where, tiles = devices.target(problem.device), EXPERIMENTAL_TILES.get(name)
    if name in SLICES:
        tile = where and experimental_tile(name, where, spec_of("relay", problem), problem.m)
        if tile and tile.makers > 1:
            return None
        return f"{name!r} is for one core, more than one column of tiles and one step of K"
    if tiles is None:
        return None
    fits = where is not None and all(
        is_valid(tile, where, spec_of(kernel, problem)) for kernel, tile in tiles.items()
    )
    size = 4 if any(tile.tf32x3 for tile in tiles.values()) else 2
    if not fits or problem.dtype.itemsize != size or not problem.regular or problem.m <= SMALL_M:
        kind = "16 bits" if size == 2 else "float32 without dropout, P up to 64"
        return f"{name!r} is for {kind}, multiples of 16 and more than {SMALL_M} rows"
    return None
