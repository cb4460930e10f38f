"""Train LoRA-XS on a small Llama by one process or by several, and go on from a checkpoint.

    torchrun --nproc-per-node 2 examples/train_distributed.py --parallel fsdp --folder run --steps 4
    torchrun --nproc-per-node 2 examples/train_distributed.py --parallel tp --folder run --steps 8
    python examples/train_distributed.py --folder run --steps 12

The second command goes on where the first stopped, and the third where the second did: a checkpoint
does not depend on the way in which it was made. The model has random weights and learns random
tokens by heart: what is shown is the set-up, on GPUs or on CPUs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lowrank import adapt, load_adapter, save_adapter
from fused_lowrank.parallel import LowRankColwiseParallel, LowRankRowwiseParallel

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
LINES, LENGTH, LEARNING_RATE = 8, 16, 1e-2


def build(start: Path, rank: int) -> nn.Module:
    """The adapted model, alike on every rank; the first run writes the adapter it starts from."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **HEADS, initializer_range=0.2, use_cache=False)
    model: Any = LlamaForCausalLM(config)
    if start.exists():
        return load_adapter(model, start, progress=False)
    adapt(model, "lora_xs", target_modules="all-linear", r=8, progress=False)
    if rank == 0:
        save_adapter(model, start)
    return model


def parallel(model: Any, how: str, device: str) -> nn.Module:
    """The model, distributed over all ranks."""
    if how == "ddp":
        return DistributedDataParallel(model, broadcast_buffers=False)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    if how == "fsdp":
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    attention, mlp = "model.layers.*.self_attn.", "model.layers.*.mlp."
    columns = [f"{attention}{name}_proj" for name in "qkv"] + [f"{mlp}gate_proj", f"{mlp}up_proj"]
    rows = [f"{attention}o_proj", f"{mlp}down_proj"]
    plan: dict[str, Any] = {name: LowRankColwiseParallel() for name in columns}
    plan.update({name: LowRankRowwiseParallel() for name in rows})
    return parallelize_module(model, mesh, plan)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is trained, and the optimiser's state, under names that no wrapper changes."""
    options = StateDictOptions(ignore_frozen_params=True)
    weights, optim = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optim": optim}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load a checkpoint, resharded as this model is."""
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
        options=StateDictOptions(strict=False),  # what is frozen is not in it
    )


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, by all the ranks of the process group if there is one; the losses of the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parallel", choices=["ddp", "fsdp", "tp"], default="fsdp")
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoints")
    parser.add_argument("--steps", type=int, default=8, help="the step to train up to")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    world, rank = 1, 0
    if dist.is_initialized():
        world, rank = dist.get_world_size(), dist.get_rank()
    args.folder.mkdir(parents=True, exist_ok=True)
    done = max((int(p.name[4:]) for p in args.folder.glob("step*")), default=0)

    model = build(args.folder / "start.safetensors", rank).to(device)
    if world > 1:
        model = parallel(model, args.parallel, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    if done:
        restore(model, optimizer, args.folder / f"step{done}")

    generator, losses = torch.Generator().manual_seed(1), []
    lines = torch.randint(SIZES["vocab_size"], (LINES, LENGTH), generator=generator).to(device)
    shared = world > 1 and args.parallel != "tp"  # each rank has its part of the batch
    ids = lines.chunk(world)[rank] if shared else lines
    for step in range(done, args.steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        if shared:
            dist.all_reduce(mean)
            mean = mean / world
        losses.append(mean.item())
        if rank == 0:
            print(f"step {step + 1}: loss {losses[-1]:.6f}", flush=True)
    if args.steps > done:
        dcp.save(state_of(model, optimizer), checkpoint_id=args.folder / f"step{args.steps}")
    return losses


if __name__ == "__main__":
    if "RANK" in os.environ:  # by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
