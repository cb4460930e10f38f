"""`stale_products` looks at what ptxas makes of a relay whose source has been changed.

It is called in a process that does not interpret.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import gate
import gate_read
import torch
from gate_sass import stale_descriptors
from hopper_runs import planted

TARGET = gate.TARGETS["sm_90"]


def stale_products(rows: int, text: str, instead: str) -> list[str]:
    """`stale_descriptors` of a relay of so many rows, with a text of its source replaced."""
    sizes = {"x": (rows, 1024), "weight": (1032, 1024), "down": (16, 1024), "up": (1032, 16)}
    made: dict[str, Any] = {
        name: torch.empty(size, dtype=torch.bfloat16, device="meta") for name, size in sizes.items()
    }
    made["core"] = torch.empty(16, 16, device="meta")
    with planted("relay_hopper.py", text, instead):
        relay = importlib.import_module("fused_lowrank.kernels.relay").relay
        call = partial(relay, **made, bias=None, scale=1.0, transposed=False, want_t=True)
        kernel = gate.built(lambda: call(choose=partial(gate.select, TARGET)), TARGET)
    return stale_descriptors(gate_read.cuobjdump("-sass", kernel.asm["cubin"]))
