"""The tables of the methods: python docs/methods_table.py

Writes the README's table between its markers and docs/methods.md. Each cell is read from the
method's row, or is what came of trying it: the layer through the kernels (in Triton's interpreter),
its merge, a bank and an export of a small model, and the library's own count on Llama-3.1-8B's
projections, which are built on the meta device. --check writes nothing, and compares.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

import fused_lowrank.integrations.peft  # noqa: F401 - puts its configs into PEFT's mapping
from fused_lowrank import AdapterBank, adapt, export_lora, export_peft, merge
from fused_lowrank.methods import METHODS
from fused_lowrank.methods.method import Method, Parts

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
BLOCKS = 32  # of Llama-3.1-8B, each with these projections: (in, out)
PROJECTIONS = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
SIZE = 256  # of a small model's layers: room for every default rank
NO, YES = "–", "yes"
HEAD = ("kernels", "bank", "merge", "PEFT config", "export", "DoRA", "trained, Llama-3.1-8B")


# --- models ---


def small(row: Method, **keywords: Any) -> nn.Sequential:
    """Two layers adapted by a method, everything that is trained away from its start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
    adapt(model, row.name, target_modules=["0", "2"], progress=False, **keywords)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def rows_of_x() -> torch.Tensor:
    """The input of a small model: five rows."""
    return torch.randn(5, SIZE, generator=torch.Generator().manual_seed(1))


