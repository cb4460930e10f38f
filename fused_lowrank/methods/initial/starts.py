"""First values of factors, by the names that rows give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .values import kaiming, lora_start, mini_bases, xs_bases

CORE_STD = 1e-5  # of LoRA-XS's core, as published
Options = Mapping[str, Any]


def drawn_zeros(tensor: Tensor, options: Options) -> None:
    """Zeros, where the generator goes on as if they had been drawn."""
    kaiming(tensor.t())
    tensor.zero_()


# name → fills a tensor in place
FILLS: dict[str, Callable[[Tensor, Options], Any]] = {
    "kaiming": lambda tensor, options: kaiming(tensor),
    "kaiming_in": lambda tensor, options: kaiming(tensor.t()),  # of x·F, not x·Fᵀ
    "drawn_zeros": drawn_zeros,
    "zeros": lambda tensor, options: tensor.zero_(),
    "silence": lambda tensor, options: nn.init.normal_(tensor, std=0.0),
    "ones": lambda tensor, options: tensor.fill_(1.0),
    "d_initial": lambda tensor, options: tensor.fill_(options["d_initial"]),
    "b_initial": lambda tensor, options: tensor.fill_(options["b_initial"]),
    "noise": lambda tensor, options: nn.init.normal_(tensor, std=CORE_STD),
    "small": lambda tensor, options: nn.init.normal_(tensor, std=0.02),
    "normal": lambda tensor, options: nn.init.normal_(tensor),
    "gaussian": lambda tensor, options: nn.init.normal_(tensor, std=1 / len(tensor)),
}
ZERO = ("zeros", "drawn_zeros", "silence")
NORMS = "norms"  # of the rows of W + ΔW: DoRA's, when the others have theirs

# name → (down, up) of a layer, by its option `init`
PAIRS: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "lora": lambda m: lora_start(m.init, m.base_weight, m.r, m.scale, m.inputs),
    "lora_xs": lambda m: xs_bases(m.init, m.base_weight, m.r, m.svd, m.inputs),
    "lora_mini": lambda m: mini_bases(m.init, m.base_weight, m.a, m.b, m.inputs),
}


def kaiming_relu(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform for a ReLU, within √(6 / fan-in), as PEFT draws VeRA's matrices."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


# name → a shared factor, drawn from a generator of its own on the CPU, float32
DRAWS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "kaiming_relu": kaiming_relu,
    "uniform": lambda shape, generator: (
        (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[-1])
    ),
}


def check_learns(layer: Any) -> None:
    """Raise ValueError if factors are trained beside one that starts at 0 and is not."""
    own = [name for name in layer.train_names if name in layer.factors]
    others = [name for name in own if layer.row.factors[name].init != NORMS]
    inits, options = layer.inits.items(), layer.options
    zero = [name for name, init in inits if init in ZERO or options.get(init) == 0]
    if len(zero) > 1 and layer.row.parts is not None:
        raise ValueError(f"{' and '.join(zero)} both start at zero: nothing would ever be learned")
    if others and (frozen := [name for name in zero if name not in others]):
        init = layer.inits[frozen[0]]
        other = f", or give {init} another value than 0" if init in options else ""
        raise ValueError(
            f"train is {layer.train_names}, but {frozen[0]} starts at zero: as long as it is not "
            f"trained, the gradients of the other factors are zero. Add {frozen[0]!r} to train"
            f"{other}"
        )


def fill(layer: Any) -> None:
    """Give a layer's factors their first values, in their order; not shared ones, nor DoRA's."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, init in layer.inits.items():
        factor = getattr(layer, name)
        if layer.row.factors[name].shared or init == NORMS:
            continue
        if init in PAIRS:
            if init not in pairs:
                down, up = PAIRS[init](layer)
                pairs[init] = {"down": down, "up": up, "start_down": down, "start_up": -up}
            factor.copy_(pairs[init][name])
        else:
            FILLS[init](factor, layer.options)
