"""core_grad: the gradients of the core, in one launch.

    dcore = scale · tᵀ·g            t (M, P)   g (M, Q)   dcore (P, Q), or (P,) its diagonal alone
    da = dcore·bᵀ,  db = aᵀ·dcore   for LoRA-Mini's core a (P, r) · b (r, Q)

The rows are split over programs; each stores its partial sum, and the last to arrive adds them in
the order of their index, so the result is bitwise reproducible. For a pair, the program that
completes the last tile of dcore goes on to the two gradients. Programs count themselves in the
counters of `arrivals` both times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    accumulator,
    aligned,
    cast,
    cdiv,
    dot,
    gathered,
    offset,
    sum_dtype,
    variants,
)
from .launch import LAUNCHES, Launch, key_of
from .tiles import Choice, Spec, TileConfig, padded, rank_constants

COLUMN = dict.fromkeys(("Q", "PAD_Q", "BLOCK_Q"), 1)  # of dcore where it is a diagonal
MIN_ROWS = 256  # per program: fewer, and the partial sums cost more than the rows
MAX_SPLITS = 32

# What the counters of a launch count: tiles that have their sum; a counter for each tile follows.
DONE, TILES = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def factor_grad_tile(
    dcore_ptr,
    other_ptr,
    out_ptr,
    i,
    r,
    SIZE_I: tl.constexpr,
    SIZE_J: tl.constexpr,
    R: tl.constexpr,
    PAD_J: tl.constexpr,
    DCORE_I: tl.constexpr,
    DCORE_J: tl.constexpr,
    OTHER_J: tl.constexpr,
    OTHER_R: tl.constexpr,
    OUT_I: tl.constexpr,
    OUT_R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of out[i, r] = sum over j of dcore[i, j]·other[j, r]; each has its own strides."""
    acc_dtype: tl.constexpr = dcore_ptr.dtype.element_ty
    offs_i, offs_r = i + tl.arange(0, BLOCK), r + tl.arange(0, BLOCK_R)
    mask_r = offs_r[None, :] < R
    acc = tl.zeros((BLOCK, BLOCK_R), acc_dtype)
    for j in range(0, PAD_J, 16):  # a product of fp32 holds its operands in registers
        offs_j = j + tl.arange(0, 16)
        dcore_ptrs = dcore_ptr + offs_i[:, None] * DCORE_I + offs_j[None, :] * DCORE_J
        dcore = tl.load(dcore_ptrs, cache_modifier=".cg")
        other_ptrs = other_ptr + offs_j[:, None] * OTHER_J + offs_r[None, :] * OTHER_R
        other = tl.load(other_ptrs, mask_r & (offs_j[:, None] < SIZE_J), other=0.0)
        acc = dot(dcore, cast(other, acc_dtype), acc)
    out_ptrs = out_ptr + offs_i[:, None] * OUT_I + offs_r[None, :] * OUT_R
    tl.store(out_ptrs, cast(acc, out_ptr.dtype.element_ty), (offs_i[:, None] < SIZE_I) & mask_r)


