"""Calibration: what the inputs of a model's layers are like, over some batches of the user's.

Batches go through the model as it is, in eval mode and without gradients; before each layer's
forward its input is added to what is known: principal directions, kept in 64 vectors of K
numbers, or twice as many as are wanted, or a (K, K) covariance. Nothing of a batch is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..compute.base.kinds import from_bitsandbytes
from ..context.disabling import disabled
from ..methods import LowRankLinear
from ..methods.initial.triples import RANKS, leading
from ..methods.initial.values import Inputs, needs, without_data
from .originals import Originals, require_original

IGNORED = -100  # a label that no loss is taken of
HOW = "data is an iterable of batches, each of which goes to the model as forward_fn says"


class Gatherer(Protocol):
    """A gatherer of what an initialiser needs to know of one layer's inputs."""

    def add(self, x: Tensor, kept: Tensor | None) -> None:
        """Add an input (…, K), of which `kept` (…) says which rows are to count."""

    def known(self) -> Inputs:
        """Return what is known by now."""


class Directions:
    """The principal directions of inputs less their mean: incremental PCA, as in EVA.

    A batch is one step: the directions so far, weighted by their singular values, the batch less
    its own mean, and the way between the two means are decomposed together (Ross et al. 2008).
    """

    def __init__(self, count: int) -> None:
        self.count, self.kept, self.seen = count, max(RANKS, 2 * count), 0
        self.mean = self.weighted = torch.empty(0)

    def add(self, x: Tensor, kept: Tensor | None) -> None:
        """Add an input; rows that do not count are left out."""
        rows = x.reshape(-1, x.shape[-1])
        rows = (rows if kept is None else rows[kept.reshape(-1)]).float()
        new = len(rows)
        if not new:
            return
        mean = rows.mean(0, dtype=torch.float64)
        if not self.seen:
            self.mean, self.weighted = mean, rows.new_empty(0, rows.shape[1])
        share = self.seen * new / (self.seen + new)
        between = (share**0.5 * (self.mean - mean)).float()[None]
        stack = torch.cat([self.weighted, rows - mean.float(), between])
        self.weighted, _ = leading(stack, min(self.kept, *stack.shape))
        self.mean = (self.seen * self.mean + new * mean) / (self.seen + new)
        self.seen += new

    def known(self) -> Inputs:
        """The directions with inputs along them; the largest entry of each is positive, as PEFT's
        are.
        """
        strengths = self.weighted[: self.count].norm(dim=1)
        some = strengths > 1e-6 * strengths.amax()
        strengths = strengths[some]
        directions = self.weighted[: self.count][some] / strengths[:, None]
        sign = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
        return Inputs(directions * sign, strengths)


class Covariance:
    """The mean of xᵀ·x over sequences x (T, K), each over its largest element, as in CorDA."""

    def __init__(self) -> None:
        self.sum, self.seen = torch.empty(0), 0

    def add(self, x: Tensor, kept: Tensor | None) -> None:
        """Add an input: of three dimensions or more, one of several sequences."""
        x = x.detach().float()
        x = x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x.reshape(1, -1, x.shape[-1])
        most = x
        if kept is not None:
            kept = kept.reshape(*x.shape[:2], 1)
            most, x = x.masked_fill(~kept, -torch.inf), x.masked_fill(~kept, 0)
        most = most.amax((1, 2), keepdim=True).abs() if x.shape[1] else x.new_zeros(len(x), 1, 1)
        there = most.isfinite() & (most > 0)  # not of padding alone, nor zeros
        x = torch.where(there, x / most, 0).reshape(-1, x.shape[-1])
        self.sum = x.t() @ x if not self.seen else self.sum.addmm_(x.t(), x)
        self.seen += int(there.sum())

    def known(self) -> Inputs:
        """The mean of what was added."""
        return Inputs(covariance=self.sum / max(self.seen, 1))


def needed(cls: type[LowRankLinear], given: Mapping[str, Any], data: Any, later: bool) -> Any:
    """The field of `Inputs` that the init among a method's keywords needs, or None.

    Raises ValueError where it needs data and has none, or has data and needs none, or is to be made
    `later`; TypeError for data that is no iterable of batches, or has no weights where it should.
    """
    known = cls.row.inits_known
    init: Any = given.get("init", known[0] if known else None)
    need = needs(init) if init in known else None
    if need and later:
        raise ValueError(f"init={init!r} cannot be put off by defer_bases: load the weights first")
    if need and data is None:
        raise ValueError(without_data(init))
    if data is not None and not need:
        wanting = " or ".join(repr(word) for word in known if needs(word))
        raise ValueError(
            f"data is given, and init={init!r} needs none: of {cls.method}'s, {wanting} does"
            if wanting
            else f"data is given, and {cls.method} has no init that needs any"
        )
    if need == "original":
        require_original(data)
    elif need:
        require_batches(data)
    return need


