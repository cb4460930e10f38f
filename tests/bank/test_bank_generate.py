"""Text generated in mixed batches is what each sequence gets alone, by its adapter as a plain one.

In float64, so that no two tokens are near enough for the batch's rounding to part them.
"""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from fused_lowrank import AdapterBank, adapt
from fused_lowrank.models.adapt import adapted_layers

transformers = pytest.importorskip("transformers")
VOCABULARY, NEW = 61, 7
LINES = ["a", None, "b", "a", "c"]
PROMPTS = [[5, 9, 33], [7], [12, 40, 2, 51, 19], [8, 8, 21, 60], [3, 30]]


def make_model() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval().double()


class Served:
    """A model in a bank, and one like it for each adapter, which knows of no bank."""

    def __init__(self, device: torch.device) -> None:
        base = make_model().to(device)
        self.model = adapt(
            copy.deepcopy(base), "lora_xs", target_modules="all-linear", r=8, progress=False
        )
        self.plain = {None: base}
        for name in "abc":
            plain = copy.deepcopy(self.model)
            for _, layer in adapted_layers(plain):
                layer.core.data.normal_()
            self.plain[name] = plain
        self.bank = AdapterBank.from_model(self.model, slots=9)
        for name in "abc":
            self.bank.add(name, self.plain[name])
        self.device = device

    def alone(self, name: str | None, prompt: list[int], **options) -> torch.Tensor:
        """The new tokens of one prompt, (sequences, NEW)."""
        return self.generate(self.plain[name], [prompt], **options)

    def generate(self, model, prompts: list[list[int]], **options) -> torch.Tensor:
        """The new tokens of several prompts, padded on the left."""
        length = max(map(len, prompts))
        padded = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=self.device)
        options = {"max_new_tokens": NEW, "do_sample": False, **options}
        out = model.generate(padded, attention_mask=(padded != 0).long(), **options)
        return out[:, length:]


@pytest.fixture
def served(device: torch.device) -> Served:
    """Adapters a, b and c in a bank and as plain ones."""
    return Served(device)


WAYS = {
    "greedy": {},
    "three beams": {"num_beams": 3},
    "two of four beams": {"num_beams": 4, "num_return_sequences": 2},
    "three samples": {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    "without a cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_generate(served, options):
    with served.bank.use(LINES):
        tokens = served.generate(served.model, PROMPTS, **options)
    right = [served.alone(*line, **options) for line in zip(LINES, PROMPTS, strict=True)]
    assert torch.equal(tokens, torch.cat(right))
    base = served.generate(served.plain[None], PROMPTS, **options)
    each = len(tokens) // len(LINES)
    same = [bool((tokens[i] == base[i]).all()) for i in range(0, len(tokens), each)]
    assert same == [name is None for name in LINES]  # the adapters show


def test_generate_by_one_name_and_by_handles(served):
    right = served.alone("b", PROMPTS[2], num_beams=3)
    handles = served.bank.handles(["b"])
    for names in ("b", ["b"], handles):
        with served.bank.use(names):
            assert torch.equal(served.generate(served.model, [PROMPTS[2]], num_beams=3), right)


@torch.no_grad()
def test_a_row_prefills_while_another_decodes(served):
    """One forward: a token more of the first sequence beside the whole prompt of the second."""
    first, second, device = PROMPTS[2], PROMPTS[3], served.device
    past = transformers.DynamicCache()
    with served.bank.use(["a", None]):
        served.model(
            torch.tensor([first[:-1], [0] * (len(first) - 1)], device=device),
            attention_mask=torch.tensor([[1], [0]], device=device).expand(2, len(first) - 1),
            past_key_values=past,
        )
    gap = len(second) - 1
    mask = [[1] * (len(first) - 1) + [0] * gap + [1], [0] * (len(first) - 1) + [1] * len(second)]
    positions = [[0] * gap + [len(first) - 1], list(range(len(second)))]
    with served.bank.use(["a", "b"]):
        out = served.model(
            torch.tensor([[0] * gap + first[-1:], second], device=device),
            attention_mask=torch.tensor(mask, device=device),
            position_ids=torch.tensor(positions, device=device),
            past_key_values=past,
        )
    for row, name, prompt in ((0, "a", first), (1, "b", second)):
        right = served.plain[name](torch.tensor([prompt], device=device)).logits[0, -1]
        torch.testing.assert_close(out.logits[row, -1], right)


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "serve_many.py"
    spec = importlib.util.spec_from_file_location("serve_many", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_many"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["serve_many"]


@pytest.mark.parametrize("width", [1, 3, 9])
def test_requests_that_join_and_leave(served, example, width):
    if served.device.type != "cpu":
        pytest.skip("the example is for a CPU")
    counts = [5, 1, 7, 2, 3, 6, 4, 1]
    queue = [
        example.Request(LINES[i % 5], PROMPTS[(i * 3) % 5], count) for i, count in enumerate(counts)
    ]
    widths = []

    def route(tenants):
        widths.append(len(tenants))
        return served.bank.use(tenants), {}

    done, _ = example.serve(served.model, route, queue, width)
    assert max(widths) == min(width, len(queue))
    for request in done:
        right = served.alone(request.tenant, request.prompt, max_new_tokens=request.count)
        assert request.tokens == right[0].tolist()
