"""LoRA-XS and LoRA-Mini as methods of PEFT: what is computed, what is trained, what is shared."""

import copy
import io
import itertools
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from peft_cases import CONFIGS, SETTINGS, by_hand, config, inputs, methods, mlp, peft, same, state
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lowrank.integrations.peft import LoraXSConfig, registry

close = {"rtol": 1e-10, "atol": 1e-10}


def layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by name."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "basis_down")}


def train(model: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    """Some steps of AdamW on whatever requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# --- what is computed ---


@methods
def test_the_equation(method: str) -> None:
    """Every kind of layer against the formula, with patterns for rank and alpha, in fp64."""
    given = config(
        method,
        target_modules=["lin0", "lin1", "conv"],
        lora_alpha=6,
        fan_in_fan_out=True,
        rank_pattern={"lin1": 3},
        alpha_pattern={"conv": 10},
    )
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = peft.get_peft_model(mlp(), given)
    found = layers(model)
    assert len(found) == 3
    r = SETTINGS[method]["r"]
    scalings = {name.rpartition(".")[2]: layer.scaling["default"] for name, layer in found.items()}
    assert scalings == {"lin0": 6 / r, "lin1": 2.0, "conv": 10 / r}
    for layer in found.values():
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(x), by_hand(layer, "default", x), **close)
        assert not torch.allclose(layer(x), layer.base_layer(x))


@methods
def test_it_runs_through_lowrank_linear(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of it a layer, which keeps nothing of the size of x for the backward."""
    from fused_lowrank.integrations.peft import layer as module

    model = peft.get_peft_model(mlp(), config(method)).train()
    calls, real = [], module.lowrank_linear
    monkeypatch.setattr(
        module, "lowrank_linear", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k)
    )
    layer, kept = next(iter(layers(model).values())), []
    x = inputs(50)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = layer(x)
    assert calls == [x.shape]
    assert y.requires_grad
    assert not {(50, 12), (50, 16)} & {tuple(shape) for shape in kept}


@methods
def test_bases_are_those_of_the_method(method: str) -> None:
    """LoRA-XS: Σ·Dᵀ and S; LoRA-Mini: within Kaiming's bounds, others by module and by seed."""
    model = peft.get_peft_model(mlp(), config(method))
    layer = model.base_model.model.lin0
    if method == "lora_xs":
        left, sigma, right = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
        outer = layer.basis_up @ layer.basis_down
        torch.testing.assert_close(outer, left[:, :4] * sigma[:4] @ right[:4], **close)
        torch.testing.assert_close(layer.basis_down @ layer.basis_down.t(), (sigma[:4] ** 2).diag())
        return
    assert layer.basis_down.abs().max() <= 12**-0.5
    assert layer.basis_down.abs().max() > 0.8 * 12**-0.5
    assert layer.basis_up.abs().max() <= 4**-0.5
    assert layer.basis_up.abs().max() > 0.8 * 4**-0.5
    draws = {
        name: factor.flatten()[:40] * 4**0.5 * (3**0.5 if name.startswith("down") else 1)
        for name, factor in {
            "down": layer.basis_down,
            "up": layer.basis_up.t(),
            "up of another": model.base_model.model.lin1.basis_up.t(),
        }.items()
    }
    for name, draw in draws.items():
        assert not any(torch.allclose(draw, d) for n, d in draws.items() if n != name)
    other = peft.get_peft_model(mlp(), config(method, projection_seed=1)).base_model.model.lin0
    assert not torch.allclose(other.basis_down, layer.basis_down)
    again = peft.get_peft_model(mlp(), config(method)).base_model.model.lin0
    assert torch.equal(again.basis_down, layer.basis_down)
    assert torch.equal(again.basis_up, layer.basis_up)


