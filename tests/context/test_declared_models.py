"""What callers say of rows: compiled, recomputed, on threads, in whole models, in README."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from declared_cases import LAYERS, RIGHT, doubled, expected, experts_that_say_it, said
from rows_cases import NAMES, K, Model, Native, Peft, ways
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_lowrank import AdapterBank, declare_rows

SHAPES = [(3, 3), (3, 5), (2, 2), (3, 3)]


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", **options)


@pytest.mark.parametrize("case", ["doubled by a kernel", "turned by a kernel", "turned and flat"])
def test_compiled_in_one_graph(case: str) -> None:
    """Forward and backward; one graph for all that is said, and for nothing said, an error."""
    call, rows = RIGHT[case]
    assert rows is not None
    served = Native(Model(call), LAYERS)
    model = compiled(served.model, fullgraph=True)
    for b, t in SHAPES:
        x = torch.randn(b, t, K, dtype=torch.float64, requires_grad=True)
        alone = expected(served, NAMES[:b], x)
        for _ in range(2):
            with served.bank.use(NAMES[:b]), said(served, rows(b, t)):
                mixed = model(x)
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (mixed, alone)]
            torch.testing.assert_close(mixed, alone)
            torch.testing.assert_close(*grads)
            alone = expected(served, NAMES[:b], x)
        if b == t:
            with pytest.raises(ValueError, match="lin was called"), served.bank.use(NAMES[:b]):
                model(x)


def test_compiled_with_two_things_said_in_one_use() -> None:
    """The backward of each goes by its own."""
    served = Native(Model(lambda lin, x: lin(doubled(x)).chunk(2)[1]), LAYERS)
    model = compiled(served.model, fullgraph=True)
    x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    results = []
    for rows in ([0, 1, 0, 1], [0, 1, 1, 0]):
        with served.bank.use(["a", "b"]), said(served, rows):
            served.model(x)  # followed
    with served.bank.use(["a", "b"]):
        for rows in ([0, 1, 0, 1], [0, 1, 1, 0]):
            with said(served, rows):
                results.append((rows, model(x)))
    for rows, y in results:
        with served.bank.use(["a", "b"]), said(served, rows):
            other = served.model(x)
        torch.testing.assert_close(y, other)
        grads = [torch.autograd.grad(z.square().sum(), x)[0] for z in (y, other)]
        torch.testing.assert_close(*grads)


def test_compiled_and_said_within() -> None:
    """It breaks the graph, which one that may not be broken says."""
    served = Native(Model(experts_that_say_it), LAYERS)
    plain, right = served.model, []
    with torch.no_grad():
        for b, t in ((3, 5), (2, 4)):
            x = torch.randn(b, t, K, dtype=torch.float64)
            right.append((x, expected(served, NAMES[:b], x)))
        served.model = compiled(plain)
        for x, alone in (*right, *right):
            torch.testing.assert_close(served(NAMES[: len(x)], x), alone)
        served.model = compiled(plain, fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="declare_rows is of the call"):
            served(NAMES[:3], right[0][0])


def test_compiled_with_adapter_names() -> None:
    """What is said is not made a part of a graph, nor passed over by one made before."""
    served = Peft(Model(lambda lin, x: lin(x)), LAYERS)
    plain, x = served.model, torch.randn(3, 4, K, dtype=torch.float64)
    whose = ([0, 1, 2], [2, 2, 0])
    with torch.no_grad():
        alone = [expected(served, [NAMES[i] for i in numbers], x) for numbers in whose]
        served.model = compiled(plain)
        for _ in range(2):
            torch.testing.assert_close(served(NAMES[:3], x), alone[0])
            with declare_rows(plain, whose[1]):
                torch.testing.assert_close(served(NAMES[:3], x), alone[1])


class Checkpointed(nn.Module):
    def __init__(self, call: Any, **options: Any) -> None:
        super().__init__()
        self.inner, self.options = Model(call), options

    @property
    def lin(self) -> nn.Module:
        return self.inner.lin

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, 1.0 * x, **self.options)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["experts", "sorted", "doubled by a kernel", "turned by a kernel"])
def test_recomputed(case: str, reentrant: bool) -> None:
    """Whatever is said while the backward runs."""
    call, rows = RIGHT[case]
    served = Native(Checkpointed(call, use_reentrant=reentrant), LAYERS)
    served.model.train()
    x = torch.randn(3, 3, K, dtype=torch.float64, requires_grad=True)
    grads = []
    for row, name in zip(x, NAMES[:3], strict=True):
        one = row[None].detach().requires_grad_()
        with served.bank.use(name):
            y = served.model.inner(one)
        grads.append(torch.autograd.grad(y.square().sum(), one)[0])
    for _ in range(2):
        with served.bank.use(NAMES[:3]):
            if rows is None:
                y = served.model(x)
                served.model(torch.randn(3, 3, K, dtype=torch.float64))
            else:
                with said(served, rows(3, 3)):
                    y = served.model(x)
        x.grad = None
        with declare_rows(served.model, lambda x: torch.zeros(x.shape[:-1]).long()):
            y.square().sum().backward()
        torch.testing.assert_close(x.grad, torch.cat(grads))


@pytest.mark.parametrize("given", [True, False])
def test_recomputed_with_two_things_said_in_one_use(given: bool) -> None:
    """By checkpoint_context; without it nobody knows which it was, which is an error."""
    options: dict[str, Any] = {"use_reentrant": False}
    if given:
        options["context_fn"] = AdapterBank.checkpoint_context
    call = RIGHT["doubled by a kernel"][0]
    served = Native(Checkpointed(call, **options), LAYERS)
    served.model.train()
    x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    both = ([0, 1, 0, 1], [0, 1, 1, 0])
    right = []
    for rows in both:
        with served.bank.use(["a", "b"]), said(served, rows):
            y = served.model.inner(x)
        right.append(torch.autograd.grad(y.square().sum(), x)[0])
    results = []
    with served.bank.use(["a", "b"]):
        for rows in both:
            with said(served, rows):
                results.append(served.model(x))
    for y, grad in zip(results, right, strict=True):
        if given:
            torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], grad)
        else:
            with pytest.raises(RuntimeError, match="checkpoint_context"):
                torch.autograd.grad(y.square().sum(), x)


@ways
def test_it_is_of_the_thread(way: Any) -> None:
    served = way(Model(lambda lin, x: lin(doubled(x)).chunk(2)[1]), LAYERS)
    x = torch.randn(2, 2, K, dtype=torch.float64)
    orders = ([0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], None)

    def call(rows: Any) -> Tensor | None:
        if rows is None:
            with pytest.raises(ValueError, match="lin was called with x"):
                served(["a", "b"], x)
            return None
        with said(served, rows):
            return served(["a", "b"], x)

    with torch.no_grad():
        right = [call(rows) for rows in orders]
    wrong, start = [], threading.Barrier(len(orders))

    def serve(rows: Any, expected: Tensor | None) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(30):
                y = call(rows)
                if y is not None and not torch.equal(y, expected):
                    wrong.append(rows)

    threads = [
        threading.Thread(target=serve, args=pair) for pair in zip(orders, right, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_modules_to_save() -> None:
    """PEFT's own modules get a name for each row; what has no such form is an error."""
    peft = pytest.importorskip("peft")
    from fused_lowrank.integrations.peft import LoraXSConfig

    def config() -> Any:
        return LoraXSConfig(r=3, target_modules=["first"], modules_to_save=["lin"])

    call = RIGHT["turned and flat"][0]
    model = peft.get_peft_model(Model(call), config(), adapter_name="a").double()
    for name in "bc":
        model.add_adapter(name, config())
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_xs_core" in name or "modules_to_save" in name:
                parameter.normal_()
    x, alone = torch.randn(3, 3, K, dtype=torch.float64), []
    for i, name in enumerate("abc"):
        model.set_adapter(name)
        alone.append(model(x[i : i + 1]))
    with declare_rows(model.lin, [0, 1, 2] * 3):
        torch.testing.assert_close(model(x, adapter_names=list("abc")), torch.cat(alone))
    with pytest.raises(ValueError, match=r"declare_rows"):
        model(x, adapter_names=list("abc"))
    with declare_rows(model.lin, [0, 1]), pytest.raises(ValueError, match="does not fit"):
        model(x, adapter_names=list("abc"))


