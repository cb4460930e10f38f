"""4-bit bases under FSDP2, whose packed weights are sharded as numbers of a float dtype."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from base_cases import METHODS, D, H, Net, inputs, shifted
from distributed_training import error_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fused_lowrank import adapt

STORAGES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float32": torch.float32}


def net(storage: torch.dtype, method: str) -> Any:
    """Two 4-bit layers, adapted, in training."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    own = {"compute_dtype": torch.float32, "quant_type": "nf4", "quant_storage": storage}
    model: Any = Net(lambda k, n: Linear4bit(k, n, **own)).to("cpu")
    targets = {"target_modules": ["first", "second"], "progress": False, **METHODS[method]}
    return shifted(adapt(model, method, **targets))


def sharded(model: Any, mesh: DeviceMesh, **policy: Any) -> nn.Module:
    """Each layer a group of its own, and the rest."""
    given = {"mesh": mesh, **policy}
    for layer in (model.first, model.second):
        fully_shard(layer, **given)
    return fully_shard(model, **given)


def results(model: Any, x: Tensor) -> list[Tensor]:
    """[y, dx, the gradients of what is trained]."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = [own.grad for own in model.parameters() if own.requires_grad]
    whole = [own.full_tensor() if hasattr(own, "full_tensor") else own for own in grads]
    return [y.detach(), x.grad, *whole]


def bases(mesh: DeviceMesh, folder: Path) -> Any:
    """For each storage and method: pairs of the sharded model's results and of the whole one's."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    out: dict[str, Any] = {}
    for storage, dtype in STORAGES.items():
        for method in ("lora", "lora_xs", "dora"):
            whole = net(dtype, method)
            model, x = sharded(copy.deepcopy(whole), mesh), inputs(torch.float32, 5)
            part = model.first.base_layer.weight
            assert part.to_local().numel() * dtype.itemsize == D * H // 4, part.shape
            pairs = zip(results(model, x), results(whole, x), strict=True)
            out[f"{storage}, {method}"] = list(pairs)
    cast = MixedPrecisionPolicy(param_dtype=torch.float16)
    model = sharded(net(torch.bfloat16, "lora"), mesh, mp_policy=cast)
    out["cast"] = error_of(lambda: model(inputs(torch.float32, 5)))
    return out
