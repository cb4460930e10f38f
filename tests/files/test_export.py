"""export_lora: what PEFT loads from it computes what the adapted model did."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch, targets, tiny
from bank_cases import KINDS, bank_of, kinds, model_of, x_of
from safetensors.torch import load_file
from torch import Tensor, nn

from fused_lowrank import adapt, disable_adapters, export_lora, load_adapter, save_adapter, unload
from fused_lowrank.files.lora_export import of_bank
from fused_lowrank.methods import LowRankLinear
from fused_lowrank.testing import Measured

peft = pytest.importorskip("peft")

SETTINGS = {"lora": {"r": 4}, "lora_xs": {"r": 4}, "lora_mini": {"r": 2, "a": 6, "b": 4}}
PREFIX = "base_model.model."


def trained(name: str, method: str, **keywords: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model after a few steps, in fp64, and an input without labels."""
    torch.manual_seed(3)
    model, inputs = tiny(name).double(), batch(name, 7)
    settings = {"alpha": 3.0, **SETTINGS[method], **keywords}
    adapt(model, method, target_modules=targets(name), progress=False, **settings)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(**inputs).loss.backward()
        optimiser.step()
    if name != "t5":
        del inputs["labels"]
    return model, inputs


def base_of(name: str) -> nn.Module:
    """The model before it was adapted."""
    torch.manual_seed(3)
    return tiny(name).double()


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Without gradients."""
    with torch.no_grad():
        return model(**inputs).logits


def loaded(base: nn.Module, folder: Path) -> nn.Module:
    """PEFT's model of a folder; PEFT warns of keys that are missing or too many."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(base, folder).eval()


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of operations in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def config_in(folder: Path) -> dict[str, Any]:
    """The config that was written."""
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """The tensors that were written."""
    return load_file(folder / "adapter_model.safetensors")


# --- the same outputs ---


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "roberta", "t5"])
def test_same_logits(name: str, method: str, tmp_path: Path) -> None:
    """In fp64, by PEFT, of a model trained here; and the rank is the smallest."""
    more = {"modules_to_save": ["classifier"]} if name == "roberta" else {}
    model, inputs = trained(name, method, **more)
    expected = logits(model, inputs)
    assert not torch.allclose(expected, logits(base_of(name), inputs), rtol=1e-3)
    export_lora(model, tmp_path)
    other = loaded(base_of(name), tmp_path)
    close(logits(other, inputs), expected)
    config = config_in(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (SETTINGS[method]["r"], 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] == more.get("modules_to_save")
    if name == "llama":
        assert config["target_modules"] == sorted(targets(name))
    close(logits(other.merge_and_unload(), inputs), expected)


def test_error_in_fp32(tmp_path: Path) -> None:
    """An fp32 model's export is as far from fp64 as the model itself."""
    model, inputs = trained("llama", "lora_xs")
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    truth = logits(model, inputs)
    handle.remove()
    # What the rounding of the last product's operands alone can do.
    floor = 2 * 2**-24 * (seen[0].abs() @ model.lm_head.weight.abs().t()).norm()
    ours = logits(model.float(), inputs)
    export_lora(model, tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in tensors_in(tmp_path).values())
    theirs = logits(loaded(base_of("llama").float(), tmp_path), inputs)
    errors = (float((result.double() - truth).norm()) for result in (theirs, ours))
    measured = Measured("logits", truth.numel(), *errors, float(floor))
    assert measured.within, measured


def test_keys_are_those_of_peft(tmp_path: Path) -> None:
    """What PEFT itself would write of such an adapter: the same keys and shapes."""
    model, _ = trained("roberta", "lora_xs", modules_to_save=["classifier"])
    export_lora(model, tmp_path / "ours")
    own = peft.LoraConfig(r=4, target_modules=targets("roberta"), modules_to_save=["classifier"])
    peft.get_peft_model(base_of("roberta"), own).save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}
    named = set(config_in(tmp_path / "theirs"))
    assert set(config_in(tmp_path / "ours")) <= named


def test_trained_biases(tmp_path: Path) -> None:
    """As PEFT's bias="lora_only"."""
    model, inputs = trained("roberta", "lora_xs", train=("core", "bias"))
    expected = logits(model, inputs)
    export_lora(model, tmp_path)
    assert config_in(tmp_path)["bias"] == "lora_only"
    close(logits(loaded(base_of("roberta"), tmp_path), inputs), expected)


@kinds
def test_from_a_bank(kind: str, tmp_path: Path) -> None:
    """By name; with the adapter's own alpha, however the bank stores it."""
    model, bank = bank_of(kind, 3, "ab")
    export_lora(bank, tmp_path, name="b")
    x, expected = x_of(5), model_of(kind, 2)
    base = unload(model_of(kind))
    with torch.no_grad():
        close(loaded(base, tmp_path)(x), expected(x))
    assert config_in(tmp_path)["r"] == KINDS[kind]["r"]
    del model


