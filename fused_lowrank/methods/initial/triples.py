"""Singular triples of a weight: the leading ones, exactly or nearly so, and the smallest.

With W (N, K) = S·Σ·Dᵀ, `up` is columns of S, (N, r), and `down` = upᵀ·W = Σ·Dᵀ, (r, K). Ranks that
share a multiple of 64 share their triples: those of a lower rank are the first of a higher one.

"krylov"      block Krylov spaces (Musco and Musco 2015, arXiv 1504.05477), see `krylov`
"exact"       torch.linalg.svd
"randomized"  torch.svd_lowrank (Halko et al. 2011), 10 iterations, seed 42, as LoRA-XS's authors do
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.linalg import qr

from ...compute.base.protocol import dense

WAYS = ("krylov", "exact", "randomized")
SEED = 42
ITERATIONS = 10  # of "randomized", as is the next
OVERSAMPLING = 10
RANKS = 64  # r is rounded up to a multiple
NARROW = 8  # "krylov" is exact where the matrix has fewer than 8 times the triples that are wanted
FIRST = 16, 8  # triples that are found first, and the blocks of as many vectors that they take
MORE = 5  # blocks for those that follow, up to each multiple of 64
SAMPLED = 8  # one row of so many is in the sketch that the first block is made of
CACHED = 2**19  # elements of the weight that a CPU has in its cache, in float32


@torch.no_grad()
def leading(
    weight: Tensor, r: int, way: str = "krylov", seed: int = SEED, times: int = 1
) -> tuple[Tensor, Tensor]:
    """(down (r, K), up (N, r)) of the r leading triples, in float32 or wider.

    "krylov" takes `times` as many blocks: of noise, whose triples are nearly alike, twice as many
    hold what the best triples hold. The sign of each is fixed: the largest entry of each column of
    up is positive. torch's generators stay as they were.

    Raises ValueError for another way, and for a weight that holds NaN or Inf.
    """
    if way not in WAYS:
        raise ValueError(f"svd is {way!r}: it must be one of {', '.join(map(repr, WAYS))}")
    weight = dense(weight)
    wanted = min(-r // RANKS * -RANKS, *weight.shape)
    if way == "krylov" and NARROW * wanted <= min(weight.shape):
        down, up = krylov(weight, r, seed, times)
    elif way == "randomized":
        down, up = randomized(finite(weight), wanted, seed)
    else:
        up, sigma, right = torch.linalg.svd(finite(weight), full_matrices=False)
        down = sigma[:, None] * right
    return signed(down[:r], up[:, :r])


@torch.no_grad()
def smallest(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """`leading`, of the r smallest triples of the min(N, K) that there are, by torch.linalg.svd."""
    up, sigma, right = torch.linalg.svd(finite(weight), full_matrices=False)
    return signed(sigma[-r:, None] * right[-r:], up[:, -r:])


def signed(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The triples, each with the sign that makes the largest entry of up's column positive."""
    sign = up.gather(0, up.abs().argmax(0, keepdim=True)).sign()
    sign[sign == 0] = 1
    return down * sign.t(), (up * sign).contiguous()


def wide(weight: Tensor) -> torch.dtype:
    """The dtype that triples are computed in."""
    return torch.promote_types(weight.dtype, torch.float32)


def finite(weight: Tensor) -> Tensor:
    """The weight in float32 or wider; ValueError if it holds NaN or Inf."""
    weight = dense(weight)
    require_finite(weight)
    return weight.to(wide(weight))


def require_finite(weight: Tensor) -> None:
    """Raise ValueError for a weight that holds NaN or Inf."""
    if not weight.isfinite().all():
        raise ValueError("the weight holds NaN or Inf: no factors can be taken from it")


def randomized(
    matrix: Tensor, rank: int, seed: int, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor]:
    """(down, up) of rank triples and 10 more, by torch.svd_lowrank.

    The generator of the matrix's device is put back.
    """
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        generator_of(matrix.device).manual_seed(seed)
        rank = min(rank + OVERSAMPLING, *matrix.shape)
        left, sigma, right = torch.svd_lowrank(matrix, q=rank, niter=iterations)
    return sigma[:, None] * right.t(), left


