"""What PyTorch and its libraries do with models, done with adapted ones."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, batch, targets, tiny
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

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
from fused_lowrank.compute import choose

peft = pytest.importorskip("peft")
integration = pytest.importorskip("fused_lowrank.integrations.peft", exc_type=ImportError)
transformers = pytest.importorskip("transformers")
ADAPT = {"lora_xs": {"r": 8}, "lora_mini": {"r": 4, "a": 12, "b": 10}}
CONFIGS = {"lora_xs": integration.LoraXSConfig, "lora_mini": integration.LoraMiniConfig}
HOWS = [*ADAPT, *(f"peft {method}" for method in CONFIGS)]
hows = pytest.mark.parametrize("how", HOWS)


def put_in(how: str, model: nn.Module, name: str, **more: Any) -> nn.Module:
    """Adapt a model; all that is trained is random."""
    method = how.removeprefix("peft ")
    settings = {"target_modules": targets(name), **ADAPT[method], **more}
    if method == how:
        adapt(model, method, progress=False, **settings)
    else:
        model = peft.get_peft_model(model, CONFIGS[method](**settings))
    return randomised(model)


def randomised(model: nn.Module) -> nn.Module:
    """ΔW about as large as W."""
    for parameter in trained(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The loss, and the gradients of what is trained."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in trained(model).values())]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def on(device: torch.device, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs there."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are computed as for large inputs on a CPU too."""
    monkeypatch.setattr(choose, "SMALL", 0)


# --- copies ---


def pickled(model: nn.Module) -> nn.Module:
    """Through pickle."""
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    """Through torch.save, whole."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@hows
@pytest.mark.parametrize("copy_of", [copy.deepcopy, pickled, saved])
def test_copies(how: str, copy_of: Callable[..., Any], device: torch.device) -> None:
    """A copy computes and learns the same, has the same ties, and shares nothing."""
    model = put_in(how, tiny("roberta", num_hidden_layers=1), "roberta").to(device)
    inputs = on(device, batch("roberta", 9))
    expected = gradients(model, inputs)
    clone = copy_of(model)
    assert equal(gradients(clone, inputs), expected)
    assert {name: p.requires_grad for name, p in clone.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not theirs & {p.data_ptr() for p in clone.parameters()}
    for parameter in trained(clone).values():
        nn.init.zeros_(parameter)
    assert equal(gradients(model, inputs), expected)


@pytest.mark.parametrize("method", ADAPT)
def test_to_empty(method: str, device: torch.device) -> None:
    """A transformer with tied weights: from the meta device, with its weights loaded later."""
    loaded = tiny("t5", tie_word_embeddings=True).to(device)
    state = copy.deepcopy(loaded.state_dict())
    with torch.device("meta"):
        model = tiny("t5", tie_word_embeddings=True)
    settings = {"target_modules": [*targets("t5"), "lm_head"], "progress": False, **ADAPT[method]}
    adapt(model, method, defer_bases=True, **settings)
    model.to_empty(device=device)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    torch.manual_seed(1)
    init_bases(model, progress=False)
    torch.manual_seed(1)
    adapt(loaded, method, **settings)
    assert model.lm_head.weight is model.shared.weight
    inputs = on(device, batch("t5", 9))
    assert equal(gradients(model, inputs), gradients(loaded, inputs))


# --- calls with other parameters, and hooks ---


@hows
def test_functional_call(how: str, device: torch.device, large: None) -> None:
    """A call with other values is a call of the model that holds them; so are its gradients."""
    model = put_in(how, tiny("llama", num_hidden_layers=1), "llama").to(device)
    inputs = on(device, batch("llama", 9))
    other = randomised(copy.deepcopy(model))
    expected = gradients(other, inputs)
    values = {n: p.detach().clone().requires_grad_() for n, p in trained(other).items()}
    loss = torch.func.functional_call(model, values, (), inputs).loss
    assert equal([loss, *torch.autograd.grad(loss, list(values.values()))], expected)
    assert not equal(gradients(model, inputs), expected)


@hows
@pytest.mark.parametrize("small", [True, False])
def test_transforms(
    how: str, small: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.func's transforms: a gradient for each sample, a slope, many adapters at once."""
    monkeypatch.setattr(choose, "SMALL", choose.SMALL if small else 0)
    model = nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 16)).to(device).double()
    model = put_in(how, model, "", target_modules=["0", "2"])
    values = {name: p.detach() for name, p in trained(model).items()}
    x = torch.randn(5, 3, 16, dtype=torch.float64, device=device)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().mean()

    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample).square().mean().backward()
        for name, parameter in trained(model).items():
            torch.testing.assert_close(by_sample[name][i], parameter.grad)
    direction = {name: torch.randn_like(value) for name, value in values.items()}
    _, slope = torch.func.jvp(lambda values: loss(values, x[0]), (values,), (direction,))
    expected = sum((by_sample[name][0] * direction[name]).sum() for name in values)
    torch.testing.assert_close(slope, expected)
    many = {name: torch.stack([value, 2 * value]) for name, value in values.items()}
    losses = torch.func.vmap(loss, in_dims=(0, None))(many, x[0])
    each = [loss({name: pair[i] for name, pair in many.items()}, x[0]) for i in range(2)]
    torch.testing.assert_close(losses, torch.stack(each))


