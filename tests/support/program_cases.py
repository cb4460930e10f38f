"""The model of random programs, what it computes as plain equations, and how many are drawn."""

import os

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

D = 6
LAYERS = ("a", "b")
X = torch.randn(5, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Weights = dict[str, Tensor]  # of the layers and the head


class Model(nn.Module):
    """Two linear layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, 3)."""
        return self.head(self.b(torch.tanh(self.a(x))))


def computed(weights: Weights, biases: Weights, x: Tensor = X) -> Tensor:
    """What `Model` computes."""
    a = torch.tanh(x @ weights["a"].t() + biases["a"])
    b = a @ weights["b"].t() + biases["b"]
    return b @ weights["head"].t()


def close(actual: Tensor, expected: Tensor, error: float = 1e-9) -> None:
    """Equal but for rounding, in float64 if nothing else is said."""
    torch.testing.assert_close(actual, expected, rtol=error, atol=error)


SETTINGS = settings(
    max_examples=int(os.environ.get("PROGRAMS", "250")),
    stateful_step_count=14,
    deadline=None,
    database=None,
    derandomize="PROGRAMS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
