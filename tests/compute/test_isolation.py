"""Rows stay apart on a CPU whose library reads beyond them; most of it on a stand-in for one."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from leaking_library import leaking_library
from torch import nn

from fused_lowrank import (
    AdapterBank,
    FusedLoraXSLinear,
    disable_adapters,
    use_batch_invariance,
)
from fused_lowrank.compute import isolation

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _on_a_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("a GPU's library is no CPU's")


@pytest.fixture
def leaking():
    with leaking_library():
        yield


@pytest.mark.usefixtures("leaking")
def test_the_stand_in_leaks_as_was_seen() -> None:
    """A row whose neighbour is NaN becomes NaN, and so does the last one, by dtype and size."""
    for dtype, size, spoiled in ((BF16, 80, True), (BF16, 64, False), (torch.float16, 80, False)):
        x, weight = torch.ones(70, size, dtype=dtype), torch.ones(48, size, dtype=dtype)
        x[5] = torch.nan
        y = nn.functional.linear(x, weight)
        assert y[4].isnan().all() == spoiled
        assert y[69].isnan().all() == spoiled
        assert y[[3, 6, 68]].isfinite().all()


@pytest.mark.usefixtures("leaking")
def test_the_probe_finds_what_leaks() -> None:
    sizes = {1: 32, 17: 32, 32: 32, 33: 64, 80: 96, 256: 256}
    assert {size: isolation.readable(size, BF16) for size in sizes} == sizes
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert isolation.readable(17, dtype) == 17


def test_the_probe_pads_no_more_than_it_must() -> None:
    with leaking_library(unit=8):
        assert [isolation.readable(size, BF16) for size in (8, 17, 24)] == [8, 32, 24]
    with leaking_library(unit=128):
        assert [isolation.readable(size, BF16) for size in (33, 80, 200)] == [128, 128, 256]


def test_where_no_padding_helps_a_bank_is_refused() -> None:
    layer = FusedLoraXSLinear(80, 48, r=5, dtype=BF16)
    with leaking_library(unit=101), pytest.raises(RuntimeError, match="mix the rows of a batch"):
        AdapterBank.from_model(nn.Sequential(layer), slots=2)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1, 5, 17, 33, 80])
def test_padded_products_are_the_products(size: int, dtype: torch.dtype) -> None:
    """Of sums that are exact, so of the same bits, with gradients."""
    x, weight = (torch.randint(-4, 5, (rows, size)).to(dtype) for rows in (7, 19))
    bias, dy = (torch.randint(-4, 5, lead).to(dtype) for lead in ((19,), (7, 19)))
    results = []
    for linear in (nn.functional.linear, isolation.linear):
        leaf = x.clone().requires_grad_()
        with leaking_library() if linear is isolation.linear else contextlib.nullcontext():
            y = linear(leaf, weight, bias)
            results.append((y, *torch.autograd.grad(y, leaf, dy)))
    with leaking_library():
        more = isolation.add_matmul(bias.expand(7, 19).clone(), x, weight.t())
        results.append((more, results[0][1]))
        assert torch.equal(isolation.matmul(x, weight.t()) + bias, more)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def spoiled_rows(layer: FusedLoraXSLinear, names: list | None) -> set[int]:
    """The rows of y and dx, of 70, that NaN in row 5 reaches, with gradients and without."""
    model = nn.Sequential(layer)
    bank = AdapterBank.from_model(model, slots=2)
    bank.add("a")
    x, dy = torch.randn(70, 80).to(BF16), torch.randn(70, 48).to(BF16)
    x[5], dy[5] = torch.nan, torch.nan
    x.requires_grad_()
    with contextlib.nullcontext() if names == [] else bank.use(names):
        y = model(x)
        with torch.no_grad():
            again = model(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    bank.close()
    spoiled = y.isnan().any(1) | again.isnan().any(1) | dx.isnan().any(1)
    return set(spoiled.nonzero().flatten().tolist())


NAMES = {"mixed": ["a", None] * 35, "one": "a", "none": None, "outside": []}


@pytest.mark.usefixtures("leaking")
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("impl", ["auto", "aten", "reference", "triton"])
def test_a_banked_layer_keeps_rows_apart(impl: str, names: list | None) -> None:
    """With any names, and outside `use`; red without the padding."""
    layer = FusedLoraXSLinear.from_linear(nn.Linear(80, 48, dtype=BF16), r=5, dtype=BF16)
    layer.impl = impl
    assert spoiled_rows(layer, names) == {5}


@pytest.mark.usefixtures("leaking")
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("impl", ["auto", "aten", "reference"])
def test_without_the_padding_it_does_not(
    impl: str, names: list | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the tests above are of the padding."""
    monkeypatch.setattr(isolation, "readable", lambda size, dtype: size)
    isolation.mixes.cache_clear()
    layer = FusedLoraXSLinear.from_linear(nn.Linear(80, 48, dtype=BF16), r=5, dtype=BF16)
    layer.impl = impl
    assert spoiled_rows(layer, names) > {5}