def inputs_of(
    model: nn.Module,
    plan: Mapping[str, tuple[type[LowRankLinear], Mapping[str, Any]]],
    need: str | None,
    data: Any,
    forward_fn: Callable[[nn.Module, Any], Any] | None,
    progress: bool,
) -> Mapping[str, Inputs]:
    """Knowledge that is `needed` of the inputs of the layers of a plan, by name."""
    if need is None:
        return {}
    if need == "original":
        return Originals(model, plan, data)
    gatherers: dict[str, Gatherer] = {}
    for name, (cls, given) in plan.items():
        rank = max(int(given.get(key, default)) for key, default in cls.row.ranks.items())
        gatherers[name] = Covariance() if need == "covariance" else Directions(rank)
    return calibrate(model, gatherers, data, forward_fn=forward_fn, progress=progress)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    gatherers: Mapping[str, Gatherer],
    data: Iterable[Any],
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
) -> dict[str, Inputs]:
    """Knowledge of the inputs of layers, by name, after all of `data` went through the model.

    Rows that an `attention_mask` of a batch masks out are not counted, nor those whose `labels` are
    -100 where these have the mask's shape, in inputs that have a row for each of its elements;
    others, as of pooled sequences, are counted whole. The model is as it was, also after an error:
    hooks, modes, adapters, torch's generators. Each process takes the batches that it is given: in
    a distributed run give all of them the same.

    Args:
        model: any model; adapters that are in it are disabled meanwhile.
        gatherers: `Directions` or `Covariance` for each layer, by the layer's name in the model.
        data: the batches, gone through once. Their tensors are moved to the model's device, if it
            is on one.
        forward_fn: calls the model with a batch. None: model(**batch) with a mapping,
            model(*batch) with a tuple or list, model(batch) with anything else.
        progress: show a progress bar on stderr.

    Raises:
        TypeError: data that is no iterable of batches; a batch that the model does not take.
        ValueError: no batches, or none with rows that count; a layer that was never called; an
            input with NaN or Inf.
    """
    require_batches(data)
    batch_mask: list[Tensor | None] = [None]

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, keywords: Any) -> None:
            x = args[0] if args else keywords.get("input")
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} is called with a {type(x).__name__}: not with a tensor")
            if not x.isfinite().all():
                raise ValueError(f"the input of {name} holds NaN or Inf: give other batches")
            kept = batch_mask[0]
            if kept is not None and kept.numel() != x.shape[:-1].numel():
                kept = None
            called.add(name)
            gatherers[name].add(x.detach(), None if kept is None else kept.to(x.device))

        return hook

    called: set[str] = set()
    device, batches = device_of(model), 0
    with as_it_was(model), ExitStack() as hooks:
        for name in gatherers:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in tqdm(data, "calibration", disable=not progress, unit="batch"):
            batches += 1
            batch_mask[0] = mask_of(batch)
            forward(model, batch if device is None else moved(batch, device), forward_fn)
    if not batches:
        raise ValueError(f"data has no batches, or was gone through before: {HOW}")
    if silent := [name for name in gatherers if name not in called]:
        raise ValueError(
            f"{', '.join(silent)} was not called by the model with any batch, so nothing is known "
            "of its inputs: give batches that reach it, or leave it out by exclude_modules"
        )
    found = {}
    for name, gatherer in gatherers.items():
        if not getattr(gatherer, "seen", 1):
            raise ValueError(f"no row of {name}'s inputs counts: all were masked out, or zero")
        found[name] = gatherer.known()
    return found


def require_batches(data: Any) -> None:
    """Raise TypeError unless data looks like an iterable of batches."""
    if isinstance(data, str | bytes | Tensor | Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"data is a {type(data).__name__}: {HOW}; of one batch, give [batch]")


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in eval mode and its adapters are disabled; afterwards modes
    and torch's generators are what they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)), disabled(layers):
        try:
            model.eval()
            for module in model.modules():
                if from_bitsandbytes(
                    module, "Linear4bit"
                ):  # which packs its weight for good in eval
                    module.training = True
            yield
        finally:
            for module, training in modes:
                module.training = training


def forward(model: nn.Module, batch: Any, forward_fn: Callable[..., Any] | None) -> None:
    """Call the model with a batch."""
    if forward_fn is not None:
        forward_fn(model, batch)
        return
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, tuple | list):
            model(*batch)
        else:
            model(batch)
    except TypeError as error:
        raise TypeError(
            f"the model does not take a batch of data as it is ({error}): give "
            "forward_fn=lambda model, batch: …, which calls it"
        ) from error


def mask_of(batch: Any) -> Tensor | None:
    """True for each element of a batch that counts, or None: all do."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels, ids = (batch.get(key) for key in ("attention_mask", "labels", "input_ids"))
    like = ids if mask is None else mask
    if not isinstance(like, Tensor):
        return None
    counts = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
    if isinstance(labels, Tensor) and labels.shape == like.shape:
        counts = counts & (labels != IGNORED).to(like.device)
    return counts


def device_of(model: nn.Module) -> torch.device | None:
    """The one device of a model, or None where parameters are on several, or brought by hooks."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 and torch.device("meta") not in devices else None


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [moved(value, device) for value in batch]
    return batch
