"""Small calls of every plan, and what their results were: recorded.json, which test_recorded.py
compares with. `python tests/support/recorded.py --write` records them anew.

Libraries sum in an order of their own on every CPU. So the operands here are small integers times
powers of two, of which every sum is exact in float32, in whatever order: the bits do not depend on
the CPU. What the equation rounds to 16 bits does not fit there, so that its roundings show. And
where a library adds a product to something in 16 bits, both have few bits, so that it does not
matter whether it rounds the product first: of `down` each column has one number that is not zero
and of `up` each row, a power of two. Calls by kernels alone need not have that (`dense`).

Writing watches every product and sum, and refuses operands with which one of them is not exact, or
a rounding does not show.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from recorded_exact import check_rounding, watched
from recorded_operands import BF16, F16, F32, F64, Made, integers, operands
from torch import Tensor, nn

from fused_lowrank import (
    AdapterBank,
    FusedLoraLinear,
    FusedLoraMiniLinear,
    FusedLoraXSLinear,
    lowrank_linear,
    use_batch_invariance,
)
from fused_lowrank.kernels.tiles import TileConfig
from fused_lowrank.testing import pinned_plan, pinned_tiles

FILE = Path(__file__).with_name("recorded.json")
LAYERS = {
    "lora": (FusedLoraLinear, {"r": 6}),
    "lora_xs": (FusedLoraXSLinear, {"r": 6}),
    "lora_mini": (FusedLoraMiniLinear, {"r": 2, "a": 6, "b": 8}),
}
SMALL_TILES = {  # so that small operands span many programs
    "shrink": TileConfig(16, 16, 16, 4, 1),
    "gemm_tail": TileConfig(16, 32, 16, 4, 1, group_m=2),
    "core_grad": TileConfig(16, 32, 16, 4, 1),
}
DECODE_TILES = {"decode": TileConfig(16, 32, 16, 4, 1)}
# Under these seeds some element's random number is the least that is kept with p = 0.5, and
# another's the greatest that is dropped: in the kernels' mask of (37, 45), and in the library's.
KERNEL_SEED, LIBRARY_SEED = 1364, 3357

Results = dict[str, Tensor]
CASES: dict[str, Callable[[], Results]] = {}


# --- calls ---


def differentiated(call: Callable[..., Tensor], made: Made, train: str, dy: Tensor) -> Results:
    """y of the operands, and the gradients of those that `train` names."""
    leaves: Results = {}
    for name in train.split():
        value = made[name]
        parts = value if isinstance(value, tuple) else () if value is None else (value,)
        for i, part in enumerate(parts):
            leaves[f"d{name}{i if len(parts) > 1 else ''}"] = part.requires_grad_()
    y = call(**made)
    grads = torch.autograd.grad(y, list(leaves.values()), dy) if leaves else ()
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


@contextmanager
def pinned(plan: str, tiles: dict[str, TileConfig] | None, invariant: bool = False) -> Iterator:
    """Within it calls take this plan and these tiles."""
    with ExitStack() as stack:
        if plan:
            stack.enter_context(pinned_plan(plan))
        stack.enter_context(pinned_tiles(**(tiles or {})))
        use_batch_invariance(invariant)
        stack.callback(use_batch_invariance, False)
        yield


def of_linear(
    kind: dict[str, Any],
    train: str = "x weight down core up bias",
    plan: str = "",
    tiles: dict[str, TileConfig] | None = None,
    seed: int | None = None,
    expanded: bool = False,
    autocast: bool = False,
    compiled: bool = False,
    invariant: bool = False,
    **keywords: Any,
) -> Results:
    """The results of `lowrank_linear` for such operands."""
    made, dy = operands(**kind)
    if seed is not None:
        keywords = {**keywords, "seed": torch.tensor([seed]), "training": True}
    call: Any = functools.partial(lowrank_linear, **{"scale": 1.5, **keywords})
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    dy = dy[..., :1].expand(dy.shape) if expanded else dy
    with pinned(plan, tiles, invariant), torch.autocast("cpu", BF16, enabled=autocast):
        return differentiated(call, made, train, dy.to(BF16) if autocast else dy)


def layer_of(method: str, dtype: torch.dtype, alpha: float, seed: int = 6, **keywords: Any) -> Any:
    """A fused layer whose parameters are such operands."""
    cls, ranks = LAYERS[method]
    linear = nn.Linear(45, 38, dtype=dtype)
    keywords = {**ranks, "alpha": alpha, "dtype": dtype, **keywords}
    layer = cls.from_linear(linear, defer_bases=True, **keywords)
    p, q = layer.down.shape[0], layer.up.shape[1]
    kind = {"core": "none"} if method == "lora" else {"q": q}
    made, _ = operands(dtype, p=p, **kind)
    state = {
        name: integers(seed + len(name), *parameter.shape, limit=3)
        for name, parameter in layer.named_parameters()
    }
    shared = {name: made[name] for name in state if name in made and name != "core"}
    layer.load_state_dict({**state, **shared})
    return layer


def of_layer(
    method: str, dtype: torch.dtype, impl: str = "auto", train: tuple[str, ...] | None = None
) -> Results:
    """The results of a fused layer: y and the gradients of x and of what it trains."""
    ranks = LAYERS[method][1]
    keywords = {} if train is None else {"train": train}
    layer = layer_of(method, dtype, ranks["r"] / 2, **keywords)
    layer.impl = impl
    made, dy = operands(dtype, m=36, lead=(3, 12))
    leaves = {"x": made["x"].requires_grad_()}
    leaves |= {name: part for name, part in layer.named_parameters() if part.requires_grad}
    y = layer(made["x"])
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


ENTRIES = ["a", None, "b", "c", "a", None]
MIXTURES = [["a", "b"], [None, "c"], ["b", "b"], [None, None], ["c", "a"], ["a", None]]


def of_bank(
    method: str,
    dtype: torch.dtype,
    entries: Any = ENTRIES,
    plan: str = "",
    impl: str = "auto",
    table: torch.dtype | None = None,
    tiles: dict[str, TileConfig] | None = None,
    trained: bool = False,
    plain: bool = False,
    compiled: bool = False,
    invariant: bool = False,
) -> Results:
    """y and dx of a bank's layer, or with `trained` also the gradients of its tables.

    With `plain` y alone, without gradients. Of "old" handles the second is refused.
    """
    r = LAYERS[method][1]["r"]
    model = nn.Sequential(layer_of(method, dtype, r))
    model[0].impl = impl
    bank = AdapterBank.from_model(model, slots=5, dtype=table)
    for i, (name, scale) in enumerate({"a": 1.0, "b": 0.5, "c": 4.0}.items()):
        bank.add(name, nn.Sequential(layer_of(method, dtype, r * scale, seed=20 + 20 * i)))
    weights = None
    if entries == "old":
        entries = bank.handles(["a", "b", None, "c", "b", "a"])
        bank.replace("b", nn.Sequential(layer_of(method, dtype, r, seed=90)))
    elif entries == MIXTURES:
        weights = 2.0 ** integers(30, len(entries), 2, limit=2).float()
    made, dy = operands(dtype, m=30, lead=(6, 5))
    x, call = made["x"], model
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pinned(plan, tiles, invariant):
        if plain:
            with torch.no_grad(), bank.use(entries, weights):
                return {"y": call(x)}
        leaves = {"x": x.requires_grad_()}
        if trained:
            store = bank.trainable(["c", "a", "b"])
            leaves |= dict(store.named_parameters())
            with store.use(entries):
                y = call(x)
        else:
            with bank.use(entries, weights):
                y = call(x)
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


# --- the cases ---


def add(name: str, call: Callable[..., Results], *args: Any, **keywords: Any) -> None:
    """Record a call under a name."""
    assert name not in CASES
    CASES[name] = functools.partial(call, *args, **keywords)


def short(dtype: torch.dtype) -> str:
    """A dtype's name."""
    return str(dtype).removeprefix("torch.")