# --- whole models ---


def sees_images(way: Any) -> tuple[Any, Any]:
    """Qwen2-VL with adapters in its tower, too, and its tower."""
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 2}
    vision |= {"in_channels": 3, "mlp_ratio": 2, "initializer_range": 0.2}
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval().double()
    tower = model.model.visual
    return way(
        model, ["qkv", "attn.proj", "fc1", "fc2", "mlp.0", "mlp.2", "q_proj", "v_proj"]
    ), tower


def batch_of(images: list[list[tuple[int, int]]]) -> tuple[list[dict[str, Tensor]], Any]:
    """Sequences with images of these sizes in patches, each alone, and all of them."""
    alone = []
    for sizes in images:
        ids = [5, 6]
        for height, width in sizes:
            ids += [62, *[60] * (height * width // 4), 63]
        patches = sum(height * width for height, width in sizes)
        alone.append(
            {
                "input_ids": torch.tensor([ids]),
                "pixel_values": torch.randn(patches, 3 * 2 * 2 * 2, dtype=torch.float64),
                "image_grid_thw": torch.tensor([[1, *size] for size in sizes]),
            }
        )
    length = max(one["input_ids"].shape[1] for one in alone)
    padded = []
    for one in alone:
        left = length - one["input_ids"].shape[1]
        one["input_ids"] = nn.functional.pad(one["input_ids"], (left, 0), value=1)
        one["attention_mask"] = (torch.arange(length) >= left).long()[None]
        one["mm_token_type_ids"] = (one["input_ids"] == 60).int()
        padded.append(one)
    return alone, {key: torch.cat([one[key] for one in padded]) for key in alone[0]}


@ways
@torch.no_grad()
def test_patches_of_several_images(way: Any) -> None:
    """Rows of the tower are patches, and of its merger four of them: refused until it is said."""
    served, tower = sees_images(way)
    alone, mixed = batch_of([[(4, 4)], [(2, 4), (4, 2), (2, 4)]])
    names, patches = ["a", "b"], [16, 24]
    whose = torch.arange(2).repeat_interleave(torch.tensor(patches))

    def rows(x: Tensor) -> Tensor:
        return whose[:: len(whose) // len(x)]

    right = [served.alone(name, **one).logits[0] for name, one in zip(names, alone, strict=True)]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"visual.*declare_rows"):
            served(names, **mixed)
        with declare_rows(tower, rows):
            logits = served(names, **mixed).logits
            others = served(names[::-1], **mixed).logits
        for i in range(2):
            torch.testing.assert_close(logits[i], right[i])
            assert not torch.allclose(others[i], right[i])
        with declare_rows(tower, whose), pytest.raises(ValueError, match=r"does not fit .*merger"):
            served(names, **mixed)  # which has fewer rows
        with declare_rows(tower, whose), declare_rows(tower.merger, whose[::4]):
            torch.testing.assert_close(served(names, **mixed).logits, logits)


@ways
@torch.no_grad()
def test_generating_from_images(way: Any) -> None:
    served, tower = sees_images(way)
    alone, mixed = batch_of([[(4, 4)], [(2, 4), (4, 2)], [(2, 2)]])
    whose = torch.arange(3).repeat_interleave(torch.tensor([16, 16, 4]))
    options = {"max_new_tokens": 3, "do_sample": False, "min_new_tokens": 3, "pad_token_id": 1}

    def generated(names: Any, inputs: Any) -> Tensor:
        if way is Native:
            with served.bank.use(names):
                return served.model.generate(**inputs, **options)
        if isinstance(names, str):
            served.model.set_adapter(names)
            return served.model.generate(**inputs, **options)
        return served.model.generate(**inputs, **options, adapter_names=names)

    with declare_rows(tower, lambda x: whose[:: len(whose) // len(x)]):
        tokens = generated(NAMES[:3], mixed)
    for i, name in enumerate(NAMES[:3]):
        assert torch.equal(tokens[i], generated(name, alone[i])[0])


def test_readme() -> None:
    """Its example, of a mixture of experts and of a tower that sees patches."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    (example,) = (block for block in blocks if "declare_rows" in block)

    class Sees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Linear(K, K, dtype=torch.float64)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.visual(pixel_values)

    def example_of(served: Native, **known: Any) -> dict[str, Any]:
        bank, cores = served.bank, {}
        for name in bank.layers:
            cores[name] = torch.randn(2, 3, 3), None, torch.ones(2)
        bank.remove("c")
        bank.remove("d")
        bank.put(["alice", "bob"], cores)
        names = {"torch": torch, "nn": nn, "bank": bank, "model": served.model, **known}
        exec(example, names)
        return names

    served, x = Native(Sees(), ["visual"]), torch.randn(40, K, dtype=torch.float64)
    found = example_of(served, inputs={"pixel_values": x})
    for name, part in (("alice", slice(16)), ("bob", slice(16, 40))):
        torch.testing.assert_close(found["output"][part], served.alone(name, x[part]))

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = found["Experts"](K, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(x)

    served = Native(Mixed(), ["0", "1", "2"])
    x = torch.randn(3, 6, K, dtype=torch.float64)
    for names in (NAMES[:3], NAMES[1:]):
        torch.testing.assert_close(served(names, x), expected(served, names, x))
