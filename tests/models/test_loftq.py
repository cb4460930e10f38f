"""init="loftq": a start that makes up for what quantising took, of the weights of before."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from base_cases import KINDS, D, H, Net, inputs, kinds, layers_of, model_of, needs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fused_lowrank import adapt, disable_adapters, export_lora, load_adapter, save_adapter
from fused_lowrank.methods.initial import triples
from fused_lowrank.methods.initial.values import Inputs, lora_start

BOTH = ["first", "second"]
R = 6


def original() -> Net:
    """The model that `model_of` quantises."""
    torch.manual_seed(0)
    return Net(nn.Linear)


def state() -> dict[str, Tensor]:
    """Its weights."""
    return {key: value.detach().clone() for key, value in original().state_dict().items()}


def started(kind: str, data: Any, init: str = "loftq", method: str = "lora", **more: Any) -> Any:
    """The quantised model, adapted."""
    own = {"r": R, "alpha": 4.0, **more}
    dtype = own.pop("base_dtype", torch.float32)
    model = model_of(kind, dtype)
    if kind == "opaque":  # which is quantised here
        for name in BOTH:
            turned = getattr(model, name).turned.data
            turned.mul_(64).round_().div_(64)
    given = {"data": data} if init == "loftq" else {}
    return adapt(model, method, target_modules=BOTH, init=init, progress=False, **given, **own)


def best(error: Tensor, r: int) -> Tensor:
    """The nearest matrix of rank r."""
    left, sigma, right = torch.linalg.svd(error, full_matrices=False)
    return left[:, :r] * sigma[:r] @ right[:r]


def errors_of(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """(what quantising took, what is left of it with the adapter)."""
    weight = dict(original().named_modules())[name].weight.detach()
    error = weight - layer.base_weight.values(torch.float32)
    return error, error - layer.delta_weight()


@kinds
def test_nearest_to_the_original(kind: str) -> None:
    """ΔW is the best of rank r of what was lost, under every scale, and the output is nearer."""
    x, truth = inputs(torch.float32, 40), original()
    how = {"rank_pattern": {"second": 3}, "use_rslora": True}
    model, plain = started(kind, truth, **how), started(kind, None, "kaiming", **how)
    assert [layer.r for layer in layers_of(model)] == [R, 3]
    assert all(
        layer.scale not in (0.0, 1.0) and layer.init == "loftq" for layer in layers_of(model)
    )
    for name, layer in zip(BOTH, layers_of(model), strict=True):
        error, left = errors_of(layer, name)
        expected = best(error.double(), layer.r).float()
        torch.testing.assert_close(layer.delta_weight(), expected, rtol=1e-3, atol=1e-6)
        assert left.norm() < 0.97 * error.norm()
        assert layer.inputs is None
    off, usual = ((one(x) - truth(x)).norm() for one in (model, plain))
    assert off < 0.97 * usual
    model(x).square().sum().backward()
    assert all(f.grad.any() for layer in layers_of(model) for f in layer.trained_factors)
    for key, value in state().items():
        assert torch.equal(truth.state_dict()[key], value)


@pytest.mark.parametrize("method", ["lora", "lora_fa"])
def test_files_and_dora(method: str, tmp_path: Path) -> None:
    """DoRA begins with a gain of 1; files keep the factors; an export is LoRA of rank r."""
    x, truth = inputs(), original()
    model, plain = started("subclass", truth, method=method, dora=True), started("subclass", truth)
    y = model(x)
    torch.testing.assert_close(y, plain(x))
    for layer in layers_of(model):
        whole = layer.base_weight.values(torch.float32) + layer.delta_weight()
        torch.testing.assert_close(layer.magnitude, whole.norm(dim=1))
    with disable_adapters(model):
        torch.testing.assert_close(model(x), model_of("subclass")(x))
    save_adapter(model, tmp_path / "a")
    assert torch.equal(load_adapter(model_of("subclass"), tmp_path / "a", progress=False)(x), y)
    export_lora(plain, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert tensors["base_model.model.first.lora_A.weight"].shape == (R, D)
    if method == "lora_fa":
        save_adapter(model, tmp_path / "b", bases=False)
        with pytest.raises(ValueError, match="'loftq' made of the weights of before: save"):
            load_adapter(model_of("subclass"), tmp_path / "b", progress=False)


def test_in_16_bits() -> None:
    """Factors are float32 over a base in bfloat16, and the start is as good."""
    truth = original().to(torch.bfloat16)
    model = started("subclass", truth, base_dtype=torch.bfloat16)
    assert model.first.down.dtype == torch.float32
    for name, layer in zip(BOTH, layers_of(model), strict=True):
        weight = getattr(truth, name).weight.float()
        error = weight - layer.base_weight.values().float()
        expected = best(error, R)
        torch.testing.assert_close(layer.delta_weight(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("n", "k"), [(640, 520), (520, 640)])
def test_triples_of_noise(n: int, k: int) -> None:
    """The start holds what the best triples hold, where as few blocks as for weights lose of it."""
    noise = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(noise.double())[:R].square().sum()
    few, _ = triples.leading(noise, R)
    weight = 100 * torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    down, up = lora_start("loftq", weight, R, 1.0, Inputs(original=weight + noise))
    held = (up @ down).double().square().sum()
    assert 1 - float(held / sigma) < 1e-6
    assert float(few.square().sum()) < float(sigma) * (1 - 1e-6)


# --- where the originals are ---


class Watched(Mapping[str, Tensor]):
    """Weights that are made when they are asked for, and how many are there at once."""

    def __init__(self) -> None:
        self.own, self.read, self.most = state(), [], 0
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def __getitem__(self, key: str) -> Tensor:
        found = self.own[key].clone()
        self.read.append(key)
        self.alive.add(found)
        self.most = max(self.most, len(self.alive))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def test_one_at_a_time() -> None:
    """Of a mapping no more than one weight is there at once, and none that is not asked for."""
    watched = Watched()
    started("subclass", watched)
    assert watched.read == 2 * ["first.weight", "second.weight"]  # checked, then read
    assert watched.most == 1


def sharded(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A folder with a file for each tensor, an index of them, and one that is not in it."""
    folder.mkdir()
    where = {key: f"shard-{i}.safetensors" for i, key in enumerate(tensors)}
    for key, file in where.items():
        save_file({key: tensors[key]}, folder / file)
    save_file({key: torch.zeros(1) for key in tensors}, folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_from_files(tmp_path: Path) -> None:
    """A file, folders whole and sharded, an index, with a prefix or without: the same factors."""
    expected = started("subclass", original()).state_dict()
    save_file(state(), tmp_path / "model.safetensors")
    save_file({"unused": torch.zeros(1)}, tmp_path / "other.safetensors")
    prefixed = {f"model.{key}": value for key, value in state().items()}
    folder = sharded(tmp_path / "shards", prefixed)
    (tmp_path / "several").mkdir()
    for i, (key, value) in enumerate(state().items()):
        save_file({key: value}, tmp_path / "several" / f"{i}.safetensors")
    places = (
        tmp_path / "model.safetensors",
        str(tmp_path),
        folder,
        folder / "model.safetensors.index.json",
        tmp_path / "several",
    )
    for data in places:
        model: Any = model_of("subclass")
        model.base_model_prefix = "model"
        adapt(model, "lora", target_modules=BOTH, r=R, alpha=4.0, init="loftq", data=data)
        for key, value in expected.items():
            if key.endswith(("down", "up")):
                assert torch.equal(model.state_dict()[key], value), (data, key)
    within: Any = nn.Module()
    within.model = model_of("subclass")
    within.base_model_prefix = "model"
    adapt(within, "lora", target_modules=BOTH, r=R, alpha=4.0, init="loftq", data=state())
    assert torch.equal(within.model.first.down, expected["first.down"])


def test_of_a_conv1d() -> None:
    """transformers stores GPT-2's layers turned, and turns them when it quantises them."""
    expected = started("subclass", original())
    model: Any = model_of("subclass")
    turned = {key: value.t().contiguous() for key, value in state().items()}
    for name in BOTH:
        getattr(model, name).source_cls = type("Conv1D", (nn.Module,), {})
    adapt(model, "lora", target_modules=BOTH, r=R, alpha=4.0, init="loftq", data=turned)
    assert torch.equal(model.second.up, expected.second.up)


# --- refused ---


def without(key: str) -> dict[str, Tensor]:
    """The weights less one."""
    return {name: value for name, value in state().items() if name != key}


def dequantised() -> Net:
    """A model that has the quantised values."""
    model, base = original(), started("subclass", None, "kaiming")
    for name in BOTH:
        getattr(model, name).weight.data = getattr(base, name).base_weight.values()
    return model


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (None, ValueError, r"data=original\), where original is the model that was quantised"),
    "batches": ([torch.zeros(2, D)], TypeError, "data is a list, and init='loftq' takes none"),
    "nothing there": ("no/such-model", FileNotFoundError, "snapshot_download"),
    "a name": (without("second.weight"), ValueError, "second: data has no second.weight: it has"),
    "nothing in it": ({}, ValueError, "first: data has no first.weight: it has none"),
    "a shape": (
        {**state(), "second.weight": torch.zeros(D, H + 1)},
        ValueError,
        rf"second: second.weight in data is \({D}, {H + 1}\), and the layer's weight \({D}, {H}\)",
    ),
    "quantised": (model_of("subclass"), ValueError, "first: first.weight in data is a Rows8"),
    "integers": (
        {**state(), "first.weight": torch.zeros(H, D, dtype=torch.uint8)},
        ValueError,
        "first.weight in data is of torch.uint8: give what it was quantised from",
    ),
    "meta": (Net(nn.Linear).to("meta"), ValueError, "first.weight in data is on the meta device"),
    "the same": (dequantised(), ValueError, "first: .* has the quantised values"),
    "rounded": (dequantised().bfloat16(), ValueError, "first: .* has the quantised values"),
    "another": (Net(nn.Linear), ValueError, "first: .* is of another model, or of another layer"),
    "not finite": (
        {**state(), "first.weight": torch.full((H, D), torch.nan)},
        ValueError,
        "first: the original weight in data holds NaN or Inf",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused(case: str) -> None:
    """The error says what to give, and the model is as it was."""
    data, error, message = WRONG[case]
    model = model_of("subclass")
    modules = list(model.modules())
    with pytest.raises(error, match=message):
        adapt(model, "lora", target_modules=BOTH, r=R, init="loftq", data=data, progress=False)
    assert list(model.modules()) == modules


def test_refused_without_a_base_or_a_scale() -> None:
    """A plain matrix has lost nothing, a scale of 0 makes up for nothing."""
    own = {"r": R, "init": "loftq", "data": original(), "progress": False}
    mixed: Any = model_of("subclass")
    mixed.second = nn.Linear(H, D)
    with pytest.raises(ValueError, match=r"second: init='loftq' .*exclude_modules, or take"):
        adapt(mixed, "lora", target_modules=BOTH, **own)
    adapt(mixed, "lora", target_modules=BOTH, exclude_modules=["second"], **own)
    with pytest.raises(ValueError, match=r"alpha 0 or below: .*Give an alpha above 0"):
        adapt(model_of("subclass"), "lora", target_modules=BOTH, alpha=0.0, **own)
    with pytest.raises(ValueError, match="cannot be put off by defer_bases"):
        adapt(model_of("subclass"), "lora", target_modules=BOTH, defer_bases=True, **own)


def test_refused_files(tmp_path: Path) -> None:
    """Folders that have no weights, or several of one name, and what is no safetensors."""
    cases: dict[str, str] = {}

    def case(name: str, message: str) -> Path:
        cases[name] = message
        (tmp_path / name).mkdir()
        return tmp_path / name

    (case("empty", "has no safetensors: load the model in 16 bits") / "model.bin").touch()
    twice = case("twice", "first.weight is in a.safetensors and in b.safetensors: give one file")
    for name in "ab":
        save_file({"first.weight": torch.zeros(1)}, twice / f"{name}.safetensors")
    (case("broken", "is no file of safetensors") / "model.safetensors").write_bytes(b"\x00" * 9)
    index = case("index", "is no index of shards") / "model.safetensors.index.json"
    index.write_text("[]")
    lost = sharded(tmp_path / "lost", state())
    (lost / "shard-0.safetensors").unlink()
    cases["lost"] = "shard-0.safetensors is no file of safetensors"
    two = case("two", "has 2 indices of shards: give one")
    for name in ("model", "other"):
        (two / f"{name}.safetensors.index.json").write_text("{}")
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            started("subclass", tmp_path / name)


# --- PEFT's ---


class OnCpu(Tensor):
    """A tensor that stays on a CPU, where PEFT asks for a GPU."""

    def to(self, *args: Any, **keywords: Any) -> Tensor:
        """As a Tensor's, but for the device."""
        keywords.pop("device", None)
        return self.as_subclass(Tensor).to(*args, **keywords)


@pytest.mark.parametrize("case", [pytest.param("nf4", marks=needs("bitsandbytes"))])
def test_as_peft_s(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ΔW as PEFT's, which reads the same file, under its own scale of 1."""
    peft = pytest.importorskip("peft")
    from peft.utils import loftq_utils

    assert case in KINDS
    save_file(state(), tmp_path / "model.safetensors")
    read = loftq_utils._SafetensorLoader.get_tensor
    monkeypatch.setattr(
        loftq_utils._SafetensorLoader,
        "get_tensor",
        lambda self, name: read(self, name).as_subclass(OnCpu),
    )
    base: Any = model_of(case)
    base.is_loaded_in_4bit = True
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=R, lora_alpha=R, target_modules=BOTH)
    )
    peft.replace_lora_weights_loftq(theirs, str(tmp_path))
    ours = started(case, tmp_path, alpha=None)
    for name in BOTH:
        layer = theirs.base_model.model.get_submodule(name)
        expected = layer.get_delta_weight("default")
        found = getattr(ours, name).delta_weight()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert expected.norm() > 0
