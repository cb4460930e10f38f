"""Ties of other modules than a model's head: shared, in several places, damaged, of a bank."""

import json
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tie_cases import EMBED, adapted, close, llama, logits, peft, through_peft, train, whole
from torch import nn

from fused_lowrank import AdapterBank, adapt, export_lora, load_adapter, save_adapter, unload
from fused_lowrank.integrations.peft import LoraXSConfig, checks


class Shared(nn.Module):
    """Layers that share: linear ones a weight, also with the head, and one its bias with a norm."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            for other in (self.second, self.head):
                other.weight.copy_(self.first.weight)
            self.norm.bias.copy_(self.first.bias)
        if tied:
            self.second.weight = self.head.weight = self.first.weight
            self.norm.bias = self.first.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.second(self.first(x).relu())))


SHARED: list[dict[str, Any]] = [
    {"target_modules": ["second"], "modules_to_save": ["first"]},
    {"target_modules": ["first"], "modules_to_save": ["norm"]},
    {"target_modules": ["first"], "modules_to_save": ["head"]},
    {"target_modules": ["first", "second"]},
    {"target_modules": ["first"], "train": ("core", "bias")},
    {"target_modules": ["first", "second"], "train": ("core", "weight", "bias")},
]


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_other_ties(case: dict[str, Any], tied: bool, there: bool, tmp_path: Path) -> None:
    """Weights of linear layers, of one that is adapted and another that is not, and biases."""
    x = torch.randn(5, 16)
    model = adapt(Shared(tied), r=4, progress=False, **case).eval()
    train(model)
    y = model(x)
    save_adapter(model, tmp_path / "adapter")
    other = Shared(there).eval()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    load_adapter(other, tmp_path / "adapter", progress=False)
    assert torch.equal(other(x), y)
    for source in (model, tmp_path / "adapter"):
        with suppress(ValueError):  # or it would have to hold what plain LoRA cannot
            export_lora(source, tmp_path / "lora")
            loaded = peft.PeftModel.from_pretrained(Shared(tied).eval(), tmp_path / "lora")
            torch.testing.assert_close(loaded(x), y, rtol=1e-3, atol=1e-3)
    if "train" not in case:
        assert torch.equal(unload(other)(x), Shared().eval()(x))
        assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
        assert (other.first.weight is other.second.weight) == there
    torch.testing.assert_close(unload(model, merge=True)(x), y, rtol=1e-3, atol=1e-3)


def test_view_of_another_shape() -> None:
    """A Parameter that would change with a trained one, unseen, is refused before training."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data.t())
    for case in ({"modules_to_save": ["0"]}, {"target_modules": ["1"], "train": ("weight",)}):
        before = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(ValueError, match="would be trained, and lies in the memory of"):
            adapt(model, r=2, progress=False, **{"target_modules": ["2"], **case})
        assert [parameter.requires_grad for parameter in model.parameters()] == before
        assert type(model[2]) is nn.Linear
    adapt(model, r=2, target_modules=["2"], progress=False)


@pytest.mark.parametrize(
    ("tied", "message"),
    [
        ({"lm_head.weight": "nothing.weight"}, "config cannot be read"),
        ({"lm_head.weight": 3}, "config cannot be read"),
        (["lm_head.weight"], "config cannot be read"),
        ({"gone.weight": "model.embed_tokens.weight"}, "with gone.weight tied to model.embed_to"),
        ({"model.norm.weight": "model.embed_tokens.weight"}, r"in this model they are \(32,\) and"),
    ],
)
def test_damaged_ties(tied: Any, message: str, tmp_path: Path) -> None:
    """They are refused, and the model is as it was."""
    path = tmp_path / "adapter"
    save_adapter(adapted(llama(), EMBED), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    config = {**json.loads(metadata["config"]), "tied": tied}
    save_file(load_file(path), path, {**metadata, "config": json.dumps(config)})
    model = llama()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, path, progress=False)
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_ties_in_an_adapted_model(tmp_path: Path) -> None:
    """Its Parameters stay what they are, for an optimiser holds them: said so."""
    config = LoraXSConfig(r=4, target_modules=["q_proj"], modules_to_save=EMBED)
    model = peft.get_peft_model(llama(), config)
    train(model)
    model.save_pretrained(tmp_path / "peft")
    other = adapted(llama(), EMBED)
    y = logits(other)
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied .* unload\(model\) first"):
        load_adapter(other, tmp_path / "peft")
    assert torch.equal(logits(other), y)
    load_adapter(unload(other), tmp_path / "peft", progress=False)
    assert close(logits(other), logits(model))


