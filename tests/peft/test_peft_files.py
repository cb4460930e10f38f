"""What PEFT saves and loads of LoRA-XS and LoRA-Mini, and what is refused."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import config, inputs, methods, mlp, peft, same, state
from safetensors.torch import load_file, save_file

from fused_lowrank.integrations.peft import convert_to_lora, save_as_lora

WEIGHTS = "adapter_model.safetensors"


def saved(path: Path, method: str, base: Any = None, **settings: Any) -> torch.Tensor:
    """Save an adapter of a model; return what the model computes for `x()`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = peft.get_peft_model(mlp() if base is None else base, config(method, **settings))
    model.eval().save_pretrained(path)
    return model(x().to(model.base_model.model.head.weight.dtype))


def x() -> torch.Tensor:
    """The same input at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return inputs()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of the sums, in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def change(path: Path, old: str, new: Any) -> None:
    """Give a tensor of a file another value, or none."""
    tensors = load_file(path / WEIGHTS)
    if new is None:
        del tensors[old]
    else:
        tensors[old] = new(tensors[old]).contiguous()
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


@methods
@pytest.mark.parametrize("bases", [True, False])
@pytest.mark.parametrize("low_memory", [True, False])
def test_round_trip(method: str, bases: bool, low_memory: bool, tmp_path: Path) -> None:
    """The same numbers, with the bases in the file or made again, whichever way PEFT loads."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = config(method, save_projection=bases)
    assert any("save_projection=False" in str(w.message) for w in caught) == (not bases)
    model = peft.get_peft_model(mlp(), given).eval()
    model.save_pretrained(tmp_path)
    keys = {key.rpartition(".")[2] for key in load_file(tmp_path / WEIGHTS)}
    assert ({"basis_down", "basis_up"} <= keys) == bases
    assert "basis_fingerprint" in keys
    other = peft.PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_memory)
    close(other(x()), model(x()))  # another alignment in memory may have another order of sums
    assert same(state(other), state(model))
    assert not any(p.requires_grad for p in other.parameters())
    other = peft.PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    trained = {n for n, p in other.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in other.named_parameters() if n.endswith(".default")}


