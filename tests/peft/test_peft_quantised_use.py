"""PEFT's usual ways over quantised models: QLoRA's training, dtypes, compilation, refusals."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from base_cases import D, H, Net, gradients, inputs, kinds, model_of, needs, shifted
from peft_base_cases import check, config, layers_of, some_kinds, trained, tuned
from peft_cases import CONFIGS, SETTINGS, peft
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lowrank import load_adapter
from fused_lowrank.integrations.peft.layer import over

transformers = pytest.importorskip("transformers")
bits4 = pytest.mark.parametrize("kind", [pytest.param("nf4", marks=needs("bitsandbytes"))])
bits8 = pytest.mark.parametrize("kind", [pytest.param("int8", marks=needs("bitsandbytes"))])
ao = pytest.mark.parametrize("kind", [pytest.param("torchao-int8", marks=needs("torchao"))])


def quantisation(kind: str) -> Any:
    """What transformers is asked to load a model with."""
    if kind == "nf4":
        own = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        own["bnb_4bit_compute_dtype"] = torch.bfloat16
        return transformers.BitsAndBytesConfig(load_in_4bit=True, **own)
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(quant_type=Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama."""
    path = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 50}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    made.save_pretrained(path)
    return path


def loaded(folder: Path, kind: str) -> Any:
    """It, quantised by transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantisation(kind),
        device_map={"": "cpu"},
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize(
    ("kind", "method", "backend"),
    [
        pytest.param("nf4", "lora_xs", "bnb 4bit", marks=needs("bitsandbytes")),
        pytest.param("nf4", "nola", "bnb 4bit", marks=needs("bitsandbytes")),
        pytest.param("int8", "lora_mini", "bnb 8bit", marks=needs("bitsandbytes")),
        pytest.param("torchao-int8", "lora_fa", "torchao", marks=needs("torchao")),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_trained_as_qlora(
    kind: str, method: str, backend: str, folder: Path, tmp_path: Path
) -> None:
    """All linear layers, checkpointed, under autocast: the loss falls; the adapter comes back."""
    model = peft.prepare_model_for_kbit_training(loaded(folder, kind))
    given = CONFIGS[method](**{**SETTINGS[method], "target_modules": "all-linear"})
    model = peft.get_peft_model(model, given).train()
    found = [m for m in model.modules() if isinstance(m, over.PeftOverBase)]
    assert len(found) == 7
    assert {m.quantization_backend.backend_name for m in found} == {backend}
    assert f"quantization_backend='{backend}'" in repr(found[0])
    factors = [own for own in model.parameters() if own.requires_grad]
    assert {own.dtype for own in factors} == {torch.float32}
    ids, losses = torch.arange(24).view(2, 12), []
    optimiser = torch.optim.AdamW(factors, 0.05)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(own.grad is not None and own.grad.isfinite().all() for own in factors)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    model.save_pretrained(tmp_path)
    plain = peft.prepare_model_for_kbit_training(loaded(folder, kind))
    again = peft.PeftModel.from_pretrained(plain, tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert model.generate(input_ids=ids[:, :3], max_new_tokens=2, do_sample=False).shape == (2, 5)


@kinds
def test_checkpointed_with_dropout(kind: str) -> None:
    """A checkpoint draws the same mask again; without a checkpoint it is another each time."""
    model, x, found = tuned(kind, "lora_xs", lora_dropout=0.5).train(), inputs(), []
    for again in (False, True):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = checkpoint(model, leaf, use_reentrant=False) if again else model(leaf)
        found.append([y.detach(), *torch.autograd.grad(y.sum(), [leaf, *trained(model)])])
    for pair in zip(*found, strict=True):
        torch.testing.assert_close(*pair)
    assert (model(x) - found[0][0]).abs().max() > 1e-3


@bits4
def test_each_adapter_has_its_own_dropout(kind: str) -> None:
    """Of two that are active, the one without draws nothing."""
    model, x = tuned(kind, "lora_fa"), inputs()
    model.add_adapter("two", config("lora_fa", lora_dropout=0.5))
    model.base_model.set_adapter(["default", "two"])
    assert (model.train()(x) - model(x)).abs().max() > 1e-3
    with torch.no_grad():
        for layer in layers_of(model):
            layer.lora_fa_up["two"].zero_()
    y = model(x)
    assert torch.equal(model(x), y)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


@some_kinds
@pytest.mark.parametrize("method", ["lora_xs", "lora_fa"])
def test_biases_are_trained_once(kind: str, method: str) -> None:
    """Their gradients too are within the budget, wherever the module adds its bias itself."""
    model = tuned(kind, method, bias="lora_only")
    assert len(trained(model)) == 4
    check(model, inputs())
    model.add_adapter("two", config(method, lora_dropout=0.5))
    model.base_model.set_adapter(["default", "two"])  # of other masks: each term by itself
    bias = layers_of(model.train())[1].base_layer.bias.requires_grad_()
    x = inputs(torch.float32, 5)
    (grad,) = torch.autograd.grad(model(x).sum(), bias)
    torch.testing.assert_close(grad, torch.full_like(grad, 5.0))


@some_kinds
def test_modules_trained_whole(kind: str, tmp_path: Path) -> None:
    """A plain layer behind a quantised one, saved with the adapter."""

    def net() -> Any:
        torch.manual_seed(4)
        head = nn.Linear(D, 3)
        made = model_of(kind)
        return nn.Sequential(made.first, made.second, head)

    given = config("lora_xs", target_modules=["0", "1"], modules_to_save=["2"])
    model = shifted(peft.get_peft_model(net(), given))
    x = inputs()
    y = model(x)
    y.sum().backward()
    assert model.base_model.model[2].modules_to_save["default"].weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path).train()
    assert torch.equal(again(x), y)


@some_kinds
def test_autocast(kind: str) -> None:
    """As the bfloat16 of autocast has it, from x in float32."""
    model, x = tuned(kind, "lora_xs"), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().sum().backward()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.1)
    assert all(own.grad.dtype == own.dtype for own in trained(model))


@bits4
def test_compiled(kind: str) -> None:
    """As far as the module can be compiled; the results are the same."""
    model, x = tuned(kind, "lora_xs"), inputs()
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients(compiled, trained(model), x)
    torch.testing.assert_close(found, gradients(model, trained(model), x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@some_kinds
def test_copies(kind: str) -> None:
    """A copy has modules and a W of its own."""
    model, x = tuned(kind, "lora_mini"), inputs()
    other = copy.deepcopy(model)
    ours, theirs = layers_of(model)[0], layers_of(other)[0]
    assert theirs.base_weight.module is theirs.base_layer is not ours.base_layer
    assert type(theirs) is type(ours)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    if kind == "opaque":
        again = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@some_kinds
def test_a_base_is_looked_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in calls: it lives with its layer."""
    model, seen = tuned(kind, "lora_xs"), []
    real = over.base_of
    monkeypatch.setattr(over, "base_of", lambda module: seen.append(module) or real(module))
    model(inputs()).sum().backward()
    model.eval()(inputs(), adapter_names=["default", "__base__", "default"])
    model.add_adapter("two", config("lora_xs"))
    assert not seen
    assert layers_of(model)[0].base_weight is layers_of(model)[0].base_weight


