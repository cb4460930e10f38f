"""Initial values of the factors: functions of the weight, the ranks and, for some, the inputs.

LoRA (down Kaiming-uniform and up zero unless said; "·" has a residual, which takes W's place)
    "kaiming"             a = √5                                            (Hu et al. 2021)
    "gaussian"            down N(0, 1/r²)
    "orthogonal"          both random, up·down = 0 at the start; r is even
    "pissa" ·             the leading triples, √Σ on either side    (Meng et al. 2024, 2404.02948)
    "pissa_niter_N" ·     the same by a randomised SVD of N iterations
    "milora" ·            the smallest triples                      (Wang et al. 2024, 2406.09044)
    "olora" ·             W = Q·R: up = Qᵣ, down = Rᵣ            (Büyükakyüz 2024, 2406.01775)
    "eva"                 down: the inputs' principal directions (Paischer et al. 2024, 2410.07170)
    "corda", "corda_kpm" ·  triples of W·C, C the inputs' covariance, the leading or the smallest,
                          which are to be kept                      (Yang et al. 2024, 2406.05223)
    "loftq"               scale·up·down nearest to what quantising took from W: see `lost`
LoRA-XS (down = upᵀ·W but for "random"; core N(0, 1e-5²))       (Bałazy et al. 2024, 2405.17604)
    "svd", "minor"        the leading triples of W, or the smallest: down = Σᵣ·Dᵣᵀ, up = Sᵣ
    "random"              both Kaiming-uniform
    "eva"                 the triples of W restricted to the inputs' principal directions
LoRA-Mini (a_train Kaiming-uniform; b_train zero unless "paper")   (Singh et al. 2024, 2411.15804)
    "identity", "paper"   all Kaiming-uniform
    "svd", "qr"           the leading triples of W; or W = Q·R: up = Q_b, down = Rₐ
    "eva"                 the principal directions of the inputs, and of W·x

LoRA's scale is that of the layer: with a residual W₀, W = W₀ + scale·up·down, as in PEFT.
"""

import math
import re
import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...compute.base.protocol import dense
from . import triples

NITER = re.compile(r"pissa_niter_([1-9]\d*)")


class Inputs(NamedTuple):
    """The inputs of a layer over a user's batches, as far as an initialiser needs to know them.

    directions (D, K) are the principal directions of the inputs less their mean, orthonormal, the
    strongest first, and strengths (D,) the singular values; covariance (K, K) is CorDA's, of inputs
    that are scaled and not centred. original (N, K) is no input, but the weight that the layer's
    was quantised from. None is what was not asked for.
    """

    directions: Tensor | None = None
    strengths: Tensor | None = None
    covariance: Tensor | None = None
    original: Tensor | None = None


class Start(NamedTuple):
    """down (r, K) and up (N, r), in float32 or wider."""

    down: Tensor
    up: Tensor


def unknown(init: str) -> ValueError:
    """The error for a name that a function does not know; layers have been told by their rows."""
    return ValueError(f"init is {init!r}, which is none of these: see methods.initial.values")


def niter(init: str) -> int:
    """The N of "pissa_niter_N", or 0."""
    found = NITER.fullmatch(init)
    return int(found[1]) if found else 0


def needs(init: str) -> str | None:
    """The field of `Inputs` that an initialiser needs, or None."""
    if init == "eva":
        return "directions"
    if init == "loftq":
        return "original"
    return "covariance" if init.startswith("corda") else None


def directions_of(inputs: Inputs | None, count: int) -> tuple[Tensor, Tensor]:
    """The first directions and their strengths; ValueError if they are not known."""
    if inputs is None or inputs.directions is None or inputs.strengths is None:
        raise ValueError(without_data("eva"))
    if len(inputs.directions) < count:
        raise ValueError(
            f"init='eva' needs {count} directions of the inputs, of which "
            f"{len(inputs.directions)} are known: give more batches, or a lower rank"
        )
    return inputs.directions[:count], inputs.strengths[:count]


def without_data(init: str) -> str:
    """The message for an initialiser that needs inputs, or the original, and got none."""
    if needs(init) == "original":
        return (
            "init='loftq' makes up for what quantising took from the weights, and so needs them as "
            "they were: adapt(model, …, init='loftq', data=original), where original is the model "
            "that was quantised, its state_dict, or the path of its safetensors, a file or a folder"
        )
    return (
        f"init={init!r} needs to see inputs of the layers: give some batches, as in "
        f"adapt(model, …, init={init!r}, data=batches)"
    )


# --- random ---


def kaiming(matrix: Tensor) -> None:
    """Fill (out, in), as nn.Linear keeps a weight, with Kaiming-uniform, a = √5, in place."""
    torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))


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


