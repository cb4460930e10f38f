"""The compile gate on a few kernels, and on faults that it must find.

The gate compiles; this process interprets (TRITON_INTERPRET=1), so it runs in another.
"""

import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

import gate
import gate_digest_faults
import gate_faults

FOUND = {**vars(gate_faults), **vars(gate_digest_faults)}
CHECKS = {name: check for name, check in FOUND.items() if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_check(beside: ProcessPoolExecutor, name: str) -> None:
    beside.submit(gate_faults.run, CHECKS[name]).result(600)


@pytest.mark.cpu("who interprets")
def test_the_gate_refuses_to_run_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gate.py"])
    with pytest.raises(SystemExit, match="TRITON_INTERPRET"):
        gate.main()
