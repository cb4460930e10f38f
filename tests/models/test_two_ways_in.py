"""A model that was adapted in one way is not adapted in the other, which would freeze the first."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bank_cases import parts_of_model
from peft_cases import CONFIGS, config, inputs, methods, mlp, peft
from torch import nn

from fused_lowrank import adapt, load_adapter, save_adapter, unload
from fused_lowrank.integrations.peft import LoraXSConfig
from fused_lowrank.methods import FusedLoraXSLinear

METHODS_OF_PEFT: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(target_modules=["lin0"]),
    "lora, a module whole": lambda: peft.LoraConfig(
        target_modules=["lin0"], modules_to_save=["head"]
    ),
    "ia3": lambda: peft.IA3Config(target_modules=["lin0"], feedforward_modules=[]),
    "lora_xs": lambda: config("lora_xs", target_modules=["lin0"]),
    "lora_mini": lambda: config("lora_mini", target_modules=["lin0"]),
}


def unchanged(model: nn.Module, before: list[Any]) -> bool:
    """Whether modules, parameters and what is trained are as `parts_of_model` had them."""
    return all(a is b or a == b for a, b in zip(before, parts_of_model(model), strict=True))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("case", METHODS_OF_PEFT)
def test_adapt_refuses_a_model_of_peft(case: str, inner: bool, tmp_path: Any) -> None:
    """Named, with what to do, before anything is changed; so does `load_adapter`."""
    file = tmp_path / "a.safetensors"
    save_adapter(adapt(mlp(), target_modules=["lin1"], r=4, progress=False), file)
    made = peft.get_peft_model(mlp(), METHODS_OF_PEFT[case]())
    model = made.base_model.model if inner else made
    before = parts_of_model(model)
    message = r"PEFT.*(merge_and_unload|unload)\(\)"
    with pytest.raises(ValueError, match=message):
        adapt(model, target_modules=["lin1"], r=4, progress=False)
    assert unchanged(model, before)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, file, progress=False)
    assert unchanged(model, before)
    adapt(made.merge_and_unload(), target_modules=["lin1"], r=4, progress=False)


def test_adapt_refuses_what_peft_puts_before_a_model() -> None:
    """Prompts have no layer in the model, and would be frozen as well."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    made = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(plain, made)
    with pytest.raises(ValueError, match="PEFT"):
        adapt(model, target_modules=["q_proj"], r=4, progress=False)
    assert any(parameter.requires_grad for parameter in model.parameters())


@methods
@pytest.mark.parametrize("way", ["get_peft_model", "inject_adapter_in_model", "a layer"])
def test_peft_refuses_an_adapted_model(way: str, method: str) -> None:
    """Named, with what to do, before anything is changed."""
    model = mlp()
    if way == "a layer":
        model.lin1 = FusedLoraXSLinear.from_linear(model.lin1, r=4)
    else:
        adapt(model, target_modules=["lin1"], r=4, progress=False)
    before = parts_of_model(model)
    call = getattr(peft, way if way != "a layer" else "get_peft_model")
    given = (model, config(method, target_modules=["lin0"]))
    with pytest.raises(ValueError, match=r"lin1.*unload\(model"):
        call(*(given if call is peft.get_peft_model else given[::-1]))
    assert unchanged(model, before)


def test_transformers_refuses_an_adapted_model() -> None:
    """Its `add_adapter` with a config of ours leaves nothing behind; after `unload` it is taken."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    adapt(model, target_modules=["q_proj"], r=4, progress=False)
    before = parts_of_model(model)
    with pytest.raises(ValueError, match=r"q_proj.*unload\(model"):
        model.add_adapter(LoraXSConfig(r=4, target_modules=["v_proj"]))
    assert unchanged(model, before)
    unload(model).add_adapter(LoraXSConfig(r=4, target_modules=["v_proj"]))


# --- one layer in several places ---


class Twice(nn.Module):
    """One linear layer in a list twice, or under two names; another once."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        head = nn.Linear(12, 12)
        if listed:
            self.heads = nn.ModuleList([head] * 2)
        else:
            self.head, self.other = head, head
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.heads if hasattr(self, "heads") else (self.head, self.other)
        return one(self.first(x)) + two(x)


@methods
@pytest.mark.parametrize("listed", [False, True])
def test_a_layer_in_several_places(listed: bool, method: str) -> None:
    """PEFT would adapt the first place alone: named; "all-linear" leaves it out and says so."""
    names = ["0", "1"] if listed else ["head", "other"]
    for targets in (names, names[:1], ["first", *names]):
        model = Twice(listed)
        before = parts_of_model(model)
        with pytest.raises(ValueError, match=r"(heads\.0|head) stands in 2 places.*adapt\("):
            peft.get_peft_model(model, config(method, target_modules=targets))
        assert unchanged(model, before)
    with pytest.warns(UserWarning, match="stand in several places"):
        model = peft.get_peft_model(Twice(listed), config(method, target_modules="all-linear"))
    x = inputs(3)
    with torch.no_grad():
        y = model(x)
        assert torch.allclose(model.merge_and_unload()(x), y)


@pytest.mark.parametrize("listed", [False, True])
def test_adapt_takes_all_places(listed: bool) -> None:
    """The layer acts in each; so it merges as it is."""
    model = Twice(listed)
    adapt(model, target_modules=["0"] if listed else ["head"], r=4, progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        y = model(inputs(3).fill_(0.5))
        unload(model, merge=True)
        assert torch.allclose(model(inputs(3).fill_(0.5)), y)


class Shared(nn.Module):
    """One block in two places: its layer has one place, in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 12))] * 2)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@methods
def test_a_block_in_several_places_is_adapted(method: str) -> None:
    """As its layer is replaced in all of them."""
    model = peft.get_peft_model(Shared(), CONFIGS[method](target_modules=["0.0"], r=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        x = inputs(3)
        y = model(x)
        assert torch.allclose(model.merge_and_unload()(x), y)
