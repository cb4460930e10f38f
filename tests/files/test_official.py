"""Checkpoints of the LoRA-XS authors' code, built here by their formula."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch, targets, tiny
from official_cases import PREFIX, STRIPPED, settings, state_of, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from fused_lowrank import adapt, load_official_lora_xs, merge
from fused_lowrank.methods import FusedLoraXSLinear, LoraXSLinear

R, ALPHA, K, N = 3, 6.0, 10, 8
KEPT = "{}.default_lora_latent_mapping.weight"  # as later versions do


class TheirLinear(nn.Module):
    """y = x·Wᵀ + bias + scaling · ((x·Aᵀ)·Rᵀ)·Bᵀ"""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, r: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.r, self.scaling = base, a, b, r, scaling

    def forward(self, x: Tensor) -> Tensor:
        low = linear(linear(linear(x, self.a), self.r), self.b)
        return self.base(x) + low * self.scaling


def theirs(
    model: nn.Module, state: dict[str, Tensor], names: list[str], scaling: float
) -> nn.Module:
    """The model as the authors' code runs it."""
    model = copy.deepcopy(model)
    for name in names:
        parts = (f"{name}.lora_A.weight", f"{name}.lora_B.weight", STRIPPED.format(name))
        factors = [state[PREFIX + part] for part in parts]
        parent = model.get_submodule(name.rpartition(".")[0])
        layer = TheirLinear(model.get_submodule(name), *factors, scaling)
        setattr(parent, name.rpartition(".")[2], layer)
    return model


def base() -> nn.Module:
    """A small model, the same at every call."""
    generator, model = torch.Generator().manual_seed(5), nn.Sequential()
    for name, module in (
        ("a", nn.Linear(K, N)),
        ("b", nn.Linear(N, K)),
        ("score", nn.Linear(K, 2)),
    ):
        model.add_module(name, module.double())
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


def checkpoint(tmp_path: Path, **more: Any) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of `base()`, and its tensors."""
    torch.manual_seed(11)
    state = state_of(base(), ["a", "b"], R)
    return write(tmp_path / "theirs", state, settings(R, ALPHA, **more)), state


def x_of() -> Tensor:
    """An input."""
    return torch.randn(4, K, dtype=torch.float64)


def picture(model: nn.Module) -> list[object]:
    """All that a refused file could change."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    return [modules, parameters, [(n, v.tolist()) for n, v in model.state_dict().items()]]


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of operations in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# --- loading ---


