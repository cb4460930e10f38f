"""Whole models of transformers with an adapter for each sequence: what each gets alone.

Batches have as many positions as sequences, and the first call is such a one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rows_cases import NAMES, K, Model, Native, Peft, ways
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_lowrank import AdapterBank, adapt, disable_adapters

transformers = pytest.importorskip("transformers")
VOCABULARY, WIDTH = 61, 32
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
SEQ2SEQ: dict[str, Any] = {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
VISION = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "patch_size": 8}
VISION |= {"num_attention_heads": 4, "image_size": 16, "initializer_range": 0.2}
T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 1}
T5 |= {"num_heads": 4, "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("ForCausalLM", TEXT),
    "Bert": ("ForMaskedLM", TEXT),
    "OPT": (
        "ForCausalLM",  # it flattens sequences and positions
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": 48,
        }
        | {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}
        | {"eos_token_id": None, "init_std": 0.2},
    ),
    "T5": ("ForConditionalGeneration", T5),
    "Bart": (
        "ForConditionalGeneration",
        {**SEQ2SEQ, "vocab_size": VOCABULARY, "forced_eos_token_id": None},
    ),
    "FSMT": (
        "ForConditionalGeneration",  # positions come first
        {
            **SEQ2SEQ,
            "langs": ["en", "de"],
            "src_vocab_size": VOCABULARY,
            "tgt_vocab_size": VOCABULARY,
            "forced_eos_token_id": None,
        },
    ),
    "XLNet": (
        "LMHeadModel",  # positions come first
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": 1, "n_head": 4, "d_inner": 48},
    ),
}


def made(name: str) -> nn.Module:
    head, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, name + head)(config).eval().double()


def served_by(way: Any, model: nn.Module) -> Any:
    linear = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return way(model, sorted(linear - {"lm_head", "decoder"}))


def prompts(sequences: int = 4, positions: int = 4) -> Tensor:
    return torch.randint(3, VOCABULARY, (sequences, positions))


@ways
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits(name: str, way: Any) -> None:
    served = served_by(way, made(name))
    for shape in ((4, 4), (2, 4), (4, 7)):
        ids = prompts(*shape)
        rest = {"decoder_input_ids": ids} if "Conditional" in MODELS[name][0] else {}
        names = NAMES[: len(ids)]
        mixed = served(names, input_ids=ids, **rest).logits
        others = served(names[::-1], input_ids=ids, **rest).logits
        for i, adapter in enumerate(names):
            row = {key: value[i : i + 1] for key, value in rest.items()}
            alone = served.alone(adapter, input_ids=ids[i : i + 1], **row).logits
            torch.testing.assert_close(mixed[i], alone[0])
            assert not torch.allclose(mixed[i], others[i])


GENERATED = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "two of three beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "guided": {"guidance_scale": 1.5},
    "static": {"cache_implementation": "static", "num_beams": 2},
    "configured": {"generation_config": {"num_beams": 2, "num_return_sequences": 2}},
}


@ways
@pytest.mark.parametrize("options", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize("name", ["Llama", "OPT", "T5", "Bart", "FSMT"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_generated(name: str, options: dict[str, Any], way: Any) -> None:
    if name != "Llama" and {"guidance_scale", "cache_implementation"} & set(options):
        pytest.skip("as with the first model")
    if name == "FSMT" and "do_sample" in options:
        pytest.skip("its logits have ties")
    served, ids = served_by(way, made(name)), prompts()
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "min_new_tokens": 3}
    settings |= options
    if "generation_config" in options:
        config = {**settings.pop("generation_config"), **settings}
        settings = {"generation_config": transformers.GenerationConfig(**config)}

    def generated(names: Any, ids: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **settings}
        if way is Native:
            with served.bank.use(names):
                return served.model.generate(**given)
        if isinstance(names, str):
            served.model.set_adapter(names)
            return served.model.generate(**given)
        return served.model.generate(adapter_names=names, **given)

    mixed = generated(NAMES, ids)
    each = len(mixed) // len(ids)
    for i, adapter in enumerate(NAMES):
        alone = generated(adapter, ids[i : i + 1])
        assert torch.equal(mixed[i * each : (i + 1) * each], alone)


@ways
@torch.no_grad()
def test_beams_are_of_generate_alone(way: Any) -> None:
    """A doubled batch is refused after it, too, and so are too many rows."""
    served, ids = served_by(way, made("Llama")), prompts()
    with pytest.raises(ValueError, match=r"q_proj was called with .*4 adapters"):
        served(NAMES, input_ids=torch.cat([ids, ids]))
    if way is Native:
        with served.bank.use(NAMES):
            served.model.generate(input_ids=ids, num_beams=2, max_new_tokens=2, do_sample=False)
            with pytest.raises(ValueError, match=r"q_proj was called with .*4 adapters"):
                served.model(input_ids=torch.cat([ids, ids]))


@ways
@torch.no_grad()
def test_text_and_images(way: Any) -> None:
    """CLIP's, one of each; two images for four texts are nobody's, and the text is right."""
    torch.manual_seed(0)
    text = {**TEXT, "eos_token_id": 60, "bos_token_id": 1, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    model = transformers.CLIPModel(config).eval().double()
    served = served_by(way, model)
    ids, pixels = prompts(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    mixed = served(NAMES, input_ids=ids, pixel_values=pixels)
    for i, adapter in enumerate(NAMES):
        one = {"input_ids": ids[i : i + 1], "pixel_values": pixels[i : i + 1]}
        alone = served.alone(adapter, **one)
        torch.testing.assert_close(mixed.text_embeds[i], alone.text_embeds[0])
        torch.testing.assert_close(mixed.image_embeds[i], alone.image_embeds[0])
    with pytest.raises(ValueError, match=r"vision_model.*exclude_modules"):
        served(NAMES, input_ids=ids, pixel_values=pixels[:2])


@ways
@torch.no_grad()
def test_images_that_are_not_one_to_a_sequence(way: Any) -> None:
    """As many patches, or images, as sequences do not make them theirs: all are the first one's."""

    class Sees(nn.Module):
        config = transformers.LlamaConfig(image_token_id=9)

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, K, dtype=torch.float64)
            self.tower, self.head = (nn.Linear(K, K, dtype=torch.float64) for _ in range(2))

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            hidden, places = self.embed(input_ids), (input_ids == 9)[..., None]
            return self.head(hidden.masked_scatter(places, self.tower(pixel_values)))

    served = way(Sees(), ["tower", "head"])
    pixels = torch.randn(4, K, dtype=torch.float64)
    one_each = torch.tensor([[9, 5, 6, 7]] * 4)
    mixed = served(NAMES, input_ids=one_each, pixel_values=pixels)
    for i, adapter in enumerate(NAMES):
        alone = served.alone(adapter, input_ids=one_each[:1], pixel_values=pixels[i : i + 1])
        torch.testing.assert_close(mixed[i], alone[0])
    all_first = torch.tensor([[9, 9, 9, 9], *[[5, 6, 7, 8]] * 3])
    for _ in range(2):
        with pytest.raises(ValueError, match="tower was called with x of"):
            served(NAMES, input_ids=all_first, pixel_values=pixels)


