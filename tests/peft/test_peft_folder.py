"""LoRA-XS and LoRA-Mini of PEFT: their folders, read without PEFT by the command line."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fused_lowrank import AdapterBank, export_lora, load_adapter, save_adapter, unload
from fused_lowrank.files import adapter as adapter_file
from fused_lowrank.files import peft_folder
from fused_lowrank.files.cli import main
from fused_lowrank.files.inspection import KINDS
from fused_lowrank.files.lora_export import of_contents, write

peft = pytest.importorskip("peft")

D = 12


def base() -> nn.Module:
    """The same model at every call; `wide` has room for a rank of 4 only."""
    generator, model = torch.Generator().manual_seed(5), nn.Sequential()
    layers = {"a": nn.Linear(D, D), "narrow": nn.Linear(D, 4), "b": nn.Linear(4, D)}
    for name, module in {**layers, "score": nn.Linear(D, 3)}.items():
        model.add_module(name, module.double())
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "xs": ("LoraXSConfig", {"r": 3, "lora_alpha": 6}),
    "no alpha": ("LoraXSConfig", {"r": 3}),
    "clamped": ("LoraXSConfig", {"r": 6, "lora_alpha": 5, "use_rslora": True}),
    "patterns": (
        "LoraXSConfig",
        {"r": 3, "lora_alpha": 6, "rank_pattern": {"b": 2}, "alpha_pattern": {"^a": 5}},
    ),
    "bias": ("LoraXSConfig", {"r": 3, "bias": "lora_only"}),
    "head": ("LoraXSConfig", {"r": 3, "modules_to_save": ["score"]}),
    "mini": ("LoraMiniConfig", {"r": 2, "a": 6, "b": 8, "lora_alpha": 5}),
}


def saved(case: str, folder: Path, **more: Any) -> nn.Module:
    """PEFT's model, with random values in all that is trained, whose adapter is in the folder."""
    from fused_lowrank.integrations import peft as methods

    name, settings = CONFIGS[case]
    config = getattr(methods, name)(target_modules=["a", "narrow", "b"], **settings, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of reduced ranks
        model = peft.get_peft_model(base(), config).eval()
    torch.manual_seed(6)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of operations in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CONFIGS)
def test_same_outputs(case: str, tmp_path: Path) -> None:
    """In a model of ours, and as plain LoRA."""
    expected, x = saved(case, tmp_path), torch.randn(4, D, dtype=torch.float64)
    model = base()
    adapter_file.load_contents(model, *peft_folder.read(tmp_path), tmp_path, progress=False)
    with torch.no_grad():
        wanted = expected(x)
        assert not torch.allclose(wanted, base()(x), rtol=1e-2)
        close(model(x), wanted)
    config, tensors = peft_folder.read(tmp_path)
    adapter_file.pop_fingerprints(config, tensors)
    write(of_contents(config, tensors, tmp_path), tmp_path / "lora", None)
    with torch.no_grad():
        close(peft.PeftModel.from_pretrained(base(), tmp_path / "lora")(x), wanted)


