"""The plans: ways to compute one pass through a layer, the forward's or, with other operands, the
backward's.

    t, u = shrink(x, down, core, scale)        y = gemm_tail(x, W, u, up, bias)

aten     library GEMMs: the base, then u·upᵀ added in place
first    library GEMMs: u·upᵀ, then the base added to it
split    our two kernels; `split:name` with another set of tiles (`VARIANTS` in kernels/tiles.py)
mixed    our shrink, then as `first`
decode   our one launch for few rows
relay    our one persistent launch for many rows

For `planner.use_batch_invariance` there are two more, `Alone` and `Fixed`.

`layer` carries out a pass by the one that the planner chooses for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import isolation, planner
from .costs import Pass
from .dropout import Dropout, dropped, kept
from .kernels.tiles import VARIANTS
from .reference import TORCH, AnyCore, Rows, like, product, rows_grad, through_rows

OptTensor = Tensor | None
Wanted = Any  # a Tensor, or None where it was not wanted


class Aten:
    """Library GEMMs, on any device."""

    name = "aten"
    proven = True  # may be chosen; others must be asked for by name
    products = TORCH

    def why_not(self, at: Pass) -> str | None:
        """Why this plan cannot compute the pass, or None if it can."""
        return None

    def shrink(
        self,
        x: Tensor,
        down: Tensor,
        core: AnyCore,
        scale: float,
        back: bool,
        want_t: bool,
        want_u: bool,
        dropout: Dropout = None,
    ) -> tuple[Wanted, Wanted]:
        """(t, u). With `back`, down lies as (K, P) and the core as (Q, P)."""
        down = like(down, x.dtype)
        t = self.products.matmul(dropped(x, dropout), down if back else down.t())
        if dropout is not None:
            t.div_(1.0 - dropout[1])
        if not want_u:
            return t, None
        if isinstance(core, Rows):
            return t, through_rows(t, core.turned() if back else core, scale)
        matrix = product(core)
        if matrix is None:
            return t, (t if scale == 1.0 else t * scale)
        u = self.products.matmul(like(t, matrix.dtype), matrix.t() if back else matrix)
        return t, like(u if scale == 1.0 else u.mul_(scale), x.dtype)

    def base(self, x: Tensor, weight: Tensor, bias: OptTensor) -> Tensor:
        """x·Wᵀ + bias, by itself."""
        return self.products.linear(x, weight, bias)

    def gemm_tail(
        self,
        x: Tensor,
        weight: Tensor,
        u: Tensor,
        up: Tensor,
        bias: OptTensor,
        back: bool,
        dropout: Dropout = None,
    ) -> Tensor:
        """x·Wᵀ + bias + u·upᵀ, the last where an x of y's shape would be kept by `dropout`."""
        up = like(up, x.dtype) if back else like(up, x.dtype).t()
        y = self.base(x, weight, bias)
        if dropout is None:
            return self.products.add_matmul(y, u, up)
        return y.add_(kept(y, *dropout).mul_(self.products.matmul(u, up)))

    def layer(
        self,
        x: Tensor,
        weight: Tensor,
        down: Tensor,
        core: AnyCore,
        up: Tensor,
        bias: OptTensor,
        scale: float,
        back: bool,
        want_t: bool,
        want_u: bool,
        dropout: Dropout = None,
    ) -> tuple[Tensor, Wanted, Wanted]:
        """(y, t, u): one pass. Dropout is of x on the way there, of the tail on the way back."""
        there, tail = (None, dropout) if back else (dropout, None)
        t, u = self.shrink(x, down, core, scale, back, want_t, True, there)
        return self.gemm_tail(x, weight, u, up, bias, back, tail), t, u

    def core_grad(
        self,
        t: Wanted,
        g: Wanted,
        core: Any,
        scale: float,
        want: tuple[bool, bool],
    ) -> tuple[Wanted, Wanted]:
        """(dcore, None), or for a pair (da, db), those that are wanted."""
        if isinstance(core, Rows):
            return core_grads(rows_grad(t, g, core, scale), core, want)
        a, b = core if isinstance(core, tuple) else (core, core)
        dtype = torch.promote_types(a.dtype, b.dtype)
        dcore = t.t().to(dtype) @ g.to(dtype)
        if scale != 1.0:
            dcore.mul_(scale)
        if not isinstance(core, tuple):
            return dcore, None
        da = (dcore @ b.t().to(dtype)).to(a.dtype) if want[0] else None
        db = (a.t().to(dtype) @ dcore).to(b.dtype) if want[1] else None
        return da, db

    def dropped(self, x: Tensor, dropout: Dropout) -> Tensor:
        """x as the forward's shrink saw it, but for the factor 1 / (1 - p)."""
        return dropped(x, dropout)

    def tiles(self, at: Pass) -> list[tuple[str, Any]]:
        """The kernels of a pass, and the tiles that they take."""
        return []


