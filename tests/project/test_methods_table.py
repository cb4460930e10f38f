"""The tables of the methods, in the README and docs/methods.md, are what the methods give today."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("peft")
SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "methods_table.py"


@pytest.mark.cpu("the kernels in Triton's interpreter")
def test_the_tables_are_what_the_methods_give(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever changes a method runs python docs/methods_table.py."""
    spec = importlib.util.spec_from_file_location("methods_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(["--check"]) == 0, capsys.readouterr().err
