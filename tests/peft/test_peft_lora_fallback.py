"""What `fuse_lora` leaves to PEFT's own forward: whatever the equation does not say."""

import copy
import warnings
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

pytest.importorskip("peft")
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import inject_adapter_in_model
from peft.tuners.lora.config import VeloraConfig
from peft.tuners.lora.layer import Linear
from peft_lora_cases import (
    BF16,
    F64,
    ROWS,
    SMALL_ROWS,
    Block,
    K,
    R,
    assert_same,
    block,
    config,
    counted,
    fill,
    ids,
    layer,
)

from fused_lowrank.integrations.peft import fuse_lora, unfuse_lora


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often which of our ways computed a layer."""
    return counted(monkeypatch)


def test_states_of_the_adapters(device: torch.device, ran: Counter) -> None:
    """Each set_adapter, disabling, merging, mixed batches, deletion: as PEFT does it."""
    theirs = block(target_modules=["proj", "out"])
    theirs.add_adapter("second", config(r=3, lora_alpha=2, use_rslora=True, lora_bias=True))
    theirs = fill(theirs).to(device).double().eval()
    ours, x = fuse_lora(copy.deepcopy(theirs)), ids(device)

    def check(layers: int, exact: bool = False, **keywords: Any) -> None:
        """Both give the same; of ours, so many layers were computed by us."""
        ran.clear()
        y, expected = ours(x, **keywords), theirs(x, **keywords)
        assert ran.total() == layers
        torch.testing.assert_close(y, expected, **({"rtol": 0, "atol": 0} if exact else {}))

    check(2)
    for model in (ours, theirs):
        model.set_adapter("second")
    check(1)  # `out` has no such adapter
    assert_same(ours, theirs, x)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "second"])
    check(1)  # two at once in `proj`
    for model in (ours, theirs):
        model.set_adapter("default")
    with ours.disable_adapter(), theirs.disable_adapter():
        check(0, exact=True)
    check(0, exact=True, adapter_names=["second", "__base__"])
    for model in (ours, theirs):
        model.merge_adapter()
    check(0, exact=True)
    for model in (ours, theirs):
        model.unmerge_adapter()
    check(2)
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, Linear):
                module.set_scale("default", 0.25)
    check(2)
    for model in (ours, theirs):
        model.delete_adapter("default")
        model.set_adapter("second")
    check(1)
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    assert type(merged.proj) is nn.Linear
    for name, value in merged.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])


@pytest.mark.parametrize("later", [False, True])
def test_variants_are_left_alone(later: bool, device: torch.device, ran: Counter) -> None:
    """And said once, whether it is there from the start or added afterwards."""
    theirs = block()
    if not later:
        theirs.add_adapter("other", config(velora_config=VeloraConfig(2)))
    ours = copy.deepcopy(theirs)
    with (
        nullcontext()
        if later
        else pytest.warns(match="left to PEFT.*proj.*'other'.*Velora") as said
    ):
        fuse_lora(ours)
    if later:
        theirs.add_adapter("other", config(velora_config=VeloraConfig(2)))
        with pytest.warns(match="left to PEFT.*'other'.*Velora") as said:
            ours.add_adapter("other", config(velora_config=VeloraConfig(2)))
    assert len([w for w in said if "left to PEFT" in str(w.message)]) == 1
    ours.load_state_dict(theirs.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(ids(device)), theirs(ids(device))
        assert ran.total() == 1
        for model in (ours, theirs):
            model.set_adapter("other")
        assert torch.equal(ours(ids(device)), theirs(ids(device)))
    assert ran.total() == 1


def test_other_kinds_are_named(device: torch.device, ran: Counter) -> None:
    """An embedding, a subclass with a forward of its own, a parametrised weight: one warning."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    theirs = Block()
    theirs.proj, theirs.more = Doubled(16, 24), nn.Linear(16, 16)
    settings = config(target_modules=["embed", "proj", "out", "more"])
    for name in ("default", "second"):
        theirs = inject_adapter_in_model(settings, theirs, name)
    theirs.more.forward = theirs.more.base_layer.forward
    torch.nn.utils.parametrizations.orthogonal(theirs.out.base_layer)
    theirs = fill(theirs).to(device)
    ours = copy.deepcopy(theirs)
    with pytest.warns(match="left to PEFT's own forward") as said:
        fuse_lora(ours)
    (warning,) = said
    assert warning.filename == __file__
    for part in (
        "embed: a layer of another kind (Embedding)",
        "proj: a layer around a Doubled",
        "; out: a layer with a weight that is parametrised",
        "more: a layer whose forward has been replaced",
    ):
        assert part in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ours(ids(device)), theirs(ids(device)))
    assert not ran


class Marked(torch.Tensor):
    """A tensor of another class, which what is computed from it has too."""


