"""Small models with adapters of PEFT, and their logits."""

from typing import Any

import torch
from peft_cases import config, inputs, mlp, peft


def of(method: str, **settings: Any) -> Any:
    """A PeftModel of the same base at every call."""
    return peft.get_peft_model(mlp(), config(method, **settings)).eval()


def logits(model: Any, adapter: str) -> torch.Tensor:
    """What a model computes with one of its adapters."""
    model.set_adapter(adapter)
    return model(x())


def x() -> torch.Tensor:
    """The same input at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return inputs()
