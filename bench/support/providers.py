"""Providers to measure: each makes, from the same tensors, a function to be called with x.

A provider computes one of five equations: the bare layer, LoRA, or the case's own method, and these
two with DoRA's magnitude. Where a case's W is quantised, the bare layer is that of its library.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fused_lowrank.compute import choose, devices
from fused_lowrank.compute.operands import Operands, Problem, bucket
from fused_lowrank.compute.plans import MEASURED, PLANS
from fused_lowrank.compute.reference import is_diagonal
from fused_lowrank.kernels.tiles import SMALL_M
from fused_lowrank.methods import METHODS
from fused_lowrank.methods.layer import LowRankLinear
from fused_lowrank.testing import pinned_plan

from . import bases
from .cases import Case, parts_of
from .tensors import DORA, Call, Tensors, linear_of, plain_of

PEERS = Path(__file__).parents[1] / "peers"  # checkouts of others' code, ignored by git


class Absent(Exception):
    """A provider cannot be measured here, which only shows when it is built."""


def layer(method: str, fused: bool, impl: str, factors: str) -> Callable[[Case, Tensors], Call]:
    """A builder of this library's layer, reference or fused; method "" is the case's."""

    def build(case: Case, tensors: Tensors) -> Call:
        kind: type[LowRankLinear] = METHODS[method or case.method][fused]
        keywords: dict[str, Any] = {name: case.ranks[name] for name in kind.row.ranks}
        keywords["dropout"] = case.dropout
        if factors.endswith(DORA):
            keywords["dora"] = True
        made = kind.from_linear(
            linear_of(tensors), alpha=tensors.scale * case.r, defer_bases=True, **keywords
        )
        for name, factor in tensors.factors(factors).items():
            setattr(made, name, factor)
        made.bases_pending = False
        setattr(made, "impl", impl)  # noqa: B010 - a class variable, set for one layer
        return made.train()

    return build


def compiled(build: Callable[[Case, Tensors], Call]) -> Callable[[Case, Tensors], Call]:
    """torch.compile of what a builder builds, for the case's shapes alone."""

    def build_compiled(case: Case, tensors: Tensors) -> Call:
        return torch.compile(build(case, tensors), fullgraph=True, dynamic=False)

    return build_compiled


def peft_layer(case: Case, tensors: Tensors, dora: bool = False) -> Call:
    """PEFT's LoRA layer as `inject_adapter_in_model` puts it there, on our tensors; or its DoRA."""
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = nn.Module()
    model.proj = linear_of(tensors)
    if dora and case.base:  # PEFT takes the maxima of an 8-bit module away, which others have too
        model.proj = copy.deepcopy(model.proj)
    if case.base and bases.BASES[case.base].said:
        setattr(model, bases.BASES[case.base].said, True)
    config = LoraConfig(
        r=case.r,
        lora_alpha=cast(Any, tensors.scale * case.r),  # PEFT divides by r, whatever the type
        lora_dropout=case.dropout,
        target_modules=["proj"],
        use_dora=dora,
    )
    made: Any = inject_adapter_in_model(config, model).proj
    made.lora_A["default"].weight = tensors.lora["down"]
    made.lora_B["default"].weight = tensors.lora["up"]
    if dora:
        made.lora_magnitude_vector["default"].weight = tensors.magnitude
    return made.train()


def fused_peft_layer(case: Case, tensors: Tensors) -> Call:
    """That layer through our kernels; Absent where `fuse_lora` leaves it to PEFT's own forward."""
    from fused_lowrank.integrations.peft import fuse_lora

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="left to PEFT's own forward")
        try:
            return fuse_lora(cast(nn.Module, peft_layer(case, tensors)))
        except UserWarning as error:
            raise Absent(str(error)) from None


def lorafusion_layer(case: Case, tensors: Tensors) -> Call:
    """LoRAFusion's fused LoRA; it takes (batch, rows, K), and its backward needs dropout."""
    function = importlib.import_module("lorafusion.ops.lora_v1").FusedLinearLoRA
    down, up = tensors.lora["down"], tensors.lora["up"]

    def call(x: Tensor) -> Tensor:
        operands = (x.unsqueeze(0), tensors.weight, down, up, tensors.scale, case.dropout)
        return function.apply(*operands).squeeze(0)

    return call


