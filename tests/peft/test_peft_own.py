"""LoRA-FA, Tied-LoRA, MELoRA and NOLA in PEFT: each adapter has factors of its own."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import (
    CLOSE,
    CONFIGS,
    SHARING,
    config,
    inputs,
    integration,
    layers,
    mlp,
    own_methods,
    peft,
    same,
    state,
)
from safetensors.torch import load_file, save_file
from torch import nn

from fused_lowrank import load_adapter
from fused_lowrank.files.cli import main
from fused_lowrank.files.peft_own import name_of
from fused_lowrank.methods import METHODS

WEIGHTS = "adapter_model.safetensors"
SHARED = {"tied_lora": ("tied_lora_down", "tied_lora_up"), "nola": ("basis_down_bases",)}


def tuned(method: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A PeftModel of the same base at every call."""
    return peft.get_peft_model(mlp(dtype), config(method, **settings)).eval()


def factors(layer: Any, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The factors of a layer's adapter, by the row's names."""
    return {factor: getattr(layer, name)[adapter] for factor, name in layer.names.items()}


def change(path: Path, old: str, new: Any) -> None:
    """Give a tensor of a file another value, or none."""
    tensors = load_file(path / WEIGHTS)
    value = tensors.pop(old)
    if new is not None:
        tensors[old] = new(value).contiguous()
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


# --- numbers ---


@own_methods
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_numbers_are_those_of_the_native_layers(
    method: str, impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, and gradients of x and of each trained factor, after `load_adapter` of a folder."""
    if impl == "triton":
        pytest.importorskip("triton")
        from fused_lowrank.integrations.peft.layer import base

        real = base.lowrank_linear
        monkeypatch.setattr(base, "lowrank_linear", lambda *a, **k: real(*a, **k, impl="triton"))
    model = tuned(method, lora_alpha=3, modules_to_save=["head"]).train()
    model.save_pretrained(tmp_path)
    native = load_adapter(mlp(), tmp_path, progress=False).train()
    assert {type(m).__name__ for m in native.children()} >= {METHODS[method][1].__name__}
    x, grads = inputs(), []
    ys = []
    for one in (model, native):
        own = x.clone().requires_grad_()
        ys.append(one(own))
        ys[-1].square().sum().backward()
        grads.append(own.grad)
    torch.testing.assert_close(ys[0], ys[1], **CLOSE)
    torch.testing.assert_close(grads[0], grads[1], **CLOSE)
    for name, layer in layers(model).items():
        twin = native.get_submodule(name.removeprefix("base_model.model."))
        for factor, own in factors(layer).items():
            assert own.requires_grad == (factor in twin.row.trained)
            if own.requires_grad:
                assert own.grad.abs().max() > 0
                torch.testing.assert_close(own.grad, getattr(twin, factor).grad, **CLOSE)


@own_methods
def test_settings_are_those_of_the_row(method: str) -> None:
    """Ranks and options have the row's names and defaults."""
    row, given = METHODS[method][0].row, CONFIGS[method]()
    assert {name: getattr(given, name) for name in row.ranks} == row.ranks
    numbers = {n: v for n, v in row.options.items() if not isinstance(v, tuple)}
    assert {name: getattr(given, name) for name in numbers} == numbers
    assert not hasattr(given, "save_projection")


@own_methods
def test_rows_of_a_broken_adapter_are_its_own(method: str) -> None:
    """NaN and Inf in one adapter of a mixed batch reach no row of another."""
    model = tuned(method)
    model.add_adapter("broken", config(method))
    with torch.no_grad():
        for layer in layers(model).values():
            layer.trained_factors("broken")[-1].fill_(float("nan"))
    x = inputs(4)
    y = model(x, adapter_names=["default", "broken", "__base__", "default"])
    assert y[1].isnan().all()
    assert not y[[0, 2, 3]].isnan().any()
    torch.testing.assert_close(y[[0, 3]], model(x[[0, 3]]), **CLOSE)


@own_methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Trained factors are float32, also from a file; frozen ones as the weight is."""
    model = tuned(method, dtype)
    with torch.no_grad():
        for layer in layers(model).values():
            for factor in layer.trained_factors("default"):
                factor.add_(1e-6)  # which 16 bits would lose
    model.save_pretrained(tmp_path)
    made = [
        peft.PeftModel.from_pretrained(mlp(dtype), tmp_path, low_cpu_mem_usage=low)
        for low in (0, 1)
    ]
    x = inputs(dtype=dtype)
    for one in (model, *made):
        for (name, layer), like in zip(layers(one).items(), layers(model).values(), strict=True):
            for factor, own in factors(layer).items():
                trained = layer.row.factors[factor].trained
                assert own.dtype == (torch.float32 if trained else dtype), (name, factor)
                assert torch.equal(own, factors(like)[factor])
        assert torch.equal(one(x), model(x))
        assert one(x).dtype == dtype
    model.add_adapter("two", config(method))
    model.base_model.set_adapter(["default", "two"])
    assert model(x).dtype == dtype
    assert model(x, adapter_names=["two", "default"] * 3).dtype == dtype


@own_methods
def test_adapters_of_other_scales_are_summed(method: str) -> None:
    """Each with its own: what two give together is the sum of what they give alone."""
    model = peft.get_peft_model(mlp(), config(method, lora_alpha=3.0))
    model.add_adapter("two", config(method, lora_alpha=7.0))
    for layer in layers(model).values():
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        terms = []
        for active in (["default"], ["two"], ["default", "two"]):
            model.base_model.set_adapter(active)
            terms.append(layer(x) - layer.base_layer(x))
        assert terms[0].norm() > 0
        assert terms[1].norm() > 0
        torch.testing.assert_close(terms[2], terms[0] + terms[1], **CLOSE)


# --- files ---


@own_methods
@pytest.mark.parametrize("low_memory", [False, True])
def test_round_trip(method: str, low_memory: bool, tmp_path: Path) -> None:
    """The same numbers and Parameters; a shared factor is in the file once, a random one of a seed
    is not.
    """
    model = tuned(method)
    model.save_pretrained(tmp_path)
    keys = sorted(load_file(tmp_path / WEIGHTS))
    row, prefix = METHODS[method][0].row, "base_model.model."
    for factor, kind in row.factors.items():
        name = name_of(row, factor)
        wanted = [f"{prefix}{layer}.{name}" for layer in ("lin0", "lin1")]
        wanted = [] if not kind.saved else wanted[:1] if kind.shared else wanted
        assert [key for key in keys if key.endswith(f".{name}")] == wanted
    made = (
        peft.PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_memory),
        peft.PeftModel.from_pretrained(
            mlp(), tmp_path, low_cpu_mem_usage=low_memory, is_trainable=True
        ),
    )
    x = inputs()
    for other, trains in zip(made, (False, True), strict=True):
        assert same(state(other), state(model))
        assert torch.equal(other(x), model(x))
        trained = {n for n, p in other.named_parameters() if p.requires_grad}
        assert trained == (
            {n for n, p in model.named_parameters() if p.requires_grad} if trains else set()
        )
    model.load_adapter(tmp_path, "again", low_cpu_mem_usage=low_memory)
    model.set_adapter("again")
    assert torch.equal(model(x), made[0](x))


@pytest.mark.parametrize("method", SHARING)
def test_shared_factors_are_one(method: str, tmp_path: Path) -> None:
    """One Parameter of an adapter for all its layers, as large as the largest, whatever is done."""
    model = tuned(method)
    model.save_pretrained(tmp_path)
    model.add_adapter("two", config(method, target_modules=["lin1", "head"], r=3))
    again = peft.PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=True)
    narrow = tuned(method, dtype=torch.bfloat16)  # whose trained factors become float32
    for one in (model, again, narrow, copy.deepcopy(model), copy.deepcopy(model).float()):
        for name in SHARED[method]:
            for adapter in one.peft_config:
                there = [layer for layer in layers(one).values() if adapter in layer.scaling]
                own = [getattr(layer, name)[adapter] for layer in there]
                assert len(own) == 2
                assert own[0] is own[1]
                if "down" in name:
                    assert own[0].shape[-1] == 16  # of lin1; lin0 has 12 and the head 14
    lin0, lin1 = (layers(model)[f"base_model.model.{name}"] for name in ("lin0", "lin1"))
    first = SHARED[method][0]
    assert getattr(lin1, first)["two"] is not getattr(lin0, first)["default"]


def test_seeds_decide_what_no_file_has(tmp_path: Path) -> None:
    """NOLA's random factors: of a seed the same ones, of another one others, and each adapter's."""
    one, two = tuned("nola", seed=1), tuned("nola", seed=2)
    assert torch.equal(
        *(
            factors(layers(m)["base_model.model.lin0"])["down_bases"]
            for m in (one, tuned("nola", seed=1))
        )
    )
    one.save_pretrained(tmp_path)
    x = inputs()
    two.load_adapter(tmp_path, "one")
    two.set_adapter("one")
    assert torch.equal(two(x), one(x))
    lin0 = layers(two)["base_model.model.lin0"]
    assert not torch.equal(factors(lin0)["down_bases"], factors(lin0, "one")["down_bases"])


@own_methods
def test_files_that_are_refused(method: str, tmp_path: Path) -> None:
    """Of another rank, and without frozen factors; the model is as it was."""
    model = tuned(method, r=3)
    model.save_pretrained(tmp_path)
    file, other = load_file(tmp_path / WEIGHTS), tuned(method)
    before, x = state(other), inputs()
    y = other(x)
    key = next(k for k in file if k.endswith(("up", "nola_b")))
    change(tmp_path, key, lambda value: value[:-1])
    with pytest.raises(ValueError, match="of another rank, or for another base model"):
        other.load_adapter(tmp_path, "new")
    assert same(state(other), before)
    assert list(other.peft_config) == ["default"]
    with pytest.raises(ValueError, match=r"does not fit|damaged|must be"):
        load_adapter(mlp(), tmp_path, progress=False)
    if method == "lora_fa":
        save_file(file, tmp_path / WEIGHTS, {"format": "pt"})
        change(tmp_path, "base_model.model.lin1.basis_down", None)
        with pytest.raises(ValueError, match=r"lacks .*lin1\.basis_down.*, which is frozen"):
            other.load_adapter(tmp_path, "new")
        with pytest.raises(ValueError, match="lacks down of lin1"):
            load_adapter(mlp(), tmp_path, progress=False)
    assert torch.equal(other(x), y)


@own_methods
def test_command_line(method: str, tmp_path: Path, capsys: Any) -> None:
    """Folders are described and converted as those of the other methods."""
    tuned(method).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert METHODS[method][0].row.title in said
    assert method in said


@own_methods
def test_as_plain_lora(method: str, tmp_path: Path) -> None:
    """The exact LoRA of it, which PEFT loads by itself."""
    model = tuned(method, lora_alpha=3)
    integration.save_as_lora(tmp_path, model)
    x = inputs()
    plain = peft.PeftModel.from_pretrained(mlp(), tmp_path).eval()
    assert plain.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(plain(x), model(x), **CLOSE)


@own_methods
@pytest.mark.parametrize("names", [["default"], ["default", "two"]])
def test_state_dict_of_a_merged_model(method: str, names: list[str]) -> None:
    """It brings back W into a model that is not merged, as the others' do."""
    model, other = tuned(method), tuned(method)
    for one in (model, other):
        one.add_adapter("two", config(method))
    x, wanted = inputs(), model(inputs(1))
    weight = model.base_model.model.lin0.base_layer.weight.clone()
    wanted = model(x)
    model.merge_adapter(names)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.base_model.model.lin0.base_layer.weight, weight, **CLOSE)
    torch.testing.assert_close(other(x), wanted, **CLOSE)


