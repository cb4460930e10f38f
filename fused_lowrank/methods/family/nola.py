"""NOLA (Koohpayegani et al. 2024, arXiv 2310.02556): factors that are mixtures of random ones.

y = x·Wᵀ + bias + scale · (x·downᵀ)·upᵀ,    down = Σᵢ aᵢ·Aᵢ,   up = Σᵢ bᵢ·Bᵢ

A and B come from a seed; the coefficients are all that is trained, or saved.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layer import LowRankLinear
from ..method import Factor, Method, Parts


def mixture(coefficients: Tensor, bases: Tensor) -> Tensor:
    """Σᵢ coefficients[i] · bases[i], in the wider of their dtypes."""
    dtype = torch.promote_types(coefficients.dtype, bases.dtype)
    return torch.tensordot(coefficients.to(dtype), bases.to(dtype), 1)


def nola_parts(factors: Mapping[str, Tensor], weight: Tensor, scale: float) -> Parts:
    """The mixtures of the random factors, of these as much as the layer has room for."""
    n, k = weight.shape
    down = mixture(factors["a"], factors["down_bases"][:, :, :k])
    return Parts(down, None, mixture(factors["b"], factors["up_bases"][:, :n]))


NOLA = Method(
    name="nola",
    title="NOLA",
    ranks={"r": 16, "m": 64},
    limits={},
    factors={
        "down_bases": Factor("mrK", "uniform", shared=True, saved=False),
        "up_bases": Factor("mNr", "uniform", shared=True, saved=False),
        "a": Factor("m", "normal", trained=True),
        "b": Factor("m", "zeros", trained=True),
    },
    learning_rate=1e-2,
    outputs=("b",),
    parts=nola_parts,
    options={"seed": 0},
    slices=False,
    down_of=("down_bases", "a"),
    dora=False,
)


class NolaLinear(LowRankLinear, row=NOLA):
    """NOLA (Koohpayegani et al. 2024, arXiv 2310.02556) in plain PyTorch.

    Parameters, frozen unless named in `train`: weight (out, in), bias (out,), a (m,), which starts
    as N(0, 1), and b (m,), at zero: the coefficients of m random factors each. These, down_bases
    (m, r, K) and up_bases (m, N, r), are drawn from `seed`, uniform within 1/√K and 1/√r; all
    layers of a model have them in common, K and N being the largest of their sides, and no file or
    state_dict has them: the seed is what must be the same. scale = alpha / r; alpha None means r.
    Shapes, dtypes, other keywords and errors are those of `LoraLinear`; r may be more than the
    layer's sides. A state_dict has the seed beside a and b: `load_state_dict` into a layer of
    another seed is a RuntimeError.
    """

    a: nn.Parameter
    b: nn.Parameter


class FusedNolaLinear(NolaLinear):
    """`NolaLinear` through the fused kernels: same constructor, parameters and state_dict.

    A call has the shapes, dtypes and errors of `lowrank_linear`.
    """

    impl = "auto"
