"""All or nothing: an adapter that PEFT cannot add or load leaves a model as it was.

PEFT adds an adapter first and reads its file then. So `PeftModel.load_adapter` and `from_pretrained`
are wrapped: where the model has layers of this library and an error comes out, it is put back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any

from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...unchanged import Snapshot, values_unchanged_on_error
from .layer import PeftLowRankLinear
from .mixed import BASE


def check_name(name: Any) -> None:
    """Raise ValueError unless an adapter can have this name."""
    if not isinstance(name, str) or not name:
        reason = "it must be a string that is not empty"
    elif "." in name:
        reason = "it must have no dot, which parts the names of modules"
    elif PurePath(name).is_absolute():
        reason = "it must be no absolute path, for it is a folder among files that are saved"
    elif name == BASE:
        reason = "it means no adapter, in adapter_names"
    elif hasattr(nn.ParameterDict(), name) or hasattr(nn.ModuleDict(), name):
        reason = "PyTorch has an attribute of that name where adapters are kept"
    else:
        return
    raise ValueError(f"adapter_name is {name!r}: {reason}; choose another name")


def values_of(model: nn.Module, adapter: str) -> Iterator[Tensor]:
    """The tensors that the file of an adapter may overwrite."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] == "bias":
            yield parameter
    for module in model.modules():
        if isinstance(module, PeftLowRankLinear):
            for name, parameter in module.named_parameters():
                if not name.startswith("base_layer."):
                    yield parameter
        elif isinstance(module, AuxiliaryTrainingWrapper):
            for name, tensor in module.state_dict(keep_vars=True).items():
                if adapter in name.split("."):
                    yield tensor


def whole_load(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.load_adapter` that leaves nothing behind where it fails."""

    @functools.wraps(load_adapter)
    def load(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, PeftLowRankLinear) for module in self.modules()):
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)
        before = Snapshot(self)
        try:
            with values_unchanged_on_error(values_of(self, adapter_name)):
                return load_adapter(self, model_id, adapter_name, *args, **kwargs)
        except BaseException:
            before.restore()
            raise

    return load


def whole_model(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.from_pretrained` that gives the base model back where it fails."""

    @functools.wraps(from_pretrained)
    def load(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = Snapshot(model)
        try:
            return from_pretrained(cls, model, *args, **kwargs)
        except BaseException:
            if any(isinstance(module, PeftLowRankLinear) for module in model.modules()):
                before.restore()
            raise

    return load


def wrap() -> None:
    """Wrap PEFT's functions, once."""
    if "__wrapped__" not in vars(PeftModel.load_adapter):
        from_pretrained = inspect.getattr_static(PeftModel, "from_pretrained").__func__
        PeftModel.load_adapter = whole_load(PeftModel.load_adapter)
        PeftModel.from_pretrained = classmethod(whole_model(from_pretrained))
