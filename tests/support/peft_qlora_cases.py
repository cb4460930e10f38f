"""PEFT's LoRA over quantised bases: models of two layers, their factors away from their start."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from base_cases import model_of, shifted
from torch import nn

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft_lora_cases import ALPHA, R

BITS = {"nf4": "is_loaded_in_4bit", "fp4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}


def qlora(kind: str, base: torch.dtype, **settings: Any) -> Any:
    """PEFT's model over such a base, its factors away from their start."""
    model = model_of(kind, base)
    if kind in BITS:
        setattr(model, BITS[kind], True)
    own = {"r": R, "lora_alpha": ALPHA, "target_modules": ["first", "second"], **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's layers cannot be merged without more
        model = get_peft_model(model, LoraConfig(**own))
    return shifted(model)


def layers_of(model: nn.Module) -> list[Any]:
    """PEFT's layers."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What is trained, in its order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
