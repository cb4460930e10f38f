"""What two processes do for test_distributed: each scenario returns what its test looks at."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import distributed_bases
import distributed_fsdp1
import distributed_layers as layers
import distributed_training as training
import fast_interpreter
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

SCENARIOS: list[Callable[[DeviceMesh, Path], Any]] = [
    training.single,
    training.ddp,
    training.ddp_buffers,
    training.fsdp,
    training.fsdp_frozen_whole,
    training.fsdp_mixed,
    training.peft,
    training.tp,
    training.tp_mini,
    training.tp_bare,
    training.mesh_2d,
    training.checkpoint,
    training.files,
    training.restart,
    layers.deferred,
    layers.layers,
    layers.layouts,
    layers.kernels,
    layers.dropout,
    layers.compiled,
    layers.copies,
    layers.errors,
    training.example,
    distributed_fsdp1.fsdp1,
    distributed_fsdp1.fsdp1_peft,
    distributed_bases.bases,
]


def main(folder: Path) -> None:
    """Each scenario's result, or its traceback, in a file of this rank's."""
    results: dict[str, Any] = {}
    torch.set_num_threads(1)
    fast_interpreter.speed_up()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (training.WORLD,))
    for scenario in SCENARIOS:
        try:
            results[scenario.__name__] = scenario(mesh, folder)
        except Exception:
            results[scenario.__name__] = traceback.format_exc()
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
