"""The small Llama under FullyShardedDataParallel, accelerate's default, by two processes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_training import STEPS, adapted, error_of, llama, randomized, train
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from fused_lowrank import (
    AdapterBank,
    adapt,
    disable_adapters,
    explain,
    export_lora,
    load_adapter,
    merge,
    save_adapter,
    unload,
)

LAYER = "LlamaDecoderLayer"


def wrapped(model: nn.Module, **keywords: Any) -> Any:
    """As accelerate wraps it: each block, and the whole."""
    kinds = {type(module) for module in model.modules() if type(module).__name__ == LAYER}
    settings = {"auto_wrap_policy": ModuleWrapPolicy(kinds), "use_orig_params": True, **keywords}
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **settings)


def gathered(model: nn.Module) -> dict[str, Any]:
    """The state_dict that accelerate and Trainer give to save_pretrained, of the first rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        config = FullStateDictConfig(rank0_only=True)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
            return model.state_dict()


def same_folder(folder: Path, name: str) -> Path:
    dist.barrier()
    return folder / f"fsdp1_{name}"


def fsdp1(mesh: DeviceMesh, folder: Path) -> Any:
    """Layers of adapt: trained, saved, exported; and what is refused."""
    ids = torch.arange(12).view(2, 6)
    out: dict[str, Any] = {}
    model = adapted(modules_to_save=["model.norm"], r=5)
    single = copy.deepcopy(model)
    inner, model = model, wrapped(model)
    save_adapter(model, same_folder(folder, "early"))  # before any call
    expected = train(single)["losses"]
    out["losses"] = train(model, sharded_data=True)["losses"], expected
    with torch.no_grad():
        y = model(input_ids=ids).logits
        save_adapter(model, same_folder(folder, "file"))
        export_lora(model, same_folder(folder, "lora"))
        dist.barrier()
        from peft import PeftModel

        loaded = load_adapter(llama(), folder / "fsdp1_file", progress=False)
        lora = PeftModel.from_pretrained(llama(), folder / "fsdp1_lora")
        out["pairs"] = {
            "one process": (y, single(input_ids=ids).logits),
            "file": (loaded(input_ids=ids).logits, y),
            "lora": (lora(input_ids=ids).logits, y),
        }
    layer = inner.model.layers[0].mlp.up_proj
    plain, path = wrapped(llama()), folder / "fsdp1_file"
    keywords: dict[str, Any] = {"target_modules": "all-linear", "progress": False}
    out["errors"] = {
        "merge": error_of(lambda: merge(model)),
        "unload": error_of(lambda: unload(model)),
        "layer.merge": error_of(layer.merge),
        "bank": error_of(lambda: AdapterBank.from_model(model, slots=2)),
        "load": error_of(lambda: load_adapter(model, path, progress=False)),
        "load, plain": error_of(lambda: load_adapter(plain, path, progress=False)),
        "adapt": error_of(lambda: adapt(plain, "lora_xs", r=4, **keywords)),
        "disable": error_of(lambda: disable_adapters(model).__enter__()),
        "explain": error_of(lambda: explain(layer, 4)),
        "flat": error_of(lambda: wrapped(adapted(), use_orig_params=False)),
    }
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        out["errors"]["merge, summoned"] = error_of(lambda: merge(model))
    return out


def fsdp1_peft(mesh: DeviceMesh, folder: Path) -> Any:
    """A model of PEFT's: trained, saved as Trainer does it, loaded; and what is refused."""
    from peft import PeftModel, get_peft_model
    from peft.utils.other import fsdp_auto_wrap_policy
    from safetensors.torch import load_file

    from fused_lowrank.integrations.peft import LoraXSConfig, save_as_lora

    def model_of(**settings: Any) -> Any:
        config = LoraXSConfig(r=5, target_modules=["q_proj", "up_proj"], **settings)
        return randomized(get_peft_model(llama(), config))

    ids = torch.arange(12).view(2, 6)
    out: dict[str, Any] = {"errors": {}, "pairs": {}, "prints": []}
    for bases in (True, False):
        model, single = (model_of(save_projection=bases) for _ in range(2))
        whole = wrapped(model)
        expected = train(single)["losses"]
        out["losses"] = train(whole, sharded_data=True)["losses"], expected
        y, state = whole(input_ids=ids).logits.detach(), gathered(whole)
        path = same_folder(folder, f"peft_{bases}")
        if dist.get_rank() == 0:
            model.save_pretrained(path, state_dict=state)
        dist.barrier()
        loaded = PeftModel.from_pretrained(llama(), path)
        out["pairs"][str(bases)] = loaded(input_ids=ids).logits.detach(), y
        keys = load_file(path / "adapter_model.safetensors")
        out["prints"].append(sum("fingerprint" in key for key in keys))
    out["errors"] = {
        "save, not gathered": error_of(lambda: save_root(model_of(), folder)),
        "merge": error_of(model.merge_adapter),
        "unload": error_of(model.unload),
        "load": error_of(lambda: model.load_adapter(path, "second")),
        "add": error_of(lambda: get_peft_model(wrapped(llama()), LoraXSConfig(r=2))),
        "flat": error_of(lambda: wrapped(model_of(), use_orig_params=False)),
        "leaves": error_of(lambda: wrapped(model_of(), auto_wrap_policy=of_leaves)),
    }
    policy = fsdp_auto_wrap_policy(model := model_of())
    whole = wrapped(model, auto_wrap_policy=policy)
    out["losses, their policy"] = train(whole, sharded_data=True)["losses"], expected
    save_as_lora(same_folder(folder, "peft_lora"), whole.module)
    dist.barrier()
    loaded = PeftModel.from_pretrained(llama(), folder / "fsdp1_peft_lora")
    out["pairs"]["lora"] = (
        loaded(input_ids=ids).logits.detach(),
        whole(input_ids=ids).logits.detach(),
    )
    assert len(expected) == STEPS
    return out


def of_leaves(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """A policy that wraps what is trained, by itself."""
    return recurse or (
        not list(module.children()) and any(p.requires_grad for p in module.parameters())
    )


def save_root(model: Any, folder: Path) -> None:
    """Save a model of which the root alone is wrapped, and so not known to the model in it."""
    FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    model.save_pretrained(folder / f"fsdp1_never_{dist.get_rank()}")
