"""The kinds of quantised W that cases are over: a module of each, made from a plain weight."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Kind(NamedTuple):
    """A kind of quantised W: the package that has it, and who makes a module of it."""

    package: str
    make: Callable[[nn.Linear], nn.Module]
    planned: str  # the kind that the planner knows it by
    said: str = ""  # the attribute by which PEFT knows a model of such modules
    quantises_x: bool = False  # on a GPU: its product is not that of its values


def nf4(linear: nn.Linear) -> nn.Module:
    """As QLoRA has it: nf4 in blocks of 64, whose maxima are quantised as well."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    own: Any = {"compute_dtype": linear.weight.dtype, "quant_type": "nf4"}
    made = Linear4bit(linear.in_features, linear.out_features, bias=False, device="meta", **own)
    stored: Any = {"compress_statistics": True, "quant_type": "nf4", "module": made}
    made.weight = Params4bit(linear.weight.detach(), requires_grad=False, **stored)
    return made.to(linear.weight.device)


def int8(linear: nn.Linear) -> nn.Module:
    """As transformers makes it, with its threshold for outliers."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    own: Any = {"has_fp16_weights": False, "threshold": 6.0}
    made = Linear8bitLt(linear.in_features, linear.out_features, bias=False, device="meta", **own)
    weight = linear.weight.detach().half().cpu()  # from there alone it is quantised on its way
    made.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return made.to(linear.weight.device)


def torchao_int8(linear: nn.Linear) -> nn.Module:
    """int8 rows, each with a scale; x stays as it is."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    made = nn.Sequential(linear)
    quantize_(made, Int8WeightOnlyConfig())
    return made[0].requires_grad_(False)


# kind, as cases name it → how it is made
BASES = {
    "nf4": Kind("bitsandbytes", nf4, "4bit", "is_loaded_in_4bit"),
    "int8": Kind("bitsandbytes", int8, "8bit", "is_loaded_in_8bit", quantises_x=True),
    "torchao-int8": Kind("torchao", torchao_int8, "subclass"),
}


def why_absent(base: str) -> str | None:
    """The reason why no module of a kind can be made here, or None."""
    if base and importlib.util.find_spec(BASES[base].package) is None:
        return f"{BASES[base].package} is not installed"
    return None


def quantised(base: str, weight: Tensor) -> nn.Module:
    """A frozen module in training whose W is this one, quantised."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    with torch.no_grad():
        return BASES[base].make(linear).train()
