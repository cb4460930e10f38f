"""Tensor parallelism of adapted layers, for torch's `parallelize_module`.

                W         bias      down      core      up        x            y
    colwise     Shard(0)  Shard(0)  Replicate Replicate Shard(0)  Replicate    Shard(-1)
    rowwise     Shard(1)  Replicate Shard(1)  Replicate Replicate Shard(-1)    a sum over the ranks

The layer is linear in each slice of N, and of K, so every rank computes a whole layer of its own
slices, by the same kernels: the low-rank term's sums ride on the reductions of the bare layer, of y
in a rowwise forward and of dx in a colwise backward. Beyond those, a replicated factor that is
trained has its gradient summed over the ranks; and DoRA's norms, of whole rows of W, are of sums
over the ranks in a rowwise forward. Nothing else is communicated.

The parameters are DTensors, for optimisers, checkpoints and merging; the computation is on what of
them is local.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from .context.called import note_call
from .functional import draw_seed
from .methods import LowRankLinear
from .methods.computer import Computer
from .methods.dora import with_gain
from .methods.method import Parts

Forward = Callable[[LowRankLinear, Any], Tensor]


class PartComputer(Computer):
    """Computes what this rank has of a layer, by `forward`: `colwise` or `rowwise`."""

    is_parallel = True

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def __call__(self, layer: LowRankLinear, x: Tensor) -> Tensor:
        if layer.disabled or layer.merged or layer.bases_pending:
            return layer.own(x)
        if layer.uncalled:
            note_call(layer)
        return self.forward(layer, x)


class LowRankColwiseParallel(ColwiseParallel):
    """W, bias and up sharded by rows: each rank has all of x and computes some columns of y.

    Keyword Args, as of torch's ColwiseParallel:
        input_layouts: the placement of x (..., K); by default Replicate().
        output_layouts: the placement of y (..., N); by default Shard(-1).
        use_local_output: whether y is the local torch.Tensor (the default), or a DTensor.

    Beyond the bare layer, the gradients of what is trained of down and core are summed.

    Dropout: every rank draws the same mask of x if torch.manual_seed was called alike on all and
    they compute by the same plan. The gradients are exact in any case.

    Raises:
        TypeError: the module is not an adapted layer.
        ValueError: the layer is merged or in a bank; a rank would be left without a row.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = checked(module, "ColwiseParallel")
        check_parts(layer, "out_features", layer.out_features, device_mesh)
        sharded = {"weight": Shard(0), "bias": Shard(0), **sides(layer, "N")}
        return parallelized(layer, device_mesh, self, (Replicate(),), sharded, colwise)


