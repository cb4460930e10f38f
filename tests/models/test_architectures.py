"""Whole transformers, adapted: the loss and what is trained of them, in every way they are run.

The truth is the same model in float64, and the measure the error of the plain reference layers in
the same dtype, as for single layers. The floor is of the absolute values of what a layer is given
in that model: roundings within the layer are relative to these, however much a gradient's terms
cancel. What comes from elsewhere in the model is the same for the reference layers.
"""

import copy
import functools
import math
import re
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from architectures import NAMES, batch, targets, tiny
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

from fused_lowrank import adapt
from fused_lowrank.compute import choose
from fused_lowrank.methods import METHODS, LowRankLinear
from fused_lowrank.models.adapt import adapted_layers
from fused_lowrank.testing import Measured, Results, check_mean, pooled_ratio

peft = pytest.importorskip("peft")
integration = pytest.importorskip("fused_lowrank.integrations.peft", exc_type=ImportError)

SEQUENCES, LENGTHS = 4, (12, 12, 12)
SETTINGS: dict[str, dict[str, Any]] = {  # every trained tensor large enough to be pooled
    "lora_xs": {"r": 16},
    "lora_mini": {"r": 16, "a": 16, "b": 16},
}
ONE = {"num_hidden_layers": 1}  # layer, where it takes long
SMALLER = {"t5": {"num_layers": 1}}  # which are two, and three attentions
Way = Callable[[nn.Module, str, bool], nn.Module]  # (model, architecture, fused or plain) → adapted


def native(method: str) -> Way:
    """By `adapt`."""

    def way(model: nn.Module, name: str, fused: bool) -> nn.Module:
        settings = {"fused": fused, "progress": False, **SETTINGS[method]}
        return adapt(model, method, target_modules=targets(name), **settings)

    return way


def mixed(model: nn.Module, name: str, fused: bool) -> nn.Module:
    """LoRA-Mini and LoRA-XS in turn, so that one compilation tells of both."""
    native("lora_xs")(model, name, fused)
    for path, layer in list(adapted_layers(model))[::2]:
        mini = METHODS["lora_mini"][fused]
        model.set_submodule(path, mini.from_linear(layer.to_linear(), **SETTINGS["lora_mini"]))
    return model


def in_peft(config: type[peft.PeftConfig]) -> Way:
    """By PEFT; plain it is the reference layers with the same frozen factors."""

    def way(model: nn.Module, name: str, fused: bool) -> nn.Module:
        base, method = copy.deepcopy(model), config.method
        settings = {"target_modules": targets(name), **SETTINGS[method]}
        model = peft.get_peft_model(model, config(**settings))
        if fused:
            return model
        layers = [module for module in model.modules() if hasattr(module, "basis_down")]
        plain = native(method)(base, name, False)
        for layer, (_, reference) in zip(layers, adapted_layers(plain), strict=True):
            for factor, value in zip(
                ("down", "up"), layer.bases(*layer.sides["default"]), strict=True
            ):
                getattr(reference, factor).data.copy_(value)
        return plain

    return way


def fast_path(model: nn.Module, name: str, fused: bool) -> nn.Module:
    """PEFT's own LoRA, through the kernels or as it is."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=targets(name)))
    return integration.fuse_lora(model) if fused else model


WAYS: dict[str, Way] = {
    "lora_xs": native("lora_xs"),
    "lora_mini": native("lora_mini"),
    "peft lora_xs": in_peft(integration.LoraXSConfig),
    "peft lora_mini": in_peft(integration.LoraMiniConfig),
    "peft lora": fast_path,
}


Dtypes = tuple[torch.dtype, torch.dtype | None]  # when adapted, and what it is converted to then
FLOAT32: Dtypes = (torch.float32, None)


def adapted(way: Way, name: str, fused: bool, dtypes: Dtypes, **config: Any) -> nn.Module:
    """The same values each time, with ΔW about as large as W."""
    torch.manual_seed(1)
    model = way(tiny(name, **config).to(dtypes[0]), name, fused)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtypes[1]) if dtypes[1] else model


# --- loss and gradients ---


class Mode(NamedTuple):
    """How a model is run."""

    dtypes: Dtypes = FLOAT32
    autocast: torch.dtype | None = None
    reentrant: bool | None = None  # the kind of checkpointing, or none
    small: bool = True  # the way of small inputs, which differs on a CPU


MODES = {
    "eager": Mode(),
    "checkpointed": Mode(reentrant=False, small=False),
    "checkpointed, reentrant": Mode(reentrant=True, small=False),
    "bfloat16": Mode((torch.bfloat16, None)),
    "half()": Mode((torch.float32, torch.float16)),
    "autocast bfloat16": Mode(autocast=torch.bfloat16),
    "autocast float16": Mode(autocast=torch.float16),
    "autocast bfloat16, checkpointed": Mode(autocast=torch.bfloat16, reentrant=False),
}


class InFloat64(TorchFunctionMode):
    """What a model computes in float32 whatever its dtype is computed in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


