"""LoRA-XS and LoRA-Mini in PEFT: mixed batches and mixtures of adapters."""

import copy
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from peft_cases import (
    CLOSE,
    config,
    every_method,
    inputs,
    layers,
    methods,
    mlp,
    peft,
)
from recycler import Recycler
from torch.utils._python_dispatch import TorchDispatchMode


@every_method
def test_mixed_batch(method: str) -> None:
    """Each row as its adapter alone computes it, gradients of x and cores too; ranks may differ."""
    model = peft.get_peft_model(mlp(), config(method))
    model.add_adapter("two", config(method, r=3, lora_alpha=1))
    model.add_adapter("one_layer", config(method, target_modules=["lin1"]))
    model.eval()
    names = ["two", "__base__", "default", "one_layer", "two", "default"]
    x = inputs().requires_grad_()
    two = [p for n, p in model.named_parameters() if ".two" in n and "basis" not in n]
    cores = [p.requires_grad_() for p in two]
    mixed = model(x, adapter_names=names)
    got = torch.autograd.grad(mixed.square().sum(), [x, *cores])
    alone = []
    for i, name in enumerate(names):
        row = x[i : i + 1]
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model(row))
        else:
            model.set_adapter(name)
            alone.append(model(row))
    for core in cores:
        core.requires_grad_()
    model.set_adapter("two")
    torch.testing.assert_close(mixed, torch.cat(alone), **CLOSE)
    wanted = torch.autograd.grad(torch.cat(alone).square().sum(), [x])
    torch.testing.assert_close(got[0], wanted[0], **CLOSE)
    twos = model(x[[0, 4]]).square().sum()
    for ours, theirs in zip(got[1:], torch.autograd.grad(twos, cores), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@every_method
def test_mixed_batch_of_sequences(method: str) -> None:
    """Whole sequences go to their adapters."""
    model = peft.get_peft_model(mlp(), config(method))
    model.add_adapter("two", config(method))
    model.eval()
    x, names = inputs(24).view(4, 6, 12), ["two", "default", "__base__", "two"]
    mixed = model(x, adapter_names=names)
    for i, name in ((0, "two"), (1, "default"), (3, "two")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[i], model(x[i]), **CLOSE)


class Ops(TorchDispatchMode):
    """Counts what is run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


@methods
def test_a_mixed_batch_is_one_pass(method: str) -> None:
    """As much is run for twelve adapters as for two, once their cores have been put together."""
    model = peft.get_peft_model(mlp(), config(method)).eval()
    for i in range(11):
        model.add_adapter(f"a{i}", config(method))
    counts = []
    for names in (["default", "a0"] * 6, ["default", *(f"a{i}" for i in range(11))]):
        for _ in range(2):
            with Ops() as ops, torch.no_grad():
                model(inputs(12), adapter_names=names)
        counts.append(ops.count)
    assert counts[0] == counts[1]
    assert not any("stack" in name or "pad" in name for name in counts[0])


@methods
def test_cores_of_a_mixed_batch_are_the_present_ones(method: str) -> None:
    """Whatever was put together before: written to, replaced, moved, scaled, copied."""
    model = peft.get_peft_model(mlp(), config(method)).eval()
    model.add_adapter("two", config(method))
    x, names = inputs(), ["two", "default"] * 3
    layer = model.base_model.model.lin0

    def check(model: Any = model, x: Any = x) -> torch.Tensor:
        with torch.no_grad():
            y = model(x, adapter_names=names)
            for i, name in enumerate(("two", "default")):
                model.set_adapter(name)
                torch.testing.assert_close(y[i::2], model(x)[i::2])
        return y

    with torch.no_grad():  # in float32 first: from here on all is compared in float64
        outputs = [model.float()(x.float(), adapter_names=names).double()]
    model.double()
    outputs.append(check())
    with torch.no_grad():
        getattr(layer, layer.adapter_layer_names[0])["two"].mul_(2)
    outputs.append(check())
    layer.scaling["two"] = 5.0
    outputs.append(check())
    model.delete_adapter("two")
    model.add_adapter("two", config(method))
    outputs.append(check())
    copied = copy.deepcopy(model)
    assert copied.base_model.model.lin0._kept is None
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if ".two" in name:
                parameter.add_(1)
    outputs.append(check(copied))
    check()
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))


@methods
def test_gradients_of_a_mixed_batch_after_one_without(method: str) -> None:
    """What was put together without gradients, or in inference mode, takes none away."""
    model = peft.get_peft_model(mlp(), config(method)).eval()
    names = ["default", "__base__"] * 3
    with torch.inference_mode():
        model(inputs(), adapter_names=names)
    model.base_model.model.lin0.requires_grad_(False)
    x = inputs().requires_grad_()
    model(x, adapter_names=names).sum().backward()
    assert x.grad.abs().max() > 0
    for name, parameter in model.named_parameters():
        wanted = "lin1" in name and ".default" in name
        assert (parameter.grad is not None) == wanted, name


def test_mixed_batch_errors() -> None:
    """In training, of a wrong length, of unknown names, merged, no list."""
    model = peft.get_peft_model(mlp(), config("lora_xs"))
    x = inputs()
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=["default"] * 6)
    model.eval()
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody; there are default"):
        model(x, adapter_names=["nobody"] * 6)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=["default"] * 4)
    with pytest.raises(TypeError, match="must be a list"):
        model(x, adapter_names="default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=["default"] * 6)


def test_names_of_a_mixed_batch() -> None:
    """None is told from PEFT's name for no adapter; an empty batch has no names."""
    model = peft.get_peft_model(mlp(), config("lora_xs")).eval()
    with pytest.raises(ValueError, match="None: '__base__' is the name of no adapter"):
        model(inputs(2), adapter_names=["default", None])
    assert model(inputs(0), adapter_names=[]).shape[0] == 0
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(inputs(2), adapter_names=[])


def test_modules_trained_whole_in_a_mixed_batch() -> None:
    """Each sequence has its own copy, and a doubled batch is an error."""
    model = peft.get_peft_model(mlp(), config("lora_xs", modules_to_save=["head"]))
    model.add_adapter("two", config("lora_xs", modules_to_save=["head"]))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["two"].weight.add_(1)
    model.eval()
    x, names = inputs(4), ["two", "default"] * 2
    mixed = model(x, adapter_names=names)
    for i, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[i], model(x)[i], **CLOSE)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=["two", "default"])