class Isolated(Aten):
    """`aten` for a CPU whose library reads beyond rows (`isolation`): what a bank takes there."""

    products = isolation.PRODUCTS


class First(Aten):
    """The same in another order: the base is added to u·upᵀ, which is there first."""

    name = "first"

    def why_not(self, at: Pass) -> str | None:
        """Where a mask lies between the two, there is nothing to add to."""
        if at.rows:
            return "has no core for each row"  # without an adapter it is not the bare layer's bits
        return "has no dropout on the way back" if at.dropout and at.back else super().why_not(at)

    def gemm_tail(self, x, weight, u, up, bias, back, dropout=None):  # type: ignore[no-untyped-def]
        """x·Wᵀ + bias + u·upᵀ."""
        up = like(up, x.dtype) if back else like(up, x.dtype).t()
        u = u[:, : up.shape[0]]  # the kernels' u is padded
        y = u @ up if bias is None else torch.addmm(bias, u, up)
        return y.addmm_(x, weight.t())


def core_grads(dcore: Tensor, rows: Rows, want: tuple[bool, bool]) -> tuple[Wanted, Wanted]:
    """The gradients of the tables of `rows`, from those of the cores, (slots, P, Q)."""
    a, b = rows.table, rows.right
    if b is None:
        return like(dcore, a.dtype), None
    da = like(dcore @ like(b, dcore.dtype).mT, a.dtype) if want[0] else None
    db = like(like(a, dcore.dtype).mT @ dcore, b.dtype) if want[1] else None
    return da, db


def contiguous(core: AnyCore) -> Any:
    """The core with each factor contiguous, as the kernels read it."""
    if isinstance(core, Rows):  # tables that the bank has made
        return core
    if isinstance(core, tuple):
        return core[0].contiguous(), core[1].contiguous()
    return None if core is None else core.contiguous()


