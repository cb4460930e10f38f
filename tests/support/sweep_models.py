"""transformers' language models, small: their configs' sizes, their weights, a batch for each."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH = 64, 6
LARGE = 3_000_000  # parameters
# What configs call their sizes; one that a config has not, or has as None, is left out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size"), VOCABULARY),
    **dict.fromkeys(("decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim"), 32),
    **dict.fromkeys(("embedding_size", "embedding_dim", "emb_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "d_inner", "ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "num_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "forced_bos_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), None),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout_prob", "layerdrop"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "activation_dropout", "dropout_rate"), 0.0),
    **dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop", "hidden_dropout"), 0.0),
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "summary_last_dropout"), 0.0),
    **dict.fromkeys(("mamba_expand",), 2),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("rotary_dim",), 4),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("attention_window", "local_attention_window_len"), 4),
    **dict.fromkeys(("attn_layer_period",), 2),
    **dict.fromkeys(("attn_layer_offset",), 1),
}
TYPES = ("layer_types", "mlp_layer_types", "layers_block_type")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# What is to be said of one config beside that, by its class: sizes that must fit each other, ones
# that are None by default, and types of layers that the default does not have.
SLIDING_FULL = ["sliding_attention", "full_attention"]
MAMBA_ATTENTION = ["linear_attention", "full_attention"]
SLIDING_FULL, ROPE = (
    ["sliding_attention", "full_attention"],
    {"rope_type": "default", "rope_theta": 1e4},
)
WITHOUT_PER_LAYER = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
OWN: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"use_cache": False, "encoder_hash_byte_group_vocab": 64},
    "BltGlobalTransformerConfig": {"hidden_size": 64, "num_attention_heads": 8},
    "BltLocalDecoderConfig": {"hidden_size_global": 64},
    "BltLocalEncoderConfig": {"hidden_size_global": 64, "intermediate_size": 48},
    "CohereCompassTextConfig": {"rope_parameters": dict.fromkeys(SLIDING_FULL, ROPE)},
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "Dots3NoteTextConfig": {
        **{"num_key_value_heads": 4, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4},
        **{"shared_experts_intermediate_size": 24, "n_shared_experts": 1},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16},
        **{"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
        **{"swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    },
    "EsmConfig": {"vocab_size": VOCABULARY, "mask_token_id": 3, "pad_token_id": 0},
    "EsmcConfig": {"num_key_value_heads": 4},
    "FalconH1Config": {"mamba_d_ssm": 64},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Gemma4AssistantConfig": {"text_config": ("Gemma4TextConfig", WITHOUT_PER_LAYER)},
    "Gemma4TextConfig": {"global_head_dim": 8},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 8},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridConfig": {"layer_types": MAMBA_ATTENTION},
    "HunYuanDenseV1Config": {"head_dim": 8},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LongcatFlashConfig": {"zero_expert_num": 2, "expert_ffn_hidden_size": 24},
    "LukeConfig": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8},
    "MinistralConfig": {"head_dim": 8},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    "Nemotron3DiarizationHeadConfig": {"audio_hidden_size": 32},
    "Nemotron3_5TranscribeWordTimestampConfig": {"blank_token_id": VOCABULARY - 1},
    "NemotronConfig": {"num_key_value_heads": 2},
    "NeoMMEConfig": {"head_dim": 16},
    "PerceiverConfig": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2},
    "Phi4MultimodalAudioConfig": {
        **{"num_blocks": 2, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32},
        **{"nemo_conv_channels": 32},
    },
    "Qwen3ASREncoderConfig": {"downsample_hidden_size": 16, "output_dim": 32},
    "Qwen3ASRConfig": {"eos_token_id": 2},
    "Qwen4ExpTextConfig": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 4, "indexer_compress_ratio": 2},
    },
    "RecurrentGemmaConfig": {"block_types": ("recurrent", "attention"), "num_key_value_heads": 2},
    "ReformerConfig": {
        **{"attn_layers": ("local", "lsh"), "axial_pos_embds": False, "feed_forward_size": 48},
        **{"local_attn_chunk_length": 2, "lsh_attn_chunk_length": 2, "num_buckets": 4},
        **{"local_attention_probs_dropout_prob": 0.0, "hash_seed": 0},
    },
    "RoCBertConfig": {
        **{"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
        **{"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    },
    "xLSTMConfig": {"hidden_size": 128, "embedding_dim": 128},
    "VibeVoiceAcousticTokenizerEncoderConfig": {
        **{"num_filters": 4, "downsampling_ratios": (2, 2), "depths": (1, 1, 1)}
    },
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "ZayaConfig": {"num_experts_per_tok": 1},
}
# What a class needs of its config that the config's other classes do not.
HEADS: dict[str, dict[str, Any]] = {"ReformerModelWithLMHead": {"is_decoder": True}}


def names() -> Iterator[tuple[str, str]]:
    """(kind, class) of every model with a head of the three kinds."""
    from transformers.models.auto import modeling_auto as auto

    for kind, table in (
        ("causal", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("masked", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("seq2seq", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ):
        seen = set()
        for cls in table.values():
            cls = cls if isinstance(cls, str) else cls[0]
            if cls not in seen:
                seen.add(cls)
                yield kind, cls


def small(kind: type[Any], own: dict[str, Any]) -> Any:
    """A config of this class with small sizes, a layer of each type that it has, and its own."""
    import transformers

    own = {**OWN.get(kind.__name__, {}), **own}
    for name, value in own.items():
        if name.endswith("_config"):
            own[name] = small(getattr(transformers, value[0]), value[1])
    usual = kind(**{k: v for k, v in own.items() if hasattr(v, "to_dict")})
    held, takes = vars(usual), inspect.signature(kind.__init__).parameters.keys()
    given: dict[str, Any] = {}
    aliases = {name for name, other in kind.attribute_map.items() if other in takes}
    for name in sorted((held.keys() | takes) - aliases):
        value = held.get(name, held.get(kind.attribute_map.get(name, name)))
        if name in SIZES and value is not None:
            given[name] = SIZES[name]
            if isinstance(value, int | float) and SIZES[name] is not None:
                given[name] = type(value)(SIZES[name])
        elif name in TYPES and isinstance(value, list):
            given[name] = list(dict.fromkeys(value))
        elif hasattr(value, "to_dict") and name not in own:
            given[name] = small(type(value), {})
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        given["num_key_value_heads"] = SIZES["num_attention_heads"]
    given.update(own)
    types = [given[name] for name in TYPES if name in given]
    count = max([2, *(len(each) for each in types)])
    given.update({n: (given[n] * count)[:count] for n in TYPES if n in given and n not in own})
    given.update({n: count for n in LAYERS if n in given and n not in own})
    return kind(**given)


def built(cls: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small model with random weights."""
    import transformers

    kind: Any = getattr(transformers, cls)
    torch.manual_seed(0)
    config = small(kind.config_class, HEADS.get(cls, {}))
    model = kind._from_config(config) if hasattr(kind, "_from_config") else kind(config)
    if kind._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no float64
    if sum(parameter.numel() for parameter in model.parameters()) > LARGE:
        raise ValueError("it stays large")
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def ready(cls: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model and a batch for it; in float32 where it cannot compute in float64."""
    model = built(cls)
    inputs = inputs_of(model)
    try:
        finite = bool(torch.isfinite(logits(model, inputs)).all())
    except RuntimeError as error:
        if not any(word in str(error) for word in ("ouble", "overflow")):
            raise
        finite = False
    if not finite:
        model = built(cls, torch.float32)
        if not torch.isfinite(logits(model, inputs)).all():
            raise ValueError("its logits are not finite")
    try:
        with torch.no_grad():
            model(**inputs)
    except (IndexError, RuntimeError, ValueError):  # it wants other labels
        inputs.pop("labels", None)
    return model, inputs


def inputs_of(model: Any) -> dict[str, Tensor]:
    """A batch of two."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (2, LENGTH), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids.flip(1)
    if type(model).__name__ == "GitForCausalLM":  # its loss leaves out an image's tokens
        size = model.config.vision_config.image_size
        given["pixel_values"] = torch.randn(2, 3, size, size, generator=generator).to(model.dtype)
    takes = inspect.signature(model.forward).parameters
    return {name: value for name, value in given.items() if name in takes}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of a batch, without gradients."""
    with torch.no_grad():
        torch.manual_seed(2)
        return model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
