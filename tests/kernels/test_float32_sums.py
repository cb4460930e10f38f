"""Sums of float32 along K, in the order of a compiled kernel: blocks of K apart, not one chain."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton

from fused_lowrank.compute import devices
from fused_lowrank.kernels import decode as decode_module
from fused_lowrank.kernels import shrink as shrink_module
from fused_lowrank.kernels.core_grad import core_grad
from fused_lowrank.kernels.gemm_tail import gemm_tail
from fused_lowrank.kernels.tile_choice import select

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="a GPU has the order that is emulated here"
)
K = 1024
BELOW = 0.5  # of the error of one chain; √(1/BLOCK_K + BLOCK_K/K) is expected: 0.28 for 16


def chain(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    """start + a·b as FFMA sums it: along the inner side, one after the other."""
    total = start.astype(np.float32)
    for k in range(a.shape[1]):
        step = a[:, k : k + 1].astype(np.float64) * b[k : k + 1].astype(np.float64)
        total = (step + total).astype(np.float32)
    return total


@pytest.fixture
def compiled_order(monkeypatch) -> None:
    """Products of float32 by the interpreter have the order of those on a GPU."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *how):
        if a.data.dtype != np.float32:
            return original(self, a, b, d, *how)
        return TensorHandle(chain(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def error(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """That of a·b, against float64, in units of what one chain along its inner side has."""
    truth = a.double() @ b.double()
    one = torch.from_numpy(chain(a.numpy(), b.numpy(), np.zeros(truth.shape, np.float32)))
    return float((found.double() - truth).norm() / (one.double() - truth).norm())


def check(ours: Callable[..., dict[str, torch.Tensor]], monkeypatch) -> None:
    """Each result of a kernel, which gets x, W and down; K is not split over programs."""
    for module in (shrink_module, decode_module):
        monkeypatch.setattr(module, "splits", lambda *_: 1)
    x, weight, down = (torch.randn(rows, K) for rows in (24, 40, 16))
    results = ours(x, weight, down, devices.tiles(x.device))
    expected = {"t": (x, down.t()), "y": (x, weight.t())}
    errors = {name: error(result, *expected[name]) for name, result in results.items()}
    assert errors
    assert max(errors.values()) < BELOW, errors


def test_one_chain_is_what_errors_are_measured_by() -> None:
    """The emulation sees a kernel that adds each block to the chain of those before it."""
    a, b = torch.randn(24, K), torch.randn(K, 40)
    total = np.zeros((24, 40), np.float32)
    for k in range(0, K, 16):
        total = chain(a[:, k : k + 16].numpy(), b[k : k + 16].numpy(), total)
    assert error(torch.from_numpy(total), a, b) == 1.0


@pytest.mark.parametrize("transposed", [False, True])
def test_shrink(transposed: bool, compiled_order, monkeypatch) -> None:
    def ours(x, weight, down, choose):
        down = down.t().contiguous() if transposed else down
        t, _ = shrink_module.shrink(x, down, None, 1.0, transposed, True, False, None, choose)
        return {"t": t}

    check(ours, monkeypatch)


def test_decode(compiled_order, monkeypatch) -> None:
    """y without a low-rank part: up is zero."""

    def ours(x, weight, down, choose):
        up = torch.zeros(40, 16)
        y, t = decode_module.decode(x, weight, down, None, up, None, 1.0, False, True, choose)
        return {"y": y, "t": t}

    check(ours, monkeypatch)


def test_gemm_tail(compiled_order, monkeypatch) -> None:
    def ours(x, weight, down, choose):
        return {"y": gemm_tail(x, weight, None, None, None, False, None, choose)}

    check(ours, monkeypatch)


def test_core_grad(compiled_order) -> None:
    """Its long side are the rows."""
    t, g = torch.randn(256, 16), torch.randn(256, 32)  # of one program
    dcore, _ = core_grad(t, g, torch.empty(16, 32), 1.0, (True, True), devices.tiles(t.device))
    assert error(dcore, t.t(), g) < BELOW


def test_a_block_of_float32_is_short() -> None:
    """In every tile that float32 takes: blocks of 16 or 32, whatever the device."""
    from fused_lowrank.kernels.tiles import TARGETS, Spec

    for target in TARGETS.values():
        for kernel in ("shrink", "gemm_tail", "decode"):
            for aligned in (True, False):
                for pad in (16, 64, 256):
                    spec = Spec(kernel, 4, 4, aligned, pad, pad)
                    assert all(select(target, spec, m).block_k <= 32 for m in (1, 64, 8192))