def add_every_way(name: str, kind: dict[str, Any], **keywords: Any) -> None:
    """The plans that any operands may take, each of its own, and the ways without a plan."""
    few = "x weight core up bias"  # a gradient of down needs u, which decode does not give
    every = {"plan": "aten"}, {"plan": "first"}, {"plan": "split", "tiles": SMALL_TILES}
    every += ({"plan": "mixed"}, {"plan": "decode", "train": few}, {"impl": "reference"})
    every += ({"scale": 0.5},)  # autograd of library calls, in which the scale is a call's own
    for way in every:
        label = way.get("plan") or way.get("impl", "small")
        add(f"{label}/{name}", of_linear, kind, **{**keywords, **way})


def add_linear() -> None:
    """`lowrank_linear` by every plan."""
    for dtype in (F32, F16, BF16):
        of = short(dtype)
        add_every_way(f"core/{of}", {"dtype": dtype})
        add_every_way(f"none/{of}", {"dtype": dtype, "core": "none", "bias": False}, scale=0.75)
        add_every_way(f"pair/{of}", {"dtype": dtype, "core": "pair", "m": 9})
        add(f"split/default tiles/{of}", of_linear, {"dtype": dtype}, plan="split")
        tiles = {"dtype": dtype, "m": 13, "k": 331, "n": 43, "p": 4, "q": 6}
        add(f"split/split over K/{of}", of_linear, tiles, plan="split", tiles=SMALL_TILES)
        decode = {"plan": "decode", "tiles": DECODE_TILES, "train": "x core up"}
        add(f"decode/split over K/{of}", of_linear, tiles, **decode)
        for impl, core in (("triton", "core"), ("triton", "pair"), ("aten", "core")):
            kind = {"dtype": dtype, "core": core, "m": 9}
            add(f"{impl}/no dx/{core}/{of}", of_linear, kind, impl=impl, train="core down")
        for rate, train in ((0.5, "x weight down core up bias"), (0.75, "core down")):
            kind = {"impl": "triton", "seed": KERNEL_SEED, "tiles": SMALL_TILES}
            for way in (kind, {"impl": "aten", "seed": LIBRARY_SEED}):
                label = f"{way['impl']}/dropout {rate}/{of}"
                add(label, of_linear, {"dtype": dtype}, train, dropout_p=rate, **way)
        way = {"impl": "reference", "seed": LIBRARY_SEED, "dropout_p": 0.5}
        add(f"reference/dropout 0.5/{of}", of_linear, {"dtype": dtype}, **way)
    for dtype in (F16, BF16):
        of = short(dtype)
        add_every_way(f"float32 core/{of}", {"dtype": dtype, "core_dtype": F32})
        kind = {"dtype": dtype, "core_dtype": F32, "factor_dtype": F32}
        for plan in ("aten", "split"):
            add(f"{plan}/float32 factors/{of}", of_linear, kind, plan=plan)
            pair = {**kind, "core": "pair", "m": 9, "factor_dtype": None}
            add(f"{plan}/float32 pair/{of}", of_linear, pair, plan=plan)


