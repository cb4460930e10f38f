"""The layers of a model, put into a bank and taken out of it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..compute.choose import isolates
from ..context.calls import begin, end
from ..context.elsewhere import device_of, here, is_known, sharder_of
from ..context.recomputed import graph_task
from ..methods import METHODS, LowRankLinear
from ..methods.tensors import is_sharded
from ..models.adapt import adapted_layers
from .assignment import ACTIVE, find
from .layer import BankedLayer
from .recompute import remember
from .store import AdapterStore

WITH_CORE = [name for name, (layer, _) in METHODS.items() if layer.row.core == layer.row.trained]


def check_layers(layers: Mapping[str, LowRankLinear]) -> None:
    """Raise unless the layers' adapters are their cores, and they are in no bank."""
    devices = {device_of(layer) for layer in layers.values()}
    if len(devices) > 1:
        raise ValueError(f"the model is on {len(devices)} devices: a bank is on one")
    for name, layer in layers.items():
        if is_sharded(layer.base_weight):
            raise ValueError(f"{name} is sharded: a bank's layers are whole, one copy on each rank")
        if sharder := sharder_of(layer.base_weight):
            raise ValueError(f"{name} is sharded by {sharder}: a bank's layers are whole")
        if layer.row.dora:
            raise ValueError(
                f"{name} is with dora: the norms of its rows are of one adapter, and those of a "
                "bank would have each their own. Adapt without dora, or merge this one"
            )
        shared = layer.row.common & set(layer.train_names)
        if not layer.row.core or shared:
            what = ", ".join(sorted(shared)) or "down and up"
            own = f", or by {layer.method} with train={layer.row.core}" if layer.row.core else ""
            raise ValueError(
                f"{name} ({layer.method}) trains {what}, which adapters in a bank share: adapt by "
                f"{' or '.join(WITH_CORE)}{own}, training the core alone"
            )
        if layer.merged or layer.bases_pending:
            state = "is merged: unmerge(model)" if layer.merged else "has no factors: init_bases"
            raise ValueError(f"{name} {state} first")
        if layer.in_bank:
            raise ValueError(f"{name} is in a bank already: close() that first")
        if not is_known(layer):
            raise ValueError(f"{name}.weight is on the meta device: load the weights first")
        with here(layer):  # probes the library, where this is a CPU
            isolates(layer.impl, layer.shared_parts()[0], *layer.shared_parts())


def attach(model: nn.Module, store: AdapterStore) -> list[Any]:
    """Put the model's layers into a bank; returns the hooks, which `detach` removes."""
    for name, layer in store.layers.items():
        layer.computed_by = BankedLayer(store, name, layer)
    watch, hooks = Watch(store.key), []
    for module in model.modules():
        if isinstance(module, LowRankLinear) or not any(True for _ in adapted_layers(module)):
            continue
        hooks += [
            module.register_forward_pre_hook(remember, with_kwargs=True),
            module.register_forward_pre_hook(watch.begin, with_kwargs=True),
            module.register_forward_hook(watch.end, always_call=True),
        ]
    return hooks


def detach(store: AdapterStore, hooks: list[Any]) -> None:
    """Take the layers out of a bank again."""
    for layer in store.layers.values():
        if isinstance(layer.computed_by, BankedLayer) and layer.computed_by.store is store:
            layer.computed_by = None
    for hook in hooks:
        hook.remove()


class Watch:
    """Forward hooks of the modules that hold a bank's layers: the outermost is the model's call."""

    def __init__(self, key: int) -> None:
        self.key = key

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module's call begins."""
        if torch.compiler.is_compiling():
            return
        found = find(ACTIVE.get(), self.key)
        count = 0 if found is None or found.handles is None else found.handles.shape[0]
        if found is not None and count > 1 and graph_task() == found.task:
            begin(self.key, count, module, args, kwargs, found.learned)

    def end(self, module: nn.Module, args: Any, result: Any) -> None:
        """Note that a module's call is over, with a result or an error."""
        if not torch.compiler.is_compiling():
            end(self.key, module, result)
