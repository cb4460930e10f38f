"""A small Llama trained in the ways there are, by one process or two, and what they send."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from architectures import tiny
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lowrank import adapt, load_adapter, merge_and_restart, parameter_groups, save_adapter
from fused_lowrank.files.lora_export import export_lora
from fused_lowrank.parallel import LowRankColwiseParallel, LowRankRowwiseParallel

WORLD, STEPS, LINES, LENGTH = 2, 6, 4, 9
COLWISE = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
ROWWISE = ["self_attn.o_proj", "mlp.down_proj"]
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True)


def llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A Llama of two blocks, of random weights that are always the same.

    torch's norm is in the dtype of its input; transformers' is in float32 in a float64 model too.
    """
    torch.manual_seed(0)
    model = tiny("llama", use_cache=False).to(dtype)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            size, epsilon = module.weight.shape, module.variance_epsilon
            model.set_submodule(name, nn.RMSNorm(size, epsilon, dtype=dtype))
    return model


def adapted(method: str = "lora_xs", model: nn.Module | None = None, **settings: Any) -> nn.Module:
    """The Llama adapted, with cores that matter from the start."""
    model = llama() if model is None else model
    adapt(model, method, target_modules="all-linear", progress=False, **(settings or {"r": 5}))
    return randomized(model)


def randomized(model: nn.Module) -> nn.Module:
    """What is trained of the model, drawn anew."""
    for parameter in trained(model):
        parameter.data.normal_(std=0.5)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=0.05, eps=1e-4)


def batches() -> Tensor:
    """(STEPS, LINES, LENGTH) token ids; two batches in turn."""
    two = torch.randint(40, (2, LINES, LENGTH), generator=torch.Generator().manual_seed(1))
    return two.repeat(STEPS // 2, 1, 1)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    steps: range = range(STEPS),
    sharded_data: bool = False,
) -> dict[str, Any]:
    """Loss of each step, and what it communicated; the mean over ranks where they share a batch."""
    optimizer = optimizer or optimizer_of(model)
    losses, sent = [], []
    for ids in batches()[steps.start : steps.stop]:
        part = ids.chunk(WORLD)[dist.get_rank()] if sharded_data else ids
        with Traffic() as traffic:
            loss = loss_of(model, part)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss = loss.detach()
        if sharded_data:
            dist.all_reduce(loss)
            loss /= WORLD
        losses.append(loss.item())
        sent.append(traffic.sent)
    return {"losses": losses, "sent": sent, "trained": whole_of(trained(model))}


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """That of each next token, in the logits' dtype; transformers' is in float32."""
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def trained_by(
    wrap: Callable[[nn.Module], nn.Module],
    model_of: Callable[[torch.dtype], nn.Module] = lambda dtype: adapted(model=llama(dtype)),
) -> dict[str, Any]:
    """Training in float64, each rank on its part of the data, and what it sends in float32."""
    out = train(wrap(model_of(torch.float64)), sharded_data=True)
    return {**out, "sent": train(wrap(model_of(torch.float32)), sharded_data=True)["sent"]}


def whole_of(tensors: list[Any]) -> list[Tensor]:
    """All of each tensor, sharded or not."""
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def sharded_by_fsdp(model: nn.Module, **keywords: Any) -> nn.Module:
    for block in model.model.layers:
        fully_shard(block, **keywords)
    return fully_shard(model, **keywords)


def sharded_by_tp(model: nn.Module, mesh: DeviceMesh, styles: Any = None) -> nn.Module:
    colwise, rowwise = styles or (LowRankColwiseParallel, LowRankRowwiseParallel)
    plan = {f"model.layers.*.{name}": colwise() for name in COLWISE}
    plan |= {f"model.layers.*.{name}": rowwise() for name in ROWWISE}
    return parallelize_module(model, mesh, plan)


