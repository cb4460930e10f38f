"""Models with PEFT's own LoRA, and what counts how they are computed; shared by its tests."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

pytest.importorskip("peft")
pytest.importorskip("fused_lowrank.integrations.peft", exc_type=ImportError)
import architectures
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from fused_lowrank.integrations.peft import lora_layers

K, N, R, ALPHA = 96, 80, 4, 6  # alpha / r is 1.5: no power of two
SMALL_ROWS, ROWS = 7, 700  # on a CPU, 700 x 96 is no longer a small call
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def config(**settings: Any) -> LoraConfig:
    """LoRA on `proj`, of both if there are several."""
    return LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": ["proj"], **settings})


def fill(model: nn.Module) -> nn.Module:
    """Give every factor and bias values, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.endswith("bias"):
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.copy_(values)
    return model


def layer(base: nn.Module | None = None, dtype: torch.dtype = F32, **settings: Any) -> Linear:
    """PEFT's layer around `base`."""
    model = nn.Module()
    model.proj = (base or nn.Linear(K, N)).to(dtype)
    return fill(inject_adapter_in_model(config(**settings), model)).proj


class Block(nn.Module):
    """Two layers to adapt in a model; the second is called with what the first gives."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.proj = nn.Linear(16, 24)
        self.out = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.proj(self.embed(x))))


def block(**settings: Any) -> PeftModel:
    """A PeftModel of it."""
    torch.manual_seed(3)
    return fill(get_peft_model(Block(), config(**settings)))


def ids(device: torch.device, length: int = 5) -> torch.Tensor:
    """Inputs, the same ones every time."""
    return (torch.arange(2 * length, device=device) * 7 % 11).view(2, length)


def gpt2() -> nn.Module:
    """GPT-2 in small: its layers are Conv1D."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=architectures.VOCABULARY, **sizes)).eval()


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Filled from now on: how often which of our ways computed a layer."""
    counts: Counter = Counter()

    def counting(name: str, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return call(*args, **kwargs)

        return wrapper

    for name, call in {"large": "lowrank_linear", "small": "chain", "over": "over_base"}.items():
        monkeypatch.setattr(lora_layers, call, counting(name, getattr(lora_layers, call)))
    return counts


def gradients(model: nn.Module, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of a sum that weighs the outputs differently."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: nn.Module, theirs: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs and all gradients are alike; of models in fp64, where rounding plays no part."""
    y, expected = ours(*args, **kwargs), theirs(*args, **kwargs)
    if not isinstance(y, torch.Tensor):
        y, expected = y.logits, expected.logits
    torch.testing.assert_close(y, expected)
    got, wanted = gradients(ours, y), gradients(theirs, expected)
    assert got.keys() == wanted.keys()
    assert any("lora_A" in name for name in got)
    for name in got:
        torch.testing.assert_close(got[name], wanted[name])


BASES = {
    "linear": lambda: nn.Linear(K, N),
    "no bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": lambda: Conv1D(N, K),
}
# operand, as `measure` names them → the Parameter of PEFT's layer
OPERANDS = {
    "weight": "base_layer.weight",
    "bias": "base_layer.bias",
    "down": "lora_A.default.weight",
    "up": "lora_B.default.weight",
    "up_bias": "lora_B.default.bias",
    "magnitude": "lora_magnitude_vector.default.weight",
}


def calls(module: nn.Module, autocast: torch.dtype | None) -> Any:
    """The layer as a function of its operands, as `measure` calls it."""

    def call(x: torch.Tensor, **operands: Any) -> torch.Tensor:
        given = {OPERANDS[name]: own for name, own in operands.items() if own is not None}
        # The truth is computed in fp64, which autocast leaves alone.
        with torch.autocast(x.device.type, autocast) if autocast else nullcontext():
            return functional_call(module, given, (x,))

    return call
