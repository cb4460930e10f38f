"""Problems at which a planner is asked, and failures of it."""

import torch

from fused_lowrank.compute import costs
from fused_lowrank.compute.operands import Problem

CPU = torch.device("cpu")


H200 = costs.of_gpu("NVIDIA H200", 9, 132)


def at(m: int = 512, k: int = 1024, n: int = 1024, rank: int = 16, **other: object) -> Problem:
    """A pass on the CPU, in float32, unless said otherwise."""
    values = {"device": CPU, "dtype": torch.float32, "transposed": False, "regular": True}
    values |= {"dropout": False, "want_u": False, **other}
    return Problem(m=m, k=k, n=n, p=rank, q=rank, **values)


class OutOfResources(Exception):
    """As Triton says that a launch wants more than there is."""