# --- LoRA ---


@torch.no_grad()
def lora_start(
    init: str, weight: Tensor, r: int, scale: float, inputs: Inputs | None = None
) -> Start:
    """The start of LoRA on weight (N, K), by one of its names; random ones draw as torch does.

    Where they are a part of the weight, scale·up·down is to be taken from it: what is left, K·N
    numbers, is not made here. Raises ValueError for another name; inputs that are needed and not
    there; a weight with NaN or Inf where it is decomposed; an odd r with "orthogonal"; a scale that
    is not above 0 where it divides.
    """
    n, k = weight.shape
    dtype = triples.wide(weight)
    zero = torch.zeros(n, r, dtype=dtype, device=weight.device)
    if init == "kaiming":
        down = zero.new_empty(r, k)
        kaiming(down)
        return Start(down, zero)
    if init == "gaussian":
        return Start(zero.new_empty(r, k).normal_(std=1 / r), zero)
    if init == "orthogonal":
        return orthogonal(zero, k)
    if init == "eva":
        return Start(directions_of(inputs, r)[0].to(zero), zero)
    if scale <= 0:
        raise ValueError(
            f"init={init!r} with alpha 0 or below: scale·up·down is to start as something, and "
            "would be nothing, or the opposite. Give an alpha above 0"
        )
    if init == "olora":
        up, right = torch.linalg.qr(triples.finite(weight))
        down, up = right[:r].contiguous(), up[:, :r].contiguous()
    else:
        down, sigma, up = decomposed(init, weight, r, inputs)
        root = (sigma / scale).sqrt()
        down, up = root[:, None] * down, up * root
    return Start(down, up)


