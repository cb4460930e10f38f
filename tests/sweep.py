"""Every language model of transformers that builds small from its config, adapted in both ways.

    python tests/sweep.py [NAME …]      one line a model and way; exit code 1 if any went wrong

Of each: all that is trained gets a gradient, what is merged computes what is adapted, what is saved
and loaded does too, and `generate` for two tenants gives what it gives each alone.
"""

import copy
import inspect
import multiprocessing
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SECONDS = 90  # for a model in one way
VOCABULARY, LENGTH = 64, 6
# What configs call their sizes; an attribute that a config has not is not set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size"), VOCABULARY),
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
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
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
}


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


def shrunk(config: Any) -> Any:
    """The config with small sizes, its inner configs too."""
    for name, value in SIZES.items():
        if getattr(config, name, None) is not None:
            try:
                setattr(config, name, value)
            except (AttributeError, NotImplementedError, ValueError):
                continue  # it follows from others
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "attention_types"):
        types = getattr(config, name, None)
        if isinstance(types, list) and len(types) > 2:
            setattr(config, name, types[-2:])
    for name, inner in list(vars(config).items()):
        if name.endswith("_config") and hasattr(inner, "to_dict"):
            shrunk(inner)
    return config


def built(cls: str) -> nn.Module:
    """A small model with random weights, in float64."""
    import transformers

    kind: Any = getattr(transformers, cls)
    torch.manual_seed(0)
    model = kind(shrunk(kind.config_class()))
    if sum(parameter.numel() for parameter in model.parameters()) > 3_000_000:
        raise ValueError("it stays large")
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """A batch of two."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (2, LENGTH), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids.flip(1)
    takes = inspect.signature(model.forward).parameters
    return {name: value for name, value in given.items() if name in takes}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Of a batch, without gradients."""
    with torch.no_grad():
        torch.manual_seed(2)
        return model(**{k: v for k, v in inputs.items() if k != "labels"}).logits


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """The model, all that is trained random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) / 4
    return model


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal but for rounding, which models that compute in float32 inside magnify."""
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error < 2e-4:
        raise AssertionError(f"{what}: off by {error:.1e}")


def check_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """All that is trained gets a gradient, but experts that no token has reached."""
    model.train()
    torch.manual_seed(2)
    output = model(**inputs)
    loss = (
        output.loss if getattr(output, "loss", None) is not None else output.logits.square().sum()
    )
    loss.backward()
    model.eval()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None and "expert" not in name
    ]
    model.zero_grad()
    if without:
        raise AssertionError(f"{len(without)} without a gradient: {without[0]}")


def generated(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    """Four new tokens."""
    if model.config.is_encoder_decoder:
        more["decoder_start_token_id"] = 1
    with torch.no_grad():
        mask = torch.ones_like(ids)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, **more
        )


def check_tenants(
    kind: str,
    model: nn.Module,
    inputs: dict[str, Tensor],
    tenants: tuple[str, str],
    using: Callable[..., Any],
) -> str:
    """Two tenants in a batch have what each has alone, by generate; or by logits where it fails."""
    ids, inputs = inputs["input_ids"], {k: v for k, v in inputs.items() if k != "labels"}
    if kind == "masked" or not generates(model, ids):
        both = using(list(tenants), lambda **more: model(**inputs, **more).logits.detach())
        for i, name in enumerate(tenants):
            alone = using(
                [name],
                lambda i=i, **more: model(
                    **{k: v[i : i + 1] for k, v in inputs.items()}, **more
                ).logits.detach(),
            )
            close(both[i], alone[0], f"{name}'s row among two")
        return "logits"
    both = using(list(tenants), lambda **more: generated(model, ids, **more))
    for i, name in enumerate(tenants):
        alone = using([name], lambda i=i, **more: generated(model, ids[i : i + 1], **more))
        if not torch.equal(both[i], alone[0]):
            raise AssertionError(f"{name} generates something else among two")
    return "generate"


