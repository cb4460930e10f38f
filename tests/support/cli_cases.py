"""Models in folders, and runs of the command line over them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import targets, tiny
from torch import Tensor, nn

from fused_lowrank import (
    adapt,
)
from fused_lowrank.files.cli import main

transformers = pytest.importorskip("transformers")


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora_xs": {"r": 4},
    "lora_mini": {"r": 2, "a": 6, "b": 4},
}


# What lies in a base model's folder and is no weight of it.
REST = [
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
    *("2_Dense/config.json", "2_Dense/model.safetensors", "normalizer.json", "tekken.json"),
    *("tokenizer.model", "modeling_own.py", "README.md", "LICENSE", "chat_templates/a.jinja"),
]


# Its weights in other formats, and what is no part of it.
WEIGHTS = [
    *("pytorch_model-1.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack"),
    *("onnx/model.onnx", "original/consolidated.00.pth", ".cache/lock"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, as transformers saves it, with a tokenizer's files."""
    folder = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(3)
    tiny("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    for name in REST:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("1")
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    for name in WEIGHTS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("0")
    return folder


def base(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base model."""
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def trained(
    folder: Path,
    method: str = "lora_xs",
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    **keywords: Any,
) -> nn.Module:
    """The base model with an adapter."""
    settings = {"alpha": 3.0, "target_modules": targets("llama"), **SETTINGS[method], **keywords}
    torch.manual_seed(0)  # of LoRA-Mini's frozen factors
    model = adapt(base(folder, dtype), method, progress=False, **settings)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of operations in float32."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """(exit code, what is on stdout, the lines of this program on stderr)."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    own = [line for line in re.split(r"[\r\n]+", err) if line.startswith("fused-lowrank:")]
    return code, out, "\n".join(own)
