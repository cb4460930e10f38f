"""Tied tensors: what is trained through a tie gives the same logits wherever an adapter goes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from tie_cases import EMBED, HEAD, adapted, close, llama, logits, peft, through_peft, train, whole

from fused_lowrank import disable_adapters, export_lora, load_adapter, save_adapter, unload
from fused_lowrank.files.cli import main

transformers = pytest.importorskip("transformers")
from fused_lowrank.integrations.peft import LoraMiniConfig, LoraXSConfig, save_as_lora  # noqa: E402


def run(*arguments: Any) -> int:
    """The command line."""
    return main([str(argument) for argument in arguments])


# --- from native adapters ---


@whole
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_file(saved: list[str], tied: bool, there: bool, tmp_path: Path) -> None:
    """Saved with or without a tie, loaded into a model with or without: the same; and undone."""
    path = tmp_path / "adapter"
    model = adapted(llama(tied), saved)
    y = logits(model)
    save_adapter(model, path)
    base = llama(there)
    before, head = logits(base), base.lm_head.weight
    load_adapter(base, path, progress=False)
    assert torch.equal(logits(base), y)
    save_adapter(base, tmp_path / "again")
    assert torch.equal(logits(load_adapter(llama(tied), tmp_path / "again", progress=False)), y)
    with disable_adapters(base):
        assert torch.equal(logits(base), before)
    base.tie_weights()  # as resizing does
    assert torch.equal(logits(base), y)
    unload(base)
    assert torch.equal(logits(base), before)
    assert base.lm_head.weight is head
    assert base.config.tie_word_embeddings == there


@whole
def test_peft_loads_the_export(saved: list[str], tmp_path: Path, capsys: Any) -> None:
    """Of a model, of its file and of a bank's: with the values of both sides of the tie."""
    model = adapted(llama(), saved)
    save_adapter(model, tmp_path / "file")
    export_lora(model, tmp_path / "lora")
    export_lora(tmp_path / "file", tmp_path / "of file")
    assert run("inspect", tmp_path / "file") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (tied,) = [row[1:] for row in rows if row[0] == "tied"]
    assert sorted([tied[0], tied[2]]) == ["lm_head.weight", "model.embed_tokens.weight"]
    llama().save_pretrained(tmp_path / "base")
    command = ("convert", tmp_path / "file", tmp_path / "cli", "--to", "peft-lora")
    assert run(*command, "--base", tmp_path / "base") == 0
    for folder in ("lora", "of file", "cli"):
        assert close(through_peft(llama(), tmp_path / folder), logits(model)), folder


@pytest.mark.parametrize("method", ["lora", "lora_xs", "lora_mini"])
@pytest.mark.parametrize("bases", [True, False])
def test_adapted_head_over_a_trained_tie(method: str, bases: bool, tmp_path: Path) -> None:
    """Its file knows the base by the weight from before, is loaded, merged, and not exported."""
    keywords: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"], "method": method}
    if method == "lora_mini":
        keywords |= {"a": 8, "b": 8}
    model, path = adapted(llama(), EMBED, **keywords), tmp_path / "adapter"
    y = logits(model)
    save_adapter(model, path, bases=bases or method != "lora_xs")
    assert close(logits(load_adapter(llama(), path, progress=False)), y)
    with torch.no_grad():  # into one that is trained already
        load_adapter(adapted(llama(), EMBED, **keywords), path)
    other = llama()
    with torch.no_grad():
        other.lm_head.weight.normal_()
    with pytest.raises(ValueError, match="the weight of lm_head differs"):
        load_adapter(other, path, progress=False)
    refused = r"lm_head\.weight is trained through its tie to model\.embed_tokens\.weight.*merge"
    for source in (model, path) if bases or method == "lora" else (model,):
        with pytest.raises(ValueError, match=refused):
            export_lora(source, tmp_path / "lora")
    llama().save_pretrained(tmp_path / "base")
    assert run("merge", path, tmp_path / "merged", "--base", tmp_path / "base") == 0
    merged = type(other).from_pretrained(tmp_path / "merged")
    assert close(logits(merged), y)
    assert not merged.config.tie_word_embeddings
    with pytest.warns(UserWarning, match="were tied"):
        unload(model, merge=True)
    assert close(logits(model), y)
    assert not model.config.tie_word_embeddings


def test_trained_weight_through_a_tie(tmp_path: Path) -> None:
    """A layer that trains its weight trains the embeddings; a model without the tie gets both."""
    keywords = {"target_modules": ["lm_head"], "train": ("core", "weight")}
    model = adapted(llama(), **keywords)
    save_adapter(model, tmp_path / "adapter")
    for tied in (True, False):
        other = load_adapter(llama(tied), tmp_path / "adapter", progress=False)
        assert torch.equal(logits(other), logits(model))


# --- from adapters of PEFT ---