@methods
def test_bases_are_not_made_to_be_overwritten(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading for inference makes none; a layer that nobody loads makes them when it is used."""
    wanted, made = saved(tmp_path, method), []
    cls = type(peft.get_peft_model(mlp(), config(method)).base_model.model.lin0)
    real = cls.new_bases
    monkeypatch.setattr(cls, "new_bases", lambda *a, **k: made.append(1) or real(*a, **k))
    close(peft.PeftModel.from_pretrained(mlp(), tmp_path)(x()), wanted)
    assert not made
    eager = peft.get_peft_model(mlp(), config(method))
    assert len(made) == 2
    more = {"r": 2, "a": 9, "b": 8} if method == "lora_mini" else {"r": 9}
    uses = (
        lambda model: model(x()),
        lambda model: model.state_dict(),
        lambda model: model.add_adapter("more", config(method, **more)),
    )
    for use in uses:
        later = peft.get_peft_model(mlp(), config(method, inference_mode=True))
        before = len(made)
        use(later)
        assert len(made) == before + 2
        for name in ("basis_down", "basis_up"):
            ours, theirs = (getattr(m.base_model.model.lin0, name) for m in (later, eager))
            assert torch.equal(ours[: len(theirs), : theirs.shape[1]], theirs)


@methods
@pytest.mark.parametrize("bases", [True, False])
def test_offloaded_models(method: str, bases: bool, tmp_path: Path) -> None:
    """Their weights are on the meta device between calls: files are as those of any other model."""
    accelerate = pytest.importorskip("accelerate")

    def offloaded() -> torch.nn.Module:
        return accelerate.cpu_offload(mlp(), execution_device=torch.device("cpu"))

    wanted = saved(tmp_path / "here", method, save_projection=bases)
    model = peft.PeftModel.from_pretrained(offloaded(), tmp_path / "here")
    torch.testing.assert_close(model(x()), wanted, rtol=1e-10, atol=1e-10)
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / folder / WEIGHTS) for folder in ("again", "here"))
    assert same(ours, theirs)
    model.load_adapter(tmp_path / "again", "second")
    model.set_adapter("second")
    torch.testing.assert_close(model(x()), wanted, rtol=1e-10, atol=1e-10)
    change(tmp_path / "again", "base_model.model.lin0.basis_fingerprint", lambda t: t + 5)
    with pytest.raises(ValueError, match="another base model"):
        model.load_adapter(tmp_path / "again", "third")
    later = peft.get_peft_model(offloaded(), config(method, inference_mode=True))
    assert later(x()).isfinite().all()


@methods
def test_size_of_a_file(method: str, tmp_path: Path) -> None:
    """One pair of bases in it, cut to the adapter's own; without, some hundred numbers."""
    model = peft.get_peft_model(mlp(), config(method))
    larger = {"r": 2, "a": 9, "b": 8} if method == "lora_mini" else {"r": 9}
    model.add_adapter("large", config(method, **larger))
    model.save_pretrained(tmp_path)
    sizes = {"lora_xs": (4, 4, 16), "lora_mini": (5, 4, 2 * 5 + 2 * 4)}[method]
    for folder, (p, q, core) in (
        (tmp_path, sizes),
        (tmp_path / "large", {"lora_xs": (9, 9, 81), "lora_mini": (9, 8, 34)}[method]),
    ):
        tensors = load_file(folder / WEIGHTS)
        numbers = sum(tensor.numel() for tensor in tensors.values())
        prints = 2 * (p + q + 4)
        assert numbers == p * (12 + 16) + q * (16 + 10) + 2 * core + prints
        assert len(tensors) == 2 * (4 if method == "lora_xs" else 5)
        assert (folder / WEIGHTS).stat().st_size < 8 * numbers + 200 * len(tensors) + 100
    saved(tmp_path / "bare", method, save_projection=False)
    small = load_file(tmp_path / "bare" / WEIGHTS)
    assert sum(t.numel() for t in small.values()) == 2 * (sizes[2] + sizes[0] + sizes[1] + 4)


@methods
def test_several_in_one_model(method: str, tmp_path: Path) -> None:
    """Adapters trained apart, of other ranks, share one pair where their bases are the same."""
    larger = {"r": 2, "a": 5, "b": 4} if method == "lora_mini" else {"r": 9}
    first = saved(tmp_path / "first", method)
    second = saved(tmp_path / "second", method, **larger)
    model = peft.PeftModel.from_pretrained(mlp(), tmp_path / "first", "first")
    model.load_adapter(tmp_path / "second", "second")
    layer = model.base_model.model.lin0
    pointer = layer.basis_down.data_ptr()
    model.load_adapter(tmp_path / "first", "again", low_cpu_mem_usage=True)
    assert layer.basis_down.data_ptr() == pointer
    for name, wanted in (("first", first), ("second", second), ("again", first)):
        model.set_adapter(name)
        torch.testing.assert_close(model(x()), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        model.eval()(x(), adapter_names=["second"] * 6), second, rtol=1e-10, atol=1e-10
    )


def test_bases_beyond_those_of_others_come_from_the_file(tmp_path: Path) -> None:
    """Rows that no adapter there uses are the file's own; those in use keep their bits."""
    second = saved(tmp_path, "lora_xs", r=6)
    for factor, cut in (("basis_down", lambda t: t[4:]), ("basis_up", lambda t: t[:, 4:])):
        for layer in ("lin0", "lin1"):  # another choice of signs, as other hardware may make

            def flip(tensor: torch.Tensor, cut: Any = cut) -> torch.Tensor:
                new = tensor.clone()
                cut(new).neg_()
                return new

            change(tmp_path, f"base_model.model.{layer}.{factor}", flip)
    for layer in ("lin0", "lin1"):
        change(tmp_path, f"base_model.model.{layer}.basis_fingerprint", None)
    model = peft.get_peft_model(mlp(), config("lora_xs"))
    before = state(model)
    y = model(x())
    model.load_adapter(tmp_path, "second")
    assert torch.equal(
        model.base_model.model.lin0.basis_down[:4], before["base_model.model.lin0.basis_down"]
    )
    torch.testing.assert_close(model(x()), y, rtol=1e-12, atol=1e-12)
    flipped = peft.PeftModel.from_pretrained(mlp(), tmp_path)(x())
    model.set_adapter("second")
    torch.testing.assert_close(model(x()), flipped, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(flipped, second)


@methods
def test_biases_and_modules_to_save(method: str, tmp_path: Path) -> None:
    """They are trained, saved and loaded with the adapter."""
    for bias in ("lora_only", f"{method}_only", "all"):
        model = peft.get_peft_model(mlp(), config(method, bias=bias, modules_to_save=["head"]))
        assert model.base_model.model.lin0.base_layer.bias.requires_grad
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        model(x()).square().sum().backward()
        optimizer.step()
        model.eval().save_pretrained(tmp_path / bias)
        assert not torch.equal(model.base_model.model.lin0.base_layer.bias, mlp().lin0.bias)
        other = peft.PeftModel.from_pretrained(mlp(), tmp_path / bias)
        assert torch.equal(other(x()), model(x()))


def test_transformers_loads_what_peft_saved(tmp_path: Path) -> None:
    """Its own load_adapter, with keys that have PEFT's prefix."""
    pytest.importorskip("transformers")
    from architectures import batch, tiny

    torch.manual_seed(0)
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    given = config("lora_xs", target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(base, given).eval()
    model.save_pretrained(tmp_path / "adapter")
    plain = type(base).from_pretrained(tmp_path / "base")
    plain.load_adapter(str(tmp_path / "adapter"))
    tokens = batch("llama", 5)
    torch.testing.assert_close(plain(**tokens).logits, model(**tokens).logits)
    plain = type(base).from_pretrained(tmp_path / "base")
    peft.inject_adapter_in_model(given, plain)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    result = peft.set_peft_model_state_dict(plain, tensors)
    assert not result.unexpected_keys
    torch.testing.assert_close(plain(**tokens).logits, model(**tokens).logits)


@methods
def test_mixtures_are_saved(method: str, tmp_path: Path) -> None:
    """An adapter that was mixed of others loads into a model of its own."""
    model = peft.get_peft_model(mlp(), config(method))
    model.add_adapter("two", config(method, target_modules=["lin1"], lora_alpha=1))
    model.base_model.add_weighted_adapter(["default", "two"], [0.5, 2.0], "mixed")
    model.set_adapter("mixed")
    model.eval().save_pretrained(tmp_path, selected_adapters=["mixed"])
    other = peft.PeftModel.from_pretrained(mlp(), tmp_path / "mixed")
    torch.testing.assert_close(other(x()), model(x()), rtol=1e-10, atol=1e-10)


@methods
@pytest.mark.parametrize("targets", [["lin0", "lin1"], ["conv"], ["lin0", "conv"]])
def test_as_plain_lora(method: str, targets: list[str], tmp_path: Path) -> None:
    """Of rank r, exactly, with its biases and modules; PEFT loads it and computes the same."""
    settings = {"lora_alpha": 3, "bias": "lora_only", "modules_to_save": ["head"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        given = config(method, target_modules=targets, rank_pattern={"lin1": 1}, **settings)
        model = peft.get_peft_model(mlp(), given).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    save_as_lora(tmp_path, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        other = peft.PeftModel.from_pretrained(mlp(), tmp_path)
    assert other.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(other(x()), model(x()), rtol=1e-10, atol=1e-10)
    lora, tensors = convert_to_lora(model)
    assert lora.fan_in_fan_out == (targets == ["conv"])
    assert lora.r == {"lora_xs": 4, "lora_mini": 2}[method]
    ranks = {key.split(".")[2]: len(t) for key, t in tensors.items() if "lora_A" in key}
    assert ranks == {name: 1 if name == "lin1" else lora.r for name in targets}


def test_as_plain_lora_refuses() -> None:
    """What is not there, and what plain LoRA cannot hold."""
    model = peft.get_peft_model(mlp(), config("lora_xs", bias="all"))
    with pytest.raises(ValueError, match="no adapter 'other'"):
        convert_to_lora(model, "other")
    with pytest.raises(ValueError, match="all biases"):
        convert_to_lora(model)


@methods
def test_pefts_own_conversion(method: str) -> None:
    """`peft.convert_to_lora` works on these layers, too; a high threshold finds the rank."""
    model = peft.get_peft_model(mlp(), config(method)).eval()
    _, tensors = peft.convert_to_lora(model, rank=1 - 1e-9)
    a, b = (tensors[f"base_model.model.lin0.lora_{side}.weight"] for side in "AB")
    assert len(a) == {"lora_xs": 4, "lora_mini": 2}[method]
    delta = model.base_model.model.lin0.get_delta_weight("default")
    torch.testing.assert_close(b @ a, delta, rtol=1e-4, atol=1e-4)


# --- what is refused ---


def refused(path: Path, message: str, base: Any = None, method: str = "lora_xs") -> None:
    """Loading into a model that has an adapter raises, and changes nothing that was there."""
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(mlp() if base is None else base, path)
    model = peft.get_peft_model(mlp() if base is None else base, config(method))
    before, y = state(model), model(x())
    with pytest.raises(ValueError, match=message):
        model.load_adapter(path, "new")
    after = state(model)
    for name, value in before.items():  # bases may have become longer for it
        kept = after[name][tuple(slice(size) for size in value.shape)]
        assert torch.equal(kept, value), name
    assert torch.equal(model(x()), y)


@methods
@pytest.mark.parametrize("bases", [True, False])
def test_another_base_model(method: str, bases: bool, tmp_path: Path) -> None:
    """Its weights differ by more than rounding."""
    base = mlp()
    torch.nn.init.normal_(base.lin1.weight)
    saved(tmp_path, method, base, save_projection=bases)
    refused(tmp_path, r"another base model: the weight of .*lin1 differs", method=method)


@pytest.mark.parametrize("low_memory", [True, False])
def test_the_same_model_in_another_dtype(low_memory: bool, tmp_path: Path) -> None:
    """Rounded to bfloat16 it is still the same; the bases take the weight's dtype."""
    y = saved(tmp_path, "lora_xs", mlp(torch.float32))
    base = mlp(torch.bfloat16)
    model = peft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
    assert model.base_model.model.lin0.basis_down.dtype == torch.bfloat16
    torch.testing.assert_close(model(x().bfloat16()).float(), y, rtol=0.1, atol=0.1)


@methods
def test_another_rank(method: str, tmp_path: Path) -> None:
    """The configuration and the tensors of the file do not fit."""
    saved(tmp_path, method)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["r"] += 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    refused(tmp_path, r"of another rank: .*lin0.*there and .* here", method=method)


@methods
def test_other_bases(method: str, tmp_path: Path) -> None:
    """Those of a file without them cannot be made again; or they differ from those in use."""
    saved(tmp_path / "bare", method, save_projection=False)
    for side in (0, -5):  # a number of down's, and one of up's

        def shift(tensor: torch.Tensor, side: int = side) -> torch.Tensor:
            new = tensor.clone()
            new[side] += 1
            return new

        change(tmp_path / "bare", "base_model.model.lin1.basis_fingerprint", shift)
        refused(tmp_path / "bare", r"not those that the adapter was trained with", method=method)
    for factor in ("basis_down", "basis_up"):
        saved(tmp_path / factor, method)
        change(tmp_path / factor, f"base_model.model.lin0.{factor}", lambda t: 2 * t)
        refused(tmp_path / factor, r"not those that the adapter was trained with", method=method)
        change(tmp_path / factor, "base_model.model.lin0.basis_fingerprint", None)
        peft.PeftModel.from_pretrained(mlp(), tmp_path / factor)
        model = peft.get_peft_model(mlp(), config(method))
        with pytest.raises(ValueError, match=r"other frozen factors in .*lin0 than default"):
            model.load_adapter(tmp_path / factor, "new")


def test_damaged_files(tmp_path: Path) -> None:
    """Without bases and fingerprint; with bases of other sizes; or with one of the two."""
    saved(tmp_path / "none", "lora_xs", save_projection=False)
    change(tmp_path / "none", "base_model.model.lin0.basis_fingerprint", None)
    refused(tmp_path / "none", r"neither the frozen factors of .*lin0 nor their fingerprint")
    saved(tmp_path / "sizes", "lora_xs")
    change(tmp_path / "sizes", "base_model.model.lin0.basis_down", lambda t: t[:, 1:])
    refused(tmp_path / "sizes", r"another base model, or of another rank: .*\(4, 11\)")
    saved(tmp_path / "one", "lora_xs")
    change(tmp_path / "one", "base_model.model.lin0.basis_up", None)
    refused(tmp_path / "one", r"has basis_down of .*lin0 and not basis_up")
    saved(tmp_path / "print", "lora_xs")
    change(tmp_path / "print", "base_model.model.lin0.basis_fingerprint", lambda t: t[1:])
    refused(tmp_path / "print", r"fingerprint of .*lin0 is not of its ranks")


def test_missing_trained_factors_are_warned_of(tmp_path: Path) -> None:
    """PEFT's own warning, where a file has fewer layers than its configuration."""
    saved(tmp_path, "lora_xs")
    for part in ("lora_xs_core", "basis_down", "basis_up", "basis_fingerprint"):
        change(tmp_path, f"base_model.model.lin1.{part}", None)
    with pytest.warns(UserWarning, match=re.escape("missing adapter keys")):
        peft.PeftModel.from_pretrained(mlp(), tmp_path)
