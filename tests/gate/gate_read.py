"""`judged` reads what the compiler made of a launch, and says what is wrong with it.

The digests of tests/gate/gate.csv have these functions and all that they name in them: a change
here is one of every row.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from gate_cases import DTYPES, Case
from gate_sass import stale_descriptors

from fused_lowrank.kernels import decode
from fused_lowrank.kernels.tiles import Target, TileConfig, padded

SASS = ("HGMMA", "HMMA", "UTCHMMA", "FFMA", "LDGSTS", "UTMALDG", "UTMASTG", "STL", "LDL")


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a launch."""

    registers: int
    shared: int
    spills: int  # bytes, or registers on gfx942
    mma: str  # its tensor core instruction, as PTX or amdgcn call it
    n_mma: int
    n_async: int  # cp.async: copies from global to shared memory
    n_bulk_load: int  # of tensors, by descriptor
    n_bulk_store: int
    n_tf32: int
    sass: str = ""  # what became of it in machine code, where that is read
    loop: int = 0  # instructions of its main loop there: the first with most matrix instructions


def read(kernel: Any, target: Target, sass: bool) -> Figures:
    """The figures of a compiled kernel."""
    shared = kernel.metadata.shared
    if target.backend == "hip":
        return read_amdgcn(kernel.asm["amdgcn"], shared)
    return read_cuda(kernel.asm["ptx"], kernel.asm["cubin"], shared, sass)


def read_amdgcn(text: str, shared: int) -> Figures:
    def entry(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    spills = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    mma = re.findall(r"\bv_mfma_\w+", text)
    return Figures(
        registers=entry("vgpr_count"),
        shared=shared,
        spills=sum(map(entry, spills)),
        mma="v_mfma" if mma else "",
        n_mma=len(mma),
        n_async=0,
        n_bulk_load=0,
        n_bulk_store=0,
        n_tf32=sum("xf32" in name for name in mma),
    )


def read_cuda(ptx: str, cubin: bytes, shared: int, sass: bool) -> Figures:
    mma = re.findall(r"^\s*(?:@\S+ )?(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.(\S+)", ptx, re.M)
    usage = cuobjdump("-res-usage", cubin)
    code = cuobjdump("-sass", cubin) if sass else ""
    opcodes = read_sass(code)
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    return Figures(
        registers=registers,
        shared=shared,
        spills=max(stack, opcodes["STL"] + opcodes["LDL"]),
        mma="+".join(sorted({name for name, _ in mma})),
        n_mma=len(mma),
        n_async=len(re.findall(r"\bcp\.async\.c[ag]\.", ptx)),
        n_bulk_load=len(re.findall(r"\bcp\.async\.bulk\.tensor\.2d\.shared", ptx)),
        n_bulk_store=len(re.findall(r"\bcp\.async\.bulk\.tensor\.2d\.global", ptx)),
        n_tf32=sum("tf32" in kind for _, kind in mma) + opcodes["TF32"],
        sass=" ".join(f"{name}:{opcodes[name]}" for name in SASS if opcodes[name]),
        loop=main_loop(code),
    )


def cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(program), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_sass(text: str) -> Counter:
    """How often each opcode occurs, and "TF32" as a modifier of any."""
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*)", text, re.M)
    counts = Counter(opcode.split(".")[0] for opcode in opcodes)
    counts["TF32"] = sum("TF32" in opcode for opcode in opcodes)
    return counts


def main_loop(text: str) -> int:
    """The length of the shortest loop among those with the most matrix instructions in one pass.

    A loop is what lies between a branch backwards and where it goes; one around others is none.
    """
    code = [
        (int(at, 16), text)
        for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.M)
    ]
    spans = []
    for at, instruction in code:
        there = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instruction)
        if there and int(there[1], 16) < at:
            spans.append((int(there[1], 16), at))
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    found = []
    for first, last in inner:
        body = [instruction for at, instruction in code if first <= at <= last]
        found.append((-sum("MMA." in line for line in body), len(body)))
    return min(found)[1] if found and min(found)[0] else 0


def wanted_mma(target: Target, block_m: int) -> tuple[str, str]:
    """The tensor core instruction of a 16-bit dot of `block_m` rows, and its name in SASS."""
    if target.backend == "hip":
        return "v_mfma", ""
    whole = {"sm_90": ("wgmma.mma_async", "HGMMA"), "sm_100": ("tcgen05.mma", "UTCHMMA")}
    few = ("mma.sync", "HMMA")
    return whole.get(target.name, few) if block_m >= 64 else few