def batches(
    name: str, device: torch.device, lengths: tuple[int, ...] = LENGTHS
) -> Iterator[dict[str, Tensor]]:
    """One of each length, the same ones each time."""
    torch.manual_seed(2)
    for length in lengths:
        yield {k: v.to(device) for k, v in batch(name, length, SEQUENCES).items()}


def learned(model: nn.Module, inputs: dict[str, Tensor], mode: Mode = MODES["eager"]) -> Results:
    """The loss and the gradients of all that is trained."""
    model.zero_grad()
    kind = inputs["input_ids"].device.type
    scaler = torch.amp.GradScaler(kind, 2.0**10, enabled=mode.autocast == torch.float16)
    with torch.autocast(kind, mode.autocast, enabled=mode.autocast is not None):
        loss = model(**inputs).loss
    scaler.scale(loss).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if scaler.is_enabled():
        scaler.unscale_(torch.optim.SGD(trained.values()))
    return {"loss": loss.detach(), **{plain_name(n): p.grad for n, p in trained.items()}}


def plain_name(name: str) -> str:
    """A parameter's name without what PEFT adds to it."""
    return re.sub(r"^base_model\.model\.|(lora_xs|lora_mini)_|\.default", "", name)


def checkpoint(model: nn.Module, reentrant: bool) -> nn.Module:
    """As the Trainer does it."""
    model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has another name since transformers 5
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model


def in_mode(model: nn.Module, mode: Mode) -> nn.Module:
    """A copy."""
    model = copy.deepcopy(model)
    return model if mode.reentrant is None else checkpoint(model, mode.reentrant)


class Truth(NamedTuple):
    """The results in float64, and how much rounding can matter to each."""

    results: Results
    sizes: Results


class Trio(NamedTuple):
    """The fused model, that of the reference layers, and for each batch the truth."""

    ours: nn.Module
    plain: nn.Module
    truth: list[Truth]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter, ours or PEFT's."""
    kinds = LowRankLinear, peft.tuners.lora.Linear
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def true(model: nn.Module, absolute: nn.Module, inputs: dict[str, Tensor]) -> Truth:
    """Of a float64 model; the sizes of a layer's gradients are its formula on absolute values: of
    x, dy and all factors. That of the loss, a mean of log Σ exp(logits) - logit, is its two terms.

    `absolute` is a copy of the model with the absolute values of all parameters.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any, y: Tensor) -> None:
            y.register_hook(lambda dy: calls.append((name, args[0].detach().abs(), dy.abs())))

        return layer.register_forward_hook(hook)

    handles = [watch(name, layer) for name, layer in layers_of(model).items()]
    logits: list[Tensor] = []
    handles.append(model.register_forward_hook(lambda *args: logits.append(args[2].logits)))
    results = learned(model, inputs)
    for handle in handles:
        handle.remove()
    sizes = {"loss": results["loss"] + 2 * logits[0].detach().abs().amax(-1).mean()}
    layers = layers_of(absolute)
    for name, x, dy in calls:
        trained = {n: p for n, p in layers[name].named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(layers[name](x), list(trained.values()), dy)
        for key, size in zip(trained, gradients, strict=True):
            key = plain_name(f"{name}.{key}")
            sizes[key] = sizes.get(key, 0) + size
    return Truth(results, sizes)


@functools.cache
def trio(
    way: Way,
    name: str,
    dtypes: Dtypes,
    device: torch.device,
    lengths: tuple[int, ...] = LENGTHS,
    **config: Any,
) -> Trio:
    """Those of a way to adapt an architecture."""
    ours, plain = (
        adapted(way, name, fused, dtypes, **config).to(device) for fused in (True, False)
    )
    wide = copy.deepcopy(plain).double()
    absolute = copy.deepcopy(wide)
    for parameter in absolute.parameters():
        parameter.data.abs_()
    with InFloat64():
        truth = [true(wide, absolute, inputs) for inputs in batches(name, device, lengths)]
    return Trio(ours, plain, truth)


def measure(ours: Results, plain: Results, truth: Truth, unit: float) -> list[Measured]:
    """The errors beside the reference's."""
    return [
        Measured(
            name,
            tensor.numel(),
            float((tensor.double() - truth.results[name]).norm()),
            float((plain[name].double() - truth.results[name]).norm()),
            float(2 * unit * truth.sizes[name].norm()),
        )
        for name, tensor in ours.items()
    ]


