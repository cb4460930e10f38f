"""Which linear layers can be adapted, and what of them an adapted layer takes over."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import SETTINGS, methods
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from fused_lowrank import adapt, init_bases, load_adapter, merge, save_adapter, unload
from fused_lowrank.methods import METHODS, accept

D = 12


class Packed(Tensor):
    """As quantising libraries have it: int8 values that say they are float32."""

    packed: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor) -> "Packed":
        return Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Detaching and nothing else."""
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].packed)
        raise NotImplementedError(str(func))


class Marked(nn.Parameter):
    """An ordinary Parameter of a class of its own."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def packed_weight() -> nn.Parameter:
    """A quantised weight, as nn.Parameter wraps it."""
    return nn.Parameter(Packed(torch.ones(D, D, dtype=torch.int8)), requires_grad=False)


SPECIAL: dict[str, tuple[Callable[[], Any], str]] = {
    "packed": (packed_weight, "Packed"),
    "float8": (lambda: nn.Parameter(torch.ones(D, D).to(torch.float8_e4m3fn), False), "float8"),
}


def model_of(weight: Any) -> nn.Sequential:
    """Two linear layers, the second with this weight."""
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    del model[1].weight
    model[1].register_parameter("weight", weight)
    return model


@pytest.mark.parametrize("kind", SPECIAL)
@methods
def test_quantised_weights_without_values_or_gradients_are_refused(kind: str, method: str) -> None:
    """By the name of their type, before anything is done, whatever the way in."""
    make, name = SPECIAL[kind]
    model = model_of(make())
    before = [id(module) for module in model]
    for target in (["0", "1"], "all-linear"):
        if target == "all-linear":
            model.append(nn.Linear(D, D))
        with pytest.raises(TypeError, match=rf"1 is a Linear with a weight .*{name}.*dequantise"):
            adapt(model, method, target_modules=target, **SETTINGS[method])
    assert [id(module) for module in model][:2] == before
    with pytest.raises(TypeError, match=name):
        METHODS[method][1].from_linear(model[1], **SETTINGS[method])


def test_quantised_weights_of_a_file(tmp_path: Path) -> None:
    """A file is not loaded into a quantised model, nor saved from or merged into one."""
    model = adapt(nn.Sequential(nn.Linear(D, D)), target_modules=["0"], r=3)
    save_adapter(model, tmp_path / "adapter")
    quantised = nn.Sequential(nn.Linear(D, D))
    quantised[0].weight = packed_weight()
    with pytest.raises(ValueError, match="0 is a Linear with a weight that is a Packed"):
        load_adapter(quantised, tmp_path / "adapter")
    model[0].weight = packed_weight()
    with pytest.raises(TypeError, match="0 has got a weight that is a Packed"):
        save_adapter(model, tmp_path / "other")
    with pytest.raises(TypeError, match="cannot merge into 0, which has a weight that is a Packed"):
        merge(model)
    with pytest.raises(TypeError, match="cannot merge into a layer with a weight that is a Packed"):
        model[0].merge()
    model[0].bases_pending = True
    with pytest.raises(TypeError, match="cannot initialise the factors of a layer with a weight"):
        init_bases(model)


def test_ordinary_tensors_are_accepted() -> None:
    """Parameters, plain tensors, subclasses that override nothing, torch's own."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.parameter import Buffer

    with FakeTensorMode():
        fake = nn.Parameter(torch.ones(D, D))
    ordinary = [Marked(torch.ones(D, D)), torch.ones(D, D), Buffer(torch.ones(D, D)), fake]
    assert [accept.special_tensor(weight) for weight in ordinary] == [None] * 4
    with pytest.raises(TypeError, match="a weight that is a UninitializedParameter"):
        METHODS["lora"][1].from_linear(nn.LazyLinear(D), r=3)
    adapt(model_of(Marked(torch.randn(D, D))), target_modules=["1"], r=3)


