"""`warm` takes steps of cases by their providers, over several processes, before any is timed.

What Triton compiles for a step is then in its cache on disk, so that minutes of a GPU are not spent
on compiling one kernel after the other. What fails here fails again when it is measured, and is
said there. Providers that are slow to set up are left to their turn.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from .bases import why_absent
from .cases import Case
from .harness import Runner
from .providers import PROVIDERS
from .tensors import make_tensors

Task = tuple[Case, list[str], str]  # the providers' names, and the device's


def steps(task: Task) -> list[str]:
    """The names of the providers that have taken a step of the case on the device."""
    case, names, where = task
    torch.set_num_threads(1)
    device, taken = torch.device(where), []
    if why_absent(case.base):
        return []
    tensors = make_tensors(case, device)
    for provider in (PROVIDERS[name] for name in names):
        if provider.why_absent(case, device) is None:
            try:
                with provider.pinned():
                    Runner(provider, case, tensors, provider.build(case, tensors)).step()
            except Exception:
                continue
            taken.append(provider.name)
    return taken


def warm(tasks: Sequence[Task], processes: int) -> int:
    """The steps taken, by that many processes; one that dies takes the rest along."""
    context = multiprocessing.get_context("spawn")
    count = 0
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for future in [pool.submit(steps, task) for task in tasks]:
            try:
                count += len(future.result())
            except Exception:  # a process that died
                continue
    return count
