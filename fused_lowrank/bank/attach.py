"""The layers of a bank: which can be in one, their tables, and how they are routed through it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapt import adapted_layers
from ..compute.choose import isolates
from ..elsewhere import device_of, here, is_known, sharder_of
from ..layers import LowRankLinear
from ..layers.base import is_sharded
from .assignment import Shelf, Watch, remember
from .layer import Place
from .sources import SHARED

if TYPE_CHECKING:
    from .bank import AdapterBank

VERSION = operator.attrgetter("_version")


def check_layers(layers: Mapping[str, LowRankLinear]) -> None:
    """Raise unless the layers' adapters are their cores, and they are in no bank."""
    devices = {device_of(layer) for layer in layers.values()}
    if len(devices) > 1:
        raise ValueError(f"the model is on {len(devices)} devices: a bank is on one")
    for name, layer in layers.items():
        if is_sharded(layer.weight):
            raise ValueError(f"{name} is sharded: a bank's layers are whole, one copy on each rank")
        if sharder := sharder_of(layer.weight):
            raise ValueError(f"{name} is sharded by {sharder}: a bank's layers are whole")
        shared = SHARED & set(layer.train_names)
        if layer.core_factors is None or shared:
            what = ", ".join(sorted(shared)) or "down and up"
            raise ValueError(
                f"{name} ({layer.method}) trains {what}, which adapters in a bank share: adapt by "
                "lora_xs or lora_mini, training the core alone"
            )
        if layer.merged or layer.bases_pending:
            state = "is merged: unmerge(model)" if layer.merged else "has no factors: init_bases"
            raise ValueError(f"{name} {state} first")
        if layer.routed is not None:
            raise ValueError(f"{name} is in a bank already: close() that first")
        if not is_known(layer):
            raise ValueError(f"{name}.weight is on the meta device: load the weights first")
        with here(layer):  # probes the library, where this is a CPU
            isolates(layer.impl, layer.weight, layer.down, layer.up)


def new_shelf(layer: LowRankLinear, slots: int, dtype: torch.dtype) -> Shelf:
    """Tables of zeros; of pairs where those are smaller than cores."""
    p, q, core = layer.down.shape[0], layer.up.shape[1], layer.core_factors
    device = device_of(layer)
    scales = torch.zeros(slots, device=device)
    if isinstance(core, tuple) and (p + q) * (r := core[0].shape[1]) < p * q:
        left = torch.zeros(slots, p, r, dtype=dtype, device=device)
        return Shelf(left, torch.zeros(slots, r, q, dtype=dtype, device=device), scales)
    return Shelf(torch.zeros(slots, p, q, dtype=dtype, device=device), None, scales)


class Stamp(NamedTuple):
    """What the adapters of a layer share, by which it is known whether it is still the same."""

    tensors: list[Tensor]
    marks: list[tuple[int, int]]  # of each the address and the version

    @classmethod
    def of(cls, layer: LowRankLinear) -> Stamp:
        """Of down, up and W as they are now."""
        tensors: list[Tensor] = [layer.down, layer.up, layer.base_weight]
        marks = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        return cls(tensors, marks)

    def same(self, other: Stamp) -> bool:
        """Whether nobody has replaced a tensor, or written to it, between the two."""
        return self.marks == other.marks and all(map(operator.is_, self.tensors, other.tensors))


def versions(tensors: list[Tensor]) -> list[int]:
    """How often each was written to."""
    return list(map(VERSION, tensors))


def attach(model: nn.Module, bank: AdapterBank) -> list[Any]:
    """Route the model's layers through the bank; the hooks to be removed at the end."""
    for name, layer in bank.layers.items():
        layer.routed = Place(bank, name, layer)
    watch, hooks = Watch(bank.key), []
    for module in model.modules():
        if isinstance(module, LowRankLinear) or not any(True for _ in adapted_layers(module)):
            continue
        hooks += [
            module.register_forward_pre_hook(remember, with_kwargs=True),
            module.register_forward_pre_hook(watch.begin, with_kwargs=True),
            module.register_forward_hook(watch.end, always_call=True),
        ]
    return hooks


def index_of(slots: list[int], device: torch.device) -> Any:
    """What indexes a table by these slots: as a rule, they follow each other."""
    first, count = slots[0] if slots else 0, len(slots)
    if slots == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(slots, device=device)