@methods
def test_quantised_weights_in_peft(method: str, tmp_path: Path) -> None:
    """Refused by PEFT's methods, first or as a second adapter, before a layer is replaced; what
    was trained before can be saved, and not be merged.
    """
    from peft_cases import CONFIGS, peft

    if method not in CONFIGS:
        pytest.skip("PEFT's own, or none")
    config = CONFIGS[method](target_modules=["0", "1"], **SETTINGS[method])
    model = model_of(packed_weight())
    for target in (["0", "1"], "all-linear"):
        given = copy.deepcopy(config)
        given.target_modules = target
        with pytest.raises(ValueError, match="module 1 is a Linear with a weight that is a Packed"):
            peft.get_peft_model(model, given)
        assert type(model[0]) is nn.Linear
    base = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.base_model.model[1].base_layer.weight = packed_weight()
    with pytest.raises(ValueError, match="module 1 is a Linear with a weight that is a Packed"):
        model.add_adapter("two", copy.deepcopy(config))
    before = model.base_model.model[0].base_layer.weight
    with pytest.raises(ValueError, match="cannot merge into 1, which has a weight that is a Pack"):
        model.merge_adapter()
    assert model.base_model.model[0].base_layer.weight is before
    model.save_pretrained(tmp_path / "saved")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "saved").base_model.model
    saved, found = (own[1].factors_of("default") for own in (model.base_model.model, again))
    for name, value in found.items():
        assert torch.equal(value, saved[name][tuple(map(slice, value.shape))])


# --- what else a linear layer may have ---


class Kind(nn.Linear):
    """A subclass that computes what nn.Linear does."""

    def twice(self) -> float:
        """Whatever users have."""
        return 2 * self.note


def test_attributes_are_carried() -> None:
    """Attributes, buffers, submodules and the class are there while adapted, or after, and back."""
    model = nn.Sequential(Kind(D, D), nn.Linear(D, D))
    linear = model[0]
    linear.note, linear.tag = 3.0, {"a": 1}
    linear.whose = (lambda self: self).__get__(linear)
    linear.compile(backend="eager")
    linear.register_buffer("kept", torch.ones(2), persistent=False)
    linear.extra = nn.LayerNorm(2)
    linear.more = nn.Parameter(torch.ones(3))
    names = sorted(vars(linear).keys() - {"_compiled_call_impl"})
    keys = sorted(linear.state_dict())
    for _ in range(2):
        adapt(model, target_modules=["0"], r=3)
        layer = copy.deepcopy(model)[0]
        assert (layer.note, layer.tag) == (3.0, {"a": 1})
        assert model[0].tag is linear.tag
        assert model[0].whose() is model[0]
        assert model[0]._compiled_call_impl is None
        assert model[0].more is linear.more
        assert not model[0].more.requires_grad
        assert "0.kept" not in model.state_dict()
        unload(model)
        back = model[0]
        assert type(back) is Kind
        assert back.twice() == 6.0
        assert back.extra is linear.extra
        assert sorted(vars(back)) == names
        assert sorted(back.state_dict()) == keys


def test_attributes_of_another_meaning_are_refused() -> None:
    """By name, before the model is changed."""
    for name in ("scale", "merged", "down"):
        model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
        setattr(model[1], name, 2.0)
        with pytest.raises(TypeError, match=f"1 has {name} of its own"):
            adapt(model, target_modules=["0", "1"], r=3)
        with pytest.raises(TypeError, match=f"linear has {name} of its own"):
            METHODS["lora"][0].from_linear(model[1], r=3)
        assert type(model[0]) is nn.Linear


def test_replaced_forward_is_refused() -> None:
    """However it was put there, by name; what is its class's own, left behind, is none."""
    linear = nn.Linear(D, D)
    plain = linear.forward
    linear.forward = lambda x: 2 * plain(x)
    model = nn.Sequential(nn.Linear(D, D), linear)
    for target in (["0", "1"], r"0|1"):
        with pytest.raises(TypeError, match="1 has had its forward replaced"):
            adapt(model, target_modules=target, r=3)
    linear.forward = plain
    adapt(model, target_modules=["0", "1"], r=3)
    assert "forward" not in vars(model[1])


