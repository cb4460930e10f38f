"""relay: the whole layer in one launch, for many rows, on Hopper and later.

    t = x·downᵀ    u = scale · t · core    y = x·Wᵀ + bias + u·upᵀ

A persistent GEMM by tensor descriptors, as in `gemm_tail`, in which the tiles of y's first column
compute t as well, from the x that they load anyway, and publish u; the others need u only for their
tail, after the K-loop. So x is read no more often than by the bare GEMM.

Tiles are handed out by a ticket, the first column's before all others. When a tile waits for its u,
the program that makes this u has drawn a smaller ticket: it is running, and waits for nobody.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    N_ARRIVALS,
    accumulator,
    cast,
    cdiv,
    dot,
    gemm_aligned,
    multiprocessors,
    tile_order,
)
from .gemm_tail import add_tail, rows_of, split_columns
from .launch import LAUNCHES, Launch, key_of
from .rows import kind
from .shrink import Core, sides, store_t_and_u, unpacked
from .tiles import Choice, Spec, Target, TileConfig, has_relay, padded, rank_constants, select

# Where in `arrivals` the tickets are drawn, where programs that are done are counted, and where the
# flags begin: one for each row of tiles, set when its u is there.
TICKET, DONE, FLAGS = (tl.constexpr(i) for i in range(3))


@triton.jit
def first_column_first(ticket, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Ticket → (tile row, tile column): the first column top to bottom, then as `tile_order`."""
    if ticket < tiles_m:
        pid_m = ticket
        pid_n = 0
    else:
        pid_m, others = tile_order(ticket - tiles_m, tiles_m, tiles_n - 1, GROUP_M)
        pid_n = others + 1
    return pid_m, pid_n


@triton.jit
def publish(flag_ptr):
    """Set the flag: what all threads of this program have stored is there for who has seen it."""
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, 1, sem="release")


@triton.jit
def wait_for(flag_ptr):
    """Wait until the flag is set.

    One thread acquires at the scope of the GPU, and a barrier hands the flag's value on to the
    others, so what was stored before the release happens before whatever any of them loads from
    here on. That orders ordinary loads, and they find no stale line in the first-level cache: the
    acquire empties it. Bulk loads go another way and are not ordered by it.
    """
    while tl.atomic_add(flag_ptr, 0, sem="acquire") == 0:
        pass


