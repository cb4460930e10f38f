"""Layers of PEFT around a module whose W is no plain matrix: quantised, or known by calls alone.

The class of such a layer is made of a method's, as `methods.over` makes it natively. The module is
the layer's `base_layer`, as PEFT has it, and is given back by `unload`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import (
    get_quantization_kwargs,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ....compute.base.calls import alone, over_base
from ....compute.base.eightbit import EightBit
from ....compute.base.kinds import say_opaque
from ....compute.base.protocol import Base
from ....compute.base.requantise import exchange, requantised, said_off
from ....compute.dropout import Dropout
from ....compute.operands import Operands
from ....compute.reference import AnyCore
from ....methods.accept import base_of, why_no_weight
from ....methods.over import check_input
from ....methods.tensors import present
from .base import PeftLowRankLinear, wide


class PeftOverBase(PeftLowRankLinear):
    """A layer of a method whose W is a `Base`: the part that differs from others.

    Its module may be put in another's place, as transformers' `model.dequantize()` does: W is then
    that one's, and the layer as any other if it is a plain matrix.
    """

    known: tuple[Any, Base | None] = None, None  # the base layer, and its W if that is a `Base`
    off: float = 0.0  # ‖what is stored - (W + ΔW)‖/‖W + ΔW‖ of the last merging

    @property
    def base_weight(self) -> Any:
        """W (out, in): a `Base`, or a plain matrix that has come in its place."""
        own = self._modules["base_layer"]
        if self.known[0] is not own:
            self.known = own, self.looked_at(self.get_base_layer())
        base = self.known[1]
        return super().base_weight if base is None else base

    def looked_at(self, module: nn.Module) -> Base | None:
        """The W of a base layer, or None where it is a plain matrix; ValueError if it has none."""
        if has_matrix(module):
            return None
        base = base_of(module)
        if isinstance(base, str):
            raise ValueError(f"the base layer of {self.key} {base}")
        say_opaque(base)
        return base

    @property
    def factor_dtype(self) -> torch.dtype:
        """W's dtype, a 4-bit one's compute dtype; float32 or wider over 8 bits, which say none."""
        weight = self.base_weight
        return wide(weight.dtype) if isinstance(weight, EightBit) else weight.dtype

    # --- as PEFT's own layers tell it ---

    def take_backend(self, model: nn.Module) -> None:
        """Take what PEFT knows of the base's quantisation, for `get_layer_status` and others."""
        with suppress(ValueError):  # of torchao's, if transformers did not quantise the model
            self.quantization_backend = resolve_quantization_backend(
                self.get_base_layer(), **get_quantization_kwargs(model)
            )

    def get_base_weight(self) -> Tensor:
        """W (out, in), dequantised."""
        weight = self.base_weight
        return weight.values() if isinstance(weight, Base) else super().get_base_weight()

    def extra_repr(self) -> str:
        """The name of the quantisation, as PEFT's layers show it."""
        return str(quantization_extra_repr(self))

    # --- forward ---

    def is_plain(self, base: Any) -> bool:
        """Whether the base layer is a plain one by now, whose call is x·Wᵀ + bias."""
        return not isinstance(self.base_weight, Base) and super().is_plain(base)

    def has_base(self) -> bool:
        """Whether the base layer is the module of a `Base`; PEFT may have another layer there."""
        weight = self.base_weight
        return isinstance(weight, Base) and weight.module is self._modules["base_layer"]

    def bare(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's own y, by its library's product where the module need not be called."""
        if args or kwargs or not self.has_base():
            return super().bare(x, *args, **kwargs)
        self._check(x)
        return alone(self.base_weight, x)

    def around(self, active: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y of these adapters: by one pass, unless the module is to be called, or masks differ."""
        p = {self.lora_dropout[name] for name in active} if self.training else {0.0}
        several = len(active) > 1 and (p != {0.0} or any(self.row_of(n).dora for n in active))
        if args or kwargs or several or not self.has_base():
            return super().around(active, x, *args, **kwargs)
        down, core, up, scale = self.joined(active)
        gain = self.gain_of(active[0], down, core, up) if len(active) == 1 else None
        return self.through(x, down, core, up, scale, p.pop(), gain)

    def through(
        self,
        x: Tensor,
        down: Tensor,
        core: AnyCore,
        up: Tensor,
        scale: float = 1.0,
        dropout_p: float = 0.0,
        gain: Any = None,
    ) -> Tensor:
        """y with these factors, over the base."""
        if not self.has_base():
            return super().through(x, down, core, up)
        base = self.base_weight
        self._check(x, down)
        bias = base.bias
        if bias is not None and gain is None and base.is_called():
            bias = bias.detach()  # its gradient comes of the module's call
        dropout = Dropout(None, dropout_p) if dropout_p else None
        operands = Operands(x, base, down, core, up, bias, scale, dropout, gain=gain)
        return over_base(operands, "auto")

    def _check(self, x: Tensor, down: Tensor | None = None) -> None:
        """Raise for an x that the base does not take, and for a base without values."""
        check_input(self, x, down)
        if self.base_weight.is_meta:
            present(self, self.base_weight)

    # --- merging ---

    @property
    def unmerged_weight(self) -> Any:
        """W, also while adapters are merged."""
        kept = self._original[0] if self._original is not None else self.base_weight
        return kept if isinstance(kept, Base) else super().unmerged_weight

    def why_not_merged(self) -> str | None:
        """The reason why ΔW cannot be added to W."""
        if not isinstance(self.base_weight, Base):
            return super().why_not_merged()
        reason = self.base_weight.why_not_requantised()
        return reason and (
            f"{reason}: save_pretrained, dequantise the base model (transformers: "
            "model.dequantize()), load the adapter there (on_other_base='warn') and merge that"
        )

    def sum_with(self, adapters: list[str]) -> tuple[Tensor, Tensor]:
        """ΔW of adapters, with those that are merged, and W + ΔW before it is quantised anew."""
        base = self.unmerged_weight
        if not isinstance(base, Base):
            return super().sum_with(adapters)
        deltas = [self.get_delta_weight(name) for name in (*self.merged_adapters, *adapters)]
        delta = torch.stack(deltas).sum(0)
        return delta, base.values_to_merge().to(delta.dtype) + delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the base layer W + ΔW of all adapters that are merged by then, stored as W is.

        A sum that is not finite is a ValueError with `safe_merge` or without, and so is a base that
        cannot be stored anew as it was; the layer is as it was.
        """
        if reason := self.why_not_merged():
            raise ValueError(f"cannot merge into {self.key}, which {reason}")
        base = self.unmerged_weight
        if not isinstance(base, Base):
            super().merge(safe_merge, adapter_names)
            return
        named = check_adapters_to_merge(self, adapter_names)
        adapters = [name for name in named if name in self.scaling]
        if not adapters:
            return
        self.require_whole("merge")
        self.require_base(base)
        if base.is_meta:
            present(self, self.base_weight)
        delta, new = self.sum_with(adapters)
        self.check_sum(adapters, new)
        module, self.lost, self.off = requantised(base, new, delta)
        own = self.get_base_layer()
        exchange(base, own, module)
        if self._original is None:
            self._original = (base,)
            base.module = module  # a backward still needs W
        else:
            self.base_weight.module = module  # and what was merged before
        self.known = self._modules["base_layer"], type(base)(own)
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Give the base layer what it stored before all merges, bit for bit."""
        base: Any = None if self._original is None else self._original[0]
        if not isinstance(base, Base):
            super().unmerge()
            return
        self.require_base(base)
        own, self._original = self.get_base_layer(), None
        exchange(base, own, base.module)
        self.base_weight.module, base.module = base.module, own  # a backward may need W + ΔW
        self.known = self._modules["base_layer"], base
        self.merged_adapters.clear()

    def require_base(self, base: Base) -> None:
        """Raise RuntimeError where a module without a `Base` has come in place of a merged one."""
        if not isinstance(self.base_weight, Base):
            raise RuntimeError(
                f"the {type(base.module).__name__} of {self.key} has become a "
                f"{type(self.get_base_layer()).__name__} while adapters were merged into it, and "
                "has no place for what it stored before: unmerge_adapter() first, then dequantise"
            )

    def how_to_keep(self) -> str:
        """How far the last merging is off, and where nothing would be lost."""
        if isinstance(self.base_weight, Base):
            return said_off(self.off)
        return super().how_to_keep()

    def _move_original(self, fn: Any) -> None:
        kept: Any = self._original
        if isinstance(kept[0], Base):
            kept[0].module._apply(fn)
        else:
            super()._move_original(fn)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)  # which refuses it while merged
        base, own = self.unmerged_weight, f"{prefix}base_layer."
        if isinstance(base, Base) and any(key.startswith(own) for key in state_dict):
            base.before_loading(state_dict, own)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT asks the base layer's weight, which an opaque module may have under another name.
        device = self.base_weight.device if device is None else device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt, (type(self).__mro__[2],), self.__getstate__()