# --- refusals ---


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (
            "tied_lora",
            {"rank_pattern": {"lin0": 2}},
            "rank_pattern is .* share factors of one rank",
        ),
        ("nola", {"rank_pattern": {"lin0": 2}}, "rank_pattern is .* share factors of one rank"),
        ("nola", {"seed": "a"}, "seed is 'a': it must be an integer"),
        ("nola", {"seed": 2**64}, r"seed is 18446744073709551616: it must be at least -2\*\*63"),
        ("nola", {"m": 0}, "m is 0"),
        ("melora", {"n": 0}, "n is 0"),
        (
            "lora_fa",
            {"init_weights": "pissa"},
            "must be a bool, 'identity', 'kaiming' or 'gaussian'",
        ),
        (
            "melora",
            {"init_weights": "paper"},
            "init_weights is 'paper': it must be a bool or 'ident",
        ),
        ("lora_fa", {"bias": "lora_xs_only"}, "none, all, lora_only, lora_fa_only"),
    ],
)
def test_bad_configurations(method: str, settings: dict[str, Any], said: str) -> None:
    """Named, with what there is."""
    with pytest.raises(ValueError, match=said):
        config(method, **settings)


@pytest.mark.parametrize("method", SHARING)
def test_ranks_above_the_sides(method: str, tmp_path: Path) -> None:
    """One rank for all layers, as it was asked for; the folder loads here, too."""
    model = tuned(method, r=30)
    assert {layer.r["default"] for layer in layers(model).values()} == {30}
    model.save_pretrained(tmp_path)
    native, x = load_adapter(mlp(), tmp_path, progress=False), inputs()
    torch.testing.assert_close(native(x), model(x), **CLOSE)