class LowRankRowwiseParallel(RowwiseParallel):
    """W and down sharded by columns: each rank has some columns of x and a summand of all of y.

    Keyword Args, as of torch's RowwiseParallel:
        input_layouts: the placement of x (..., K); by default Shard(-1).
        output_layouts: the placement of y (..., N); by default Replicate().
        use_local_output: whether y is the local torch.Tensor (the default), or a DTensor.

    Beyond the bare layer, the gradients of what is trained of core and up are summed, and with DoRA
    in a forward the squares of the norms, N numbers. The first rank adds the bias.

    Dropout: every rank has a mask of its own for its slice of x, if torch.manual_seed was called
    alike on all.

    Raises:
        TypeError: the module is not an adapted layer.
        ValueError: the layer is merged or in a bank; a rank would be left without a column.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = checked(module, "RowwiseParallel")
        check_parts(layer, "in_features", layer.in_features, device_mesh)
        sharded = {"weight": Shard(1), **sides(layer, "K")}
        return parallelized(layer, device_mesh, self, (Shard(-1),), sharded, rowwise)


def checked(module: nn.Module, torchs: str) -> LowRankLinear:
    """The module as a layer that can be parallelised; raises for any other."""
    if not isinstance(module, LowRankLinear):
        raise TypeError(
            f"LowRank{torchs} is for adapted layers, not for a {type(module).__name__}: "
            f"adapt(model, …) first, or use torch's {torchs}"
        )
    if module.merged:
        raise ValueError("the layer is merged: unmerge it, parallelise it and merge it again")
    if not module.row.slices:
        raise ValueError(
            f"{module.method} cannot be parallelised: a rank's slice of the layer would need all "
            "of its factors; adapt by lora or lora_xs, or shard the model by fully_shard"
        )
    if module.in_bank:
        raise ValueError("the layer is in a bank, whose tables are not sharded: close() it first")
    return module


def sides(layer: LowRankLinear, side: str) -> dict[str, Placement]:
    """The placements of the factors that have a side, by the dimension in which they have it."""
    factors = layer.row.factors.items()
    return {name: Shard(f.sides.index(side)) for name, f in factors if side in f.sides}


def check_parts(layer: LowRankLinear, name: str, size: int, mesh: DeviceMesh) -> None:
    """Raise if some rank would get nothing of a side that is sharded."""
    ranks = mesh.size()
    if -(-size // ranks) * (ranks - 1) >= size:
        raise ValueError(f"{name} is {size}: too small for {ranks} ranks to have a part each")


def parallelized(
    layer: LowRankLinear,
    mesh: DeviceMesh,
    style: Any,
    desired: tuple[Placement],
    sharded: Mapping[str, Placement],
    forward: Forward,
) -> nn.Module:
    """The layer with its parameters distributed and its calls by `forward`, between torch's own
    hooks, which bring x and y into the layouts asked for.
    """

    def distribute(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters()):
            placements = [sharded.get(name, Replicate())]
            value = distribute_tensor(
                parameter, mesh, placements, src_data_rank=style.src_data_rank
            )
            own = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module.register_parameter(name, own)

    before = partial(style._prepare_input_fn, style.input_layouts, desired)
    after = partial(style._prepare_output_fn, style.output_layouts, style.use_local_output)
    distribute_module(layer, mesh, distribute, before, after)
    layer.computed_by = PartComputer(forward)
    layer._base = {
        name: distribute_tensor(
            tensor, mesh, [sharded.get(name, Replicate())], src_data_rank=style.src_data_rank
        )
        for name, tensor in layer._base.items()
    }
    return layer


def colwise(layer: LowRankLinear, x: DTensor) -> DTensor:
    """x (..., K), replicated → y (..., N), sharded by columns."""
    weight, bias = map(local, (layer.weight, layer.bias))
    down, core, up, gain = own_parts(layer, weight)
    own = x.to_local(grad_placements=(Partial(),))
    y = layer.compute(own, weight, down, core, up, bias, None, gain)
    return joined(y, layer, x.device_mesh, Shard(y.dim() - 1))


def rowwise(layer: LowRankLinear, x: DTensor) -> DTensor:
    """x (..., K), sharded by columns → y (..., N), a sum over the ranks."""
    weight, mesh = local(layer.weight), x.device_mesh
    down, core, up, gain = own_parts(layer, weight, partial(summed, mesh))
    rank, own, seed = mesh.get_local_rank(), x.to_local(), None
    if layer.dropout and layer.training:
        seed = draw_seed(own) + rank
    y = layer.compute(own, weight, down, core, up, bias_of(layer, rank), seed, gain)
    return joined(y, layer, mesh, Partial())


def summed(mesh: DeviceMesh, tensor: Tensor) -> Tensor:
    """The sum over the ranks of a tensor that needs no gradient."""
    return all_reduce(tensor, "sum", (mesh, 0))


def own_parts(
    layer: LowRankLinear, weight: Tensor, over: Callable[[Tensor], Tensor] | None = None
) -> Parts:
    """The equation's parts of what this rank has of the factors.

    `over` sums over the ranks, where each has a part of W's rows: DoRA's norms are of whole ones.
    """
    factors = {name: local(factor) for name, factor in layer.factors_now().items()}
    made = layer.row.made(factors, weight, layer.scale)
    if not layer.row.dora:
        return made
    every = {"weight": layer.weight, **layer.factors_now()}
    # The tensors of what is frozen that stay the same from call to call.
    held = {n: getattr(t, "_local_tensor", t) for n, t in every.items() if not t.requires_grad}
    own = {"weight": weight, **factors, **held}
    return with_gain(made, own, own["weight"], layer.scale, layer.row.down_of, over)


def local(operand: Any) -> Any:
    """This rank's part of a parameter.

    Of the gradient of a replicated one every rank has a summand: they are summed in the backward.
    """
    if not isinstance(operand, DTensor):
        return operand
    if operand.requires_grad and operand.placements == (Replicate(),):
        return operand.redistribute(placements=(Replicate(),), async_op=True).to_local(
            grad_placements=(Partial(),)
        )
    return operand.to_local()


def bias_of(layer: LowRankLinear, rank: int) -> Tensor | None:
    """The replicated bias on the first rank and nothing on the others; its gradient, that of y's
    rows, is the same on all of them.
    """
    bias: Any = layer.bias
    if bias is None:
        return None
    bias = bias.to_local()
    if rank == 0:
        return bias
    return bias - bias.detach() if bias.requires_grad else None


def joined(y: Tensor, layer: LowRankLinear, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """The DTensor (..., N) of which y is this rank's part."""
    size = torch.Size([*y.shape[:-1], layer.out_features])
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(y, mesh, (placement,), run_check=False, shape=size, stride=stride)
