"""Serve ten thousand tenants, each with an adapter of its own, from one model in mixed batches.

A queue of requests of random tenants is decoded greedily with a KV cache. Requests join and leave
the running batch between steps, and every row of it is computed with its own tenant's adapter. The
same scheduler also serves the bare model and PEFT's `adapter_names`. Everything runs offline: the
model is a Llama of random weights.

    python examples/serve_many.py
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from fused_lowrank import AdapterBank, adapt

RANK = 16
VOCABULARY = 2048
PEFT_MOST = 64  # adapters; its loop runs over all of a batch's, in every layer
# The tenants of a forward's rows → a context for it, and keywords for the model.
Route = Callable[[list[str]], tuple[AbstractContextManager[Any], dict[str, Any]]]


@dataclass
class Request:
    """What a tenant asks for, and the tokens that it has got."""

    tenant: str
    prompt: list[int]
    count: int  # tokens to generate
    tokens: list[int] = field(default_factory=list)


@dataclass
class Batch:
    """The requests that run, and their keys and values, padded on the left to one length."""

    requests: list[Request]
    mask: Tensor  # (requests, length), 0 where there is padding
    cache: list[tuple[Tensor, Tensor]]  # of each layer, (requests, heads, length, size)

    def pad(self, length: int) -> Batch:
        """The same at another length."""
        more = length - self.mask.shape[1]
        cache = [(F.pad(k, (0, 0, more, 0)), F.pad(v, (0, 0, more, 0))) for k, v in self.cache]
        return Batch(self.requests, F.pad(self.mask, (more, 0)), cache)

    def join(self, other: Batch) -> Batch:
        """Both in one."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        a, b = self.pad(length), other.pad(length)
        pairs = zip(a.cache, b.cache, strict=True)
        cache = [(torch.cat((k, m)), torch.cat((v, w))) for (k, v), (m, w) in pairs]
        return Batch(a.requests + b.requests, torch.cat((a.mask, b.mask)), cache)

    def running(self) -> Batch | None:
        """Those of it that have not got all they asked for."""
        kept = [i for i, r in enumerate(self.requests) if len(r.tokens) < r.count]
        if len(kept) == len(self.requests):
            return self
        if not kept:
            return None
        mask = self.mask[kept]
        first = int(mask.any(0).int().argmax())  # the columns before are padding to all
        cache = [(k[kept, :, first:], v[kept, :, first:]) for k, v in self.cache]
        return Batch([self.requests[i] for i in kept], mask[:, first:], cache)


def forward(
    model: nn.Module,
    route: Route,
    requests: list[Request],
    ids: Tensor,
    mask: Tensor,
    past: DynamicCache,
) -> Batch:
    """One forward of the requests' new ids; each gets its next token."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    context, keywords = route([request.tenant for request in requests])
    with context:
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
            **keywords,
        )
    for request, token in zip(requests, out.logits[:, -1].argmax(-1).tolist(), strict=True):
        request.tokens.append(token)
    layers: Any = past.layers
    return Batch(requests, mask, [(layer.keys, layer.values) for layer in layers])


def prefill(model: nn.Module, route: Route, requests: list[Request]) -> Batch:
    """New requests, their prompts in one forward, padded on the left."""
    length = max(len(request.prompt) for request in requests)
    pads = [length - len(request.prompt) for request in requests]
    prompts = [[0] * pad + r.prompt for pad, r in zip(pads, requests, strict=True)]
    mask = torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads])
    return forward(model, route, requests, torch.tensor(prompts), mask, DynamicCache())


def decode(model: nn.Module, route: Route, batch: Batch) -> Batch:
    """A token more for every request of the batch."""
    past = DynamicCache()
    for i, (keys, values) in enumerate(batch.cache):
        past.update(keys, values, i)
    ids = torch.tensor([[request.tokens[-1]] for request in batch.requests])
    mask = F.pad(batch.mask, (0, 1), value=1)
    return forward(model, route, batch.requests, ids, mask, past)


@torch.inference_mode()
def serve(
    model: nn.Module, route: Route, requests: Sequence[Request], width: int, label: str = ""
) -> tuple[list[Request], float]:
    """(the requests with their tokens, seconds): at most `width` run at a time."""
    served = [replace(request, tokens=[]) for request in requests]
    queue, batch, seen = list(reversed(served)), None, set()
    total, begun = sum(request.count for request in served), time.perf_counter()
    with tqdm(total=total, unit="tok", desc=f"{label:>22}", disable=not label) as bar:
        while queue or batch:
            room = width - (len(batch.requests) if batch else 0)
            new = [queue.pop() for _ in range(min(room, len(queue)))]
            before = sum(len(request.tokens) for request in batch.requests) if batch else 0
            if batch:
                batch = decode(model, route, batch)
            if new:
                joining = prefill(model, route, new)
                batch = batch.join(joining) if batch else joining
            assert batch is not None
            seen |= {request.tenant for request in new}
            bar.update(sum(len(request.tokens) for request in batch.requests) - before)
            bar.set_postfix(active=len(batch.requests), tenants=len(seen), refresh=False)
            batch = batch.running()
    return served, time.perf_counter() - begun


def make_requests(count: int, tenants: int, seed: int) -> list[Request]:
    """Requests of random tenants, random in length and in what they ask for."""
    rng = random.Random(seed)
    return [
        Request(
            f"tenant-{rng.randrange(tenants)}",
            [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(4, 48))],
            rng.randint(4, 48),
        )
        for _ in range(count)
    ]


def make_model(hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama of random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def make_bank(model: nn.Module, adapters: int, block: int = 1000) -> AdapterBank:
    """The model's bank, filled with random cores, many at a time."""
    adapt(model, "lora_xs", target_modules="all-linear", r=RANK, progress=False)
    bank = AdapterBank.from_model(model, slots=adapters)
    for first in tqdm(range(0, adapters, block), unit=" thousand adapters", desc="bank"):
        names = [f"tenant-{i}" for i in range(first, min(first + block, adapters))]
        cores = {
            name: (torch.randn(len(names), RANK, RANK), None, torch.ones(len(names)))
            for name in bank.layers
        }
        bank.put(names, cores)
    return bank