def has_matrix(module: Any) -> bool:
    """Whether a base layer has a plain matrix, whatever its forward does: it is called then."""
    return isinstance(module, nn.Linear | Conv1D) and why_no_weight(module.weight) is None


MADE: dict[type[PeftLowRankLinear], type[PeftLowRankLinear]] = {}


def layer_for(cls: type[PeftLowRankLinear], module: nn.Module) -> type[PeftLowRankLinear]:
    """The class of a method's layers that are around this base layer."""
    return cls if has_matrix(module) else over(cls)


def of_base(layer: PeftLowRankLinear) -> None:
    """Make a layer whose base layer was quantised since one around such a module."""
    if not isinstance(layer, PeftOverBase) and not has_matrix(layer.get_base_layer()):
        layer.__class__ = over(type(layer))


def over(cls: type[PeftLowRankLinear]) -> type[PeftLowRankLinear]:
    """The class of a method's layers around modules whose W is no plain matrix."""
    if cls not in MADE:
        own = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        MADE[cls] = type(cls.__name__, (PeftOverBase, cls), own)
    return MADE[cls]


def rebuilt(cls: type[PeftLowRankLinear]) -> PeftLowRankLinear:
    """An empty layer of such a class, for a copy to be put into it."""
    made = over(cls)
    return made.__new__(made)
