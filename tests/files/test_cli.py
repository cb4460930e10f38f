"""The command line: inspect, convert and merge, and what they refuse."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch, tiny
from cli_cases import SETTINGS, base, close, run, trained
from cli_cases import folder as folder
from official_cases import settings, state_of, write
from safetensors.torch import load_file
from torch import Tensor, nn

from fused_lowrank import (
    AdapterBank,
    export_lora,
    load_adapter,
    load_official_lora_xs,
    save_adapter,
)
from fused_lowrank.files.cli import main


def logits(model: nn.Module) -> Tensor:
    """Of the same input at every call."""
    torch.manual_seed(9)
    inputs = batch("llama", 7)
    del inputs["labels"]
    with torch.no_grad():
        return model(**inputs).logits


def checkpoint(folder: Path, where: Path) -> Path:
    """A checkpoint of the LoRA-XS authors' code."""
    model = base(folder)
    names = [n for n, _ in model.named_modules() if n.endswith("_proj")]
    torch.manual_seed(4)
    return write(where, state_of(model, names, 4), settings(4, 8))


def rows(out: str) -> dict[str, str]:
    """What inspect printed."""
    pairs = [line.split(maxsplit=1) for line in out.splitlines()]
    return {name: value.strip() for name, value in pairs}


# --- inspect ---