def generator_of(device: torch.device) -> torch.Generator:
    """The one generator of `device`; torch.manual_seed would seed those of every device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


# --- block Krylov spaces ---


def krylov(weight: Tensor, r: int, seed: int, times: int = 1) -> tuple[Tensor, Tensor]:
    """(down, up) of at least r triples, from W times the spaces of [Q, WᵀW·Q, (WᵀW)²·Q, …].

    The first 16 come of a space of their own, and those up to each multiple of 64 of another, of
    what W is beside all before, which begins with what was left there: so a small rank costs
    little, and its triples are the first of any higher one. The first Q is a random sketch of some
    rows of W, with a little of all directions in it.
    """
    (n, k), dtype = weight.shape, wide(weight)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
        return drawn.to(weight.device)

    some = weight[::SAMPLED].to(dtype)
    sketch = (normal(FIRST[0], len(some)) @ some).t()
    everywhere = normal(k, FIRST[0]) * (0.01 * sketch.abs().amax())
    start = orthonormal(sketch + everywhere, sketch.new_empty(k, 0), normal)
    down, up = sketch.new_empty(0, k), sketch.new_empty(n, 0)
    down, up, rest = grown(weight, start, times * FIRST[1], down, up, normal)
    while len(down) < r:
        count = RANKS - len(down) % RANKS
        down, up, rest = grown(weight, rest[:, :count], times * MORE, down, up, normal)
    return down, up


def grown(
    weight: Tensor,
    start: Tensor,
    blocks: int,
    down: Tensor,
    up: Tensor,
    normal: Callable[..., Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """down and up with the best triples of one more space, and an orthonormal basis of its rest.

    `start` (K, B) is orthonormal; B triples are added. The rest (K, …) has the best first.
    """
    k, size = start.shape
    basis = start.new_empty(k, blocks * size)
    images = start.new_empty(len(weight), blocks * size)
    for i in range(blocks):
        used = (i + 1) * size
        basis[:, used - size : used] = start
        image = images[:, used - size : used]
        further = products(weight, start, image, down, up, last=i == blocks - 1)
        if further is not None:
            start = orthonormal(further, basis[:, :used], normal)
    squares = images.t() @ images
    if not squares.isfinite().all():
        require_finite(weight)
        raise ValueError("the squares of its singular values are more than float32 holds")
    _, vectors = torch.linalg.eigh(squares.double())
    vectors = vectors.flip(1).to(start.dtype)
    more = orthonormal(images @ vectors[:, :size], up, normal)
    across = start.new_zeros(size, k)
    for rows, part in pieces(weight, start.dtype):
        across.addmm_(more[rows].t(), part)
    _, turn = torch.linalg.eigh(across.double() @ across.double().t())
    turn = turn.flip(1).to(start.dtype)
    down, up = torch.cat([down, turn.t() @ across]), torch.cat([up, more @ turn], 1)
    return down, up, basis @ vectors[:, size:]


def products(
    weight: Tensor, vectors: Tensor, image: Tensor, down: Tensor, up: Tensor, last: bool
) -> Tensor | None:
    """Write W'·vectors into `image`, (N, B); return W'ᵀ·image, (K, B), or None for the last.

    W' is W - up·down, where down = upᵀ·W. Rows of W are made wide a few at a time, and used for
    both while they are in the cache.
    """
    found = down @ vectors
    further = None if last else torch.zeros_like(vectors.t())
    for rows, part in pieces(weight, vectors.dtype):
        torch.mm(part, vectors, out=image[rows])
        if len(found):
            image[rows].addmm_(up[rows], found, alpha=-1)
        if further is not None:
            further.addmm_(image[rows].t(), part)
    return None if further is None else further.t()


def pieces(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, the weight's values there in a wider dtype), which lie in one buffer on a CPU."""
    n, k = weight.shape
    step = max(16, CACHED // k // 16 * 16) if weight.device.type == "cpu" else n
    buffer = None if weight.dtype == dtype else weight.new_empty(min(step, n), k, dtype=dtype)
    for first in range(0, n, step):
        part = weight[first : first + step]
        if buffer is not None:
            part = buffer[: len(part)].copy_(part)
        yield slice(first, first + step), part


def orthonormal(vectors: Tensor, basis: Tensor, normal: Callable[..., Tensor]) -> Tensor:
    """As many orthonormal vectors, orthogonal to the basis, that span what these have beside it.

    Where they have nothing, as with a weight of low rank, any others take the place.
    """
    size = vectors.abs().amax()
    vectors, rest = qr(vectors - basis @ (basis.t() @ vectors))
    nothing = rest.diagonal().abs() <= 1e-5 * size
    missing = int(nothing.sum())
    if missing:
        vectors[:, nothing] = normal(len(vectors), missing)
    for _ in range(2 if missing else 1):  # for what rounding left, and for the others
        vectors = qr(vectors - basis @ (basis.t() @ vectors))[0]
    return vectors
