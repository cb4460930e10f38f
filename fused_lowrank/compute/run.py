"""A pass, computed by the plan that is chosen for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config
from . import choose, devices
from .base.protocol import BASES
from .dropout import kept, packed
from .operands import Operands, problem_of
from .plans import PLANS, Plan
from .reference import RowCores
from .steps.library import Wanted


class Done(NamedTuple):
    """The results of a pass, and how it was computed."""

    plan: Plan
    tiles: Any  # how the plan's launches choose theirs
    y: Tensor
    t: Wanted
    u: Wanted
    bits: Wanted = None
    drawn: bool = False  # there is a dropout, and its mask is the kernels'


def run(
    operands: Operands,
    impl: str,
    config: Config,
    want_t: bool,
    want_u: bool,
    want_bits: bool = False,
) -> Done:
    """Compute a pass. t is there where it is wanted, u where it is wanted or was made on the way.

    bits, the mask of the dropout, are there where they are wanted and it is the kernels'.
    """
    x = operands.x
    if is_foreign(x):
        with no_autocast(x), on_device(x):
            return run(operands, impl, config, want_t, want_u, want_bits)
    if not (x.numel() and operands.weight.shape[0]):  # nothing to launch
        name = "called" if isinstance(operands.weight, BASES) else "aten"
        problem, decision = None, choose.Decision((name,), "an operand is empty")
    else:
        problem = problem_of(operands, want_u)
        decision = choose.choose(
            problem,
            impl,
            config,
            lambda name: run(operands, impl, replace(config, plan=name), want_t, want_u, want_bits),
        )
    dropout, drawn = operands.dropout, False
    if dropout is not None and problem is not None:
        drawn = choose.takes_kernels(impl, x, *operands.ranks)
    while True:
        plan = PLANS[decision.plans[0]]
        tiles = devices.tiles(x.device, plan.tiles, config.tiles) if plan.ours else None
        if isinstance(operands.weight, BASES) and not plan.called:
            operands = operands._replace(weight=operands.weight.for_products(x.dtype))
        try:
            if plan.alone:
                return row_by_row(plan, operands, want_t, want_u)
            if plan.whole is not None:
                y, t = plan.whole.run(operands, tiles, want_t)
                return Done(plan, tiles, y, t, None)
            if dropout is not None and dropout.bits is None and drawn != plan.ours:
                operands = operands._replace(
                    dropout=dropout._replace(bits=bits_of(operands, drawn))
                )
            t, u, bits = plan.down.run(operands, tiles, want_t, True, want_bits)
            if bits is None and want_bits and drawn and operands.dropout is not None:
                bits = operands.dropout.bits
            return Done(plan, tiles, plan.up.run(operands, tiles, u), t, u, bits, drawn)
        except Exception as error:
            if problem is None:
                raise
            decision = choose.give_up(problem, impl, config, decision, error)


def bits_of(operands: Operands, drawn: bool) -> Tensor:
    """The mask of a pass as bits, for a plan that would make the other: drawn by a kernel, or not.

    It is of x, or in a backward of the y of this pass.
    """
    x, weight, _, _, _, _, _, dropout, transposed, _ = operands
    assert dropout is not None
    m, k = x.shape[0], (weight.shape[0] if transposed else x.shape[1])
    if drawn:
        from ..kernels.dropout import drawn_bits

        return drawn_bits(dropout.seed, dropout.p, m, k, devices.tiles(x.device))
    return packed(kept(x.new_empty((m, k)), dropout.seed, dropout.p))


def row_by_row(plan: Plan, operands: Operands, want_t: bool, want_u: bool) -> Done:
    """A pass of each row alone: libraries choose their kernels by the shape."""
    core, parts = operands.core, []
    for m, row in enumerate(operands.x.split(1)):
        own = core
        if isinstance(core, RowCores):
            entry = slice(m // core.repeat, m // core.repeat + 1)
            weights = None if core.weights is None else core.weights[entry]
            handles = core.handles[entry]
            own = core._replace(handles=handles, weights=weights, repeat=1, resolved_slots=None)
        alone = operands._replace(x=row, core=own)
        t, u, _ = plan.down.run(alone, None, want_t, True)
        parts.append((plan.up.run(alone, None, u), t, u))
    y, t, u = zip(*parts, strict=True)
    t, u = torch.cat(t) if want_t else None, torch.cat(u) if want_u else None
    return Done(plan, None, torch.cat(y), t, u)


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    kind = "cpu" if x.is_cpu else x.device.type  # to ask a device for its type costs the host
    return not x.is_meta and torch.is_autocast_enabled(kind)


def is_foreign(x: Tensor) -> bool:
    """Whether a pass of x is to be computed within `no_autocast` or `on_device`."""
    return under_autocast(x) or (x.is_cuda and x.device.index != torch.cuda.current_device())


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast is off inside: the operands have their dtypes by now."""
    if under_autocast(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """x's GPU is the current one inside: kernels are launched on that, wherever x is."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
