"""The weight of an adapted layer: W, or W + ΔW while merged; and what the base model had."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..context.called import note_reading
from ..context.elsewhere import here, kept, replace, sharder_of
from .accept import why_no_weight
from .computer import Computer
from .method import Method
from .shared import fill_unsaved, leave_to_others
from .state import EXTRA, MERGED, is_other, refuse_wrong, seeds_state, unmerged
from .tensors import fsdp_error, is_sharded, whole

if TYPE_CHECKING:
    from typing_extensions import Self


class MergingLinear(nn.Module):
    """A linear layer whose weight can have ΔW in it, and is trained itself where it is named.

    Subclasses say what ΔW is, by `delta_weight`. A state_dict has the weight as it is, with a mark
    beside it while it is merged; one that is loaded brings back W, whatever it holds.
    """

    row: Method
    factors: tuple[str, ...]
    bases_pending: bool  # whether the factors have no values yet
    computed_by: Computer | None = None
    train_names: tuple[str, ...]
    bias: nn.Parameter | None

    def __init_subclass__(cls, row: Method | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if row is not None and any(not factor.saved for factor in row.factors.values()):
            cls.get_extra_state = seeds_state  # type: ignore[method-assign, assignment]
            cls.set_extra_state = lambda self, state: None  # type: ignore[method-assign]

    def __init__(self) -> None:
        super().__init__()
        self._original: tuple[Any] | None = None  # the weight as it was, while merged
        self._base: dict[str, Tensor] = {}  # what is trained of weight and bias, as it was
        self.base_lost = False  # whether nobody knows, for a state_dict brought it as trained

    def delta_weight(self) -> Tensor:
        """ΔW, (out_features, in_features), in float32 or wider."""
        raise NotImplementedError

    @property
    def weight(self) -> nn.Parameter:
        """W, (out_features, in_features); who computes with it, instead of calling the layer, is
        remembered.
        """
        own: Any = vars(self)
        weight = own["weight"] if "weight" in own else own["_parameters"].get("weight")
        if weight is None:
            raise AttributeError("weight")
        note_reading(self)
        return cast(nn.Parameter, weight)

    @weight.setter
    def weight(self, value: Any) -> None:
        """A tensor that is no Parameter, as pruning and functional calls put it there."""
        vars(self)["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        """Such a tensor, as FSDP1 and the end of pruning take it away."""
        vars(self).pop("weight", None)

    def take_base(self, linear: nn.Linear) -> None:
        """Take weight and bias of a linear layer, the very Parameters."""
        self.weight = cast(nn.Parameter, linear.weight)
        self.register_parameter("bias", linear.bias)

    @property
    def base_weight(self) -> nn.Parameter:
        """The weight without ΔW, merged or not."""
        return self.weight if self._original is None else self._original[0]

    @property
    def merged(self) -> bool:
        """Whether `weight` is W + ΔW now; no longer where somebody has put W back, to tie it."""
        return self._original is not None and self._original[0] is not self.weight

    @torch.no_grad()
    def merge(self) -> float:
        """Make `weight` W + ΔW, in new storage; return the part of ΔW lost to rounding.

        That is ‖lost‖/‖ΔW‖, 0.0 for float32 and wider; a UserWarning says it where it is not 0.
        The weight as it was is kept for `unmerge`, untouched, whoever shares it. Does nothing to a
        layer that is merged. Raises ValueError, the layer as it was, if ΔW holds NaN or Inf, or the
        sum is more than the weight's dtype can hold.
        """
        if self.merged:
            return 0.0
        self._require_own_weight("merge")
        self._require_plain_weight("merge into")
        with here(self):
            weight, lost = self.merged_weight()
            if lost:
                warnings.warn(
                    f"merging into {self.weight.dtype} lost {lost:.2%} of ΔW to rounding",
                    stacklevel=2,
                )
            self._original = (kept(self, "weight"),)
            replace(self, "weight", nn.Parameter(weight, requires_grad=self.weight.requires_grad))
        return lost

    def merged_weight(self) -> tuple[Tensor, float]:
        """(W + ΔW, the part of ΔW lost to rounding) of a layer that is not merged.

        Raises ValueError as `merge` does.
        """
        delta = self.delta_weight()
        weight = (self.weight + delta).to(self.weight.dtype)
        if reason := why_not_finite(delta, self.weight, weight):
            raise ValueError(f"cannot merge: {reason}")
        lost = lost_to_rounding(delta, self.weight, weight) if weight.itemsize < 4 else 0.0
        return weight, lost

    def unmerge(self) -> None:
        """Put back the weight as it was before `merge`, the same Parameter."""
        if self._original is not None:
            (original,), self._original = self._original, None
            replace(self, "weight", original)

    def how_to_keep(self) -> str:
        """Where nothing would be lost by merging."""
        return "float32 weights would keep it"

    def trained_base(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of weight and bias, where they are trained."""
        for name, own in ("weight", self.base_weight), ("bias", self.bias):
            if name in self.train_names and own is not None:
                yield name, own

    def why_not_saved(self) -> str | None:
        """The reason why the weight, as it is now, has no adapter, or None."""
        reason = why_no_weight(self.base_weight)
        return None if reason is None else f"has got {reason}"

    def why_not_merged(self) -> str | None:
        """The reason why ΔW cannot be added to the weight as it is now, or None."""
        reason = why_no_weight(self.weight)
        return None if reason is None else f"has {reason}"

    def keep_base(self) -> None:
        """Copy what is trained of weight and bias: it is the base model's until it is trained."""
        self._base = {name: own.detach().clone() for name, own in self.trained_base()}

    def share_base(self, copies: dict[Tensor, Tensor]) -> None:
        """Have one copy of a parameter with whom it is tied to; `copies` are by parameter."""
        for name, own in self.trained_base():
            if name in self._base:
                self._base[name] = copies.setdefault(own, self._base[name])

    def originals(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, its value in the base model) of weight and bias, where they are trained."""
        for name, own in self.trained_base():
            if name in self._base:
                yield own, self._base[name].to(own.device, own.dtype)

    def base(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the base model: without ΔW, and as they were before training."""
        weight, bias, values = self.base_weight, self.bias, dict(self.originals())
        return values.get(weight, weight), bias if bias is None else values.get(bias, bias)

    def _require_own_weight(self, what: str) -> None:
        """Raise where FSDP or ZeRO-3 has the weight: they put back the one they know."""
        weight: Any = self.weight
        ours = self.computed_by is not None and self.computed_by.is_parallel
        if is_sharded(weight) and (not ours or weight.device_mesh.ndim > 1):
            raise fsdp_error(what)
        if sharder := sharder_of(weight):
            raise fsdp_error(what, sharder)

    def _require_plain_weight(self, what: str) -> None:
        if reason := why_no_weight(self.weight):
            raise TypeError(f"cannot {what} a layer with {reason}")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        leave_to_others(self, destination, prefix)
        if self.merged:
            destination[prefix + MERGED] = torch.ones(1, dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        refuse_wrong(self, state_dict, prefix)
        if prefix + MERGED in state_dict:
            state_dict = unmerged(self, state_dict, prefix, rest[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        unsaved = {prefix + name for name, f in self.row.factors.items() if not f.saved}
        unsaved.add(prefix + EXTRA)
        rest[2][:] = [key for key in rest[2] if key not in unsaved]
        own = [name for name in self.factors if name not in self.row.elsewhere]
        values = [(state_dict.get(prefix + name), getattr(self, name)) for name in own]
        if not values[0][1].is_meta and all(is_other(value, own) for value, own in values):
            self.base_lost |= self.bases_pending and any(True for _ in self.trained_base())
            if self.bases_pending:
                fill_unsaved(self)
            self.bases_pending = False

    def _move_original(self, fn: Any) -> None:
        kept = self.base_weight
        kept.data = fn(kept.data)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self.merged:  # .to(), .cuda(), … move what is kept too
            self._move_original(fn)
        for name, value in self._base.items():
            new = fn(value)
            if torch._has_compatible_shallow_copy_type(value, new):
                value.data = new  # for whomever it is shared with, too
            else:
                self._base[name] = new
        return super()._apply(fn, recurse)


def lost_to_rounding(delta: Tensor, before: Tensor, after: Tensor) -> float:
    """‖lost‖/‖ΔW‖ of a sum `after` = `before` + ΔW that was rounded; 0 where ΔW is.

    Where `before` is not finite nothing is lost.
    """
    if not (norm := float(delta.norm())):
        return 0.0
    lost = delta - (after.to(delta.dtype) - before)
    size = float(lost.norm())
    return (size if math.isfinite(size) else float(lost.nan_to_num(0.0, 0.0, 0.0).norm())) / norm


def why_not_finite(delta: Tensor, before: Tensor, after: Tensor) -> str | None:
    """The reason why a sum `after` = `before` + ΔW is not finite where `before` is, or None."""
    if is_finite(after):
        return None
    if not is_finite(delta):
        return "the adapter holds NaN or Inf"
    if is_finite(after.where(before.isfinite(), 0.0)):
        return None
    return f"W + ΔW is more than {after.dtype} can hold; float32 weights would hold it"


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; of a DTensor every rank must ask."""
    return float(whole((tensor.detach() * 0).sum())) == 0.0