def test_from_a_bank_of_wide_products(tmp_path: Path) -> None:
    """A core with more rows than columns goes to A."""
    settings = {"r": 4, "a": 8, "b": 5}
    _, bank = bank_of("products", 1, **settings)
    assert bank.store.tables["first"].right is None
    bank.add("a", model_of("products", 1, **settings))
    export_lora(bank, tmp_path, name="a")
    x = x_of(5)
    with torch.no_grad():
        expected = model_of("products", 1, **settings)(x)
        close(loaded(unload(model_of("products")), tmp_path)(x), expected)
    assert config_in(tmp_path)["r"] == 5


@kinds
def test_bank_that_changes_meanwhile(kind: str) -> None:
    """What is exported is the adapter as it was, whoever has its slot now."""
    _, bank = bank_of(kind, 1, "a")
    cores = [part.core for part in of_bank(bank, "a").parts.values()]
    parts = [part for core in cores for part in (core if isinstance(core, tuple) else (core,))]
    before = [part.clone() for part in parts]
    bank.remove("a")
    bank.add("b", model_of(kind, 2))
    assert all(map(torch.equal, parts, before))


@pytest.mark.parametrize("method", SETTINGS)
def test_from_a_file(method: str, tmp_path: Path) -> None:
    """Of save_adapter, without the model: the same tensors, and all of a layer's name."""
    model, inputs = trained("roberta", method, modules_to_save=["classifier"])
    save_adapter(model, tmp_path / "file")
    export_lora(tmp_path / "file", tmp_path / "of file")
    export_lora(model, tmp_path / "of model")
    of_file, of_model = tensors_in(tmp_path / "of file"), tensors_in(tmp_path / "of model")
    assert of_file.keys() == of_model.keys()
    assert all(torch.equal(of_file[key], of_model[key]) for key in of_file)
    expected = logits(model, inputs)
    close(logits(loaded(base_of("roberta"), tmp_path / "of file"), inputs), expected)


# --- what the folder says ---


def sequence(**layers: nn.Module) -> nn.Sequential:
    """Modules one after the other, by name, with the same values at every call."""
    generator, model = torch.Generator().manual_seed(1), nn.Sequential()
    for name, module in layers.items():
        model.add_module(name, module)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model.double()


def mixed() -> nn.Sequential:
    """Two linears."""
    return sequence(a=nn.Linear(8, 6), b=nn.Linear(6, 8))


def test_layers_that_differ(tmp_path: Path) -> None:
    """Ranks and scales of each: ranks by pattern, and one scale, which every engine knows."""
    model = adapt(mixed(), target_modules=["a", "b"], r=2, alpha=6.0, progress=False)
    model.a = type(model.a).from_linear(model.a.to_linear(), r=4, alpha=2.0)
    for layer in (model.a, model.b):
        nn.init.normal_(layer.core)
    export_lora(model, tmp_path)
    config = config_in(tmp_path)
    assert (config["r"], config["rank_pattern"]) == (4, {"^b": 2})
    assert config["lora_alpha"] / config["r"] == config["alpha_pattern"]["^b"] / 2 == 0.5
    x = torch.randn(3, 8, dtype=torch.float64)
    close(loaded(mixed(), tmp_path)(x), model(x).detach())


def test_dtype_and_bf16(tmp_path: Path) -> None:
    """A core trained in fp32 keeps its digits; what is asked for is rounded once."""
    model = adapt(mixed().bfloat16(), target_modules=["a"], r=4, progress=False)
    nn.init.normal_(model.a.core)
    export_lora(model, tmp_path)
    key = f"{PREFIX}a.lora_B.weight"
    exact = model.a.up.double() @ model.a.core.double().t()
    assert torch.equal(tensors_in(tmp_path)[key], exact.float())
    export_lora(model, tmp_path, dtype=torch.bfloat16)
    assert torch.equal(tensors_in(tmp_path)[key], exact.bfloat16())
    with torch.no_grad():
        model.a.core.mul_(1e6)
    with pytest.raises(
        ValueError, match=r"factors of a hold NaN, Inf, or more than torch\.float16"
    ):
        export_lora(model, tmp_path, dtype=torch.float16)
    assert torch.equal(tensors_in(tmp_path)[key], exact.bfloat16())