def unsloth_layer(case: Case, tensors: Tensors) -> Call:
    """Unsloth's `LoRA_W`, an autograd Function over library GEMMs; it takes (batch, rows, K)."""
    function = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    down, up = tensors.lora["down"], tensors.lora["up"]

    def call(x: Tensor) -> Tensor:
        y = function.apply(x.unsqueeze(0), tensors.weight, None, down, up, tensors.scale)
        return y.squeeze(0)

    return call


def no_compiler(case: Case, device: torch.device) -> str | None:
    """Why torch.compile cannot run: on a CPU it needs a C++ compiler."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            return f"no C++ compiler ({type(error).__name__})"
    return None


def passes(case: Case, device: torch.device) -> tuple[Problem, Problem]:
    """The forward and the backward of a case, as plans are chosen for them."""
    m, made, gpu = bucket(case.rows), parts_of(case), device.type == "cuda"
    p, q, trains_down = made.down.shape[0], made.up.shape[1], made.down.requires_grad
    regular = gpu and (case.k | case.n) % 16 == 0
    bulk = gpu and case.torch_dtype.itemsize == 2 and not trains_down
    bulk = bulk and (case.k | case.n | p | q) % 8 == 0 and m > SMALL_M
    kind = bases.BASES[case.base] if case.base else None
    forward = Problem(
        device=device,
        dtype=case.torch_dtype,
        m=m,
        k=case.k,
        n=case.n,
        p=p,
        q=q,
        transposed=False,
        regular=regular,
        dropout=case.dropout > 0.0,
        want_u=False,
        bulk=bulk,
        diagonal=is_diagonal(made.core),
        base=kind.planned if kind else "",
        called=kind is not None and gpu and kind.quantises_x,
    )
    turned: Any = {"k": case.n, "n": case.k, "p": q, "q": p, "transposed": True, "called": False}
    return forward, forward._replace(want_u=trains_down, **turned)


def planned(case: Case, device: torch.device) -> list[str]:
    """The plans that would be chosen on paper, forward and backward; "auto" for none."""
    x = torch.empty(1, case.k, device=device, dtype=case.torch_dtype).expand(case.rows, case.k)
    if choose.small(x) and not case.dropout and not case.base:
        return ["auto", "auto"]
    pair = passes(case, device)
    return [choose.decide(at, "auto", mode="off").plans[0] for at in pair]


def no_plan(name: str, case: Case, device: torch.device) -> str | None:
    """Why a plan cannot compute a case; kernels that are interpreted are not timed."""
    if PLANS[name].ours and device.type != "cuda":
        return "needs a GPU"
    return next(filter(None, (PLANS[name].why_not(at) for at in passes(case, device))), None)


def not_importable(module: str, gpu: bool, dropout: bool | None = None) -> Any:
    """Why a peer is not there. `dropout`: the only kind of case that it takes, None for both."""

    def why(case: Case, device: torch.device) -> str | None:
        if gpu and device.type != "cuda":
            return "needs a GPU"
        if str(PEERS) not in sys.path:
            sys.path.append(str(PEERS))
        if importlib.util.find_spec(module.split(".")[0]) is None:
            return "not installed"
        if dropout is not None and dropout != bool(case.dropout):
            return f"takes dropout {'above' if dropout else 'of'} 0 only"
        try:
            importlib.import_module(module)
        except Exception as error:
            return f"cannot be imported ({type(error).__name__}: {str(error)[:80]})"
        return None

    return why


def bare(case: Case, tensors: Tensors) -> Call:
    """The floor: the layer without an adapter, quantised where the case's W is."""
    return linear_of(tensors)


def dense(case: Case, tensors: Tensors) -> Call:
    """The bare layer on the values of a quantised W."""
    return plain_of(tensors)


NO_ADAPTER = None, None, None, None, 1.0  # down, core, up, bias, scale


