"""The mixed batch of one layer: the cases, the named sets of them, and the tensors of a case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_lowrank import AdapterBank, adapt

from .cases import DTYPES, known
from .tensors import SETS_OF_INPUTS

SQUARES = {
    "tiny": 96,
    "roberta-base": 768,
    "roberta-large": 1024,
    "llama-3.2-1b": 2048,
    "llama-3.1-8b": 4096,
}
RANK = 16
SCALE = 0.5
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
