"""PEFT: adapters come whole or not at all, under any name, and change nothing of the others."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import OutOfMemoryError, everything, failing
from peft_cases import (
    CONFIGS,
    config,
    every_method,
    integration,
    layers,
    methods,
    mlp,
    peft,
    same,
    state,
)
from peft_state_cases import logits, of, x
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = "adapter_model.safetensors"
FAILURES = (OSError, RuntimeError, ValueError, SafetensorError)  # of whoever notices first
LAYER = integration.model.PeftLowRankLinear


def whole(model: Any) -> list[Any]:
    """All of a PeftModel that a failure could change."""
    names = list(model.peft_config), model.active_adapters, repr(model)
    own = [(n, dict(m.scaling), dict(m.sides)) for n, m in layers(model).items()]
    return [names, own, model.base_model.targeted_module_names, *everything(model)]


# --- names ---


@methods
@pytest.mark.parametrize(
    "name",
    ["v1.0", "train", "type", "keys", "pop", "stays", "training", "", "/a", "..", "__base__"],
)
def test_bad_names(method: str, name: Any, tmp_path: Path) -> None:
    """They are refused in every way in, and everything goes on as before."""
    base = mlp()
    before = everything(base)
    with pytest.raises(ValueError, match="adapter_name is"):
        peft.get_peft_model(base, config(method), adapter_name=name)
    assert everything(base) == before
    model = of(method)
    model.save_pretrained(tmp_path)
    before = whole(model)
    ways: list[Callable[[], Any]] = [
        lambda: model.add_adapter(name, config(method)),
        lambda: model.load_adapter(tmp_path, name),
        lambda: model.base_model.add_weighted_adapter(["default"], [1.0], name),
        lambda: peft.inject_adapter_in_model(config(method), base, name),
        lambda: peft.PeftModel.from_pretrained(base, tmp_path, name),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="adapter_name is"):
            way()
    assert whole(model) == before
    model.add_adapter("fine", config(method))
    model.base_model.add_weighted_adapter(["default", "fine"], [1.0, 1.0], "mixed")
    repr(model)
    model(x(), adapter_names=["fine", "default", "mixed"] * 2)


class Attention(nn.Module):
    """Modules whose names are adapters' and factors' as well."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.core, self.default = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.default(self.core(self.q_proj(x)))


def nested() -> nn.Module:
    """The same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Module()
        model.attention, model.head = Attention(), nn.Linear(12, 4)
        model.forward = lambda x: model.head(model.attention(x))
        return model.double().eval()


NAMES = ("q_proj", "head", "basis_down", "core", "weight", "base_layer", "a/b", "proj")


@methods
@pytest.mark.parametrize("saved", [None, "head", "core"])
@pytest.mark.parametrize("name", [*NAMES, "lora_xs_core", "lora_mini_a_train", "bias", "attention"])
def test_names_of_modules(method: str, saved: str | None, name: str, tmp_path: Path) -> None:
    """An adapter called as a module or a factor comes back from its file under any name, and does
    nothing to the file of another.
    """

    def settings() -> Any:
        modules = None if saved is None else [saved]
        return config(method, target_modules=["q_proj", "default"], modules_to_save=modules)

    model = peft.get_peft_model(nested(), settings()).eval()
    for other in (name, "last"):
        model.add_adapter(other, settings())
    for key, parameter in model.named_parameters():
        if "modules_to_save." in key:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    for own, folder in (
        ("default", tmp_path),
        (name, tmp_path / name),
        ("last", tmp_path / "last"),
    ):
        wanted = logits(model, own)
        for new in ("default", name):
            loaded = peft.PeftModel.from_pretrained(nested(), folder, new)
            torch.testing.assert_close(loaded(x()), wanted, rtol=1e-10, atol=1e-10)


@every_method
def test_what_is_trained_stays_trained(method: str) -> None:
    """An adapter that is added under a module's name freezes nothing of the one in training."""
    targets = {"target_modules": ["q_proj"]}
    model = peft.get_peft_model(nested(), config(method, **targets)).train()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    assert any(before.values())
    model.add_adapter("q_proj", config(method, inference_mode=True, **targets))
    assert all(model.get_parameter(n).requires_grad == r for n, r in before.items())


def test_modules_to_save_that_end_as_a_factor(tmp_path: Path) -> None:
    """Of modules_to_save "core" is a module of that name, and no lora_xs_core."""
    given = config("lora_xs", target_modules=["q_proj"], modules_to_save=["core"])
    model = peft.get_peft_model(nested(), given).eval()
    assert type(model.base_model.model.attention.core).__name__ == "ModulesToSaveWrapper"
    core = model.base_model.model.attention.q_proj.lora_xs_core
    assert isinstance(core, nn.ParameterDict)
    names = [name for name, _ in model.named_modules()]
    assert any(name.endswith("q_proj.base_layer") for name in names)


