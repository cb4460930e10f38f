"""The base model's biases, where an adapter trains them: PEFT itself keeps none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...context.elsewhere import bring_back, hold
from .layer import PeftLowRankLinear

Slot = tuple[dict[str, Any], nn.Parameter]  # of a module's Parameters, and the trained bias in it


class Biases:
    """Copies of biases as they were, which take the trained ones' places while adapters are off."""

    def __init__(self) -> None:
        self.before: dict[nn.Parameter, Tensor] = {}
        self.holders: list[tuple[nn.Module, nn.Parameter]] = []  # whose they are
        self.away: list[Slot] = []  # the trained ones, while the others are in their places

    def keep(self, model: nn.Module, kind: str) -> None:
        """Copy the biases that an adapter with this `bias` trains, unless that was done.

        Those that are offloaded stay where the model computes from now on.
        """
        for module in model.modules():
            if isinstance(module, PeftLowRankLinear):
                module = module.get_base_layer()
            elif kind != "all":
                continue
            bias = module._parameters.get("bias")
            if kind != "none" and bias is not None and bias.is_meta:
                hold(module, "bias")
                bias = module._parameters["bias"]
            if kind != "none" and bias is not None and bias not in self.before and not bias.is_meta:
                self.before[bias] = bias.detach().clone()
                self.holders.append((module, bias))

    def take_back(self, model: nn.Module) -> None:
        """Bring the biases that were offloaded since here for good."""
        for place, (module, bias) in enumerate(self.holders if not self.away else ()):
            own = module._parameters.get("bias")
            if own is not None and own.is_meta and not bias.is_meta:
                bring_back(model, module, "bias")
                if not own.is_meta:
                    self.before[own] = self.before.pop(bias)
                    self.holders[place] = module, own

    def are_known(self, model: nn.Module) -> bool:
        """Whether the trained biases are still in their places; sharding puts others there."""
        present = {module._parameters.get("bias") for module in model.modules()}
        here = present | {bias for _, bias in self.away}
        return bool(self.before) and self.before.keys() <= here

    def disable(self, model: nn.Module) -> None:
        """Put the base model's biases in the places of the trained ones."""
        if self.away:
            return
        for module in model.modules():
            bias = module._parameters.get("bias")
            if bias is not None and bias in self.before:
                value = self.before[bias].to(bias.device, bias.dtype)
                module._parameters["bias"] = nn.Parameter(value, requires_grad=False)
                self.away.append((module._parameters, bias))

    def enable(self) -> None:
        """Put the trained biases back."""
        for slot, bias in self.away:
            slot["bias"] = bias
        self.away = []

    @torch.no_grad()
    def restore(self) -> None:
        """Give the trained biases the base model's values, for good."""
        self.enable()
        for bias, value in self.before.items():
            bias.copy_(value)
        self.before, self.holders = {}, []
