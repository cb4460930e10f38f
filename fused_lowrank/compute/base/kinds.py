"""The kinds of W that are no plain matrix, and which of them a module has, or why none.

Nothing is imported to ask: a module says by its class's name where it is from.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from .eightbit import EightBit
from .fourbit import FourBit
from .protocol import Base
from .subclass import Subclass

logger = logging.getLogger("fused_lowrank")

BITSANDBYTES = "bitsandbytes."
# Where linear layers are from that are known to be ones, and are called.
KNOWN = ("gptqmodel.", "auto_gptq.", "awq.", "hqq.", "torchao.", "transformers.integrations.")
EXTRA = "pip install 'fused-lowrank[quant]' has the versions that are known to work"
QUANTISED = "quantised"  # the form of what is so in a way that has no name here
SAID: set[type] = set()


def from_bitsandbytes(module: nn.Module, name: str) -> bool:
    """Whether a module is of this class of bitsandbytes, or of one that is made of it."""
    return any(
        cls.__name__ == name and cls.__module__.startswith(BITSANDBYTES)
        for cls in type(module).__mro__
    )


def sizes_of(module: Any) -> tuple[int, int] | None:
    """(K, N) of a module that says them."""
    k, n = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (k, n) if type(k) is int and type(n) is int and k > 0 and n > 0 else None


def can_dequantise(weight: Any) -> bool:
    """Whether a weight is of a tensor subclass that says what its values are."""
    own = getattr(type(weight), "dequantize", None)
    return isinstance(weight, Tensor) and own is not Tensor.dequantize and weight.dim() == 2


def base_of(module: nn.Module, has_product: bool) -> Base | str:
    """The W of a module that is no plain linear layer, or why it has none, to follow "it".

    `has_product` says whether its forward is nn.Linear's own.
    """
    kind = type(module).__name__
    if sizes_of(module) is None:
        return f"is a {kind}, which does not say its sizes by in_features and out_features"
    weight: Any = getattr(module, "weight", None)
    if from_bitsandbytes(module, "Linear4bit"):
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        if state is None:
            return f"is a {kind} that is not quantised yet: move it to its device first"
        return FourBit(module)
    if from_bitsandbytes(module, "Linear8bitLt"):
        if module.state.has_fp16_weights:  # type: ignore[union-attr]
            return Base(module)
        if weight.dtype != torch.int8:
            return f"is a {kind} that is not quantised yet: move it to its device first"
        return EightBit(module)
    if has_product and can_dequantise(weight):
        return Subclass(module)
    return Base(module)


def is_known(base: Base) -> bool:
    """Whether a base is of a kind that has been told apart, or of a library whose layers are."""
    return type(base) is not Base or is_from_known(base.module)


def is_from_known(module: nn.Module) -> bool:
    """Whether a module says its sizes and is of a library whose layers are linear."""
    return type(module).__module__.startswith(KNOWN) and sizes_of(module) is not None


def form_of(weight: Any) -> str | None:
    """The form a weight is stored in, for a file to say; None for a plain matrix, and where nobody
    knows it. Where a library's modules have classes by kernel, as GPTQ's do, all are of one form.
    """
    if not isinstance(weight, Base) or weight.form is not None:
        return getattr(weight, "form", None)
    own = getattr(weight.module, "weight", None)
    plain = isinstance(own, Tensor) and own.is_floating_point() and own.itemsize > 1
    return QUANTISED if is_from_known(weight.module) and not plain else None


def are_one_form(one: str | None, other: str | None) -> bool:
    """Whether two weights are stored alike, as far as that is known."""
    return one == other or (QUANTISED in (one, other) and None not in (one, other))


def why_not_usable(base: Base) -> str | None:
    """The reason why a base cannot be computed with here, found by a small call, or None."""
    module, kind = base.module, type(base.module).__name__
    if base.is_meta:
        return None
    (n, k), dtype = base.shape, base.dtype
    x = torch.zeros(2, k, dtype=dtype, device=base.device)
    try:
        if type(base) is not Base:
            y = base.product(x, None)
            good = base.back(y).shape == (2, k)
        else:
            with torch.enable_grad():
                x.requires_grad_()
                y = module(x)
                good = isinstance(y, Tensor) and y.requires_grad
                good = good and torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is not None
        good = good and isinstance(y, Tensor) and y.shape == (2, n)
    except Exception as error:
        return (
            f"is a {kind}, whose library cannot compute on {base.device} what an adapter needs "
            f"({type(error).__name__}: {error}). {EXTRA if type(base) is not Base else ''}".strip()
        )
    if not good:
        return (
            f"is a {kind}, which makes no (2, {n}) of (2, {k}) that can be differentiated: no "
            "adapter can be trained over it"
        )
    return None


def say_opaque(base: Base) -> None:
    """Say once for a class that its modules are called as they are, for nothing is known of it."""
    kind = type(base.module)
    if not is_known(base) and kind not in SAID:
        SAID.add(kind)
        logger.warning(
            "%s.%s is no linear layer that is known: it is called as it is, and the adapter's term "
            "added to what it gives",
            kind.__module__,
            kind.__qualname__,
        )
