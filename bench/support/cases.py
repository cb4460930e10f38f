"""The cases to measure, and the named sets of them, most valuable first."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from fused_lowrank.methods import METHODS
from fused_lowrank.methods.method import Method, Parts

from .bases import BASES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# model → {layer: (in_features K, out_features N)}
MODELS = {
    "roberta-base": {"query": (768, 768), "output": (3072, 768)},
    "roberta-large": {"query": (1024, 1024), "intermediate": (1024, 4096), "output": (4096, 1024)},
    "llama-3.1-8b": {
        "q": (4096, 4096),
        "k": (4096, 1024),
        "gate": (4096, 14336),
        "down": (14336, 4096),
    },
    "llama-3-70b": {
        "q": (8192, 8192),
        "k": (8192, 1024),
        "gate": (8192, 28672),
        "down": (28672, 8192),
    },
    "qwen3-0.6b": {"q": (1024, 2048), "gate": (1024, 3072)},
    "qwen3-4b": {"q": (2560, 4096), "gate": (2560, 9728), "down": (9728, 2560)},
    "tiny": {"square": (96, 96), "wide": (64, 160), "even": (128, 192)},
}
ROWS = (1, 16, 128, 1024, 2048, 4096, 8192, 16384)
SHORT = {"xs": "lora_xs", "mini": "lora_mini"}  # words for methods, beside their own names
WORD = re.compile(r"([a-z_]+?)(?:(\d+)(?:x(\d+))?)?")


@dataclass(frozen=True)
class Case:
    """One adapted layer and one number of rows."""

    model: str
    layer: str
    m: int
    method: str  # of METHODS
    r: int
    ab: int = 0  # the method's other ranks; 0: as its row has them
    dtype: str = "bf16"
    dropout: float = 0.0
    base: str = ""  # of BASES, where W is quantised
    shrunk: int = 1  # M, K and N are divided by this: a rehearsal

    @property
    def k(self) -> int:
        """in_features."""
        return max(32, MODELS[self.model][self.layer][0] // self.shrunk)

    @property
    def n(self) -> int:
        """out_features."""
        return max(32, MODELS[self.model][self.layer][1] // self.shrunk)

    @property
    def rows(self) -> int:
        """M, the rows of x."""
        return max(1, self.m // self.shrunk)

    @property
    def row(self) -> Method:
        """The method, as the row that its operands are read from."""
        return METHODS[self.method][0].row

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks by the method's names."""
        others = {name: self.ab or default for name, default in self.row.ranks.items()}
        return {**others, "r": self.r}

    @property
    def p(self) -> int:
        """Rows of down."""
        return parts_of(self).down.shape[0]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of x and W."""
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """A name that says it all."""
        ranks = f"r{self.r}" + (f"ab{self.ab}" if self.ab else "")
        parts = [f"{self.model}.{self.layer}", self.method, ranks, f"m{self.m}", self.dtype]
        if self.dropout:
            parts.append(f"drop{self.dropout}")
        if self.base:
            parts.append(self.base)
        if self.shrunk > 1:
            parts.append(f"shrunk{self.shrunk}")
        return "/".join(parts)


def at(model: str, layer: str, rows: int | Iterable[int], *rest: object) -> list[Case]:
    """The cases of one layer at some numbers of rows; `rest` as `parse` takes it."""
    several = (rows,) if isinstance(rows, int) else rows
    return [parse(model, layer, m, *rest) for m in several]


def parse(model: str, layer: str, m: int, *rest: object) -> Case:
    """at("tiny", "square", 64, "xs16", "fp32", 0.05): a method's word, and options.

    The word is the method's name, or a short one, with r behind it and, after an x, its other
    ranks: "xs16", "lora8", "mini8x64"; those of the row where they are not given, as in "vera".
    """
    case = Case(model, layer, m, "lora_xs", 16)
    for word in rest:
        found = WORD.fullmatch(word) if isinstance(word, str) else None
        method = SHORT.get(found[1], found[1]) if found else ""
        if isinstance(word, float):
            case = replace(case, dropout=word)
        elif word in DTYPES:
            case = replace(case, dtype=str(word))
        elif word in BASES:
            case = replace(case, base=str(word))
        elif found and method in METHODS:
            r = int(found[2] or METHODS[method][0].row.ranks["r"])
            case = replace(case, method=method, r=r, ab=int(found[3] or 0))
        else:
            raise ValueError(f"{word!r} says nothing about a case")
    return case


@functools.cache
def parts_of(case: Case) -> Parts:
    """The equation's parts of a case's method, without memory."""
    sizes = {"K": case.k, "N": case.n, **case.ranks}
    factors = {
        name: torch.empty(case.row.shape(name, sizes), device="meta", requires_grad=factor.trained)
        for name, factor in case.row.factors.items()
    }
    weight = torch.empty(case.n, case.k, device="meta")
    return case.row.made(factors, weight, 1.0)


def quantised(model: str, layer: str, rows: Iterable[int], *rest: object) -> list[Case]:
    """The cases of LoRA over each kind of quantised W."""
    return [case for base in BASES for case in at(model, layer, rows, "lora16", base, *rest)]


SMOKE = [
    *at("tiny", "square", 64, "fp32"),
    *at("tiny", "wide", 48, "mini4x16", "bf16"),
    *at("tiny", "wide", 33, "lora8", "fp32"),
    *at("tiny", "square", 64, "fp32", 0.05),
    *at("tiny", "even", 48, "lora8", "fp32", "nf4"),
]
CPU = [
    *at("llama-3.1-8b", "q", 128, "fp32"),
    *at("qwen3-0.6b", "q", 512, "mini8x64", "fp32"),
    *at("roberta-large", "query", 512, "fp32"),
    *at("roberta-large", "query", 512, "lora16", "fp32"),
    *at("roberta-base", "output", 512, "mini8x32", "bf16"),
    *at("llama-3.1-8b", "k", 256, "xs64", "bf16"),
    *at("llama-3.1-8b", "q", 1, "fp32"),
    *at("roberta-base", "query", 16, "xs8", "fp32"),
    *at("roberta-large", "query", 512, "fp32", 0.05),
    *quantised("roberta-large", "query", (512, 16), "fp32"),
]
LLAMA = "llama-3.1-8b"
CORE = [
    *at(LLAMA, "q", 8192),
    *at(LLAMA, "q", 8192, "mini8x64"),
    *at(LLAMA, "q", 8192, "lora16"),
    *at(LLAMA, "q", (8192, 1, 512, 16), "lora16", "nf4"),
    *at(LLAMA, "q", (1, 2048, 16, 16384, 128, 1024, 512, 4096, 256)),
    *at(LLAMA, "gate", 8192),
    *at(LLAMA, "down", 8192),
    *at(LLAMA, "q", (8192, 1, 512, 16), "lora16", "int8"),
    *at(LLAMA, "q", (8192, 1, 512, 16), "lora16", "torchao-int8"),
    *at(LLAMA, "k", 8192),
    *at(LLAMA, "q", 8192, "xs64"),
    *at(LLAMA, "q", 8192, 0.05),
    *at(LLAMA, "q", (1, 1024), "mini8x64"),
    *at("llama-3-70b", "q", 8192),
    *at("qwen3-4b", "q", 8192),
    *at("roberta-large", "query", 4096, "fp16"),
    *at("roberta-large", "query", 4096, "fp32"),
    *at(LLAMA, "q", 2048, "fp32"),
    *at(LLAMA, "q", 8192, "fp16"),
    *at(LLAMA, "q", 8192, "lora16", 0.05),
    *at(LLAMA, "q", 8192, "mini8x64", 0.05),
    *at(LLAMA, "q", (16, 128, 16384), "mini8x64"),
    *at(LLAMA, "q", 8192, "xs8"),
    *at(LLAMA, "q", 8192, "xs32"),
    *at(LLAMA, "q", 8192, "mini8x32"),
    *at(LLAMA, "gate", (1, 2048)),
    *at(LLAMA, "down", 1),
    *at("llama-3-70b", "gate", 2048),
    *at("qwen3-4b", "gate", 8192),
    *at("roberta-large", "intermediate", 4096, "fp16"),
    *at("llama-3-70b", "q", 1),
]


def full() -> list[Case]:
    """The core set, then every layer, rank, dtype and number of rows; dropout at r = 16 in bf16."""
    cases = list(CORE)
    for model in ("llama-3.1-8b", "qwen3-4b", "roberta-large", "llama-3-70b"):
        for layer in MODELS[model]:
            for kind in ("xs16", "mini8x64", "lora16", "xs8", "xs32", "xs64", "mini8x32"):
                cases += at(model, layer, ROWS, kind)
                if kind in ("xs16", "mini8x64", "lora16"):
                    cases += at(model, layer, ROWS, kind, "fp16")
                    cases += at(model, layer, ROWS, kind, "fp32")
                    cases += at(model, layer, ROWS, kind, 0.05)
    return list(dict.fromkeys(cases))


SETS: dict[str, list[Case]] = {
    "smoke": SMOKE,
    "cpu": CPU,
    "core": CORE,
    "full": full(),
    "family": [
        case for name in METHODS for case in at("roberta-large", "query", 512, name, "fp32")
    ],
}


def known(names: Sequence[str], choices: Iterable[str], what: str) -> list[str]:
    """The names, if all are among the choices; a ValueError that lists the choices otherwise."""
    choices = list(choices)
    unknown = [name for name in names if name not in choices]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(choices)}")
    return list(names)


def select(set_name: str, only: Sequence[str] = (), shrink: int = 1) -> list[Case]:
    """The cases of a set, or those named in `only`, each size divided by `shrink`."""
    known([set_name], SETS, "set")
    cases = {case.name: case for case in SETS[set_name]}
    chosen = [cases[name] for name in known(only, cases, "case")] if only else cases.values()
    return [replace(case, shrunk=shrink) for case in chosen]