def add_shapes() -> None:
    """Strides, leading dimensions, few rows or none, large ranks, other dtypes."""
    layouts = {"x": "turned", "weight": "turned", "core": "turned", "down": "sliced"}
    others = {"x": "sliced", "weight": "sliced", "up": "turned", "core": "sliced"}
    few = "x weight core up bias"
    for dtype in (F32, BF16):
        of = short(dtype)
        for plan, train in (("aten", "x down core"), ("first", few), ("split", few + " down")):
            kind = {"dtype": dtype, "layouts": layouts}
            add(f"{plan}/turned/{of}", of_linear, kind, train, plan, expanded=True)
            add(f"{plan}/sliced/{of}", of_linear, {**kind, "layouts": others}, train, plan)
        kind = {"dtype": dtype, "layouts": others}
        add(f"decode/sliced/{of}", of_linear, kind, few, "decode", expanded=True)
        for impl in ("aten", "triton", "reference", "auto"):
            scale = 0.5 if impl == "auto" else 1.5
            for label, size in (("no rows", {"m": 0}), ("vector", {"m": 1, "lead": ()})):
                kind = {"dtype": dtype, **size}
                add(f"{impl}/{label}/{of}", of_linear, kind, impl=impl, scale=scale)
            kind = {"dtype": dtype, "m": 24, "lead": (2, 3, 4)}
            add(f"{impl}/three leading/{of}", of_linear, kind, impl=impl, scale=scale)
        kind = {"dtype": dtype, "m": 20, "p": 150, "q": 20, "dense": True}
        add(f"split/P of 150/{of}", of_linear, kind, "x core", "split")
        for impl in ("aten", "triton"):
            way = {"impl": impl, "invariant": True, "train": "x core down"}
            add(f"{impl}/invariant/{of}", of_linear, {"dtype": dtype, "m": 21}, **way)
    for plan in ("aten", "split"):
        add(f"{plan}/compiled", of_linear, {"dtype": BF16}, plan=plan, compiled=True)
        add(f"{plan}/core/float64", of_linear, {"dtype": F64}, plan=plan)
        add(f"{plan}/autocast", of_linear, {"dtype": F32}, "x core", plan, autocast=True)


def add_dense() -> None:
    """Kernels alone, which round y once: factors without zeros, and the tiles of large launches."""
    for dtype in (F32, F16, BF16):
        of = short(dtype)
        kinds: dict[str, Any] = {"core": {}, "none": {"core": "none"}}
        kinds["pair"] = {"core": "pair", "m": 9}
        if dtype != F32:
            kinds["float32 core"] = {"core_dtype": F32}
        for label, kind in kinds.items():
            kind = {"dtype": dtype, "dense": True, **kind}
            few = "x core" if "float32" in label else "x core up"  # that of up is a library's
            way = {"plan": "split", "tiles": SMALL_TILES}
            add(f"split/dense {label}/{of}", of_linear, kind, few, **way)
            add(f"decode/dense {label}/{of}", of_linear, kind, few, "decode")
        if dtype == F32:
            continue
        large = {"dtype": dtype, "dense": True, "m": 129, "k": 80, "n": 272, "p": 16, "q": 24}
        sets = ("", ":pointers", ":deep", ":narrow")
        for tiles in sets if dtype == BF16 else sets[:1]:
            add(f"split{tiles}/large/{of}", of_linear, large, "x down core up", f"split{tiles}")