@methods
def test_weighted_adapter_is_exact(method: str) -> None:
    """Σ wᵢ·ΔWᵢ in fp64, of other ranks, scalings and targets; three of LoRA-Mini exceed a and b."""
    model = peft.get_peft_model(mlp(), config(method, lora_alpha=3))
    model.add_adapter("two", config(method, r=3, use_rslora=True))
    model.add_adapter("three", config(method, target_modules=["lin1"], rank_pattern={"lin1": 1}))
    weights = {"default": 0.7, "two": -1.3, "three": 2.0}
    for chosen in (["default", "two"], ["two", "three"], ["default", "two", "three"], ["three"]):
        name = "_".join(["sum", *chosen])
        model.base_model.add_weighted_adapter(chosen, [weights[n] for n in chosen], name)
        for key, layer in layers(model).items():
            own = [n for n in chosen if n in layer.scaling]
            assert (name in layer.scaling) == bool(own), key
            if own:
                wanted = sum(weights[n] * layer.get_delta_weight(n) for n in own)
                torch.testing.assert_close(layer.get_delta_weight(name), wanted, **CLOSE)
                assert layer.scaling[name] == 1.0
    assert not any(p.requires_grad for n, p in model.named_parameters() if "_three" in n)


@methods
def test_weighted_adapter_of_unlike_configurations(method: str) -> None:
    """What leaves modules out, or scales some otherwise, does not do so with the mixture."""
    first = {"exclude_modules": ["lin1"], "alpha_pattern": {"lin0": 7}, "use_rslora": True}
    model = peft.get_peft_model(mlp(torch.bfloat16), config(method, **first))
    model.add_adapter("two", config(method, target_modules=["lin1"]))
    model.base_model.add_weighted_adapter(["default", "two"], [1.0, 3.0], "sum")
    for name, source, weight in (("lin0", "default", 1.0), ("lin1", "two", 3.0)):
        layer = getattr(model.base_model.model, name)
        wanted = weight * layer.get_delta_weight(source)
        torch.testing.assert_close(layer.get_delta_weight("sum"), wanted, rtol=1e-5, atol=1e-6)
        assert getattr(layer, layer.adapter_layer_names[0])["sum"].dtype == torch.float32