def our_gemm(plan: str) -> Callable[[Case, Tensors], Call]:
    """A builder of the bare layer by our own GEMM, which a plan can be no faster than."""
    gemm, tiles = PLANS[plan].up.run, PLANS[plan].tiles

    class Gemm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            operands = Operands(x, weight, *NO_ADAPTER)  # type: ignore[arg-type]
            return gemm(operands, devices.tiles(x.device, tiles), None)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            (weight,) = ctx.saved_tensors
            operands = Operands(dy, weight.t(), *NO_ADAPTER, transposed=True)  # type: ignore
            return gemm(operands, devices.tiles(dy.device, tiles), None), None

    def build(case: Case, tensors: Tensors) -> Call:
        return lambda x: Gemm.apply(x, tensors.weight)

    return build


@dataclass(frozen=True)
class Provider:
    """A provider: its equation, how it is built and why it may be absent."""

    name: str
    equation: str  # "bare", "lora" or "method", the latter two also with DORA
    build: Callable[[Case, Tensors], Call]
    absent: Callable[[Case, torch.device], str | None] = field(default=lambda case, device: None)
    own_mask: bool = False  # its dropout draws other numbers than torch's: checked without dropout
    slow: bool = False  # to set up: measured after everything else
    plan: str = ""  # computes by this one, whatever the planner would choose
    quantised: bool | None = None  # whether W has to be; None for both

    def why_absent(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot be measured here, or None if it can."""
        if why := bases.why_absent(case.base):
            return why
        if self.quantised is not None and self.quantised != bool(case.base):
            return "is for a quantised W" if self.quantised else "takes a plain W only"
        if self.equation == "method" + DORA and case.row.dora is None:
            return f"there is no DoRA of {case.row.title}"
        if self.plan:
            return no_plan(self.plan, case, device)
        return self.absent(case, device)

    def pinned(self) -> AbstractContextManager[None]:
        """Inside, the provider's plan is taken."""
        return pinned_plan(self.plan) if self.plan else nullcontext()


EAGER, LORA = layer("", False, "reference", "method"), layer("lora", False, "reference", "lora")
AUTO = layer("", True, "auto", "method")
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("bare", "bare", bare),
        *(
            Provider(
                plan.replace("split", "gemm"),
                "bare",
                our_gemm(plan),
                partial(no_plan, plan),
                quantised=False,
            )
            for plan in ("split", "split:deep", "split:narrow", "split:pointers")
        ),
        Provider("dense", "bare", dense, quantised=True),
        Provider("eager", "method", EAGER),
        *(Provider(name, "method", AUTO, own_mask=True, plan=name) for name in MEASURED),
        Provider("called", "method", AUTO, own_mask=True, plan="called", quantised=True),
        Provider("auto", "method", AUTO, own_mask=True),
        Provider("eager-lora", "lora", LORA),
        Provider("peft-lora", "lora", peft_layer, not_importable("peft", gpu=False)),
        Provider(
            "peft-lora-fused",
            "lora",
            fused_peft_layer,
            not_importable("peft", gpu=False),
            own_mask=True,
        ),
        Provider("eager-dora", "method" + DORA, layer("", False, "reference", "method" + DORA)),
        Provider(
            "auto-dora", "method" + DORA, layer("", True, "auto", "method" + DORA), own_mask=True
        ),
        Provider(
            "peft-dora",
            "lora" + DORA,
            partial(peft_layer, dora=True),
            lambda case, device: (
                "drops the base's input too"
                if case.dropout
                else not_importable("peft", gpu=False)(case, device)
            ),
        ),
        Provider(
            "lorafusion",
            "lora",
            lorafusion_layer,
            not_importable("lorafusion.ops.lora_v1", gpu=True, dropout=True),
            own_mask=True,
            quantised=False,
        ),
        Provider(
            "unsloth",
            "lora",
            unsloth_layer,
            not_importable("unsloth.kernels.fast_lora", gpu=True, dropout=False),
            quantised=False,
        ),
        *(
            Provider(
                name,
                equation,
                compiled(eager),
                no_compiler,
                own_mask=True,
                slow=True,
                quantised=False,  # its library breaks the graph
            )
            for name, equation, eager in (
                ("compiled", "method", EAGER),
                ("compiled-lora", "lora", LORA),
            )
        ),
    )
}
