"""Training of an offloaded model beside one that is not."""

from __future__ import annotations

import torch
from offload_cases import losses


def assert_trains_alike(model: torch.nn.Module, other: torch.nn.Module, x: torch.Tensor) -> None:
    got, wanted = losses(model, x), losses(other, x)
    assert wanted[0] - wanted[-1] > 1e-6 * wanted[0]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)
