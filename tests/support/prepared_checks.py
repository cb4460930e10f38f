"""What test_prepared.py runs in processes of their own: launches prepared and ordinary.

    python tests/support/prepared_checks.py arguments  what the function in C is called with
    python tests/support/prepared_checks.py bytes      what that gives to the driver (libcuda.c)

Nothing is launched. Every function named check_… is run, or those named behind, and a line says how
it went.
"""

from __future__ import annotations

import itertools
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prepared_driver import (
    F16,
    F32,
    Call,
    P,
    Rows,
    agrees,
    by_default,
    by_slices,
    calls,
    ordinary,
    started,
    taken,
    zeros,
)

from fused_lowrank.kernels import common
from fused_lowrank.kernels.core_grad import core_grad
from fused_lowrank.kernels.decode import decode
from fused_lowrank.kernels.gemm_tail import gemm_tail
from fused_lowrank.kernels.relay import relay
from fused_lowrank.kernels.shrink import shrink


def drawn(rng: random.Random) -> tuple[int, int, int, int]:
    """(m, few, n, k) of calls whose code is the same: tiles are as many as one likes."""
    few, parts = rng.randint(33, 64), rng.choice((8, 16, 24))
    return rng.randint(65, 2000), few, 256 * rng.randint(1, 9), 64 * parts


def check_every_launch_is_the_ordinary_one() -> None:
    rng = random.Random(0)
    for _ in range(3):
        for label, call in calls(*drawn(rng)):
            agrees(label, call)


