"""Residual blocks in a bank, each checkpointed or not."""

import contextvars
import threading

import torch
from torch import nn

from fused_lowrank import AdapterBank, adapt

WIDTH, SLOTS = 12, 5


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return hidden + scale * self.second(torch.tanh(self.first(hidden)))


class Model(nn.Module):
    """Blocks, each checkpointed by the given function, if any."""

    def __init__(self, checkpointed=None) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else self.checkpointed(block, x)
        return x


def banked(model: nn.Module, device: torch.device) -> AdapterBank:
    """The model in float64, its block layers in a bank of adapters "0", "1", …"""
    model.to(device, torch.float64)
    adapt(model, "lora_xs", target_modules=["first", "second"], r=3, progress=False)
    model.requires_grad_(False)
    bank = AdapterBank.from_model(model, slots=SLOTS)
    bank.put(
        [str(i) for i in range(SLOTS)],
        {name: (torch.randn(SLOTS, 3, 3), None, torch.rand(SLOTS) + 0.5) for name in bank.layers},
    )
    return bank


def inputs(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, device=device)


def in_another_thread(call) -> None:
    """call(), in a thread with an empty context."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            contextvars.Context().run(call)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