class Tiny(nn.Module):
    """An embedding, a body, norms and a head, as PEFT expects of a language model."""

    def __init__(self, tokens: int = 9) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(tokens, D)
        self.input_layernorm, self.norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.a, self.other = nn.Linear(D, D), nn.Linear(D, D)
        self.lm_head = nn.Linear(D, tokens)

    def get_input_embeddings(self) -> nn.Module:
        """As transformers has it."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """As transformers has it."""
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        x = self.a(self.input_layernorm(self.embed_tokens(ids)))
        return self.lm_head(self.norm(x + self.other(x)))


def tiny() -> nn.Module:
    """The same at every call."""
    generator, model = torch.Generator().manual_seed(8), Tiny().double()
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


# What PEFT writes beside the adapter: its settings, and what save_pretrained is told.
BESIDE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adapted head": ({"target_modules": ["a", "lm_head"]}, {}),
    "embeddings too": ({"target_modules": ["a"]}, {"save_embedding_layers": True}),
    "a name's end": ({"target_modules": ["a"], "modules_to_save": ["norm"]}, {}),
    "all biases": ({"target_modules": ["a"], "bias": "all"}, {}),
    "biases, a head": (
        {"target_modules": ["a", "lm_head"], "bias": "all", "modules_to_save": ["norm"]},
        {"save_embedding_layers": True},
    ),
    "no factors": ({"target_modules": ["a"], "save_projection": False}, {}),
    "another seed": (
        {"target_modules": ["a"], "save_projection": False, "projection_seed": 7},
        {},
    ),
    "whole and none": (
        {"target_modules": ["a"], "save_projection": False, "modules_to_save": ["lm_head"]},
        {},
    ),
}


@pytest.mark.parametrize("method", ["LoraXSConfig", "LoraMiniConfig"])
@pytest.mark.parametrize("case", BESIDE)
@pytest.mark.filterwarnings("ignore:save_projection", "ignore:Setting `save_embedding_layers`")
def test_what_peft_writes(case: str, method: str, tmp_path: Path, capsys: Any) -> None:
    """It is read, by inspect, in a model, as a file of ours and as LoRA."""
    from fused_lowrank.integrations import peft as methods

    settings, options = BESIDE[case]
    settings = {"r": 3, "lora_alpha": 6, **settings}
    if method == "LoraMiniConfig":
        settings |= {"a": 5, "b": 4}
    theirs = peft.get_peft_model(tiny(), getattr(methods, method)(**settings)).eval()
    torch.manual_seed(6)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "peft", **options)
    ids = torch.arange(9)
    with torch.no_grad():
        wanted = theirs(ids)
        assert not torch.allclose(wanted, tiny()(ids), rtol=1e-2)
        again = peft.PeftModel.from_pretrained(tiny(), tmp_path / "peft")
        close(again(ids), wanted)
        assert main(["inspect", str(tmp_path / "peft")]) == 0
        model = load_adapter(tiny(), tmp_path / "peft", progress=False)
        close(model(ids), wanted)
        save_adapter(model, tmp_path / "ours")
        close(load_adapter(tiny(), tmp_path / "ours", progress=False)(ids), wanted)
        export_lora(model, tmp_path / "lora")
        close(peft.PeftModel.from_pretrained(tiny(), tmp_path / "lora")(ids), wanted)
        unload(model, merge=True)
        close(model(ids), wanted)
    capsys.readouterr()


@pytest.mark.parametrize("method", ["xs", "mini"])
def test_into_a_bank(method: str, tmp_path: Path) -> None:
    """From the folder, the file in it, and the model that would write it."""
    theirs, x = saved(method, tmp_path / "peft"), torch.randn(3, D, dtype=torch.float64)
    model = load_adapter(base(), tmp_path / "peft", progress=False)
    bank = AdapterBank.from_model(model, slots=3)
    file = tmp_path / "peft/adapter_model.safetensors"
    for name, source in {"folder": tmp_path / "peft", "file": file, "model": theirs}.items():
        bank.add(name, source)
    with torch.no_grad(), bank.use(["folder", "file", "model"]):
        close(model(x), theirs(x))
    saved(method, tmp_path / "other", bias="lora_only")
    with pytest.raises(ValueError, match="other trains more of a than its core"):
        bank.add("biased", tmp_path / "other")
    theirs.add_adapter("second", theirs.peft_config["default"])
    theirs.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 active adapters"):
        bank.add("both", theirs)
    assert list(bank.names) == ["folder", "file", "model"]


def test_models_of_peft_are_named(tmp_path: Path) -> None:
    """What is for models of `adapt` says so."""
    theirs = saved("xs", tmp_path / "peft")
    calls: list[Callable[[], Any]] = [
        lambda: save_adapter(theirs, tmp_path / "file"),
        lambda: unload(theirs),
        lambda: export_lora(theirs, tmp_path / "lora"),
        lambda: AdapterBank.from_model(theirs, slots=1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"it is a model of PEFT.*load_adapter\(plain_model"):
            call()
    native = load_adapter(base(), tmp_path / "peft", progress=False)
    assert native.a.svd == "randomized"
    assert len(AdapterBank.from_model(native, slots=1).layers)


def test_patterns_match_ends_of_names() -> None:
    """As in PEFT: after a dot, to the end, and the first that matches."""
    patterns = {"q": 1, "^layer.v": 2, r"layer\.\d.o": 3, "o": 4}
    names = ("q", "layer.q", "freq", "q.x", "layer.v", "x.layer.v", "a.layer.0.o", "o")
    found = [peft_folder.pattern_of(patterns, name, 0) for name in names]
    assert found == [1, 1, 0, 0, 2, 0, 3, 4]
    theirs = [patterns.get(peft.utils.other.get_pattern_key(patterns, name), 0) for name in names]
    assert found == theirs


def test_without_frozen_factors(tmp_path: Path) -> None:
    """They are computed from the base's weights, and known by their fingerprint."""
    with pytest.warns(UserWarning, match="save_projection"):
        expected = saved("xs", tmp_path, save_projection=False)
    x = torch.randn(4, D, dtype=torch.float64)
    contents = peft_folder.read(tmp_path)
    assert not contents[0]["bases"]
    with torch.no_grad():
        model = adapter_file.load_contents(base(), *contents, tmp_path, progress=False)
        close(model(x), expected(x))
    other = base()
    nn.init.normal_(other.b.weight)
    with pytest.raises(ValueError, match="another base model: the weight of b"):
        adapter_file.load_contents(other, *peft_folder.read(tmp_path), tmp_path, progress=False)


