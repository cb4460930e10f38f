"""Fine-tune a sentence encoder to search code, its base in nf4 and in 16 bits, and compare the two.

The task is that of code_search.py, with shorter texts and fewer steps. All linear layers of the
encoder are quantised by bitsandbytes as QLoRA has it: nf4, in blocks whose maxima are quantised as
well, computed in bfloat16. Beside it stands the same encoder in bfloat16. Every run is a line of
`qlora.jsonl`, and a call goes on where the last one stopped.

    python examples/qlora.py
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import torch
from code_search import (
    bytes_saved,
    contrastive_loss,
    find_model,
    make_batches,
    rate_factor,
    tokenise,
)
from code_search_data import collect_pairs
from family import (
    CODE_TOKENS,
    QUERY_TOKENS,
    Texts,
    machine,
    parse_arguments,
    read_lines,
    searched,
    split,
)
from qlora_results import BASES, FROZEN, write_results
from torch import Tensor, nn
from tqdm.auto import tqdm
from train_many import cut
from transformers import AutoModel, BitsAndBytesConfig
from transformers.utils import logging

from fused_lowrank import adapt, disable_adapters

STEPS, BATCH, CLIP = 28, 32, 1.0
SEEDS = (0, 1, 2)
DTYPE = torch.bfloat16
# name → (method, its options, learning rate: as in code_search.py, LoRA's higher, for fewer steps)
METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    "LoRA": ("lora", {"r": 16}, 1.5e-3),
    "LoRA-XS": ("lora_xs", {"r": 16}, 4e-3),
    "LoRA-Mini": ("lora_mini", {"r": 8, "a": 64, "b": 64}, 1e-2),
}


@dataclass
class Task:
    """The encoder's folder, token ids of all texts, and which pairs are for what."""

    folder: Path
    device: str
    queries: Texts
    codes: Texts
    batches: dict[int, list[np.ndarray]]  # by the seed
    held_out: range
    setup: dict[str, Any]  # what makes results comparable

    def pairs(self, indices: Any) -> tuple[Texts, Texts]:
        """The texts of some pairs."""
        return [self.queries[i] for i in indices], [self.codes[i] for i in indices]


def make_task(folder: Path, device: str) -> Task:
    """The task, from Python's standard library; what family.py keeps for validation is not used."""
    training, _, held_out = split(collect_pairs(Path(sysconfig.get_path("stdlib"))))
    queries, codes = tokenise(folder, [*training, *held_out])
    return Task(
        folder,
        device,
        [cut(text, QUERY_TOKENS) for text in queries],
        [cut(text, CODE_TOKENS) for text in codes],
        {seed: make_batches(len(training), STEPS, BATCH, seed) for seed in SEEDS},
        range(len(training), len(training) + len(held_out)),
        {
            "encoder": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12],
            "training_pairs": len(training),
            "held_out_pairs": len(held_out),
            "tokens": [QUERY_TOKENS, CODE_TOKENS],
            "steps": STEPS,
            "batch": BATCH,
        },
    )


# ------------------------------------------------------------------------------------- encoder