@whole
@pytest.mark.parametrize("kind", [LoraXSConfig, LoraMiniConfig])
def test_peft_folder(saved: list[str], kind: Any, tmp_path: Path, capsys: Any) -> None:
    """PEFT trains copies, tied to nothing: so do they come here, whatever the base model ties."""
    llama().save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = peft.get_peft_model(
            llama(), kind(r=4, target_modules=["q_proj"], modules_to_save=saved)
        )
    train(model)
    y = logits(model)
    model.save_pretrained(tmp_path / "peft")
    base = ("--base", tmp_path / "base")
    assert run("inspect", tmp_path / "peft") == 0
    assert run("convert", tmp_path / "peft", tmp_path / "fused", "--to", "fused", *base) == 0
    assert run("convert", tmp_path / "peft", tmp_path / "lora", "--to", "peft-lora", *base) == 0
    assert run("convert", tmp_path / "peft", tmp_path / "bare", "--to", "peft-lora") == 0
    assert run("merge", tmp_path / "peft", tmp_path / "merged", *base) == 0
    save_as_lora(tmp_path / "own", model)
    for folder in ("lora", "bare", "own"):
        assert close(through_peft(llama(), tmp_path / folder), y), folder
    for tied in (True, False):
        other = llama(tied)
        assert close(logits(load_adapter(other, tmp_path / "fused", progress=False)), y)
        unload(other)
        assert torch.equal(logits(other), logits(llama()))
    merged = type(other).from_pretrained(tmp_path / "merged")
    assert close(logits(merged), y)
    assert not merged.config.tie_word_embeddings
    load_adapter(other := llama(), tmp_path / "fused", progress=False)
    assert close(logits(unload(other, merge=True)), y)
    other.save_pretrained(tmp_path / "again")
    assert close(logits(type(other).from_pretrained(tmp_path / "again")), y)


# --- other ties ---


T5 = {"target_modules": ["q", "v"]}


@pytest.mark.parametrize("saved", [["shared"], HEAD, EMBED, ["shared", "lm_head"]])
def test_t5(saved: list[str], tmp_path: Path) -> None:
    """One tensor in four places."""
    torch.manual_seed(0)
    bases: list[Any] = []
    for _ in range(4):
        torch.manual_seed(0)
        bases.append(tiny("t5"))
    model, path = adapted(bases[0], saved, **T5), tmp_path / "adapter"
    y = logits(model)
    save_adapter(model, path)
    assert torch.equal(logits(load_adapter(bases[1], path, progress=False)), y)
    export_lora(model, tmp_path / "lora")
    assert close(through_peft(bases[2], tmp_path / "lora"), y)
    bases[3].save_pretrained(tmp_path / "base")
    assert run("merge", path, tmp_path / "merged", "--base", tmp_path / "base") == 0
    assert close(logits(type(model).from_pretrained(tmp_path / "merged")), y)


@pytest.mark.parametrize("saved", [["lm_head"], ["shared"], ["lm_head", "embed_tokens"]])
def test_t5_of_peft(saved: list[str], tmp_path: Path) -> None:
    """Copies of one place of four."""
    bases: list[Any] = []
    for _ in range(3):
        torch.manual_seed(0)
        bases.append(tiny("t5"))
    bases[1].save_pretrained(tmp_path / "base")
    config = LoraXSConfig(r=4, modules_to_save=saved, **T5)
    model = peft.get_peft_model(bases[0], config)
    train(model)
    y = logits(model)
    model.save_pretrained(tmp_path / "peft")
    command = ("convert", tmp_path / "peft", tmp_path / "fused", "--to", "fused")
    assert run(*command, "--base", tmp_path / "base") == 0
    assert close(logits(load_adapter(bases[2], tmp_path / "fused", progress=False)), y)
    assert run("merge", tmp_path / "peft", tmp_path / "merged", "--base", tmp_path / "base") == 0
    assert close(logits(type(bases[0]).from_pretrained(tmp_path / "merged")), y)


def bart() -> Any:
    """A BART that ties its head and both embeddings to another module's."""
    torch.manual_seed(0)
    sizes = {
        f"{part}_{what}": 4 for part in ("encoder", "decoder") for what in ("attention_heads",)
    }
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    width = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32, "vocab_size": 64}
    config = transformers.BartConfig(**sizes, **layers, **width, init_std=0.2)
    return transformers.BartForConditionalGeneration(config)


def umt5() -> Any:
    """A UMT5, whose forward scales by whether its config says that embeddings are tied."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    config = transformers.UMT5Config(**sizes, num_layers=1, tie_word_embeddings=True)
    return transformers.UMT5ForConditionalGeneration(config)


@pytest.mark.parametrize("saved", [["shared"], HEAD])
@pytest.mark.parametrize(("make", "target"), [(bart, "q_proj"), (umt5, "q")])
def test_encoder_decoders_merged_by_peft(
    make: Any, target: str, saved: list[str], tmp_path: Path
) -> None:
    """Their config still says that embeddings are tied; they are read as they were written."""
    config = LoraXSConfig(r=4, target_modules=[target], modules_to_save=saved)
    model = peft.get_peft_model(make(), config)
    train(model)
    y = logits(model)
    merged = model.merge_and_unload()
    assert close(logits(merged), y)
    merged.save_pretrained(tmp_path / "merged")
    assert close(logits(type(merged).from_pretrained(tmp_path / "merged")), y)


@whole
def test_ensure_weight_tying(saved: list[str], tmp_path: Path) -> None:
    """PEFT then trains one copy for both, and so does what becomes of its folder."""
    config = LoraXSConfig(
        r=4, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=True
    )
    model = peft.get_peft_model(llama(), config)
    train(model)
    y = logits(model)
    copies = [m.modules_to_save["default"].weight for m in (model.model.lm_head,)]
    assert copies[0] is model.model.model.embed_tokens.modules_to_save["default"].weight
    model.save_pretrained(tmp_path / "peft")
    llama().save_pretrained(tmp_path / "base")
    assert close(through_peft(llama(), tmp_path / "peft"), y)
    base = ("--base", tmp_path / "base")
    assert run("convert", tmp_path / "peft", tmp_path / "fused", "--to", "fused", *base) == 0
    other = load_adapter(llama(), tmp_path / "fused", progress=False)
    assert close(logits(other), y)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert run("merge", tmp_path / "peft", tmp_path / "merged", *base) == 0
    assert close(logits(type(other).from_pretrained(tmp_path / "merged")), y)
