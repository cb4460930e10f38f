"""Modules trained whole that are resized or replaced after the model was adapted."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from torch import nn

from fused_lowrank import (
    FusedLoraXSLinear,
    adapt,
    disable_adapters,
    init_bases,
    load_adapter,
    merge,
    save_adapter,
    unload,
)
from fused_lowrank.models.whole_modules import forgotten

WHOLE = ["embed_tokens", "lm_head"]


def llama(tied: bool = False) -> Any:
    """A tiny Llama, the same at each call."""
    torch.manual_seed(0)
    return tiny("llama", tie_word_embeddings=tied, pad_token_id=None)


def adapted(model: nn.Module, saved: list[str] | None, targets: Any = ("q_proj",)) -> Any:
    """The model adapted."""
    return adapt(
        model, r=4, target_modules=list(targets), modules_to_save=saved, progress=False
    ).eval()


def train(model: nn.Module) -> None:
    """Change all that is trained, visibly."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def ids(size: int = 64) -> torch.Tensor:
    """All tokens."""
    return torch.arange(size)[None]


@pytest.mark.parametrize("size", [70, 60, 80])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [WHOLE, ["embed_tokens"], ["lm_head"]])
def test_resized_vocabulary(saved: list[str], tied: bool, size: int, tmp_path: Path) -> None:
    """It is saved, disabled and unloaded as what it has become."""
    base = llama(tied)
    before = base(ids(min(size, 64))).logits
    model = adapted(llama(tied), saved)
    if size == 80:
        model.resize_token_embeddings(70, pad_to_multiple_of=16)
    else:
        model.resize_token_embeddings(size)
    train(model)
    y = model(ids(size)).logits
    other = llama(tied)
    other.resize_token_embeddings(size)
    if not (tied or saved == WHOLE):  # what is not trained, transformers made at random
        part = "lm_head" if saved == ["embed_tokens"] else "model.embed_tokens"
        other.get_submodule(part).weight.data = model.get_submodule(part).weight.detach().clone()
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(
        load_adapter(other, tmp_path / "adapter", progress=False)(ids(size)).logits, y
    )

    def is_base() -> bool:
        logits = model(ids(size)).logits
        assert logits.shape == y.shape
        assert logits.isfinite().all()
        rows = model(ids(min(size, 64))).logits[..., : before.shape[-1]]
        return torch.allclose(rows, before[..., : rows.shape[-1]], atol=1e-6)

    assert not is_base()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with disable_adapters(model):
            assert is_base()
        assert torch.equal(model(ids(size)).logits, y)
        unload(model)
        assert is_base()
    grown = [str(w.message) for w in caught if "has grown" in str(w.message)]
    assert len(grown) == (2 if size > 64 else 0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    adapted(model, saved)


def test_new_tokens_of_the_base_are_means() -> None:
    """As transformers makes them when it resizes the base model itself."""
    base, model = llama(), adapted(llama(), WHOLE)
    base.resize_token_embeddings(70)
    model.resize_token_embeddings(70)
    train(model)
    names = r"lm_head\.weight, model\.embed_tokens\.weight"
    with pytest.warns(UserWarning, match=names) as caught, disable_adapters(model):
        y = model(ids(70)).logits
    torch.testing.assert_close(y, base(ids(70)).logits, rtol=0, atol=5e-3)  # and a little noise
    assert caught[0].filename == __file__


@pytest.mark.parametrize("outputs", [64, 5, 70])
@pytest.mark.parametrize("way", ["assigned", "set", "wrapped"])
def test_replaced_head(way: str, outputs: int, tmp_path: Path) -> None:
    """The module that stands in the place is saved; the one that stood there comes back."""
    base, model = llama(), adapted(llama(), ["lm_head"])
    head: nn.Module = nn.Linear(32, outputs, bias=outputs == 5)
    if way == "wrapped":
        head = torch.compile(head, backend="eager")  # type: ignore[assignment]
    if way == "set":
        model.set_output_embeddings(head)
    else:
        model.lm_head = head
    train(model)
    y = model(ids()).logits
    assert y.shape[-1] == outputs
    save_adapter(model, tmp_path / "adapter")
    other = llama()
    other.lm_head = nn.Linear(32, outputs, bias=outputs == 5)
    load_adapter(other, tmp_path / "adapter", progress=False)
    assert torch.equal(other(ids()).logits, y)
    with disable_adapters(model):
        assert torch.equal(model(ids()).logits, base(ids()).logits)
    assert torch.equal(model(ids()).logits, y)
    kept = copy.deepcopy(model)
    unload(model)
    assert torch.equal(model(ids()).logits, base(ids()).logits)
    unload(kept, merge=True)
    torch.testing.assert_close(kept(ids()).logits, y, rtol=1e-4, atol=1e-4)


def test_replaced_inside(tmp_path: Path) -> None:
    """What stood inside a module trained whole is not known, if it was of another size: said so."""
    model = adapted(llama(), ["mlp"], ["q_proj"])
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 40)
    message = r"model\.layers\.0\.mlp is trained whole, and what it was.*old parts"
    with pytest.raises(ValueError, match=message), disable_adapters(model):
        pass
    with pytest.raises(ValueError, match=message):
        unload(model)
    save_adapter(model, tmp_path / "adapter")
    model.lm_head.requires_grad_(False)
    unload(model, merge=True)