@pytest.mark.usefixtures("leaking")
def test_under_autocast_products_are_in_its_dtype() -> None:
    """float32 parameters; the products leak all the same."""
    layer = FusedLoraXSLinear(80, 48, r=5)
    model = nn.Sequential(layer)
    bank = AdapterBank.from_model(model, slots=1)
    bank.add("a")
    x = torch.randn(70, 80)
    x[5] = torch.nan
    for names in (["a"] * 70, "a", None):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), bank.use(names):
            y = model(x)
        assert y.dtype == BF16
        assert y.isnan().any(1).nonzero().flatten().tolist() == [5]


@pytest.mark.usefixtures("leaking")
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_the_ops_of_a_compiled_graph_keep_rows_apart(names: list | None) -> None:
    """Called as a graph calls them."""
    layer = FusedLoraXSLinear.from_linear(nn.Linear(80, 48, dtype=BF16), r=5, dtype=BF16)
    layer.forward = lambda x: layer.computed_by.compiled(layer, x)
    assert spoiled_rows(layer, names) == {5}


@pytest.mark.usefixtures("leaking")
@pytest.mark.parametrize("rows", [1, 7])
def test_batch_invariance_keeps_rows_apart(rows: int) -> None:
    """Of a layer in no bank too: behind a row that is computed alone lies the next one."""
    layer = FusedLoraXSLinear(80, 48, r=5, dtype=BF16)
    layer.impl = "aten"
    x = torch.full((rows + 1, 80), torch.nan, dtype=BF16)
    x[:rows] = torch.randn(rows, 80)
    use_batch_invariance(True)
    try:
        leaf = x[:rows].requires_grad_()
        y = layer(leaf)
        (dx,) = torch.autograd.grad(y, leaf, torch.randn(rows, 48).to(BF16))
    finally:
        use_batch_invariance(False)
    assert y.isfinite().all()
    assert dx.isfinite().all()


@pytest.mark.usefixtures("leaking")
def test_other_layers_are_as_pytorchs_are() -> None:
    """One that is in no bank, or is disabled, has the bits of torch's own products."""
    linear = nn.Linear(80, 48, dtype=BF16)
    layer = FusedLoraXSLinear.from_linear(linear, r=5, dtype=BF16)
    x = torch.randn(70, 80).to(BF16)
    x[5] = torch.nan
    with torch.no_grad():
        assert set(layer(x).isnan().any(1).nonzero().flatten().tolist()) > {5}
        model = nn.Sequential(layer)
        AdapterBank.from_model(model, slots=1)
        with disable_adapters(model):
            assert torch.equal(layer(x).isnan(), linear(x).isnan())


def test_the_probe_is_of_the_cpu_whatever_the_default_device() -> None:
    """A model is often made within torch.device(…)."""
    layer = FusedLoraXSLinear(80, 48, r=5)
    isolation.mixes.cache_clear()
    isolation.readable.cache_clear()
    with torch.device("meta"):
        AdapterBank.from_model(nn.Sequential(layer), slots=2)
    assert isolation.readable(80, torch.float32) == 80


def test_float32_is_probed_again_where_its_products_change(monkeypatch) -> None:
    """In medium precision torch may take them in bfloat16."""
    x, asked = torch.randn(3, 80), []
    isolation.is_needed(x, (80,))
    monkeypatch.setattr(isolation, "leaks", lambda size, dtype: asked.append(size) or False)
    isolation.is_needed(x, (80,))
    assert not asked
    torch.set_float32_matmul_precision("medium")
    try:
        isolation.is_needed(x, (80,))
        assert asked == [80]
    finally:
        torch.set_float32_matmul_precision("highest")
        isolation.is_needed(x, (80,))


PROMISE = """
import torch
from torch import nn
from fused_lowrank import AdapterBank, FusedLoraXSLinear

torch.manual_seed(0)
for k, n, r in ((80, 48, 5), (33, 17, 1), (4096, 31, 17), (256, 64, 16)):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for impl in ("aten", "reference"):
            layer = FusedLoraXSLinear.from_linear(nn.Linear(k, n, dtype=dtype), r=r, dtype=dtype)
            layer.impl = impl
            model = nn.Sequential(layer)
            bank = AdapterBank.from_model(model, slots=2)
            bank.add("a")
            for rows in (1, 7, 70, 300):
                memory = torch.full((rows * k + 256,), torch.nan, dtype=dtype)
                x = memory[: rows * k].view(rows, k).normal_()
                dy = torch.randn(rows, n).to(dtype)
                for names in ([("a", None)[i % 2] for i in range(rows)], "a", None):
                    seen = []
                    for value in (1.0, torch.nan, torch.inf, -torch.inf):
                        x[1::2], dy[1::2] = value, value
                        leaf = x.detach().requires_grad_()
                        with bank.use(names):
                            y = model(leaf)
                        (dx,) = torch.autograd.grad(y, leaf, dy)
                        seen.append((y[::2].detach(), dx[::2]))
                    for others in seen:
                        assert all(map(torch.equal, seen[0], others)), (k, n, r, dtype, impl, rows)
                        assert all(part.isfinite().all() for part in others)
print("kept")
"""


def test_this_cpu_as_it_is() -> None:
    """The bank's promise in a process that pins nothing: whatever this CPU's library does."""
    pinned = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in pinned}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", PROMISE], env=environment, capture_output=True, text=True, cwd=root
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == "kept"
