"""A tiny language model, its head tied or not; a few steps of training, states compared."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from fused_lowrank.methods import METHODS

D, VOCABULARY = 16, 11
SETTINGS = {
    "lora": {"r": 4},
    "lora_xs": {"r": 4},
    "lora_mini": {"r": 2, "a": 4, "b": 4},
    "lora_fa": {"r": 4},
    "vera": {"r": 4},
    "tied_lora": {"r": 4},
    "melora": {"r": 2, "n": 2},
    "nola": {"r": 4, "m": 5},
    "adalora": {"r": 4},
}
methods = pytest.mark.parametrize("method", METHODS)


class Tiny(nn.Module):
    """An embedding, two linears, a norm with buffers and a head, tied to the embedding or not."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.body = nn.Sequential(
            OrderedDict(up=nn.Linear(D, D + 4), act=nn.GELU(), down=nn.Linear(D + 4, D))
        )
        self.norm = nn.BatchNorm1d(D)
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(self.embed(ids))))


def train(model: nn.Module, ids: torch.Tensor, steps: int = 2) -> None:
    """A few steps on whatever requires a gradient, so that it changes visibly."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
        optimiser.step()
    model.eval()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state_dicts are alike bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
