"""explain: which plan computes a layer, with which tiles, and why."""

from __future__ import annotations

import torch

from . import costs, planner, plans, tuning
from .costs import Pass
from .layers.base import LowRankLinear


def explain(layer: LowRankLinear, rows: int) -> None:
    """Print how a training step of the layer on `rows` rows is computed, and what that costs.

    For the forward and the backward: the plan, why it is taken, the tiles of its kernels, and on
    paper its operations, bytes and time, beside the least that the adapted layer and the bare one
    could take on this device. The GPU's times on paper are predictions, not measurements. Nothing
    is computed or measured, and what is said is what a call will do.

    Args:
        layer: a fused layer (`FusedLoraXSLinear`, …).
        rows: M, the product of x's leading dimensions; x is taken to be contiguous and of the
            weight's dtype.

    Raises:
        TypeError: the layer is not a low-rank layer.
        ValueError: fewer than one row.
    """
    if not isinstance(layer, LowRankLinear):
        raise TypeError(f"layer is a {type(layer).__name__}: it must be a fused low-rank layer")
    if rows < 1:
        raise ValueError(f"rows is {rows}: it must be at least 1")
    (n, k), p, q = layer.weight.shape, layer.down.shape[0], layer.up.shape[1]
    device, dtype = layer.weight.device, layer.weight.dtype
    print(
        f"{type(layer).__name__} {k} → {n}, P = {p}, Q = {q}, {str(dtype).removeprefix('torch.')} "
        f"on {tuning.device_name(device)}, {rows} rows"
    )
    if layer.merged or layer.disabled:
        print("the adapter is merged or disabled: this is the bare layer")
        return
    x = torch.empty(1, k, dtype=dtype, device=device).expand(rows, k)
    if layer.impl == "reference":
        print("the equation in plain torch: no plan is chosen")
        return
    if layer.impl == "auto" and planner.small(x) and not layer.dropout:
        print("a chain of library operations: on a CPU the host's work is most of so small a call")
        return
    dropout, trains_down = layer.dropout > 0.0, layer.down.requires_grad
    for back in (False, True):
        sizes = (n, k, q, p) if back else (k, n, p, q)
        regular = planner.has_kernels(device) and (k | n) % 16 == 0
        at = Pass(device, dtype, planner.bucket(rows), *sizes, back, regular, dropout,
                  back and trains_down)  # fmt: skip
        print("\n".join(lines(at, layer.impl)))


def lines(at: Pass, impl: str) -> list[str]:
    """What there is to say of one pass."""
    decision = planner.CHOSEN.get((at, impl)) or planner.decide(at, impl, plans.plan_names, None)
    name = decision.plans[0]
    cost, floor, bare = costs.predict(name, at), costs.least(at), costs.least(at, adapted=False)
    way = "backward" if at.back else "forward"
    said = [
        f"{way}: {name}, {cost.launches} launches; rows up to {at.m}",
        f"  why: {decision.why}",
        f"  on paper: {cost.operations / 1e9:.3f} GFLOP, {cost.bytes / 1e6:.3f} MB, "
        f"{cost.seconds * 1e3:.4f} ms; floor {floor.operations / 1e9:.3f} GFLOP, "
        f"{floor.bytes / 1e6:.3f} MB, {floor.seconds * 1e3:.4f} ms; "
        f"bare layer {bare.seconds * 1e3:.4f} ms",
    ]
    others = [
        f"{other} {costs.predict(other, at).seconds * 1e3:.4f}" for other in decision.plans[1:]
    ]
    if others:
        said.append(f"  others on paper, ms: {', '.join(others)}")
    said += [f"  {kernel}: {tile}" for kernel, tile in plans.PLANS[name].tiles(at)]
    return said