def test_n_divides_both_sides() -> None:
    """A layer that MELoRA's n does not divide is named, and the model is as it was."""
    model = mlp()
    before = list(model.named_modules())
    with pytest.raises(ValueError, match="n is 4: it must divide both sides of lin1, which are"):
        peft.get_peft_model(model, config("melora", n=4))
    assert list(model.named_modules()) == before


@own_methods
def test_mixtures_are_refused(method: str) -> None:
    """With what there is instead, before anything is changed."""
    model = tuned(method)
    model.add_adapter("two", config(method))
    with pytest.raises(ValueError, match="have no exact sum of their own kind: activate several"):
        model.base_model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "sum")
    assert list(model.peft_config) == ["default", "two"]


@pytest.mark.parametrize("method", SHARING)
def test_layers_on_several_devices_are_refused(method: str) -> None:
    """One Parameter cannot be on both; the model is as it was."""
    model = mlp()
    model.lin1.to("meta")
    before = list(model.named_modules())
    with pytest.raises(ValueError, match="one pair of factors for all layers, and these are on"):
        peft.get_peft_model(model, config(method))
    assert list(model.named_modules()) == before


@own_methods
def test_no_warnings_in_ordinary_use(method: str, tmp_path: Path) -> None:
    """Of ours or PEFT's: adapting, training, saving, loading, merging."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Could not find a config file|.*deprecated")
        model = tuned(method, torch.float32).train()
        model(inputs(dtype=torch.float32)).sum().backward()
        model.save_pretrained(tmp_path)
        for low in (False, True):
            again = peft.PeftModel.from_pretrained(
                mlp(torch.float32), tmp_path, low_cpu_mem_usage=low
            )
        again.merge_and_unload()


@own_methods
def test_offloaded_weights(method: str) -> None:
    """The factors stay where the model computes, and the numbers are those of the whole model."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    wanted = tuned(method)
    base = accelerate.cpu_offload(mlp(), execution_device=torch.device("cpu"))
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config(method)).eval()
    assert base.lin0.get_base_layer().weight.is_meta
    assert not any(f.is_meta for layer in layers(model).values() for f in factors(layer).values())
    x = inputs()
    torch.testing.assert_close(model(x), wanted(x), **CLOSE)


def test_first_values_are_those_over_a_wider_base() -> None:
    """A seed gives a 16-bit model the factors that it gives the 32-bit one, rounded: as in PEFT."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Sequential(nn.Linear(128, 128)).to(dtype)
        torch.manual_seed(3)
        given = integration.LoraFAConfig(r=4, target_modules=["0"], init_weights=False)
        layer = peft.get_peft_model(linear, given).base_model.model[0]
        found.append(list(layer.factors_of("default").values()))
    for wide, narrow in zip(*found, strict=True):
        assert torch.equal(wide.to(torch.bfloat16).float(), narrow.float())
