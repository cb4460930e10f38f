"""The layers of LoRA-XS and LoRA-Mini in PEFT: a linear layer and any number of adapters on it.

    y = x·Wᵀ + bias + scaling · ((x·downᵀ) · core) · upᵀ

down and up are one pair for a layer, whatever adapters it has: frozen Parameters in the dtype of
the weight. An adapter is its core; one of lower rank uses the pair's first rows and columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad
from transformers.pytorch_utils import Conv1D

from ...compute.operands import Operands
from ...compute.reference import Core, like, product, through_core
from ...context.called import Reader, note_call
from ...context.declared import ANYWHERE, stated
from ...context.elsewhere import HookSlot, here
from ...functional import compute, lowrank_linear, prepared
from ...methods.accept import is_hooked
from ...methods.initial.bases import Bases, Source
from ...methods.initial.starts import FILLS
from ...methods.method import Method
from ...methods.tensors import present
from .config import LowRankConfig
from .mixed import Entries, Switched, as_before, uncompiled
from .shared import SharedLayer

Sides = tuple[int, int]


class Factors(nn.ParameterDict):
    """The trained factors of one kind, by adapter; no hook takes them away between calls.

    A ParameterDict is never called, so nothing would bring them back.
    """

    _hf_hook = HookSlot()

    def stays(self) -> frozenset[str]:
        """The names of what is not to be taken away: all."""
        return frozenset(self._parameters)


class PeftLowRankLinear(Switched, SharedLayer):
    """A linear layer with adapters; subclasses are methods.

    `base_layer` is an nn.Linear, or stores its weight (in, out) where `fan_in_fan_out` says so.
    """

    takes_entries: ClassVar[bool] = True  # `Entries` for adapter_names
    noted: bool = False  # whether a checkpoint was told how it was called
    uncalled: bool = True  # until its first call; see `called`
    reader: Reader | None = None
    asked: bool = False  # whether a call that was noted was one of training
    set_adapter: Callable[..., None]

    row: ClassVar[Method]
    prefix: ClassVar[str]
    adapter_layer_names: tuple[str, ...]  # the trained factors, in ParameterDicts by adapter
    other_param_names = ("r", "sides", "scaling", "own_scaling", "lora_dropout", "projection_seed")

    def __init_subclass__(cls, row: Method | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if row is not None:
            cls.row, cls.prefix = row, f"{row.name}_"
            cls.adapter_layer_names = tuple(f"{row.name}_{name}" for name in row.core)

    def __init__(self, base_layer: nn.Module, key: str, fan_in_fan_out: bool) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.key, self.fan_in_fan_out = key, fan_in_fan_out
        self.out_features, self.in_features = self.base_weight.shape
        for name in self.adapter_layer_names:
            setattr(self, name, Factors())
        self.r: dict[str, int] = {}  # which may be less than an adapter asked for
        self.sides: dict[str, Sides] = {}  # P and Q
        self.scaling = {}
        self.own_scaling: dict[str, float] = {}  # what it is by the adapter's config
        self.lora_dropout: dict[str, float] = {}
        self.projection_seed: dict[str, int] = {}
        self._kept: Any = None  # what `_table` gave last
        self.closed = False  # whether `named_modules` hides what is in it

    def __setattr__(self, name: str, value: Any) -> None:
        wraps = isinstance(value, nn.Module) and not isinstance(value, nn.ParameterDict)
        if wraps and name in self.adapter_layer_names:
            raise TypeError(
                f"{name} of {self.key} cannot be put into a {type(value).__name__}: it is never "
                "called, so nothing would gather what it holds; wrap the block around the layer"
            )
        super().__setattr__(name, value)

    # --- the parts of the equation ---

    def core(self, adapter: str) -> Core:
        """The core of an adapter, (P, Q) or a pair."""
        own = tuple(self._modules[name][adapter] for name in self.adapter_layer_names)  # type: ignore[index]
        return own if len(own) == 2 else own[0]

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

    def fits(self, adapter: str, config: LowRankConfig) -> bool:
        """Whether the layer has room for the ranks that an adapter asked for."""
        p, q = self.sides[adapter]
        return (
            self.r[adapter] == own(config.rank_pattern, self.key, config.r)
            and getattr(config, "a", p) == p
            and getattr(config, "b", q) == q
        )

    def shapes(self, r: int, config: LowRankConfig) -> tuple[list[Sides], Sides]:
        """The shapes of the trained factors, and (P, Q), for the rank that is asked for.

        Ranks are taken down to what the layer has room for.
        """
        row, asked = self.row, {name: getattr(config, name) for name in self.row.ranks}
        sizes = row.fitted(self.in_features, self.out_features, {**asked, "r": r})
        shapes: Any = [row.shape(name, sizes) for name in row.core]
        return shapes, (row.shape("down", sizes)[0], row.shape("up", sizes)[1])

    def mix(self, shares: list[tuple[str, float]]) -> tuple[Tensor, ...]:
        """The trained factors of Σ weight · adapter, at scaling 1, in float32 or wider.

        Pairs are put side by side; their product's sum is this where that is wider.
        """
        p, q = self.common_sides([name for name, _ in shares])
        if len(self.row.core) == 1:
            cores = [weight * self.scaled(name, p, q) for name, weight in shares]
            return (torch.stack(cores).sum(0),)
        left, right = [], []
        for name, weight in shares:
            a, b = (factor.to(wide(factor.dtype)) for factor in self.trained_factors(name))
            left.append(pad(weight * self.scaling[name] * a, (0, 0, 0, p - len(a))))
            right.append(pad(b, (0, q - b.shape[1])))
        a, b = torch.cat(left, 1), torch.cat(right)
        if len(b) <= min(p, q):
            return a, b
        core, one = a @ b, torch.eye(min(p, q), device=a.device, dtype=a.dtype)
        return (one, core) if p <= q else (core, one)

    @torch.no_grad()
    def init_core(self, adapter: str, init: bool | str) -> None:
        """Give the trained factors their initial values: as published with "paper", and ΔW = 0
        with True and "identity"; False: far from both.
        """
        word = init if isinstance(init, str) else "identity" if init else "far"
        inits = self.row.inits(word)
        for name, factor in zip(self.row.core, self.trained_factors(adapter), strict=True):
            FILLS[inits[name]](factor, {})

    def source(self, seed: int) -> Source:
        """The weight, name and seed that determine the frozen factors."""
        return Source(self.unmerged_weight, self.key, seed)

    def new_bases(self, p: int, q: int, seed: int) -> tuple[Tensor, Tensor]:
        """down (p, in) and up (out, q), as the row says that they are made."""
        return cast(Bases, self.row.bases).new(self.source(seed), p, q)

    def more_bases(self, p: int, q: int, seed: int) -> tuple[Tensor, Tensor]:
        """The bases there are, and more of their kind."""
        there = self.basis_down, self.basis_up
        return cast(Bases, self.row.bases).more(self.source(seed), there, p, q)

    def others(self, adapter: str) -> list[nn.Parameter]:
        """The trained factors of other adapters."""
        dicts: list[Any] = [self._modules[name] for name in self.adapter_layer_names]
        return [own for factors in dicts for name, own in factors.items() if name != adapter]

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The modules, as PyTorch's gives them; the layer alone while it is `closed`."""
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
        off: Any = self.disable_adapters
        if off or self.noted or names is not None:
            off, names = as_before(self, off, names)
        if off:
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
        there = [name for name in entries.different if name in self.scaling]
        if not there:
            return self.base_layer(x)
        sides = self.common_sides(there)
        (down, up), weight, base = self.bases(*sides), self.base_weight, self.base_layer
        table = self._table(there, *sides)
        rows = entries.rows(there, table, place)
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
            taken = [(f, f.detach()) for f in factors]  # their ids and their memory: for no others
            self._kept = last = stamp, table, taken
        return last[1]

    def _factors(self, name: str, adapters: list[str]) -> list[nn.Parameter]:
        parameters = self._modules[name]
        return [parameters[adapter] for adapter in adapters]  # type: ignore[index]

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy, which makes its own table."""
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
