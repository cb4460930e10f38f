"""`stale_descriptors` finds matrix products that read operands which another branch has computed.

ptxas 12.8 keeps the addresses of a product's operands (its descriptors) in uniform registers. Where
two branches begin with the same step of a ring, as tiles of the first column and of others do in
the relay, it computes them in one of the branches and takes them for computed in the other too: the
other then multiplies whatever these registers hold. PTX is right, and nothing says a word.

So for each product it is asked which instructions may have set its descriptors' registers. None may
be left unset on a way to it. In the kernels in Gluon it is a single instruction, which all ways to
the product pass; two branches of others may each set it rightly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Instruction = tuple[int, str, str]  # its address, its predicate or "", the rest
ENTRY = -1  # in place of an instruction: the register is what it was when the kernel began
JUMP = re.compile(r"(BRA|BRX|EXIT|RET)\b")


def instructions(sass: str) -> list[Instruction]:
    """The instructions of a kernel, as cuobjdump prints them."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?(.*?);", sass, re.M)
    return [(int(at, 16), predicate, text.strip()) for at, predicate, text in lines]


def successors(code: list[Instruction]) -> list[list[int]]:
    """Of each instruction, by number, those that may come after it.

    An indirect jump (BRX) may go wherever code begins that is reached from before it in no way.
    """
    number = {at: i for i, (at, _, _) in enumerate(code)}
    after: list[list[int]] = []
    for i, (_, predicate, text) in enumerate(code):
        jump = JUMP.match(text)
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        there = [number[int(target[1], 16)]] if target else []
        if (predicate or not jump) and i + 1 < len(code):
            there.append(i + 1)
        after.append(there)
    forward = {there for i, several in enumerate(after) for there in several if there > i}
    loose = [i for i in range(1, len(code)) if i not in forward]
    for i, (_, _, text) in enumerate(code):
        if text.startswith("BRX"):
            after[i] += loose
    return after


def written(text: str) -> Iterator[int]:
    """The uniform registers that an instruction sets."""
    name, _, rest = text.partition(" ")
    if not re.match(r"(U(?!TMA|BLK|SETMAX|ISETP|PLOP3)|R2UR|S2UR|VOTEU|REDUX)", name):
        return
    found = re.match(r"(?:!?UP\w+, )*UR(\d+)\b", rest)
    if found:
        wide = 2 if ".64" in name or ".WIDE" in name else 1
        yield from range(int(found[1]), int(found[1]) + wide)


def descriptors(text: str) -> range:
    """The uniform registers that a product (HGMMA) reads: of both sides, or of the right alone."""
    found = re.match(r"HGMMA\S* R\d+, (R\d+, )?gdesc\[UR(\d+)\]", text)
    if not found:
        return range(0)
    first = int(found[2])
    return range(first + 2 if found[1] else first, first + 4)


def stale_descriptors(sass: str, single: bool = True) -> list[str]:
    """The products whose descriptors may be unset, as lines of text.

    With `single` also those that more than one instruction sets.
    """
    code = instructions(sass)
    after = successors(code)
    wanted = {register for _, _, text in code for register in descriptors(text)}
    setters: list[dict[int, frozenset[int]] | None] = [None] * len(code)
    if code:
        setters[0] = dict.fromkeys(wanted, frozenset({ENTRY}))
    todo = [0] if code else []
    while todo:
        i = todo.pop()
        now = dict(setters[i] or {})
        for register in written(code[i][2]):
            if register in wanted:
                before = now[register] if code[i][1] else frozenset()
                now[register] = before | {i}
        for there in after[i]:
            known = setters[there]
            merged = now if known is None else {r: known[r] | now[r] for r in now}
            if merged != known:
                setters[there] = merged
                todo.append(there)
    found = []
    for (at, _, text), there in zip(code, setters, strict=True):
        for register in descriptors(text) if there is not None else ():
            if len(there[register]) > 1 and (single or ENTRY in there[register]):
                places = (f"{code[i][0]:#x}" if i >= 0 else "none" for i in there[register])
                found.append(f"{at:#x} {text}: UR{register} is set by {', '.join(sorted(places))}")
    return found