class Split(Aten):
    """This library's kernels, one launch for each step; `variant` names another set of tiles."""

    kernels: tuple[str, ...] = ("shrink", "gemm_tail")

    def __init__(self, variant: str = "") -> None:
        self.variant = variant
        self.name = f"split:{variant}" if variant else "split"
        self.proven = not variant

    def why_not(self, at: Pass) -> str | None:
        """Where the kernels cannot run, or not with these tiles."""
        if reason := planner.why_not_triton(at.device, at.dtype, at.p, at.q):
            return reason
        return planner.why_not_variant(at, self.variant) if self.variant else None

    def shrink(self, x, down, core, scale, back, want_t, want_u, dropout=None):  # type: ignore[no-untyped-def]
        """(t, u) in one launch; u is padded to a power of two."""
        from .kernels.shrink import shrink

        choose = planner.tiles(x.device, self.variant)
        down, core = down.contiguous(), contiguous(core)
        return shrink(x, down, core, scale, back, want_t, want_u, dropout, choose)

    def gemm_tail(self, x, weight, u, up, bias, back, dropout=None):  # type: ignore[no-untyped-def]
        """y in one launch; without u and up it is the base by itself."""
        from .kernels.gemm_tail import gemm_tail

        up = None if up is None else up.contiguous()
        bias = None if bias is None else bias.contiguous()
        choose = planner.tiles(x.device, self.variant)
        return gemm_tail(x, weight, u, up, bias, back, dropout, choose)

    def core_grad(self, t, g, core, scale, want):  # type: ignore[no-untyped-def]
        """The core's gradients in one launch."""
        from .kernels.core_grad import core_grad

        choose = planner.tiles(t.device, self.variant)
        if isinstance(core, Rows):
            from .kernels.core_grad_rows import core_grad_rows

            return core_grads(core_grad_rows(t, g, core, scale, choose), core, want)
        return core_grad(t, g, contiguous(core), scale, want, choose)

    def dropped(self, x: Tensor, dropout: Dropout) -> Tensor:
        """x as the forward's shrink saw it, but for the factor 1 / (1 - p)."""
        from .kernels.dropout import dropped

        return x if dropout is None else dropped(x, *dropout, planner.tiles(x.device))

    def tiles(self, at: Pass) -> list[tuple[str, Any]]:
        """The kernels of a pass, and the tiles that they take."""
        choose = planner.tiles(at.device, self.variant)
        return [(kernel, choose(planner.spec_of(kernel, at), at.m)) for kernel in self.kernels]