def generates(model: nn.Module, ids: Tensor) -> bool:
    """Whether the model generates at all, as small as it is."""
    try:
        generated(model, ids)
    except Exception:  # whatever a model of theirs raises
        return False
    return True


def native(kind: str, base: nn.Module) -> str:
    """By `adapt`."""
    from fused_lowrank import AdapterBank, adapt, load_adapter, merge, save_adapter, unmerge

    model, inputs = copy.deepcopy(base), inputs_of(base)
    adapt(model, "lora_xs", r=4, target_modules="all-linear", progress=False)
    randomised(model, 3)
    check_gradients(model, inputs)
    y = logits(model, inputs)
    close_apart(y, logits(base, inputs))
    merge(model)
    close(logits(model, inputs), y, "merged")
    unmerge(model)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "one")
        loaded = load_adapter(copy.deepcopy(base), Path(folder) / "one", progress=False)
        close(logits(loaded, inputs), y, "loaded")
        save_adapter(randomised(loaded, 4), Path(folder) / "two")
        bank = AdapterBank.from_model(model, slots=2)
        for name in ("one", "two"):
            bank.add(name, Path(folder) / name)

    def using(who: list[str], call: Callable[[], Tensor]) -> Tensor:
        with bank.use(who):
            return call()

    return check_tenants(kind, model, inputs, ("one", "two"), using)


def by_peft(kind: str, base: nn.Module) -> str:
    """By the PEFT integration."""
    import peft

    from fused_lowrank.integrations.peft import LoraXSConfig

    config, inputs = LoraXSConfig(r=4, target_modules="all-linear"), inputs_of(base)
    model = randomised(peft.get_peft_model(copy.deepcopy(base), config, "one"), 3)
    check_gradients(model, inputs)
    y = logits(model, inputs)
    close_apart(y, logits(base, inputs))
    model.merge_adapter()
    close(logits(model, inputs), y, "merged")
    model.unmerge_adapter()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/one")
        close(logits(loaded.eval(), inputs), y, "loaded")
    model.add_adapter("two", config)
    model.set_adapter("two")
    randomised(model, 4).eval()

    def using(who: list[str], call: Callable[..., Tensor]) -> Tensor:
        return call(adapter_names=who)

    return check_tenants(kind, model, inputs, ("one", "two"), using)


def close_apart(y: Tensor, base: Tensor) -> None:
    """The adapter does something."""
    if (y - base).abs().max() < 1e-3 * base.abs().max():
        raise AssertionError("the adapter does nothing")


WAYS = {"adapt": native, "PEFT": by_peft}


def result_of(task: tuple[str, str, str]) -> tuple[str, str, str, str, str]:
    """(kind, class, way, what came of it, what it said)."""
    kind, cls, way = task

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                base = built(cls)
                logits(base, inputs_of(base))
            except TimeoutError:
                raise
            except Exception as error:
                return *task, "not built", one_line(error)
            said = WAYS[way](kind, base)
        own = {str(w.message) for w in warned if "fused_lowrank" in w.filename or "r is" in str(w)}
        return *task, "right", "; ".join([said, *sorted(own)])
    except Exception as error:
        return *task, "WRONG", one_line(error)
    finally:
        signal.alarm(0)


def one_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def main(asked: list[str]) -> int:
    """Run all, or the classes asked for; print what came of each and how many of each."""
    torch.set_num_threads(1)
    tasks = [(*which, way) for which in names() for way in WAYS]
    tasks = [task for task in tasks if not asked or task[1] in asked]
    counts: Counter[tuple[str, str]] = Counter()
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=8) as pool:
        for kind, cls, way, what, said in pool.imap(result_of, tasks):
            print(f"{what:<10} {kind:<8} {way:<6} {cls}: {said}", flush=True)
            counts[way, what] += 1
    for (way, what), count in sorted(counts.items()):
        print(f"{way}: {count} {what}")
    return int(any(what == "WRONG" for _, what in counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