class Traffic(TorchDispatchMode):
    """What is handed to collectives within it: (op, bytes), those of DDP's C++ included.

    Bytes are those of the larger side: what all-gather gives, what reduce-scatter takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and name not in (
            "wait_tensor",
            "wrap_tensor_autograd",
        ):
            self.sent.append((name, max(map(bytes_of, (*args, out)))))
        return out


def bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_of, value)) if isinstance(value, list | tuple) else 0


def error_of(call: Callable[[], Any]) -> str:
    """What the call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# --- scenarios ---


def single(mesh: DeviceMesh, folder: Path) -> Any:
    return train(adapted())


def ddp(mesh: DeviceMesh, folder: Path) -> Any:
    return trained_by(lambda model: DistributedDataParallel(model, broadcast_buffers=False))


def ddp_buffers(mesh: DeviceMesh, folder: Path) -> Any:
    """DDP as it is by default: it broadcasts the buffers of the base model, and none of ours."""
    buffers = bytes_of(list(llama(torch.float32).buffers()))
    return {**trained_by(DistributedDataParallel), "buffers": buffers}


def fsdp(mesh: DeviceMesh, folder: Path) -> Any:
    return trained_by(sharded_by_fsdp)


def fsdp_frozen_whole(mesh: DeviceMesh, folder: Path) -> Any:
    """What is frozen is on every rank, and what is trained is sharded."""

    def wrap(model: nn.Module) -> nn.Module:
        frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
        return sharded_by_fsdp(model, ignored_params=frozen)

    return trained_by(wrap)


def fsdp_mixed(mesh: DeviceMesh, folder: Path) -> Any:
    """A bfloat16 base and float32 cores, by DDP and by FSDP2 without a param_dtype."""
    model = adapted(model=llama().bfloat16())
    assert {p.dtype for p in trained(model)} == {torch.float32}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    return {
        "ddp": train(DistributedDataParallel(copy.deepcopy(model)), sharded_data=True),
        "fsdp": train(sharded_by_fsdp(model, mp_policy=policy), sharded_data=True),
    }


def peft(mesh: DeviceMesh, folder: Path) -> Any:
    """A model of PEFT's with LoRA-XS, by one process, by DDP and by FSDP2."""
    from peft import get_peft_model

    from fused_lowrank.integrations.peft import LoraXSConfig

    def model_of(dtype: torch.dtype) -> Any:
        config = LoraXSConfig(r=5, target_modules="all-linear")
        return randomized(get_peft_model(llama(dtype), config))

    def by_ddp(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, broadcast_buffers=False)

    def by_fsdp(model: Any) -> nn.Module:
        sharded_by_fsdp(model.get_base_model())
        return model

    return {
        "single": train(model_of(torch.float64)),
        "ddp": trained_by(by_ddp, model_of),
        "fsdp": trained_by(by_fsdp, model_of),
    }


def tp(mesh: DeviceMesh, folder: Path) -> Any:
    return train(sharded_by_tp(adapted(), mesh))


def tp_mini(mesh: DeviceMesh, folder: Path) -> Any:
    settings = {"r": 3, "a": 6, "b": 7, "init": "paper"}
    model = adapted("lora_mini", **settings)
    return {"single": train(copy.deepcopy(model)), "tp": train(sharded_by_tp(model, mesh))}


def tp_bare(mesh: DeviceMesh, folder: Path) -> Any:
    """The bare model under torch's own styles; its embeddings are trained, so that dx is needed."""
    out = []
    bare, ours = llama(torch.float32), adapted(model=llama(torch.float32))
    for model, styles in ((bare, (ColwiseParallel, RowwiseParallel)), (ours, None)):
        model = sharded_by_tp(model, mesh, styles)
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        for name, parameter in model.named_parameters():
            if name.endswith(".core"):
                parameter.requires_grad_(True)
        out.append(train(model, steps=range(1))["sent"][0])
    return out


def mesh_2d(mesh: DeviceMesh, folder: Path) -> Any:
    """FSDP2 over tensor parallelism, as meshes of 1 × 2 and of 2 × 1."""
    out = []
    for shape in ((1, 2), (2, 1)):
        both = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
        model = sharded_by_tp(adapted(), both["model"])
        model = sharded_by_fsdp(model, mesh=both["data"])
        out.append(train(model, sharded_data=shape == (2, 1)))
        message = error_of(lambda model=model: model.model.layers[0].mlp.up_proj.merge())
        out[-1]["merge"] = message
    return out


