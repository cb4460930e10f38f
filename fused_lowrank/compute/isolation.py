"""Products of a CPU's library in which no row reads another, padded where the library's own do.

On Intel's AMX units, oneDNN's bfloat16 products read the end of a row together with what lies
behind it in memory, and multiply the latter by zeros, where the inner size is no multiple of 32
(17, 33, 80, …). NaN or Inf there, as the next row may hold, makes the row NaN. PyTorch's own linear
layers are like that; a bank of adapters promises more, and so does batch invariance: they take
their products from here. Operands are padded with zeros to a size of which the library reads
nothing else. A probe, once for each size and dtype, says where that is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import pad

from .reference import Products

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PROBED_ROWS = (1, 7, 70)  # libraries choose their kernels by the number of rows
PROBED_COLUMNS = 48
PRECISION = ["highest"]  # torch's of float32 products, when the probes were made
MULTIPLES = (1, 32, 64, 128)  # to which an inner size is padded, the first that is safe


def is_needed(x: Tensor, sizes: Iterable[int]) -> bool:
    """Whether a product of x over any of these inner sizes has to be padded."""
    if not (isinstance(x, Tensor) and x.is_cpu and x.dtype in DTYPES):
        return False
    if (precision := torch.get_float32_matmul_precision()) != PRECISION[0]:
        PRECISION[0] = precision  # by which float32 may be multiplied in bfloat16
        readable.cache_clear()
        mixes.cache_clear()
    return mixes(tuple(sizes), product_dtype(x))


@functools.cache
def mixes(sizes: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether products over any of these inner sizes have to be padded."""
    safe = [readable(size, dtype) == size for size in sizes]  # all are probed at once
    return not all(safe)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch takes a product of x on a CPU: autocast's where it is on."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


@functools.cache
def readable(size: int, dtype: torch.dtype) -> int:
    """The smallest inner size, from `size` on, whose products keep rows apart on this CPU.

    Raises RuntimeError where there is none among the next multiples of 32, 64 and 128.
    """
    for multiple in MULTIPLES:
        padded = -(-size // multiple) * multiple
        if not leaks(padded, dtype):
            return padded
    raise RuntimeError(
        f"products of {size} elements in {dtype} mix the rows of a batch on this CPU, whatever "
        "they are padded to. Use float32, or set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the "
        "environment before torch is imported"
    )


@torch.no_grad()
def leaks(size: int, dtype: torch.dtype) -> bool:
    """Whether in a product over `size` elements NaN from beyond a row reaches it.

    Every second row of the left operand is NaN, and so is the memory behind both operands.
    """

    def ones(rows: int, columns: int) -> Tensor:
        memory = torch.full(
            (rows * columns + max(MULTIPLES),), torch.nan, dtype=dtype, device="cpu"
        )
        return memory[: rows * columns].fill_(1.0).view(rows, columns)

    others = ones(PROBED_COLUMNS, size).t(), ones(size, PROBED_COLUMNS)
    with torch.autocast("cpu", enabled=False):
        for rows in PROBED_ROWS:
            for left in (ones(rows, size), ones(size, rows).t()):
                left[1::2] = torch.nan
                for right in others:
                    y = left @ right
                    added = torch.zeros_like(y).addmm_(left, right)
                    if not (y[::2].isfinite().all() and added[::2].isfinite().all()):
                        return True
    return False


def padded(tensor: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The tensor with zeros behind its last dimension (-1) or the one before (-2), as needed."""
    size = tensor.shape[dim]
    more = readable(size, dtype) - size if tensor.is_cpu else 0
    return pad(tensor, (0, more) if dim == -1 else (0, 0, 0, more)) if more else tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias for x (…, K), weight (N, K), bias (N,): no row of x reaches another of y.

    Where it is differentiated, no row of dy reaches another of dx: N is padded for that.
    """
    dtype, n = product_dtype(x), weight.shape[0]
    x, weight = padded(x, -1, dtype), padded(weight, -1, dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        weight = padded(weight, -2, dtype)
        bias = bias if bias is None else padded(bias, -1, dtype)
    y = torch_linear(x, weight, bias)
    return y if y.shape[-1] == n else y[..., :n]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a·b for a (…, M, K) and b (K, N), as `linear` takes it."""
    return linear(a, b.t())


def add_matmul(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a·b in place, y (M, N), a (M, K), b (K, N); not to be differentiated."""
    return y.addmm_(padded(a, -1, a.dtype), padded(b, -2, a.dtype))


PRODUCTS = Products(linear, matmul, add_matmul)
