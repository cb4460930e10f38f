"""The layers of the two methods: trained factors, their start, and the frozen ones' source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...methods.initialisers import kaiming, seeded_bases, seeded_uniform, svd_bases
from ...methods.starts import CORE_STD
from .layer import PeftLowRankLinear, Sides, wide


class PeftLoraXSLinear(PeftLowRankLinear):
    """LoRA-XS: a core (r, r) between the leading singular vectors of the weight."""

    prefix = "lora_xs_"
    adapter_layer_names = ("lora_xs_core",)
    lora_xs_core: nn.ParameterDict

    def core(self, adapter: str) -> Tensor:
        """The core (r, r)."""
        return self.lora_xs_core[adapter]

    def shapes(self, r: int, config: Any) -> tuple[list[Sides], Sides]:
        """(r, r), r at most the smaller side of the weight."""
        r = min(r, self.in_features, self.out_features)
        return [(r, r)], (r, r)

    @torch.no_grad()
    def init_core(self, adapter: str, init: bool | str) -> None:
        """0, N(0, 1e-5²) as published, or N(0, 1)."""
        std = {True: 0.0, "identity": 0.0, "paper": CORE_STD, False: 1.0}[init]
        self.lora_xs_core[adapter].normal_(std=std)

    def new_bases(self, p: int, q: int, seed: int) -> tuple[Tensor, Tensor]:
        """Σ·Dᵀ and S of the weight's leading triples."""
        return self.triples(self.unmerged_weight, p, seed)

    def triples(self, weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
        """`svd_bases` of a weight, whose errors name the layer."""
        try:
            return svd_bases(weight, rank, seed=seed)
        except ValueError as error:
            raise ValueError(f"{self.key}: {error}") from None

    def more_bases(self, p: int, q: int, seed: int) -> tuple[Tensor, Tensor]:
        """The bases there are, and the leading triples of what they leave of the weight."""
        down, up = self.basis_down, self.basis_up
        basis, _ = torch.linalg.qr(up.to(wide(up.dtype)))
        weight = self.unmerged_weight.to(basis.dtype)
        rest = weight - basis @ (basis.t() @ weight)
        more_down, more_up = (new.to(up.dtype) for new in self.triples(rest, p - len(down), seed))
        return torch.cat([down, more_down]), torch.cat([up, more_up], 1)


class PeftLoraMiniLinear(PeftLowRankLinear):
    """LoRA-Mini: a core that is the product of (a, r) and (r, b), between random factors."""

    prefix = "lora_mini_"
    adapter_layer_names = ("lora_mini_a_train", "lora_mini_b_train")
    lora_mini_a_train: nn.ParameterDict
    lora_mini_b_train: nn.ParameterDict

    def core(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The pair (a, r), (r, b)."""
        return self.lora_mini_a_train[adapter], self.lora_mini_b_train[adapter]

    def shapes(self, r: int, config: Any) -> tuple[list[Sides], Sides]:
        """(a, r) and (r, b), with a and b at most the weight's sides, and r at most these."""
        a, b = min(config.a, self.in_features), min(config.b, self.out_features)
        r = min(r, a, b)
        return [(a, r), (r, b)], (a, b)

    @torch.no_grad()
    def init_core(self, adapter: str, init: bool | str) -> None:
        """Kaiming-uniform as published; the second of the two zero, unless it is to be random."""
        a_train, b_train = self.core(adapter)
        kaiming(a_train.t())
        kaiming(b_train.t())
        if init in (True, "identity"):
            b_train.zero_()

    def mix(self, shares: list[tuple[str, float]]) -> tuple[Tensor, ...]:
        """The adapters' factors side by side; this where that is wider than their products' sum."""
        p, q = self.common_sides([name for name, _ in shares])
        left, right = [], []
        for name, weight in shares:
            a, b = (factor.to(wide(factor.dtype)) for factor in self.core(name))
            left.append(pad(weight * self.scaling[name] * a, (0, 0, 0, p - len(a))))
            right.append(pad(b, (0, q - b.shape[1])))
        a, b = torch.cat(left, 1), torch.cat(right)
        if len(b) <= min(p, q):
            return a, b
        core, one = a @ b, torch.eye(min(p, q), device=a.device, dtype=a.dtype)
        return (one, core) if p <= q else (core, one)

    def new_bases(self, p: int, q: int, seed: int) -> tuple[Tensor, Tensor]:
        """Kaiming-uniform (a = √5) in the order of PyTorch: within 1/√in and 1/√b."""
        return seeded_bases(p, self.in_features, self.out_features, q, self.key, seed)

    def more_bases(self, p: int, q: int, seed: int) -> tuple[Tensor, Tensor]:
        """The bases there are, and more of the same size."""
        new = []
        sides = p, self.in_features, self.out_features, q
        there = self.basis_down, self.basis_up
        for drawn, old in zip(seeded_uniform(*sides, self.key, seed), there, strict=True):
            rows, columns = old.shape
            drawn *= float(old.float().norm() / drawn[:rows, :columns].norm())
            drawn = drawn.to(old)
            drawn[:rows, :columns] = old
            new.append(drawn)
        return new[0], new[1]
