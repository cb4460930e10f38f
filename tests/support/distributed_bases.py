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

from fused_lowrank import adapt, disable_adapters, load_adapter, save_adapter

CASES = [
    (torch.uint8, "lora"),
    (torch.float32, "lora_xs"),
    *((torch.bfloat16, method) for method in ("lora_xs", "lora", "dora")),
]


def plain(storage: torch.dtype) -> Any:
    """Two 4-bit layers."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    own = {"compute_dtype": torch.float32, "quant_type": "nf4", "quant_storage": storage}
    return Net(lambda k, n: Linear4bit(k, n, **own)).to("cpu")


def net(storage: torch.dtype, method: str) -> Any:
    """Them, adapted, in training."""
    targets = {"target_modules": ["first", "second"], "progress": False, **METHODS[method]}
    return shifted(adapt(plain(storage), method, **targets))


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
    for dtype, method in CASES:
        whole = net(dtype, method)
        model, x = sharded(copy.deepcopy(whole), mesh), inputs(torch.float32, 5)
        part = model.first.base_layer.weight
        assert part.to_local().numel() * dtype.itemsize == D * H // 4, part.shape
        pairs = zip(results(model, x), results(whole, x), strict=True)
        out[f"{dtype}, {method}"] = list(pairs)
    with torch.no_grad(), disable_adapters(model), disable_adapters(whole):
        out["disabled"] = model(x), whole(x)
    save_adapter(model, folder / "over-4-bit")
    read = load_adapter(plain(torch.bfloat16), folder / "over-4-bit", progress=False)
    with torch.no_grad():
        out["saved"] = read(x), whole(x)
    again = sharded(plain(torch.bfloat16), mesh)
    out["adapted again"] = error_of(lambda: adapt(again, "lora", target_modules=["first"]))
    cast = MixedPrecisionPolicy(param_dtype=torch.float16)
    model = sharded(net(torch.bfloat16, "lora"), mesh, mp_policy=cast)
    out["cast"] = error_of(lambda: model(inputs(torch.float32, 5)))
    return out
