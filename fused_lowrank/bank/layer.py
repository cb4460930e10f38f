"""A layer in a bank: with the adapters of the call's assignment, or as it was without a bank.

Eagerly the assignment is read in Python, in a compiled graph by an op (`compiled.route`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..compute import choose, isolation
from ..compute.autograd import fold, join, places
from ..compute.base.calls import alone, over_base
from ..compute.base.protocol import Base
from ..compute.dropout import Dropout, without_ranks
from ..compute.operands import Operands
from ..compute.reference import AnyCore, chain
from ..context.called import note_call
from ..context.calls import SAID, call_of
from ..context.declared import said_of, stated
from ..context.elsewhere import here
from ..context.following import Follower
from ..context.recomputed import graph_task, may_recompute
from ..files.fingerprint import BASES_TOLERANCE, WEIGHT_TOLERANCE, alike
from ..functional import compute, draw_seed, prepared
from ..methods.computer import Computer
from ..methods.layer import LowRankLinear
from .compiled import STORES, Ticket, banked, route
from .recompute import current, note_for, remember_storage
from .store import AdapterStore


class BankedLayer(Computer):
    """The place of a layer in a bank, which the layer calls instead of its own forward."""

    is_bank = True

    def __init__(self, store: AdapterStore, name: str, layer: LowRankLinear) -> None:
        self.store, self.name, self.key = store, name, store.key
        STORES[self.key] = store
        down, up = layer.shared_parts()
        self.sizes = *down.shape, *up.shape  # of products, forward and backward
        if isinstance(layer.base_weight, Base):  # no op takes it: a call between two graphs
            reason = "a layer of a bank over a quantised base: no fullgraph=True"
            self.outside = torch.compiler.disable(as_written, reason=reason)

    def refuse_leaving(self, what: str) -> None:
        """Raise ValueError if the layer is to leave its model while the bank is open."""
        if self.store.is_open:
            raise ValueError(
                f"cannot {what}: {self.name} is in a bank, which would not find it any more: "
                "close() the bank first"
            )

    def look_again(self, moved: bool = False) -> None:
        """Have the bank compare the layers' tensors, of which some may be others from now on."""
        self.store.shared.look_again(moved)

    def refuse_other(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError if values to be loaded are not those that the bank's adapters share."""
        layer = self.store.layers[self.name]
        for name in (*layer.factors, "weight"):
            value = values.get(name)
            if value is None or name in layer.row.core:
                continue
            tolerance = WEIGHT_TOLERANCE if name == "weight" else BASES_TOLERANCE
            with here(layer):
                own = layer.base_weight if name == "weight" else getattr(layer, name)
                own = layer.weight if isinstance(own, Base) else own  # as it is stored
                same = value is own or alike(own, value, tolerance)
            if not same:
                raise ValueError(
                    f"{self.name} is in a bank, whose adapters share its weight and frozen "
                    f"factors, and {name} is to be another: close() the bank first"
                )

    def __call__(self, layer: LowRankLinear, x: Tensor) -> Tensor:
        if layer.uncalled:
            note_call(layer)
        if torch.compiler.is_compiling():
            return layer.own(x) if layer.disabled is True else self.compiled(layer, x)
        if layer.disabled:
            if graph_task() < 0:
                current(self.key)  # the bank's model was called
            return layer.own(x)
        wants_grad = torch.is_grad_enabled()
        if wants_grad or layer.training or may_recompute():
            remember_storage(x)
        assignment = current(self.key)
        note_for(self.key, assignment)
        isolated = isolation.is_needed(x, self.sizes) and layer.impl != "triton"
        core: AnyCore
        if assignment is None:
            if not isolated or layer.merged:
                return layer.own(x)
            core, scale = layer.core_factors, layer.scale
        elif layer.merged:
            raise RuntimeError(f"{self.name} is merged: unmerge(model) before bank.use")
        elif assignment.base_only and not config.current().batch_invariance:
            if assignment.empty:
                assignment.require_rows(self.name, x.shape[:-1])
            if isinstance(layer.base_weight, Base):
                return alone(layer.base_weight, x)
            return isolation.linear(x, layer.weight, layer.bias)
        elif assignment.handles is None:
            core, scale = join(*assignment.single_core(self.name)), 1.0
        else:
            call = call_of(self.key)
            if call is not None and call.follower is not None and not call.follower.paused:
                return self.followed(layer, x, call.follower)
            said = None if SAID.get() is None else said_of(layer, self.name, x)
            core, scale = assignment.row_cores(self.name, x.shape[:-1], call, x, said), 1.0
        weight, down, _, up, bias, gain = layer.own_tensors()
        if layer.rank_dropout and layer.training:
            core, up = without_ranks(core, up, layer.rank_dropout)
        dropout = Dropout(None, layer.dropout) if layer.dropout and layer.training else None
        if isinstance(weight, Base):
            own = Operands(x, weight, down, core, up, bias, scale, dropout, gain=gain)
            return over_base(own, layer.impl, isolated)
        if not (wants_grad or isolated or dropout) and layer.impl == "auto" and choose.small(x):
            try:  # only x can be wrong, and PyTorch sees that
                return chain(x, weight, down, core, up, bias, scale, gain)
            except (AttributeError, IndexError, RuntimeError):
                pass  # the checks say it better
        operands = Operands(x, weight, down, core, up, bias, scale, dropout, gain=gain)
        return compute(prepared(operands), layer.impl, isolated)

    def followed(self, layer: LowRankLinear, x: Tensor, follower: Follower) -> Tensor:
        """The layer's call with a follower that is told where the sequences of the result are."""
        state = stated(layer) or follower.where(x)
        if may_recompute():  # maybe by a graph, which runs as written only in calls like this
            Ticket(self.key, current(self.key)).note()
        with follower.pause():
            y = self(layer, x)
        follower.mark(y, state)
        return y

    def compiled(self, layer: LowRankLinear, x: Tensor) -> Tensor:
        """The layer's call as library ops, whatever the assignment will be; of a `Base` as written.

        Raises RuntimeError where a `Base` is exported.
        """
        if isinstance(layer.base_weight, Base):
            if torch.compiler.is_exporting():
                raise RuntimeError(
                    f"{self.name} is in a bank, over a {type(layer.base_weight.module).__name__}: "
                    "what is exported would have the adapters of this call for good. close() the "
                    "bank, and export the model with one adapter"
                )
            return self.outside(self, layer, x)
        dropout_p = layer.dropout if layer.training else 0.0
        a, b = places(layer.core_factors)
        down, up = layer.shared_parts()
        given = x, layer.weight, down, layer.core_factors, up, layer.bias, layer.scale
        x, weight, down, _, up, bias, scale, *_ = prepared(Operands(*given))
        if layer.rank_dropout and layer.training:
            _, up = without_ranks(None, up, layer.rank_dropout)
        lead = x.shape[:-1]
        trained = self.store.trained
        tables = (None, None) if trained is None else trained.tables[self.name][:2]
        factors = a, b, *tables
        seed = draw_seed(x) if dropout_p else None
        impl = "aten" if layer.impl == "reference" else layer.impl
        want_t = torch.is_grad_enabled() and any(f is not None and f.requires_grad for f in factors)
        token = route(self.key)
        rest = token, self.name, lead, seed, scale, dropout_p, impl
        y, _ = banked(fold(x), weight, down, *factors, up, bias, *rest, want_t)
        return y.view(*lead, y.shape[-1])


def as_written(banked: BankedLayer, layer: LowRankLinear, x: Tensor) -> Tensor:
    """A layer's call."""
    return banked(layer, x)
