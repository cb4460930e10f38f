"""The weight of a layer of PEFT: the base's, W, or W + ΔW while adapters are merged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ....context.called import note_reading
from ....context.elsewhere import here, kept, replace, sharder_of
from ....methods.accept import why_no_weight
from ....methods.merging import is_finite, lost_to_rounding, why_not_finite
from ....methods.tensors import fsdp_error, is_sharded, present
from .state import before_loading, save_merged

if TYPE_CHECKING:
    from typing_extensions import Self


class AdaptedWeight(nn.Module, BaseTunerLayer):
    """A layer of PEFT around a base layer, whose weight is W, or W + ΔW while adapters are merged.

    Subclasses say what ΔW is, by `get_delta_weight`.
    """

    get_base_layer: Callable[[], Any]
    active_adapters: list[str]
    key: str  # the module's name in the model
    fan_in_fan_out: bool
    scaling: dict[str, float]  # by adapter
    in_features: int
    out_features: int

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self._original: tuple[Any] | None = None  # the weight as it was, while merged
        self.lost = 0.0  # the part of ΔW that the last merge lost to rounding

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter, stored as the base weight is, in float32 or wider."""
        raise NotImplementedError

    @property
    def weight(self) -> Any:
        """The base layer's weight; code that computes with it, past the layer, is remembered."""
        note_reading(self)
        return self.get_base_layer().weight

    @property
    def base_weight(self) -> Tensor:
        """W (out, in), whichever way it is stored."""
        weight = self.get_base_layer().weight
        return weight.t() if self.fan_in_fan_out else weight

    @property
    def unmerged_weight(self) -> Tensor:
        """W, also while adapters are merged."""
        if self._original is None:
            return self.base_weight
        return self._original[0].t() if self.fan_in_fan_out else self._original[0]

    def how_to_keep(self) -> str:
        """Where nothing would be lost by merging."""
        return "float32 weights would keep it"

    def require_whole(self, what: str) -> None:
        """Raise RuntimeError where this process has but a part of the weight."""
        if sharder := sharder_of(self.unmerged_weight):
            raise fsdp_error(what, sharder)

    def why_not_merged(self) -> str | None:
        """The reason why ΔW cannot be added to the weight as it is now, or None."""
        reason = why_no_weight(self.get_base_layer().weight)
        return None if reason is None else f"has {reason}"

    def sum_with(self, adapters: list[str]) -> tuple[Tensor, Tensor]:
        """ΔW of adapters, and W + ΔW rounded as W is; stored as the base weight is."""
        with here(base := self.get_base_layer()):
            weight = present(self, base.weight)
            delta = torch.stack([self.get_delta_weight(name) for name in adapters]).sum(0)
            return delta, (weight + delta).to(weight.dtype)

    def check_sum(self, adapters: list[str], new: Tensor) -> None:
        """Raise ValueError if W + ΔW is not finite."""
        if not is_finite(new):
            raise ValueError(
                "NaNs detected in the merged weights. The adapter "
                f"{', '.join(adapters)} seems to be broken (in {self.key})"
            )

    @torch.no_grad()
    def check_safe(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError if a merge of these adapters, or of the active ones, is not finite."""
        names = self.active_adapters if adapter_names is None else adapter_names
        new = [n for n in names if n in self.scaling and n not in self.merged_adapters]
        if new:
            self.check_sum(new, self.sum_with(new)[1])

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the base layer's weight W + ΔW of these adapters, or of the active ones.

        The sum is a new Parameter: who shares the weight keeps W. With `safe_merge` a sum that is
        not finite is a ValueError, and the layer as it was.
        """
        adapters = [
            name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling
        ]
        if not adapters:
            return
        base = self.get_base_layer()
        if is_sharded(base.weight):
            raise fsdp_error("merge")
        self.require_whole("merge")
        if parametrize.is_parametrized(base):
            raise ValueError(f"{self.key} is parametrised: remove that before merging into it")
        with here(base):
            delta, new = self.sum_with(adapters)
            if safe_merge:
                self.check_sum(adapters, new)
            self.lost = 0.0
            if why_not_finite(delta, base.weight, new):
                self.lost = math.inf
            elif new.itemsize < 4:
                self.lost = lost_to_rounding(delta, base.weight, new)
            if self._original is None:
                self._original = (kept(base, "weight"),)
            new_weight = nn.Parameter(new, requires_grad=base.weight.requires_grad)
            replace(base, "weight", new_weight)
        self.merged_adapters.extend(adapters)

    @property
    def merged(self) -> bool:
        """Whether adapters are merged. They are not if the weight was tied again meanwhile."""
        if self._original is not None and self.get_base_layer().weight is self._original[0]:
            self.unmerge()
        return bool(self.merged_adapters)

    def unmerge(self) -> None:
        """Put back the weight as it was before all merges, bit for bit."""
        if self._original is not None:
            (original,), self._original = self._original, None
            replace(self.get_base_layer(), "weight", original)
            self.merged_adapters.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self._original is not None:  # .to(), .cuda(), … move the kept weight too
            self._move_original(fn)
        return super()._apply(fn, recurse)

    def _move_original(self, fn: Any) -> None:
        assert self._original is not None
        self._original[0].data = fn(self._original[0].data)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._save_to_state_dict(*args, **kwargs)
        save_merged(self, *args[:2])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        before_loading(self, state_dict, prefix, rest[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)