@methods
@pytest.mark.parametrize("init", [True, "identity", "paper", False])
def test_how_it_starts(method: str, init: Any) -> None:
    """As the base model or not; and whatever it is, the gradients are not all zero."""
    base, x = mlp(), inputs()
    y = base(x)
    model = peft.get_peft_model(base, config(method, init_weights=init))
    starts = model(x)
    assert torch.equal(starts, y) == (init in (True, "identity"))
    if method == "lora_xs" and init == "paper":
        torch.testing.assert_close(starts, y, rtol=1e-3, atol=1e-3)
    starts.square().sum().backward()
    assert any(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@methods
def test_dropout_and_rslora(method: str) -> None:
    """rsLoRA divides by √r; dropout drops in training alone, and what it keeps is scaled up."""
    given = config(method, lora_dropout=0.5, use_rslora=True, lora_alpha=3)
    model = peft.get_peft_model(mlp(), given)
    layer = model.base_model.model.lin0
    assert layer.scaling["default"] == 3 / SETTINGS[method]["r"] ** 0.5
    x = inputs()
    model.train()
    assert not torch.equal(layer(x), layer(x))
    y = layer.base_layer(x)
    mean = torch.stack([layer(x) - y for _ in range(3000)]).mean(0)
    model.eval()
    wanted = layer(x) - y
    assert (mean - wanted).norm() < 0.1 * wanted.norm()


# --- several adapters ---


@methods
def test_several_adapters(method: str) -> None:
    """Each alone, their sum when both are active, none when disabled; deleting leaves others."""
    base, x = mlp(), inputs()
    y = base(x)
    model = peft.get_peft_model(base, config(method))
    model.add_adapter("two", config(method, r=3, lora_alpha=5))
    model.eval()
    layer = model.base_model.model.lin0
    out = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        out[name] = model(x)
        torch.testing.assert_close(layer(x), by_hand(layer, name, x), **close)
    assert not torch.allclose(out["default"], out["two"])
    model.base_model.set_adapter(["default", "two"])
    both = by_hand(layer, "default", x) + by_hand(layer, "two", x) - layer.base_layer(x)
    torch.testing.assert_close(layer(x), both, **close)
    with model.disable_adapter():
        assert torch.equal(model(x), y)
    model.set_adapter("default")
    model.delete_adapter("two")
    assert torch.equal(model(x), out["default"])
    assert not any(".two" in name for name in model.state_dict())


@methods
def test_several_active_with_dropout(method: str) -> None:
    """Each adapter drops by its own probability: one without any is exact."""
    model = peft.get_peft_model(mlp(), config(method))
    model.add_adapter("two", config(method, lora_dropout=0.5))
    model.base_model.set_adapter(["default", "two"])
    layer, x = model.base_model.model.lin0, inputs()
    model.train()
    base = layer.base_layer(x)
    one, two = (by_hand(layer, name, x) - base for name in ("default", "two"))
    mean = torch.stack([layer(x) - base for _ in range(3000)]).mean(0)
    assert (mean - one - two).norm() < 0.1 * two.norm()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        getattr(layer, layer.adapter_layer_names[0])["two"].zero_()
    torch.testing.assert_close(layer(x), base + one, **close)


@methods
def test_mixed_batch(method: str) -> None:
    """Each row as its adapter alone computes it, gradients of x and cores too; ranks may differ."""
    model = peft.get_peft_model(mlp(), config(method))
    model.add_adapter("two", config(method, r=3, lora_alpha=1))
    model.add_adapter("one_layer", config(method, target_modules=["lin1"]))
    model.eval()
    names = ["two", "__base__", "default", "one_layer", "two", "default"]
    x = inputs().requires_grad_()
    cores = [p.requires_grad_() for n, p in model.named_parameters() if ".two" in n]
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
    torch.testing.assert_close(mixed, torch.cat(alone), **close)
    wanted = torch.autograd.grad(torch.cat(alone).square().sum(), [x])
    torch.testing.assert_close(got[0], wanted[0], **close)
    twos = model(x[[0, 4]]).square().sum()
    for ours, theirs in zip(got[1:], torch.autograd.grad(twos, cores), strict=True):
        torch.testing.assert_close(ours, theirs, **close)


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

    outputs = [check()]
    with torch.no_grad():
        getattr(layer, layer.adapter_layer_names[0])["two"].mul_(2)
    outputs.append(check())
    layer.scaling["two"] = 5.0
    outputs.append(check())
    model.delete_adapter("two")
    model.add_adapter("two", config(method))
    outputs.append(check())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if ".two" in name:
                parameter.add_(1)
    outputs.append(check(copied))
    check()
    outputs.append(check(model.float(), x.float()).double())
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
                torch.testing.assert_close(layer.get_delta_weight(name), wanted, **close)
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


# --- bases: never trained, never duplicated ---


@methods
def test_bases_are_never_trained(method: str) -> None:
    """Through everything that sets requires_grad, and through training, in an optimiser's state."""
    model = peft.get_peft_model(mlp(), config(method, bias="all"))
    layer = model.base_model.model.lin0
    bases = {n: p for n, p in model.named_parameters() if "basis_" in n}
    assert len(bases) == 4
    before = {name: p.detach().clone() for name, p in bases.items()}
    model.add_adapter("two", config(method))
    model.set_adapter("two")
    model.base_model.set_adapter(["default", "two"])
    model.set_requires_grad(["default", "two"])
    with model.disable_adapter():
        pass
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    model.unmerge_adapter()
    optimizer = train(model)
    for name, base in bases.items():
        assert not base.requires_grad
        assert base.grad is None
        assert torch.equal(base, before[name])
        assert base not in optimizer.state
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p in optimizer.state}
    factors = {
        f"base_model.model.{lin}.{factor}"
        for lin in ("lin0", "lin1")
        for factor in layer.adapter_layer_names
    }
    assert factors <= trained
    assert not any("basis" in name or "weight" in name for name in trained)


