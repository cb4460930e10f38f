"""Prepared launches are the ordinary ones: the same arguments, and the same bytes for the driver.

This process interprets (TRITON_INTERPRET=1), so the checks (prepared_checks.py) run in others: one
looks at what the function in C is called with, the other at what comes out of Triton's own, which
needs a compiler for C.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton

from fused_lowrank.kernels import launch

CHECKS = Path(__file__).parents[1] / "support" / "prepared_checks.py"
TEXTS = [path.read_text() for path in (CHECKS, CHECKS.with_name("prepared_moment_checks.py"))]
NAMES = [name for text in TEXTS for name in re.findall(r"^def (check_\w+)", text, re.MULTILINE)]
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
HAS_C = shutil.which("gcc") and Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.fixture(
    scope="module",
    params=[
        # The stub's function in C is called as Triton's is from 3.7 on.
        pytest.param("arguments", marks=pytest.mark.skipif(VERSION < (3, 7), reason="3.7's")),
        pytest.param("bytes", marks=pytest.mark.skipif(not HAS_C, reason="no gcc, or no Python.h")),
    ],
)
def done(request) -> subprocess.CompletedProcess:
    """The checks that are asked for, in a process where Triton compiles."""
    found = (getattr(item, "callspec", None) for item in request.session.items)
    asked = {call.params["name"] for call in found if call and "done" in call.params}
    return subprocess.run(
        [sys.executable, str(CHECKS), request.param, *sorted(asked)],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("name", NAMES)
def test_check(name: str, done: subprocess.CompletedProcess) -> None:
    assert f"{name} passed" in done.stdout.splitlines(), done.stdout + done.stderr


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled here")
def test_nothing_is_prepared_in_the_interpreter() -> None:
    assert launch.key_of("shrink", ()) == (None, [])
    assert not launch.LAUNCHES


def test_each_operand_that_is_unaligned_makes_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel asks it of some of them, and not of the same ones as another kernel."""
    monkeypatch.setattr(launch, "POSSIBLE", True)

    def key(unaligned: int) -> object:
        made = [torch.empty(72, dtype=torch.float32) for _ in range(4)]
        assert all(tensor.data_ptr() % 16 == 0 for tensor in made)
        views = [tensor[int(i == unaligned) :][:64].view(8, 8) for i, tensor in enumerate(made)]
        return launch.key_of("kernel", views, None)[0]

    assert len({key(i) for i in (-1, 0, 1, 2, 3)}) == 5
    assert key(2) == key(2)


@pytest.mark.parametrize("inductors", [True, False])
def test_new_tensors_are_as_torch_makes_them(
    inductors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the function of Inductor's code, and on a device that has none."""
    if not inductors:
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    make = launch.maker(torch.device("cpu"))
    assert (make is getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)) == inductors
    for shape in ((3, 5), (2, 3, 4), (7,), (0, 4), (4, 0), (1, 1)):
        for dtype in (torch.bfloat16, torch.float32, torch.uint8):
            made, like = make(*launch.layout(shape, dtype)), torch.empty(shape, dtype=dtype)
            assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), dtype)
            assert made.device == like.device
            assert not made.requires_grad
    with torch.inference_mode():
        assert make(*launch.layout((2, 2), torch.float32)).is_inference()
