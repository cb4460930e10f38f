"""use_batch_invariance: a row's bits in batches of any size."""

import pytest
import torch

from fused_lowrank import (
    AdapterBank,
    FusedLoraMiniLinear,
    FusedLoraXSLinear,
    use_batch_invariance,
)
from fused_lowrank.compute import devices
from fused_lowrank.kernels.tiles import Spec

SIZES = (1, 3, 17, 64, 70)


@pytest.fixture
def invariant():
    use_batch_invariance(True)
    yield
    use_batch_invariance(False)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.int32 if tensor.itemsize == 4 else torch.int16)


@pytest.mark.usefixtures("invariant")
@pytest.mark.parametrize("banked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_row_has_the_same_bits_in_a_batch_of_any_size(
    impl: str, method: str, dtype: torch.dtype, banked: bool, device: torch.device
) -> None:
    """y and dx; K is deep enough to be split where there are few rows."""
    linear = torch.nn.Linear(640, 48, device=device, dtype=dtype)
    if method == "lora_xs":
        layer = FusedLoraXSLinear.from_linear(linear, r=8)
    else:
        layer = FusedLoraMiniLinear.from_linear(linear, r=2, a=16, b=16, init="paper")
    layer.impl = impl
    model = torch.nn.Sequential(layer)
    x = torch.randn(max(SIZES), 640, device=device).to(dtype)
    dy = torch.randn(max(SIZES), 48, device=device).to(dtype)
    if banked:
        bank = AdapterBank.from_model(model, slots=3)
        for name in "abc":
            bank.add(name)
    seen = {}
    for size in SIZES:
        rows = x[:size].clone().requires_grad_()
        if banked:
            with bank.use([(None, "a", "b", "c")[i % 4] for i in range(size)]):
                y = model(rows)
        else:
            y = model(rows)
        (dx,) = torch.autograd.grad(y, rows, dy[:size])
        for i in range(size):
            now = bits(y[i]), bits(dx[i])
            before = seen.setdefault(i, now)
            assert torch.equal(before[0], now[0])
            assert torch.equal(before[1], now[1])


def test_without_it_shapes_may_change_the_bits(device: torch.device) -> None:
    """Otherwise the switch would be for nothing."""
    layer = FusedLoraXSLinear(2048, 32, r=8, device=device)
    layer.impl = "triton"
    x = torch.randn(70, 2048, device=device)
    torch.nn.init.normal_(layer.core)  # t is summed over K in parts, as many as few rows need
    with torch.no_grad():
        assert not torch.equal(bits(layer(x)[:3]), bits(layer(x[:3])))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kernel", ["shrink", "gemm_tail"])
def test_tiles_do_not_follow_the_rows(kernel: str, itemsize: int, device: torch.device) -> None:
    """And K is not split over programs."""
    choose = devices.tiles(device, "fixed")
    spec = Spec(kernel, itemsize, itemsize, True, 16, 16, n=4096)
    tiles = {choose(spec, rows) for rows in (1, 64, 65, 128, 256, 512, 1024, 8192)}
    assert len(tiles) == 1
    assert kernel == "gemm_tail" or tiles.pop().whole_k
