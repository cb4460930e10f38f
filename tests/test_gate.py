"""The compile gate on a few kernels, and on faults that it must find.

The gate compiles; this process interprets (TRITON_INTERPRET=1), so it runs in another.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_sample_passes_and_every_fault_is_found():
    done = run(str(HERE / "gate_faults.py"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_gate_refuses_to_run_interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "gate.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "TRITON_INTERPRET" in done.stderr