# --- failures ---


def damaged(folder: Path, kind: str) -> None:
    """Make an adapter's folder one that cannot be loaded."""
    file = folder / WEIGHTS
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    elif kind == "shape":
        tensors = load_file(file)
        key = next(k for k in tensors if k.endswith(("core", "b_train")))
        save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, file, {"format": "pt"})
    elif kind == "head":
        tensors = load_file(file)
        key = next(k for k in tensors if k.endswith("head.weight"))
        save_file({**tensors, key: tensors[key][:-1].contiguous()}, file, {"format": "pt"})


@methods
@pytest.mark.parametrize("kind", ["missing", "truncated", "shape", "head", "another base"])
@pytest.mark.parametrize("name", ["new", "default"])
def test_refused_files(method: str, kind: str, name: str, tmp_path: Path) -> None:
    """Neither the adapter nor anything else of it is there afterwards; nor in a plain model."""
    base = mlp()
    if kind == "another base":
        nn.init.normal_(base.lin1.weight)
    settings = {"modules_to_save": ["head"], "target_modules": ["lin0", "lin1", "conv"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        peft.get_peft_model(base, config(method, **settings)).save_pretrained(tmp_path)
        damaged(tmp_path, kind)
        model = of(method, **({} if name == "new" else settings))
        y, before = model(x()), whole(model)
        with pytest.raises(FAILURES):
            model.load_adapter(tmp_path, name)
        assert whole(model) == before
        assert torch.equal(model(x()), y)
        with pytest.raises(ValueError, match="nope"):
            model.set_adapter("nope")
        plain = mlp()
        before = everything(plain)
        with pytest.raises(FAILURES):
            peft.PeftModel.from_pretrained(plain, tmp_path)
    assert everything(plain) == before


@methods
@pytest.mark.parametrize("way", ["get", "add", "mix", "load", "load over", "inject"])
@pytest.mark.parametrize("at", [1, 2])
def test_out_of_memory(
    method: str, way: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it ends, in the first layer or the second, the model is as it was."""
    of(method).save_pretrained(tmp_path)
    base, model = mlp(), of(method)
    model.add_adapter("b", given := config(method))
    ways: dict[str, tuple[Any, str, Callable[[], Any]]] = {
        "get": (LAYER, "update_layer", lambda: peft.get_peft_model(base, given)),
        "inject": (LAYER, "update_layer", lambda: peft.inject_adapter_in_model(given, base, "a")),
        "add": (LAYER, "update_layer", lambda: model.add_adapter("c", given)),
        "mix": (
            torch.Tensor,
            "copy_",
            lambda: model.base_model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c"),
        ),
        "load": (torch.Tensor, "copy_", lambda: model.load_adapter(tmp_path, "c")),
        "load over": (torch.Tensor, "copy_", lambda: loaded.load_adapter(tmp_path, "default")),
    }
    loaded = of(method)
    before = [whole(model), whole(loaded), everything(base)]
    owner, name, call = ways[way]
    with monkeypatch.context() as patch:
        failing(patch, owner, name, at)
        with pytest.raises((OutOfMemoryError, RuntimeError)):
            call()
    assert [whole(model), whole(loaded), everything(base)] == before
    call()


@methods
def test_set_adapter_of_what_is_not_there(method: str) -> None:
    """The tuner's own refuses it too, of a list before any of it is set."""
    model = of(method)
    model.add_adapter("b", config(method))
    before = whole(model)
    for names in ("nope", ["b", "nope"]):
        with pytest.raises(ValueError, match="nope not found: there are default, b"):
            model.base_model.set_adapter(names)
    assert whole(model) == before
    model.base_model.set_adapter(["default", "b"])


# --- state_dicts ---


@methods
@pytest.mark.parametrize("names", [["default"], ["default", "b"]])
@pytest.mark.parametrize("seed", [7, 8])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_of_a_merged_model(
    method: str, names: list[str], seed: int, assign: bool, tmp_path: Path
) -> None:
    """ΔW goes once into a model that is not merged; one that is refuses other weights."""

    def fresh(base: nn.Module) -> Any:
        model = peft.get_peft_model(base, config(method, target_modules=["lin0", "conv"])).eval()
        model.add_adapter("b", config(method, target_modules=["lin0"], lora_alpha=3.0))
        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = fresh(mlp())
        model.base_model.set_adapter(names)
        y, unmerged = model(x()), state(model)
        model.merge_adapter()
        save_file({k: v.contiguous() for k, v in state(model).items()}, tmp_path / "file")
        tensors, base = load_file(tmp_path / "file"), mlp()
        if seed == 8:
            nn.init.normal_(base.lin0.weight)
        other = fresh(base)
        result = other.load_state_dict(tensors, strict=True, assign=assign)
        assert not result.missing_keys + result.unexpected_keys
        other.base_model.set_adapter(names)
        torch.testing.assert_close(other(x()), y, rtol=1e-10, atol=1e-10)
        for key, value in unmerged.items():
            torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-12, atol=1e-12)
        before = everything(model)
        with pytest.raises(RuntimeError, match="is merged: unmerge it"):
            model.load_state_dict(unmerged)
        assert everything(model)[3] == before[3]
        lacking = {k: v for k, v in tensors.items() if not k.endswith("basis_down")}
        with pytest.raises(RuntimeError, match="merged into it"):
            fresh(mlp()).load_state_dict(lacking, strict=False)
        copied = copy.deepcopy(model)
        copied.unmerge_adapter()
        torch.testing.assert_close(copied(x()), y, rtol=1e-10, atol=1e-10)


@methods
def test_factors_that_adapters_share(method: str) -> None:
    """A state_dict does not give the factors of one adapter to the others of a layer."""
    model, base = of(method), mlp()
    nn.init.normal_(base.lin0.weight)
    model.add_adapter("b", config(method))
    other = peft.get_peft_model(base, config(method, projection_seed=5))
    y = logits(model, "b")
    tensors = {k: v for k, v in other.state_dict().items() if ".base_layer." not in k}
    with pytest.raises(ValueError, match=r"lin0 would get another basis_down .* b share"):
        model.load_state_dict(tensors, strict=False)
    assert torch.equal(logits(model, "b"), y)
    alone = of(method)
    alone.load_state_dict(tensors, strict=False)
    name = "base_model.model.lin0.basis_down"
    assert torch.equal(alone.state_dict()[name], tensors[name])
    with pytest.raises(ValueError, match=r"lin0 would get another basis_down .* default share"):
        model.base_model.model.lin0.basis_down = nn.Parameter(tensors[name])  # one by one


@methods
def test_transformers_refuses_as_well(method: str, tmp_path: Path) -> None:
    """Its own load_adapter and add_adapter: another base, another pair, a bad name."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    of_transformers = transformers.LlamaConfig(vocab_size=32, **sizes, **heads)

    def llama(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(of_transformers).eval()

    def given() -> Any:
        return config(method, target_modules=["q_proj"])

    ids = torch.arange(6)[None]
    here = peft.get_peft_model(llama(), given()).eval()
    here.save_pretrained(tmp_path / "here")
    peft.get_peft_model(llama(5), given()).save_pretrained(tmp_path / "there")
    y = here(ids).logits
    model = llama()
    before = everything(model)
    with pytest.raises(ValueError, match="trained on another base model"):
        model.load_adapter(str(tmp_path / "there"), adapter_name="there")
    with pytest.raises(ValueError, match="adapter_name is 'v1"):
        model.add_adapter(given(), "v1.0")
    assert everything(model) == before
    model.load_adapter(str(tmp_path / "here"), adapter_name="here")
    torch.testing.assert_close(model(ids).logits, y)
    before = everything(model)
    with pytest.raises(ValueError, match="another"):
        model.load_adapter(str(tmp_path / "there"), adapter_name="there")
    assert everything(model) == before
    assert list(model.peft_config) == ["here"]
    assert same(state(model), state(model))
    assert CONFIGS[method] is type(model.peft_config["here"])


# --- the base, where biases are trained ---


@methods
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("how", ["plain", "merged", "copied", "file", "float32"])
def test_base_of_trained_biases(method: str, bias: str, how: str, tmp_path: Path) -> None:
    """Disabled and unloaded it is the base model; merged and unloaded it keeps what it learned."""
    base, dtype = mlp(), torch.float32 if how == "float32" else torch.float64
    model = peft.get_peft_model(base, config(method, bias=bias))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(x()).square().sum().backward()
        optimiser.step()
    model.eval()
    if how == "merged":
        model.merge_adapter()
    elif how == "copied":
        model = copy.deepcopy(model)
    elif how == "file":
        model.save_pretrained(tmp_path)
        model = peft.PeftModel.from_pretrained(mlp(), tmp_path)
    model.to(dtype)
    tokens, plain = x().to(dtype), mlp().to(dtype)
    trained = model(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-6, atol=1e-6)
            with model.disable_adapter():
                torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(tokens), trained, rtol=1e-5, atol=1e-5)
    kept = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(kept(tokens), trained, rtol=1e-5, atol=1e-5)
    assert same(state(model.unload()), state(plain))