@whole
def test_bank_over_modules_trained_whole(saved: list[str], tmp_path: Path) -> None:
    """Its adapters share them, and are exported with them."""
    model = adapted(llama(), saved)
    bank = AdapterBank.from_model(model, slots=2)
    cores = {n: t for n, t in model.state_dict().items() if n.endswith(".core")}
    bank.add("alice", {name: torch.randn_like(core) for name, core in cores.items()})
    with bank.use(["alice"]):
        y = logits(model)
    export_lora(bank, tmp_path / "lora", name="alice")
    assert close(through_peft(llama(), tmp_path / "lora"), y)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_trained_and_not_saved_by_peft(bias: str, tmp_path: Path) -> None:
    """A head that was put in the place of PEFT's copy would be lost: said so, and no more."""
    torch.manual_seed(0)
    base: Any = tiny("roberta")
    config = LoraXSConfig(r=4, target_modules=["query"], modules_to_save=["classifier"], bias=bias)
    model = peft.get_peft_model(base, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "peft")
    model.base_model.model.classifier = nn.Linear(32, 2)
    names = r"^base_model\.model\.classifier\.weight, base_model\.model\.classifier\.bias can be"
    if bias == "all":  # which PEFT writes, the new one's too
        names = r"^base_model\.model\.classifier\.weight can be trained, and would not be in"
    with pytest.warns(UserWarning, match=names):
        model.save_pretrained(tmp_path / "peft")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_peft_keep_their_ties(bias: str, tmp_path: Path) -> None:
    """PEFT trains them where they are, and so in the norm that shares one."""
    x = torch.randn(5, 16)
    config = LoraXSConfig(r=4, target_modules=["first"], bias=bias)
    model = peft.get_peft_model(Shared(), config).eval()
    train(model)
    y = model(x)
    model.save_pretrained(str(tmp_path))
    other = load_adapter(Shared(), tmp_path, progress=False).eval()
    torch.testing.assert_close(other(x), y)
    assert other.norm.bias is other.first.bias
    torch.testing.assert_close(unload(other)(x), Shared().eval()(x))


class Repeated(nn.Module):
    """A layer that stands in three places, and is called in each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.heads = nn.ModuleList([self.head, self.head])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for head in self.heads:
            x = head(self.other(x)).relu()
        return self.head(x)


CASES = [(["head"], None), (["other"], ["head"]), (["head", "other"], None)]


@pytest.mark.parametrize(("targets", "saved"), CASES)
def test_modules_in_several_places(
    targets: list[str], saved: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here they are trained in all of them, in PEFT in one: neither is taken for the other."""
    words = r"head stands in 3 places, and PEFT trains only one of them"
    model = adapt(Repeated(), r=4, target_modules=targets, modules_to_save=saved, progress=False)
    train(model)
    with pytest.raises(ValueError, match=words):
        export_lora(model, tmp_path / "lora")
    config = LoraXSConfig(r=4, target_modules=targets, modules_to_save=saved)
    if saved is None:  # as of a file that was written before this was refused
        with pytest.raises(ValueError, match="head stands in 3 places"):
            peft.get_peft_model(Repeated(), config)
        monkeypatch.setattr(checks, "places_of", lambda model: Counter())
    theirs = peft.get_peft_model(Repeated(), config)
    theirs.save_pretrained(str(tmp_path / "peft"))
    plain = Repeated()
    with pytest.raises(ValueError, match=words):
        load_adapter(plain, tmp_path / "peft", progress=False)
    assert type(plain.head) is nn.Linear
    if saved is None:
        bank = AdapterBank.from_model(
            adapt(Repeated(), r=4, target_modules=targets, progress=False), slots=2
        )
        for source in (tmp_path / "peft", theirs):
            with pytest.raises(ValueError, match=words):
                bank.add("a", source)
