"""save_adapter and load_adapter: round trips, and files that are refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import SETTINGS, D, methods
from torch import nn

from fused_lowrank import (
    adapt,
    disable_adapters,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from fused_lowrank.files import adapter as adapter_file
from fused_lowrank.methods import METHODS, LowRankLinear


def base(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model at every call."""
    generator = torch.Generator().manual_seed(7)
    names = ("first", "second", "norm", "head")
    modules = nn.Linear(D, D + 4), nn.Linear(D + 4, D), nn.BatchNorm1d(D), nn.Linear(D, 5)
    model = nn.Sequential()
    for name, module in zip(names, modules, strict=True):
        model.add_module(name, module)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.to(device, dtype).eval()


def trained(
    method: str, device: torch.device, of: torch.dtype = torch.float32, /, **keywords: Any
) -> nn.Module:
    """The base model, adapted, with random values in all that is trained."""
    keywords = {"target_modules": ["first", "second"], **SETTINGS[method], **keywords}
    model = adapt(base(device, of), method, progress=False, **keywords)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def picture(model: nn.Module) -> list[object]:
    """All that a refused file could change."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    return [modules, parameters, [(n, v.tolist()) for n, v in model.state_dict().items()]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the adapter is saved."""
    return tmp_path / "adapter.safetensors"


