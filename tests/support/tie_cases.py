"""Models with tied weights, adapted and trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from torch import nn

from fused_lowrank import adapt

peft = pytest.importorskip("peft")


EMBED, HEAD, BOTH = ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]


whole = pytest.mark.parametrize("saved", [EMBED, HEAD, BOTH], ids=["embed", "head", "both"])


def llama(tied: bool = True) -> Any:
    """A tiny Llama, the same at each call, its head's values those of its embeddings."""
    torch.manual_seed(0)
    model: Any = tiny("llama", tie_word_embeddings=tied, pad_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


def train(model: nn.Module) -> None:
    """Change all that is trained, visibly."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


IDS = torch.arange(1, 33)[None]


def logits(model: Any) -> torch.Tensor:
    """Of all models here, for the same tokens."""
    inputs = {"input_ids": IDS}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model.eval()(**inputs).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def adapted(model: Any, saved: list[str] | None = None, **keywords: Any) -> Any:
    """The model adapted and trained."""
    keywords = {"r": 4, "target_modules": ["q_proj"], "progress": False, **keywords}
    train(adapt(model, modules_to_save=saved, **keywords))
    return model


def through_peft(model: Any, folder: Path) -> torch.Tensor:
    """The logits of a base model with a folder of PEFT's."""
    return logits(peft.PeftModel.from_pretrained(model, folder))