def core_grad_kernel(
    t_ptr,
    g_ptr,
    a_ptr,
    b_ptr,
    dcore_ptr,
    da_ptr,
    db_ptr,
    partial_ptr,
    arrivals_ptr,
    scale,
    M,
    rows,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,  # LoRA-Mini's r; 0: the core is one matrix; -2: a diagonal, Q is then 1
    PAD_P: tl.constexpr,
    PAD_Q: tl.constexpr,
    PAD_R: tl.constexpr,
    WANT_A: tl.constexpr,
    WANT_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,  # of dcore's two sides, for da and db: both dots are of fp32
    BLOCK_R: tl.constexpr,
    AHEAD: tl.constexpr,  # partial sums under way at a time
):
    acc_dtype: tl.constexpr = accumulator(t_ptr.dtype.element_ty)
    split, splits = tl.program_id(0), tl.num_programs(0)
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    tiles_q: tl.constexpr = PAD_Q // BLOCK_Q
    offs_p = (tile // tiles_q) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_q = (tile % tiles_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_p, mask_q = offs_p[:, None] < P, offs_q[None, :] < Q

    acc = tl.zeros((BLOCK_P, BLOCK_Q), acc_dtype)
    end = min(M, (split + 1) * rows)
    for m in range(split * rows, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        t_ptrs = t_ptr + offset(offs_m[None, :], P) + offs_p[:, None]
        if R == -2:
            g_ptrs = g_ptr + offset(offs_m[None, :], P) + offs_p[:, None]
            t = tl.load(t_ptrs, mask_p & (offs_m[None, :] < end), other=0.0)
            g = tl.load(g_ptrs, mask_p & (offs_m[None, :] < end), other=0.0)
            acc += tl.sum(t.to(acc_dtype) * g.to(acc_dtype), 1)[:, None]
        else:
            g_ptrs = g_ptr + offset(offs_m[:, None], Q) + offs_q[None, :]
            t = tl.load(t_ptrs, mask_p & (offs_m[None, :] < end), other=0.0)
            g = tl.load(g_ptrs, mask_q & (offs_m[:, None] < end), other=0.0)
            acc = dot(t, g, acc)

    # The partial sums lie as (splits, PAD_P, PAD_Q).
    tile_ptrs = partial_ptr + offs_p[:, None] * PAD_Q + offs_q[None, :]
    acc, last = gathered(
        acc, tile_ptrs, split, splits, PAD_P * PAD_Q, arrivals_ptr + TILES + tile, AHEAD
    )
    if last:
        acc *= scale
        if R <= 0:
            dcore_ptrs = dcore_ptr + offs_p[:, None] * Q + offs_q[None, :]
            tl.store(dcore_ptrs, cast(acc, dcore_ptr.dtype.element_ty), mask_p & mask_q)
        else:
            # dcore takes the place of the first partial sum; the last tile goes on from there.
            tl.store(tile_ptrs, acc)
            tl.debug_barrier()
            if tl.atomic_add(arrivals_ptr + DONE, 1, sem="acq_rel") == tiles - 1:
                tl.store(arrivals_ptr + DONE, 0)
                for r in range(0, PAD_R, BLOCK_R):
                    if WANT_A:  # da = dcore·bᵀ
                        for p in range(0, PAD_P, BLOCK):
                            factor_grad_tile(
                                partial_ptr, b_ptr, da_ptr, p, r,
                                P, Q, R, PAD_Q, PAD_Q, 1, 1, Q, R, 1, BLOCK, BLOCK_R,
                            )  # fmt: skip
                    if WANT_B:  # dbᵀ = dcoreᵀ·a
                        for q in range(0, PAD_Q, BLOCK):
                            factor_grad_tile(
                                partial_ptr, a_ptr, db_ptr, q, r,
                                Q, P, R, PAD_P, 1, PAD_Q, R, 1, 1, Q, BLOCK, BLOCK_R,
                            )  # fmt: skip


KERNELS = variants(core_grad_kernel, runtime=["M", "rows"])


def constants(
    p: int, q: int, r: int, want_a: bool, want_b: bool, config: TileConfig
) -> dict[str, int]:
    """The compile-time arguments of a launch; a diagonal is one column of dcore."""
    return {
        **rank_constants(p, q, r),
        "WANT_A": want_a,
        "WANT_B": want_b,
        "BLOCK_M": config.block_m,
        "BLOCK_P": min(padded(p), config.block_n),
        "BLOCK_Q": min(padded(q), config.block_n),
        **(COLUMN if r == -2 else {}),
        "BLOCK": min(padded(p), padded(q), 32),
        "BLOCK_R": min(padded(max(r, 1)), 32),
        # Of a large tile more than one has no registers beside the pointers of unaligned operands.
        "AHEAD": 8 if config.block_n <= 32 else 1,
    }


def core_grad(
    t: torch.Tensor,
    g: torch.Tensor,
    core: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    scale: float,
    want: tuple[bool, bool],
    choose: Choice,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dcore, None), or (da, db) for a pair, each in its factor's shape and dtype.

    t (M, P) and g (M, Q) of one dtype, core (P, Q) or (P,), or a (P, r) and b (r, Q), all
    contiguous; M at least 1. `want` says which gradients of the pair are wanted; the others are
    None.
    """
    pair = isinstance(core, tuple)
    a, b = core if isinstance(core, tuple) else (core, core)
    tensors = t, g, a, b
    key, addresses = key_of("core_grad", tensors, pair, want, choose)
    launch = LAUNCHES.get(key) or planned(t, g, a, b, pair, want, choose)
    dcore, da, db = launch(key, tensors, addresses, float(scale))
    return (da, db) if pair else (dcore, None)


def planned(
    t: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    pair: bool,
    want: tuple[bool, bool],
    choose: Choice,
) -> Launch:
    """The launch of a call of `core_grad`."""
    (m, p), q = t.shape, g.shape[1]
    r = b.shape[0] if pair else -2 if a.dim() == 1 else 0
    wanted = pair and want[0], pair and want[1]
    factor_itemsize = max(a.element_size(), b.element_size())
    is_aligned = aligned((t, g, a, b), (p, q))
    spec = Spec("core_grad", t.element_size(), factor_itemsize, is_aligned, padded(p), padded(q))
    config = choose(spec, m)
    values = constants(p, q, r, *wanted, config)
    splits = min(cdiv(m, MIN_ROWS), MAX_SPLITS)
    tiles = (values["PAD_P"] // values["BLOCK_P"]) * (values["PAD_Q"] // values["BLOCK_Q"])
    partial = (splits, values["PAD_P"], values["PAD_Q"]), sum_dtype(t.dtype)
    return Launch(
        KERNELS[is_aligned],
        (splits, tiles),
        ("t_ptr", "g_ptr", "a_ptr", "b_ptr"),
        results={
            "dcore_ptr": None if pair else (a.shape, a.dtype),
            "da_ptr": (a.shape, a.dtype) if wanted[0] else None,
            "db_ptr": (b.shape, b.dtype) if wanted[1] else None,
        },
        scratch={"partial_ptr": partial},
        numbers={"M": m, "rows": cdiv(cdiv(m, splits), config.block_m) * config.block_m},
        constants=values | config.options(),
        varying=("scale",),
        meets=True,
        device=t.device,
    )
