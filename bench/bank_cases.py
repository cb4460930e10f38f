"""The mixed batch of one layer: what is measured, on which tensors, and by whom.

Every row of x has its own of many adapters. A provider computes the bare layer, the equation with a
core for each row ("method"), or plain LoRA with a pair (A, B) for each row ("lora").
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fused_lowrank import AdapterBank, adapt, planner
from fused_lowrank.costs import Pass
from fused_lowrank.plans import PLANS, Split
from fused_lowrank.testing import pinned_plan

from .cases import DTYPES, known
from .providers import SETS_OF_INPUTS, Call, not_importable

SQUARES = {
    "tiny": 96,
    "roberta-base": 768,
    "roberta-large": 1024,
    "llama-3.2-1b": 2048,
    "llama-3.1-8b": 4096,
}
RANK = 16
SCALE = 0.5
GATHERED = 256 << 20  # bytes of LoRA factors that are gathered for rows at a time
LORA_SHARE = 0.25  # of the memory that is free, which the adapters of a peer may take
PEFT_MOST = 1024  # adapters; its loop takes milliseconds for a hundred of them
BLOCK = 100_000  # random cores; a bank of more repeats them


@dataclass(frozen=True)
class BankCase:
    """One square layer of a model, q or query, and one mixed batch."""

    model: str
    rows: int
    distinct: int  # adapters in the batch
    resident: int  # adapters in the bank
    dtype: str = "fp32"
    shrunk: int = 1  # every size is divided by this: a rehearsal

    @property
    def k(self) -> int:
        """in_features and out_features."""
        return max(32, SQUARES[self.model] // self.shrunk)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of x, W and all adapters."""
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """A name that says it all."""
        parts = [self.model, f"m{self.rows}", f"d{self.distinct}", f"of{self.resident}", self.dtype]
        return "/".join([*parts, f"shrunk{self.shrunk}"] if self.shrunk > 1 else parts)

    @property
    def group(self) -> str:
        """The name less the number of residents, in which times are to be flat."""
        return self.name.replace(f"/of{self.resident}/", "/")


def batches(
    model: str, rows: Sequence[int], distinct: Sequence[int] = (), dtype: str = "fp32"
) -> list[BankCase]:
    """Batches in which every row has its own adapter, or `distinct` are shared."""
    made = []
    for m in rows:
        for count in (d for d in distinct or (m,) if d <= m):
            made.append(BankCase(model, m, count, max(1000, 100_000 * (count > 1000)), dtype))
    return made


def residents(case: BankCase, *counts: int) -> list[BankCase]:
    """The case with other numbers of residents."""
    return [replace(case, resident=count) for count in counts]


WIDE = BankCase("llama-3.1-8b", 256, 256, 1000)
NARROW = BankCase("roberta-base", 256, 256, 1000)
LLAMA = replace(WIDE, dtype="bf16")
CPU_MODELS = ("roberta-base", "roberta-large", "llama-3.2-1b", "llama-3.1-8b")
BANK_SETS: dict[str, list[BankCase]] = {
    "smoke": [*batches("tiny", (8, 24), (1, 8)), BankCase("tiny", 24, 24, 100)],
    "cpu": [
        *(case for model in CPU_MODELS for case in batches(model, (256,))),
        *residents(NARROW, 100_000, 1_000_000),
        *residents(WIDE, 1_000_000),
        *(case for model in CPU_MODELS for case in batches(model, (1, 16, 64))),
        *(case for model in CPU_MODELS[::3] for case in batches(model, (256,), (1, 8))),
        *(replace(case, distinct=1, resident=1) for case in (NARROW, WIDE)),
        *residents(replace(WIDE, rows=1, distinct=1), 1_000_000),
    ],
    "gpu": [
        *batches(LLAMA.model, (256, 1, 8192, 64, 16, 1024), dtype="bf16"),
        *residents(LLAMA, 100_000, 1_000_000),
        replace(LLAMA, distinct=1, resident=1),
        *batches(LLAMA.model, (256, 8192, 64, 1024, 16), (1, 8), "bf16"),
        *batches(LLAMA.model, (256, 8192, 1024), (64,), "bf16"),
        *residents(replace(LLAMA, rows=1, distinct=1), 1_000_000),
    ],
}


