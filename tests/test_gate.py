"""The compile gate on a few kernels, and on faults that it must find.

The gate compiles; this process interprets (TRITON_INTERPRET=1), so it runs in another.
"""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

import gate_digest_faults
import gate_faults

HERE = Path(__file__).parent
FOUND = {**vars(gate_faults), **vars(gate_digest_faults)}
CHECKS = {name: check for name, check in FOUND.items() if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_check(beside: ProcessPoolExecutor, name: str) -> None:
    beside.submit(gate_faults.run, CHECKS[name]).result(600)


def test_the_gate_refuses_to_run_interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "gate.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "TRITON_INTERPRET" in done.stderr
