"""Where the tests run: Triton's interpreter on the CPU or, with FUSED_LOWRANK_TEST_DEVICE=cuda, the
compiled kernels on a GPU. Every empty tensor is poisoned, so that what is not written shows."""

import os

DEVICE = os.environ.get("FUSED_LOWRANK_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported

import pytest
import torch
from hypothesis import Phase, settings

# Stops at the first failing example: for when it is only asked whether there is one.
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    """torch.empty gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """The device under test."""
    return torch.device(DEVICE)