def select(set_name: str, only: Sequence[str] = (), shrink: int = 1) -> list[BankCase]:
    """The cases of a set, or those named in `only`, each size divided by `shrink`."""
    known([set_name], BANK_SETS, "set")
    cases = {case.name: case for case in BANK_SETS[set_name]}
    chosen = [cases[name] for name in known(only, cases, "case")] if only else cases.values()
    if shrink == 1:
        return list(chosen)
    shrunk = []
    for case in chosen:
        rows, distinct = (max(1, size // shrink) for size in (case.rows, case.distinct))
        resident = max(distinct, case.resident // shrink)
        shrunk.append(BankCase(case.model, rows, distinct, resident, case.dtype, shrink))
    return list({case.name: case for case in shrunk}.values())


@dataclass
class Batch:
    """The tensors of a case, which every provider shares."""

    case: BankCase
    xs: list[Tensor]  # (rows, K)
    ids: Tensor  # (rows,), which of the distinct adapters
    weight: nn.Parameter  # (K, K)
    down: Tensor  # (r, K)
    up: Tensor  # (K, r)
    cores: Tensor  # (distinct, r, r)
    model: nn.Module  # the layer in a bank
    bank: AdapterBank
    names: list[str]  # of the rows
    _pairs: list[Tensor] = field(default_factory=list)

    def pairs(self) -> list[Tensor]:
        """[A (distinct, r, K), B (distinct, K, r)] of plain LoRA, made when first asked for."""
        if not self._pairs:
            case, device = self.case, self.weight.device
            generator = torch.Generator(device).manual_seed(case.rows)
            for size, fan in (((RANK, case.k), case.k), ((case.k, RANK), RANK)):
                values = torch.empty(case.distinct, *size, dtype=case.torch_dtype, device=device)
                self._pairs.append(values.normal_(std=fan**-0.5, generator=generator))
        return self._pairs


def make_batch(case: BankCase, device: torch.device) -> Batch:
    """Random operands of the order of one, the bank filled, the batch's adapters all over it."""
    generator = torch.Generator(device).manual_seed(case.rows * 7919 + case.k)

    def normal(*size: int, fan: int) -> Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
        return values.div_(math.sqrt(fan)).to(case.torch_dtype)

    k = case.k
    weight = nn.Parameter(normal(k, k, fan=k), requires_grad=False)
    bare = nn.Linear(k, k, bias=False, device="meta")
    bare.weight = weight
    model = adapt(
        nn.Sequential(bare),
        "lora_xs",
        target_modules=["0"],
        r=RANK,
        alpha=SCALE * RANK,
        defer_bases=True,
        progress=False,
    ).eval()
    layer: Any = model[0]  # type: ignore[index]
    layer.to_empty(device=device) if layer.down.is_meta else None
    layer.weight = weight
    layer.down = nn.Parameter(normal(RANK, k, fan=k), requires_grad=False)
    layer.up = nn.Parameter(normal(k, RANK, fan=RANK), requires_grad=False)
    layer.bases_pending = False
    bank = AdapterBank.from_model(model, slots=case.resident, dtype=case.torch_dtype)
    block = normal(min(case.resident, BLOCK), RANK, RANK, fan=RANK)
    for first in range(0, case.resident, BLOCK):
        count = min(BLOCK, case.resident - first)
        cores = block[:count], None, torch.full((count,), SCALE)
        bank.put([str(i) for i in range(first, first + count)], {"0": cores})
    there = torch.randperm(case.resident, generator=torch.Generator().manual_seed(case.rows))
    there = there[: case.distinct]
    order = torch.randperm(case.rows, generator=torch.Generator().manual_seed(case.k))
    ids = order % case.distinct
    return Batch(
        case,
        [normal(case.rows, k, fan=1) for _ in range(SETS_OF_INPUTS)],
        ids.to(device),
        weight,
        layer.down.detach(),
        layer.up.detach(),
        block[(there % BLOCK).to(device)],
        model,
        bank,
        [str(int(there[i])) for i in ids],
    )


# --- providers ---


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


def free_bytes(device: torch.device) -> int:
    """Memory that is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def too_large(case: BankCase, device: torch.device) -> str | None:
    """Why the adapters of plain LoRA are not there."""
    size = 2 * case.distinct * case.k * RANK * case.torch_dtype.itemsize
    if size > LORA_SHARE * free_bytes(device):
        return f"{case.distinct} adapters would take {size / 2**30:.1f} GiB"
    return None


def no_peft(case: BankCase, device: torch.device) -> str | None:
    """Why PEFT is not there."""
    if case.distinct > PEFT_MOST:
        return f"its loop over more than {PEFT_MOST} adapters is not waited for"
    return not_importable("peft", gpu=False)(cast(Any, case), device) or too_large(case, device)


def no_graph(case: BankCase, device: torch.device) -> str | None:
    """Why there is no CUDA graph."""
    return None if device.type == "cuda" else "needs a GPU"


def no_plan(name: str, case: BankCase, device: torch.device) -> str | None:
    """Why a plan cannot compute a case; kernels that are interpreted are not timed."""
    if isinstance(PLANS[name], Split) and device.type != "cuda":
        return "needs a GPU"
    regular = device.type == "cuda" and case.k % 16 == 0
    kind, size = (device, case.torch_dtype, planner.bucket(case.rows)), (case.k, case.k)
    at = Pass(*kind, *size, RANK, RANK, False, regular, False, False, rows=True)
    return PLANS[name].why_not(at)


@dataclass(frozen=True)
class BankProvider:
    """Who computes, which equation, how it is built and why it may be absent."""

    name: str
    equation: str  # "bare", "method" or "lora"
    build: Callable[[Batch], Call]
    absent: Callable[[BankCase, torch.device], str | None] = field(default=lambda case, device: None)
    plan: str = ""  # computes by this one, whatever the planner would choose

    def why_absent(self, case: BankCase, device: torch.device) -> str | None:
        """Why it cannot be measured here, or None if it can."""
        return no_plan(self.plan, case, device) if self.plan else self.absent(case, device)

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
        *(BankProvider(name, "method", inside, plan=name) for name in PLANS),
        BankProvider("graph", "method", graph, no_graph),
        BankProvider("gather-cores", "method", gather_cores),
        BankProvider("gather-lora", "lora", gather_pairs, too_large),
        BankProvider("peft-loop", "lora", peft_loop, no_peft),
    )
}