@hows
def test_hooks(how: str, device: torch.device, large: None) -> None:
    """Hooks of an adapted layer see what passes, and may change it."""
    model = put_in(how, tiny("llama", num_hidden_layers=1), "llama").to(device)
    inputs = on(device, batch("llama", 9))
    expected = gradients(model, inputs)
    layer = next(m for name, m in model.named_modules() if name.endswith("down_proj"))
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, x: (x[0] * 2,)),
        layer.register_forward_hook(lambda _, x, y: seen.extend((x[0], y)) or y / 2),
        layer.register_full_backward_hook(lambda _, dx, dy: seen.extend((*dx, *dy))),
    ]
    assert equal(gradients(model, inputs), expected)  # without a bias a factor passes through
    for handle in handles:
        handle.remove()
    x, y, dx, dy = seen
    x = x.detach().requires_grad_()
    again = layer(x)
    assert torch.equal(again, y)
    assert equal([dx], list(torch.autograd.grad(again, x, dy / 2)))
    seen.clear()
    assert equal(gradients(model, inputs), expected)
    assert not seen


# --- what transformers do ---


@pytest.mark.parametrize("how", ["lora_xs", "lora_mini", "peft lora_xs"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "t5"])
def test_generate(name: str, how: str, device: torch.device) -> None:
    """With the cache and without, alone and padded beside others: the same tokens."""
    model = put_in(how, tiny(name).double(), name).to(device)
    prompts = [[5, 9, 33], [7], [12, 40, 2, 51, 19]]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone = [
        model.generate(input_ids=torch.tensor([prompt], device=device), **options)[0, -6:].tolist()
        for prompt in prompts
    ]
    assert len({tuple(tokens) for tokens in alone}) == 3
    ids = torch.zeros(3, 5, dtype=torch.long, device=device)
    for row, prompt in zip(ids, prompts, strict=True):
        place = slice(0, len(prompt)) if name == "t5" else slice(5 - len(prompt), 5)
        row[place] = torch.tensor(prompt)
    padded = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    for use_cache in (True, False):
        assert model.generate(**padded, **options, use_cache=use_cache)[:, -6:].tolist() == alone


@pytest.mark.parametrize("method", ADAPT)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_tied_head(name: str, method: str, device: torch.device) -> None:
    """A head tied to the embeddings, adapted: it stays tied, and its adapter is its own."""
    torch.manual_seed(3)
    model = tiny(name, tie_word_embeddings=True).to(device)
    plain, inputs = copy.deepcopy(model), on(device, batch(name, 9))
    settings = {"target_modules": ["lm_head"], "progress": False, **ADAPT[method]}
    randomised(adapt(model, method, **settings))
    adapt(plain, method, fused=False, **settings)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(gradients(model, inputs), gradients(plain, inputs))
    embeddings = model.get_input_embeddings()
    assert model.get_output_embeddings() is model.lm_head
    assert model.lm_head.weight is embeddings.weight
    model.tie_weights()
    assert model.lm_head.weight is embeddings.weight
    y, before = model(**inputs).logits, embeddings.weight.detach().clone()
    with pytest.warns(UserWarning, match="were tied"):
        merge(model)
    torch.testing.assert_close(model(**inputs).logits, y, rtol=1e-4, atol=1e-5)
    assert torch.equal(embeddings.weight, before)
    model.tie_weights()  # which takes the sum out of the head: it is merged no longer
    assert not model.lm_head.merged
    assert torch.equal(model(**inputs).logits, y)
    with pytest.warns(UserWarning, match="were tied"):
        merge(model)
    assert model.lm_head.merged
    unload(model)
    assert model.lm_head.weight is embeddings.weight


