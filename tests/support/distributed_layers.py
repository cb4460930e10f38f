"""Layers under tensor parallelism, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_training import WORLD, Traffic, error_of, randomized, whole_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from fused_lowrank import (
    AdapterBank,
    adapt,
    disable_adapters,
    init_bases,
    load_adapter,
    lowrank_linear,
    merge,
    unload,
    unmerge,
)
from fused_lowrank.parallel import LowRankColwiseParallel, LowRankRowwiseParallel


class MLP(nn.Module):
    """Two layers, K → N → K."""

    def __init__(self, k: int, n: int, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(k, n, bias), nn.Linear(n, k, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def mlp_plan(**between: Any) -> dict[str, Any]:
    colwise = LowRankColwiseParallel(use_local_output=not between.get("dtensor", False))
    return {"a": colwise, "b": LowRankRowwiseParallel()}


def mlp(method: str = "lora_xs", sizes: tuple[int, int] = (12, 20), **settings: Any) -> nn.Module:
    """Two adapted layers in float64."""
    torch.manual_seed(2)
    bias = settings.pop("bias", True)
    model = MLP(*sizes, bias).double()
    adapt(model, method, target_modules=["a", "b"], progress=False, **settings)
    return randomized(model)


LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "xs": ("lora_xs", {"r": 4}),
    "xs, no bias": ("lora_xs", {"r": 4, "bias": False}),
    "xs, reference": ("lora_xs", {"r": 4, "fused": False}),
    "xs, all": ("lora_xs", {"r": 4, "train": ("core", "down", "up", "weight", "bias")}),
    "xs, uneven": ("lora_xs", {"r": 4, "sizes": (13, 21)}),
    "mini": ("lora_mini", {"r": 2, "a": 5, "b": 6, "init": "paper"}),
    "lora": ("lora", {"r": 3, "train": ("down", "up", "bias")}),
}


def layers(mesh: DeviceMesh, folder: Path) -> Any:
    """For each case: pairs of results, of the sharded model and of the whole one."""
    out = {}
    for case, (method, settings) in LAYERS.items():
        model = mlp(method, **settings)
        out[case] = compared(model, mesh, dtensor="sizes" in settings)
    return out


def compared(model: nn.Module, mesh: DeviceMesh, dtensor: bool = False) -> dict[str, Any]:
    """Results of the sharded model and of the whole one, by name, and what was communicated."""
    whole = copy.deepcopy(model)
    parallelize_module(model, mesh, mlp_plan(dtensor=dtensor))
    results = []
    for each in (model, whole):
        x = torch.randn(3, 5, model.a.in_features, dtype=model.a.weight.dtype)
        x.normal_(generator=torch.Generator().manual_seed(4)).requires_grad_()
        with Traffic() as traffic:
            y = each(x)
            y.sin().sum().backward()
        got = {"y": y, "dx": x.grad, "sent": traffic.sent}
        for name, parameter in each.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if parameter.requires_grad:
                got[f"d{name}"] = whole_of([parameter.grad])[0]
        with torch.no_grad():
            merge(each)
            got["merged"] = each(x)
            unmerge(each)
            got["unmerged"] = each(x)
            for layer in (each.a, each.b):
                layer.disabled = True
            got["disabled"] = each(x)
            got["delta"] = whole_of([each.b.delta_weight()])[0]
            unload(each)
            assert type(each.a) is nn.Linear
            got["unloaded"] = each(x)
        results.append(got)
    sent = results[0].pop("sent"), results[1].pop("sent")
    assert not sent[1]
    pairs = {name: tuple(whole_of([each[name] for each in results])) for name in results[1]}
    return {"pairs": pairs, "sent": sent[0]}


def layouts(mesh: DeviceMesh, folder: Path) -> Any:
    """Sequences sharded between the layers' pairs, and a DTensor as the output."""
    model = mlp(r=4)
    whole = copy.deepcopy(model)
    plan = {
        "a": LowRankColwiseParallel(input_layouts=Shard(0)),
        "b": LowRankRowwiseParallel(output_layouts=Shard(0), use_local_output=False),
    }
    parallelize_module(model, mesh, plan)
    x = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y = model(x.chunk(WORLD)[mesh.get_local_rank()])
    placements = y.placements
    y = y.full_tensor()
    y.square().sum().backward()
    expected = whole(x)
    expected.square().sum().backward()
    grads = whole_of([model.a.core.grad, model.b.core.grad])
    uneven = mlp(r=4, sizes=(12, 21)).a
    column = copy.deepcopy(uneven)(x)
    parallelize_module(uneven, mesh, LowRankColwiseParallel(output_layouts=Replicate()))
    return {
        "sharded": placements == (Shard(0),),
        "pairs": {
            "y": (y.detach(), expected.detach()),
            "da": (grads[0], whole.a.core.grad),
            "db": (grads[1], whole.b.core.grad),
            "gathered": tuple(whole_of([uneven(x), column])),
        },
    }