# --- round trips ---


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "keywords",
    [
        {"alpha": 3.0, "dropout": 0.25},
        {"modules_to_save": ["head", "norm"]},
        {"dtype": torch.bfloat16},
        {"train": "all"},
    ],
)
def test_round_trip(
    method: str, dtype: torch.dtype, keywords: dict, path: Path, device: torch.device
) -> None:
    """Into a plain model, and into an adapted one: the same outputs, bit for bit."""
    if "train" in keywords:
        factors = METHODS[method][1].row.factors.items()
        saved = (name for name, factor in factors if factor.saved)
        keywords = {"train": ("weight", "bias", *saved)}
    model = trained(method, device, dtype, **keywords)
    x = torch.randn(3, D, device=device, dtype=dtype)
    y = model(x)
    save_adapter(model, path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    fresh = base(device, dtype)
    assert not torch.allclose(fresh(x), y)
    assert load_adapter(fresh, str(path), progress=False) is fresh
    for target in (fresh, trained(method, device, dtype, **keywords)):
        if target is not fresh:
            nn.init.normal_(getattr(target.first, target.first.train_names[0]))
            assert not torch.equal(target(x), y)
            load_adapter(target, path)
        assert torch.equal(target(x), y)
        flags = [(n, p.requires_grad, p.dtype) for n, p in model.named_parameters()]
        assert flags == [(n, p.requires_grad, p.dtype) for n, p in target.named_parameters()]
        assert target.first.settings() == model.first.settings()
    if "train" not in keywords:
        plain = base(device, dtype)
        with disable_adapters(fresh):
            assert torch.equal(fresh(x), plain(x))
        assert torch.equal(unload(fresh)(x), plain(x))


@methods
def test_reference_layers(method: str, path: Path, device: torch.device) -> None:
    """fused=False gives the reference layers."""
    save_adapter(trained(method, device), path)
    model = load_adapter(base(device), path, fused=False)
    assert type(model.first) is METHODS[method][0]


def test_saved_while_merged(path: Path, device: torch.device) -> None:
    """A merged model saves the same file; loading into one is refused."""
    model = trained("lora_xs", device)
    x = torch.randn(3, D, device=device)
    y = model(x)
    merge(model)
    save_adapter(model, path)
    assert torch.equal(load_adapter(base(device), path)(x), y)
    with pytest.raises(ValueError, match="first is merged: unmerge"):
        load_adapter(model, path)
    load_adapter(unmerge(model), path)
    assert torch.equal(model(x), y)
    with disable_adapters(model), pytest.raises(ValueError, match="disable_adapters"):
        save_adapter(model, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("svd", ["randomized", "exact"])
def test_without_bases(svd: str, dtype: torch.dtype, path: Path, device: torch.device) -> None:
    """LoRA-XS computes its bases again: a file of cores, and the same outputs."""
    model = trained("lora_xs", device, dtype, svd=svd)
    save_adapter(model, path, bases=False)
    parts = {"first.core", "first.fingerprint", "second.core", "second.fingerprint"}
    assert load_file(path).keys() == parts
    torch.manual_seed(5)
    x = torch.randn(3, D, device=device, dtype=dtype)
    assert torch.equal(load_adapter(base(device, dtype), path)(x), model(x))


@pytest.mark.parametrize(("method", "factor"), [("lora_mini", "down"), ("lora", "down")])
def test_without_random_bases(method: str, factor: str, path: Path, device: torch.device) -> None:
    """Random frozen factors are in no other model: refused there, taken by the model itself."""
    keywords = {"train": ("up",)} if method == "lora" else {}
    model = trained(method, device, **keywords)
    x = torch.randn(3, D, device=device)
    y = model(x)
    save_adapter(model, path, bases=False)
    plain = base(device)
    before = picture(plain)
    with pytest.raises(ValueError, match=rf"first\.{factor} computed here is not.*bases=True"):
        load_adapter(plain, path)
    assert picture(plain) == before
    for name in model.first.train_names:
        nn.init.normal_(getattr(model.first, name))
    assert torch.equal(load_adapter(model, path)(x), y)


# --- files that are refused ---


def rewrite(path: Path, change: Callable[[dict, dict, dict], None]) -> None:
    """Change the tensors, the metadata and the config of a file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, config = load_file(path), json.loads(metadata["config"])
    change(tensors, metadata, config)
    if "config" in metadata and metadata["config"] != "{":
        metadata["config"] = json.dumps(config)
    save_file(tensors, path, metadata)


def other_weight(model: nn.Module) -> None:
    """Another weight of the same shape."""
    nn.init.normal_(model.first.weight)


def settings(name: str, value: object) -> Callable[[dict, dict, dict], None]:
    """Change one setting of the layer `first` in the config."""
    return lambda t, m, c: c["layers"]["first"]["settings"].update({name: value})


# what is done to the file → what the error says
FILES: dict[str, tuple[Callable[[dict, dict, dict], None], str]] = {
    "foreign": (lambda t, m, c: m.clear(), "no adapter of this library"),
    "other format": (lambda t, m, c: m.update(format="peft"), "no adapter of this library"),
    "version": (lambda t, m, c: m.update(version="9"), "format version 9; this library reads 1"),
    "no version": (lambda t, m, c: m.pop("version"), "format version None"),
    "no config": (lambda t, m, c: m.pop("config"), "config cannot be read"),
    "bad config": (lambda t, m, c: m.update(config="{"), "config cannot be read"),
    "no layers": (lambda t, m, c: c.update(layers={}), "config cannot be read"),
    "bad bases": (lambda t, m, c: c.update(bases="yes"), "config cannot be read"),
    "no bases": (lambda t, m, c: c.pop("bases"), "config cannot be read"),
    "method": (lambda t, m, c: c["layers"]["first"].update(method="dora"), "config cannot be read"),
    "setting": (settings("rank", 4), "config cannot be read.*rank"),
    "no train": (settings("train", None), "config cannot be read"),
    "bad rank": (settings("r", 64), "first: r is 64"),
    "other rank": (settings("r", 3), r"first\.down is \(4, 16\) there and \(3, 16\) here"),
    "missing": (lambda t, m, c: t.pop("first.core"), r"lacks first\.core"),
    "missing fingerprint": (lambda t, m, c: t.pop("first.fingerprint"), r"lacks first\.fingerp"),
    "missing head": (lambda t, m, c: t.pop("head.bias"), r"lacks head\.bias"),
    "extra": (lambda t, m, c: t.update(more=torch.ones(1)), "unexpected more"),
    "shape": (
        lambda t, m, c: t.update({"first.core": torch.ones(4, 5)}),
        r"first\.core is \(4, 5\) there and \(4, 4\) here",
    ),
    "head shape": (
        lambda t, m, c: t.update({"head.bias": torch.ones(6)}),
        r"head\.bias is \(6,\) there and \(5,\) here",
    ),
    "integers": (
        lambda t, m, c: t.update({"first.core": torch.ones(4, 4, dtype=torch.int32)}),
        r"first\.core is of torch\.int32",
    ),
    "other names": (
        lambda t, m, c: c["layers"].update(third=c["layers"].pop("first")),
        "adapts third, but this model has no such module",
    ),
    "no linear": (
        lambda t, m, c: c["layers"].update(norm=c["layers"].pop("first")),
        "norm is a BatchNorm1d",
    ),
    "other head": (lambda t, m, c: c.update(modules_to_save=["hd"]), "holds hd"),
    "not a number": (
        lambda t, m, c: t["first.fingerprint"].fill_(torch.nan),
        "another base model: the weight of first",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_refused_file(case: str, path: Path, device: torch.device) -> None:
    """A damaged or foreign file: a ValueError that says what, and the model as it was."""
    save_adapter(trained("lora_xs", device, modules_to_save=["head"]), path)
    change, message = FILES[case]
    rewrite(path, change)
    model = base(device)
    model.first.weight.requires_grad = False
    before = picture(model)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, path)
    assert str(path) in str(error.value) or "first" in str(error.value)
    assert picture(model) == before


# what is done to the model → what the error says
MODELS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "other names": (
        lambda m: m.add_module("other", m._modules.pop("first")),
        "adapts first, but this model has no such module",
    ),
    "other sizes": (
        lambda m: setattr(m, "first", nn.Linear(D, D + 3)),
        r"does not fit.*first\.up is \(20, 4\) there and \(19, 4\) here",
    ),
    "too small": (lambda m: setattr(m, "first", nn.Linear(D, 3)), "first: r is 4.*at most 3"),
    "other weights": (other_weight, "another base model: the weight of first"),
    "no linear": (lambda m: setattr(m, "first", nn.Identity()), "first is a Identity"),
    "meta": (lambda m: m.to("meta"), r"first.*meta device"),
}


@pytest.mark.parametrize("bases", [True, False])
@pytest.mark.parametrize("case", MODELS)
def test_refused_model(case: str, bases: bool, path: Path) -> None:
    """Another model than the one the file was made for."""
    save_adapter(trained("lora_xs", torch.device("cpu")), path, bases=bases)
    change, message = MODELS[case]
    if case == "other sizes" and not bases:
        message = r"another base model: the weight of first"
    model = base()
    change(model)
    before = None if case == "meta" else picture(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, path)
    assert before is None or picture(model) == before
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


ADAPTED = {  # how the model was adapted → what the error says
    "method": ({"method": "lora"}, "first is lora here and lora_xs there"),
    "layers": ({"target_modules": ["first"]}, "second is not adapted here and lora_xs there"),
    "rank": ({"r": 3}, r"first\.core is \(4, 4\) there|first\.down is \(4, 16\) there"),
    "alpha": ({"alpha": 5.0}, r"alpha and train of first are 5\.0.*4\.0"),
    "train": ({"train": ("core", "up")}, r"train of first are .*'up'"),
    "modules_to_save": ({"modules_to_save": None}, r"modules_to_save are \[\] here and \['head'\]"),
}


@pytest.mark.parametrize("case", ADAPTED)
def test_refused_adapted_model(case: str, path: Path, device: torch.device) -> None:
    """A model that is adapted otherwise than the file says."""
    save_adapter(trained("lora_xs", device, modules_to_save=["head"], alpha=4.0), path)
    keywords, message = ADAPTED[case]
    keywords = {"method": "lora_xs", "modules_to_save": ["head"], "alpha": 4.0, **keywords}
    model = trained(keywords.pop("method"), device, **keywords)
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, path)
    assert picture(model) == before


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated(length: int, path: Path) -> None:
    """A file that ends too early."""
    save_adapter(trained("lora_mini", torch.device("cpu")), path)
    path.write_bytes(path.read_bytes()[:length])
    model = base()
    before = picture(model)
    with pytest.raises(ValueError, match=r"adapter\.safetensors is truncated, or no safetensors"):
        load_adapter(model, path)
    assert picture(model) == before


def test_no_such_file(path: Path) -> None:
    """A missing file is a FileNotFoundError; what is no safetensors file, a ValueError."""
    with pytest.raises(FileNotFoundError):
        load_adapter(base(), path)
    path.write_text("not an adapter at all, but text that is long enough")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_adapter(base(), path)
    with pytest.raises(ValueError, match="no adapted layers"):
        save_adapter(base(), path)


@pytest.mark.parametrize("fails", ["os.replace", "save_file"])
def test_crash_while_saving(fails: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file stays whole, and nothing else is left."""
    model = trained("lora_xs", torch.device("cpu"))
    save_adapter(model, path)
    before = path.read_bytes()
    nn.init.ones_(model.first.core)

    def crash(tensors: object, target: Path, *_: object) -> None:
        if fails == "save_file":
            Path(target).write_bytes(b"half")
        raise OSError("no space left")

    holder = adapter_file if fails == "save_file" else adapter_file.os
    monkeypatch.setattr(holder, fails.removeprefix("os."), crash)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    save_adapter(model, path)
    assert path.read_bytes() != before


def test_copy_of_a_model(path: Path, device: torch.device) -> None:
    """A deep copy takes the adapter too, and leaves the original alone."""
    model = trained("lora_mini", device, modules_to_save=["head"])
    save_adapter(model, path)
    clone = copy.deepcopy(model)
    nn.init.zeros_(clone.first.b_train)
    before = picture(model)
    load_adapter(clone, path)
    assert torch.equal(clone.first.b_train, model.first.b_train)
    assert picture(model) == before
