"""A dropout, and its mask in plain torch, on any device, from a seed: no mask need be kept.

Whether x[m, k] is kept is a function of the seed and of the element's place: its 16 bits of the
splitmix64 stream (Steele, Lea and Flood, OOPSLA 2014) that starts at the seed. The kernels have a
generator of their own (`drawn` in kernels/common.py).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import AnyCore, RowCores


class Dropout(NamedTuple):
    """A dropout of a call: where its mask comes from.

    seed is int64 (1,), None until it is drawn; p is the probability. bits is the mask itself: in a
    backward whose forward has kept it, and in a pass whose plan would make another of the seed.
    It is uint8, as `shrink` of our kernels gives it.
    """

    seed: Any
    p: float
    bits: Tensor | None = None


def signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


GAMMA = signed(0x9E3779B97F4A7C15)
# Shift right, xor, multiply. int64 shifts carry the sign: what they shift in is masked off.
ROUNDS = ((30, signed(0xBF58476D1CE4E5B9)), (27, signed(0x94D049BB133111EB)), (31, 1))


def kept(like: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """1 where an element of `like` is kept and 0 where it is dropped, in its shape and dtype."""
    words = torch.arange(1, math.ceil(like.numel() / 4) + 1, device=like.device)
    words, shifted = words.mul_(GAMMA).add_(seed), torch.empty_like(words)
    for shift, factor in ROUNDS:
        torch.bitwise_right_shift(words, shift, out=shifted)
        words.bitwise_xor_(shifted.bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            words.mul_(factor)
    draws = words.view(torch.int16)[: like.numel()].view(like.shape)
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return torch.ge(draws, round(dropout_p * 65536) - 32768, out=mask)


def mask(like: Tensor, dropout: Dropout) -> Tensor:
    """`kept`, or what the bits of the dropout say, where they are there."""
    seed, dropout_p, bits = dropout
    if bits is None:
        return kept(like, seed, dropout_p)
    each = bits[:, :, None] & (1 << torch.arange(8, dtype=torch.uint8, device=bits.device)) != 0
    return each.view(len(bits), -1)[:, : like.shape[1]].to(like.dtype)


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """x with zeros where it is dropped, not scaled by 1 / (1 - p); x itself without dropout."""
    return x if dropout is None else mask(x, dropout).mul_(x)


def packed(mask: Tensor) -> Tensor:
    """The bits of a mask (m, k) of ones and zeros, as `shrink` of our kernels gives them."""
    from ..kernels.common import mask_width

    m, k = mask.shape
    bits = torch.zeros(m, 8 * mask_width(k), dtype=torch.uint8, device=mask.device)
    bits[:, :k] = mask
    eighths = bits.view(m, -1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return eighths.sum(2, dtype=torch.uint8)


def no_bits(seed: Tensor, m: int, k: int) -> Tensor:
    """A stand-in, without memory, for the bits of a mask of x (m, k): of their shape.

    A checkpoint's recomputation must save what the forward has saved, tensor for tensor, and may
    run on a thread of autograd's own, where it does not see the forward's `redraw_dropout`.
    """
    from ..kernels.common import mask_width

    return seed.view(torch.uint8)[:1].expand(m, mask_width(k))


def is_no_bits(bits: Tensor | None) -> bool:
    """Whether this is what `no_bits` gives."""
    return bits is not None and bits.stride(1) == 0


def without_ranks(core: AnyCore, up: Tensor, p: float) -> tuple[AnyCore, Tensor]:
    """(core, up) of a pass in which each column of u, (M, Q), is zero with probability p.

    The others are scaled by 1 / (1 - p), so that the low-rank term is what it would be on average.
    The mask is of torch's generator, for all rows the same. It goes into the core, which is small;
    where there is none, or one for each row, into up.
    """
    mask = (torch.rand(up.shape[1], device=up.device) >= p) / (1.0 - p)
    if core is None or isinstance(core, RowCores):
        return core, up * mask.to(up.dtype)
    if isinstance(core, tuple):
        return (core[0], core[1] * mask.to(core[1].dtype)), up
    return core * mask.to(core.dtype), up