def kernels(mesh: DeviceMesh, folder: Path) -> Any:
    """The kernels, in the interpreter, on the parts of a layer."""
    torch.manual_seed(2)
    model = adapt(MLP(32, 16).double(), target_modules=["a", "b"], progress=False, r=4)
    for layer in (model.a, model.b):
        layer.impl = "triton"
    return compared(randomized(model), mesh)


def dropout(mesh: DeviceMesh, folder: Path) -> Any:
    """y with dropout, beside y of the parts computed with the seeds that they should have."""
    out = {}
    for fused in (True, False):
        for kind in ("colwise", "rowwise"):
            model = mlp(r=4, dropout=0.5, fused=fused)
            layer, whole = model.a, copy.deepcopy(model.a)
            style = LowRankColwiseParallel if kind == "colwise" else LowRankRowwiseParallel
            options: Any = {"input_layouts": Replicate(), "output_layouts": Replicate()}
            parallelize_module(layer, mesh, style(**options))
            x = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
            torch.manual_seed(5)
            y = layer(x)
            y.square().sum().backward()
            torch.manual_seed(5)
            expected = whole(x) if kind == "colwise" else rowwise_by_hand(whole, x)
            expected.square().sum().backward()
            grad = whole_of([layer.core.grad])[0]
            layer.eval(), whole.eval()
            out[kind, fused] = {
                "y": tuple(whole_of([y, expected])),
                "dcore": (grad, whole.core.grad),
                "eval": tuple(whole_of([layer(x), whole(x)])),
            }
    return out


def rowwise_by_hand(layer: Any, x: Tensor) -> Tensor:
    """y of a whole layer with a mask of its own for each rank's slice of x."""
    seed, y = torch.randint(2**62, (1,)), layer.bias
    slices = zip(x.chunk(2, 1), layer.weight.chunk(2, 1), layer.down.chunk(2, 1), strict=True)
    for rank, (part, weight, down) in enumerate(slices):
        y = y + lowrank_linear(
            part, weight, down, layer.core, layer.up, scale=layer.scale, dropout_p=layer.dropout,
            training=True, impl=layer.impl, seed=seed + rank,
        )  # fmt: skip
    return y


