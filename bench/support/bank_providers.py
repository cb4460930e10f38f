"""Providers for mixed batches: each makes, from one `Batch`, a function to be called with x.

A provider computes the bare layer, the equation with a core for each row ("method"), or plain LoRA
with a pair (A, B) for each row ("lora").
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fused_lowrank import use_batch_invariance
from fused_lowrank.compute.operands import Problem, bucket
from fused_lowrank.compute.plans import MEASURED, PLANS
from fused_lowrank.kernels.tiles import SMALL_M
from fused_lowrank.testing import pinned_plan

from .bank_cases import RANK, SCALE, BankCase, Batch
from .providers import Call, not_importable

GATHERED = 256 << 20  # bytes of LoRA factors that are gathered for rows at a time
LORA_SHARE = 0.25  # of the device's memory, which the adapters of a peer may take
INVARIANT_MOST = 64  # rows, on a CPU
PEFT_MOST = 1024  # adapters; its loop takes milliseconds for a hundred of them


def bare(batch: Batch) -> Call:
    """The floor: the layer without adapters."""
    return lambda x: linear(x, batch.weight)


def by_names(batch: Batch) -> Call:
    """A whole call: names to handles, the bank entered and left."""

    def call(x: Tensor) -> Tensor:
        with batch.bank.use(batch.names):
            return batch.model(x)

    return call


def by_handles(batch: Batch) -> Call:
    """The same with handles, as a server keeps them in a buffer."""
    handles = batch.bank.handles(batch.names)

    def call(x: Tensor) -> Tensor:
        with batch.bank.use(handles):
            return batch.model(x)

    return call


def inside(batch: Batch) -> Call:
    """The layer alone, in a bank entered before: what each layer of a model adds."""
    with batch.bank.use(batch.names):
        batch.model(batch.xs[0])
        context = copy_context()
    return lambda x: context.run(batch.model, x)


def invariant(batch: Batch) -> Call:
    """The same under use_batch_invariance: what it costs."""
    layer = inside(batch)

    def call(x: Tensor) -> Tensor:
        use_batch_invariance(True)
        try:
            return layer(x)
        finally:
            use_batch_invariance(False)

    return call


def graph(batch: Batch) -> Call:
    """A captured CUDA graph for each x, replayed. The handles come into its buffer afterwards."""
    handles = batch.bank.handles([None] * batch.case.rows)
    captured: dict[int, tuple[Any, Tensor]] = {}
    for x in batch.xs:
        with batch.bank.use(handles):
            stream = torch.cuda.Stream(x.device)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                for _ in range(3):
                    batch.model(x)
            torch.cuda.current_stream(x.device).wait_stream(stream)
            made = torch.cuda.CUDAGraph()
            with torch.cuda.graph(made):
                y = batch.model(x)
        captured[x.data_ptr()] = made, y
    handles.copy_(batch.bank.handles(batch.names))

    def call(x: Tensor) -> Tensor:
        made, y = captured[x.data_ptr()]
        made.replay()
        return y

    return call


def gather_cores(batch: Batch) -> Call:
    """Our equation as one writes it in torch: gather, bmm, and a sum."""

    def call(x: Tensor) -> Tensor:
        t = linear(x, batch.down)
        u = torch.bmm(t[:, None], batch.cores[batch.ids])[:, 0] * SCALE
        return linear(x, batch.weight) + linear(u, batch.up)

    return call


def gather_pairs(batch: Batch) -> Call:
    """Plain LoRA with A and B gathered for each row, as many rows at a time as fit in memory."""
    a, b = batch.pairs()
    chunk = max(1, GATHERED // (2 * a[0].nbytes))

    def call(x: Tensor) -> Tensor:
        y = linear(x, batch.weight)
        parts = (tensor.split(chunk) for tensor in (x, batch.ids, y))
        for x_part, ids, y_part in zip(*parts, strict=True):
            t = torch.bmm(a[ids], x_part[:, :, None])
            y_part += torch.bmm(b[ids], t)[:, :, 0] * SCALE
        return y

    return call


def peft_loop(batch: Batch) -> Call:
    """PEFT's layer with as many adapters as the batch has, called with `adapter_names`."""
    from peft import LoraConfig, inject_adapter_in_model

    (n, k), (a, b) = batch.weight.shape, batch.pairs()
    model = nn.Module()
    model.proj = nn.Linear(k, n, bias=False, device="meta")
    model.proj.weight = batch.weight
    config = LoraConfig(
        r=RANK,
        lora_alpha=cast(Any, SCALE * RANK),  # PEFT divides by r, whatever the type
        target_modules=["proj"],
        init_lora_weights=False,
    )
    names = [f"a{i}" for i in range(batch.case.distinct)]
    layer: Any = inject_adapter_in_model(config, model, names[0]).proj
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names[1:]:
            layer.update_layer(name, RANK, config.lora_alpha, config=config)
    for i, name in enumerate(names):
        layer.lora_A[name].weight = nn.Parameter(a[i], requires_grad=False)
        layer.lora_B[name].weight = nn.Parameter(b[i], requires_grad=False)
    layer.eval()
    rows = [names[i] for i in batch.ids.tolist()]
    return lambda x: layer(x, adapter_names=rows)


