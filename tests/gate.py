"""The compile gate: every kernel that the library can launch, compiled for GPUs that are not here.

    python tests/gate.py [--write] [--jobs N] [--target NAME] [--hopper] [--sample N [--seed N]]

Each launch is taken from its launcher, on meta tensors, and compiled by Triton as that launch would
be. What comes out must not spill, must fit the target's shared memory, must use the tensor cores
and asynchronous copies that it should, and never TF32. Its figures must be those of tests/gate.csv,
which --write renews. --sample compiles random launches of each target instead of the table's.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from gate_cases import DTYPES, Case, cases, launch, sampled
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fused_lowrank.kernels import decode
from fused_lowrank.kernels.tiles import (
    TARGETS,
    TENSOR,
    Spec,
    Target,
    TileConfig,
    is_valid,
    padded,
    select,
    variant,
)

TABLE = Path(__file__).with_name("gate.csv")
NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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


def captured(call: Callable[[], None]) -> tuple[JITFunction, tuple, dict]:
    """The one kernel launch that `call` makes: kernel, arguments, keyword arguments."""
    seen: list[tuple[JITFunction, tuple, dict]] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        call()
    (only,) = seen
    return only


def source(call: Callable[[], None], target: Target) -> tuple[ASTSource, dict]:
    """What Triton would compile for that launch: its source with types and attributes, options."""
    kernel, args, kwargs = captured(call)
    backend = make_backend(GPUTarget(target.backend, target.arch, target.warp_size))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*args, **kwargs)
    options, *parts = kernel._pack_args(backend, kwargs, bound, specialization, None)
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(kernel, *parts), options.__dict__
    return ASTSource(kernel, *parts), options.__dict__


def built(call: Callable[[], None], target: Target) -> Any:
    """Triton's compiled kernel of the one launch that `call` makes; its `asm` has every stage.

    A call is, for instance, `lambda: launch(case, choose)`, of a case of `gate_cases`, or any call
    of a kernel's function on meta tensors. `captured(call)` has what the kernel is given.
    """
    ast, options = source(call, target)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(ast, target=gpu, options=options)


def compiled(call: Callable[[], None], target: Target, sass: bool) -> Figures:
    """Compile the launch that `call` makes and read what came out."""
    return read(built(call, target), target, sass)


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
        command = [str(NVIDIA_BIN / "cuobjdump"), option, file.name]
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
        gemm = kernel not in ("core_grad", "dropped", "drawn")
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


def tile_of(case: Case, target: Target) -> tuple[TileConfig, Spec]:
    """The tile of the case's launch, its variant's or the one that `select` gives, and for what."""
    chosen: list[tuple[TileConfig, Spec]] = []

    def choose(spec: Spec, m: int) -> TileConfig:
        tile = variant(case.variant, target, spec, m) if case.variant else select(target, spec, m)
        assert tile is not None, f"{case.variant} has no tile for {case.kernel}"
        chosen.append((tile, spec))
        return chosen[0][0]

    captured(lambda: launch(case, choose))
    return chosen[0]


def tiled(case: Case, tile: TileConfig) -> Callable[[], None]:
    """The case's call of its launcher, with this tile."""
    return lambda: launch(case, lambda *_: tile)


def examine(job: tuple[Case, str, bool]) -> tuple[Figures | None, list[str]]:
    """Compile one case for one target: its figures and what is wrong with them."""
    case, target = job[0], TARGETS[job[1]]
    tile, spec = tile_of(case, target)
    if spec.aligned != case.aligned:
        return None, [f"the launcher took it for {'' if spec.aligned else 'un'}aligned"]
    if not is_valid(tile, target, spec):
        return None, [f"{tile} is not valid"]
    try:
        kernel = built(tiled(case, tile), target)
        figures = read(kernel, target, sass=job[2])
    except Exception as error:  # whatever it is, the gate names the case and goes on
        return None, [f"{type(error).__name__}: {error}"]
    itemsize = DTYPES[case.x].itemsize
    wrong = problems(figures, target, case.kernel, tile, itemsize, case.aligned)
    if tile.hopper:
        wrong += problems_of_hopper(kernel, figures, case, tile)
    if case.kernel == "decode" and case.aligned and target.backend == "cuda":
        wrong += problems_of_decode(kernel, case, tile)
    return figures, wrong


