"""The class that all layers of PEFT here share: a linear layer and any number of adapters on it.

y = x·Wᵀ + bias + scaling · ((x·downᵀ) · core) · upᵀ
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from ....compute.autograd import fold
from ....compute.base.protocol import Base
from ....compute.gain import Ratio
from ....compute.reference import Core, like, through_core
from ....context.called import Reader, note_call
from ....context.calls import Spread
from ....context.declared import ANYWHERE, Owners, by_row, stated
from ....context.elsewhere import HookSlot, here
from ....functional import lowrank_linear
from ....methods import dora
from ....methods.accept import is_hooked, why_no_weight
from ....methods.method import MAGNITUDE, Method, Parts
from ....methods.state import delta_of
from ....methods.tensors import present
from ....methods.variants import variant
from ..config import LowRankConfig
from ..mixed import Entries, Switched, as_before, uncompiled
from .weight import AdaptedWeight


class Factors(nn.ParameterDict):
    """The factors of one kind, by adapter; no hook takes them away between calls.

    A ParameterDict is never called, so nothing would bring them back.
    """

    _hf_hook = HookSlot()

    def stays(self) -> frozenset[str]:
        """The names of what is not to be taken away: all."""
        return frozenset(self._parameters)


class Term(NamedTuple):
    """The row and the scale of an adapter, as `delta_of` asks a layer for them."""

    row: Method
    scale: float


class PeftLowRankLinear(Switched, AdaptedWeight):
    """A linear layer with adapters; subclasses are kinds of these, and theirs are methods.

    `base_layer` is an nn.Linear, or stores its weight (in, out) where `fan_in_fan_out` says so.
    """

    takes_entries: ClassVar[bool] = True  # `Entries` for adapter_names
    noted: bool = False  # whether a checkpoint was told how it was called
    uncalled: bool = True  # until its first call; see `called`
    reader: Reader | None = None
    asked: bool = False  # whether a call that was noted was one of training
    set_adapter: Callable[..., None]

    row: ClassVar[Method]
    with_dora: ClassVar[Method]  # the row of adapters that have a magnitude
    magnitude: ClassVar[str]  # the name of the ParameterDict of these
    prefix: ClassVar[str]
    adapter_layer_names: tuple[str, ...]  # the trained factors, in ParameterDicts by adapter; of a
    # layer that has had an adapter with DoRA the magnitude as well, as PEFT's own have it
    factor_names: tuple[str, ...]  # these, and what is frozen of each adapter
    base_names: tuple[str, ...] = ()  # factors that all adapters share
    other_param_names: tuple[str, ...] = ("r", "room", "scaling", "own_scaling", "lora_dropout")

    def __init_subclass__(cls, row: Method | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if row is not None:
            cls.row, cls.with_dora = row, variant(row, {"dora": True})
            cls.prefix, cls.magnitude = f"{row.name}_", f"{row.name}_{MAGNITUDE}"

    def __init__(self, base_layer: nn.Module, key: str, fan_in_fan_out: bool) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.key, self.fan_in_fan_out = key, fan_in_fan_out
        self.out_features, self.in_features = self.base_weight.shape
        for name in self.factor_names:
            setattr(self, name, Factors())
        self.r: dict[str, int] = {}  # which may be less than an adapter asked for
        self.room: dict[str, bool] = {}  # whether there was room for the ranks that it asked for
        self.scaling = {}
        self.own_scaling: dict[str, float] = {}  # what it is by the adapter's config
        self.lora_dropout: dict[str, float] = {}
        self.closed = False  # whether `named_modules` hides what is in it

    def __setattr__(self, name: str, value: Any) -> None:
        wraps = isinstance(value, nn.Module) and not isinstance(value, nn.ParameterDict)
        if wraps and name in self.factor_names:
            raise TypeError(
                f"{name} of {self.key} cannot be put into a {type(value).__name__}: it is never "
                "called, so nothing would gather what it holds; wrap the block around the layer"
            )
        super().__setattr__(name, value)

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype that trained factors begin in; PEFT widens it, unless that is not asked for."""
        return self.base_weight.dtype

    # --- of each kind ---

    def add_factors(self, adapter: str, config: LowRankConfig, r: int) -> None:
        """Add the factors of an adapter that asks for rank r, and note `r` and `room`."""
        raise NotImplementedError

    def factors_of(self, adapter: str) -> dict[str, Tensor]:
        """The factors of an adapter, by the row's names."""
        raise NotImplementedError

    def matrices_of(self, adapter: str) -> list[Tensor]:
        """The factors of an adapter that are matrices, wherever they are whole."""
        sides = {factor: kind.sides for factor, kind in self.with_dora.factors.items()}
        return [own for name, own in self.factors_of(adapter).items() if len(sides[name]) == 2]

    def keys(self, prefix: str, adapter: str) -> dict[str, str]:
        """The keys that the factors of an adapter have in a state_dict, by the row's names."""
        raise NotImplementedError

    def used(self, adapter: str, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's factors, of those that a state_dict has by these keys."""
        raise NotImplementedError

    def joined(self, adapters: list[str]) -> tuple[Tensor, Core, Tensor, float]:
        """(down, core, up, scale) of the sum of adapters."""
        raise NotImplementedError

    def by_rows(self, x: Tensor, entries: Entries, place: Spread | Owners) -> Tensor:
        """Each row of x through the adapter of its own name: an adapter's rows at a time."""
        if torch.compiler.is_compiling():
            return uncompiled(self.by_rows, x, entries, place)
        y = self.bare(x)
        rows, found = fold(x), fold(y)
        numbers = by_row(place, len(rows), len(entries)).tolist()
        for name in entries.different:
            if name in self.scaling:
                own = [row for row, number in enumerate(numbers) if entries[number] == name]
                index = torch.tensor(own, device=x.device)
                term = self.term(rows[index], name, found[index]).to(y.dtype)
                found = found.index_add(0, index, term)
        return found.view(y.shape)

    # --- the row and factors of an adapter ---

    def row_of(self, adapter: str) -> Method:
        """The row of an adapter: with DoRA's magnitude, or without."""
        own: Any = self._modules[self.magnitude]
        return self.with_dora if adapter in own._parameters else self.row

    def trained_names(self, adapter: str) -> tuple[str, ...]:
        """The names of the ParameterDicts that have the trained factors of an adapter."""
        names = type(self).adapter_layer_names
        return (*names, self.magnitude) if self.row_of(adapter).dora else names

    def trained_factors(self, adapter: str) -> list[nn.Parameter]:
        """The factors of an adapter that are trained."""
        return [getattr(self, name)[adapter] for name in self.trained_names(adapter)]

    def gain_of(self, adapter: str, down: Tensor, core: Core, up: Tensor) -> Any:
        """The gain (out,) of an adapter with these parts, or None."""
        if not (row := self.row_of(adapter)).dora:
            return None
        made, factors = Parts(down, core, up), self.factors_of(adapter)
        weight, scale = self.base_weight, self.scaling[adapter]
        known = isinstance(weight, Base) or torch.compiler.is_compiling()
        if not known and (reason := why_no_weight(weight)):
            raise ValueError(
                f"{self.key} was quantised when it had an adapter with use_dora, and has "
                f"{reason.partition(':')[0]}, of which DoRA has no norms: save_pretrained, "
                "quantise the base model, and load the adapter there (on_other_base='warn')"
            )
        return dora.with_gain(made, factors, weight, scale, row.down_of).gain

    @torch.no_grad()
    def fill_magnitude(self, adapter: str) -> None:
        """Give an adapter with DoRA, whose other factors are filled, a gain of 1."""
        magnitude = getattr(self, self.magnitude)._parameters.get(adapter)
        if magnitude is not None and not (magnitude.is_meta or self.unmerged_weight.is_meta):
            magnitude.copy_(self.norms(adapter))

    def norms(self, adapter: str) -> Tensor:
        """‖W + ΔW‖ (out,) by row, of trained factors as wide as they will be."""
        row, factors = self.row_of(adapter), self.factors_of(adapter)
        for name in row.trained:
            own = factors[name].detach()  # a step knows by it that it is trained
            factors[name] = like(own, wide(own.dtype)).requires_grad_()
        return dora.norms_of(row, factors, self.unmerged_weight, self.scaling[adapter])

    # --- adapters come and go ---

    def update_layer(self, adapter: str, config: LowRankConfig) -> None:
        """Add an adapter with first values."""
        self.require_whole("add or load an adapter")
        r = own(config.rank_pattern, self.key, config.r)
        alpha = own(config.alpha_pattern, self.key, config.lora_alpha)
        alpha = r if alpha is None else alpha
        self.own_scaling[adapter] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.scaling[adapter] = self.own_scaling[adapter]
        self.lora_dropout[adapter] = config.lora_dropout
        if config.use_dora:
            self.check_rows()
        self.add_factors(adapter, config, r)
        if config.use_dora:
            weight = self.unmerged_weight
            value = torch.empty(len(weight), dtype=wide(weight.dtype), device=weight.device)
            getattr(self, self.magnitude)[adapter] = nn.Parameter(value)
            self.adapter_layer_names = (*type(self).adapter_layer_names, self.magnitude)
        self._move_adapter_to_device_of_base_layer(adapter)  # type: ignore[operator]
        if not self.row.shared:  # of the others the factors are not all there yet
            self.fill_magnitude(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def check_rows(self) -> None:
        """Raise ValueError, naming the layer, if a row of W has no norm to divide by."""
        try:
            dora.check_rows(self.with_dora, self.unmerged_weight)
        except ValueError as error:
            raise ValueError(f"{self.key}: {error}") from None

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make an adapter's scaling `scale` times what its config says."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.own_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters; by None or 0: make it what the config says."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.scaling[name] / scale if scale else self.own_scaling[name]

    def sized(self, config: LowRankConfig, r: int) -> tuple[dict[str, int], bool]:
        """The sizes of K, N and the ranks of an adapter that asks for rank r, and whether there is
        room for these; they are taken down to it otherwise.
        """
        asked = {**{name: getattr(config, name) for name in self.row.ranks}, "r": r}
        sizes = self.row.fitted(self.in_features, self.out_features, asked)
        return sizes, all(sizes[name] == rank for name, rank in asked.items())

    def others(self, adapter: str) -> list[nn.Parameter]:
        """The factors of other adapters."""
        dicts: list[Any] = [self._modules[name] for name in self.adapter_layer_names]
        return [own for factors in dicts for name, own in factors.items() if name != adapter]

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The modules, as PyTorch's gives them; the layer alone while it is `closed`."""
        inside = super().named_modules(memo, prefix, remove_duplicate)
        return itertools.islice(inside, 1) if self.closed else inside

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ΔW is low-rank: of every method, without DoRA."""
        return not self.row_of(adapter_name).dora

    # --- forward ---

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) → (..., out), through the active adapters, or each row through its own."""
        if self.uncalled:
            note_call(self)
        names = kwargs.pop("adapter_names", None)
        base: Any = self._modules["base_layer"]
        off: Any = self.disable_adapters
        if off or self.noted or names is not None:
            off, names = as_before(self, off, names)
        if off:
            if self.merged:
                self.unmerge()
            return self.bare(x, *args, **kwargs)
        if names is not None:
            return self.mixed(x, names)
        active = [name for name in self.active_adapters if name in self.scaling]
        if self.merged or not active:
            return self.bare(x, *args, **kwargs)
        p = {self.lora_dropout[name] for name in active} if self.training else {0.0}
        several = len(active) > 1 and (p != {0.0} or any(self.row_of(n).dora for n in active))
        if args or kwargs or several or not self.is_plain(base):
            return self.around(active, x, *args, **kwargs)
        down, core, up, scale = self.joined(active)
        gain = self.gain_of(active[0], down, core, up) if len(active) == 1 else None
        return lowrank_linear(
            x,
            base.weight.t() if self.fan_in_fan_out else base.weight,
            *(down, core, up, base.bias),
            scale=scale,
            dropout_p=p.pop(),
            training=True,  # or p is 0
            gain=gain,
        )

    def bare(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's own y."""
        y: Tensor = self._modules["base_layer"](x, *args, **kwargs)  # type: ignore[misc]
        return y

    def around(self, active: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's y, and the terms of these adapters, each with its own dropout."""
        y = of_base = self.bare(x, *args, **kwargs)
        for name in active:
            y = y + self.term(x, name, of_base).to(y.dtype)
        return y

    def is_plain(self, base: Any) -> bool:
        """Whether the base layer's call is x·Wᵀ + bias, and nothing else happens in it."""
        kind = Conv1D if self.fan_in_fan_out else nn.Linear
        return type(base) is kind and not is_hooked(base)

    def term(self, x: Tensor, adapter: str, y: Tensor) -> Tensor:
        """The summand that an adapter adds to y, which the base layer gives for x.

        That is low = scaling · ((dropout(x)·downᵀ)·core)·upᵀ; with DoRA
        gain ⊙ (x·Wᵀ + low) - x·Wᵀ. The terms of several adapters are added, each of W alone.
        """
        down, core, up, scale = self.joined([adapter])
        present(self, down)
        x = dropout(like(x, down.dtype), self.lora_dropout[adapter], self.training)
        u = through_core(linear(x, down), core, scale)
        low = linear(like(u, up.dtype), up)
        if not self.row_of(adapter).dora:
            return low
        with here(base := self.get_base_layer()):
            gain = self.gain_of(adapter, down, core, up)
            gain = gain.tensor() if isinstance(gain, Ratio) else gain
            product = y if base.bias is None else y - base.bias
        assert gain is not None
        return gain * low + (gain - 1.0) * product

    def mixed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Each row of the batch through the adapter of its own name."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        entries = names if isinstance(names, Entries) else Entries(names)
        if torch.compiler.is_compiling() and ANYWHERE[0]:
            return uncompiled(self.mixed, x, entries)
        call = entries.call if not torch.compiler.is_compiling() else None
        if call is not None and call.follower is not None and not call.follower.paused:
            state = stated(self) or call.follower.where(x)
            with call.follower.pause():
                y = self.mixed(x, entries)
            call.follower.mark(y, state)
            return y
        place = entries.spread(self, self.key, x)
        if not any(name in self.scaling for name in entries.different):
            return self.bare(x)
        return self.by_rows(x, entries, place)

    # --- merging ---

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW = scaling · up·coreᵀ·down, stored as the base weight is, in float32 or wider."""
        with here(self):
            factors = self.factors_of(adapter)
            for factor in factors.values():
                present(self, factor)
            return self.delta(adapter, factors, wide(self.base_weight.dtype))

    def delta(self, adapter: str, factors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """ΔW of an adapter with these factors, stored as the base weight is."""
        term = Term(self.row_of(adapter), self.scaling[adapter])
        delta = delta_of(term, factors, self.unmerged_weight, dtype)
        return delta.t() if self.fan_in_fan_out else delta

    def __repr__(self) -> str:
        """The layer as PEFT's layers show themselves, with the prefix of the method."""
        return f"{self.prefix}{super().__repr__()}"


def layers_of(model: nn.Module, adapter: str | None = None) -> Iterator[PeftLowRankLinear]:
    """The layers of a model, or those of one adapter."""
    for module in model.modules():
        if isinstance(module, PeftLowRankLinear) and (adapter is None or adapter in module.scaling):
            yield module


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or wider."""
    return torch.promote_types(dtype, torch.float32)


def own(pattern: dict[str, Any], key: str, default: Any) -> Any:
    """The value that a rank_pattern or an alpha_pattern has for a module."""
    return pattern.get(get_pattern_key(list(pattern), key), default)
