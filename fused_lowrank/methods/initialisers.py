"""Initial values of the factors.

LoRA       down Kaiming-uniform, up zero                             (Hu et al. 2021)
LoRA-XS    W = S·Σ·Dᵀ: down = Σᵣ·Dᵣᵀ, up = Sᵣ; core N(0, 1e-5²)       (Bałazy et al. 2024)
LoRA-Mini  all four Kaiming-uniform; "identity": b_train zero        (Singh et al. 2024)
"""

import math
import zlib

import torch
from torch import Tensor

SVD_SEED = 42
SVD_ITERATIONS = 10
SVD_OVERSAMPLING = 10
SVD_RANKS = 64  # r is rounded up to a multiple: lower ranks are the first triples of higher ones


def kaiming(matrix: Tensor) -> None:
    """Fill (out, in), as nn.Linear keeps a weight, with Kaiming-uniform, a = √5, in place."""
    torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))


def generator_of(device: torch.device) -> torch.Generator:
    """The one generator of `device`; torch.manual_seed would seed those of every device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


def seeded_uniform(p: int, k: int, n: int, q: int, key: str, seed: int) -> tuple[Tensor, Tensor]:
    """down (p, k) and up (n, q), float32, uniform in [-1, 1), always the same for a key and a seed.

    Those of smaller p or q are the first rows and columns of larger ones.
    """

    def draw(name: str, rows: int, columns: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}.{key}.{name}".encode()))
        return 2 * torch.rand(rows, columns, generator=generator) - 1

    return draw("down", p, k), draw("up", q, n).t()


def seeded_bases(p: int, k: int, n: int, q: int, key: str, seed: int) -> tuple[Tensor, Tensor]:
    """(down, up) of LoRA-Mini, Kaiming-uniform (a = √5): within 1/√k and 1/√q."""
    down, up = seeded_uniform(p, k, n, q, key, seed)
    return down / math.sqrt(k), up / math.sqrt(q)


@torch.no_grad()
def svd_bases(
    weight: Tensor, r: int, method: str = "randomized", seed: int = SVD_SEED
) -> tuple[Tensor, Tensor]:
    """(down, up) of LoRA-XS: Σᵣ·Dᵣᵀ of shape (r, K) and Sᵣ of shape (N, r), in weight's dtype.

    S, Σ and D are the leading r singular triples of weight (N, K) = S·Σ·Dᵀ, computed in float32 (or
    float64) by torch.svd_lowrank with this seed ("randomized") or torch.linalg.svd ("exact").
    The sign of each triple is fixed: the largest entry of each column of S is positive. Ranks that
    share a multiple of 64 share their triples, as exact ones do.

    Raises ValueError for a weight that holds NaN or Inf, or factors that its dtype cannot hold.
    """
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not matrix.isfinite().all():
        raise ValueError("the weight holds NaN or Inf: LoRA-XS cannot take its factors from it")
    if method == "randomized":
        rank = min(-r // SVD_RANKS * -SVD_RANKS + SVD_OVERSAMPLING, *matrix.shape)
        devices = [matrix.device] if matrix.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            generator_of(matrix.device).manual_seed(seed)
            left, sigma, right = torch.svd_lowrank(matrix, q=rank, niter=SVD_ITERATIONS)
        right = right.t()
    elif method == "exact":
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        raise ValueError(f"svd is {method!r}: it must be 'randomized' or 'exact'")
    left, sigma, right = left[:, :r], sigma[:r], right[:r]
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    sign[sign == 0] = 1
    down = (sigma[:, None] * right * sign.t()).to(weight.dtype)
    if not down.isfinite().all():
        raise ValueError(f"the weight's singular values are more than {weight.dtype} can hold")
    return down, (left * sign).contiguous().to(weight.dtype)
