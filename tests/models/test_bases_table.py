"""The table of quantised bases, docs/bases.md, is what comes of trying; and trying can fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

for package in ("bitsandbytes", "torchao", "peft"):
    pytest.importorskip(package)
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """docs/bases_table.py; it finds its sibling as it does when run as a script."""
    spec = importlib.util.spec_from_file_location("bases_table", DOCS / "bases_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = [*sys.path]
    sys.path.insert(0, str(DOCS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


@pytest.mark.cpu("bitsandbytes and torchao as they are there")
def test_the_table_is_what_comes_of_trying(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever changes what a base can do runs python docs/bases_table.py."""
    assert script.main(["--check"]) == 0, capsys.readouterr().err


def wrong(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Any) -> None:
    """Have a function return something else."""
    own = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(own(*args, **kwargs)))


@pytest.mark.parametrize("use", ["forward", "gradients", "disable", "bank"])
def test_a_wrong_result_is_no_cell(
    script: ModuleType, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error, and no table is made."""
    from fused_lowrank.bank import layer
    from fused_lowrank.compute.base.fourbit import FourBit

    owner, name = {"gradients": (FourBit, "back"), "bank": (layer, "over_base")}.get(
        use, (FourBit, "product")
    )
    wrong(monkeypatch, owner, name, lambda found: found * 1.01)
    with pytest.raises((RuntimeError, AssertionError)):
        script.tried(["nf4"], ["lora_xs"], [use])


def test_what_is_refused_is_said(script: ModuleType) -> None:
    """In the words of the error, once for all that it is said of."""
    found = script.tried(["nf4", "opaque"], ["lora", "lora_xs"], ["bank"])
    assert script.cell(found, "nf4", "bank", ["lora", "lora_xs"]) == "LoRA-XS"
    ((use, methods, bases, why),) = script.refusals(found)
    assert (use, methods, bases) == ("bank", "LoRA", "all")
    assert why.startswith(
        "`first` (lora) trains down, up, which adapters in a bank share: adapt by"
    )


def test_a_changed_table_is_seen(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--check compares, and writes nothing."""
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "text", lambda: "one")
    assert script.main(["--check"]) == 1
    assert not [*(tmp_path / "docs").iterdir()]
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0