def agree(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise RuntimeError unless two outputs are the same but for rounding."""
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise RuntimeError(f"{what}: outputs differ by {(found - expected).abs().max():g}")


def counted(row: Method, **keywords: Any) -> int:
    """How many parameters are trained in Llama-3.1-8B, all projections adapted."""
    with torch.device("meta"):
        blocks = [
            nn.ModuleDict(
                {name: nn.Linear(*sides, bias=False) for name, sides in PROJECTIONS.items()}
            )
            for _ in range(BLOCKS)
        ]
    model = nn.ModuleList(blocks)
    adapt(
        model, row.name, target_modules=[*PROJECTIONS], defer_bases=True, progress=False, **keywords
    )
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- cells ---


def kernels(row: Method) -> str:
    """The core that the kernels multiply by; they have computed a layer, and rightly."""
    with torch.no_grad():
        model = small(row)
        layer: Any = model[0]
        expected = layer(rows_of_x())
        layer.impl = "triton"
        agree(layer(rows_of_x()), expected, f"{row.name} by the kernels")
    return core_kind(layer.parts())


def core_kind(parts: Parts) -> str:
    """A core in words."""
    if parts.core is None:
        return "no core"
    if isinstance(parts.core, tuple):
        return "pair"
    return "diagonal" if parts.core.dim() == 1 else "matrix"


def bank(row: Method) -> str:
    """Whether a bank takes the method: as it is, or training the core alone, and with which words.

    A core that is trained alone starts at zero, the factors beside it elsewhere.
    """
    starts = {
        factor.init: 0.0 if name in row.core else 1.0
        for name, factor in row.factors.items()
        if factor.init in row.options
    }
    for keywords in ({}, {"train": row.core, **starts}):
        try:
            AdapterBank.from_model(small(row, **keywords), slots=1).add("one")
        except ValueError:
            continue
        words = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
        return f"with `{words}`" if words else YES
    return NO


def merged(row: Method) -> str:
    """Whether ΔW goes into the weight, and the outputs stay."""
    with torch.no_grad():
        model = small(row)
        expected = model(rows_of_x())
        agree(merge(model)(rows_of_x()), expected, f"{row.name} merged")
    return YES


def config_in_peft(row: Method) -> str:
    """The PEFT config of the method: this library's, or PEFT's own."""
    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(row.peft.kind if row.peft else row.name.upper())
    if found is None:
        return NO
    ours = found.__module__.startswith("fused_lowrank.")
    return f"`{found.__name__}`" if ours else f"PEFT's `{found.__name__}`"


def exported(row: Method) -> str:
    """PEFT's format of the method, and the rank of the plain LoRA that an export is."""
    with tempfile.TemporaryDirectory() as folder:
        export_lora(small(row), Path(folder) / "lora")
        config = json.loads((Path(folder) / "lora" / "adapter_config.json").read_text())
        own = ""
        if row.peft is not None:
            export_peft(small(row), Path(folder) / "own")
            config_of_own = json.loads((Path(folder) / "own" / "adapter_config.json").read_text())
            own = f"PEFT's {config_of_own['peft_type']}; "
    return f"{own}LoRA, rank {config['r']}"


def trained(row: Method) -> str:
    """The number of trained parameters, and the ranks."""
    return f"{counted(row):,} ({defaults(row)})"


def defaults(row: Method) -> str:
    """The default ranks, as keywords."""
    return ", ".join(f"{name}={rank}" for name, rank in row.ranks.items())


def cells(row: Method) -> list[str]:
    """The cells of HEAD."""
    made = (kernels, bank, merged, config_in_peft, exported)
    return [*(cell(row) for cell in made), NO if row.dora is None else YES, trained(row)]


# --- text ---


def grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def paper(row: Method) -> str:
    """The link to the paper, from the first line of the layer's docstring."""
    said = inspect.getdoc(METHODS[row.name][0]) or ""
    found = re.search(r"\(([^()]+), arXiv (\d+\.\d+)\)", said)
    if found is None:
        raise RuntimeError(f"the docstring of {row.name}'s layer names no paper")
    return f"[{found[1]}](https://arxiv.org/abs/{found[2]})"


def factors(row: Method, is_trained: bool) -> str:
    """The factors that are trained, or those that are not, with their sides."""
    said = []
    for name, factor in row.factors.items():
        if factor.trained == is_trained:
            sides = ", ".join(factor.sides) + ("," if len(factor.sides) == 1 else "")
            more = [*(["one for all layers"] if factor.shared else [])]
            more += [] if factor.saved else ["from `seed`"]
            said.append(f"{name} ({sides})" + "".join(f", {word}" for word in more))
    return "; ".join(said) or NO


def options(row: Method) -> str:
    """The keywords that the method has of its own, and their values, the default first."""
    said = [f"`{defaults(row)}`"]
    for name, values in row.options.items():
        shown = "|".join(map(repr, values)) if isinstance(values, tuple) else repr(values)
        said.append(f"`{name}={shown}`".replace("|", " \\| "))
    return "; ".join(said)


LEGEND = f"""\
Kernels: the core that the kernels multiply by. Bank: whether adapters of one model go into an
`AdapterBank`. A PEFT config is this library's, from `fused_lowrank.integrations.peft`, or PEFT's
own, whose folders `load_adapter` reads; `fuse_lora` computes PEFT's LoRA. Export: `export_lora`'s
at the default ranks, those in brackets, and what `export_peft` writes. Trained: in all
{BLOCKS * len(PROJECTIONS)} projections of
the {BLOCKS} blocks; what layers share is counted once."""


def short(table: str) -> str:
    """The README's part."""
    more = "[docs/methods.md](docs/methods.md) has the papers, factors and keywords."
    return f"{table}\n\n{LEGEND}\n{more}"


def whole(table: str, rows: Sequence[Method]) -> str:
    """docs/methods.md."""
    body = [
        [f"`{row.name}`", paper(row), factors(row, True), factors(row, False), options(row)]
        for row in rows
    ]
    head = ("name", "paper", "trained", "frozen", "keywords of its own")
    dora = [
        [row.title, f"{counted(row):,}", f"{counted(row, dora=True):,}"]
        for row in rows
        if row.dora is not None
    ]
    return f"""# The methods

Made by `docs/methods_table.py` from the rows in `fused_lowrank/methods/family/`, and from what came
of trying each.

## What can be done with each

{table}

{LEGEND}

## What each is

K is a layer's in_features and N its out_features, of factors that all layers share the largest; the
other letters are ranks, R is n·r and k is K / n. All methods have `alpha` (scale = alpha / r; None:
r), `dropout`, `rank_dropout` and `train`, which names what is trained in place of the factors
below.

{grid(head, body)}

## DoRA

`dora=True` adds a trained `magnitude` (N,) to each layer. Trained in Llama-3.1-8B's projections:

{grid(("method", "without", "with `dora=True`"), dora)}
"""


def between_markers(text: str, inner: str) -> str:
    """The text with what lies between the markers replaced. Raises ValueError without markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README lacks the markers {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{inner}\n{END}{rest.split(END)[1]}"


def texts() -> dict[Path, str]:
    """The files that the tables are in, and how they should read."""
    rows = [cls.row for cls, _ in METHODS.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = grid(("method", *HEAD), [[row.title, *cells(row)] for row in rows])
        readme = ROOT / "README.md"
        return {
            readme: between_markers(readme.read_text(), short(table)),
            ROOT / "docs" / "methods.md": whole(table, rows),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or --check them: 0 as they should be, 1 out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args(argv)
    made = texts()
    old = [p.name for p, text in made.items() if not p.exists() or p.read_text() != text]
    if args.check and old:
        print(f"methods_table.py: not what the methods give: {', '.join(old)}", file=sys.stderr)
        return 1
    for path, text in made.items():
        if not args.check:
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
