"""The layers of LoRA-XS and LoRA-Mini in PEFT: a linear layer and any number of adapters on it.

    y = x·Wᵀ + bias + scaling · ((x·downᵀ) · core) · upᵀ

down and up are one pair for a layer, whatever adapters it has: frozen Parameters in the dtype of
the weight. An adapter is its core; one of lower rank uses the pair's first rows and columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ...called import Reader, note_call, note_reading
from ...compute.operands import Operands
from ...compute.reference import Core, like, product, through_core
from ...elsewhere import HookSlot, fill_in, here, kept, replace, sharder_of
from ...functional import compute, lowrank_linear, prepared
from ...methods.merging import is_finite, lost_to_rounding, why_not_finite
from ...methods.tensors import fsdp_error, is_sharded, present
from .config import LowRankConfig
from .hooks import is_hooked
from .mixed import Lines
from .state import before_loading, check_shared, save_merged

Sides = tuple[int, int]


class Factors(nn.ParameterDict):
    """The trained factors of one kind, by adapter; no hook takes them away between calls.

    A ParameterDict is never called, so nothing would bring them back.
    """

    _hf_hook = HookSlot()

    def stays(self) -> frozenset[str]:
        """The names of what is not to be taken away: all."""
        return frozenset(self._parameters)


class PeftLowRankLinear(nn.Module, BaseTunerLayer):
    """A linear layer with adapters; subclasses are methods.

    `base_layer` is an nn.Linear, or stores its weight (in, out) where `fan_in_fan_out` says so.
    """

    uncalled: bool = True  # until its first call; see `called`
    reader: Reader | None = None
    asked: bool = False  # whether a call that was noted was one of training
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    active_adapters: list[str]
    basis_down: nn.Parameter
    basis_up: nn.Parameter

    prefix: ClassVar[str]
    adapter_layer_names: tuple[str, ...]  # the trained factors, in ParameterDicts by adapter
    base_names = ("basis_down", "basis_up")  # the frozen factors, which PEFT must not cast or train
    other_param_names = ("r", "sides", "scaling", "own_scaling", "lora_dropout", "projection_seed")

    def __init__(self, base_layer: nn.Module, key: str, fan_in_fan_out: bool) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.key, self.fan_in_fan_out = key, fan_in_fan_out
        self.out_features, self.in_features = self.base_weight.shape
        for name in self.adapter_layer_names:
            setattr(self, name, Factors())
        for name in self.base_names:
            super().register_parameter(name, None)
        self.r: dict[str, int] = {}  # which may be less than an adapter asked for
        self.sides: dict[str, Sides] = {}  # P and Q
        self.scaling: dict[str, float] = {}
        self.own_scaling: dict[str, float] = {}  # what it is by the adapter's config
        self.lora_dropout: dict[str, float] = {}
        self.projection_seed: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self._original: tuple[nn.Parameter] | None = None  # the weight as it was, while merged
        self.pending_seed: int | None = None  # of bases that are not made yet
        self._kept: Any = None  # what `_table` gave last
        self.lost = 0.0  # the part of ΔW that the last merge lost to rounding
        self.closed = False  # whether `named_modules` hides what is in it
        self.checked = False  # whether the frozen factors that come are known to be right

    def __setattr__(self, name: str, value: Any) -> None:
        wraps = isinstance(value, nn.Module) and not isinstance(value, nn.ParameterDict)
        if wraps and name in self.adapter_layer_names:
            raise TypeError(
                f"{name} of {self.key} cannot be put into a {type(value).__name__}: it is never "
                "called, so nothing would gather what it holds; wrap the block around the layer"
            )
        super().__setattr__(name, value)

    # --- the parts of the equation ---

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

    @property
    def weight(self) -> Any:
        """The base layer's; who computes with it, instead of calling the layer, is remembered."""
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

    def core(self, adapter: str) -> Core:
        """The core of an adapter, (P, Q) or a pair."""
        raise NotImplementedError

    def joined(self, adapters: list[str]) -> tuple[Tensor, Core, Tensor, float]:
        """(down, core, up, scale) of the sum of adapters."""
        if len(adapters) == 1:
            name = adapters[0]
            down, up = self.bases(*self.sides[name])
            return down, self.core(name), up, self.scaling[name]
        p, q = self.common_sides(adapters)
        down, up = self.bases(p, q)
        cores = [self.scaled(adapter, p, q) for adapter in adapters]
        return down, torch.stack(cores).sum(0), up, 1.0

    def common_sides(self, adapters: list[str]) -> tuple[int, int]:
        """P and Q that hold all of the adapters."""
        sides = [self.sides[adapter] for adapter in adapters] or [(0, 0)]
        return max(p for p, _ in sides), max(q for _, q in sides)

    def scaled(self, adapter: str, p: int, q: int) -> Tensor:
        """scaling · core as one matrix (p, q), zero beyond its sides, in float32 or wider."""
        core = product(self.core(adapter))
        assert core is not None
        core = self.scaling[adapter] * core.to(wide(core.dtype))
        return pad(core, (0, q - core.shape[1], 0, p - core.shape[0]))

    # --- adapters come and go ---

    def update_layer(self, adapter: str, config: LowRankConfig) -> None:
        """Add an adapter: bases where there are none, or not enough, and a new core."""
        self.require_whole("add or load an adapter")
        r = own(config.rank_pattern, self.key, config.r)
        alpha = own(config.alpha_pattern, self.key, config.lora_alpha)
        alpha = r if alpha is None else alpha
        shapes, sides = self.shapes(r, config)
        self.r[adapter], self.sides[adapter] = min(min(shape) for shape in shapes), sides
        self.own_scaling[adapter] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.scaling[adapter] = self.own_scaling[adapter]
        self.lora_dropout[adapter] = config.lora_dropout
        self.projection_seed[adapter] = config.projection_seed
        # Offloaded weights are here now, and on the meta device when the bases are asked for.
        later = config.inference_mode and not is_hooked(self.get_base_layer())
        self.grow_bases(*sides, config.projection_seed, later)
        like_base: Any = {"dtype": self.base_weight.dtype, "device": self.base_weight.device}
        for name, shape in zip(self.adapter_layer_names, shapes, strict=True):
            getattr(self, name)[adapter] = nn.Parameter(torch.empty(shape, **like_base))
        self.init_core(adapter, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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

    def trained_factors(self, adapter: str) -> list[nn.Parameter]:
        """The trained factors of an adapter."""
        return [getattr(self, name)[adapter] for name in self.adapter_layer_names]

    def require_whole(self, what: str) -> None:
        """Raise RuntimeError where this process has but a part of the weight."""
        if sharder := sharder_of(self.unmerged_weight):
            raise fsdp_error(what, sharder)

    def fits(self, adapter: str, config: LowRankConfig) -> bool:
        """Whether the layer has room for the ranks that an adapter asked for."""
        p, q = self.sides[adapter]
        return (
            self.r[adapter] == own(config.rank_pattern, self.key, config.r)
            and getattr(config, "a", p) == p
            and getattr(config, "b", q) == q
        )

    def shapes(self, r: int, config: LowRankConfig) -> tuple[list[Sides], Sides]:
        """The shapes of the trained factors, and (P, Q), for the rank that is asked for."""
        raise NotImplementedError

    def mix(self, shares: list[tuple[str, float]]) -> tuple[Tensor, ...]:
        """The trained factors of Σ weight · adapter, at scaling 1, in float32 or wider."""
        p, q = self.common_sides([name for name, _ in shares])
        cores = [weight * self.scaled(name, p, q) for name, weight in shares]
        return (torch.stack(cores).sum(0),)

    def init_core(self, adapter: str, init: bool | str) -> None:
        """Give the trained factors their initial values."""
        raise NotImplementedError

    def new_bases(self, p: int, q: int, seed: int) -> tuple[Tensor, Tensor]:
        """down (p, in) and up (out, q) of this layer, as its weight and the seed determine them."""
        raise NotImplementedError

    def more_bases(self, p: int, q: int, seed: int) -> tuple[Tensor, Tensor]:
        """The same, beginning with those that are there."""
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
        """PyTorch's; ValueError for a frozen factor that is not that of adapters there before."""
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

    def others(self, adapter: str) -> list[nn.Parameter]:
        """The trained factors of other adapters."""
        dicts: list[Any] = [self._modules[name] for name in self.adapter_layer_names]
        return [own for factors in dicts for name, own in factors.items() if name != adapter]

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """PyTorch's; the layer alone while it is `closed`."""
        inside = super().named_modules(memo, prefix, remove_duplicate)
        return itertools.islice(inside, 1) if self.closed else inside

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """ΔW is low-rank whatever the method."""
        return True

    # --- forward ---

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) → (..., out), through the active adapters, or each row through its own."""
        if self.uncalled:
            note_call(self)
        names = kwargs.pop("adapter_names", None)
        base: Any = self._modules["base_layer"]
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return base(x, *args, **kwargs)
        if names is not None:
            return self.mixed(x, names)
        active = [name for name in self.active_adapters if name in self.scaling]
        if self.merged or not active:
            return base(x, *args, **kwargs)
        p = {self.lora_dropout[name] for name in active} if self.training else {0.0}
        if args or kwargs or not self.is_plain(base) or (len(active) > 1 and p != {0.0}):
            y = base(x, *args, **kwargs)
            for name in active:
                y = y + self.term(x, name).to(y.dtype)
            return y
        down, core, up, scale = self.joined(active)
        return lowrank_linear(
            x,
            base.weight.t() if self.fan_in_fan_out else base.weight,
            *(down, core, up, base.bias),
            scale=scale,
            dropout_p=p.pop(),
            training=True,  # or p is 0
        )

    def is_plain(self, base: Any) -> bool:
        """Whether the base layer's call is x·Wᵀ + bias, and nothing else happens in it."""
        kind = Conv1D if self.fan_in_fan_out else nn.Linear
        return type(base) is kind and not is_hooked(base)

    def term(self, x: Tensor, adapter: str) -> Tensor:
        """scaling · ((dropout(x)·downᵀ)·core)·upᵀ, where the base layer has to be called."""
        down, core, up, scale = self.joined([adapter])
        present(self, down)
        x = dropout(like(x, down.dtype), self.lora_dropout[adapter], self.training)
        u = through_core(linear(x, down), core, scale)
        return linear(u, up)

    def mixed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Each row of the batch through the adapter of its own name, in one pass."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        lines = names if isinstance(names, Lines) else Lines(names)
        call = lines.call if not torch.compiler.is_compiling() else None
        if call is not None and call.follower is not None and not call.follower.paused:
            state = call.follower.where(x)
            with call.follower.pause():
                y = self.mixed(x, lines)
            call.follower.mark(y, state)
            return y
        place = lines.spread(self.key, x)
        there = [name for name in lines.different if name in self.scaling]
        if not there:
            return self.base_layer(x)
        sides = self.common_sides(there)
        (down, up), weight, base = self.bases(*sides), self.base_weight, self.base_layer
        table = self._table(there, *sides)
        rows = lines.rows(there, table, place)
        if not self.is_plain(base) or torch.compiler.is_compiling():
            y = base(x)
            t = linear(like(x, down.dtype), down)
            return y + linear(through_core(t, rows, 1.0), up).to(y.dtype)
        return compute(prepared(Operands(x, weight, down, rows, up, base.bias, 1.0)), "auto")

    def _table(self, adapters: list[str], p: int, q: int) -> Tensor:
        """The cores (adapters, p, q), each times its scaling; kept while nobody changes one."""
        factors = [
            factor for name in self.adapter_layer_names for factor in self._factors(name, adapters)
        ]
        if torch.is_grad_enabled() and any(factor.requires_grad for factor in factors):
            return torch.stack([self.scaled(name, p, q) for name in adapters])
        scalings = [self.scaling[name] for name in adapters]
        stamp = [(id(f), f.data_ptr(), f._version) for f in factors], scalings
        last = self._kept  # read once: a call on another thread may put another there
        if last is None or last[0] != stamp:
            with torch.inference_mode(False), torch.no_grad():
                table = torch.stack([self.scaled(name, p, q) for name in adapters])
            self._kept = last = stamp, table, factors  # which keeps their ids taken
        return last[1]

    def _factors(self, name: str, adapters: list[str]) -> list[nn.Parameter]:
        parameters = self._modules[name]
        return [parameters[adapter] for adapter in adapters]  # type: ignore[index]

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own table."""
        return {**super().__getstate__(), "_kept": None}

    # --- merging ---

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW = scaling · up·coreᵀ·down, stored as the base weight is, in float32 or wider."""
        dtype = wide(self.base_weight.dtype)
        sides = self.sides[adapter]
        with here(self):
            (down, up), core = self.bases(*sides), self.scaled(adapter, *sides).to(dtype)
            delta = up.to(dtype) @ core.t() @ present(self, down).to(dtype)
        return delta.t() if self.fan_in_fan_out else delta

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

    def _apply(self, fn: Any, recurse: bool = True) -> PeftLowRankLinear:
        if self._original is not None:  # .to(), .cuda(), … move the kept weight too
            self._original[0].data = fn(self._original[0].data)
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        """As PEFT's layers show themselves, with the prefix of the method."""
        return f"{self.prefix}{super().__repr__()}"


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or wider."""
    return torch.promote_types(dtype, torch.float32)


def own(pattern: dict[str, Any], key: str, default: Any) -> Any:
    """What a rank_pattern or an alpha_pattern says of a module."""
    return pattern.get(get_pattern_key(list(pattern), key), default)