def test_inspect_an_adapter(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """What it holds, with the frozen factors or without."""
    model, file = trained(folder, "lora_mini", modules_to_save=["lm_head"]), tmp_path / "file"
    save_adapter(model, file)
    code, out, _ = run(capsys, "inspect", file)
    found = rows(out)
    assert code == 0
    assert found["kind"] == "adapter of fused_lowrank, by save_adapter"
    assert found["method"] == "lora_mini"
    assert found["layers"].startswith("14: model.layers.0.self_attn.q_proj, ")
    assert (found["r"], found["a"], found["b"], found["scale"]) == ("2", "6", "4", "1.5")
    assert found["trained"] == f"a_train float32, b_train float32; {14 * 2 * 10} numbers"
    assert found["frozen"] == "down float32, up float32"
    assert found["whole"] == "lm_head"
    assert found["size"] == f"{file.stat().st_size:,} bytes"
    save_adapter(trained(folder), file, bases=False)
    found = rows(run(capsys, "inspect", file)[1])
    assert found["frozen"] == "down not inside, up not inside"
    assert "whole" not in found


def bank_file(folder: Path, file: Path, names: list[str], method: str = "lora_xs") -> Path:
    """A bank of adapters, the i-th with seed i."""
    model = trained(folder, method)
    bank = AdapterBank.from_model(model, slots=len(names))
    for seed, name in enumerate(names):
        bank.add(name, trained(folder, method, seed, alpha=seed + 1.0))
    bank.save(file)
    return file


def test_inspect_a_bank(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """How many adapters, and the first names, whatever is in them."""
    names = ["a\nb", "\ud800", "c", "d", "e", "f"]
    found = rows(run(capsys, "inspect", bank_file(folder, tmp_path / "bank", names))[1])
    assert found["kind"] == "bank of fused_lowrank, by AdapterBank.save"
    assert found["adapters"] == r"6: 'a\nb', '\ud800', 'c', 'd', 'e', …"
    assert (found["r"], found["cores"]) == ("4", "F32")
    assert "scale" not in found


def test_inspect_other_folders(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Plain LoRA, and the authors' checkpoints."""
    found = rows(run(capsys, "inspect", checkpoint(folder, tmp_path / "theirs"))[1])
    assert found["kind"] == "LoRA-XS checkpoint of the authors' code"
    assert (found["method"], found["r"], found["scale"]) == ("lora_xs", "4", "2")
    assert found["layers"].startswith("14: ")
    export_lora(trained(folder), tmp_path / "lora")
    found = rows(run(capsys, "inspect", tmp_path / "lora")[1])
    assert found["kind"] == "plain LoRA in PEFT's format"
    assert (found["method"], found["r"], found["scale"]) == ("lora", "4", "0.75")
    assert (found["trained"][:28], found["settings"]) == ("down float32, up float32; 3,", "none")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    assert rows(run(capsys, "inspect", tmp_path / "lora")[1])["settings"] == "use_dora"


# --- convert ---


@pytest.mark.parametrize("method", SETTINGS)
def test_convert_to_lora(method: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Without the base model, what export_lora writes of the file."""
    model, file = trained(folder, method), tmp_path / "file"
    save_adapter(model, file)
    assert run(capsys, "convert", file, tmp_path / "lora", "--to", "peft-lora") == (0, "", "")
    export_lora(file, tmp_path / "expected")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "lora" / name).read_bytes() == (
            tmp_path / "expected" / name
        ).read_bytes()
    peft = pytest.importorskip("peft")
    close(logits(peft.PeftModel.from_pretrained(base(folder), tmp_path / "lora")), logits(model))


def test_convert_what_needs_the_base(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """A file without frozen factors: only with its base, and the error says so.

    In float64, in which SVDs of the same weight are alike: their bits may depend on where it lies.
    """
    base(folder, torch.float64).save_pretrained(tmp_path / "base")
    folder = tmp_path / "base"
    model, file = trained(folder, dtype=torch.float64), tmp_path / "file"
    save_adapter(model, file, bases=False)
    asked = ("convert", file, tmp_path / "lora", "--to", "peft-lora")
    code, _, error = run(capsys, *asked)
    assert (code, "give its base model by --base" in error) == (1, True)
    assert not (tmp_path / "lora").exists()
    assert run(capsys, *asked, "--base", folder) == (0, "", "")
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    export_lora(model, tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in expected.values()} == {torch.float64}
    torch.testing.assert_close(written, expected, rtol=1e-9, atol=1e-9)


def test_convert_an_official_checkpoint(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """To plain LoRA without the base, to a file of ours with it."""
    theirs = checkpoint(folder, tmp_path / "theirs")
    expected = logits(load_official_lora_xs(base(folder), theirs, progress=False))
    assert run(capsys, "convert", theirs, tmp_path / "lora", "--to", "peft-lora")[0] == 0
    peft = pytest.importorskip("peft")
    close(logits(peft.PeftModel.from_pretrained(base(folder), tmp_path / "lora")), expected)
    asked = ("convert", theirs, tmp_path / "ours", "--to", "fused")
    code, _, error = run(capsys, *asked)
    assert (code, "--to fused needs --base" in error) == (1, True)
    assert run(capsys, *asked, "--base", folder)[0] == 0
    close(logits(load_adapter(base(folder), tmp_path / "ours", progress=False)), expected)


@pytest.mark.parametrize("to", ["fused", "peft-lora"])
def test_convert_one_of_a_bank(to: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    """The named one, of its own alpha."""
    file = bank_file(folder, tmp_path / "bank", ["a", "b"])
    asked = ("convert", file, tmp_path / "out", "--to", to, "--base", folder)
    assert "holds 2 adapters: say which by --name" in run(capsys, *asked)[2]
    assert "no adapter called 'z'" in run(capsys, *asked, "--name", "z")[2]
    assert "give its base" in run(capsys, *asked[:5], "--name", "b")[2] or to == "fused"
    assert run(capsys, *asked, "--name", "b") == (0, "", "")
    if to == "fused":
        model = load_adapter(base(folder), tmp_path / "out", progress=False)
    else:
        peft = pytest.importorskip("peft")
        model = peft.PeftModel.from_pretrained(base(folder), tmp_path / "out")
    close(logits(model), logits(trained(folder, seed=1, alpha=2.0)))


# --- errors ---


def test_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """One line on stderr, exit code 1, and nothing written."""
    model, file, out = trained(folder), tmp_path / "file", tmp_path / "out"
    save_adapter(model, file)
    export_lora(model, tmp_path / "lora")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-9])
    (tmp_path / "empty").mkdir()
    mini = bank_file(folder, tmp_path / "mini", ["a"], "lora_mini")
    other = tmp_path / "other"
    torch.manual_seed(8)
    tiny("llama").save_pretrained(other)
    to, on = ("--to", "peft-lora"), ("--base", folder)
    cases = [
        (("inspect", tmp_path / "nothing"), "there is no such file or folder"),
        (("inspect", tmp_path / "cut"), "is truncated"),
        (("inspect", tmp_path / "empty"), "has none of adapter_model.safetensors"),
        (("inspect", folder), "A model's own weights, merged or not, are no adapter"),
        (("inspect", folder / "model.safetensors"), "has no adapter_config.json beside it"),
        (("convert", file, file, *to), "exists already"),
        (("convert", tmp_path / "lora", out, *to), "is plain LoRA already"),
        (("convert", file, out, *to, "--name", "a"), "holds one adapter: leave --name out"),
        (("convert", tmp_path / "cut", out, *to), "is truncated"),
        (("convert", file, out, *to, "--base", tmp_path), "has no config.json"),
        (("convert", mini, out, *to, "--name", "a", *on), "is of lora_mini"),
        (("merge", file, out, "--base", other), "was made for another base model"),
        (("merge", file, out, "--base", other), "--on-other-base warn takes it all the same"),
        (("merge", tmp_path / "lora", out, *on), "is plain LoRA already"),
        (("convert", tmp_path / "lora", out, "--to", "fused", *on), "fuse_lora"),
    ]
    before = {path.name for path in tmp_path.iterdir()}
    for arguments, message in cases:
        code, printed, error = run(capsys, *arguments)
        assert (code, printed) == (1, ""), arguments
        assert error.startswith("fused-lowrank: error: "), arguments
        assert "\n" not in error
        assert message in error
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("inspect",),
        ("convert", "a", "b"),
        ("convert", "a", "b", "--to", "gguf"),
        ("merge", "a", "b"),
        ("merge", "a", "b", "--base", "c", "--on-other-base", "ignore"),
    ],
)
def test_usage(arguments: tuple[str, ...], capsys: Any) -> None:
    """Wrong arguments: how it is used, and exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: fused-lowrank" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "convert", "merge"])
def test_help(command: str, capsys: Any) -> None:
    """Each command has an example that it understands."""
    from fused_lowrank.files.cli import parser

    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    example = out.rpartition("example: fused-lowrank ")[2]
    assert example.startswith(command)
    assert parser().parse_args(example.split()).source == Path("a.safetensors")


def test_without_transformers(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """What is missing, and how to get it."""
    save_adapter(trained(folder), tmp_path / "file")
    monkeypatch.setitem(sys.modules, "transformers", None)
    asked = ("merge", tmp_path / "file", tmp_path / "out", "--base", folder)
    code, _, error = run(capsys, *asked)
    assert (code, "pip install transformers" in error) == (1, True)


def test_as_a_program(tmp_path: Path) -> None:
    """The exit code is that of main."""
    program = [
        sys.executable,
        "-m",
        "fused_lowrank.files.cli",
        "inspect",
        str(tmp_path / "nothing"),
    ]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fused-lowrank: error: ")
    assert "no such file" in done.stderr
