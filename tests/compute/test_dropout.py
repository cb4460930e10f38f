"""Dropout: the masks, the kernels' and torch's, and a call against the equation under its mask."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_lowrank import FusedLoraXSLinear, lowrank_linear
from fused_lowrank.compute import devices
from fused_lowrank.compute.dropout import Dropout
from fused_lowrank.compute.plans import PLANS
from fused_lowrank.compute.reference import lowrank_linear_reference
from fused_lowrank.kernels import shrink
from fused_lowrank.kernels.tiles import TileConfig
from fused_lowrank.testing import measure, pinned_tiles

IMPLS = ("triton", "aten")
SIGMAS = 7  # of a mean: a good mask has one of its thousand means beyond once in 10⁶ seeds


def mask(impl: str, seed: torch.Tensor, m: int, k: int, p: float) -> torch.Tensor:
    """What dropout keeps of an x (m, k)."""
    plan = PLANS["split" if impl == "triton" else "aten"]
    tiles = devices.tiles(seed.device) if plan.ours else None
    kept = plan.masked.run(torch.ones(m, k, device=seed.device), Dropout(seed, p), tiles)
    assert ((kept == 0) | (kept == 1)).all()
    return kept.bool()


def seeds(device: torch.device, *values: int) -> list[torch.Tensor]:
    """Seeds as a call draws them."""
    return [torch.tensor([value], device=device) for value in values]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_the_mask_is_random(p: float, impl: str, device: torch.device) -> None:
    """Its rate is 1 - p; rows, columns, neighbours and other seeds are independent of it."""
    size = 512
    one, other = (mask(impl, seed, size, size, p).float() for seed in seeds(device, 5, 2**61 + 5))
    sigma = math.sqrt(p * (1 - p))

    def near(value: torch.Tensor, expected: float, samples: int) -> bool:
        return bool((value - expected).abs().max() <= SIGMAS * sigma / math.sqrt(samples))

    assert near(one.mean(), 1 - p, size**2)
    for along in (0, 1):
        assert near(one.mean(along), 1 - p, size)
    centred, theirs = ((kept - (1 - p)) / sigma for kept in (one, other))
    for distance in (1, 2, 3, 4, 7, 8, 16, 32, 64):
        for pairs in (
            centred[:, distance:] * centred[:, :-distance],
            centred[distance:] * centred[:-distance],
        ):
            assert pairs.mean().abs() < SIGMAS / math.sqrt(pairs.numel())
    assert (centred * theirs).mean().abs() < SIGMAS / size


@pytest.mark.parametrize("impl", IMPLS)
def test_one_seed_gives_the_same_bits_again(impl: str, device: torch.device) -> None:
    """And another seed others."""
    one, other = seeds(device, 77, 78)
    first = mask(impl, one, 100, 90, 0.3)
    assert torch.equal(first, mask(impl, one, 100, 90, 0.3))
    second = mask(impl, other, 100, 90, 0.3)
    for shift in range(9):  # nor the same ones at another place
        same = (first.flatten()[shift:] == second.flatten()[: second.numel() - shift]).float()
        assert same.mean() < 0.7


def test_the_kernels_mask_depends_on_the_seed_and_the_place_alone(device: torch.device) -> None:
    """Whatever the size of x, hence its tile."""
    (seed,) = seeds(device, 77)
    first = mask("triton", seed, 100, 300, 0.3)
    assert torch.equal(first[:50, :40], mask("triton", seed, 50, 40, 0.3))


TILES = {
    "defaults": {},
    "small": {
        "shrink": TileConfig(16, 16, 16, 4, 1),
        "gemm_tail": TileConfig(16, 32, 16, 4, 1, group_m=2),
    },
    "split": {"shrink": TileConfig(16, 16, 16, 4, 1)},
    "persistent": {"gemm_tail": TileConfig(64, 64, 32, 4, 2, persistent=True)},
}


@pytest.mark.parametrize("core", ["core", "pair", "none"])
@pytest.mark.parametrize("tiles", [*TILES, "aten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_is_the_equation_under_the_mask(
    dtype: torch.dtype, tiles: str, core: str, device: torch.device, monkeypatch
) -> None:
    """Forward and backward see the same mask, and what is kept is scaled by 1 / (1 - p).

    Without a core down is trained: its gradient sees the mask as well.
    """
    impl = "aten" if tiles == "aten" else "triton"
    descriptors = dtype == torch.bfloat16 and devices.target(device).name in ("sm_90", "sm_100")
    if tiles == "persistent" and not descriptors:
        pytest.skip("tensor descriptors are for 16 bits on sm_90 and sm_100")
    # More than one tile each way, of which the last is a part.
    rows, k, n = (40, 56, 80) if tiles in ("small", "split") else (100, 112, 176)
    rank, p = 20, 0.25
    sizes = {"x": (rows, k), "weight": (n, k), "down": (rank, k), "up": (n, rank), "bias": (n,)}
    made = {name: torch.randn(s, device=device).to(dtype) for name, s in sizes.items()}
    for name in ("down", "up"):
        made[name] *= rank**-0.5
    parts = {"core": [(rank, rank)], "pair": [(rank, 3), (3, rank)], "none": []}[core]
    factors = tuple(torch.randn(s, device=device).requires_grad_() for s in parts)
    made["core"] = {"core": factors[:1], "pair": [factors], "none": [None]}[core][0]
    made["down"].requires_grad_(core == "none")
    made["x"].requires_grad_()
    (seed,) = seeds(device, 123456789)
    keep = mask(impl, seed, rows, k, p)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: seed)
    if tiles == "split":
        monkeypatch.setattr(shrink, "splits", lambda *_: 3)

    def under_mask(x, **rest):
        return lowrank_linear_reference(x, low=x * keep / (1 - p), scale=0.5, **rest)

    def ours(**operands):
        return lowrank_linear(**operands, scale=0.5, dropout_p=p, training=True, impl=impl)

    with pinned_tiles(**TILES.get(tiles, {})):
        errors = measure(ours, under_mask, made, torch.randn(rows, n, device=device))
    assert len(errors) == 2 + (len(factors) or 1)
    assert all(m.within for m in errors), [m for m in errors if not m.within]


def layer(
    impl: str,
    device: torch.device,
    dropout: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> FusedLoraXSLinear:
    """A layer whose dropout shows."""
    made = FusedLoraXSLinear(64, 48, r=8, dropout=dropout, device=device, dtype=dtype)
    made.impl = impl
    with torch.no_grad():
        made.core.normal_()
    return made


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_saved_of_m(impl: str, device: torch.device) -> None:
    """t, a bit for each element of x where the kernels drew it, the seed, and not x."""
    found: list[torch.Tensor] = []
    made = FusedLoraXSLinear(128, 48, r=8, dropout=0.3, device=device, impl=impl)
    x = torch.randn(70, 128, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        made(x)
    sizes = [(t.shape, t.untyped_storage().nbytes()) for t in found if 70 in t.shape]
    bits = [((70, 16), 70 * 128 / 8)] if impl == "triton" else []
    assert sizes == [*bits, ((70, 8), 70 * 8 * 4)]
    assert [t.shape for t in found].count((1,)) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_each_call_draws_from_the_generator(impl: str, device: torch.device) -> None:
    """Other calls, other masks; the generator's state decides; in evaluation there is none."""
    made, x = layer(impl, device), torch.randn(70, 64, device=device)
    torch.manual_seed(1)
    first, second = made(x), made(x)
    torch.manual_seed(1)
    assert torch.equal(first, made(x))
    assert not torch.equal(first, second)
    made.eval()
    whole = lowrank_linear(x, made.weight, made.down, made.core, made.up, made.bias, impl=impl)
    assert torch.equal(made(x), whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpointing_recomputes_under_the_same_mask(impl: str, device: torch.device) -> None:
    """Bit for bit the gradients of a call that kept what it needed."""
    made, x = layer(impl, device), torch.randn(70, 64, device=device, requires_grad=True)
    dy = torch.randn(70, 48, device=device)
    found = []
    for call in (made, lambda x: checkpoint(made, x, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(call(x), [x, made.core], dy))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_forward_and_backward_see_one_mask(impl: str, device: torch.device) -> None:
    """Without a bias y is linear in x under a mask, so that ⟨dy, y⟩ = ⟨dx, x⟩.

    An element of y or dx is off by the unit roundoff times the number of operations on its way,
    times the equation on absolute values, at most.
    """
    kernels = impl == "triton" and device.type == "cuda"
    dtype = torch.float32 if kernels else torch.float64  # which the interpreter takes, too
    made = layer(impl, device, 0.5, dtype)
    made.bias = None
    x = torch.randn(70, 64, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(70, 48, device=device, dtype=dtype)
    y = torch.compile(made, fullgraph=True)(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    factors = (made.weight, made.down, made.core, made.up)
    sizes = [tensor.detach().double().abs() for tensor in (x, *factors)]
    absolute = lowrank_linear_reference(*sizes, None, scale=abs(made.scale) / (1 - 0.5))
    operations = 64 + 48 + 2 * 8 + 8
    bound = 2 * operations * torch.finfo(dtype).eps / 2 * (dy.double().abs() * absolute).sum()
    apart = (dx.double() * x).sum() - (dy.double() * y).sum()
    assert apart.abs() <= bound
    assert not torch.allclose(y, made(x))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_call_takes_a_seed(impl: str, device: torch.device) -> None:
    """And draws none then: one seed gives one y, whatever the generator's state."""
    layer = FusedLoraXSLinear(16, 8, r=4, dropout=0.5, device=device)
    torch.nn.init.normal_(layer.core)
    x, (one, other) = torch.randn(20, 16, device=device), seeds(device, 5, 6)

    def y(seed: torch.Tensor) -> torch.Tensor:
        factors = layer.down, layer.core, layer.up
        return lowrank_linear(
            x, layer.weight, *factors, dropout_p=0.5, training=True, impl=impl, seed=seed
        )

    assert torch.equal(y(one), y(one))
    assert not torch.equal(y(one), y(other))


@pytest.mark.parametrize(
    "seed", [torch.zeros(1), torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int64)]
)
def test_a_seed_that_is_none(seed: torch.Tensor, device: torch.device) -> None:
    layer = FusedLoraXSLinear(16, 8, r=4, device=device)
    factors = layer.down, layer.core, layer.up
    with pytest.raises(ValueError, match=r"seed is .*: it must be \(1,\) of torch.int64"):
        lowrank_linear(torch.randn(2, 16, device=device), layer.weight, *factors, seed=seed)