def test_module_that_is_gone(tmp_path: Path) -> None:
    """Its name is not left out of the file in silence."""
    model = adapted(llama(), ["lm_head"])
    model.lm_head = None
    with pytest.raises(ValueError, match="lm_head is trained whole, but is gone"):
        save_adapter(model, tmp_path / "adapter")


def test_trained_and_not_saved(tmp_path: Path) -> None:
    """A warning names what would be lost, and nothing else is warned of."""
    model = adapted(llama(), ["norm"], ["q_proj"])
    path = tmp_path / "adapter"

    def warned() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save_adapter(model, path)
        assert all(w.filename == __file__ for w in caught)
        return [str(w.message) for w in caught]

    assert warned() == []
    model.lm_head = nn.Linear(32, 64)
    (message,) = warned()
    assert message.startswith("lm_head.weight, lm_head.bias can be trained, and would not be in")
    model.requires_grad_(True)
    (message,) = warned()
    assert "in all)" in message
    names = set(forgotten(model))
    assert {"lm_head.bias", "model.layers.0.self_attn.q_proj.weight"} < names
    assert "model.norm.weight" not in names
    assert not any(name.endswith("core") for name in names)
    # Around an adapted model, or in one that was built of layers, others train what they like.
    outer = nn.Sequential(adapted(llama(), ["norm"], ["q_proj"]), nn.Linear(64, 2))
    model = outer
    assert warned() == []
    model = nn.Sequential(FusedLoraXSLinear(8, 8, r=2), nn.Linear(8, 8))
    assert warned() == []
    train_weight = adapt(
        llama(), r=4, target_modules=["q_proj"], train=("core", "weight"), progress=False
    )
    model = merge(train_weight)
    assert warned() == []


def test_made_on_the_meta_device(tmp_path: Path) -> None:
    """What the modules were is kept when their weights are there; saving does not need it."""

    def sequence() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    x, weights = torch.randn(3, 8), sequence().state_dict()
    for initialised in (True, False):
        with torch.device("meta"):
            model = sequence()
        keywords: dict[str, Any] = {"target_modules": ["0"], "modules_to_save": ["1"], "r": 2}
        adapt(model, defer_bases=True, progress=False, **keywords)
        model.to_empty(device="cpu").load_state_dict(weights, strict=False)
        if initialised:
            init_bases(model, progress=False)
            train(model)
            save_adapter(model, tmp_path / "adapter")
        else:
            load_adapter(model, tmp_path / "adapter")
        other = load_adapter(sequence(), tmp_path / "adapter", progress=False)
        assert torch.equal(other(x), model(x))
        if initialised:
            with disable_adapters(model):
                assert torch.equal(model(x), sequence()(x))
            unload(model)
            assert torch.equal(model(x), sequence()(x))
        else:
            with pytest.raises(ValueError, match="1 is trained whole, and what it was"):
                unload(model)
            torch.testing.assert_close(unload(model, merge=True)(x), other(x))


@pytest.mark.parametrize(
    "more", [{"modules_to_save": ["lm_head"]}, {"train": ("core", "weight")}, {}]
)
def test_nothing_is_copied_while_it_is_disabled(more: dict[str, Any]) -> None:
    """A state_dict would have the base model's values, and a copy adapters that are not off."""
    model = adapt(llama(), r=4, target_modules=["q_proj"], progress=False, **more).eval()
    train(model)
    y = model(ids()).logits
    with disable_adapters(model):
        with disable_adapters(model):
            pass
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match=r"made within disable_adapters.* outside"):
                copied(model)
        for module in (model, model.get_submodule("lm_head")) if "modules_to_save" in more else ():
            with pytest.raises(RuntimeError, match=r"the base model's values.* take it outside"):
                module.state_dict()
    other = adapt(llama(), r=4, target_modules=["q_proj"], progress=False, **more).eval()
    other.load_state_dict(model.state_dict())
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(ids()).logits, y)