@methods
def test_bases_are_one_pair(method: str) -> None:
    """Whatever adapters come: the same storage, or a longer one that begins with the same."""
    model = peft.get_peft_model(mlp(), config(method))
    layer = model.base_model.model.lin0
    pair = [layer.basis_down, layer.basis_up]
    pointers = [base.data_ptr() for base in pair]
    x = inputs()
    y = layer(x)
    for name in ("same", "lower"):
        lower = {"r": 2, "a": 3, "b": 2} if method == "lora_mini" else {"r": 2}
        model.add_adapter(name, config(method, **(lower if name == "lower" else {})))
        assert [layer.basis_down.data_ptr(), layer.basis_up.data_ptr()] == pointers
        assert layer.basis_down is pair[0]
    higher = {"r": 2, "a": 9, "b": 7} if method == "lora_mini" else {"r": 9}
    model.add_adapter("higher", config(method, **higher))
    rows = 5 if method == "lora_mini" else 4
    assert layer.basis_down.shape[0] == 9
    assert torch.equal(layer.basis_down[:rows], pair[0])
    assert torch.equal(layer.basis_up[:, : pair[1].shape[1]], pair[1])
    torch.testing.assert_close(layer(x), y, **close)
    assert sum("basis_" in name for name, _ in model.named_parameters()) == 4
    assert not any("basis_" in n for n, _ in model.named_buffers())
    if method == "lora_xs":  # what is added is what the singular vectors go on with
        left, sigma, right = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
        outer = layer.basis_up @ layer.basis_down
        torch.testing.assert_close(outer, left[:, :9] * sigma[:9] @ right[:9], **close)
    else:
        new = layer.basis_up[:, 4:]
        assert 0.3 * 4**-0.5 < new.square().mean().sqrt() < 4**-0.5


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    """Bases in the weight's dtype, what is trained in fp32, outputs in x's; and all in 16 bits."""
    for autocast, trained in ((True, torch.float32), (False, dtype)):
        model = peft.get_peft_model(mlp(dtype), config(method), autocast_adapter_dtype=autocast)
        kinds = {n: p.dtype for n, p in model.named_parameters()}
        assert {kind for n, kind in kinds.items() if "basis_" in n} == {dtype}
        assert {kind for n, kind in kinds.items() if "default" in n} == {trained}
        y = model(inputs(dtype=dtype))
        assert y.dtype == dtype
        y.float().square().sum().backward()
        assert all(p.grad.dtype == trained for p in model.parameters() if p.requires_grad)


# --- merging ---


@methods
def test_merge(method: str) -> None:
    """The same outputs merged; the same bits after; several at once; unloaded into plain layers."""
    model = peft.get_peft_model(mlp(), config(method, target_modules=["lin0", "lin1", "conv"]))
    model.add_adapter("two", config(method))
    model.eval()
    x, before = inputs(), state(model)
    y = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, **close)
    assert not torch.equal(
        model.base_model.model.lin0.base_layer.weight,
        before["base_model.model.lin0.base_layer.weight"],
    )
    model.unmerge_adapter()
    assert same(state(model), before)
    model.base_model.set_adapter(["default", "two"])
    y = model(x)
    model.merge_adapter(["default"], safe_merge=True)
    model.merge_adapter(["two"], safe_merge=True)
    torch.testing.assert_close(model(x), y, **close)
    model.unmerge_adapter()
    assert same(state(model), before)
    assert torch.equal(model.unload()(x), mlp()(x))


def test_a_merged_model_is_moved_with_what_it_was() -> None:
    """Unmerged it is in the new dtype as a whole."""
    model = peft.get_peft_model(mlp(), config("lora_xs"))
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    weight = model.base_model.model.lin0.base_layer.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, mlp().lin0.weight.float())


