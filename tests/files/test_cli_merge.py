"""The command line: merge, into a base model's folder."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch, targets, tiny
from cli_cases import REST, base, close, run, trained, transformers
from cli_cases import folder as folder
from torch import nn

from fused_lowrank import adapt, load_adapter, save_adapter, unload
from fused_lowrank.files import cli
from fused_lowrank.models.adapt import adapted_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(dtype: torch.dtype, folder: Path, tmp_path: Path, capsys: Any) -> None:
    """In the base model's dtype, with its tokenizer; what was lost to rounding is said."""
    own = tmp_path / "base"
    shutil.copytree(folder, own)
    base(folder, dtype).save_pretrained(own)
    model = adapt(base(own, dtype), target_modules=targets("llama"), r=4, progress=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "file")
    code, _, warned = run(capsys, "merge", tmp_path / "file", tmp_path / "out", "--base", own)
    assert code == 0
    assert ("warning: merging lost up to" in warned) == (dtype == torch.bfloat16)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == dtype
    # Each of the two products is off by the unit roundoff for each sum and each factor, times
    # absolute values; each sum with the weight by half a place more.
    sizes = {
        f"{name}.weight": abs(layer.scale)
        * functools.reduce(
            torch.matmul,
            (f.detach().double().abs() for f in (layer.up, layer.core.t(), layer.down)),
        )
        for name, layer in adapted_layers(model)
    }
    state = unload(model, merge=True).state_dict()
    assert sizes.keys() <= merged.state_dict().keys() == state.keys()
    for key, tensor in merged.state_dict().items():
        ours, theirs = tensor.double(), state[key].double()
        assert key in sizes or torch.equal(ours, theirs), key
        place = torch.finfo(dtype).eps * ours.abs().maximum(theirs.abs())
        bound = place + 2 * (2 * 4 + 3) * 2**-24 * sizes.get(key, 0.0)
        assert ((ours - theirs).abs() <= bound).all(), key
    names = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    written = {"config.json", "generation_config.json", "model.safetensors"}
    rest = {"tokenizer.json", "tokenizer_config.json", "modules.json", *REST}
    assert names == {*written, *rest}
    assert json.loads((tmp_path / "out/config.json").read_text())["hidden_size"]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "file", "out"}


def test_merge_into_the_base_folder(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """What is written there is not copied into itself."""
    own = tmp_path / "base"
    shutil.copytree(folder, own)
    save_adapter(trained(folder), tmp_path / "file")
    for name in ("out", "again"):
        assert run(capsys, "merge", tmp_path / "file", own / name, "--base", own)[0] == 0
    assert not list((own / "out").rglob("out*"))
    (own / "modules.json").write_text("[1]")
    code, _, error = run(capsys, "merge", tmp_path / "file", own / "third", "--base", own)
    assert (code, "modules.json cannot be read" in error) == (1, True)


def test_another_class(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """The adapted class may be another than the one that the base was saved from."""
    model = transformers.LlamaModel.from_pretrained(folder)
    adapt(model, target_modules=["q_proj"], r=4, progress=False)
    nn.init.normal_(model.layers[0].self_attn.q_proj.core)
    save_adapter(model, tmp_path / "file")
    asked = ("merge", tmp_path / "file", tmp_path / "out", "--base", folder)
    code, _, error = run(capsys, *asked)
    assert code == 1
    assert "adapts layers.0.self_attn.q_proj, but the base, a LlamaForCausalLM, has no" in error
    assert "name it by --class" in error
    code, _, error = run(capsys, *asked, "--class", "LlamaFor")
    assert (code, "transformers has no such class" in error) == (1, True)
    assert run(capsys, *asked, "--class", "LlamaModel")[0] == 0
    ids = torch.arange(4)[None]
    with torch.no_grad():
        merged = transformers.AutoModel.from_pretrained(tmp_path / "out")(ids).last_hidden_state
        close(merged, model(ids).last_hidden_state)


def test_base_with_an_adapter(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """transformers would load it with the model."""
    shutil.copytree(folder, tmp_path / "base")
    (tmp_path / "base/adapter_config.json").write_text("{}")
    save_adapter(trained(folder), tmp_path / "file")
    asked = ("merge", tmp_path / "file", tmp_path / "out", "--base", tmp_path / "base")
    code, _, error = run(capsys, *asked)
    assert (code, "base holds an adapter" in error) == (1, True)


def test_failed_merge(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Nothing of it stays."""

    def failing(*_: Any) -> None:
        raise OSError("disk full")

    save_adapter(trained(folder), tmp_path / "file")
    monkeypatch.setattr(shutil, "copy", failing)
    asked = ("merge", tmp_path / "file", tmp_path / "out", "--base", folder)
    code, _, error = run(capsys, *asked)
    assert (code, error.splitlines()[-1]) == (1, "fused-lowrank: error: disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_merge_of_a_tied_weight(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """It is written as it is, or refused where it would be tied again when the files are read."""
    model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    adapt(model, target_modules=["lm_head"], r=4, progress=False)
    nn.init.normal_(model.lm_head.core)
    save_adapter(model, tmp_path / "file")
    inputs = batch("llama", 5)
    expected = model(**inputs).logits
    asked = ("merge", tmp_path / "file", tmp_path / "out", "--base", tmp_path / "base")
    read = cli.base_model

    def tying(*arguments: Any) -> Any:
        found: Any = read(*arguments)
        found.lm_head.weight = found.model.embed_tokens.weight
        return found

    monkeypatch.setattr(cli, "base_model", tying)
    code, _, error = run(capsys, *asked)
    assert (code, "lm_head.weight is tied to another tensor of the base" in error) == (1, True)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "file"}
    monkeypatch.setattr(cli, "base_model", read)
    assert run(capsys, *asked)[0] == 0
    merged = type(model).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-3, atol=1e-3)


def test_another_base(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Merged and converted where that is asked for, with a warning in this program's words."""
    model, file, other = trained(folder), tmp_path / "file", tmp_path / "other"
    save_adapter(model, file)
    moved = base(folder)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    moved.save_pretrained(other)
    for command in (("merge",), ("convert", "--to", "fused"), ("convert", "--to", "peft-lora")):
        out = tmp_path / "-".join(command)
        rest = (file, out, "--base", other, "--on-other-base", "warn")
        code, _, error = run(capsys, *command, *rest)
        assert code == 0, error
        assert "another base model" in error
        assert "as --on-other-base warn asks" in error
    loaded = load_adapter(base(other), tmp_path / "convert---to-fused", progress=False)
    unload(loaded, merge=True)
    merged = base(tmp_path / "merge")
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)