def check_what_is_remembered_is_not_taken_for_another() -> None:
    """Calls of all sizes in any order, none forgotten; what differs between them shows."""
    rng, made = random.Random(1), []
    for i in range(3):
        made += [(f"{label} {i}", call) for label, call in calls(*drawn(rng))]
    for _ in range(2):
        rng.shuffle(made)
        for label, call in made:
            assert ordinary(call) == taken(call), label


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like this, at an address that is no multiple of 16."""
    return zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


def others(function: Callable[..., Any], made: dict[str, Any]) -> Iterator[tuple[str, Call]]:
    """Calls that differ from one in one thing each."""

    def call(**change: Any) -> Call:
        return partial(function, **{**made, **change})

    yield "itself", call()
    yield "moved", call(**{n: v.clone() for n, v in made.items() if isinstance(v, torch.Tensor)})
    yield "other tiles", call(choose=lambda spec, m: replace(by_default(spec, m), num_stages=2))
    rows = made.get("x", made.get("t"))
    m, width = rows.shape
    for name, value in made.items():
        if isinstance(value, torch.Tensor):
            if name != "seed":
                yield f"{name} misaligned", call(**{name: misaligned(value)})
            if name in ("core", "up", "down"):
                yield f"{name} in fp16", call(**{name: value.to(F16)})
        elif isinstance(value, bool) and name != "transposed":
            yield f"not {name}", call(**{name: not value})
    if "x" in made:
        wide = zeros(m, 2 * width)
        yield "x wide", call(x=wide[:, :width])
        yield "x strided", call(x=wide[:, ::2])
    if "weight" in made:
        n, k = made["weight"].shape
        yield "W of columns", call(weight=zeros(k, n).t())
        yield "W wide", call(weight=zeros(n, 2 * k)[:, :k])
        if "u" not in made:
            yield "no bias", call(bias=None)
    if "scale" in made:
        yield "another scale", call(scale=3.0)
    if "core" in made:
        square = zeros(P, P, dtype=F32)
        yield "a pair of squares", call(core=(made["core"], square))
        yield "a pair of one square", call(core=(made["core"],) * 2)
        if "x" in made:
            yield "no core", call(core=None)
            yield (
                "transposed",
                call(
                    transposed=True,
                    **{n: v.t().contiguous() for n, v in made.items() if n in ("down", "up")},
                ),
            )
    if "dropout" in made:
        seed = torch.zeros(1, dtype=torch.int64)
        for p in (0.1, 0.25):
            yield f"dropout {p}", call(dropout=(seed, p))
            yield f"dropout {p}, bits", call(dropout=(seed, p), want_bits=True)
    if "bits" in made:
        width = common.mask_width(len(made["weight"]))
        bits = torch.zeros(m, width, dtype=torch.uint8)
        yield "bits", call(bits=bits)
        yield "bits misaligned", call(bits=misaligned(bits))
    if "want" in made:
        pair = zeros(P, 8, dtype=F32), zeros(8, P, dtype=F32)
        for want in itertools.product((False, True), repeat=2):
            yield f"a pair, {want}", call(core=pair, want=want)


def check_nothing_else_is_taken_for_it() -> None:
    """Not with another dtype, stride, alignment, flag or tile, nor elsewhere in memory."""
    k, n, choose = 512, 256, by_default
    down, core, up, bias = zeros(P, k), zeros(P, P, dtype=F32), zeros(n, P), zeros(n)
    flags = {"scale": 0.5, "transposed": False, "choose": choose}
    layer = {"weight": zeros(n, k), "down": down, "core": core, "up": up, "bias": bias, **flags}
    tail = {"weight": layer["weight"], "up": up, "bias": bias, "transposed": False}
    tail |= {"bits": None, "choose": choose}
    low = {"down": down, "core": core, "want_t": True, "want_u": True, "dropout": None, **flags}
    grad = {"t": zeros(300, P), "g": zeros(300, P), "core": core, "scale": 0.5}
    kinds: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (shrink, {"x": zeros(128, k), **low}),
        (shrink, {"x": zeros(16, k), **low}),
        (gemm_tail, {"x": zeros(128, k), "u": zeros(128, P), **tail}),
        (gemm_tail, {"x": zeros(16, k), "u": zeros(16, P), **tail}),
        (core_grad, {**grad, "want": (True, True), "choose": choose}),
        (decode, {"x": zeros(16, k), "want_t": False, **layer}),
        (relay, {"x": zeros(128, k), "want_t": False, **layer}),
        (relay, {"x": zeros(128, k), "want_t": False, **layer, "choose": by_slices}),
    ]
    rng = random.Random(2)
    for function, made in kinds:
        several = []
        for label, call in others(function, made):
            try:
                several.append((f"{function.__name__}, {label}", call, ordinary(call)))
            except (ValueError, StopIteration):  # there is no tile
                assert function is relay, label
        for (one, _, first), (other, _, second) in itertools.combinations(several, 2):
            assert first != second, (one, other)
        for _ in range(3):
            rng.shuffle(several)
            for label, call, _ in several:
                assert ordinary(call) == taken(call), (function.__name__, label)


def check_rows_of_another_kind_are_another_launch() -> None:
    """Adapters to a row, their weights, the rows to an entry: no shape in the key tells them."""
    m, k = 48, 512
    some, whole = (
        zeros(m, k),
        {"down": zeros(P, k), "scale": 0.5, "transposed": False, "want_t": False},
    )
    more = {"weight": zeros(64, k), "up": zeros(64, P), "bias": None}
    kinds = list(itertools.product((1, 2), (1, 2), (False, True)))
    many = zeros(2 * m, k)
    for _ in range(2):
        for repeat, mix, weighted in kinds:
            for function, x, others in (
                (shrink, some, {"want_u": True, "dropout": None}),
                (decode, some, more),
                (relay, many, more),
            ):
                rows = Rows(len(x) // repeat, 3, mix, weighted)
                rows.repeat = repeat
                given = {"x": x, "core": rows, "choose": by_default, **whole}
                call = partial(function, **given, **others)
                assert ordinary(call) == taken(call), (function.__name__, repeat, mix, weighted)


def check_transposed_counts_where_no_shape_shows_it() -> None:
    side, one = 64, zeros(64, 64)
    tensors = {"x": zeros(side, side), "down": one, "up": one.clone(), "weight": zeros(side, side)}
    low = {"core": zeros(side, side), "scale": 0.5}
    for function, names, more in (
        (shrink, ("x", "down"), {**low, "want_t": True, "want_u": True, "dropout": None}),
        (gemm_tail, ("x", "weight", "up"), {"u": zeros(side, side), "bias": None, "bits": None}),
        (decode, ("x", "weight", "down", "up"), {**low, "want_t": True, "bias": None}),
    ):
        operands = {name: tensors[name] for name in names} | more
        for transposed in (False, True, False, True):
            call = partial(function, **operands, transposed=transposed, choose=by_default)
            assert ordinary(call) == taken(call), (function.__name__, transposed)


if __name__ == "__main__":
    import prepared_moment_checks as later

    with started():
        for name, check in [*globals().items(), *vars(later).items()]:
            if name.startswith("check_") and (name in sys.argv[2:] or not sys.argv[2:]):
                try:
                    check()
                    print(name, "passed", flush=True)
                except Exception:
                    print(name, "failed", flush=True)
                    traceback.print_exc()
