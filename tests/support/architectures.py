"""Small transformers of four architectures, built from configs, with random weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCABULARY, HIDDEN, LAYERS = 64, 32, 2
NAMES = ("llama", "qwen3", "roberta", "t5")
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": HIDDEN**-0.5,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}  # fewer keys than queries
T5 = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": LAYERS}
ROBERTA = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROBERTA["problem_type"] = "single_label_classification"  # set at the first call otherwise
T5_ONLY = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "dropout_rate": 0.0}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {  # config, model, sizes
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {**SIZES, **ROBERTA}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**T5, **T5_ONLY}),
}


def tiny(name: str, **config: Any) -> nn.Module:
    """A model of two layers in eval mode, hidden size 32; `config` overrides its settings.

    It has no dropout; padding is token 0, and no token ends a sequence. Weights are large enough
    for every layer to change what comes out.
    """
    config_class, model_class, sizes = KINDS[name]
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    settings = {"vocab_size": VOCABULARY, **ids, **sizes, **config}
    config_of = getattr(transformers, config_class)
    return getattr(transformers, model_class)(config_of(**settings)).eval()


def batch(name: str, length: int, rows: int = 2) -> dict[str, Tensor]:
    """Inputs with labels: `rows` sequences, the last of them padded by one (on the left where text
    is generated).
    """
    ids = torch.randint(1, VOCABULARY, (rows, length))
    place = 0 if name in ("llama", "qwen3") else -1
    if length > 1:
        ids[-1, place] = 0
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if name == "roberta":
        return {**inputs, "labels": torch.arange(rows) % 2}
    return {**inputs, "labels": ids.masked_fill(ids == 0, -100)}


def targets(name: str) -> list[str]:
    """The projections to adapt: all of attention and of the MLP."""
    return {
        "roberta": ["query", "key", "value", "intermediate.dense", "output.dense"],
        "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    }.get(name, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
