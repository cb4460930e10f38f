"""Uses of an adapter over a kind of base: each is tried, and raises where its result is wrong.

A function here is of a kind of base and a method, both by name, and a folder for its files. It
returns the word that it works by, "yes" mostly; `Refused` is raised with what the library said.
`docs/bases_table.py` makes its table of them, and `test_bases_table.py` holds that table.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from base_cases import METHODS, adapted, check, formula, inputs, layers_of, model_of, shifted
from torch import Tensor

from fused_lowrank import (
    AdapterBank,
    adapt,
    disable_adapters,
    load_adapter,
    merge,
    save_adapter,
    unload,
)
from fused_lowrank.integrations.peft import LoraMiniConfig, LoraXSConfig, fuse_lora
from fused_lowrank.testing import FACTOR

YES = "yes"
TARGETS = ["first", "second"]
# What a bank wants of a method whose adapters are not its core alone.
IN_BANKS: dict[str, dict[str, Any]] = {
    "vera": {"train": ("d",), "d_initial": 0.0, "b_initial": 1.0}
}
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True),
    "lora_xs": lambda: LoraXSConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "lora_mini": lambda: LoraMiniConfig(r=3, a=8, b=6, lora_alpha=6, target_modules=TARGETS),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=TARGETS),
}


class Refused(Exception):
    """A library does not do this: its first sentence says why."""


@contextmanager
def may_refuse() -> Iterator[None]:
    """A context in which an error with a text is a refusal."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        raise Refused(str(error)) from error


@contextmanager
def may_fail(whose: str) -> Iterator[None]:
    """A context in which another library's own code may fail as well."""
    try:
        yield
    except (AttributeError, RuntimeError) as error:
        raise Refused(f"{whose} own layer fails: {error}") from error


