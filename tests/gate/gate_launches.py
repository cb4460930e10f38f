"""The launch of a case of the compile gate, on operands without values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gate_cases import DTYPES, ROWS, Case

from fused_lowrank.compute.reference import RowCores
from fused_lowrank.kernels.common import mask_width
from fused_lowrank.kernels.core_grad import core_grad
from fused_lowrank.kernels.core_grad_rows import core_grad_rows
from fused_lowrank.kernels.decode import decode
from fused_lowrank.kernels.dropout import drawn_bits, dropped
from fused_lowrank.kernels.gain_back import gain_back
from fused_lowrank.kernels.gemm_tail import gemm_tail
from fused_lowrank.kernels.relay import relay
from fused_lowrank.kernels.shrink import shrink
from fused_lowrank.kernels.tiles import FEW_M, SMALL_M, Spec, TileConfig, padded


def empty(*shape: int, dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def bits(m: int, k: int) -> torch.Tensor:
    """A dropout's mask of an (M, K)."""
    return torch.empty(m, mask_width(k), dtype=torch.uint8, device="meta")


def rows(m: int, k: int, dtype: str, case: Case) -> torch.Tensor:
    """(M, K) as the case has it: aligned, one element out of step, or with no stride of 1."""
    if case.aligned:
        return empty(m, k, dtype=dtype)
    if case.layout == "strided":
        return empty(m, 2 * k + 1, dtype=dtype)[:, : 2 * k : 2]
    return empty(m, k + 3, dtype=dtype)[:, :k]


def bank(core: torch.Tensor | tuple[torch.Tensor, torch.Tensor], m: int, flags: str) -> RowCores:
    """A core like this one for each of m rows, or two; with so few that rows are split, one."""
    k, slots = 2 if "w" in flags else 1, 1 if "s" in flags else 4096
    factors = core if isinstance(core, tuple) else (core,)
    table, right = (*(part.new_empty(slots, *part.shape) for part in factors), None)[:2]
    handles = torch.empty(m, k, dtype=torch.int64, device="meta")
    weights = empty(m, k, dtype="fp32") if "w" in flags else None
    generations, refused = (torch.empty(n, dtype=torch.int32, device="meta") for n in (slots, 1))
    scales = empty(slots, dtype="fp32")
    return RowCores(table, right, handles, weights, scales, generations, refused, 1)


def launch(case: Case, choose: Callable[[Spec, int], TileConfig]) -> None:
    """Make the case's call of its launcher."""
    transposed = case.layout == "transposed"
    m = next((rows for flag, rows in ROWS.items() if flag in case.flags), 8192)
    n, k = 2048, 4096 if case.even_k else 4096 + 16
    if case.kernel == "decode":
        m, n = FEW_M if case.small else SMALL_M, n if "s" in case.flags else 2**16
    elif case.small:
        m = SMALL_M
    k += 0 if case.even_k or case.aligned else 3
    p, q, r = case.p, case.q, case.r
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    dropout = (seed, 0.1) if "d" in case.flags else None
    gain = empty(n, dtype="fp32") if "g" in case.flags else None
    if case.kernel == "gemm_tail":
        x = rows(m, k, case.x, case)
        weight = rows(k, n, case.x, case).t() if transposed else rows(n, k, case.x, case)
        up = empty(*((q, n) if transposed else (n, q)), dtype=case.down) if q else None
        bias = empty(n, dtype=case.x) if "b" in case.flags else None
        u = empty(m, padded(q), dtype=case.x) if q else None
        mask = bits(m, n) if "d" in case.flags else None
        gemm_tail(x, weight, u, up, bias, transposed, mask, choose, gain)
        return
    if case.kernel == "gain_back":
        y = empty(m, n, dtype=case.x) if "a" in case.flags else None
        bias = empty(n, dtype=case.x) if "b" in case.flags else None
        gain_back(rows(m, n, case.x, case), y, empty(n, dtype="fp32"), bias, choose)
        return
    if case.kernel == "dropped":
        dropped(rows(m, k, case.x, case), bits(m, k), choose)
        return
    if case.kernel == "drawn":
        drawn_bits(seed, 0.1, m, k, choose)
        return
    pair = (empty(p, r, dtype=case.core), empty(r, q, dtype=case.core)) if r > 0 else None
    if case.kernel == "core_grad":
        t, g = empty(m, p, dtype=case.x), empty(m, q, dtype=case.x)
        core = pair or empty(*((p,) if r == -2 else (p, q)), dtype=case.core)
        if "m" in case.flags:
            core_grad_rows(t, g, bank(core, m, case.flags), 0.5, choose)
            return
        core_grad(t, g, core, 0.5, ("a" in case.flags, "b" in case.flags), choose)
        return
    if transposed:  # the way back: p is what x is multiplied down to
        pair = pair and (empty(q, r, dtype=case.core), empty(r, p, dtype=case.core))
    one = empty(*((q, p) if transposed else (p, q)), dtype=case.core) if r == 0 else None
    core = pair or (empty(p, dtype=case.core) if r == -2 else one)
    if "m" in case.flags:
        core = bank(core, m, case.flags)
    x, down = rows(m, k, case.x, case), empty(*((k, p) if transposed else (p, k)), dtype=case.down)
    if case.kernel in ("decode", "relay"):
        weight = rows(k, n, case.x, case).t() if transposed else rows(n, k, case.x, case)
        up = empty(*((q, n) if transposed else (n, q)), dtype=case.down)
        bias = empty(n, dtype=case.x) if "b" in case.flags else None
        factors, whole = (down, core, up), decode if case.kernel == "decode" else relay
        whole(x, weight, *factors, bias, 0.5, transposed, "t" in case.flags, choose, gain)
        return
    shrink(
        x,
        down,
        core,
        0.5,
        transposed,
        "t" in case.flags,
        "u" in case.flags,
        dropout,
        choose,
        want_bits=dropout is not None,
    )