def problems(
    figures: Figures, target: Target, kernel: str, tile: TileConfig, itemsize: int, aligned: bool
) -> list[str]:
    """What is wrong with a compiled launch: nothing, if the list is empty."""
    found = []
    if figures.registers < (8 if kernel == "drawn" else 16):  # which on gfx942 has few
        found.append(f"an empty kernel: {figures.registers} registers")
    if figures.spills:
        found.append(f"spills: {figures.spills} ({figures.registers} registers)")
    if figures.shared > target.shared:
        found.append(f"shared memory: {figures.shared} bytes, {target.name} has {target.shared}")
    if bool(figures.n_tf32) != tile.tf32x3:
        found.append(f"TF32: {figures.n_tf32} instructions")
    if itemsize == 2:
        mma, opcode = wanted_mma(target, tile.block_m)
        if kernel == "core_grad" and not figures.n_mma:
            found.append("no tensor core instruction")
        gemm = kernel not in ("core_grad", "diagonal", "dropped", "drawn", "gain_back")
        if gemm and mma not in figures.mma.split("+"):
            found.append(f"no {mma}, but {figures.mma or 'no tensor core instruction'}")
        if gemm and figures.sass and f"{opcode}:" not in figures.sass:
            found.append(f"no {opcode} in SASS: {figures.sass}")
        copies = kernel in ("gemm_tail", "decode") and aligned and target.backend == "cuda"
        if copies and not (tile.persistent or tile.hopper or figures.n_async):
            found.append("no asynchronous copies (cp.async)")
        if tile.persistent and not (figures.n_bulk_load >= 2 and figures.n_bulk_store >= 2):
            found.append(
                f"{figures.n_bulk_load} bulk loads and {figures.n_bulk_store} bulk stores: "
                "x, W and both halves of y should have one each"
            )
    return found


def problems_of_hopper(kernel: Any, figures: Figures, case: Case, tile: TileConfig) -> list[str]:
    """What is wrong with a launch of a kernel for Hopper, besides `problems`."""
    found = []
    waits = kernel.asm["ptx"].count("wgmma.wait_group")
    there = len(re.findall(r"\bWARPGROUP\.DEPBAR", cuobjdump("-sass", kernel.asm["cubin"])))
    if there > waits:
        found.append(f"wgmma is serialised: {there} waits in SASS, {waits} in PTX")
    # A block of which 64 columns and more lie in a row takes a copy for each 64 of them.
    across = tile.block_n // 64 if case.layout == "transposed" else 1
    if case.kernel == "relay":
        loads = 2 + across + 1 + across  # x of each group, W, down, up
    else:
        tail = -(-padded(case.q) // tile.block_k) if case.q else 0
        loads = 2 + across + tail * (2 + across)
    if figures.n_bulk_load != loads:
        found.append(f"{figures.n_bulk_load} bulk loads, not {loads}")
    if figures.n_bulk_store != 2 * tile.parts:
        found.append(f"{figures.n_bulk_store} bulk stores, not {2 * tile.parts}")
    return found


def problems_of_products(kernel: Any, tile: TileConfig) -> list[str]:
    """What is wrong with the matrix products of a kernel for sm_90 as ptxas has made it."""
    stale = stale_descriptors(cuobjdump("-sass", kernel.asm["cubin"]), single=tile.hopper)
    return [f"operands of another branch: {stale[0]}; {len(stale)} in all"] if stale else []


def copies(ptx: str, loads: str) -> list[int]:
    """Bytes of each asynchronous copy that was made of the lines of kernels/decode.py with `loads`.

    An ordinary load of such a line counts as 0.
    """
    text = inspect.getsource(decode).splitlines()
    lines = {number for number, line in enumerate(text, 1) if loads in line}
    file = re.search(r'\.file\s+(\d+) "[^"]*\bdecode\.py"', ptx)
    assert lines, f"no line of decode.py has {loads}"
    assert file, "the compiler says nothing of lines"
    found, here = [], False
    for line in ptx.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            here = place[1] == file[1] and int(place[2]) in lines
        elif here and (copy := re.search(r"cp\.async\.c[ag]\..*\], 0x([0-9a-f]+)", line)):
            found.append(int(copy[1], 16))
        elif here and "ld.global" in line:
            found.append(0)
    return found


def problems_of_decode(kernel: Any, case: Case, tile: TileConfig) -> list[str]:
    """What is wrong with an aligned launch of decode: W, and x, come by copies of 16 bytes.

    There is one set of them in the loop, and one for each stage that is brought before it; where
    the loop is unrolled there are more.
    """
    found = []
    for name, rows in (("w", tile.block_n), ("x", tile.block_m)):
        there = copies(kernel.asm["ptx"], f"{name} = tl.load({name}_ptrs")
        size = rows * tile.block_k * DTYPES[case.x].itemsize
        each = size // (16 * 32 * tile.num_warps)
        loops = 1 if name == "w" else 2  # x is read for x·downᵀ too
        if name == "x" and not each:  # so few rows that each thread has less of them
            continue
        if set(there) != {16} or len(there) < max(1, each) * tile.num_stages * loops:
            found.append(f"{name} comes by {dict(Counter(there))}, bytes: copies, not by 16 each")
    return found


def judged(
    kernel: Any, case: Case, tile: TileConfig, target: Target, sass: bool
) -> tuple[Figures, list[str]]:
    """The figures of the case's compiled launch, and what is wrong with it."""
    figures = read(kernel, target, sass)
    itemsize = DTYPES[case.x].itemsize
    # A diagonal's gradient is no product of matrices.
    kind = "diagonal" if (case.kernel, case.r) == ("core_grad", -2) else case.kernel
    wrong = problems(figures, target, kind, tile, itemsize, case.aligned)
    if tile.hopper:
        wrong += problems_of_hopper(kernel, figures, case, tile)
    if target.name == "sm_90" and (sass or tile.hopper):
        wrong += problems_of_products(kernel, tile)
    if case.kernel == "decode" and case.aligned and target.backend == "cuda":
        wrong += problems_of_decode(kernel, case, tile)
    return figures, wrong
