"""Models that are refused as a whole: wrapped for distributed runs, sharded, adapted by PEFT."""

import sys
from typing import Any

from torch import nn

from ..context.elsewhere import brings_blocks, sharder_in
from ..methods.tensors import fsdp_error
from .targets import named_modules


def refuse_wrapped(model: nn.Module) -> None:
    """Raise for a model in a wrapper that has noted its parameters, and would not see new ones."""
    for wrapper in ("DistributedDataParallel", "DeepSpeedEngine"):
        if any(type(module).__name__ == wrapper for module in model.modules()):
            raise ValueError(
                f"the model is in {wrapper}, which would not reduce the gradients of parameters "
                "that are made now: adapt the model first, then wrap it"
            )


def refuse_peft(model: nn.Module) -> None:
    """Raise ValueError for a model that PEFT has adapted: what that trains would be frozen."""
    peft: Any = sys.modules.get("peft")
    if peft is None:
        return
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (peft.PeftModel, BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)
    for name, module in named_modules(model):
        if isinstance(module, kinds):
            raise ValueError(
                f"the model has adapters of PEFT ({name or 'it'} is a {type(module).__name__}), "
                "which would be frozen, and in no file of save_adapter: add this one by PEFT as "
                "well (fused_lowrank.integrations.peft), or take the plain model that its unload() "
                "or merge_and_unload() returns"
            )


def require_not_fsdp(model: nn.Module, what: str) -> None:
    """Raise if FSDP, ZeRO-3 or a hook on a block would put back parameters of their own."""
    if brings_blocks(model):
        raise RuntimeError(
            f"cannot {what} while accelerate brings whole blocks (preload_module_classes) with the "
            "weights it knows: accelerate.hooks.remove_hook_from_submodules(model) first"
        )
    if sharder := sharder_in(model):
        raise fsdp_error(what, sharder)
