"""Layers around a module whose W is no plain matrix: quantised, or known by calls alone.

The module stays what it is, as the layer's `base_layer`, and is given back by `to_linear`. Its
class is made of a method's: an instance of that, which takes W from the module.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.base.calls import alone, over_base
from ..compute.base.kinds import say_opaque
from ..compute.base.protocol import Base
from ..compute.base.requantise import exchange, requantised, said_off
from ..compute.dropout import Dropout, without_ranks
from ..compute.operands import Operands
from ..compute.reference import AnyCore, Core
from ..context.called import note_call, note_reading
from ..context.elsewhere import here, hook_of
from ..functional import DTYPES, names, shape
from .accept import base_of, carry_hooks
from .layer import LowRankLinear
from .state import EXTRA, MERGED, sum_of
from .tensors import present

OWN = "base_layer."  # how the keys of the module begin in a state_dict


class OverBase(LowRankLinear):
    """A layer of a method whose W is a `Base`: the part that differs from others.

    `weight` and `bias` are the module's own, as others may ask for them; `base_weight` is W as the
    equation takes it. Neither is trained.
    """

    by_attributes = True
    base_layer: nn.Module
    off: float = 0.0  # ‖what is stored - (W + ΔW)‖/‖W + ΔW‖ of the last merging
    of_sum: Any = None  # W + ΔW as a `Base`, while merged

    @staticmethod
    def of(cls: type[LowRankLinear]) -> type[OverBase]:
        """The class of a method's layers that are around such modules."""
        return over(cls)

    def take_base(self, linear: Any) -> None:
        """Keep the module, and know its W."""
        if own := sorted({"weight", "bias"} & set(self.train_names)):
            raise ValueError(
                f"train names {', '.join(own)}, but the base is a {type(linear).__name__}: what is "
                "trained there is the adapter alone"
            )
        base = base_of(linear)
        assert isinstance(base, Base)
        say_opaque(base)
        self.base_layer = linear
        vars(self)["base_weight"] = base

    def carry_from(self, linear: nn.Module) -> None:
        """Take over the hooks of the module, which are of the whole layer from now on."""
        carry_hooks(linear, self)

    def to_linear(self) -> Any:
        """The very module that the layer was made around, with its hooks again."""
        carry_hooks(self, self.base_layer)
        return self.base_layer.train(self.training)

    @property  # type: ignore[misc]
    def weight(self) -> Any:
        """The module's own weight, as it is stored; W where it has none of that name."""
        note_reading(self)
        return getattr(self.base_layer, "weight", self.base_weight)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The module's own bias."""
        return getattr(self.base_layer, "bias", None)

    base_weight: Any = None  # each layer has its own

    def own_tensors(self) -> tuple[Any, Tensor, Core, Tensor, Tensor | None, Tensor | None]:
        """(W, down, core, up, bias, gain)."""
        base = self.base_weight
        if (
            self.row.dora and hook_of(self.base_layer) is not None and base.is_meta
        ):  # the norms need its values, the module brings its own
            with here(self.base_layer):
                down, core, up, gain = self.parts()
                return base, down, core, up, base.bias, gain
        down, core, up, gain = self.parts()
        return base, down, core, up, base.bias, gain

    def own(self, x: Tensor) -> Tensor:
        """The layer with its own core, whoever else computes it."""
        if self.uncalled:
            note_call(self)
        if self.disabled:
            if self.disabled is not True:
                self.disabled.note()
            return alone(self.base_weight, x)
        if self.merged:
            return alone(self.of_sum, x)
        self._require_factors()
        weight, down, core, up, bias, gain = self.own_tensors()
        return self.compute(x, weight, down, core, up, bias, None, gain)

    def compute(
        self,
        x: Tensor,
        weight: Any,
        down: Tensor,
        core: AnyCore,
        up: Tensor,
        bias: Tensor | None,
        seed: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> Tensor:
        """y of these operands by this layer's implementation, with its scale and dropouts."""
        if self.rank_dropout and self.training:
            core, up = without_ranks(core, up, self.rank_dropout)
        dropout = Dropout(seed, self.dropout) if self.dropout and self.training else None
        check_input(self, x, down)
        if weight.is_meta and hook_of(self.base_layer) is None:
            present(self, weight)
        return over_base(
            Operands(x, weight, down, core, up, bias, self.scale, dropout, gain=gain), self.impl
        )

    @property
    def merged(self) -> bool:
        """Whether the module has W + ΔW now."""
        return self._original is not None

    def __setattr__(self, name: str, value: Any) -> None:
        own = self._modules.get(name) if name == "base_layer" else None
        if own is not None and own is not value:
            raise RuntimeError(
                f"the {type(own).__name__} within an adapted layer cannot become a "
                f"{type(value).__name__}: quantise, dequantise or wrap the model first, then "
                "adapt; unload(model) gives it back"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.base_weight.require_bits(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def merge(self) -> float:
        """Give the module W + ΔW, stored as W is; return the part of ΔW lost by that.

        What was stored is kept for `unmerge`. Otherwise as over a plain matrix. Raises TypeError
        where W cannot be stored anew as it was.
        """
        if self.merged:
            return 0.0
        if reason := self.why_not_merged():
            raise TypeError(f"cannot merge into a layer: it {reason}")
        self._require_own_weight("merge")
        self._require_factors()
        base: Any = present(self, self.base_weight)
        values, wide = base.values_to_merge(), torch.promote_types(base.dtype, torch.float32)
        wanted, delta = sum_of(self, self.factors_now(), values, wide)
        module, lost, self.off = requantised(base, wanted, delta)
        if lost:
            warnings.warn(f"merging lost {lost:.2%} of ΔW: {self.how_to_keep()}", stacklevel=2)
        exchange(base, self.base_layer, module)
        base.module, self._original = module, (module,)  # a backward still needs W
        vars(self)["of_sum"] = type(base)(self.base_layer)
        return lost

    def unmerge(self) -> None:
        """Give the module what it stored before `merge`, bit for bit."""
        if self._original is not None:
            (module,), self._original = self._original, None
            exchange(self.base_weight, self.base_layer, module)
            self.base_weight.module = self.base_layer
            self.of_sum.module, vars(self)["of_sum"] = module, None  # a backward may need W + ΔW

    def how_to_keep(self) -> str:
        """How far the last merging is off, and where nothing would be lost."""
        return said_off(self.off)

    def why_not_saved(self) -> str | None:
        """None: W was looked at when the layer was made."""
        return None

    def why_not_merged(self) -> str | None:
        """The reason why ΔW cannot be added to W."""
        reason = self.base_weight.why_not_requantised()
        return reason and (
            f"{reason}: save_adapter, dequantise the model (transformers: model.dequantize()), "
            "load_adapter there (on_other_base='warn') and merge that"
        )

    def _require_plain_weight(self, what: str) -> None:
        pass

    def _move_original(self, fn: Any) -> None:
        assert self._original is not None
        self._original[0]._apply(fn)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        plain_keys(self, state_dict, prefix)
        if any(key.startswith(prefix + OWN) for key in state_dict):
            self.base_weight.before_loading(state_dict, prefix + OWN)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt, (type(self).__mro__[2],), self.__getstate__()


def plain_keys(layer: LowRankLinear, state: dict[str, Any], prefix: str) -> None:
    """Give keys of the module in a plain model the names that they have in this layer."""
    own = {*layer.factors, MERGED}
    if type(layer).get_extra_state is not nn.Module.get_extra_state:  # the layer's own seeds
        own.add(EXTRA)
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name not in own and not name.startswith(OWN):
            state[prefix + OWN + name] = state.pop(key)


def check_input(layer: Any, x: Tensor, down: Tensor | None) -> None:
    """Raise for an x that a layer does not take; the factors are its own."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}: it must be one of {names(DTYPES)}")
    if x.shape[-1:] != (layer.in_features,):
        raise ValueError(
            f"x is {shape(x)} and weight ({layer.out_features}, {layer.in_features}): they must "
            "be (..., K) and (N, K)"
        )
    if down is not None and x.device != down.device:
        raise ValueError(f"down is on {down.device}, but x on {x.device}: move one")


MADE: dict[type[LowRankLinear], type[OverBase]] = {}


def over(cls: type[LowRankLinear]) -> type[OverBase]:
    """The class of a method's layers that are around such modules."""
    if issubclass(cls, OverBase):
        return cls
    if cls not in MADE:
        own = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        MADE[cls] = type(cls.__name__, (OverBase, cls), own)
    return MADE[cls]


def rebuilt(cls: type[LowRankLinear]) -> OverBase:
    """An empty layer of such a class, for a copy to be put into it."""
    made = over(cls)
    return made.__new__(made)
