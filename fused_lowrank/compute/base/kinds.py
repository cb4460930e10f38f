"""The kinds of W that are no plain matrix, and which of them a module has, or why none.

Nothing is imported to ask: a module says by its class's name where it is from.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .dequantised import Awq, Gptq, Hqq
from .eightbit import EightBit
from .fourbit import FourBit
from .protocol import Base, sizes_of
from .subclass import Float8, Quanto, Subclass

logger = logging.getLogger("fused_lowrank")

BITSANDBYTES = "bitsandbytes."


class Kind(NamedTuple):
    """A row of `KINDS`."""

    package: str  # how the name of the module begins that the class is from
    mark: str  # the class's name or that of one it is made of, or an attribute that it has
    base: type[Base]
    hint: str  # where its library is had


EXTRA = "pip install 'fused-lowrank[quant]' has the versions that are known to work"
OWN = "see that library's own instructions for this machine"
KINDS = (
    Kind(BITSANDBYTES, "Linear4bit", FourBit, EXTRA),
    Kind(BITSANDBYTES, "Linear8bitLt", EightBit, EXTRA),
    Kind("torchao.float8.", "Float8Linear", Float8, EXTRA),
    Kind("gptqmodel.", "dequantize_weight", Gptq, OWN),
    Kind("gptqmodel.", "AWQuantLinear", Awq, OWN),
    Kind("awq.", "WQLinear_GEMM", Awq, OWN),
    Kind("hqq.", "HQQLinear", Hqq, OWN),
    Kind("optimum.quanto.", "QLinear", Quanto, OWN),
)
# Where linear layers are from that are known to be ones; those of no kind above are called.
LIBRARIES = "gptqmodel auto_gptq awq hqq torchao optimum.quanto aqlm eetq transformers.integrations"
KNOWN = tuple(f"{library}." for library in LIBRARIES.split())
QUANTISED = "quantised"  # the form of what is so in a way that has no name here
SAID: set[type] = set()


def is_of(module: nn.Module, package: str, mark: str) -> bool:
    """Whether a module is of a package's class of this name, or of one with this attribute."""
    own = [cls for cls in type(module).__mro__ if cls.__module__.startswith(package)]
    return any(cls.__name__ == mark or mark in vars(cls) for cls in own)


def from_bitsandbytes(module: nn.Module, name: str) -> bool:
    """Whether a module is of this class of bitsandbytes, or of one that is made of it."""
    return is_of(module, BITSANDBYTES, name)


def can_dequantise(weight: Any) -> bool:
    """Whether a weight is of a tensor subclass that says what its values are."""
    own = getattr(type(weight), "dequantize", None)
    return isinstance(weight, Tensor) and own is not Tensor.dequantize and weight.dim() == 2


def kind_of(module: nn.Module) -> Kind | None:
    """The row that a module is of, or None."""
    return next((kind for kind in KINDS if is_of(module, kind.package, kind.mark)), None)


def base_of(module: nn.Module, has_product: bool) -> Base | str:
    """The W of a module that is no plain linear layer, or why it has none, to follow "it".

    `has_product` says whether its forward is nn.Linear's own.
    """
    if sizes_of(module) is None:
        name = type(module).__name__
        return f"is a {name}, which does not say its sizes by in_features and out_features"
    if kind := kind_of(module):
        return kind.base.of(module)
    if has_product and can_dequantise(getattr(module, "weight", None)):
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
    n, k = base.shape
    try:
        good = base.works(torch.zeros(2, k, dtype=base.dtype, device=base.device))
    except Exception as error:
        known = kind_of(module)
        hint = known.hint if known else EXTRA if type(base) is Subclass else ""
        return (
            f"is a {kind}, whose library cannot compute on {base.device} what an adapter needs "
            f"({type(error).__name__}: {error}). {hint}".strip()
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
