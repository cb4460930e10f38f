"""The parts of a layer that its adapters share: the base's weight, and the frozen factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...context.called import note_reading
from ...context.elsewhere import fill_in, here, kept, replace, sharder_of
from ...methods.merging import is_finite, lost_to_rounding, why_not_finite
from ...methods.tensors import fsdp_error, is_sharded, present
from .state import before_loading, check_shared, save_merged

if TYPE_CHECKING:
    from typing_extensions import Self


class SharedLayer(nn.Module, BaseTunerLayer):
    """A layer of PEFT around a base layer, whose weight is W, or W + ΔW while adapters are merged.

    Its frozen factors are one pair, down (P, in) and up (out, Q), for all adapters. Subclasses say
    what these are, by `new_bases` and `more_bases`, and what ΔW is, by `get_delta_weight`.
    """

    get_base_layer: Callable[[], Any]
    active_adapters: list[str]
    key: str  # the module's name in the model
    fan_in_fan_out: bool
    scaling: dict[str, float]  # by adapter
    in_features: int
    out_features: int
    basis_down: nn.Parameter
    basis_up: nn.Parameter
    base_names = ("basis_down", "basis_up")  # the frozen factors, which PEFT must not cast or train

    def __init__(self) -> None:
        super().__init__()
        for name in self.base_names:
            super().register_parameter(name, None)
        self.pending_seed: int | None = None  # of frozen factors that are not made yet
        self.checked = False  # whether the frozen factors that come are known to be right
        self.merged_adapters: list[str] = []
        self._original: tuple[nn.Parameter] | None = None  # the weight as it was, while merged
        self.lost = 0.0  # the part of ΔW that the last merge lost to rounding

    # --- the frozen factors ---

    def bases(self, p: int, q: int) -> tuple[Tensor, Tensor]:
        """down (p, in) and up (out, q): what adapters of these sides use."""
        if self.pending_seed is not None:
            self._make_bases()
        try:
            down, up = (self._parameters[name] for name in self.base_names)
        except KeyError:  # FSDP may put plain tensors in their places
            down, up = self.basis_down, self.basis_up
        assert down is not None
        assert up is not None
        return down if p == down.shape[0] else down[:p], up if q == up.shape[1] else up[:, :q]

    def new_bases(self, p: int, q: int, seed: int) -> tuple[Tensor, Tensor]:
        """down (p, in) and up (out, q) of this layer, as its weight and the seed determine them."""
        raise NotImplementedError

    def more_bases(self, p: int, q: int, seed: int) -> tuple[Tensor, Tensor]:
        """The bases for larger sides, beginning with those that are there."""
        raise NotImplementedError

    @torch.no_grad()
    def grow_bases(self, p: int, q: int, seed: int, later: bool) -> None:
        """Have bases for P = p and Q = q at least; what is there already stays as it is.

        `later`: those that nobody has loaded are made when they are first asked for.
        """
        down, up = (self._parameters[name] for name in self.base_names)
        if down is None or up is None:
            self._first_bases(p, q, seed, later)
            return
        p, q = max(p, down.shape[0]), max(q, up.shape[1])
        if (p, q) != (down.shape[0], up.shape[1]):
            self.bases(0, 0)  # if they are to be made, now
            for name, value in zip(self.base_names, self.more_bases(p, q, seed), strict=True):
                replace(self, name, nn.Parameter(value, requires_grad=False))

    def _first_bases(self, p: int, q: int, seed: int, later: bool) -> None:
        weight = self.base_weight
        kind: Any = {"dtype": weight.dtype, "device": "cpu" if weight.is_meta else weight.device}
        for name, shape in zip(
            self.base_names, ((p, self.in_features), (self.out_features, q)), strict=True
        ):
            value = nn.Parameter(torch.empty(shape, **kind), requires_grad=False)
            self.register_parameter(name, value)
        if self.basis_down.is_meta:  # low_cpu_mem_usage: the file's will take their place
            return
        if weight.is_meta:
            raise ValueError(
                f"the weight of {self.key} is on the meta device: load the weights first"
            )
        self.pending_seed = seed
        if not later:
            self._make_bases()

    @torch.no_grad()
    def _make_bases(self) -> None:
        assert self.pending_seed is not None
        (down, up), seed = (self.basis_down, self.basis_up), self.pending_seed
        with here(self.get_base_layer()):
            present(self, self.base_weight)
            new = self.new_bases(len(down), up.shape[1], seed)
        for name, value in zip(self.base_names, new, strict=True):
            fill_in(self, name, value)
        self.pending_seed = None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.pending_seed is not None:
            self._make_bases()
        super()._save_to_state_dict(*args, **kwargs)
        save_merged(self, *args[:2])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        before_loading(self, state_dict, prefix, rest[-1])
        self.checked = True
        try:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        finally:
            self.checked = False

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a Parameter; ValueError for a frozen factor unlike that of adapters there."""
        if name in self.base_names and param is not None and not self.checked:
            check_shared(self, name, param, list(self.scaling)[:-1])  # the last is being loaded
        super().register_parameter(name, param)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        weight = self.base_weight
        target = weight.device if device is None else device
        for factor in (self.basis_down, self.basis_up):
            if not factor.is_meta and target.type != "meta":
                factor.data = factor.data.to(target, weight.dtype)

    # --- the weight ---

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

    def require_whole(self, what: str) -> None:
        """Raise RuntimeError where this process has but a part of the weight."""
        if sharder := sharder_of(self.unmerged_weight):
            raise fsdp_error(what, sharder)

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
            self._original[0].data = fn(self._original[0].data)
        return super()._apply(fn, recurse)
