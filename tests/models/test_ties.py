"""Tied tensors: what is trained through a tie gives the same logits wherever an adapter goes."""

import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fused_lowrank import (
    AdapterBank,
    adapt,
    disable_adapters,
    export_lora,
    load_adapter,
    save_adapter,
    unload,
)
from fused_lowrank.files.cli import main

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from fused_lowrank.integrations.peft import LoraMiniConfig, LoraXSConfig, save_as_lora  # noqa: E402

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


class Shared(nn.Module):
    """Layers that share: linear ones a weight, also with the head, and one its bias with a norm."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            for other in (self.second, self.head):
                other.weight.copy_(self.first.weight)
            self.norm.bias.copy_(self.first.bias)
        if tied:
            self.second.weight = self.head.weight = self.first.weight
            self.norm.bias = self.first.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.second(self.first(x).relu())))


SHARED: list[dict[str, Any]] = [
    {"target_modules": ["second"], "modules_to_save": ["first"]},
    {"target_modules": ["first"], "modules_to_save": ["norm"]},
    {"target_modules": ["first"], "modules_to_save": ["head"]},
    {"target_modules": ["first", "second"]},
    {"target_modules": ["first"], "train": ("core", "bias")},
    {"target_modules": ["first", "second"], "train": ("core", "weight", "bias")},
]


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_other_ties(case: dict[str, Any], tied: bool, there: bool, tmp_path: Path) -> None:
    """Weights of linear layers, of one that is adapted and another that is not, and biases."""
    x = torch.randn(5, 16)
    model = adapt(Shared(tied), r=4, progress=False, **case).eval()
    train(model)
    y = model(x)
    save_adapter(model, tmp_path / "adapter")
    other = Shared(there).eval()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    load_adapter(other, tmp_path / "adapter", progress=False)
    assert torch.equal(other(x), y)
    for source in (model, tmp_path / "adapter"):
        with suppress(ValueError):  # or it would have to hold what plain LoRA cannot
            export_lora(source, tmp_path / "lora")
            loaded = peft.PeftModel.from_pretrained(Shared(tied).eval(), tmp_path / "lora")
            torch.testing.assert_close(loaded(x), y, rtol=1e-3, atol=1e-3)
    if "train" not in case:
        assert torch.equal(unload(other)(x), Shared().eval()(x))
        assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
        assert (other.first.weight is other.second.weight) == there
    torch.testing.assert_close(unload(model, merge=True)(x), y, rtol=1e-3, atol=1e-3)


def test_view_of_another_shape() -> None:
    """A Parameter that would change with a trained one, unseen, is refused before training."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data.t())
    for case in ({"modules_to_save": ["0"]}, {"target_modules": ["1"], "train": ("weight",)}):
        before = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(ValueError, match="would be trained, and lies in the memory of"):
            adapt(model, r=2, progress=False, **{"target_modules": ["2"], **case})
        assert [parameter.requires_grad for parameter in model.parameters()] == before
        assert type(model[2]) is nn.Linear
    adapt(model, r=2, target_modules=["2"], progress=False)


@pytest.mark.parametrize(
    ("tied", "message"),
    [
        ({"lm_head.weight": "nothing.weight"}, "config cannot be read"),
        ({"lm_head.weight": 3}, "config cannot be read"),
        (["lm_head.weight"], "config cannot be read"),
        ({"gone.weight": "model.embed_tokens.weight"}, "with gone.weight tied to model.embed_to"),
        ({"model.norm.weight": "model.embed_tokens.weight"}, r"in this model they are \(32,\) and"),
    ],
)
def test_damaged_ties(tied: Any, message: str, tmp_path: Path) -> None:
    """They are refused, and the model is as it was."""
    path = tmp_path / "adapter"
    save_adapter(adapted(llama(), EMBED), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    config = {**json.loads(metadata["config"]), "tied": tied}
    save_file(load_file(path), path, {**metadata, "config": json.dumps(config)})
    model = llama()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, path, progress=False)
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_ties_in_an_adapted_model(tmp_path: Path) -> None:
    """Its Parameters stay what they are, for an optimiser holds them: said so."""
    config = LoraXSConfig(r=4, target_modules=["q_proj"], modules_to_save=EMBED)
    model = peft.get_peft_model(llama(), config)
    train(model)
    model.save_pretrained(tmp_path / "peft")
    other = adapted(llama(), EMBED)
    y = logits(other)
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied .* unload\(model\) first"):
        load_adapter(other, tmp_path / "peft")
    assert torch.equal(logits(other), y)
    load_adapter(unload(other), tmp_path / "peft", progress=False)
    assert close(logits(other), logits(model))


