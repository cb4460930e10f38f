"""torchao's tensor subclasses that say all of how they were quantised, quantised so again.

Others leave it open (a mapping, an algorithm): of a sum they could only be guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

# Of each subclass what its `from_hp` takes, by the names there, of what it says of itself.
KINDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Int8Tensor": lambda own: {
        "mapping_type": mapping_of(own.zero_point),
        "act_quant_kwargs": own.act_quant_kwargs,
        "act_quant_scale": own.act_quant_scale,
        "act_quant_zero_point": own.act_quant_zero_point,
        "reduce_range": own.reduce_range,
    },
    "Float8Tensor": lambda own: {
        "float8_dtype": own.qdata.dtype,
        "mm_config": own.mm_config,
        "kernel_preference": own.kernel_preference,
        "act_quant_kwargs": own.act_quant_kwargs,
    },
}


def why_not(weight: Any) -> str | None:
    """The reason why a weight of some subclass cannot be quantised again, to follow "it"."""
    kind = type(weight)
    if kind.__module__.startswith("torchao.") and kind.__name__ in KINDS:
        scaled = getattr(weight, "act_pre_scale", None) is not None
        return f"has a weight of {kind.__name__} that scales x first" if scaled else None
    return f"has a weight of {kind.__name__}, which does not say how it was quantised"


def quantised(weight: Any, values: Tensor) -> Tensor:
    """Values (N, K), in the dtype of a weight, quantised as it was.

    Raises ValueError where the installed torchao does not make the like of it.
    """
    kind = type(weight)
    values = values.to(weight.dtype)
    made = kind.from_hp(values, granularity=granularity_of(weight), **KINDS[kind.__name__](weight))
    if described(made) != described(weight):
        raise ValueError(
            f"cannot merge: torchao makes {described(made)} of W + ΔW, where W is "
            f"{described(weight)}"
        )
    return made


def described(weight: Any) -> Any:
    """The description of a quantised weight: all but its values."""
    names, rest = weight.__tensor_flatten__()
    parts = {name: (getattr(weight, name).shape, getattr(weight, name).dtype) for name in names}
    return type(weight).__name__, parts, rest


def granularity_of(weight: Any) -> Any:
    """The name of blocks of such a size, by which torchao chooses kernels."""
    from torchao.quantization.granularity import PerBlock, PerRow, PerTensor

    size, (n, k) = tuple(weight.block_size), weight.shape
    if size == (1, k):
        return PerRow()
    return PerTensor() if size == (n, k) else PerBlock(size)


def mapping_of(zero_point: Tensor | None) -> Any:
    """The mapping to integers that has such zero points."""
    from torchao.quantization.quant_primitives import MappingType

    shifted = zero_point is not None and bool(zero_point.any())
    return MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC
