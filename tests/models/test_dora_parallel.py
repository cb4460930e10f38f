"""DoRA under tensor parallelism: a rank has whole rows of W, or is refused."""

import pytest
import torch
from dora_cases import SETTINGS, K, M, close, layer_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module

from fused_lowrank.methods import METHODS, dora
from fused_lowrank.parallel import LowRankColwiseParallel, LowRankRowwiseParallel


def of_rank(rank: int, folder: str) -> None:
    """One of two processes."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=store)
    mesh = init_device_mesh("cpu", (2,))
    for method in (name for name in SETTINGS if METHODS[name][0].row.slices):
        layer = layer_of(method)
        x, dy = torch.randn(M, K), torch.randn(M, layer.out_features)
        y = layer(x)
        y.backward(dy)
        trained = [name for name, own in layer.named_parameters() if own.requires_grad]
        expected = [y, *(layer.get_parameter(name).grad for name in trained)]
        merged = (layer.weight + layer.delta_weight()).detach()
        layer.zero_grad()
        with pytest.raises(ValueError, match="DoRA's norms are of whole rows of W"):
            parallelize_module(layer, mesh, LowRankRowwiseParallel())
        parallelize_module(layer, mesh, LowRankColwiseParallel(output_layouts=Replicate()))
        y = layer(x)
        y.backward(dy)
        grads = [layer.get_parameter(name).grad.full_tensor() for name in trained]
        close([y, *grads], expected, 1e-5)
        constants, dora.constants = dora.constants, None  # kept, and not asked for again
        layer(x)
        dora.constants = constants
        layer.merge()
        close([layer.weight.full_tensor()], [merged], 1e-6)
    torch.distributed.destroy_process_group()


def test_colwise(tmp_path) -> None:
    """Output, gradients and the merged weight are those of the whole layer."""
    torch.multiprocessing.spawn(of_rank, (str(tmp_path),), nprocs=2)