def add_layers() -> None:
    """The fused layers, and a bank of them."""
    for dtype in (F32, F16, BF16):
        of = short(dtype)
        for method, (cls, _) in LAYERS.items():
            for impl in ("auto", "aten", "triton"):
                add(f"{cls.__name__}/{impl}/{of}", of_layer, method, dtype, impl)
        everything = "weight", "bias", *FusedLoraMiniLinear.factors
        add(f"FusedLoraMiniLinear/all/{of}", of_layer, "lora_mini", dtype, "triton", everything)
        for method in ("lora_xs", "lora_mini"):
            name = f"bank/{method}"
            for plan in ("aten", "split", "decode"):
                add(f"{name}/{plan}/{of}", of_bank, method, dtype, plan=plan)
                mixed = {"entries": MIXTURES, "plan": plan}
                add(f"{name}/{plan}/mixtures/{of}", of_bank, method, dtype, **mixed)
                if plan != "decode":
                    trained = {"plan": plan, "trained": True}
                    add(f"{name}/{plan}/trained/{of}", of_bank, method, dtype, **trained)
            add(f"{name}/small/{of}", of_bank, method, dtype, plain=True)
            add(f"{name}/reference/{of}", of_bank, method, dtype, impl="reference")
    for method in ("lora_xs", "lora_mini"):
        for plan in ("aten", "split", "decode"):
            name, of = f"bank/{method}/{plan}", {"plan": plan}
            add(f"{name}/float32 tables", of_bank, method, BF16, table=F32, **of)
            add(f"{name}/one adapter", of_bank, method, BF16, entries="c", **of)
            add(f"{name}/old handles", of_bank, method, BF16, entries="old", **of)
        tiles = {"plan": "split", "tiles": SMALL_TILES}
        add(f"bank/{method}/small tiles", of_bank, method, F16, entries=MIXTURES, **tiles)
        for impl in ("aten", "triton"):
            way = {"impl": impl, "invariant": True}
            add(f"bank/{method}/{impl}/invariant", of_bank, method, BF16, **way)
    for plan in ("aten", "split"):
        add(f"bank/{plan}/compiled", of_bank, "lora_xs", BF16, plan=plan, compiled=True)


for _part in (add_linear, add_shapes, add_dense, add_layers):
    _part()


# --- what is recorded ---


def picture(tensor: Tensor) -> str:
    """dtype, shape, the beginning of the hash of its bytes, and the first four values."""
    values = (tensor.detach() + 0.0).contiguous().flatten()  # of -0 and 0 one: 0
    digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    first = " ".join(f"{value:.9g}" for value in values[:4].double().tolist())
    return f"{short(tensor.dtype)} {list(tensor.shape)} {digest}: {first}"


def pictures(name: str) -> dict[str, str]:
    """What is recorded of a case, as it is now."""
    return {tensor: picture(value) for tensor, value in CASES[name]().items()}


def recorded() -> dict[str, dict[str, str]]:
    """What the file has."""
    return json.loads(FILE.read_text())


# --- writing ---


def write() -> None:
    """Record all cases, checked."""
    lines = []
    for name, case in CASES.items():
        keywords = dict(case.keywords)
        kind = case.args[0] if case.func is of_linear else {"dtype": F32}
        try:
            if kind["dtype"].itemsize == 2 and kind.get("m", 37) > 8:
                check_rounding(kind, keywords.get("scale", 1.5))
            before = pictures(name)
            if not keywords.get("compiled"):
                with watched():
                    results = case()
                if not all(value.isfinite().all() for value in results.values()):
                    raise AssertionError("a result is not finite")
                if {tensor: picture(value) for tensor, value in results.items()} != before:
                    raise AssertionError("two runs differ")
        except Exception as error:
            raise RuntimeError(f"{name}: {error}") from error
        inner = ",\n".join(f"  {json.dumps(t)}: {json.dumps(p)}" for t, p in before.items())
        lines.append(f"{json.dumps(name)}: {{\n{inner}\n}}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(CASES)} cases in {FILE.name}, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help="record anew")
    parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported
    os.environ["FUSED_LOWRANK_TUNE"] = "off"
    write()