class Alone(Isolated):
    """Each row by itself: libraries choose their kernels by the shape."""

    def layer(self, x, weight, down, core, up, bias, scale, back, want_t, want_u, dropout=None):  # type: ignore[no-untyped-def]
        """(y, t, u), a row at a time."""
        if dropout is not None:
            raise RuntimeError("batch invariance by library GEMMs has no dropout: switch it off")
        same = up, bias, scale, back, want_t, want_u, None
        parts = []
        for m, row in enumerate(x.split(1)):
            own = core
            if isinstance(core, Rows):
                line = slice(m // core.repeat, m // core.repeat + 1)
                weights = None if core.weights is None else core.weights[line]
                handles = core.handles[line]
                own = core._replace(handles=handles, weights=weights, repeat=1, known=None)
            parts.append(super().layer(row, weight, down, own, *same))
        y, t, u = zip(*parts, strict=True)
        return torch.cat(y), torch.cat(t) if want_t else None, torch.cat(u) if want_u else None


class Fixed(Split):
    """`split`, with tiles and sums that do not depend on the number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.variant = "fixed"

    def why_not(self, at: Pass) -> str | None:
        """Where the kernels cannot run."""
        return SPLIT.why_not(at)


class Mixed(Split):
    """Our shrink; the library's GEMM adds the base to u·upᵀ, which is there first."""

    kernels = ("shrink",)

    def __init__(self) -> None:
        super().__init__()
        self.name = "mixed"

    def why_not(self, at: Pass) -> str | None:
        """Where either of its parts cannot be."""
        return First.why_not(First(), at) or super().why_not(at)

    gemm_tail = First.gemm_tail


class OneLaunch(Split):
    """The whole pass in one launch: `decode` for few rows, `relay` for many."""

    def __init__(self, name: str, proven: bool) -> None:
        super().__init__()
        self.name, self.proven, self.kernels = name, proven, (name,)

    def why_not(self, at: Pass) -> str | None:
        """Where the kernel is not for so many rows, for such ranks, or for this device."""
        return super().why_not(at) or planner.why_not_one_launch(at, self.name)

    def layer(self, x, weight, down, core, up, bias, scale, back, want_t, want_u, dropout=None):  # type: ignore[no-untyped-def]
        """(y, t, None) in one launch."""
        from .kernels.decode import decode
        from .kernels.relay import relay

        launch = decode if self.name == "decode" else relay
        factors = down.contiguous(), contiguous(core), up.contiguous()
        bias = None if bias is None else bias.contiguous()
        choose = planner.tiles(x.device)
        return *launch(x, weight, *factors, bias, scale, back, want_t, choose), None


ATEN, ISOLATED, SPLIT, ALONE, FIXED = Aten(), Isolated(), Split(), Alone(), Fixed()
PLANS: dict[str, Aten] = {
    plan.name: plan
    for plan in (
        ATEN,
        First(),
        SPLIT,
        *(Split(name) for name in VARIANTS),
        Mixed(),
        OneLaunch("decode", proven=True),
        OneLaunch("relay", proven=False),
    )
}


def plan_names(impl: str, at: Pass) -> list[str]:
    """The plans that an implementation may take for a pass."""
    if impl in ("aten", "isolated"):
        return ["aten"]
    kernels = [name for name, plan in PLANS.items() if isinstance(plan, Split)]
    if impl == "triton":
        names = [name for name in kernels if name != "mixed"]
    elif at.device.type == "cuda":
        names = list(PLANS)
    else:
        names = [name for name in PLANS if name not in kernels]
    names = [name for name in names if PLANS[name].proven and not PLANS[name].why_not(at)]
    # The kernels' dropout mask is not torch's, and the two passes of a step must have one mask.
    masked = [name for name in names if name in kernels] if at.dropout else []
    return masked or names


def describe(
    x: Tensor, weight: Tensor, p: int, q: int, back: bool, dropout: bool, want_u: bool, rows: bool
) -> Pass:
    """What a plan is chosen by."""
    (m, k), n = x.shape, weight.shape[0]
    regular = planner.has_kernels(x.device) and (
        (k | n | x.stride(0)) % 16 == 0
        and x.stride(1) == 1
        and 1 in weight.stride()
        and max(weight.stride()) % 16 == 0
        and (x.data_ptr() | weight.data_ptr()) % 16 == 0
    )
    kind = x.device, x.dtype, planner.bucket(m)
    return Pass(*kind, k, n, p, q, back, regular, dropout, want_u, rows)


def layer(
    impl: str,
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    core: AnyCore,
    up: Tensor,
    bias: OptTensor,
    scale: float,
    back: bool,
    want_t: bool,
    want_u: bool,
    dropout: Dropout = None,
) -> tuple[Aten, Tensor, Wanted, Wanted]:
    """(plan, y, t, u): one pass, by the plan that the planner chooses for it."""

    def by(plan: Aten) -> tuple[Aten, Tensor, Wanted, Wanted]:
        operands = x, weight, down, core, up, bias, scale, back, want_t, want_u
        return plan, *plan.layer(*operands, dropout)

    def compute(name: str) -> tuple[Aten, Tensor, Wanted, Wanted]:
        return by(ISOLATED if impl == "isolated" and name == "aten" else PLANS[name])

    if x.shape[0] == 0:  # nothing to launch
        return by(ATEN)
    p, q = down.shape[back], up.shape[not back]
    rows = isinstance(core, Rows)
    at = describe(x, weight, p, q, back, dropout is not None, want_u, rows)
    if planner.INVARIANT[0]:
        kernels = impl == "triton" or (impl == "auto" and x.is_cuda)
        return by(FIXED if kernels and not FIXED.why_not(at) else ALONE)
    for name in planner.PINNED_PLAN:
        if reason := PLANS[name].why_not(at):
            raise RuntimeError(f"the pinned plan {name} cannot compute this: it {reason}")
        return compute(name)
    return planner.carry_out(at, impl, plan_names, compute)


def steps(impl: str, x: Tensor, p: int, q: int) -> Aten:
    """Who makes the single steps of a backward that needs no dx."""
    if impl == "isolated":
        return ISOLATED
    kernels = impl == "triton" or (
        impl == "auto" and x.is_cuda and not planner.why_not_triton(x.device, x.dtype, p, q)
    )
    return SPLIT if kernels and x.shape[0] else ATEN