@kinds
def test_moved_to_another_dtype(kind: str) -> None:
    """What PyTorch moves of the base is what is computed with."""
    model = tuned(kind, "lora_fa").to(torch.bfloat16)
    y = model(inputs(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    expected = tuned(kind, "lora_fa")(inputs())
    assert (y.float() - expected).norm() <= 0.02 * expected.norm()


@kinds
@pytest.mark.parametrize("method", ["lora_xs", "melora"])
def test_nothing_that_is_computed_changes_the_base(kind: str, method: str) -> None:
    """Not in inference, with adapters or without, where bitsandbytes packs weights anew on CPUs."""
    model, x = tuned(kind, method).eval(), inputs()
    before = [layer.base_weight.values() for layer in layers_of(model)]
    with torch.no_grad():
        model(x)
        model(x, adapter_names=["default", "__base__", "default"])
        if kind != "opaque":
            with model.disable_adapter():
                model(x)
    check(model.train(), x)
    for layer, values in zip(layers_of(model), before, strict=True):
        assert torch.equal(layer.base_weight.values(), values)


@bits8
def test_eight_bits_before_and_after_the_first_call(kind: str, tmp_path: Path) -> None:
    """Their rows go from the weight to a state: adapters, files and what is made are the same."""
    model, x = tuned(kind, "lora_xs"), inputs()
    layer = layers_of(model)[0]
    values = layer.base_weight.values()
    model.save_pretrained(tmp_path / "before")
    y = model(x)
    assert torch.equal(layer.base_weight.values(), values)
    model.save_pretrained(tmp_path / "after")
    for name in ("before", "after"):
        for called in (False, True):
            plain = model_of(kind)
            if called:
                plain(x)
            again = peft.PeftModel.from_pretrained(plain, tmp_path / name)
            assert torch.equal(again.train()(x), y)
    model.add_adapter("two", config("lora_xs", r=6))
    check(model, x)


@kinds
@pytest.mark.parametrize("method", ["lora_xs", "tied_lora"])
def test_files_go_to_the_native_layers(kind: str, method: str, tmp_path: Path) -> None:
    """`load_adapter` reads the folder over the same base."""
    model, x = tuned(kind, method), inputs()
    model.save_pretrained(tmp_path)
    native = load_adapter(model_of(kind), tmp_path, progress=False).train()
    torch.testing.assert_close(native(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param("nf4", torch.bfloat16, marks=needs("bitsandbytes")),  # its compute dtype
        pytest.param("int8", torch.float32, marks=needs("bitsandbytes")),  # it says none
        pytest.param("torchao-int8", torch.bfloat16, marks=needs("torchao")),
        pytest.param("opaque", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("method", ["lora_mini", "tied_lora", "lora_fa"])
def test_dtypes_without_autocast(kind: str, dtype: torch.dtype, method: str) -> None:
    """autocast_adapter_dtype=False leaves trained factors as PEFT's own have them."""
    model = model_of(kind, torch.bfloat16)
    model = peft.get_peft_model(model, config(method), autocast_adapter_dtype=False)
    assert {own.dtype for own in trained(model)} == {dtype}
    assert model(inputs(torch.bfloat16)).dtype == torch.bfloat16


@some_kinds
def test_factors_of_a_file_go_to_the_base(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is, also if it has no `weight` that PEFT could ask."""
    model, seen = tuned(kind, "lora_xs"), []
    layer = layers_of(model)[0]
    kind_of = peft.tuners.tuners_utils.BaseTunerLayer
    name = "_move_adapter_to_device_of_base_layer"
    monkeypatch.setattr(kind_of, name, lambda self, adapter, device: seen.append(device))
    layer._move_adapter_to_device_of_base_layer("default")
    assert seen == [torch.device("cpu")]


@bits4
def test_over_a_layer_of_another_method(kind: str) -> None:
    """PEFT's LoRA beneath is called, and is the base of what is above it."""
    base, x = model_of(kind), inputs()
    lora = peft.LoraConfig(target_modules=["first", "second"], r=2, init_lora_weights=False)
    peft.get_peft_model(base, lora)
    beneath = base.first
    layer = layers_of(shifted(peft.get_peft_model(base, config("lora_xs"))))[0]
    assert layer.base_layer is beneath
    alone = beneath(x).detach()
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), alone + x @ delta.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x, adapter_names=["__base__"] * 3), alone)
    y = layer(x, adapter_names=["default"] * 3)
    torch.testing.assert_close(y, alone + x @ delta.t(), rtol=1e-4, atol=1e-4)


# --- what becomes of the base afterwards ---


@some_kinds
@pytest.mark.parametrize("method", ["lora_xs", "melora"])
def test_biases_with_dora(kind: str, method: str) -> None:
    """Past the gain, whoever adds them: also where the module is called."""
    model = tuned(kind, method, bias="lora_only", use_dora=True)
    layer = layers_of(model)[1]
    bias = layer.base_layer.bias
    for _ in range(2):
        (grad,) = torch.autograd.grad(model(inputs()).sum(), bias)
        torch.testing.assert_close(grad, torch.full((D,), 21.0))
        layer.base_layer.register_forward_hook(lambda *_: None)


@bits8
def test_quantised_afterwards_with_dora(kind: str) -> None:
    """The rows' norms are then of no plain matrix: nobody computes with them."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(nn.Linear), config("melora", use_dora=True))
    layers_of(model)[0].base_layer = model_of(kind).first
    with pytest.raises(ValueError, match="first was quantised when it had an adapter with use_do"):
        model(inputs())


@ao
@pytest.mark.parametrize("method", ["lora_xs", "lora_fa"])
def test_quantised_afterwards(kind: str, method: str) -> None:
    """An adapter that is there goes on, and another one can be added."""
    import torchao.quantization as torchao

    torch.manual_seed(0)
    model, x = shifted(peft.get_peft_model(Net(nn.Linear), config(method))), inputs()
    y = model(x)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    torch.testing.assert_close(model(x), y, rtol=0.1, atol=0.2)
    model.add_adapter("two", config(method))
    assert all(isinstance(layer, over.PeftOverBase) for layer in layers_of(model))
    torch.testing.assert_close(model(x), y, rtol=0.1, atol=0.2)
    check(model, x)
    assert model.unload().first.weight.__class__.__name__ == "Int8Tensor"


@bits4
def test_dequantised_afterwards(kind: str) -> None:
    """As transformers' `model.dequantize()` puts plain layers there: those are computed, merged."""
    model, x = tuned(kind, "lora_xs"), inputs()
    y = model(x)
    for layer in layers_of(model):
        plain = nn.Linear(*reversed(layer.base_weight.shape))
        plain.weight, plain.bias = nn.Parameter(layer.base_weight.values()), layer.base_layer.bias
        layer._modules["base_layer"] = plain.requires_grad_(False)
    torch.testing.assert_close(model(x), y)
    model.eval()
    torch.testing.assert_close(model(x, adapter_names=["default"] * 3), y)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.add_adapter("two", config("lora_xs"))
    assert type(model.merge_and_unload().first) is nn.Linear


@kinds
def test_hooks_on_the_base_are_called(kind: str) -> None:
    """Whoever puts a hook on the base layer has it called, as PEFT's layers call theirs."""
    model, x, seen = tuned(kind, "lora_xs"), inputs(), []
    y = model(x)
    base = layers_of(model)[0].base_layer
    handle = base.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert seen == [(3, 7, H)]
    handle.remove()
    assert torch.equal(model(x), y)