def compiled(mesh: DeviceMesh, folder: Path) -> Any:
    """A compiled model of sharded layers, of two lengths."""
    torch.manual_seed(2)
    model = adapt(MLP(12, 20).double(), target_modules=["a", "b"], progress=False, r=4)
    model = randomized(model)
    whole = copy.deepcopy(model)
    parallelize_module(model, mesh, mlp_plan())
    run = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    pairs: dict[str, Any] = {}
    for rows in (5, 8):
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(rows, 12, dtype=torch.float64, generator=generator)
        y, expected = run(x), whole(x)
        y.square().sum().backward()
        expected.square().sum().backward()
        pairs[f"y {rows}"] = tuple(whole_of([y, expected]))
        for name in "ab":
            grad = getattr(model, name).core.grad
            expected = getattr(whole, name).core.grad.clone()
            pairs[f"d{name}.core {rows}"] = whole_of([grad])[0], expected
    return {"pairs": pairs, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def deferred(mesh: DeviceMesh, folder: Path) -> Any:
    """Factors made of weights that are sharded, beside those of the whole model."""
    out = {}
    settings: Any = {"target_modules": ["a", "b"], "progress": False, "r": 5}
    torch.manual_seed(3)
    base = MLP(13, 20)
    expected = adapt(copy.deepcopy(base), **settings)
    for kind in ("fsdp", "tp"):
        with torch.device("meta"):
            model = MLP(13, 20)
        adapt(model, defer_bases=True, **settings)
        if kind == "fsdp":
            fully_shard(model)
        else:
            parallelize_module(model, mesh, mlp_plan())
        model.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model, base.state_dict(), options=options)
        pending = model.a.bases_pending
        torch.manual_seed(dist.get_rank())  # what is random is the first rank's
        init_bases(model, progress=False)
        names = [n for n, _ in model.named_parameters() if not n.endswith("core")]
        own, other = dict(model.named_parameters()), dict(expected.named_parameters())
        cores = whole_of([model.a.core, model.b.core])
        pairs = {name: tuple(whole_of([own[name], other[name]])) for name in names}
        out[kind] = {"pairs": pairs, "pending": pending, "cores": cores}
    return out


def copies(mesh: DeviceMesh, folder: Path) -> Any:
    """A copy of a sharded model is one."""
    model = mlp(r=4)
    parallelize_module(model, mesh, mlp_plan())
    x = torch.ones(2, 12, dtype=torch.float64)
    return {"pairs": {"y": tuple(whole_of([copy.deepcopy(model)(x), model(x)]))}}


def errors(mesh: DeviceMesh, folder: Path) -> Any:
    """The messages of what is refused."""

    def parallel(model: nn.Module, style: Any = LowRankColwiseParallel) -> nn.Module:
        return parallelize_module(model, mesh, style())

    def banked() -> Any:
        model = mlp(r=4)
        bank = AdapterBank.from_model(model, slots=1)
        try:
            parallel(model.a)
        finally:
            bank.close()

    small = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    adapt(small, target_modules=["0", "1"], progress=False, r=1)
    sharded = mlp(r=4)
    parallelize_module(sharded, mesh, mlp_plan())
    by_fsdp, gathered = fully_shard(mlp(r=4)), fully_shard(mlp(r=4))
    with torch.no_grad():
        gathered(torch.zeros(1, 12, dtype=torch.float64))
    assert not isinstance(gathered.a.weight, DTensor)  # a root keeps what it has gathered
    head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapt(head, target_modules=["0"], modules_to_save=["1"], progress=False, r=2)
    fully_shard(head)
    plain = fully_shard(MLP(4, 4))

    def disabled(model: nn.Module) -> None:
        with disable_adapters(model):
            pass

    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: parallel(nn.Linear(4, 4)),
        "plain, rowwise": lambda: parallel(nn.Linear(4, 4), LowRankRowwiseParallel),
        "merged": lambda: parallel(merge(mlp(r=4)).a),
        "banked": banked,
        "small, colwise": lambda: parallel(small[1]),
        "small, rowwise": lambda: parallel(small[0], LowRankRowwiseParallel),
        "bank of sharded": lambda: AdapterBank.from_model(sharded, slots=1),
        "load": lambda: load_adapter(sharded, folder / "start.safetensors"),
        "adapt": lambda: adapt(plain, target_modules=["a"], progress=False),
        "merge, fsdp": lambda: merge(gathered),
        "unload, fsdp": lambda: unload(gathered),
        "layer.merge, fsdp": lambda: by_fsdp.a.merge(),
        "disable, fsdp": lambda: disabled(head),
        "disable, fsdp, no head": lambda: disabled(by_fsdp),
    }
    return {name: error_of(call) for name, call in calls.items()}