def test_merge_broken() -> None:
    """safe_merge refuses NaN and leaves the layer as it was."""
    model = peft.get_peft_model(mlp(), config("lora_xs"))
    before = state(model.base_model.model.lin0.base_layer)
    with torch.no_grad():
        model.base_model.model.lin0.lora_xs_core["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected.*default seems to be broken \(in lin0\)"):
        model.merge_adapter(safe_merge=True)
    assert same(state(model.base_model.model.lin0.base_layer), before)
    assert not model.base_model.model.lin0.merged


def test_merge_below_float32_says_what_is_lost() -> None:
    """One warning, of the worst layer."""
    model = peft.get_peft_model(mlp(torch.bfloat16), config("lora_xs"))
    with torch.no_grad():
        model.base_model.model.lin1.lora_xs_core["default"] *= 1e-3
    with pytest.warns(UserWarning, match=r"lost up to .*% of ΔW to rounding \(in lin1\)"):
        model.merge_and_unload()


def test_merge_of_tied_weights() -> None:
    """The embeddings that share the merged weight keep theirs."""
    pytest.importorskip("transformers")
    from architectures import tiny

    base = tiny("llama", tie_word_embeddings=True)
    embeddings = base.get_input_embeddings().weight
    values = embeddings.detach().clone()
    given = LoraXSConfig(r=4, target_modules=["lm_head"], init_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = peft.get_peft_model(base, given)
        model.merge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, values)
    assert not torch.equal(base.lm_head.base_layer.weight, values)
    model.unmerge_adapter()
    assert base.lm_head.base_layer.weight is embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        x = torch.randn(2, embeddings.shape[1])
        y = base.lm_head(x)
        model.merge_adapter()
    base.lm_head.base_layer.weight = embeddings  # as tie_weights() does
    assert not base.lm_head.merged
    torch.testing.assert_close(base.lm_head(x), y)


# --- what is refused, warned of, or gone around ---


