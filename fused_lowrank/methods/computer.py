"""The one slot of a layer for who computes it in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor


class Computer:
    """Computes a layer in its place, as `layer.computed_by`: a bank, or the layer's parallel style.

    A layer has room for one. What it does not compute itself it leaves to `layer.own`.
    """

    is_bank: ClassVar[bool] = False  # of which a copy of the layer is no part
    is_parallel: ClassVar[bool] = False  # whether it has made DTensors of the layer's Parameters

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        raise NotImplementedError

    def look_again(self, moved: bool = False) -> None:
        """Take note that Parameters of the layer may be others from now on, or have `moved`."""

    def refuse_leaving(self, what: str) -> None:
        """Raise ValueError if the layer cannot leave its model yet."""

    def refuse_other(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError if the layer must not be given these values, by name."""
