"""State that changes under another's feet: a base that is trained, a bank's factors, merged states,
failures half way. What was there stays as it was, or the error comes before anything is lost.
"""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import OutOfMemoryError, everything, failing
from safetensors.torch import load_file, save_file
from state_cases import QUIET, D, adapted, state, tiny
from tiny_model import SETTINGS, VOCABULARY, Tiny, methods, same, train
from torch import nn

from fused_lowrank import (
    adapt,
    disable_adapters,
    init_bases,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from fused_lowrank.methods import METHODS
from fused_lowrank.models.whole_modules import KEPT


@pytest.fixture
def ids(device: torch.device) -> torch.Tensor:
    """Inputs."""
    return torch.arange(VOCABULARY, device=device)


def names(method: str) -> tuple[str, ...]:
    """What a method trains by itself."""
    return METHODS[method][0].row.trained


# --- the base, where weight and bias are trained ---


@methods
@pytest.mark.parametrize("extra", [("bias",), ("weight",), ("weight", "bias")])
@pytest.mark.parametrize("how", ["plain", "merged", "copied", "pickled", "file", "bfloat16"])
def test_base_of_trained_weights(
    method: str,
    extra: tuple[str, ...],
    how: str,
    ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    """Disabled and unloaded it is the base model, whatever became of the model in between."""
    model = tiny().to(ids.device, torch.bfloat16 if how == "bfloat16" else torch.float32)
    base, y = state(model), model(ids)
    keywords = {**SETTINGS[method], **QUIET, "train": names(method) + extra}
    adapt(model, method, target_modules=["up", "down"], **keywords)
    model.norm.requires_grad_(False)
    train(model, ids, 5)
    model.norm.load_state_dict({k[5:]: v for k, v in base.items() if k.startswith("norm.")})
    assert (model(ids) - y).abs().max() > 0.05
    if how == "merged":
        merge(model)
    elif how == "copied":
        model = copy.deepcopy(model)
    elif how == "pickled":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    elif how == "file":
        save_adapter(model, tmp_path / "a")
        trained = model(ids)
        model = load_adapter(tiny().to(ids.device), tmp_path / "a", **QUIET)
        assert torch.equal(model(ids), trained)
        load_adapter(model, tmp_path / "a", **QUIET)
    trained = model(ids)
    with disable_adapters(model):
        assert torch.equal(model(ids), y)
        assert not model(ids).requires_grad
    assert torch.equal(model(ids), trained)
    unload(model)
    assert torch.equal(model(ids), y)
    assert same(state(model), base)


def test_base_is_kept_where_it_is_trained_and_moved_with_it() -> None:
    """A copy of what is trained of weight and bias, nothing of what is not; in every dtype."""
    model = adapted(train=("core", "bias"))
    assert set(model.body.up._base) == {"bias"}
    assert not adapted().body.up._base
    before = tiny().double()
    model.double()
    assert model.body.up._base["bias"].dtype == torch.float64
    tokens = torch.arange(5)
    with disable_adapters(model):
        assert torch.equal(model(tokens), before(tokens))


def test_a_tied_weight_is_kept_once(ids: torch.Tensor) -> None:
    """The head's weight, trained through it and through the embedding, comes back in both."""
    model = tiny(tied=True)
    base, y = state(model), model(ids)
    keywords: dict[str, Any] = {"train": ("core", "weight"), "modules_to_save": ["embed"]}
    adapt(model, target_modules=["up", "head"], r=4, **keywords, **QUIET)
    kept = vars(model)[KEPT]["embed"].tensors["weight"]
    assert model.head._base["weight"] is kept
    train(model, ids)
    assert not torch.equal(model.embed.weight, base["embed.weight"])
    model.norm.load_state_dict({k[5:]: v for k, v in base.items() if k.startswith("norm.")})
    trained = model(ids)
    with disable_adapters(model):
        assert torch.equal(model(ids), y)
    assert torch.equal(model(ids), trained)
    unload(model)
    assert torch.equal(model(ids), y)


def test_a_base_that_nobody_knows(ids: torch.Tensor) -> None:
    """A trained bias that a state_dict brought onto the meta device has no value of before."""
    keywords = {"target_modules": ["up", "down"], "r": 4, "train": ("core", "bias"), **QUIET}
    trained = state(adapted(train=("core", "bias")))
    with torch.device("meta"):
        model = Tiny()
    adapt(model, defer_bases=True, **keywords).to_empty(device=ids.device)
    model.load_state_dict(trained)
    for call in (unload, lambda model: disable_adapters(model).__enter__()):
        with pytest.raises(RuntimeError, match=r"body\.up.*init_bases\(model\), then the state"):
            call(model)
    with torch.device("meta"):
        model = Tiny()
    adapt(model, defer_bases=True, **keywords).to_empty(device=ids.device)
    base = state(tiny())
    model.load_state_dict(base, strict=False)
    init_bases(model, **QUIET).load_state_dict(trained)
    assert same(state(unload(model)), base)


# --- the state_dict of a merged model ---


def by_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Through a file that keeps tensors and nothing else."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / "file")
    return load_file(path / "file")


def by_torch(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Through torch.save."""
    torch.save(tensors, path / "file")
    return torch.load(path / "file")


@methods
@pytest.mark.parametrize("through", [lambda t, _: t, by_safetensors, by_torch])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_state_dict_of_a_merged_model(
    method: str, through: Callable[..., Any], assign: bool, seed: int, tmp_path: Path
) -> None:
    """An adapted model, on this base or another, takes ΔW once; a plain one is merged by it."""
    model, tokens = adapted(method), torch.arange(7)
    y, weights = model(tokens), {n: p.detach().clone() for n, p in model.named_parameters()}
    merge(model)
    merged = model(tokens)
    tensors = through(state(model), tmp_path)
    other = adapted(method, base=tiny(seed), seed=5)
    result = other.load_state_dict(tensors, strict=True, assign=assign)
    assert not result.missing_keys + result.unexpected_keys
    torch.testing.assert_close(other(tokens), y, rtol=1e-5, atol=1e-5)
    assert not other.body.up.merged
    for name, value in weights.items():
        torch.testing.assert_close(other.get_parameter(name), value, rtol=1e-5, atol=1e-6)
    if seed == 0 and not assign:
        assert torch.equal(other.body.up.weight, tiny().body.up.weight)
    plain = tiny(3)
    plain.load_state_dict(tensors, strict=False)
    assert torch.equal(plain(tokens), merged)
    unmerge(model)
    assert "merged" not in {key.rpartition(".")[2] for key in model.state_dict()}


def test_a_merged_state_without_its_factors() -> None:
    """It cannot be told what W was: an error, instead of ΔW in two places."""
    model = merge(adapted())
    tensors = {k: v for k, v in state(model).items() if not k.endswith(".core")}
    with pytest.raises(RuntimeError, match=r"body\.up\.weight is W \+ ΔW.*unmerge\(model\) before"):
        adapted().load_state_dict(tensors, strict=False)


def test_a_merged_model_refuses_before_it_changes() -> None:
    """No module has taken anything of a state_dict that a merged layer refuses."""
    other, model = adapted(seed=3, base=tiny(4)), merge(adapted())
    before = state(model)
    for target, tensors in (
        (model, other.state_dict()),
        (model.body, other.body.state_dict()),
        (nn.ModuleDict({"a": model}), {f"a.{k}": v for k, v in other.state_dict().items()}),
    ):
        with pytest.raises(RuntimeError, match="is merged: unmerge it"):
            target.load_state_dict(tensors)
        assert same(state(model), before)
    head = {k: v for k, v in other.state_dict().items() if k.startswith("head.")}
    model.load_state_dict(head, strict=False)  # which is of no merged layer
    model.load_state_dict(unmerge(model).state_dict())
    assert not unload(model)._load_state_dict_pre_hooks


def test_an_optimiser_outlives_a_merged_state(ids: torch.Tensor) -> None:
    """Its parameters are still those of the model, and its state is theirs."""
    model = adapted()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    model(ids).sum().backward()
    optimiser.step()
    saved = copy.deepcopy(optimiser.state_dict())
    merged = state(merge(copy.deepcopy(model)))
    model.load_state_dict(merged)
    assert torch.equal(optimiser.state_dict()["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])
    before = model.body.up.core.detach().clone()
    optimiser.zero_grad()
    model(ids).sum().backward()
    optimiser.step()
    assert not torch.equal(model.body.up.core, before)


# --- failures half way ---


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("fused_lowrank.methods.layer.LowRankLinear", "share_base"),
        ("fused_lowrank.models.adapt", "keep"),
        ("fused_lowrank.models.adapt", "replace_modules"),
        ("fused_lowrank.models.adapt", "leave_fast_paths"),
        ("fused_lowrank.methods.layer.LowRankLinear", "_init_factors"),
    ],
)
def test_adapt_that_fails(owner: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it does, the model is as it was, and can be adapted."""
    module, _, attribute = owner.rpartition(".")
    place: Any = __import__(owner if owner.endswith("adapt") else module, fromlist=["_"])
    place = place if owner.endswith("adapt") else getattr(place, attribute)
    model = tiny()
    model.add_module("encoder", nn.TransformerEncoderLayer(D, 2, 24, batch_first=True))
    before = everything(model)
    targets = ["up", "down", "linear1"]
    with monkeypatch.context() as patch:
        failing(patch, place, name, 1 if name != "_init_factors" else 2)
        with pytest.raises(OutOfMemoryError):
            adapt(model, target_modules=targets, modules_to_save=["head"], r=4, **QUIET)
    assert everything(model) == before
    adapt(model, target_modules=targets, modules_to_save=["head"], r=4, **QUIET)


@pytest.mark.parametrize("into", ["plain", "adapted"])
@pytest.mark.parametrize("at", [1, 2, 5, 7])
def test_load_that_fails(
    into: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is as it was, values too, where memory ends after some were copied."""
    more = {"train": ("core", "bias"), "modules_to_save": ["head"]}
    save_adapter(adapted(seed=2, **more), tmp_path / "a")
    model = tiny() if into == "plain" else adapted(**more)
    before = everything(model)
    with monkeypatch.context() as patch:
        failing(patch, torch.Tensor, "copy_", at)
        with pytest.raises((OutOfMemoryError, RuntimeError)):
            load_adapter(model, tmp_path / "a", **QUIET)
    assert everything(model) == before
    load_adapter(model, tmp_path / "a", **QUIET)
    assert everything(model)[3] == everything(adapted(seed=2, **more))[3]