def orthogonal(like: Tensor, k: int) -> Start:
    """down (r, K) and up like (N, r): their r's are spanned by odd and by even rows of a rotation.

    So up·down is 0, and neither factor is.
    """
    n, r = like.shape
    if r % 2:
        raise ValueError(f"r is {r}: init='orthogonal' takes an even r")
    turn, _ = torch.linalg.qr(torch.randn(r, r).to(like))
    down = turn[0::2].t() @ torch.randn(k, r // 2).to(like).t() / 10
    up = torch.randn(r // 2, n).to(like).t() @ turn[1::2] / 10
    return Start(down.contiguous(), up.contiguous())


def decomposed(
    init: str, weight: Tensor, r: int, inputs: Inputs | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(right (r, K), sigma (r,), left (N, r)) of the triples that LoRA takes out of the weight."""
    inverse: Tensor | None = None
    if init == "loftq":
        weight = lost(weight, inputs)
    elif init.startswith("corda"):
        if inputs is None or inputs.covariance is None:
            raise ValueError(without_data(init))
        covariance, inverse = damped(inputs.covariance.to(weight.device, triples.wide(weight)))
        weight = triples.finite(weight) @ covariance
    if init in ("milora", "corda_kpm"):
        down, up = triples.smallest(weight, r)
    elif iterations := niter(init):
        rank = min(r, *weight.shape)
        down, up = triples.randomized(triples.finite(weight), rank, triples.SEED, iterations)
        down, up = down[:r], up[:, :r]
    elif init in ("pissa", "corda", "loftq"):
        way, times = "exact" if init == "pissa" else "krylov", 2 if init == "loftq" else 1
        down, up = triples.leading(weight, r, way, times=times)
    else:
        raise unknown(init)
    sigma = down.norm(dim=1)
    right = down / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)[:, None]
    return right if inverse is None else right @ inverse, sigma, up


def lost(weight: Any, inputs: Inputs | None) -> Tensor:
    """The part of a weight (N, K) that quantising took: the original less the values there are now.

    Li et al. 2023 (arXiv 2310.08659) quantise what up·down leaves of W, then take up·down from what
    that lost, and so on; PEFT's LoftQConfig does it to a model in 16 bits, whose W it replaces by
    quantised values. Here the base is the user's and stays as it is, so there is the last step
    alone, as in PEFT's `replace_lora_weights_loftq`, but that scale·up·down is nearest, as the
    layer computes it, where PEFT's up·down is.

    Raises ValueError where there is no original, or one that is not what was quantised.
    """
    if inputs is None or inputs.original is None:
        raise ValueError(without_data("loftq"))
    given, now = inputs.original, dense(weight)
    dtype = triples.wide(now)
    original, now = given.to(now.device, dtype), now.to(dtype)
    if not original.isfinite().all():
        raise ValueError("the original weight in data holds NaN or Inf")
    error = original - now
    rounding = max(torch.finfo(kind).eps for kind in (given.dtype, weight.dtype))
    if (error.abs() <= rounding * now.abs()).all():
        raise ValueError(
            "the original weight in data has the quantised values, of which nothing is lost: give "
            "the weights as they were before the model was quantised"
        )
    if error.norm() >= now.norm():
        raise ValueError(
            "the weight in data is no nearer to the quantised one than 0 is: it is of another "
            "model, or of another layer. Give the weights that this model was quantised from"
        )
    return error


def damped(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The covariance with enough on its diagonal to be inverted, and its inverse, as in CorDA.

    Raises ValueError where the inputs were 0 throughout.
    """
    mean, one = covariance.diagonal().mean(), torch.eye(len(covariance)).to(covariance)
    if not (mean.isfinite() and mean > 0):
        raise ValueError(
            "the covariance of the inputs is 0 or not finite: CorDA needs other batches"
        )
    share = 0.01
    while True:
        whole = covariance + share * mean * one
        inverse = torch.linalg.inv(whole)
        if torch.dist(whole @ inverse, one) < 0.05:
            return whole, inverse
        share *= 2


# --- LoRA-XS ---


@torch.no_grad()
def xs_bases(
    init: str, weight: Tensor, r: int, svd: str = "krylov", inputs: Inputs | None = None
) -> tuple[Tensor, Tensor]:
    """(down (r, K), up (N, r)) of LoRA-XS by one of its names, in weight's dtype.

    `svd` is the way of "svd", one of `triples.WAYS`. Raises ValueError as `svd_bases` and
    `lora_start` do.
    """
    if init == "svd":
        return svd_bases(weight, r, svd)
    if init == "minor":
        return held(weight, *triples.smallest(weight, r))
    if init == "random":
        return kaiming_bases(weight, r, r)
    if init != "eva":
        raise unknown(init)
    directions = directions_of(inputs, r)[0].to(weight.device, triples.wide(weight))
    down, up = triples.leading(triples.finite(weight) @ directions.t(), r, "exact")
    return held(weight, down @ directions, up)


@torch.no_grad()
def svd_bases(
    weight: Tensor, r: int, method: str = "randomized", seed: int = triples.SEED
) -> tuple[Tensor, Tensor]:
    """(down, up) of LoRA-XS: Σᵣ·Dᵣᵀ of shape (r, K) and Sᵣ of shape (N, r), in weight's dtype.

    S, Σ and D are the leading r singular triples of weight (N, K) = S·Σ·Dᵀ, as `triples.leading`
    finds them by this method and seed.

    Raises ValueError for a weight that holds NaN or Inf, or factors that its dtype cannot hold.
    """
    return held(weight, *triples.leading(weight, r, method, seed))


def held(weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up) in the weight's dtype; ValueError for what it cannot hold."""
    down, up = down.to(weight.dtype), up.to(weight.dtype)
    if not down.isfinite().all():
        raise ValueError(f"the weight's singular values are more than {weight.dtype} can hold")
    return down, up


def kaiming_bases(weight: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
    """down (a, K) and up (N, b), Kaiming-uniform, drawn in the weight's dtype."""
    n, k = weight.shape
    down, up = weight.new_empty(a, k), weight.new_empty(n, b)
    kaiming(down)
    kaiming(up)
    return down, up


# --- LoRA-Mini ---


@torch.no_grad()
def mini_bases(
    init: str, weight: Tensor, a: int, b: int, inputs: Inputs | None = None
) -> tuple[Tensor, Tensor]:
    """(down (a, K), up (N, b)) of LoRA-Mini by one of its names, in weight's dtype.

    Those that are not random have the size that Kaiming-uniform ones have on average, ‖down‖² = a/3
    and ‖up‖² = N/3, so that one learning rate suits all. Raises ValueError as `lora_start` does,
    and for an a or b above what there is of rows or directions.
    """
    if init in ("identity", "paper"):
        return kaiming_bases(weight, a, b)
    n, k = weight.shape
    most = max(a, b)
    if most > min(n, k):
        raise ValueError(
            f"init={init!r} takes a and b of at most {min(n, k)}, the smaller side of W"
        )
    if init == "svd":
        down, up = triples.leading(weight, most)
    elif init == "qr":
        up, down = torch.linalg.qr(triples.finite(weight))
    elif init != "eva":
        raise unknown(init)
    else:
        directions, strengths = directions_of(inputs, most)
        down = directions.to(weight.device, triples.wide(weight))
        outputs = triples.finite(weight) @ (down.t() * strengths.to(down))
        up = triples.leading(outputs, most, "exact")[1]
    down, up = down[:a], up[:, :b]
    if not (size := float(down.norm())):
        raise ValueError(f"init={init!r} takes its factors from W, which is 0")
    return held(weight, down * (math.sqrt(a / 3) / size), up * math.sqrt(n / 3 / b))
