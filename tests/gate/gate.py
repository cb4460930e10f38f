"""The compile gate: every kernel that the library can launch, compiled for GPUs that are not here.

    python tests/gate/gate.py [--changed] [--write] [--jobs N] [--target NAME]
    python tests/gate/gate.py --sample N [--target NAME] | --hopper

Each launch is taken from its launcher, on meta tensors, and compiled by Triton as that launch would
be. What comes out must not spill, must fit the target's shared memory, must use the tensor cores
and asynchronous copies that it should, and never TF32. Its figures must be those of
tests/gate/gate.csv, which --write renews. Each row of the table bears a seal of its figures and of
all that decides them (`gate_digest`). With --changed, rows whose seal holds are taken as they
stand, but for some, drawn anew in each run, that are compiled all the same and must come out as
they stand. --sample compiles random launches of each target instead of the table's.
"""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from gate_cases import Case, cases, sampled
from gate_digest import hashed, launch_digest, said
from gate_launches import launch
from gate_read import Figures, judged, read
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fused_lowrank.kernels.tile_choice import experimental_tile, select
from fused_lowrank.kernels.tiles import TARGETS, TENSOR, Spec, Target, TileConfig, is_valid

TABLE = Path(__file__).with_name("gate.csv")
AGAIN = 100  # rows that --changed compiles although nothing of theirs has changed

Job = tuple[Case, str, bool]  # a case, a target's name, whether to read its SASS


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


def tile_of(case: Case, target: Target) -> tuple[TileConfig, Spec]:
    """The tile of the case's launch, of its set or as `select` gives it, and what it is for."""
    chosen: list[tuple[TileConfig, Spec]] = []

    def choose(spec: Spec, m: int) -> TileConfig:
        name = case.variant
        tile = experimental_tile(name, target, spec, m) if name else select(target, spec, m)
        assert tile is not None, f"{case.variant} has no tile for {case.kernel}"
        chosen.append((tile, spec))
        return chosen[0][0]

    captured(lambda: launch(case, choose))
    return chosen[0]


def tiled(case: Case, tile: TileConfig) -> Callable[[], None]:
    """The case's call of its launcher, with this tile."""
    return lambda: launch(case, lambda *_: tile)


def examine(job: Job) -> tuple[Figures | None, list[str]]:
    """Compile one case for one target: its figures and what is wrong with them."""
    case, target = job[0], TARGETS[job[1]]
    tile, spec = tile_of(case, target)
    if spec.aligned != case.aligned:
        return None, [f"the launcher took it for {'' if spec.aligned else 'un'}aligned"]
    if not is_valid(tile, target, spec):
        return None, [f"{tile} is not valid"]
    try:
        return judged(built(tiled(case, tile), target), case, tile, target, sass=job[2])
    except Exception as error:  # whatever it is, the gate names the case and goes on
        return None, [f"{type(error).__name__}: {error}"]


def jobs(targets: list[str], chosen: list[Case]) -> dict[Job, str]:
    """All that is to be compiled, each with its digest, and nothing that compiles the same again.

    Disassembling takes as long as compiling, so it is done once per kernel, dtype and tile.
    """
    result: dict[Job, str] = {}
    launches, disassembled = set(), set()
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
            tile, spec = tile_of(case, target)
            launched = launch_digest(*source(tiled(case, tile), target), target)
            if launched in launches:
                continue
            launches.add(launched)
            kind = (name, case.kernel, case.x, tile)
            sass = kind not in disassembled
            disassembled.add(kind)
            sound = (spec.aligned, is_valid(tile, target, spec))
            result[case, name, sass] = hashed(launched, said(judged), case, tile, sass, sound)
    return result


def texts(*values: Any) -> list[str]:
    """Values as the table has them."""
    return [str(int(value) if isinstance(value, bool) else value) for value in values]


def row(job: Job, figures: Figures, digest: str) -> list[str]:
    """A row of the table, sealed: with the digest, and as it stands before the seal."""
    case, target, _ = job
    tile, _ = tile_of(case, TARGETS[target])
    told = texts(target, *astuple(case), tile, *astuple(figures))
    return [*told, hashed(digest, told)]