@whole
def test_bank_over_modules_trained_whole(saved: list[str], tmp_path: Path) -> None:
    """Its adapters share them, and are exported with them."""
    model = adapted(llama(), saved)
    bank = AdapterBank.from_model(model, slots=2)
    cores = {n: t for n, t in model.state_dict().items() if n.endswith(".core")}
    bank.add("alice", {name: torch.randn_like(core) for name, core in cores.items()})
    with bank.use(["alice"]):
        y = logits(model)
    export_lora(bank, tmp_path / "lora", name="alice")
    assert close(through_peft(llama(), tmp_path / "lora"), y)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_trained_and_not_saved_by_peft(bias: str, tmp_path: Path) -> None:
    """A head that was put in the place of PEFT's copy would be lost: said so, and no more."""
    torch.manual_seed(0)
    base: Any = tiny("roberta")
    config = LoraXSConfig(r=4, target_modules=["query"], modules_to_save=["classifier"], bias=bias)
    model = peft.get_peft_model(base, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "peft")
    model.base_model.model.classifier = nn.Linear(32, 2)
    names = r"^base_model\.model\.classifier\.weight, base_model\.model\.classifier\.bias can be"
    if bias == "all":  # which PEFT writes, the new one's too
        names = r"^base_model\.model\.classifier\.weight can be trained, and would not be in"
    with pytest.warns(UserWarning, match=names):
        model.save_pretrained(tmp_path / "peft")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_peft_keep_their_ties(bias: str, tmp_path: Path) -> None:
    """PEFT trains them where they are, and so in the norm that shares one."""
    x = torch.randn(5, 16)
    config = LoraXSConfig(r=4, target_modules=["first"], bias=bias)
    model = peft.get_peft_model(Shared(), config).eval()
    train(model)
    y = model(x)
    model.save_pretrained(str(tmp_path))
    other = load_adapter(Shared(), tmp_path, progress=False).eval()
    torch.testing.assert_close(other(x), y)
    assert other.norm.bias is other.first.bias
    torch.testing.assert_close(unload(other)(x), Shared().eval()(x))


class Repeated(nn.Module):
    """A layer that stands in three places, and is called in each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.heads = nn.ModuleList([self.head, self.head])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for head in self.heads:
            x = head(self.other(x)).relu()
        return self.head(x)


CASES = [(["head"], None), (["other"], ["head"]), (["head", "other"], None)]


@pytest.mark.parametrize(("targets", "saved"), CASES)
def test_modules_in_several_places(
    targets: list[str], saved: list[str] | None, tmp_path: Path
) -> None:
    """Here they are trained in all of them, in PEFT in one: neither is taken for the other."""
    words = r"head stands in 3 places, and PEFT trains only one of them"
    model = adapt(Repeated(), r=4, target_modules=targets, modules_to_save=saved, progress=False)
    train(model)
    with pytest.raises(ValueError, match=words):
        export_lora(model, tmp_path / "lora")
    config = LoraXSConfig(r=4, target_modules=targets, modules_to_save=saved)
    theirs = peft.get_peft_model(Repeated(), config)
    theirs.save_pretrained(str(tmp_path / "peft"))
    plain = Repeated()
    with pytest.raises(ValueError, match=words):
        load_adapter(plain, tmp_path / "peft", progress=False)
    assert type(plain.head) is nn.Linear
    if saved is None:
        bank = AdapterBank.from_model(
            adapt(Repeated(), r=4, target_modules=targets, progress=False), slots=2
        )
        for source in (tmp_path / "peft", theirs):
            with pytest.raises(ValueError, match=words):
                bank.add("a", source)