@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_agrees(name: str, tmp_path: Path) -> None:
    """A transformers model computes what the authors' code does, their bases unchanged."""
    torch.manual_seed(2)
    model, inputs = tiny(name).double(), batch(name, 7)
    ends = targets(name) if name == "llama" else ["query", "value", "attention.output.dense"]
    names = [n for n, _ in model.named_modules() if n.endswith(tuple(f".{e}" for e in ends))]
    state = state_of(model, names, 4)
    expected = theirs(model, state, names, 4.0)
    head = {}
    if name == "roberta":  # trained whole, though the config does not say so
        head = {n: torch.randn_like(p) for n, p in model.classifier.state_dict().items()}
        expected.classifier.load_state_dict(head)
    keys = {f"{PREFIX}classifier.{key}": value for key, value in head.items()}
    folder = write(tmp_path / "theirs", {**state, **keys}, settings(4, 16))
    with torch.no_grad():
        plain = model(**inputs).logits
        assert load_official_lora_xs(model, folder, progress=False) is model
        ours, wanted = model(**inputs).logits, expected(**inputs).logits
    close(ours, wanted)
    assert not torch.allclose(ours, plain, rtol=1e-2)
    layer = model.get_submodule(names[0])
    assert torch.equal(layer.down, state[f"{PREFIX}{names[0]}.lora_A.weight"])
    assert torch.equal(layer.up, state[f"{PREFIX}{names[0]}.lora_B.weight"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.core" for n in names} | {f"classifier.{key}" for key in head}


def to_bin(folder: Path) -> None:
    """As older versions saved it."""
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


def to_kept(folder: Path) -> None:
    """The latent mapping's key with `.default`."""
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    for name in ("a", "b"):
        state[PREFIX + KEPT.format(name)] = state.pop(PREFIX + STRIPPED.format(name))
    save_file(state, file)


def to_whole(folder: Path, **changed: Tensor) -> None:
    """A state_dict of the whole PEFT model."""
    to_kept(folder)
    state = load_file(folder / "adapter_model.safetensors")
    whole = {key.replace(".lora_A", ".lora_A.default"): value for key, value in state.items()}
    whole = {key.replace(".lora_B", ".lora_B.default"): value for key, value in whole.items()}
    for key, value in base().state_dict().items():
        layer, _, part = key.rpartition(".")
        if layer == "score":  # trained whole
            whole[f"{PREFIX}score.original_module.{part}"] = value
            whole[f"{PREFIX}score.modules_to_save.default.{part}"] = -value
        else:
            whole[f"{PREFIX}{layer}.base_layer.{part}"] = changed.get(key, value)
    whole[f"{PREFIX}old.inv_freq"] = torch.ones(3)  # of a version of the model that had it
    torch.save(whole, folder / "pytorch_model.bin")
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("form", [None, to_bin, to_kept, to_whole])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_forms(form: Any, adapted: bool, fused: bool, tmp_path: Path) -> None:
    """Every kind of file, into a plain model and into an adapted one."""
    folder, state = checkpoint(tmp_path)
    if form is not None:
        form(folder)
    model = base()
    if adapted:
        whole = ["score"] if form is to_whole else []
        more = {"r": R, "alpha": ALPHA, "fused": fused, "modules_to_save": whole}
        adapt(model, target_modules=["a", "b"], progress=False, **more)
        layer = model.a
    load_official_lora_xs(model, folder, fused=fused, progress=False)
    assert type(model.a) is (FusedLoraXSLinear if fused else LoraXSLinear)
    assert model.a is layer if adapted else model.a.svd == "randomized"
    x = x_of()
    expected = theirs(base(), state, ["a", "b"], ALPHA / R)(x)
    close(model(x), -expected if form is to_whole else expected)
    assert torch.equal(model.a.core, state[PREFIX + STRIPPED.format("a")].t())


def test_file_itself_and_rslora(tmp_path: Path) -> None:
    """The file in place of its folder; a scaling of alpha / √r."""
    folder, state = checkpoint(tmp_path, use_rslora=True)
    model = load_official_lora_xs(base(), folder / "adapter_model.safetensors", progress=False)
    x = x_of()
    close(model(x), theirs(base(), state, ["a", "b"], ALPHA / math.sqrt(R))(x))


@pytest.mark.parametrize("place", ["theirs", "."])
def test_random_bases(place: str, tmp_path: Path) -> None:
    """Are those of any weight: only the file beside the checkpoint, or above, tells them apart."""
    state = state_of(base(), ["a"], R, random=True)
    folder = write(tmp_path / "theirs", state, settings(R, ALPHA))
    with pytest.raises(ValueError, match="another base model: lora_A and lora_B of a"):
        load_official_lora_xs(base(), folder)
    how = {"reconstruction_type": "svd", "replacement_module_random_init": True}
    (tmp_path / place / "reconstr_config.json").write_text(json.dumps(how))
    model = load_official_lora_xs(base(), folder, progress=False)
    x = x_of()
    close(model(x), theirs(base(), state, ["a"], ALPHA / R)(x))


def test_bf16_base(tmp_path: Path) -> None:
    """Rounded bases are known again; R stays in fp32."""
    model = base().bfloat16()
    state = {k: v.bfloat16() for k, v in state_of(base(), ["a", "b"], R).items()}
    for name in ("a", "b"):
        state[PREFIX + STRIPPED.format(name)] = torch.randn(R, R)
    folder = write(tmp_path / "theirs", state, settings(R, ALPHA))
    load_official_lora_xs(model, folder, progress=False)
    assert (model.a.core.dtype, model.a.down.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(model.b.core, state[PREFIX + STRIPPED.format("b")].t())


# --- what is refused ---

State = dict[str, Tensor]
FILES: dict[str, tuple[Callable[[State, dict[str, Any]], Any], str]] = {
    "no A": (lambda s, c: s.pop(f"{PREFIX}a.lora_A.weight"), r"lacks a\.lora_A\.weight"),
    "no B": (lambda s, c: s.pop(f"{PREFIX}b.lora_B.weight"), r"lacks b\.lora_B\.weight"),
    "no R": (lambda s, c: s.pop(PREFIX + STRIPPED.format("a")), r"lacks a_lora_latent_mapping"),
    "lora": (
        lambda s, c: [s.pop(PREFIX + STRIPPED.format(name)) for name in "ab"],
        "is no LoRA-XS checkpoint",
    ),
    "other rank": (lambda s, c: c.update(r=2), r"a\.down is \(3, 10\) there and \(2, 10\) here"),
    "rank too high": (lambda s, c: c.update(r=64), "a: r is 64"),
    "no r": (lambda s, c: c.pop("r"), "cannot be read"),
    "no alpha": (lambda s, c: c.pop("lora_alpha"), "cannot be read"),
    "shape": (
        lambda s, c: s.update({f"{PREFIX}a.lora_A.weight": torch.ones(R, K + 1)}),
        r"a\.down is \(3, 11\) there and \(3, 10\) here",
    ),
    "vector": (
        lambda s, c: s.update({PREFIX + STRIPPED.format("a"): torch.ones(R, R, R)}),
        r"a\.core is \(3, 3, 3\)",
    ),
    "integers": (
        lambda s, c: s.update({f"{PREFIX}a.lora_B.weight": torch.ones(N, R, dtype=torch.int8)}),
        r"a\.up is of torch\.int8",
    ),
    "no such module": (
        lambda s, c: [s.update({k.replace(".a", ".z"): s.pop(k)}) for k in list(s) if ".a" in k],
        "adapts z, but this model has no such module",
    ),
    "other bases": (
        lambda s, c: s[f"{PREFIX}b.lora_A.weight"].mul_(1.1),
        "another base model: lora_A and lora_B of b",
    ),
    "unexpected": (
        lambda s, c: s.update({f"{PREFIX}n.bias": torch.ones(1)}),
        r"unexpected n\.bias",
    ),
    "no head": (
        lambda s, c: s.update({f"{PREFIX}classifier.bias": torch.ones(1)}),
        "holds classifier, but this model has no such module",
    ),
    "half a head": (
        lambda s, c: s.update({f"{PREFIX}score.bias": torch.ones(2)}),
        r"lacks score\.weight",
    ),
    "dora": (lambda s, c: c.update(use_dora=True), "use_dora is True"),
    "ranks": (
        lambda s, c: c.update(rank_pattern={"a": 2}),
        r"does not fit .*a\.down is \(3, 10\) there and \(2",
    ),
    "bias": (lambda s, c: c.update(bias="all"), "bias is 'all'"),
}


def test_patterns(tmp_path: Path) -> None:
    """Layers may have a rank, and an alpha, of their own."""
    state = {**state_of(base(), ["a"], 2), **state_of(base(), ["b"], R)}
    config = settings(R, ALPHA, rank_pattern={"a": 2}, alpha_pattern={"b": 7.0})
    model = load_official_lora_xs(base(), write(tmp_path / "theirs", state, config), progress=False)
    assert [(m.r, m.scale) for m in (model.a, model.b)] == [(2, ALPHA / 2), (R, 7.0 / R)]
    for name, layer in (("a", model.a), ("b", model.b)):
        core = state[PREFIX + STRIPPED.format(name)]
        down, up = (state[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(layer.delta_weight(), layer.scale * up @ core @ down)


def refused(model: nn.Module, folder: Path, message: str) -> None:
    """A ValueError, and the model is as it was."""
    model[0].weight.requires_grad_(False)
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        load_official_lora_xs(model, folder, progress=False)
    assert picture(model) == before


@pytest.mark.parametrize("case", FILES)
def test_refused_file(case: str, tmp_path: Path) -> None:
    """A damaged or foreign checkpoint."""
    change, message = FILES[case]
    state, config = state_of(base(), ["a", "b"], R), settings(R, ALPHA)
    change(state, config)
    refused(base(), write(tmp_path / "theirs", state, config), message)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_truncated(kind: str, tmp_path: Path) -> None:
    """In both formats."""
    folder, _ = checkpoint(tmp_path)
    if kind == "bin":
        to_bin(folder)
    file = folder / f"adapter_model.{kind}"
    file.write_bytes(file.read_bytes()[:-100])
    refused(base(), folder, "is truncated")


def test_code_is_not_run(tmp_path: Path) -> None:
    """A pickle with more than tensors in it is refused, and so is one that holds something else."""
    folder, state = checkpoint(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    file = folder / "adapter_model.bin"
    torch.save({**state, "run": base()}, file)
    refused(base(), folder, "is truncated, or holds no tensors alone")
    torch.save([1], file)
    refused(base(), folder, "holds no state_dict")


def test_missing_files(tmp_path: Path) -> None:
    """Named, with what is in them."""
    folder, _ = checkpoint(tmp_path)
    (folder / "adapter_config.json").write_text("{")
    refused(base(), folder, r"adapter_config\.json cannot be read")
    (folder / "adapter_config.json").unlink()
    refused(base(), folder, r"has no adapter_config\.json beside it")
    (folder / "adapter_model.safetensors").unlink()
    refused(base(), folder, "has none of adapter_model")
    with pytest.raises(FileNotFoundError):
        load_official_lora_xs(base(), tmp_path / "nothing.safetensors")


def other_base() -> nn.Module:
    """Of the same shapes."""
    model = base()
    nn.init.normal_(model.b.weight)
    return model


def adapted(**keywords: Any) -> nn.Module:
    """An adapted model."""
    keywords = {"target_modules": ["a", "b"], "r": R, "alpha": ALPHA, **keywords}
    return adapt(base(), progress=False, **keywords)


MODELS = {
    "other base": (other_base, "another base model: lora_A and lora_B of b"),
    "meta": (lambda: base().to("meta"), "meta device"),
    "other layers": (lambda: adapted(target_modules=["a"]), "b is not adapted here"),
    "other method": (lambda: adapted(method="lora"), "a is lora here and lora_xs there"),
    "other rank": (lambda: adapted(r=2), r"a\.down is \(3, 10\) there and \(2, 10\) here"),
    "other alpha": (lambda: adapted(alpha=1.0), "alpha and train of a are 1.0"),
    "other head": (lambda: adapted(modules_to_save=["score"]), "modules_to_save are"),
    "merged": (lambda: merge(adapted()), "a is merged"),
}


@pytest.mark.parametrize("case", MODELS)
def test_refused_by_model(case: str, tmp_path: Path) -> None:
    """A model that the checkpoint is not for."""
    make, message = MODELS[case]
    folder, _ = checkpoint(tmp_path)
    model = make()
    if case == "meta":
        with pytest.raises(ValueError, match=message):
            load_official_lora_xs(model, folder, progress=False)
        return
    refused(model, folder, message)


def test_whole_state_dict_and_meta(tmp_path: Path) -> None:
    """There is nothing to compare; what is missing is said."""
    folder, _ = checkpoint(tmp_path)
    to_whole(folder)
    with pytest.raises(ValueError, match="meta device"):
        load_official_lora_xs(base().to("meta"), folder)


@pytest.mark.parametrize("key", ["a.weight", "b.bias"])
def test_other_base_in_a_whole_state_dict(key: str, tmp_path: Path) -> None:
    """All of the base's tensors are compared, where they are there."""
    folder, _ = checkpoint(tmp_path)
    to_whole(folder, **{key: base().state_dict()[key] + 1})
    refused(base(), folder, f"another base model: {key} differs")
