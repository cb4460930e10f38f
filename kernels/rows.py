"""A core for each row, from a bank of adapters: what `shrink` and `decode` do in place of t · core.

    u[m] = scale · sum over j of weights[i, j] · scales[slot] · t[m] · core[slot],   i = m // repeat
    slot = handles[i, j] mod 2³²

The cores are matrices, pairs of them, or diagonals, in tables (slots, P, Q), (slots, P, r) and
(slots, r, Q), or (slots, P). Kernels are told of the bank by an object with the fields of
`RowCores`, untransposed whatever the launch is. Rows do not meet: no product is taken over several
of them, and what a row gets does not depend on where in a launch it lies.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import accumulator, cast, offset, promote, runtime
from .tiles import padded


@triton.jit
def through(
    t_ptr,
    matrix_ptr,
    offs_m,
    mask_m,
    slot,
    inside,
    offs_q,
    P: tl.constexpr,
    Q: tl.constexpr,
    PAD_P: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    acc_dtype: tl.constexpr,
):
    """t[m] · matrix[slot[m]] for some rows m and the columns offs_q of theirs."""
    part = tl.zeros((offs_m.shape[0], offs_q.shape[0]), acc_dtype)
    matrix_ptrs = matrix_ptr + offset(slot, P * Q)[:, None, None]
    mask = inside[:, None, None] & (offs_q[None, None, :] < Q)
    for p in range(0, runtime(PAD_P), BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        t_ptrs = t_ptr + offset(offs_m[:, None], P) + offs_p[None, :]
        t = tl.load(t_ptrs, mask_m[:, None] & (offs_p[None, :] < P), other=0.0)
        if TRANSPOSED:
            at = offs_q[None, None, :] * P + offs_p[None, :, None]
        else:
            at = offs_p[None, :, None] * Q + offs_q[None, None, :]
        matrix = tl.load(matrix_ptrs + at, mask & (offs_p[None, :, None] < P), other=0.0)
        part += tl.sum(t.to(acc_dtype)[:, :, None] * matrix.to(acc_dtype), 1)
    return part


@triton.jit
def store_u_of_rows(
    t_ptr,
    u_ptr,
    left_ptr,
    right_ptr,
    bank,
    first_m,
    M,
    scale,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    PAD_P: tl.constexpr,
    PAD_Q: tl.constexpr,
    PAD_R: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """u of BLOCK_M rows, from their t in memory.

    `bank` has the arguments named in POINTERS, then `repeat` and `slots`. A row without a valid
    handle gets zeros by selection. For a handle that is refused nothing is read but what is in the
    tables.
    """
    handles_ptr, weights_ptr, scales_ptr, generations_ptr, refused_ptr, repeat, slots = bank
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    core_dtype: tl.constexpr = promote(left_ptr.dtype.element_ty, right_ptr.dtype.element_ty)
    acc_dtype: tl.constexpr = accumulator(promote(core_dtype, dtype))
    end = min(M, first_m + BLOCK_M)
    for m in range(first_m, end, BLOCK_ROWS):
        offs_m = m + tl.arange(0, BLOCK_ROWS)
        mask_m = offs_m < end
        for q in range(0, PAD_Q, BLOCK_Q):
            offs_q = q + tl.arange(0, BLOCK_Q)
            mask_q = offs_q[None, :] < Q
            u = tl.zeros((BLOCK_ROWS, BLOCK_Q), acc_dtype)
            for j in range(0, MIX):
                of_line = offset(offs_m // repeat, MIX) + j
                handle = tl.load(handles_ptr + of_line, mask_m, other=-1)
                slot = handle & 0xFFFFFFFF
                inside = (handle >= 0) & (slot < slots)
                generation = tl.load(generations_ptr + slot, inside, other=-1)
                valid = inside & (generation == handle >> 32)
                refused = (valid == 0) & (handle != -1)
                tl.store(refused_ptr + tl.zeros_like(offs_m), 1, refused)
                factor = tl.load(scales_ptr + slot, inside, other=0.0).to(acc_dtype) * scale
                if weights_ptr is not None:
                    factor *= tl.load(weights_ptr + of_line, mask_m, other=0.0)
                # Masked by `inside` alone, loads of the table need not wait for the generation.
                if R == -2:
                    t_ptrs = t_ptr + offset(offs_m[:, None], P) + offs_q[None, :]
                    t = tl.load(t_ptrs, mask_m[:, None] & mask_q, other=0.0)
                    left_ptrs = left_ptr + offset(slot, P)[:, None] + offs_q[None, :]
                    diagonal = tl.load(left_ptrs, inside[:, None] & mask_q, other=0.0)
                    part = t.to(acc_dtype) * diagonal.to(acc_dtype)
                elif R == 0:
                    part = through(
                        t_ptr, left_ptr, offs_m, mask_m, slot, inside, offs_q,
                        P, Q, PAD_P, TRANSPOSED, BLOCK_P, acc_dtype,
                    )  # fmt: skip
                else:
                    offs_r = tl.arange(0, PAD_R)
                    part = through(
                        t_ptr, left_ptr, offs_m, mask_m, slot, inside, offs_r,
                        P, R, PAD_P, TRANSPOSED, BLOCK_P, acc_dtype,
                    )  # fmt: skip
                    if TRANSPOSED:
                        at = offs_q[None, None, :] * R + offs_r[None, :, None]
                    else:
                        at = offs_r[None, :, None] * Q + offs_q[None, None, :]
                    right_ptrs = right_ptr + offset(slot, R * Q)[:, None, None] + at
                    mask = inside[:, None, None] & (offs_r[None, :, None] < R) & mask_q[None, :, :]
                    right = tl.load(right_ptrs, mask, other=0.0)
                    # NaN · 0 is NaN: the padding of r is set to zero after the product.
                    part = tl.where(offs_r[None, :] < R, part, 0.0)
                    part = tl.sum(part[:, :, None] * right.to(acc_dtype), 1)
                u += tl.where(valid[:, None], part * factor[:, None], 0.0)
            u_ptrs = u_ptr + offset(offs_m[:, None], PAD_Q) + offs_q[None, :]
            tl.store(u_ptrs, cast(tl.where(mask_q, u, 0.0), dtype), mask_m[:, None])


POINTERS = ("handles_ptr", "weights_ptr", "scales_ptr", "generations_ptr", "refused_ptr")
RUNTIME = [*POINTERS, "repeat", "slots"]  # of a kernel's arguments: never specialised


def is_rows(core: Any) -> bool:
    """Whether the core is one for each row: a NamedTuple, as a pair is a tuple."""
    return not isinstance(core, torch.Tensor) and hasattr(core, "handles")


def mix(core: Any) -> int:
    """The most cores that a row has; 0: one core for all."""
    return core.handles.shape[1] if is_rows(core) else 0


def pointers(core: Any) -> tuple[torch.Tensor | None, ...]:
    """The arguments named in POINTERS; nothing in a launch of one core for all."""
    if not is_rows(core):
        return ()
    return core.handles, core.weights, core.scales, core.generations, core.refused


def kind(core: Any) -> Any:
    """The kind of a core, which the shapes of its factors do not always tell."""
    if core is None or isinstance(core, torch.Tensor):
        return "none" if core is None else "one"
    if not is_rows(core):
        return "pair"
    return core.repeat, core.handles.shape[1], core.right is None, core.weights is None


def sizes(core: Any) -> dict[str, float | None]:
    """The other arguments named in RUNTIME; all are None in a launch of one core for all."""
    if not is_rows(core):
        return dict.fromkeys(RUNTIME)
    return {"repeat": core.repeat, "slots": len(core.table)}


def row_blocks(p: int, q: int, r: int, block: int) -> tuple[int, int, int]:
    """(BLOCK_ROWS, BLOCK_P, BLOCK_Q), for `block` numbers of the rows' cores at a time.

    A pair's r is not divided, so that with a large r they are more. Diagonals are of half as
    many: t takes as much room as they do.
    """
    pad_p, pad_q = padded(p), padded(q)
    if r == -2:
        block_q = min(pad_q, 64)
        block_p, held = block_q, 2 * block_q
    elif r > 0:
        side = max(16, block // padded(r))
        block_p, block_q = min(pad_p, side), min(pad_q, side)
        held = padded(r) * max(block_p, block_q)
    else:
        block_q = min(pad_q, 64)
        block_p = min(pad_p, block // block_q)
        held = block_p * block_q
    return max(1, block // held), block_p, block_q