class Halved(nn.Linear):
    """A factor that is not what the equation says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def replace_factor(module: Linear) -> None:
    module.lora_A["default"] = Halved(K, R, bias=False, device=module.weight.device)


def replace_dropout(module: Linear) -> None:
    module.lora_dropout["default"] = nn.ReLU()


def drop_all(module: Linear) -> None:
    module.lora_dropout["default"] = nn.Dropout(1.0)


def complex_numbers(module: Linear) -> None:
    module.to(torch.complex64)


@pytest.mark.parametrize("change", [replace_factor, replace_dropout, drop_all, complex_numbers])
def test_what_the_equation_does_not_say(change: Any, device: torch.device, ran: Counter) -> None:
    """Other modules in the factors' and dropout's places, nothing kept at all, complex numbers."""
    theirs = layer().to(device)
    change(theirs)
    ours = fuse_lora(copy.deepcopy(theirs))
    x = torch.randn(ROWS, K, device=device, dtype=theirs.weight.dtype)
    assert torch.equal(ours(x), theirs(x))
    assert not ran


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "dropout"])
def test_hooks_inside_a_layer_are_called(part: str, device: torch.device, ran: Counter) -> None:
    """Then PEFT's forward calls the modules, as long as there is a hook."""
    ours = fuse_lora(layer().to(device))
    name = "lora_dropout.default" if part == "dropout" else part
    x, seen = torch.randn(SMALL_ROWS, K, device=device, requires_grad=True), []
    inner = ours.get_submodule(name)
    for register in (
        inner.register_forward_hook,
        inner.register_forward_pre_hook,
        inner.register_full_backward_hook,
        inner.register_full_backward_pre_hook,
    ):
        handle = register(lambda *args: seen.append(args[0]))
        ours(x).sum().backward()
        handle.remove()
        assert seen.pop() is inner
    assert not ran
    ours(x)
    assert ran.total() == 1


class Seen(ModelHook):
    """An accelerate hook that counts the calls."""

    count = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return args, kwargs


@pytest.mark.parametrize("first", ["hook", "fuse"])
def test_accelerate_hooks(first: str, device: torch.device, ran: Counter) -> None:
    """On the layer: called, and the layer is fused inside; on its base: PEFT calls the base."""
    model, hook = layer(dtype=F64).to(device).double(), Seen()
    x = torch.randn(SMALL_ROWS, K, device=device, dtype=F64)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if first == "hook":
            fuse_lora(add_hook_to_module(model, hook))
        else:
            add_hook_to_module(fuse_lora(model), hook)
    torch.testing.assert_close(model(x), expected)
    assert (hook.count, ran.total()) == (1, 1)
    remove_hook_from_module(unfuse_lora(model))
    assert torch.equal(model(x), expected)
    assert (hook.count, ran.total()) == (1, 1)
    assert type(model) is Linear

    add_hook_to_module(fuse_lora(model).base_layer, hook)
    assert torch.equal(model(x), expected)
    assert (hook.count, ran.total()) == (2, 1)
    with pytest.warns(match="hooks"):
        fuse_lora(model)
    remove_hook_from_module(model.base_layer)
    torch.testing.assert_close(model(x), expected)
    assert (hook.count, ran.total()) == (2, 2)


def test_transforms_and_traces_are_peft_s(device: torch.device) -> None:
    """Gradients by torch.func for each sample, and torch.jit.trace."""
    theirs = layer(dtype=F64).to(device)
    ours = fuse_lora(copy.deepcopy(theirs))
    x = torch.randn(2, ROWS, K, device=device, dtype=F64)

    def by_sample(module: nn.Module) -> dict[str, torch.Tensor]:
        def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return functional_call(module, parameters, (x,)).square().sum()

        values = {name: p.detach() for name, p in module.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)

    torch.testing.assert_close(by_sample(ours), by_sample(theirs))
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), theirs(x))


def test_trained_scaling_is_peft_s(device: torch.device, ran: Counter) -> None:
    """A tensor in scaling's place keeps its gradient."""
    ours, scale = fuse_lora(layer().to(device)), torch.ones((), device=device, requires_grad=True)
    ours.scaling["default"] = scale
    ours(torch.randn(3, K, device=device)).sum().backward()
    assert scale.grad is not None
    assert not ran


def test_inputs_of_other_dtypes_are_peft_s(device: torch.device, ran: Counter) -> None:
    """Its error for an x that does not fit, and its own computation of tensors of other kinds."""
    ours = fuse_lora(layer().to(device))
    with pytest.raises(RuntimeError, match="dtype"):
        ours(torch.randn(ROWS, K, device=device, dtype=BF16))
    marked = torch.randn(ROWS, K, device=device).as_subclass(Marked)
    assert type(ours(marked)) is Marked
    nested = torch.nested.nested_tensor([torch.randn(n, K, device=device) for n in (2, 3)])
    assert ours(nested).is_nested
    assert not ran
