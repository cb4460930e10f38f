"""Layers whose adapters are cores: the factors around these are frozen, and one pair for a layer.

down and up are that pair, whatever adapters there are: frozen Parameters in the dtype of the
weight. An adapter is its core; one of lower rank uses the pair's first rows and columns.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ....compute.operands import Operands
from ....compute.reference import AnyCore, Core, like, product, through_core
from ....context.calls import Spread
from ....context.declared import Owners
from ....context.elsewhere import fill_in, here, replace
from ....functional import compute, prepared
from ....methods import dora
from ....methods.accept import is_hooked
from ....methods.initial.bases import Bases, Source
from ....methods.initial.starts import FILLS
from ....methods.method import MAGNITUDE, Method
from ....methods.tensors import present
from ..config import BasesConfig, LowRankConfig
from ..mixed import Entries
from .base import PeftLowRankLinear, wide
from .state import check_shared

Sides = tuple[int, int]


class PeftCoreLinear(PeftLowRankLinear):
    """A layer whose adapters are cores between one pair of frozen factors, down and up."""

    core_names: ClassVar[tuple[str, ...]]  # of the ParameterDicts that have the cores' factors
    basis_down: nn.Parameter  # (P, in)
    basis_up: nn.Parameter  # (out, Q)
    base_names = ("basis_down", "basis_up")  # the frozen factors, which PEFT must not cast or train
    other_param_names = (*PeftLowRankLinear.other_param_names, "sides", "projection_seed")

    def __init_subclass__(cls, row: Method | None = None, **keywords: Any) -> None:
        super().__init_subclass__(row, **keywords)
        if row is not None:
            cls.core_names = tuple(f"{row.name}_{name}" for name in row.core)
            cls.adapter_layer_names = cls.core_names
            cls.factor_names = (*cls.core_names, cls.magnitude)

    def __init__(self, base_layer: nn.Module, key: str, fan_in_fan_out: bool) -> None:
        super().__init__(base_layer, key, fan_in_fan_out)
        for name in self.base_names:
            super().register_parameter(name, None)
        self.sides: dict[str, Sides] = {}  # P and Q
        self.projection_seed: dict[str, int] = {}
        self.pending_seed: int | None = None  # of frozen factors that are not made yet
        self.checked = False  # whether the frozen factors that come are known to be right
        self._kept: Any = None  # what `_table` gave last

    # --- the parts of the equation ---

    def core(self, adapter: str) -> Core:
        """The core of an adapter, (P, Q) or a pair."""
        own = tuple(self._modules[name][adapter] for name in self.core_names)  # type: ignore[index]
        return own if len(own) == 2 else own[0]

    def factors_of(self, adapter: str) -> dict[str, Tensor]:
        """The factors of an adapter, by the row's names."""
        down, up = self.bases(*self.sides[adapter])
        core = zip(self.row.core, self.core_parts(adapter), strict=True)
        found = {"down": down, **dict(core), "up": up}
        if self.row_of(adapter).dora:
            found[MAGNITUDE] = getattr(self, self.magnitude)[adapter]
        return found

    def core_parts(self, adapter: str) -> list[nn.Parameter]:
        """The factors of an adapter's core."""
        return [getattr(self, name)[adapter] for name in self.core_names]

    def matrices_of(self, adapter: str) -> list[Tensor]:
        """The frozen factors and those of an adapter, as they are stored."""
        return [self.basis_down, self.basis_up, *self.core_parts(adapter)]

    def keys(self, prefix: str, adapter: str) -> dict[str, str]:
        """The keys that the factors of an adapter have in a state_dict, by the row's names."""
        own = zip((*self.row.core, MAGNITUDE), self.trained_names(adapter), strict=False)
        keys = {factor: f"{prefix}{name}.{adapter}" for factor, name in own}
        return {"down": f"{prefix}basis_down", **keys, "up": f"{prefix}basis_up"}

    def used(self, adapter: str, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's factors, of those that a state_dict has by these keys."""
        p, q = self.sides[adapter]
        return {**factors, "down": factors["down"][:p], "up": factors["up"][:, :q]}

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

    def add_factors(self, adapter: str, config: LowRankConfig, r: int) -> None:
        """Add a core, and bases where there are none, or not enough."""
        seed = cast(BasesConfig, config).projection_seed
        sizes, self.room[adapter] = self.sized(config, r)
        p, q = self.row.shape("down", sizes)[0], self.row.shape("up", sizes)[1]
        self.r[adapter], self.sides[adapter] = sizes["r"], (p, q)
        self.projection_seed[adapter] = seed
        # Offloaded weights are here now, and on the meta device when the bases are asked for.
        later = config.inference_mode and not is_hooked(self.get_base_layer())
        later = later and (not config.use_dora or starts_at_zero(config))
        self.grow_bases(p, q, seed, later)
        like_base: Any = {"dtype": self.factor_dtype, "device": self.base_weight.device}
        for name, factor in zip(self.core_names, self.row.core, strict=True):
            value = torch.empty(self.row.shape(factor, sizes), **like_base)
            getattr(self, name)[adapter] = nn.Parameter(value)
        self.init_core(adapter, config.init_weights)

    def norms(self, adapter: str) -> Tensor:
        """‖W + ΔW‖ (out,) by row; of W alone where the bases are made later, for ΔW is 0 then."""
        if self.pending_seed is not None:
            return dora.constants(self.unmerged_weight).of_weight.sqrt()
        return super().norms(adapter)

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
            a, b = (factor.to(wide(factor.dtype)) for factor in self.core_parts(name))
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
        for name, factor in zip(self.row.core, self.core_parts(adapter), strict=True):
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

    # --- mixed batches ---

    def by_rows(self, x: Tensor, entries: Entries, place: Spread | Owners) -> Tensor:
        """Each row of x through the adapter of its own name, all in one pass; with DoRA, an
        adapter's rows at a time.
        """
        there = [name for name in entries.different if name in self.scaling]
        if any(self.row_of(name).dora for name in there):
            return super().by_rows(x, entries, place)
        sides = self.common_sides(there)
        down, up = self.bases(*sides)
        table = self._table(there, *sides)
        return self.through(x, down, entries.rows(there, table, place), up)

    def through(self, x: Tensor, down: Tensor, rows: AnyCore, up: Tensor) -> Tensor:
        """y with a core for each row, by one pass where the base layer can be computed in it."""
        weight, base = self.base_weight, self.base_layer
        if not self.is_plain(base) or torch.compiler.is_compiling():
            y = base(x)
            t = linear(like(x, down.dtype), down)
            return y + linear(through_core(t, rows, 1.0), up).to(y.dtype)
        return compute(prepared(Operands(x, weight, down, rows, up, base.bias, 1.0)), "auto")

    def _table(self, adapters: list[str], p: int, q: int) -> Tensor:
        """The cores (adapters, p, q), each times its scaling; kept while nobody changes one."""
        factors = [factor for name in self.core_names for factor in self._factors(name, adapters)]
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

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.checked = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
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
        magnitudes: Any = self._modules[self.magnitude]
        magnitude = magnitudes.pop(adapter_name) if adapter_name in magnitudes else None
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        weight = self.base_weight
        target = weight.device if device is None else device
        for factor in (self.basis_down, self.basis_up):
            if not factor.is_meta and target.type != "meta":
                factor.data = factor.data.to(target, weight.dtype)
        if magnitude is not None:  # which 16 bits would round: the gain would not start as 1
            magnitudes[adapter_name] = magnitude
            if not magnitude.is_meta and target.type != "meta":
                magnitude.data = magnitude.data.to(target)


def starts_at_zero(config: LowRankConfig) -> bool:
    """Whether ΔW of a new adapter is 0."""
    return config.init_weights is True or config.init_weights == "identity"