def checkpoint(mesh: DeviceMesh, folder: Path) -> Any:
    """Three steps by FSDP2 and a checkpoint, which tensor parallelism takes up; and the reverse."""

    def by(kind: str) -> tuple[nn.Module, bool]:
        model = load_adapter(llama(), folder / "start.safetensors", progress=False)
        if kind == "fsdp":
            return sharded_by_fsdp(model), True
        return sharded_by_tp(model, mesh), False

    if dist.get_rank() == 0:
        save_adapter(adapted(), folder / "start.safetensors")
    dist.barrier()
    out = {}
    for first, second in (("fsdp", "tp"), ("tp", "fsdp"), ("fsdp", "fsdp")):
        model, sharded_data = by(first)
        optimizer = optimizer_of(model)
        start = train(model, optimizer, range(3), sharded_data)
        save_checkpoint(model, optimizer, folder / first)
        model, sharded_data = by(second)
        optimizer = optimizer_of(model)
        load_checkpoint(model, optimizer, folder / first)
        rest = train(model, optimizer, range(3, STEPS), sharded_data)
        out[first, second] = start["losses"] + rest["losses"]
    return out


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    state, optim = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    dcp.save({"model": state, "optim": optim}, checkpoint_id=path)


def load_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    state, optim = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    dcp.load({"model": state, "optim": optim}, checkpoint_id=path)
    options = StateDictOptions(strict=False)
    set_state_dict(
        model, optimizer, model_state_dict=state, optim_state_dict=optim, options=options
    )


def files(mesh: DeviceMesh, folder: Path) -> Any:
    """save_adapter and export_lora of whole and of sharded models: the bytes of the files."""
    out = {}
    for kind in ("whole", "fsdp", "tp"):
        model = adapted()
        if kind == "fsdp":
            model = sharded_by_fsdp(model)
        elif kind == "tp":
            model = sharded_by_tp(model, mesh)
        path = folder / f"{kind}.safetensors"
        save_adapter(model, path)
        export_lora(model, folder / f"{kind}_lora")
        dist.barrier()
        exported = folder / f"{kind}_lora" / "adapter_model.safetensors"
        out[kind] = path.read_bytes(), exported.read_bytes()
    return out


def example(mesh: DeviceMesh, folder: Path) -> Any:
    """The losses of runs of the example."""
    return {how: run_example(folder / how, 3, how) for how in ("ddp", "fsdp", "tp")}


def run_example(folder: Path, steps: int, how: str = "fsdp") -> list[float]:
    """The losses of the example's steps, by the processes that there are; its model in float64."""
    if (examples := str(Path(__file__).parents[2] / "examples")) not in sys.path:
        sys.path.append(examples)
    from train_distributed import main

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return main(["--parallel", how, "--folder", str(folder), "--steps", str(steps)])
    finally:
        torch.set_default_dtype(before)


def restart(mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """A restart under DDP, with generators that are elsewhere on each rank; and under FSDP2."""
    inner = adapted("lora", r=3)
    model = DistributedDataParallel(inner)
    optimizer, ids = optimizer_of(model), batches()[0]
    train(model, optimizer, range(2), sharded_data=True)
    torch.manual_seed(dist.get_rank())
    before = loss_of(model, ids).detach()
    merge_and_restart(model, optimizer, progress=False)
    after = loss_of(model, ids).detach()
    begun = [factor.detach().clone() for factor in trained(model)]
    out = train(model, optimizer, range(2, STEPS), sharded_data=True)
    sharded = sharded_by_fsdp(adapted("lora", r=3))
    groups = {g["name"]: len(g["params"]) for g in parameter_groups(sharded, 1e-3)}
    try:
        merge_and_restart(sharded, optimizer_of(sharded), progress=False)
        said = "nothing"
    except RuntimeError as error:
        said = str(error)
    return {**out, "before": before, "after": after, "begun": begun, "said": said, "groups": groups}