def make_peft(model: nn.Module, tenants: Sequence[str]) -> nn.Module:
    """PEFT over the model, with a LoRA adapter of random factors for each of the tenants."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = get_peft_model(model, config, adapter_name=tenants[0])
        for tenant in tqdm(tenants[1:], unit=" adapters", desc="PEFT"):
            made.add_adapter(tenant, config)
    return made.eval()


def alone(model: Any, bank: AdapterBank, request: Request) -> list[int]:
    """The request's tokens, generated by itself with its own adapter."""
    ids = torch.tensor([request.prompt])
    with bank.use(request.tenant), torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.count, do_sample=False
        )
    return out[0, ids.shape[1] :].tolist()


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the queue in each of the ways; print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="requests that run at a time")
    parser.add_argument("--check", type=int, default=8, help="requests to generate again, alone")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    base = make_model(args.hidden, args.layers)
    model = copy.deepcopy(base)
    bank = make_bank(model, args.adapters)
    requests = make_requests(args.requests, args.adapters, seed=0)
    some = list(dict.fromkeys(request.tenant for request in requests))[:PEFT_MOST]
    few = [request for request in requests if request.tenant in some]
    print(f"{bank}, {bank.nbytes / 2**20:.0f} MiB")

    table: list[tuple[str, list[Request], float, float]] = []

    def run(label: str, model: nn.Module, route: Route, queue: list[Request]) -> list[Request]:
        serve(model, route, queue[:2], args.batch)  # warm up
        served, seconds = serve(model, route, queue, args.batch, label)
        bare = seconds if label == "bare model" else table[-1][3]
        table.append((label, served, seconds, bare))
        return served

    def routed(tenants: list[str]) -> Any:
        return bank.use(tenants), {}

    def unrouted(tenants: list[str]) -> Any:
        return nullcontext(), {}

    def named(tenants: list[str]) -> Any:
        return nullcontext(), {"adapter_names": tenants}

    run("bare model", base, unrouted, requests)
    served = run("bank", model, routed, requests)
    run("bare model", base, unrouted, few)
    run("bank", model, routed, few)
    if importlib.util.find_spec("peft"):
        run("PEFT adapter_names", make_peft(base, some), named, few)
    else:
        print("PEFT is not installed")

    sample = served[:: max(1, len(served) // max(1, args.check))][: args.check]
    right = [alone(model, bank, request) == request.tokens for request in sample]
    print(f"\n{'':22}{'requests':>10}{'tenants':>9}{'tokens':>9}{'tokens/s':>10}{'× bare':>8}")
    for label, done, seconds, bare in table:
        tokens, tenants = sum(len(r.tokens) for r in done), len({r.tenant for r in done})
        figures = f"{tenants:9}{tokens:9}{tokens / seconds:10.1f}{bare / seconds:8.2f}"
        print(f"{label:22}{len(done):10}{figures}")
    print(f"\n{sum(right)} of {len(right)} requests have the tokens that they get alone")
    if not all(right):
        raise SystemExit("tokens depend on the rest of the batch")


if __name__ == "__main__":
    main()
