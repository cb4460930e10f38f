"""DoRA under tensor parallelism: a rank has whole rows of W, or sums their norms over the ranks."""

import copy
from typing import Any

import torch
from distributed_training import Traffic
from dora_cases import SETTINGS, K, M, N, Net, close, layer_of
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module

from fused_lowrank import adapt
from fused_lowrank.methods import METHODS, dora
from fused_lowrank.parallel import LowRankColwiseParallel, LowRankRowwiseParallel

SLICED = [name for name in SETTINGS if METHODS[name][0].row.slices]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in SLICED),
    ("lora_fa", {"init": "pissa"}),  # whose down is made of two factors
    ("lora_xs", {"train": ("core", "down", "up", "magnitude", "weight", "bias")}),
]


def step(layer: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
    """[y, dx, the gradients of what is trained]."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    layer.zero_grad()
    y.backward(dy)
    grads = [own.grad for own in layer.parameters() if own.requires_grad]
    return [getattr(t, "full_tensor", lambda t=t: t)() for t in (y.detach(), leaf.grad, *grads)]


def of_rank(rank: int, folder: str) -> None:
    """One of two processes."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=store)
    mesh = init_device_mesh("cpu", (2,))
    styles = (
        LowRankColwiseParallel(output_layouts=Replicate()),
        LowRankRowwiseParallel(input_layouts=Replicate()),
    )
    for method, keywords in CASES:
        whole = layer_of(method, **keywords)
        x, dy = torch.randn(M, K), torch.randn(M, whole.out_features)
        expected = step(whole, x, dy)
        merged = (whole.weight + whole.delta_weight()).detach()
        for style in styles:
            layer = parallelize_module(copy.deepcopy(whole), mesh, style)
            close(step(layer, x, dy), expected, 1e-5)
            if "weight" not in whole.train_names:
                constants, dora.constants = dora.constants, None  # kept, and not asked for again
                step(layer, x, dy)
                dora.constants = constants
            with torch.no_grad():
                layer.merge()
                close([layer.weight.full_tensor(), layer(x)], [merged, expected[0]], 1e-5)
                layer.unmerge()
                for each in (layer, whole):
                    for name in each.train_names:
                        getattr(each, name).mul_(1.5)
                close([layer(x)], [whole(x)], 1e-5)
                for name in whole.train_names:
                    getattr(whole, name).div_(1.5)
    compiled(mesh, styles[1])
    drawn_in_parts(mesh)
    torch.distributed.destroy_process_group()


def drawn_in_parts(mesh: Any) -> None:
    """What no state_dict has is drawn by each rank, of its part, when the rest is loaded."""
    given = {"target_modules": ["first", "second"], "progress": False, **SETTINGS["nola"]}
    whole = adapt(Net(), "nola", dora=True, **given)
    for own in whole.parameters():
        torch.nn.init.normal_(own) if own.requires_grad else None
    with torch.device("meta"):
        empty = Net()
    model = fully_shard(adapt(empty, "nola", dora=True, defer_bases=True, **given), mesh=mesh)
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, whole.state_dict(), options=options)
    torch.manual_seed(7)
    x = torch.randn(M, K)
    close([model(x)], [whole(x)], 1e-5)


def compiled(mesh: Any, style: Any) -> None:
    """One graph; a rowwise forward sends the squares of N norms more than without DoRA."""
    sent = []
    for with_dora in (True, False):
        whole = layer_of("lora_xs", dora=with_dora)
        layer = parallelize_module(copy.deepcopy(whole), mesh, style)
        x, dy = torch.randn(M, K), torch.randn(M, whole.out_features)
        with torch.no_grad(), Traffic() as traffic:
            layer(x)
        sent.append(traffic.sent)
        if with_dora:
            torch.compiler.reset()
            run: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
            close(step(run, x, dy), step(whole, x, dy), 1e-5)
    assert sorted(sent[0]) == sorted([*sent[1], ("all_reduce", 4 * N)])


def test_parallel(tmp_path: Any) -> None:
    """Output, gradients and the merged weight are those of the whole layer."""
    torch.multiprocessing.spawn(of_rank, (str(tmp_path),), nprocs=2)
