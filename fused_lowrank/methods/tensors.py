"""Tensors of a layer that have no values here, or not all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def present(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor that is about to be computed with; RuntimeError, which says of which layer it is,
    where it is on the meta device: beside others PyTorch would take memory that nobody has written.
    """
    if tensor.is_meta:
        raise RuntimeError(
            f"weights of the layer {layer!r} are on the meta device: load them; or, if they are "
            "offloaded, call the whole model, whose hooks bring them"
        )
    return tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; PyTorch's distributed part is not imported to ask."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The tensor; all of it where it is a DTensor, and then every rank must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def fsdp_error(what: str, sharder: str = "fully_shard") -> RuntimeError:
    """The error of what FSDP or ZeRO-3 would silently undo."""
    return RuntimeError(
        f"cannot {what} under {sharder}, which puts back the parameters it knows: "
        f"save the adapter, load it into the plain model, and {what} there"
    )