def jobs(targets: list[str], chosen: list[Case]) -> list[tuple[Case, str, bool]]:
    """(case, target, whether to read its SASS), without what compiles the same kernel again.

    Disassembling takes as long as compiling, so it is done once per kernel, dtype and tile.
    """
    result: dict[tuple, tuple[Case, str, bool]] = {}
    disassembled = set()
    for name in targets:
        target = TARGETS[name]
        for case in chosen:
            older = case.variant == "tf32x3" and target.backend == "cuda"
            if case.variant and name not in TENSOR and not older:
                continue
            if case.kernel == "relay" and not target.gluon:
                continue
            if case.kernel == "decode" and "m" in case.flags and target.backend != "cuda":
                continue
            tile, _ = tile_of(case, target)
            ast, options = source(tiled(case, tile), target)
            key = (name, ast.hash(), str(sorted(options.items())))
            if key not in result:
                kind = (name, case.kernel, case.x, tile)
                result[key] = (case, name, kind not in disassembled)
                disassembled.add(kind)
    return list(result.values())


def row(case: Case, target: str, figures: Figures) -> list[str]:
    tile, _ = tile_of(case, TARGETS[target])
    values = (target, *astuple(case), tile, *astuple(figures))
    return [str(int(value) if isinstance(value, bool) else value) for value in values]


def table(entries: list[list[str]]) -> str:
    """The figures as text; the first line names the compiler that they are of."""
    names = [field.name for cls in (Case, Figures) for field in fields(cls)]
    at = len(fields(Case))
    header = ["target", *names[:at], "tile", *names[at:]]
    text = io.StringIO()
    print(f"# triton {triton.__version__}", file=text)
    csv.writer(text, lineterminator="\n").writerows([header, *entries])
    return text.getvalue()


def stale(new: str, old: str, targets: list[str]) -> list[str]:
    """The lines in which the tables differ, as a diff, as far as these targets go."""

    def ours(text: str) -> set[str]:
        return {line for line in text.splitlines()[2:] if line.split(",")[0] in targets}

    lines, before = ours(new), ours(old)
    changed = [(line, "-") for line in before - lines] + [(line, "+") for line in lines - before]
    return [f"{sign} {line}" for line, sign in sorted(changed)]


def main() -> int:
    parser = argparse.ArgumentParser(description="the compile gate")
    parser.add_argument("--write", action="store_true", help="renew tests/gate.csv")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one")
    parser.add_argument("--hopper", action="store_true", help="its own kernels alone, printed")
    parser.add_argument("--sample", type=int, metavar="N", help="N random launches, no table")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: nothing compiles in such a process")
    targets = ["sm_90"] if options.hopper else options.target or list(TARGETS)

    entries, failures = [], 0
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        chosen = sampled(options.sample, options.seed) if options.sample else cases()
        todo = jobs(targets, chosen)
        if options.hopper:
            todo = [job for job in todo if tile_of(job[0], TARGETS[job[1]])[0].hopper]
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            results = tqdm(pool.map(examine, todo, chunksize=4), total=len(todo), unit="kernel")
            for (case, target, _), (figures, wrong) in zip(todo, results, strict=True):
                failures += bool(wrong)
                for line in wrong:
                    tqdm.write(f"FAILED {target} {case}: {line}", file=sys.stdout)
                if figures:
                    entries.append(row(case, target, figures))

    for target in targets:
        there = [entry for entry in entries if entry[0] == target]
        at = len(fields(Case)) + 2
        registers, shared = (max(int(entry[i]) for entry in there) for i in (at, at + 1))
        print(f"{target}: {len(there)} kernels, {registers} registers and {shared} bytes at most")
    if options.hopper:
        print(table(sorted(entries)), end="")
    if options.sample or options.hopper:
        print(f"{len(todo) - failures} passed, {failures} failed, of a selection")
        return 1 if failures else 0
    old = TABLE.read_text() if TABLE.exists() else ""
    others = [line for line in csv.reader(old.splitlines()[2:]) if line[0] not in targets]
    new = table(sorted(entries + others, key=lambda entry: list(TARGETS).index(entry[0])))
    differences = []
    if options.write:
        TABLE.write_text(new)
    elif old and old.splitlines()[0] != new.splitlines()[0]:
        print(f"figures not compared: {TABLE.name} is of {old.splitlines()[0][2:]}")
    else:
        differences = stale(new, old, targets)
        print("\n".join(differences[:20]))
        if differences:
            print(
                f"{TABLE.name} is stale in {len(differences)} lines: python tests/gate.py --write"
            )
    print(f"{len(todo) - failures} passed, {failures} failed")
    return 1 if failures or differences else 0


if __name__ == "__main__":
    sys.exit(main())
