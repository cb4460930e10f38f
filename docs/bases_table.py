"""The table of quantised bases: python docs/bases_table.py

Writes docs/bases.md. Each cell is what came of trying it: the functions of
`tests/support/base_cells.py`, over each kind of base and each method, which raise where a result is
wrong. --check writes nothing, and compares. It needs bitsandbytes, torchao and PEFT.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported

from base_cases import KINDS, METHODS
from base_cells import CELLS, YES, Refused
from methods_table import NO, grid

from fused_lowrank.methods import METHODS as LAYERS
from fused_lowrank.methods import named

STAND_INS = ("subclass",)  # kinds that the tests alone have
TITLES = {
    "nf4": "bitsandbytes nf4 (maxima quantised)",
    "fp4": "bitsandbytes fp4",
    "int8": "bitsandbytes int8",
    "torchao-int8": "torchao int8",
    "torchao-int4": "torchao int4 (in groups)",
    "torchao-fp8": "torchao fp8",
    "opaque": "a module that is called",
}
Found = dict[tuple[str, str, str], tuple[str, str]]  # by kind, method, use: (word, or "", why not)


def title(method: str) -> str:
    """A method in the table."""
    row = LAYERS[named(method, {})[0]][1].row
    return row.title if method == row.name else method.replace("dora", "DoRA")


def sentence(message: str) -> str:
    """The first sentence of an error, with the name of the layer, "first", as code."""
    text = re.sub(r"\s+", " ", re.split(r"\. |\n", message.strip(), maxsplit=1)[0])
    return re.sub(r"\bfirst\b", "`first`", text.rstrip(".").replace("|", "\\|"))


def tried(kinds: Iterable[str], methods: Iterable[str], uses: Iterable[str] = CELLS) -> Found:
    """The outcome of each use. Raises where one gives a wrong result."""
    found: Found = {}
    for kind in kinds:
        for method in methods:
            for use in uses:
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        found[kind, method, use] = CELLS[use](kind, method, Path(folder)), ""
                    except Refused as refusal:
                        found[kind, method, use] = "", sentence(str(refusal))
    return found


def cell(found: Found, kind: str, use: str, methods: Sequence[str]) -> str:
    """A cell: for all methods alike, or which they are, by the word that it works by."""
    by_word: dict[str, list[str]] = {}
    for method in methods:
        by_word.setdefault(found[kind, method, use][0], []).append(title(method))
    if len(by_word) == 1:
        return next(iter(by_word)) or NO
    said = []
    for word, names in by_word.items():
        if word:
            said.append(", ".join(names) + ("" if word == YES else f" ({word})"))
    return "; ".join(said)


def refusals(found: Found) -> list[list[str]]:
    """(use, methods, bases, why) of each reason that is given."""
    reasons: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for (kind, method, use), (word, why) in found.items():
        if not word:
            methods, kinds = reasons.setdefault((use, why), ({}, {}))
            methods[title(method)] = kinds[TITLES.get(kind, kind)] = None
    everywhere = len({kind for kind, *_ in found})
    order = {use: i for i, use in enumerate(CELLS)}
    return [
        [use, ", ".join(methods), "all" if len(kinds) == everywhere else ", ".join(kinds), why]
        for (use, why), (methods, kinds) in sorted(
            reasons.items(), key=lambda item: order[item[0][0]]
        )
    ]


def text() -> str:
    """docs/bases.md."""
    kinds, methods = [kind for kind in KINDS if kind not in STAND_INS], list(METHODS)
    found = tried(kinds, methods)
    body = [
        [TITLES.get(kind, kind), *(cell(found, kind, use, methods) for use in CELLS)]
        for kind in kinds
    ]
    names = ", ".join(map(title, methods))
    return f"""# Quantised bases

Made by `docs/bases_table.py`, which tries each use of each method over each kind of base on a CPU,
by the functions of `tests/support/base_cells.py`; a test holds it.

{grid(("base", *CELLS), body)}

"yes" is for {names}; where they differ, those that it works for are named.

- Forward and gradients: within the budget of float64 on the dequantised W.
- Load: onto another model with the same base; the results are the same.
- Unload: the very module comes back, bit for bit.
- Bank: rows of a batch with adapters of their own, served and trained.
- PEFT: the configuration of that name over such a base, saved by PEFT and read by `load_adapter`;
  of LoRA and DoRA, PEFT's own layers by our kernels (`fuse_lora`).
- Merge: `merge` of ΔW into the weight; "rounded" where quantising it again loses more than a
  thousandth of what the adapter adds.

## What is refused

By the library here, or by PEFT, in its words. The layer that they name is `first`.

{grid(("use", "method", "base", "because"), refusals(found))}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or --check it: 0 as it should be, 1 out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args(argv)
    logging.getLogger("fused_lowrank").setLevel(logging.ERROR)  # that a module is called is known
    page = ROOT / "docs" / "bases.md"
    made = text()
    if not args.check:
        page.write_text(made)
        return 0
    if not page.exists() or page.read_text() != made:
        print("bases_table.py: docs/bases.md is not what comes of trying", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