def unchanged(todo: dict[Job, str], text: str) -> dict[Job, list[str]]:
    """The jobs of which the table has a row that is sealed with their digest, and those rows."""
    if text.partition("\n")[0] != table([]).partition("\n")[0]:  # another compiler's
        return {}
    first = 1 + len(fields(Case))
    there = {tuple(entry[:first]): entry for entry in csv.reader(text.splitlines()[2:])}
    result = {}
    for job, digest in todo.items():
        entry = there.get(tuple(texts(job[1], *astuple(job[0]))))
        if entry and entry[-1] == hashed(digest, entry[:-1]):
            result[job] = entry
    return result


def compiled_rows(
    todo: dict[Job, str], processes: int
) -> tuple[dict[Job, list[str]], dict[Job, list[str]]]:
    """Compile these: their rows, and what is wrong with those of which something is.

    The row of such a one has no seal, so that it is compiled until it is right.
    """
    rows, failures = {}, {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        results = tqdm(pool.map(examine, todo, chunksize=4), total=len(todo), unit="kernel")
        for job, (figures, wrong) in zip(todo, results, strict=True):
            if figures:
                rows[job] = row(job, figures, todo[job])
            if wrong:
                failures[job] = wrong
                if figures:
                    rows[job][-1] = ""
            for line in wrong:
                tqdm.write(f"FAILED {job[1]} {job[0]}: {line}", file=sys.stdout)
    return rows, failures


def table(entries: list[list[str]]) -> str:
    """The figures as text; the first line names the compiler that they are of."""
    names = [field.name for cls in (Case, Figures) for field in fields(cls)]
    at = len(fields(Case))
    header = ["target", *names[:at], "tile", *names[at:], "seal"]
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
    parser.add_argument(
        "--changed", action="store_true", help="what has changed, and a part of the rest"
    )
    parser.add_argument("--write", action="store_true", help="renew tests/gate/gate.csv")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one")
    parser.add_argument("--hopper", action="store_true", help="its own kernels alone, printed")
    parser.add_argument("--sample", type=int, metavar="N", help="N random launches, no table")
    parser.add_argument("--seed", type=int, help="of what is drawn; else a new one each time")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: nothing compiles in such a process")
    targets = ["sm_90"] if options.hopper else options.target or list(TARGETS)
    seed = random.randrange(10**6) if options.seed is None else options.seed
    old = TABLE.read_text() if TABLE.exists() else ""

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        todo = jobs(targets, sampled(options.sample, seed) if options.sample else cases())
        if options.hopper:
            hopper = [job for job in todo if tile_of(job[0], TARGETS[job[1]])[0].hopper]
            todo = {job: todo[job] for job in hopper}
        kept = unchanged(todo, old) if options.changed else {}
        again = random.Random(seed).sample(list(kept), min(AGAIN, len(kept)))
        if options.changed:
            print(f"changed: {len(todo) - len(kept)} of {len(todo)} rows")
        if options.changed or options.sample:
            print(f"drawn with --seed {seed}: {options.sample or len(again)}")
        compiled = {job: todo[job] for job in todo if job not in kept or job in again}
        rows, failures = compiled_rows(compiled, options.jobs)

    for job in again:
        if job not in failures and rows[job] != kept[job]:
            failures[job] = ["it has changed, and its digest has not"]
            print(f"FAILED {job[1]} {job[0]}: {failures[job][0]}")
    entries = [entry for job in todo if (entry := rows.get(job, kept.get(job)))]
    for target in targets:
        there = [entry for entry in entries if entry[0] == target]
        at = len(fields(Case)) + 2
        registers, shared = (max(int(entry[i]) for entry in there) for i in (at, at + 1))
        print(f"{target}: {len(there)} kernels, {registers} registers and {shared} bytes at most")
    if options.hopper:
        print(table(sorted(entries)), end="")
    if options.sample or options.hopper:
        print(f"{len(todo) - len(failures)} passed, {len(failures)} failed, of a selection")
        return 1 if failures else 0
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
                f"{TABLE.name} is stale in {len(differences)} lines: "
                "python tests/gate/gate.py --changed --write"
            )
    print(f"{len(compiled) - len(failures)} passed, {len(failures)} failed")
    return 1 if failures or differences else 0


if __name__ == "__main__":
    sys.exit(main())
