"""Layers whose adapters have factors of their own: all that the method's row names.

A factor that the row has all layers share is one Parameter of an adapter, which each of its layers
holds: `share` makes it when all layers are there, for it is of the largest sides. One that no file
has comes from a seed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....compute.reference import Core, like, product
from ....context.elsewhere import here
from ....files.peft_own import name_of
from ....methods.initial.starts import FILLS, ZERO
from ....methods.method import MAGNITUDE, Method, Parts
from ....methods.shared import fill_shared
from ..config import LowRankConfig
from .base import PeftLowRankLinear, wide

SIDES = ("K", "in"), ("N", "out")


class PeftOwnLinear(PeftLowRankLinear):
    """A layer whose adapters have factors of their own, trained and frozen ones.

    PEFT's users expect that all is trained whose name has the prefix in it.
    """

    names: ClassVar[dict[str, str]]  # of the ParameterDicts, by factor

    def __init_subclass__(cls, row: Method | None = None, **keywords: Any) -> None:
        if row is not None:
            zero = [name for name, init in row.inits().items() if init in ZERO]
            far = {n: "kaiming" if len(row.factors[n].sides) == 2 else "small" for n in zero}
            row = replace(row, starts={"far": far, **row.starts})
        super().__init_subclass__(row, **keywords)
        if row is not None:
            cls.names = {factor: name_of(row, factor) for factor in row.factors}
            cls.factor_names = (*cls.names.values(), cls.magnitude)
            cls.adapter_layer_names = tuple(cls.names[factor] for factor in row.trained)
            frozen = (name_of(row, n) for n, factor in row.factors.items() if not factor.trained)
            cls.other_param_names = (*PeftLowRankLinear.other_param_names, *frozen)

    # --- the parts of the equation ---

    def factors_of(self, adapter: str) -> dict[str, Tensor]:
        """The factors of an adapter, by the row's names."""
        own: Any = self._modules
        names = self.names_of(adapter).items()
        return {factor: own[name]._parameters[adapter] for factor, name in names}

    def names_of(self, adapter: str) -> dict[str, str]:
        """The names of the ParameterDicts that have an adapter's factors, by the row's names."""
        dora = self.row_of(adapter).dora
        return {**self.names, MAGNITUDE: self.magnitude} if dora else self.names

    def give(self, adapter: str, factor: str, value: nn.Parameter) -> None:
        """Make a factor of an adapter this Parameter."""
        getattr(self, self.names[factor])[adapter] = value

    def keys(self, prefix: str, adapter: str) -> dict[str, str]:
        """The keys that the factors of an adapter have in a state_dict, by the row's names."""
        names = self.names_of(adapter).items()
        return {factor: f"{prefix}{name}.{adapter}" for factor, name in names}

    def used(self, adapter: str, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's factors, of those that a state_dict has by these keys: they are all."""
        return factors

    def parts(self, adapter: str) -> Parts:
        """The equation's parts of an adapter."""
        return self.row.made(self.factors_of(adapter), self.base_weight, self.scaling[adapter])

    def joined(self, adapters: list[str]) -> tuple[Tensor, Core, Tensor, float]:
        """(down, core, up, scale) of the sum of adapters, whose ranks are put side by side."""
        if len(adapters) == 1:
            down, core, up, _ = self.parts(adapters[0])
            return down, core, up, self.scaling[adapters[0]]
        downs, ups = [], []
        for name in adapters:
            down, core, up, _ = self.parts(name)
            up = self.scaling[name] * like(up, wide(up.dtype))
            if (matrix := product(core)) is not None:
                up = up * matrix if matrix.dim() == 1 else up @ like(matrix, up.dtype).t()
            downs.append(down)
            ups.append(up)
        return torch.cat(downs), None, torch.cat(ups, 1), 1.0

    # --- adapters come and go ---

    def add_factors(self, adapter: str, config: LowRankConfig, r: int) -> None:
        """Add the factors of an adapter, but those that all layers share."""
        sizes, self.room[adapter] = self.sized(config, r)
        self.r[adapter] = sizes["r"]
        if n := sizes.get(self.row.divides):
            for side in (self.in_features, self.out_features):
                if side % n:
                    raise ValueError(
                        f"{self.row.divides} is {n}: it must divide both sides of {self.key}, "
                        f"which are {self.in_features} and {self.out_features}; choose another, "
                        "or leave the layer out by exclude_modules"
                    )
        inits, options = self.row.inits(word_of(config)), options_of(self.row, config)
        weight = self.base_weight
        for name, factor in self.row.factors.items():
            if not factor.shared:
                dtype = self.factor_dtype if factor.trained else weight.dtype
                drawn = wide(dtype) if factor.saved else dtype  # as PEFT draws: whatever W's is
                value = torch.empty(self.row.shape(name, sizes), dtype=drawn, device=weight.device)
                with torch.no_grad():
                    FILLS[inits[name]](value, options)
                self.give(adapter, name, nn.Parameter(value.to(dtype), factor.trained))

    def sized(self, config: LowRankConfig, r: int) -> tuple[dict[str, int], bool]:
        """The sizes of K, N and the ranks, and whether there is room for these: always, where all
        layers share factors of one rank.
        """
        if not self.row.shared:
            return super().sized(config, r)
        ranks = {name: getattr(config, name) for name in self.row.ranks}
        return {"K": self.in_features, "N": self.out_features, **ranks}, True

    def widen(self, adapter: str) -> None:
        """Make the trained factors of an adapter float32 where they are narrower, in place."""
        for factor in self.trained_factors(adapter):
            if factor.itemsize < 4:
                factor.data = factor.data.float()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # In place: a shared factor stays one, a frozen one frozen, a file's trained ones as wide.
        target = self.base_weight.device if device is None else device
        for factor, name in self.names_of(adapter_name).items():
            own: Any = getattr(self, name)._parameters.get(adapter_name)
            if own is not None and not own.is_meta and target.type != "meta":
                trained = self.with_dora.factors[factor].trained
                own.data = own.data.to(target, own.dtype if trained else self.base_weight.dtype)


def word_of(config: LowRankConfig) -> str | None:
    """The word of `Method.starts` for a configuration's `init_weights`."""
    init = config.init_weights
    if isinstance(init, str):
        return init
    return None if init else "far"


def options_of(row: Method, config: LowRankConfig) -> dict[str, Any]:
    """The values that a configuration has for a row's options."""
    return {name: getattr(config, name) for name in row.options if hasattr(config, name)}


def share(layers: Iterable[Any], adapter: str, config: LowRankConfig) -> None:
    """Give the layers of an adapter, which are all there by now, the factors that they share.

    Raises ValueError if the layers are on several devices.
    """
    layers = [layer for layer in layers if layer.row.shared]
    if not layers:
        return
    row = layers[0].row
    alone = next(name for name in row.factors if name not in row.shared)
    devices = {getattr(layer, layer.names[alone])[adapter].device for layer in layers}
    if len(devices) > 1:
        raise ValueError(
            f"{row.name} has one pair of factors for all layers, and these are on several devices: "
            f"{', '.join(sorted(map(str, devices)))}. Put the model on one, or take another method"
        )
    factors = shared_factors(layers, config, devices.pop())
    for layer in layers:
        for name in row.shared:
            layer.give(adapter, name, factors[name])
        with here(layer.get_base_layer()):
            layer.fill_magnitude(adapter)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)


