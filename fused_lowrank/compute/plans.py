"""The plans: ways to compute a pass, as rows of a table.

    t, u = shrink(x, down, core, scale)        y = gemm_tail(x, W, u, up, bias, gain)

| plan | way down | way up |
|---|---|---|
| aten | library products | the base, then u·upᵀ added in place |
| first | library products | u·upᵀ, then the base added to it |
| split | our kernel | our kernel; `split:name` with another set of tiles |
| mixed | our kernel | as `first` |
| decode, relay | both in one launch of ours: for few rows, for many; `relay:name` as above | |
| isolated | `aten` with products in which no row reads another | |
| alone | `isolated`, a row at a time: batch invariance | |
| called | library products | as `aten`, the base by a quantised W's library or its module |
| fixed | `split` with tiles that do not follow the rows: batch invariance | |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.tile_choice import EXPERIMENTAL_TILES, SLICES
from . import costs
from .costs import Work
from .isolation import PRODUCTS
from .operands import Problem
from .steps import kernels, library


@dataclass(frozen=True, eq=False)
class Plan:
    """A way to compute a pass: the way down and the way up, or the whole in one step."""

    name: str
    down: Any  # Step: (operands, choose, want_t, want_u) → t, u
    up: Any = None  # Step: (operands, choose, u) → y
    whole: Any = None  # Step: (operands, choose, want_t) → y, t; then `down` serves single steps
    ours: bool = False  # its launches, core gradients and dropout's mask are this library's
    tiles: str = ""  # the set of tiles that its launches take
    automatic: bool = True  # may be chosen; others are taken where they are named
    alone: bool = False  # a row at a time
    called: bool = False  # of a W that is no plain matrix, which others need dequantised
    promise: str = ""  # for whose sake it is taken, whatever it costs

    @property
    def steps(self) -> tuple[Any, ...]:
        """The steps of a pass, in their order."""
        return (self.down, self.up) if self.whole is None else (self.whole,)

    @property
    def core_grad(self) -> Any:
        """The step (t, g, core, scale, want, choose) → the gradients of the core."""
        return OUR_CORE_GRAD if self.ours else LIBRARY_CORE_GRAD

    @property
    def gain_back(self) -> Any:
        """The step (dy, y, gain, bias, choose) → dy ⊙ gain and the gradient of the gain."""
        return OUR_GAIN if self.ours else LIBRARY_GAIN

    @property
    def masked(self) -> Any:
        """The step (x, dropout, choose) → x under the mask that the plan's shrink sees."""
        return OUR_MASK if self.ours else LIBRARY_MASK

    def why_not(self, problem: Problem) -> str | None:
        """The reason why this plan cannot compute the pass, or None if it can."""
        if self.called and not problem.base:
            return "W is a plain matrix"
        if problem.called and not self.called:
            return "W is known by what its module or its library computes, and not by its values"
        for step in self.steps:
            if reason := step.why_not(problem):
                return reason
        if self.alone and problem.dropout:
            return "it has no dropout"
        return kernels.why_not_tiles(problem, self.tiles) if self.tiles else None

    def is_candidate(self, problem: Problem) -> bool:
        """Whether it can compute the pass and may be chosen for it, without being named."""
        return self.automatic and not self.why_not(problem)

    def work(self, problem: Problem) -> list[Work]:
        """The work of the plan's steps, on paper."""
        on_values = problem.base and not self.called
        of = problem._replace(base="") if on_values else problem
        times = problem.m if self.alone else 1
        part = of._replace(m=1) if self.alone else of
        works = times * [work for step in self.steps for work in step.work(part)]
        return [costs.dequantised(problem), *works] if on_values else works


OUR_GAIN, LIBRARY_GAIN = kernels.GainBack("gain_back"), library.GainBack()
OUR_CORE_GRAD, LIBRARY_CORE_GRAD = kernels.CoreGrad("core_grad"), library.CoreGrad()
OUR_MASK, LIBRARY_MASK = kernels.Masked("dropped", "dropout"), library.Masked()

_shrink, _tail, _first = library.Shrink(), library.TailLast(), library.TailFirst()
_apart = library.Shrink(PRODUCTS), library.TailLast(PRODUCTS)
_our_shrink, _gemm_tail = kernels.Shrink("shrink"), kernels.GemmTail("gemm_tail")
_decode, _relay = kernels.OneLaunch("decode"), kernels.OneLaunch("relay")

ROWS = (
    Plan("aten", _shrink, _tail),
    Plan("first", _shrink, _first),
    Plan("split", _our_shrink, _gemm_tail, ours=True),
    *(
        Plan(f"split:{name}", _our_shrink, _gemm_tail, ours=True, tiles=name, automatic=False)
        for name in EXPERIMENTAL_TILES
    ),
    Plan("mixed", _our_shrink, _first, ours=True),
    Plan("decode", _our_shrink, whole=_decode, ours=True),
    Plan("relay", _our_shrink, whole=_relay, ours=True),
    *(
        Plan(f"relay:{name}", _our_shrink, whole=_relay, ours=True, tiles=name, automatic=False)
        for name in SLICES
    ),
    Plan("called", _shrink, _tail, called=True, promise="a W that is no plain matrix"),
    Plan("isolated", *_apart, automatic=False, promise="isolation"),
    Plan("alone", *_apart, automatic=False, alone=True, promise="batch invariance"),
    Plan(
        "fixed",
        _our_shrink,
        _gemm_tail,
        ours=True,
        tiles="fixed",
        automatic=False,
        promise="batch invariance",
    ),
)
PLANS: dict[str, Plan] = {plan.name: plan for plan in ROWS}
MEASURED = [plan.name for plan in ROWS if not plan.promise]  # those that speed decides between
