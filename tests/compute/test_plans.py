"""Every row of the table of plans computes the equation, whoever chooses it."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_lowrank import lowrank_linear
from fused_lowrank.compute.plans import PLANS
from fused_lowrank.testing import measure, pinned_plan

R = 12  # not a power of two, to which kernels pad what they hand on
TRAINED = [("x", "core"), ("x", "weight", "down", "core", "up", "bias")]
SIZES = [(16, R), (160, R), (160, 16)]  # few rows and many: some plans are for either alone
DIAGONAL = [True, False]  # the core


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_computes_the_equation(name: str, device: torch.device) -> None:
    """Forward and all gradients are within the error budget, wherever the plan says that it can."""
    pytest.importorskip("triton")

    def ours(**given: Any) -> Tensor:
        with pinned_plan(name):
            return lowrank_linear(**given, impl="triton")

    def reference(**given: Any) -> Tensor:
        return lowrank_linear(**given, impl="reference")

    computed, refused = 0, ""
    for dtype, trained in itertools.product((torch.float32, torch.bfloat16), TRAINED):
        for (m, r), diagonal in itertools.product(SIZES, DIAGONAL):
            core = (r,) if diagonal else (r, r)
            shapes = {"x": (m, 48), "weight": (32, 48), "down": (r, 48), "core": core}
            shapes |= {"up": (32, r), "bias": (32,)}
            operands: dict[str, Any] = {
                key: torch.randn(*shape, device=device, dtype=dtype).requires_grad_(key in trained)
                for key, shape in shapes.items()
            }
            dy = torch.randn(m, 32, device=device)
            try:
                measured = measure(ours, reference, operands | {"scale": 0.5}, dy)
            except RuntimeError as error:
                if f"the pinned plan {name} cannot compute this" not in str(error):
                    raise
                refused = str(error)
                continue
            computed += 1
            for one in measured:
                assert one.within, (dtype, m, r, diagonal, one)
    if name == "called":  # tests/models/test_bases.py computes it
        assert "W is a plain matrix" in refused
        return
    if not computed and "no interpreter runs it" in refused:
        pytest.skip("test_hopper_kernels.py executes it")
    assert computed, f"add a case that it can compute: {refused}"