def share_unsaved(layers: Iterable[Any], adapter: str, config: LowRankConfig) -> None:
    """Make the factors that no file brings, if with low_cpu_mem_usage they have no values yet."""
    layers = list(layers)
    if not layers:
        return
    own = layers[0].factors_of(adapter)
    names = [name for name, factor in layers[0].row.factors.items() if not factor.saved]
    if not any(own[name].is_meta for name in names):
        return
    weight = layers[0].base_weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    factors = shared_factors(layers, config, device)
    for layer in layers:
        for name in names:
            layer.give(adapter, name, factors[name])


@torch.no_grad()
def shared_factors(
    layers: Sequence[PeftOwnLinear], config: LowRankConfig, device: torch.device
) -> dict[str, nn.Parameter]:
    """The factors that layers share, frozen, of the largest of their sides, with first values."""
    row = layers[0].row
    sizes = {name: getattr(config, name) for name in row.ranks}
    sizes |= {side: max(getattr(m, f"{way}_features") for m in layers) for side, way in SIDES}
    found = {}
    for name in row.shared:
        trained = row.factors[name].trained
        dtypes = [m.factor_dtype if trained else m.base_weight.dtype for m in layers]
        dtype = functools.reduce(torch.promote_types, dtypes)
        value = torch.empty(row.shape(name, sizes), dtype=dtype, device=device)
        found[name] = nn.Parameter(value, requires_grad=False)
    fill_shared(row, found, {**options_of(row, config), "init": word_of(config)})
    return found
