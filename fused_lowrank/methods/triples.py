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

WAYS = ("krylov", "exact", "randomized")
SEED = 42
ITERATIONS = 10  # of "randomized", as is the next
OVERSAMPLING = 10
RANKS = 64  # r is rounded up to a multiple
SMALL = 8  # "krylov" is exact where the matrix has fewer than 8 times the triples that are wanted
FIRST = 16, 9  # triples that are found first, and the blocks of as many vectors that they take
MORE = 5  # blocks for those that follow, up to each multiple of 64
SAMPLED = 8  # one column of so many is in the sketch that the first block is made of
CACHED = 2**20  # elements of the weight that a CPU has in its cache, in float32


@torch.no_grad()
def leading(weight: Tensor, r: int, way: str = "krylov", seed: int = SEED) -> tuple[Tensor, Tensor]:
    """(down (r, K), up (N, r)) of the r leading triples, in float32 or wider.

    The sign of each is fixed: the largest entry of each column of up is positive. torch's
    generators stay as they were.

    Raises ValueError for another way, and for a weight that holds NaN or Inf.
    """
    if way not in WAYS:
        raise ValueError(f"svd is {way!r}: it must be one of {', '.join(map(repr, WAYS))}")
    wanted = min(-r // RANKS * -RANKS, *weight.shape)
    if way == "krylov" and SMALL * wanted <= min(weight.shape):
        down, up = krylov(weight, r, seed)
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


def krylov(weight: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """(down, up) of at least r triples, from the spaces of [Q, WWᵀ·Q, (WWᵀ)²·Q, …].

    The first 16 come of a space of their own, and those up to each multiple of 64 of another, which
    is orthogonal to all before it and begins with what was left there: so a small rank costs
    little, and its triples are the first of any higher one. The first Q is W times a random sketch
    of some of its columns, with a little of all directions in it.
    """
    n, dtype = len(weight), wide(weight)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
        return drawn.to(weight.device)

    some, up = weight[:, ::SAMPLED].to(dtype), weight.new_empty(n, 0, dtype=dtype)
    sketch = some @ normal(some.shape[1], FIRST[0])
    everywhere = normal(n, FIRST[0]) * (0.01 * sketch.abs().amax())
    start = orthonormal(sketch + everywhere, up, normal)
    down, up, rest = space(weight, start, FIRST[1], up, normal)
    while up.shape[1] < r:
        count = RANKS - up.shape[1] % RANKS
        more, up, rest = space(weight, rest[:, :count], MORE, up, normal)
        down = torch.cat([down, more])
    return down, up


def space(
    weight: Tensor, start: Tensor, blocks: int, found: Tensor, normal: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The best triples in a Krylov space: (down of the new, up of those found and the new, rest).

    `start` (N, B) is orthonormal and orthogonal to `found`; B triples are taken, and `rest` is an
    orthonormal basis of what the space has beside them, the best first.
    """
    n, size = start.shape
    basis = start.new_empty(n, found.shape[1] + blocks * size)
    images = start.new_empty(weight.shape[1], blocks * size)
    used = found.shape[1]
    basis[:, :used] = found
    for i in range(blocks):
        basis[:, used : used + size] = start
        used += size
        image = images[:, i * size : (i + 1) * size]
        further = products(weight, start, image, last=i == blocks - 1)
        if further is not None:
            start = orthonormal(further, basis[:, :used], normal)
    squares = images.t() @ images
    if not squares.isfinite().all():
        require_finite(weight)
        raise ValueError("the squares of its singular values are more than float32 holds")
    _, vectors = torch.linalg.eigh(squares.double())
    vectors = vectors.flip(1).to(start.dtype)
    ritz = basis[:, found.shape[1] :] @ vectors
    turn, sigma, right = torch.linalg.svd((images @ vectors[:, :size]).t(), full_matrices=False)
    up = torch.cat([found, ritz[:, :size] @ turn], 1)
    return sigma[:, None] * right, up, ritz[:, size:]


def products(weight: Tensor, vectors: Tensor, image: Tensor, last: bool) -> Tensor | None:
    """Write Wᵀ·vectors into `image`, (K, B); return W·image, (N, B), or None for the last.

    Columns of W are made wide a few at a time and used for both while they are in the cache.
    """
    further = None if last else torch.zeros_like(vectors)
    for columns, part in pieces(weight, vectors.dtype):
        torch.mm(part.t(), vectors, out=image[columns])
        if further is not None:
            further.addmm_(part, image[columns])
    return further


def pieces(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(columns, the weight's values there in a wider dtype), which lie in one buffer on a CPU."""
    n, k = weight.shape
    step = max(16, CACHED // n // 16 * 16) if weight.device.type == "cpu" else k
    buffer = None if weight.dtype == dtype else weight.new_empty(n * min(step, k), dtype=dtype)
    for first in range(0, k, step):
        part = weight[:, first : first + step]
        if buffer is not None:
            part = buffer[: part.numel()].view(part.shape).copy_(part)
        yield slice(first, first + step), part


def orthonormal(vectors: Tensor, basis: Tensor, normal: Callable[..., Tensor]) -> Tensor:
    """As many orthonormal vectors, orthogonal to the basis, that span what these have beside it.

    Where they have nothing, as with a weight of low rank, any others take the place.
    """
    size = vectors.abs().amax()
    vectors, rest = qr(vectors - basis @ (basis.t() @ vectors))
    nothing = rest.diagonal().abs() <= 1e-5 * size
    if nothing.any():
        vectors[:, nothing] = normal(len(vectors), int(nothing.sum()))
    for _ in range(2):  # for what rounding left, and for the others
        vectors = qr(vectors - basis @ (basis.t() @ vectors))[0]
    return vectors