def test_rank_above_the_layer() -> None:
    """Taken down to it, with one warning for all; the scaling is that of the rank asked for."""
    with pytest.warns(UserWarning, match=r"r=64 is more than 2 layers have room for") as caught:
        model = peft.get_peft_model(mlp(), config("lora_xs", r=64, lora_alpha=16))
    assert len(caught) == 1
    found = {name.rpartition(".")[2]: layer for name, layer in layers(model).items()}
    assert {name: layer.r["default"] for name, layer in found.items()} == {"lin0": 12, "lin1": 10}
    assert all(layer.scaling["default"] == 0.25 for layer in found.values())
    with pytest.warns(UserWarning, match=r"r=8, a=64, b=64 is more than 2 layers"):
        model = peft.get_peft_model(mlp(), CONFIGS["lora_mini"](target_modules=["lin0", "lin1"]))
    layer = model.base_model.model.lin1
    assert layer.sides["default"] == (16, 10)
    assert layer.lora_mini_a_train["default"].shape == (16, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(mlp(), config("lora_xs", r=10))


class Norm(nn.Module):
    """What has no linear layer at `norm`, and one that is never called at `attention.out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("norm", "Target module norm is a LayerNorm"),
        ("out_proj", "attention.out_proj .*never calls"),
    ],
)
def test_unsupported_layers_are_named(target: str, message: str) -> None:
    """With their path, and what to do."""
    with pytest.raises(ValueError, match=f"{message}.*Leave it out of target_modules"):
        peft.get_peft_model(Norm(), LoraXSConfig(r=2, target_modules=[target]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"init_weights": "zeros"}, "init_weights is 'zeros'"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
    ],
)
def test_bad_configurations(settings: dict[str, Any], message: str) -> None:
    """Each names what it got."""
    with pytest.raises(ValueError, match=message):
        config("lora_xs", **settings)


def test_seeds_of_one_layer_agree() -> None:
    """A second adapter with another seed would need other bases."""
    model = peft.get_peft_model(mlp(), config("lora_mini"))
    with pytest.raises(ValueError, match="projection_seed is 3, but 42"):
        model.add_adapter("two", config("lora_mini", projection_seed=3))


@methods
def test_hooks_and_parametrisations_of_the_base_layer_run(method: str) -> None:
    """It is called then, and the low-rank term added to what it gives."""
    x = inputs()
    for kind in ("hook", "parametrisation", "pre-hook", "pruning"):
        base = mlp()
        if kind == "hook":
            base.lin0.register_forward_hook(lambda module, args, y: y * 2)
        elif kind == "pre-hook":
            base.lin0.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        elif kind == "pruning":
            prune.random_unstructured(base.lin0, "weight", 0.5)
        else:
            nn.utils.parametrizations.weight_norm(base.lin0)
        plain = base.lin0(x)
        model = peft.get_peft_model(base, config(method))
        layer = model.base_model.model.lin0
        weight = layer.base_layer.weight
        term = x @ layer.get_delta_weight("default").t()
        torch.testing.assert_close(layer(x), plain + term, **close)
        mixed = layer(x, adapter_names=["default", "__base__"] * 3)
        torch.testing.assert_close(mixed[::2], (plain + term)[::2], **close)
        torch.testing.assert_close(mixed[1::2], plain[1::2], **close)
        assert weight.shape == (16, 12)


def test_backward_hooks_and_arguments_of_the_base_layer() -> None:
    """They reach it: hooks on gradients run, and what nn.Linear does not take is its error."""
    base, seen = mlp(), []
    base.lin0.register_full_backward_hook(lambda *_: seen.append("full"))
    base.lin1.register_full_backward_pre_hook(lambda *_: seen.append("pre"))
    model = peft.get_peft_model(base, config("lora_xs"))
    model(inputs().requires_grad_()).sum().backward()
    assert seen == ["pre", "full"]
    with pytest.raises(TypeError, match="scale"):
        peft.get_peft_model(mlp(), config("lora_xs")).base_model.model.lin0(inputs(), scale=2)


@methods
def test_offloaded_weights(method: str) -> None:
    """Bases are made of the weights themselves, which are on the meta device between calls."""
    accelerate = pytest.importorskip("accelerate")
    wanted = peft.get_peft_model(mlp(), config(method, init_weights=False))
    base = accelerate.cpu_offload(mlp(), execution_device=torch.device("cpu"))
    assert base.lin0.weight.is_meta
    model = peft.get_peft_model(base, config(method, init_weights=False))
    layer, like = model.base_model.model.lin0, wanted.base_model.model.lin0
    assert torch.equal(layer.basis_down, like.basis_down)
    for name in layer.adapter_layer_names:
        getattr(layer, name)["default"].data.copy_(getattr(like, name)["default"].data)
    x = inputs()
    torch.testing.assert_close(layer(x), like(x), **close)
    assert not layer.is_plain(layer.base_layer)
    accelerate.hooks.remove_hook_from_submodules(layer)
    assert layer.is_plain(layer.base_layer)


def test_meta_weights_are_refused() -> None:
    """Their singular vectors would be meta, too, and stay so."""
    with torch.device("meta"):
        base = mlp()
    with pytest.raises(ValueError, match="lin0 is on the meta device"):
        peft.get_peft_model(base, config("lora_xs"))


def test_a_failed_probe_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the version that was tested; where nothing is missing there is no error."""
    from peft.tuners import tuners_utils

    monkeypatch.setattr(registry, "METHODS", ())
    registry.probe()
    monkeypatch.delattr(tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load")
    monkeypatch.delattr(tuners_utils, "onload_layer")
    with pytest.raises(ImportError, match=r"tested with 0.21.2.*onload_layer.*_remap_adapter"):
        registry.probe()


# --- copies, and other ways in ---


@methods
def test_copies(method: str) -> None:
    """deepcopy and a pickle of the whole model compute the same, with bases of their own."""
    model = peft.get_peft_model(mlp(), config(method)).eval()
    x = inputs()
    y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), y)
        ours, theirs = (m.base_model.model.lin0.basis_down for m in (model, other))
        assert ours.data_ptr() != theirs.data_ptr()
        assert not theirs.requires_grad


@methods
def test_transformers_own_way(method: str) -> None:
    """model.add_adapter of transformers, which injects without PeftModel; one layer of two."""
    pytest.importorskip("transformers")
    from architectures import batch, tiny

    model = tiny("llama")
    chosen = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {**SETTINGS[method], "init_weights": False, "target_modules": chosen}
    inputs = batch("llama", 5)
    plain = model(**inputs).logits
    model.add_adapter(CONFIGS[method](**settings, layers_to_transform=[1], layers_pattern="layers"))
    names = list(layers(model))
    assert len(names) == 7
    assert all(".1." in name for name in names)
    assert not torch.allclose(model(**inputs).logits, plain)
    model.disable_adapters()
    assert torch.equal(model(**inputs).logits, plain)