def test_accelerate_hooks_are_carried() -> None:
    """The hook acts while adapted and after, beside one that offloads; a cast is refused."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubles(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model, x = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)), torch.randn(3, D)
    for hook in (Doubles(), hooks.AlignDevicesHook("cpu", io_same_device=True)):
        hooks.add_hook_to_module(model[0], hook, append=True)
    y = model(x)
    adapt(model, "lora", target_modules=["0", "1"], r=3)
    torch.testing.assert_close(model(x), y)
    assert model[0]._hf_hook.hooks[0].post_forward(None, 1) == 2
    unload(model)
    torch.testing.assert_close(model(x), y)
    hooks.remove_hook_from_module(model[0])
    assert not torch.allclose(model(x), y)

    casting = hooks.LayerwiseCastingHook(torch.bfloat16, torch.float32, False)
    hooks.add_hook_to_module(model[1], casting)
    with pytest.raises(TypeError, match="1 is cast at each call by accelerate"):
        adapt(model, target_modules=["1"], r=3)
    model[1] = nn.Linear(D, D)
    for hook in (Doubles(), hooks.AlignDevicesHook("cpu", offload=True)):
        hooks.add_hook_to_module(model[1], hook, append=True)
    y = model(x)
    adapt(model, "lora", target_modules=["1"], r=3)
    assert model[1].weight.is_meta
    torch.testing.assert_close(model(x), y)
    unload(model)
    assert model[1].weight.is_meta
    torch.testing.assert_close(model(x), y)
    hooks.remove_hook_from_module(model[1])
    torch.testing.assert_close(2 * model(x), y)


def test_hooks_of_all_kinds() -> None:
    """With kwargs, always called, on gradients; of a layer from a linear, too, and back again."""
    calls: list[str] = []
    linear = nn.Linear(D, D)
    linear.register_forward_pre_hook(lambda m, a, k: calls.append("pre"), with_kwargs=True)
    linear.register_forward_hook(lambda m, a, y: calls.append("always"), always_call=True)
    linear.register_forward_hook(lambda m, a, k, y: 2 * y, with_kwargs=True)
    linear.register_full_backward_hook(lambda m, a, b: calls.append("back"))
    x = torch.randn(3, D, requires_grad=True)
    y = linear(x)
    layer = METHODS["lora"][1].from_linear(linear, r=3)
    for module in (layer, layer.to_linear()):
        calls.clear()
        torch.testing.assert_close(module(x), y)
        module(x).sum().backward()
        assert calls == ["pre", "always"] * 2 + ["back"]
        with pytest.raises((RuntimeError, TypeError)):
            module(None)
        assert calls[-1] == "always"


COMPUTED: dict[str, Callable[[nn.Linear], Any]] = {
    "weight_norm": lambda linear: parametrizations.weight_norm(linear),
    "spectral_norm": lambda linear: parametrizations.spectral_norm(linear),
    "spectral_norm of old": lambda linear: spectral_norm(linear),
    "pruned weight": lambda linear: prune.random_unstructured(linear, "weight", 0.5),
    "pruned bias": lambda linear: prune.random_unstructured(linear, "bias", 0.5),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_refused(kind: str) -> None:
    """And left out by "all-linear"."""
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D))
    COMPUTED[kind](model[1])
    with pytest.raises(TypeError, match="1 is parametrised"):
        adapt(model, target_modules=["0", "1"], r=3)
    with pytest.warns(UserWarning, match=r"leaves out 1 \(parametrised layers\)"):
        adapt(model, target_modules="all-linear", r=3)
    assert [type(module) is nn.Linear for module in model][::2] == [False, True]


def test_state_dict_hooks_are_refused() -> None:
    """They are not called for another module."""
    linear = nn.Linear(D, D)
    linear._register_load_state_dict_pre_hook(lambda *_: None)
    with pytest.raises(TypeError, match="has hooks on its state_dict"):
        METHODS["lora"][1].from_linear(linear, r=3)