def same(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Raise RuntimeError unless two results are the same but for rounding."""
    found, expected = found.detach().double(), expected.detach().double()
    if not (found - expected).norm() <= tolerance * expected.norm():
        raise RuntimeError(f"{what}: {(found - expected).norm() / expected.norm():.2g} off")


def moved(found: Tensor, before: Tensor, what: str) -> None:
    """Raise RuntimeError if two results are the same."""
    if torch.allclose(found, before):
        raise RuntimeError(f"{what}: nothing has changed")


def forward(kind: str, method: str, folder: Path) -> str:
    """The result is as near to float64 on the dequantised W as the formula in float32 is."""
    with may_refuse():
        model = adapted(kind, method)
    x = inputs()
    with torch.no_grad():
        exact = formula(model, torch.float64)[0](x.double())
        usual = float((formula(model, x.dtype)[0](x).double() - exact).norm())
        error = float((model(x).double() - exact).norm())
    if not error <= FACTOR * usual + torch.finfo(x.dtype).eps * float(exact.norm()):
        raise RuntimeError(f"{method} over {kind}: the error is {error:.2g}, usually {usual:.2g}")
    return YES


def gradients(kind: str, method: str, folder: Path) -> str:
    """So are the gradients, of x and of what is trained."""
    with may_refuse():
        model = adapted(kind, method)
    check(model, inputs())
    return YES


def saved(kind: str, method: str, folder: Path) -> str:
    """A file has the adapter, and nothing of the base."""
    model = adapted(kind, method)
    with may_refuse():
        save_adapter(model, folder / "adapter.safetensors")
    size = (folder / "adapter.safetensors").stat().st_size
    own = {t for layer in layers_of(model) for t in layer.factors_now().values()}
    if not size < sum(t.nbytes for t in own) + 20_000:
        raise RuntimeError(f"{method} over {kind}: a file of {size} bytes")
    return YES


def loaded(kind: str, method: str, folder: Path) -> str:
    """A file goes onto another model with the same base, and gives the same results."""
    model = adapted(kind, method)
    with may_refuse():
        save_adapter(model, folder / "adapter.safetensors")
        other = load_adapter(model_of(kind), folder / "adapter.safetensors", progress=False)
    same(other(inputs()), model(inputs()), f"{method} over {kind}, loaded", 1e-6)
    return YES


def disabled(kind: str, method: str, folder: Path) -> str:
    """Without its adapter the model is the base's."""
    before = model_of(kind)(inputs())
    model = adapted(kind, method)
    moved(model(inputs()), before, f"{method} over {kind}")
    with may_refuse(), disable_adapters(model):
        y = model(inputs())
    same(y, before, f"{method} over {kind}, disabled")
    return YES


def unloaded(kind: str, method: str, folder: Path) -> str:
    """The very modules come back, and compute what they did."""
    model = model_of(kind)
    before, modules = model(inputs()), [model.first, model.second]
    with may_refuse():
        adapt(model, method, target_modules=TARGETS, progress=False, **METHODS[method])
        unload(shifted(model))
    if [model.first, model.second] != modules:
        raise RuntimeError(f"{method} over {kind}: other modules came back")
    same(model(inputs()), before, f"{method} over {kind}, unloaded", 0.0)
    return YES


def banked(kind: str, method: str, folder: Path) -> str:
    """Rows of a batch have adapters of their own; each one's gradient is what it is alone."""
    keywords = IN_BANKS.get(method, {})
    model = adapted(kind, method, **keywords)
    with may_refuse():
        bank = AdapterBank.from_model(model, slots=2)
    x, alone, grads = inputs(torch.float32, 3), {}, {}
    trained = [p for p in model.parameters() if p.requires_grad]
    for i, name in enumerate("ab"):
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(generator=torch.Generator().manual_seed(i))
        alone[name] = model(x)
        grads[name] = torch.autograd.grad(alone[name].square().sum(1)[i], trained)
        bank.add(name, model)
    with bank.use(["a", "b", None]):
        y = model(x)
    with disable_adapters(model):
        same(y[2], model(x)[2], f"{method} over {kind}, no adapter")
    trainable = bank.trainable(["a", "b"])
    with trainable.use(["a", "b", None]):
        losses = model(x).square().sum(1)
    trainable.loss(losses).backward()
    for i, name in enumerate("ab"):
        same(y[i], alone[name][i], f"{method} over {kind}, {name}")
        for parameter, grad in zip(trainable.parameters(), grads[name], strict=True):
            assert parameter.grad is not None
            same(parameter.grad[i], grad, f"{method} over {kind}, gradient of {name}")
    return f"with {', '.join(f'`{k}={v!r}`' for k, v in keywords.items())}" if keywords else YES


def in_peft(kind: str, method: str, folder: Path) -> str:
    """A configuration of PEFT's does it: of this library, or PEFT's own, taken over by ours."""
    config = CONFIGS[method]()
    ours = type(config).__module__.startswith("fused_lowrank")
    with may_refuse(), quiet(), contextlib.nullcontext() if ours else may_fail("PEFT's"):
        model: Any = shifted(peft.get_peft_model(model_of(kind), config))
        model(inputs())  # one that fails may do so in its second call
        before = model(inputs())
    what = f"{method} over {kind} in PEFT"
    if method in ("lora", "dora"):
        with may_refuse(), quiet():
            fuse_lora(model)
        layer = model.base_model.model.first
        if not type(layer).__module__.startswith("fused_lowrank"):
            raise Refused(f"fuse_lora leaves a {type(layer).__name__} as it is")
        same(model(inputs()), before, what)
        return "`fuse_lora`"
    with may_refuse(), quiet():
        model.save_pretrained(folder / "peft")
        own = load_adapter(model_of(kind), folder / "peft", progress=False)
    same(own(inputs()), before, what)
    return f"`{type(config).__name__}`" if ours else f"PEFT's `{type(config).__name__}`"


@contextmanager
def quiet() -> Iterator[None]:
    """A context without PEFT's warnings, of bases that it does not know well."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def merged(kind: str, method: str, folder: Path) -> str:
    """ΔW, as large as W is, goes into the weight; the results stay nearer to the adapter's than to
    the base's.
    """
    model = adapted(kind, method)
    x = inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what rounding loses, which is measured here
        with disable_adapters(model):
            base = model(x)
        adds = (model(x) - base).norm()
        for layer in layers_of(model):
            layer.scale *= float(base.norm() / adds)
        before = model(x)
        with may_refuse():
            merge(model)
        after = model(x)
    lost, whole = float((after - before).norm()), float((before - base).norm())
    if not lost < 0.5 * whole:
        raise RuntimeError(f"{method} over {kind}, merged: {lost / whole:.2g} of ΔW's part is lost")
    return YES if lost <= 1e-3 * whole else "rounded"


CELLS: dict[str, Callable[[str, str, Path], str]] = {
    "forward": forward,
    "gradients": gradients,
    "save": saved,
    "load": loaded,
    "disable": disabled,
    "unload": unloaded,
    "bank": banked,
    "PEFT": in_peft,
    "merge": merged,
}