def test_weighted_adapter_errors() -> None:
    """Unknown, taken and unequal names; what is not linear; what has no sum."""
    model = peft.get_peft_model(mlp(), config("lora_xs", bias="lora_only"))
    model.add_adapter("two", config("lora_xs"))
    model.add_adapter("three", config("lora_xs", modules_to_save=["head"]))
    add = model.base_model.add_weighted_adapter
    for arguments, message in (
        ((["two", "nobody"], [1, 1], "new"), "nobody does not exist"),
        ((["two"], [1], "three"), "exists already"),
        ((["two"], [1, 2], "new"), "1 adapters and 2 weights"),
        (([], [], "new"), "0 adapters"),
        ((["two"], [1], "new", "svd"), "'svd'.*must be 'linear'"),
        ((["two", "default"], [1, 1], "new"), "default has biases"),
        ((["three"], [1], "new"), "three has biases or modules_to_save"),
    ):
        with pytest.raises(ValueError, match=message):
            add(*arguments)
    assert list(model.peft_config) == ["default", "two", "three"]


@methods
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_through_the_kernels(
    method: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in the first part of longer bases, and mixed: strided factors and weights included."""
    from fused_lowrank.integrations.peft.layer import base, cores

    larger = {"r": 2, "a": 9, "b": 7} if method == "lora_mini" else {"r": 9}
    targets = {"target_modules": ["lin0", "conv"], "fan_in_fan_out": True}
    dtype = torch.float64 if device.type == "cpu" else torch.float32  # the interpreter takes it
    model = peft.get_peft_model(mlp(dtype), config(method, **targets))
    model.add_adapter("large", config(method, **targets, **larger))
    model.to(device).eval()
    names = ["default", "large", "__base__"] * 2

    def step(adapter: str | None) -> list[torch.Tensor]:
        x = torch.linspace(-1, 1, 72, device=device, dtype=dtype).view(6, 12).requires_grad_()
        model.zero_grad()
        if adapter is None:
            y = model(x, adapter_names=names)
        else:
            model.set_adapter(adapter)
            y = model(x)
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    ways = ("default", "large", None)
    wanted = [step(adapter) for adapter in ways]
    alone, by_rows, calls = base.lowrank_linear, cores.compute, []

    def through(*operands: Any, **settings: Any) -> torch.Tensor:
        calls.append("alone")
        return alone(*operands, **settings, impl="triton")

    def through_rows(*operands: Any) -> torch.Tensor:
        calls.append("rows")
        return by_rows(*operands[:-1], "triton")

    monkeypatch.setattr(base, "lowrank_linear", through)
    monkeypatch.setattr(cores, "compute", through_rows)
    for adapter, expected in zip(ways, wanted, strict=True):
        close = CLOSE if dtype == torch.float64 else {}
        torch.testing.assert_close(step(adapter), expected, **close)
    assert calls == ["alone"] * 4 + ["rows"] * 2


@methods
def test_cores_that_lie_where_old_ones_lay(method: str) -> None:
    """Values given by `.data`, which PyTorch does not count, twice between two calls."""
    model = peft.get_peft_model(mlp(), config(method)).eval()
    x, names, recycled = inputs(), ["default"] * 6, Recycler()
    layer = model.base_model.model.lin0
    core = getattr(layer, layer.adapter_layer_names[0])["default"]
    core.data = recycled(core.data)
    with torch.no_grad():
        model(x, adapter_names=names)
        core.data = recycled(core.data)
        core.data = recycled(2 * core.data)
        torch.testing.assert_close(model(x, adapter_names=names), model(x), **CLOSE)
