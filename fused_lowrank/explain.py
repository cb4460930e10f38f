"""explain: which plan computes a layer, with which tiles, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import config
from .compute import choose, costs, devices, measured
from .compute.base.protocol import Base
from .compute.operands import Operands, Problem, bucket, has_doubles
from .compute.plans import PLANS
from .compute.reference import is_diagonal
from .compute.steps.kernels import spec_of
from .context.elsewhere import device_of, sharder_of
from .kernels.tiles import SMALL_M
from .methods.layer import LowRankLinear


@dataclass(frozen=True)
class PassExplained:
    """One pass of a step, explained: the forward's, or the backward's to dx.

    `print` it, or read its parts. A cost on paper (`cost`, `floor`, `bare`) has `operations` (of
    multiplying and adding, each counted), `bytes` moved in memory, `launches` and `seconds`; the
    formulas and constants are in `fused_lowrank.compute.costs`.
    """

    problem: Problem
    plan: str  # its name
    why: str
    others: tuple[str, ...]  # the plans that would take its place, the best first
    cost: costs.Cost  # on paper
    floor: costs.Cost  # the least that the adapted layer could take on this device
    bare: costs.Cost  # and the bare one
    tiles: tuple[tuple[str, Any], ...]  # (kernel, its tile)

    def __str__(self) -> str:
        way = "backward" if self.problem.transposed else "forward"
        figures = [
            f"{cost.operations / 1e9:.3f} GFLOP, {cost.bytes / 1e6:.3f} MB, "
            f"{cost.seconds * 1e3:.4f} ms"
            for cost in (self.cost, self.floor)
        ]
        said = [
            f"{way}: {self.plan}, {self.cost.launches} launches; rows up to {self.problem.m}",
            f"  why: {self.why}",
            f"  on paper: {figures[0]}; floor {figures[1]}; "
            f"bare layer {self.bare.seconds * 1e3:.4f} ms",
        ]
        if self.others:
            times = [
                f"{name} {choose.predict(PLANS[name], self.problem).seconds * 1e3:.4f}"
                for name in self.others
            ]
            said.append(f"  others on paper, ms: {', '.join(times)}")
        return "\n".join([*said, *(f"  {kernel}: {tile}" for kernel, tile in self.tiles)])


@dataclass(frozen=True)
class Explanation:
    """The computation of a layer's training step, explained. `print` it, or read its parts.

    Made by `explain`. Times that it prints are in milliseconds, sizes in MB (10⁶ bytes), work in
    GFLOP (10⁹ operations); see `PassExplained` for the parts of a pass.
    """

    layer: str  # what it is, and of how many rows the step
    note: str  # where no plan is chosen: what happens instead
    passes: tuple[PassExplained, ...]  # forward, then backward; none where no plan is chosen

    def __str__(self) -> str:
        return "\n".join([self.layer, *([self.note] if self.note else []), *map(str, self.passes)])

    __repr__ = __str__


def explain(layer: LowRankLinear, rows: int) -> Explanation:
    """Explain how a step of the layer on `rows` rows is computed in this context, at what cost.

    For the forward and the backward: the plan, why it is taken, the tiles of its kernels, and on
    paper its operations, bytes and time, beside the least that the adapted layer and the bare one
    could take on this device. The GPU's times on paper are predictions, not measurements. Nothing
    is computed or measured; the plans are chosen by the very call by which a step's are, under the
    same `config.use` and batch invariance. For a layer in a bank, a step is explained in which each
    row has an adapter of its own.

    Args:
        layer: a fused layer (`FusedLoraXSLinear`, …).
        rows: M, the product of x's leading dimensions; x is taken to be contiguous and of the
            weight's dtype.

    Returns:
        An `Explanation`, which prints itself.

    Raises:
        TypeError: the layer is not a low-rank layer, or `rows` no int.
        ValueError: fewer than one row; a sharded layer; an unknown plan in `config.use`.
        RuntimeError: the plan in `config.use`, batch invariance or the layer's `impl` cannot
            compute the step.
    """
    if not isinstance(layer, LowRankLinear):
        raise TypeError(
            f"layer is a {type(layer).__name__}: it must be a fused low-rank layer, such as "
            "adapt(model, …) puts in the place of an nn.Linear"
        )
    if not isinstance(rows, int):
        raise TypeError(f"rows is a {type(rows).__name__}: it must be an int, how many x has")
    if rows < 1:
        raise ValueError(f"rows is {rows}: it must be at least 1")
    weight = layer.base_weight
    if sharder := sharder_of(weight):
        raise ValueError(f"the layer is sharded by {sharder}: explain it before that")
    down, core, up, gain = layer.row.made(layer.factors_now(), weight, layer.scale)
    has_gain = gain is not None or bool(layer.row.dora)
    (n, k), p, q = weight.shape, down.shape[0], up.shape[1]
    device, dtype = device_of(layer), weight.dtype
    banked = ", in a bank: each row has an adapter of its own" if layer.in_bank else ""
    name = (
        f"{type(layer).__name__} {k} → {n}, P = {p}, Q = {q}, {str(dtype).removeprefix('torch.')} "
        f"on {measured.device_name(device)}, {rows} rows{banked}"
    )
    x = torch.empty(1, k, dtype=dtype, device=device).expand(rows, k)
    if note := why_no_plan(layer, x):
        return Explanation(name, note, ())
    dropout, trains_down = layer.dropout > 0.0, down.requires_grad
    impl = choose.implementation(layer.impl, x, p, q)
    if layer.in_bank and choose.isolates(impl, x, down, up):
        impl = "isolated"
    kernels = devices.has_kernels(device)
    regular = kernels and (k | n) % 16 == 0
    alike = {down.dtype, up.dtype, dtype} == {dtype}
    bulk = kernels and alike and dtype.itemsize == 2 and (k | n | q) % 8 == 0  # both ways
    bulk = bulk and rows > SMALL_M
    doubles = kernels and has_doubles(Operands(x, weight, down, core, up, None, 1.0))
    diagonal = is_diagonal(core)
    passes = []
    for transposed in (False, True):
        sizes = (n, k, q, p) if transposed else (k, n, p, q)
        want_u, by_row = transposed and trains_down, layer.in_bank
        flags = transposed, regular, dropout, want_u, by_row, bulk, doubles, diagonal
        gained = has_gain and not transposed
        matrix = weight.t() if transposed else weight
        base = (matrix.kind, matrix.is_only_called()) if isinstance(weight, Base) else ("", False)
        problem = Problem(device, dtype, bucket(rows), *sizes, *flags, gained, *base)
        passes.append(of_pass(problem, impl))
    return Explanation(name, "", tuple(passes))


def why_no_plan(layer: LowRankLinear, x: Tensor) -> str:
    """The reason why no plan is chosen for a call of x; empty where one is."""
    if layer.merged or layer.disabled:
        return "the adapter is merged or disabled: this is the bare layer"
    if layer.impl == "reference":
        return "the equation in plain torch: no plan is chosen"
    # A bank takes the chain where no gradient is wanted; of a training step, as here, it never is.
    plain = not (layer.in_bank or layer.dropout or layer.row.dora)
    plain = plain and not isinstance(layer.base_weight, Base)
    if plain and layer.impl == "auto" and choose.small(x):
        return "a chain of library operations: on a CPU the host's work is most of so small a call"
    return ""


def of_pass(problem: Problem, impl: str) -> PassExplained:
    """The explanation of one pass."""
    settings = config.current()
    decision = choose.choose(problem, impl, settings)
    plan = PLANS[decision.plans[0]]
    tiles: tuple[tuple[str, Any], ...] = ()
    if plan.ours:
        of = devices.tiles(problem.device, plan.tiles, settings.tiles)
        kernels = [kernel for step in plan.steps for kernel in step.kernels]
        tiles = tuple((kernel, of(spec_of(kernel, problem), problem.m)) for kernel in kernels)
    return PassExplained(
        problem,
        plan.name,
        decision.why,
        decision.plans[1:],
        choose.predict(plan, problem),
        costs.least(problem),
        costs.least(problem, adapted=False),
        tiles,
    )