def check_each(runs: list[list[Measured]], where: str) -> None:
    """The error of each tensor, in all runs together, is within the budget."""
    for same in zip(*runs, strict=True):
        sums = {
            part: math.hypot(*(getattr(measured, part) for measured in same))
            for part in ("error", "reference", "floor")
        }
        together = Measured(same[0].name, same[0].size, **sums)
        assert together.within, (where, together)


def check_pooled(runs: list[list[Measured]]) -> None:
    """A run's pooled ratio is 1 or less on the average: what surrounds the layers rounds too."""
    check_mean([math.log(pooled_ratio(run)) for run in runs])


@pytest.mark.parametrize("way", WAYS)
def test_budget(way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error budget, over four architectures and all modes; pooled over all of them at once.

    Modes that differ in checkpointing alone round alike: of a batch they are one number together.
    """
    small, logs = choose.SMALL, defaultdict(list)
    for mode, how in MODES.items():
        monkeypatch.setattr(choose, "SMALL", small if how.small else 0)
        unit = torch.finfo(how.autocast or how.dtypes[1] or how.dtypes[0]).eps / 2
        for name in NAMES:
            models = trio(WAYS[way], name, how.dtypes, device, **SMALLER.get(name, {}))
            ours, plain = (in_mode(model, how) for model in models[:2])
            new = []
            for inputs, truth in zip(batches(name, device), models.truth, strict=True):
                results = (learned(model, inputs, how) for model in (ours, plain))
                new.append(measure(*results, truth, unit))
            check_each(new, f"{mode}, {name}")
            for i, run in enumerate(new):
                logs[how.dtypes, how.autocast, name, i].append(math.log(pooled_ratio(run)))
    check_mean([statistics.mean(alike) for alike in logs.values()])


def test_checkpointing_recomputes(device: torch.device) -> None:
    """A layer inside a checkpoint of either kind is called once more, in the backward."""
    model = trio(WAYS["lora_xs"], "llama", FLOAT32, device).ours
    inputs = next(batches("llama", device))
    for reentrant, expected in ((None, 1), (False, 2), (True, 2)):
        changed = in_mode(model, Mode(reentrant=reentrant))
        calls: list[nn.Module] = []
        layers = [layer for _, layer in adapted_layers(changed)]
        for layer in layers:
            layer.register_forward_pre_hook(lambda module, _, calls=calls: calls.append(module))
        learned(changed, inputs)
        assert [calls.count(layer) for layer in layers] == [expected] * len(layers)


# --- compiled ---

SEVEN = (12, 9, 15, 7, 21, 16, 5) * 2  # lengths, in as many runs as a mean needs
ROWS = [  # those that trace the backward too are slow
    *(("mixed", name, "eager", SEVEN) for name in ("qwen3", "roberta", "t5")),
    ("mixed", "llama", "aot_eager", SEVEN),
    ("mixed", "roberta", "inductor", (12,) * 8),
    ("peft lora_xs", "llama", "eager", SEVEN),
    *(("peft lora", name, "eager", SEVEN) for name in NAMES),
]


@pytest.mark.parametrize(("way", "name", "backend", "lengths"), ROWS)
def test_compiled(
    way: str, name: str, backend: str, lengths: tuple[int, ...], device: torch.device
) -> None:
    """The error budget, in one graph, which is compiled once more for other lengths and no more."""
    torch._dynamo.reset()
    ours, plain, truths = trio(
        WAYS.get(way, mixed), name, FLOAT32, device, lengths, **SMALLER.get(name, ONE)
    )
    counter = CompileCounterWithBackend(backend)
    ours.compile(fullgraph=True, backend=counter)
    runs = []
    for inputs, truth in zip(batches(name, device, lengths), truths, strict=True):
        results = learned(ours, inputs), learned(plain, inputs)
        runs.append(measure(*results, truth, 2**-24))
    assert counter.frame_count == min(2, len(set(lengths)))
    check_each(runs, f"{way}, {name}, {backend}")
    check_pooled(runs)


def test_compiled_and_checkpointed(device: torch.device) -> None:
    """Checkpointing, of the kind that is not reentrant, compiles in one graph."""
    torch._dynamo.reset()
    model = adapted(mixed, "llama", True, (torch.float64, None), **ONE).to(device)
    inputs = next(batches("llama", device))
    expected = learned(model, inputs)
    checkpoint(model, reentrant=False).disable_input_require_grads()  # its hook breaks the graph
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(learned(model, inputs), expected)
    assert counter.frame_count == 1
    assert "tag_activation_checkpoint" in str(counter.graphs[0].graph)