def load_encoder(folder: Path, base: str, device: str) -> nn.Module:
    """A fresh encoder over one of the bases, without dropout; its last hidden states are float32.

    Only so can two cosines that are near each other be told apart.
    """
    logging.set_verbosity_error()  # the pooler's weights in the file are not used: no report on it
    logging.disable_progress_bar()
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPE,
    )
    model: Any = AutoModel.from_pretrained(
        folder,
        local_files_only=True,
        add_pooling_layer=False,
        dtype=DTYPE,
        device_map=device,
        quantization_config=quantised if base == "nf4" else None,
    )

    def widen(_: nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.float()
        return output

    model.register_forward_hook(widen)
    return model.requires_grad_(False).eval()


def weight_tensors(linear: nn.Module) -> list[Tensor]:
    """What a linear layer keeps of its weight: the weight, or its codes, maxima and tables."""
    weight: Any = linear.weight
    state = getattr(weight, "quant_state", None)
    parts = [] if state is None else [state.absmax, state.code]
    if state is not None and state.nested:
        parts += [state.offset, state.state2.absmax, state.state2.code]
    return [weight, *parts]


def base_bytes(model: nn.Module) -> tuple[int, int]:
    """(bytes of the linear layers' weights, of everything that is in the model) before adapt."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    tensors = {t for linear in linears for t in weight_tensors(linear)}
    rest = {*model.parameters(), *model.buffers()} - tensors
    of_linears = sum(t.nbytes for t in tensors)
    return of_linears, of_linears + sum(t.nbytes for t in rest)


# ------------------------------------------------------------------------------------ one run


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Bytes at the peak of a step, above what was there before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    events: Any = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(0, *np.cumsum([change for _, change in changes]).tolist())


def train(model: nn.Module, task: Task, name: str, seed: int) -> dict[str, Any]:
    """Train the adapters: the losses, and what of memory a step takes (the last one's peak)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    batches = task.batches[seed]
    saved = bytes_saved(model, *task.pairs(batches[0]))
    optimizer = torch.optim.AdamW(parameters, lr=METHODS[name][2], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(len(batches)))
    losses: list[float] = []

    def step(indices: np.ndarray) -> None:
        loss = contrastive_loss(model, *task.pairs(indices))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()

    for indices in tqdm(batches, name, unit="step", leave=False):
        step(indices)
    trained_losses = [round(loss, 4) for loss in losses]
    # Of one batch, for all runs alike, now that the optimiser's state is there; the rate is 0 now.
    peak = peak_bytes(lambda: step(task.batches[SEEDS[0]][0]), task.device)
    return {"losses": trained_losses, "saved_bytes": saved, "peak_bytes": peak}


def run(task: Task, base: str, name: str, seed: int) -> dict[str, Any]:
    """Train a fresh encoder by a method, or none, and search with it: a line of the results."""
    begin, processor = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    model = load_encoder(task.folder, base, task.device)
    linears, whole = base_bytes(model)
    # A frozen encoder is an adapted one that is disabled: bitsandbytes' own layers round the maxima
    # further when they are called for inference on some CPUs.
    method, options, rate = METHODS["LoRA" if name == FROZEN else name]
    adapt(model, method, target_modules="all-linear", progress=False, **options)
    found: dict[str, Any] = {"losses": [], "saved_bytes": 0, "peak_bytes": 0}
    if name == FROZEN:
        rate, trained = 0.0, 0
        with disable_adapters(model):
            ranks, loss = searched(model, task.pairs(task.held_out))
    else:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found = train(model, task, name, seed)
        ranks, loss = searched(model, task.pairs(task.held_out))
    return {
        "base": base,
        "method": name,
        "options": options if trained else {},
        "seed": seed,
        "lr": rate,
        "trained": trained,
        "linear_bytes": linears,
        "model_bytes": whole,
        **found,
        "loss": loss,
        "mrr": float((1 / ranks).mean()),
        "recall@1": float((ranks == 1).mean()),
        "ranks": ranks.tolist(),
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
    }


def wanted_runs() -> list[tuple[str, str, int]]:
    """(base, method, seed) of all runs: all of one seed before the next."""
    frozen = [(base, FROZEN, SEEDS[0]) for base in BASES]
    return [*frozen, *((base, name, s) for s in SEEDS for name in METHODS for base in BASES)]


def main() -> None:
    """Make the runs that are not there yet, and write what all say."""
    arguments = parse_arguments(__doc__)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler writes a line per call
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "qlora.jsonl"
    task = make_task(find_model(arguments.model), "cuda" if torch.cuda.is_available() else "cpu")
    here = {**machine(), "bitsandbytes": bitsandbytes.__version__}
    lines = read_lines(path, task.setup)
    done = {(line["base"], line["method"], line["seed"]) for line in lines}
    for base, name, seed in wanted_runs():
        if (base, name, seed) in done:
            continue
        line = {**run(task, base, name, seed), "setup": task.setup, "machine": here}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(line)
        print(
            f"{len(lines)}: {name} over {base}, seed {seed}: MRR {line['mrr']:.4f}, "
            f"loss {line['loss']:.4f}, {line['seconds']:.0f} s",
            flush=True,
        )
    print(write_results(lines, arguments.out))


if __name__ == "__main__":
    main()