@triton.jit(do_not_specialize=["M"])
def relay_kernel(
    x_desc,
    w_desc,
    down_desc,
    left_ptr,
    right_ptr,
    up_ptr,
    bias_ptr,
    t_ptr,
    u_ptr,
    y_desc,
    arrivals_ptr,
    scale,
    M,
    N,
    K,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,  # as in shrink
    PAD_P: tl.constexpr,
    PAD_Q: tl.constexpr,
    PAD_R: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # down lies as (K, P), the core as in shrink, up as (Q, N)
    W_ROWS_ARE_K: tl.constexpr,  # W lies as (K, N): its rows are what is summed over
    STORE_T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_U: tl.constexpr,  # columns of u = scale · t · core at a time
    BLOCK_Q: tl.constexpr,  # of the tail
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    ticket = tl.atomic_add(arrivals_ptr + TICKET, 1, sem="relaxed")
    while ticket < tiles_m * tiles_n:
        pid_m, pid_n = first_column_first(ticket, tiles_m, tiles_n, GROUP_M)
        first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        flag_ptr = arrivals_ptr + FLAGS + pid_m
        acc = tl.zeros((BLOCK_M, BLOCK_N), accumulator(dtype))
        if pid_n == 0:
            low = tl.zeros((BLOCK_M, PAD_P), accumulator(dtype))
            for k in range(0, K, BLOCK_K):
                x = x_desc.load([first_m, k])
                w = w_desc.load([k, 0]) if W_ROWS_ARE_K else w_desc.load([0, k]).T
                down = down_desc.load([k, 0]) if TRANSPOSED else down_desc.load([0, k]).T
                low = dot(x, cast(down, dtype), low)
                acc = dot(x, w, acc)
            store_t_and_u(
                low, t_ptr, u_ptr, left_ptr, right_ptr, first_m, M, scale, 1.0,
                P, Q, R, PAD_P, PAD_Q, PAD_R, TRANSPOSED, STORE_T, True, False,
                BLOCK_M, PAD_P, BLOCK_U, BLOCK_R,
            )  # fmt: skip
            publish(flag_ptr)
        else:
            for k in range(0, K, BLOCK_K):
                x = x_desc.load([first_m, k])
                w = w_desc.load([k, first_n]) if W_ROWS_ARE_K else w_desc.load([first_n, k]).T
                acc = dot(x, w, acc)
            wait_for(flag_ptr)

        acc = add_tail(
            acc, u_ptr, up_ptr, bias_ptr, up_ptr, first_m, first_n, M, N,
            Q, PAD_Q, TRANSPOSED, HAS_BIAS, False, BLOCK_M, BLOCK_N, BLOCK_Q,
        )  # fmt: skip
        halves = split_columns(acc)
        for i in tl.static_range(2):
            y_desc.store([first_m, first_n + i * (BLOCK_N // 2)], cast(halves[i], dtype))
        ticket = tl.atomic_add(arrivals_ptr + TICKET, 1, sem="relaxed")

    # Whoever is done has drawn its last ticket and seen its last flag.
    if tl.atomic_add(arrivals_ptr + DONE, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        used = FLAGS + tiles_m
        for first in range(0, used, 256):
            offs = first + tl.arange(0, 256)
            tl.store(arrivals_ptr + offs, tl.zeros((256,), tl.int32), offs < used)


def constants(
    p: int,
    q: int,
    r: int,
    transposed: bool,
    want_t: bool,
    bias: bool,
    config: TileConfig,
) -> dict[str, int]:
    """The compile-time arguments of a launch."""
    # The tail has the registers that the sums and the core's product leave.
    rows_of_up = 16 if r > 0 else 8192 // config.block_n
    return {
        **rank_constants(p, q, r),
        "TRANSPOSED": transposed,
        "STORE_T": want_t,
        "HAS_BIAS": bias,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_U": min(padded(q), max(16, config.block_n // 8)),
        "BLOCK_Q": min(padded(q), rows_of_up),
        "BLOCK_R": 16,
        "GROUP_M": config.group_m,
    }


def spec_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
) -> Spec:
    """What the launch of `relay` with these operands is."""
    left, right, p, q, r = unpacked(down, core, transposed)
    ranks = p, q, max(r, 0)
    # Ranks in 8s: the 16 bytes of down's rows, and no spills in t·core.
    in_eights = all(rank % 8 == 0 for rank in ranks)
    is_aligned = in_eights and gemm_aligned(x, weight, (down, left, right, up, bias))
    factor_itemsize = max(down.element_size(), up.element_size())  # no tile depends on the core's
    rank = padded(max(p, r))  # a pair's r is bounded as P is
    if r > 0 and x.dtype == torch.float16 and max(left.element_size(), right.element_size()) > 2:
        rank *= 2  # t itself is then multiplied as two values, beside a pair's product: it spills
    return Spec("relay", x.element_size(), factor_itemsize, is_aligned, rank, padded(q))


def has_flags(m: int, config: TileConfig) -> bool:
    """Whether there is a flag for every row of tiles."""
    return FLAGS.value + cdiv(m, config.block_m) <= N_ARRIVALS


def is_possible(target: Target, spec: Spec, m: int) -> bool:
    """Whether `relay` can make this launch, with the tile that `select` gives."""
    return has_relay(target, spec) and has_flags(m, select(target, spec, m))


INPUTS = ("x_desc", "w_desc", "down_desc", "left_ptr", "right_ptr", "up_ptr", "bias_ptr")


def relay(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    transposed: bool,
    want_t: bool,
    choose: Choice,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, t): y = x·weightᵀ + bias + u·upᵀ with t, u = shrink(x, down, core, scale, transposed).

    The operands are those of `shrink` and `gemm_tail`, as far as `is_possible`; the results are
    contiguous and in x's dtype; t is None unless it is wanted.
    """
    left, right = sides(down, core, transposed)
    tensors = x, weight, down, left, right, up, bias
    key, addresses = key_of("relay", tensors, kind(core), transposed, want_t, choose)
    launch = LAUNCHES.get(key) or planned(
        x, weight, down, core, up, bias, transposed, want_t, choose
    )
    y, t = launch(key, tensors, addresses, float(scale))
    return y, t


def planned(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    core: Core,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    want_t: bool,
    choose: Choice,
) -> Launch:
    """The launch of a call of `relay`."""
    (m, k), n = x.shape, weight.shape[0]
    _, _, p, q, r = unpacked(down, core, transposed)
    spec = spec_of(x, weight, down, core, up, bias, transposed)
    config = choose(spec, m)
    if not (spec.aligned and has_flags(m, config)):
        raise ValueError(f"relay cannot compute {m} rows of {spec} with {config}")
    w_rows_are_k = weight.stride(1) != 1
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    block_x, block_y = [config.block_m, config.block_k], [config.block_m, config.block_n // 2]
    block_w, block_down = [config.block_n, config.block_k], [padded(p), config.block_k]
    return Launch(
        relay_kernel,
        (min(tiles, multiprocessors(x.device)),),
        INPUTS,
        results={"y_desc": ((m, n), x.dtype), "t_ptr": ((m, p), x.dtype) if want_t else None},
        scratch={"u_ptr": ((m, padded(q)), x.dtype)},
        numbers={"M": m, "N": n, "K": k},
        constants={
            "W_ROWS_ARE_K": w_rows_are_k,
            **constants(p, q, r, transposed, want_t, bias is not None, config),
            **config.options(),
        },
        blocks={
            "x_desc": (x.shape, x.stride(), block_x),
            "w_desc": rows_of(weight, block_w),
            "down_desc": (down.shape, down.stride(), block_down[:: -1 if transposed else 1]),
            "y_desc": ((m, n), (n, 1), block_y),
        },
        varying=("scale",),
        meets=True,
        device=x.device,
    )
