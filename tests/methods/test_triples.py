"""Singular triples: against the SVD of float64, of every kind of spectrum, and as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_lowrank.methods.initial import triples
from fused_lowrank.methods.initial.triples import leading, smallest
from fused_lowrank.methods.initial.values import svd_bases

N, K = 640, 576  # of more than 8·64 on either side: "krylov" is not exact there


def outliers() -> Tensor:
    """A weight as language models have them: noise, a tail that falls like a power, large lines."""
    weight = torch.randn(N, K) * 0.02 + spread(2 * torch.arange(1.0, 101) ** -0.5)
    weight[:, [5, 300]] *= 20
    weight[3] *= 10
    return weight


def spread(sigma: Tensor, n: int = N, k: int = K) -> Tensor:
    """A weight (n, k) with these singular values."""
    left, right = (torch.linalg.qr(torch.randn(side, len(sigma)))[0] for side in (n, k))
    return (left * sigma) @ right.t()


COUNT = torch.arange(1.0, K + 1)
WEIGHTS = {
    "random": lambda: torch.randn(N, K),
    "wide": lambda: torch.randn(K, N),
    "powers": lambda: spread(COUNT**-0.5),
    "slow powers": lambda: spread(COUNT**-0.3),
    "outliers": outliers,
    "steep": lambda: spread((-0.3 * COUNT).exp()),
    "rank 1": lambda: torch.ones(N, K),
    "zero": lambda: torch.zeros(N, K),
    "eye": lambda: torch.eye(N),
    "three rows": lambda: torch.cat([torch.randn(3, K), torch.zeros(N - 3, K)]),
    "one entry": lambda: torch.zeros(N, K).index_put((torch.tensor(5),) * 2, torch.tensor(3.0)),
    "unsampled": lambda: torch.randn(N, K) * (torch.arange(N)[:, None] % triples.SAMPLED > 0),
}
LOST = {"random": 4e-3, "wide": 4e-3, "unsampled": 4e-3, "outliers": 3e-4, "slow powers": 1e-4}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_krylov(kind: str, device: torch.device) -> None:
    """up is orthonormal, down = upᵀ·W, and what they have of W is nearly all that so many can.

    Where the spectrum is flat, as of a random matrix, some is missing: 0.4 % here. The 64th triple
    of "outliers" is in the noise.
    """
    weight = WEIGHTS[kind]().to(device)
    assert min(weight.shape) >= triples.NARROW * triples.RANKS
    best = torch.linalg.svdvals(weight.double()).square()
    for r in (16, 64):
        down, up = (factor.double() for factor in leading(weight, r))
        assert down.shape == (r, weight.shape[1])
        assert up.shape == (len(weight), r)
        torch.testing.assert_close(up.t() @ up, torch.eye(r).to(up), rtol=0, atol=4e-6)
        size = float(weight.norm())
        torch.testing.assert_close(up.t() @ weight.double(), down, rtol=0, atol=1e-5 * size)
        assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all()
        lost = best[:r].sum() - down.square().sum()
        assert lost <= LOST.get(kind, 1e-5) * best[:r].sum()


@pytest.mark.parametrize("way", triples.WAYS)
def test_lower_ranks_are_the_first_of_higher_ones(way: str, device: torch.device) -> None:
    """Bit for bit, within a multiple of 64; and the same every time."""
    weight = torch.randn(N, K, device=device)
    down, up = leading(weight, 64, way)
    for r in (1, 16, 17, 40):
        lower = leading(weight, r, way)
        assert torch.equal(lower[0], down[:r])
        assert torch.equal(lower[1], up[:, :r])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_krylov_of_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    """A weight in 16 bits is what it is in float32; one in float64 has factors in float64."""
    weight = spread(COUNT**-0.5).to(device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    found, expected = leading(weight, 16), leading(weight.to(wide), 16)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == wide
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_krylov_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is read in pieces that fit a cache, the last of which may be smaller."""
    weight = spread(COUNT**-0.5)
    down, up = leading(weight, 16)
    for cached in (1, 100 * K):
        monkeypatch.setattr(triples, "CACHED", cached)
        again = leading(weight, 16)
        torch.testing.assert_close(again[0], down, rtol=0, atol=1e-4)
        torch.testing.assert_close(again[1], up, rtol=0, atol=1e-4)


def test_randomized_is_as_it_was() -> None:
    """The bits of "randomized" make again what old files left out: they stay."""
    weight = torch.randn(300, 200)
    for r in (4, 70):
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(42)
            rank = min(-r // 64 * -64 + 10, 200)
            left, sigma, right = torch.svd_lowrank(weight, q=rank, niter=10)
        left = left[:, :r]
        sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
        down, up = svd_bases(weight, r, "randomized")
        assert torch.equal(down, sigma[:r, None] * right.t()[:r] * sign.t())
        assert torch.equal(up, left * sign)


def test_small_weights_are_exact() -> None:
    """Where the spaces would be most of the weight, "krylov" is the SVD."""
    weight = torch.randn(500, 384)
    for ours, exact in zip(leading(weight, 16), leading(weight, 16, "exact"), strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_smallest(shape: tuple[int, int], device: torch.device) -> None:
    """The smallest triples, and the leading ones of all the others, are the weight."""
    weight = torch.randn(shape, device=device)
    (down, up), (others, left) = smallest(weight, 6), leading(weight, 18, "exact")
    torch.testing.assert_close(up @ down + left @ others, weight, rtol=0, atol=1e-5)
    sigma = torch.linalg.svdvals(weight)
    torch.testing.assert_close(down.norm(dim=1), sigma[-6:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", triples.WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(way: str, value: float) -> None:
    """NaN or Inf anywhere in the weight is an error."""
    weight = torch.randn(N, K)
    weight[-1, -1] = value
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        leading(weight, 4, way)


def test_refuses() -> None:
    """Another way, and values whose squares are beyond float32, are errors."""
    with pytest.raises(ValueError, match=r"svd is 'fast'.*'krylov', 'exact', 'randomized'"):
        leading(torch.randn(4, 4), 2, "fast")
    with pytest.raises(ValueError, match="squares"):
        leading(torch.randn(N, K) * 1e25, 4)


def test_leaves_generators(device: torch.device) -> None:
    """No generator of torch's is moved, on whatever device."""
    weight = torch.randn(N, K, device=device)
    before = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    leading(weight, 20)
    smallest(weight, 2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(map(torch.equal, before[1], torch.cuda.get_rng_state_all()))