class Block(nn.Module):
    """Whose layer is called as one outside is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.ln = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.fc(x))


@pytest.mark.parametrize(
    ("targeted", "written"),
    [
        (["fc"], ["fc"]),
        (["block.fc"], ["block.fc"]),
        ("fc", "fc"),
    ],
)
def test_target_modules(targeted: Any, written: Any, tmp_path: Path) -> None:
    """They mean the adapted layers and no others."""

    def build() -> nn.Sequential:
        return sequence(fc=nn.Linear(8, 8), block=Block())

    model = adapt(build(), target_modules=targeted, r=4, progress=False)
    names = {n for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    export_lora(model, tmp_path)
    assert config_in(tmp_path)["target_modules"] == written
    theirs = loaded(build(), tmp_path)
    layers = {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {name.removeprefix(PREFIX) for name in layers} == names


def test_module_that_peft_matches_too(tmp_path: Path) -> None:
    """PEFT matches modules to save by the end of the name, without a dot."""

    def build() -> nn.Sequential:
        return sequence(a=nn.Linear(8, 8), other_head=nn.Linear(8, 8), head=nn.Linear(8, 3))

    model = adapt(build(), target_modules=["a"], modules_to_save=["head"], r=4, progress=False)
    nn.init.normal_(model.head.weight)
    export_lora(model, tmp_path)
    assert config_in(tmp_path)["modules_to_save"] == ["other_head", "head"]
    x = torch.randn(3, 8, dtype=torch.float64)
    close(loaded(build(), tmp_path)(x), model(x).detach())
    model = adapt(build(), target_modules=["other_head"], modules_to_save=["head"], r=3)
    with pytest.raises(ValueError, match="PEFT would take other_head for one"):
        export_lora(model, tmp_path)


def test_base_model_name(tmp_path: Path) -> None:
    """Where transformers says that the model came from."""
    model, _ = trained("llama", "lora_xs")
    model.config.name_or_path = "somebody/llama"
    export_lora(model, tmp_path)
    assert config_in(tmp_path)["base_model_name_or_path"] == "somebody/llama"


# --- bad input ---


def of_sequence(**keywords: Any) -> nn.Module:
    """A small adapted model."""
    keywords = {"target_modules": ["a", "b"], "r": 4, **keywords}
    return adapt(mixed(), progress=False, **keywords)


def shared() -> nn.Module:
    """One layer in two places."""
    model = sequence(a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    model.add_module("c", model.a)
    return adapt(model, target_modules=["a"], r=4, progress=False)


def deferred() -> nn.Module:
    """Layers without factors."""
    return adapt(mixed().to("meta"), target_modules=["a"], r=4, progress=False, defer_bases=True)


MODELS = {
    "plain": (mixed, "no adapted layers"),
    "weight": (lambda: of_sequence(train=("core", "weight")), "a trains its weight"),
    "pending": (deferred, "a is not initialised"),
    "shared": (shared, "a stands in 2 places"),
}


@pytest.mark.parametrize("case", MODELS)
def test_refused_model(case: str, tmp_path: Path) -> None:
    """A ValueError, and nothing is written."""
    make, message = MODELS[case]
    with pytest.raises(ValueError, match=message):
        export_lora(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_bad_input(tmp_path: Path) -> None:
    """Names, dtypes, places and files."""
    model, out = of_sequence(), tmp_path / "out"
    _, bank = bank_of("cores", 2, "a")
    with pytest.raises(ValueError, match="say by name"):
        export_lora(bank, out)
    with pytest.raises(ValueError, match="'z' is not in the bank"):
        export_lora(bank, out, name="z")
    with pytest.raises(ValueError, match="source is no bank"):
        export_lora(model, out, name="a")
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        export_lora(model, out, dtype=torch.int8)
    with disable_adapters(model), pytest.raises(ValueError, match="a is disabled"):
        export_lora(model, out)
    save_adapter(model, tmp_path / "file", bases=False)
    with pytest.raises(ValueError, match=r"has no a\.down: a file saved without"):
        export_lora(tmp_path / "file", out)
    with pytest.raises(ValueError, match="is a file"):
        export_lora(model, tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        export_lora(tmp_path / "nothing", out)
    assert not out.exists()
    load_adapter(mixed(), tmp_path / "file", progress=False)  # still as it was


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("a.core", torch.ones(4, 5), r"a\.core is \(4, 5\) there and \(4, 4\) here"),
        ("a.core", torch.ones(4, 4, dtype=torch.int8), r"a\.core is of torch\.int8"),
        ("a.core", None, r"has no a\.core"),
        ("a.up", torch.ones(6), "down and up of a are no matrices"),
        ("a.down", torch.ones(4, 3), "a: r is 4"),
        ("more", torch.ones(1), "unexpected more"),
    ],
)
def test_damaged_file(key: str, value: Any, message: str, tmp_path: Path) -> None:
    """A ValueError that names the file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = tmp_path / "file"
    save_adapter(of_sequence(), file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {**load_file(file), key: value}
    save_file({k: t for k, t in tensors.items() if t is not None}, file, metadata)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        export_lora(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    """Both files are replaced, or neither."""
    model = of_sequence()
    export_lora(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    nn.init.normal_(model.a.core)

    def failing(*_: Any, **__: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("json.dumps", failing)
    with pytest.raises(OSError, match="disk full"):
        export_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