@ways
def test_an_encoder_layer_with_positions_first(way: Any) -> None:
    class Encodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(K, 2, 12, 0.0, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x.transpose(0, 1)).transpose(0, 1)

    served = way(Encodes(), ["linear1", "linear2"])
    for shape in ((4, 4), (4, 6)):
        x = torch.randn(*shape, K, dtype=torch.float64)
        mixed = served(NAMES, x)
        for i, adapter in enumerate(NAMES):  # its own names: PEFT's eval without them goes round it
            torch.testing.assert_close(mixed[i], served([adapter], x[i : i + 1])[0])
        assert not torch.allclose(mixed, served(NAMES[::-1], x))


# --- compiled, recomputed, on threads ---

CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "batch first": lambda lin, x: lin(x),
    "time first": lambda lin, x: lin(x.transpose(0, 1)).transpose(0, 1),
    "flat": lambda lin, x: lin(x.reshape(-1, K)).view_as(x),
}
LAYERS = ["first", "lin", "last"]


@pytest.mark.parametrize("part", ["whole", "inside"])
@pytest.mark.parametrize("case", CALLS)
def test_compiled(case: str, part: str) -> None:
    """In one graph, also where the first call is compiled."""
    torch._dynamo.reset()
    model = nn.Sequential(Model(CALLS[case]))
    served = Native(model, LAYERS)
    call: Any = model
    if part == "whole":
        call = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        model[0].compile(fullgraph=True, backend="aot_eager")
    for shape in ((4, 4), (4, 6), (4, 4)):
        x = torch.randn(*shape, K, dtype=torch.float64, requires_grad=True)
        alone = torch.cat([served.alone(n, row[None]) for n, row in zip(NAMES, x, strict=True)])
        with served.bank.use(NAMES):
            mixed = call(x)
        torch.testing.assert_close(mixed, alone)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (mixed, alone)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", CALLS)