def test_command_line(tmp_path: Path, capsys: Any) -> None:
    """inspect and convert know the folder."""
    saved("mini", tmp_path / "mini")
    assert main(["inspect", str(tmp_path / "mini")]) == 0
    out = capsys.readouterr().out
    assert f"kind       {KINDS['peft']}" in out
    assert KINDS["peft"].startswith("LoRA-XS or LoRA-Mini")
    assert re.search(r"^r +2\na +6, 4\nb +8, 4\nscale +2\.5\n", out, re.M)
    arguments = [str(tmp_path / "mini"), str(tmp_path / "lora"), "--to", "peft-lora"]
    assert main(["convert", *arguments]) == 0
    assert main(["inspect", str(tmp_path / "lora")]) == 0
    assert "plain LoRA in PEFT's format" in capsys.readouterr().out


State = dict[str, Tensor]
PREFIX = "base_model.model."
FILES: dict[str, tuple[Callable[[State, dict[str, Any]], Any], str]] = {
    "no core": (lambda s, c: s.pop(f"{PREFIX}a.lora_xs_core"), "lacks core of a"),
    "vector": (
        lambda s, c: s.update({f"{PREFIX}a.lora_xs_core": torch.ones(3)}),
        "lacks core of a",
    ),
    "shape": (
        lambda s, c: s.update({f"{PREFIX}a.basis_up": torch.ones(D, 2)}),
        r"a\.up is \(12, 2\) there",
    ),
    "no print": (lambda s, c: s.pop(f"{PREFIX}a.basis_fingerprint"), r"lacks a\.fingerprint"),
    "extra": (lambda s, c: s.update({f"{PREFIX}a.z": torch.ones(1)}), r"unexpected a\.z"),
    "no layers": (lambda s, c: s.clear(), "adapts no layers"),
    "Conv1D": (lambda s, c: c.update(fan_in_fan_out=True), "fan_in_fan_out is True"),
    "no r": (lambda s, c: c.pop("r"), "cannot be read"),
    "patterns": (lambda s, c: c.update(rank_pattern={"(": 1}), "cannot be read"),
    "method": (lambda s, c: c.update(peft_type="LOHA"), "adapter of LOHA"),
}


@pytest.mark.parametrize("case", FILES)
def test_refused(case: str, tmp_path: Path) -> None:
    """A ValueError, and the model as it was."""
    saved("xs", tmp_path)
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    state, config = load_file(file), json.loads(settings.read_text())
    change, message = FILES[case]
    change(state, config)
    save_file(state, file)
    settings.write_text(json.dumps(config))
    model = base()
    with pytest.raises(ValueError, match=message):
        adapter_file.load_contents(model, *peft_folder.read(tmp_path), tmp_path, progress=False)
    assert all(type(module) is nn.Linear for module in model)