@hows
def test_shared_layers(how: str, device: torch.device) -> None:
    """ALBERT runs one layer three times: it is adapted once, and learns from all three."""
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_hidden_groups": 1}
    config = transformers.AlbertConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes)
    model = transformers.AlbertForSequenceClassification(config).to(device).eval()
    names = {"target_modules": ["query", "value", "ffn"]}
    model = put_in(how, model, "albert", **names)
    calls: list[nn.Module] = []
    layers = [m for n, m in model.named_modules() if n.endswith(tuple(names["target_modules"]))]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer))
    inputs = on(device, batch("roberta", 9))
    shared = gradients(model, inputs)[1:]
    assert [calls.count(layer) for layer in layers] == [3, 3, 3]
    # Three layers of their own values, which are the same: the sum of their gradients.
    group = next(m for m in model.modules() if hasattr(m, "albert_layer_groups"))
    layer = group.albert_layer_groups[0]
    group.albert_layer_groups = nn.ModuleList([layer, *(copy.deepcopy(layer) for _ in range(2))])
    group.config.num_hidden_groups = 3
    alone = gradients(model, inputs)[1:]
    for i, gradient in enumerate(shared):
        torch.testing.assert_close(gradient, sum(alone[i :: len(shared)]))


# --- compiled, and wrapped ---


def wrapped_whole(model: nn.Module) -> nn.Module:
    """torch.compile's module around it."""
    return torch.compile(model, backend="eager")


def wrapped_layers(model: nn.Module) -> nn.Module:
    """Each layer compiled, and checkpointed by torch's own wrapper."""
    for i, layer in enumerate(model.model.layers):
        wrapped = checkpoint_wrapper.checkpoint_wrapper(layer)
        model.model.layers[i] = torch.compile(wrapped, backend="eager")
    return model


def close(ours: Any, theirs: Any) -> None:
    """Equal but for the order of operations in float64, which float32 within a model may magnify:
    1e-16 of what it rounds makes 1e-7 of it, seldom.
    """
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wrap", [wrapped_whole, wrapped_layers])
@pytest.mark.usefixtures("large")  # compiled or not, by the same op
def test_wrapped_models(wrap: Callable[..., Any], device: torch.device, tmp_path: Path) -> None:
    """All that is done with an adapted model is done with one in wrappers, under the same names."""
    torch._dynamo.reset()
    base = tiny("llama", num_hidden_layers=1, use_cache=False).to(device).double()
    model = put_in("lora_xs", copy.deepcopy(base), "llama", modules_to_save=["lm_head"])
    inputs = on(device, batch("llama", 9))
    wrapped = wrap(copy.deepcopy(model))
    for change in (lambda _: None, merge, unmerge):
        for each in (model, wrapped):
            change(each)
        close(wrapped(**inputs).loss, model(**inputs).loss)
    with disable_adapters(model), disable_adapters(wrapped), torch.no_grad():
        close(wrapped(**inputs).loss, model(**inputs).loss)
    assert set(clean(wrapped.state_dict())) == set(model.state_dict())
    expected = gradients(model, inputs)
    settings = {"modules_to_save": ["lm_head"], "progress": False, **ADAPT["lora_xs"]}
    adapted = adapt(copy.deepcopy(base), target_modules=targets("llama"), **settings)
    for i, source in enumerate((model, wrapped)):
        save_adapter(source, tmp_path / str(i))
        for fresh in (base, adapted):
            for plain_or_wrapped in (lambda model: model, wrap):
                loaded = plain_or_wrapped(copy.deepcopy(fresh))
                load_adapter(loaded, tmp_path / str(i), progress=False)
                close(gradients(loaded, inputs), expected)
    late = wrap(copy.deepcopy(base))
    adapt(late, target_modules=r"model\.layers\.0\..*_proj", **settings)
    late.load_state_dict(wrapped.state_dict())
    close(gradients(late, inputs), expected)
    y = base(**inputs).logits
    for each in (wrapped, late):
        close(unload(each)(**inputs).logits, y)


def clean(names: Any) -> list[str]:
    """Without the wrappers' parts."""
    return [n.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "") for n in names]