def memory(device: torch.device) -> int:
    """Bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def too_large(case: BankCase, device: torch.device) -> str | None:
    """Why the adapters of plain LoRA are not there."""
    size = 2 * case.distinct * case.k * RANK * case.torch_dtype.itemsize
    if size > LORA_SHARE * memory(device):
        return f"{case.distinct} adapters would take {size / 2**30:.1f} GiB"
    return None


def no_peft(case: BankCase, device: torch.device) -> str | None:
    """Why PEFT is not there."""
    if case.distinct > PEFT_MOST:
        return f"its loop over more than {PEFT_MOST} adapters is not waited for"
    return not_importable("peft", gpu=False)(cast(Any, case), device) or too_large(case, device)


def no_invariant(case: BankCase, device: torch.device) -> str | None:
    """Why it is not there: on a CPU it computes one row at a time."""
    slow = device.type == "cpu" and case.rows > INVARIANT_MOST
    return f"more than {INVARIANT_MOST} rows, one at a time, are not waited for" if slow else None


def no_graph(case: BankCase, device: torch.device) -> str | None:
    """Why there is no CUDA graph."""
    return None if device.type == "cuda" else "needs a GPU"


def no_plan(name: str, case: BankCase, device: torch.device) -> str | None:
    """Why a plan cannot compute a case; kernels that are interpreted are not timed."""
    if PLANS[name].ours and device.type != "cuda":
        return "needs a GPU"
    regular = device.type == "cuda" and case.k % 16 == 0
    kind, size = (device, case.torch_dtype, bucket(case.rows)), (case.k, case.k)
    bulk = regular and case.rows > SMALL_M and case.torch_dtype.itemsize == 2
    problem = Problem(*kind, *size, RANK, RANK, False, regular, False, False, True, bulk)
    return PLANS[name].why_not(problem)


@dataclass(frozen=True)
class BankProvider:
    """A provider: its equation, how it is built and why it may be absent."""

    name: str
    equation: str  # "bare", "method" or "lora"
    build: Callable[[Batch], Call]
    absent: Callable[[BankCase, torch.device], str | None] | None = None
    plan: str = ""  # computes by this one, whatever the planner would choose

    def why_absent(self, case: BankCase, device: torch.device) -> str | None:
        """Why it cannot be measured here, or None if it can."""
        if self.plan:
            return no_plan(self.plan, case, device)
        return self.absent(case, device) if self.absent else None

    def pinned(self) -> AbstractContextManager[None]:
        """Inside, the provider's plan is taken."""
        return pinned_plan(self.plan) if self.plan else nullcontext()


BANK_PROVIDERS: dict[str, BankProvider] = {
    provider.name: provider
    for provider in (
        BankProvider("bare", "bare", bare),
        BankProvider("bank", "method", by_names),
        BankProvider("bank:handles", "method", by_handles),
        BankProvider("bank:layer", "method", inside),
        BankProvider("bank:invariant", "method", invariant, no_invariant),
        *(BankProvider(name, "method", inside, plan=name) for name in MEASURED),
        BankProvider("graph", "method", graph, no_graph),
        BankProvider("gather-cores", "method", gather_cores),
        BankProvider("gather-lora", "lora", gather_pairs, too_large),
        BankProvider("peft-loop", "lora", peft_loop, no_peft),
    )
}