def test_recomputed(case: str, reentrant: bool) -> None:
    """In a checkpoint, after other calls in the same use."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model(CALLS[case])

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, 1.0 * x, use_reentrant=reentrant)

    served = Native(Checkpointed(), LAYERS)
    served.model.train()
    x = torch.randn(4, 4, K, dtype=torch.float64, requires_grad=True)
    grads = []
    for row, name in zip(x, NAMES, strict=True):
        one = row[None].detach().requires_grad_()
        with served.bank.use(name):
            y = served.model.inner(one)
        grads.append(torch.autograd.grad(y.square().sum(), one)[0])
    for _ in range(2):
        with served.bank.use(NAMES):
            y = served.model(x)
            served.model(torch.randn(4, 5, K, dtype=torch.float64))
        x.grad = None
        y.square().sum().backward()
        torch.testing.assert_close(x.grad, torch.cat(grads))


def test_adapter_names_are_of_the_thread() -> None:
    """Two threads, each with names of its own, some of them none."""
    served = Peft(Model(CALLS["batch first"]), LAYERS)
    x = torch.randn(2, 3, K, dtype=torch.float64)
    given = {("a", "b"), ("c", "d"), ("b", "b"), ("d", "__base__")}
    with torch.no_grad():
        right = {names: served(names, x) for names in given}
    wrong, start = [], threading.Barrier(len(given))

    def call(names: tuple[str, str]) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(60):
                if not torch.equal(served(names, x), right[names]):
                    wrong.append(names)

    threads = [threading.Thread(target=call, args=(names,)) for names in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("compiled", [False, True])
def test_disabling_is_of_the_thread(compiled: bool) -> None:
    """And no error within a use, or around one."""
    torch._dynamo.reset()
    served = Native(Model(CALLS["batch first"]), LAYERS)
    model: Any = served.model
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)

    def result() -> Tensor:
        y = call(x)
        return torch.cat([y.flatten(), torch.autograd.grad(y.sum(), x)[0].flatten()]).detach()

    with served.bank.use(["a", "b"]):
        with_adapters = result()
    with served.bank.use(None):
        bare = result()
    own = result()
    with disable_adapters(model), served.bank.use(["a", "b"]):
        torch.testing.assert_close(result(), bare)
    with served.bank.use(["a", "b"]), disable_adapters(model):
        torch.testing.assert_close(result(), bare)
    wrong: list[str] = []

    def other() -> None:
        with served.bank.use(["a", "b"]):
            if not torch.allclose(result(), with_adapters):
                wrong.append("a use")
        if not torch.allclose(result(), own):
            wrong.append("no use")

    with disable_adapters(model):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with disable_adapters(model.lin):
            torch.testing.assert_close(result(), bare)
        torch.testing.assert_close(result(), bare)
    assert not wrong
    torch.testing.assert_close(result(), own)
    assert all(layer.disabled is False for layer in served.bank.layers.values())


def test_disabling_of_layers_in_no_bank() -> None:
    model: Any = adapt(Model(CALLS["batch first"]), target_modules=LAYERS, r=3, progress=False)
    base = {name: getattr(model, name) for name in LAYERS}
    x = torch.randn(2, 3, K, dtype=torch.float64)
    with torch.no_grad():
        for layer in base.values():
            layer.core.normal_()
    own, seen = model(x), []
    with disable_adapters(model):
        bare = model(x)
        thread = threading.Thread(target=lambda: seen.append(model(x)))
        thread.start()
        thread.join()
    assert not torch.allclose(bare, own)
    assert torch.equal(seen[0], own)
    assert torch.equal(model(x), own)


def test_training_many() -> None:
    """Gradients go to the adapters of their rows, wherever these are."""
    served = Native(Model(CALLS["time first"]), LAYERS)
    bank: AdapterBank = served.bank
    x = torch.randn(4, 4, K, dtype=torch.float64)
    trained = bank.trainable(NAMES)
    with trained.use(NAMES):
        served.model(x).square().sum().backward()
    mixed = [parameter.grad.clone() for parameter in trained.parameters()]
    for parameter in trained.parameters():
        parameter.grad = None
    for i, name in enumerate(NAMES):
        with trained.use([name]):
            served.model(x[i : i + 1]).square().sum().backward()
    alone = [parameter.grad for parameter in trained.parameters()]
    torch.testing.assert_close(mixed, alone)
