"""All or nothing: an adapter that PEFT cannot add or load leaves a model as it was.

PEFT, and transformers, add an adapter first and read its file then. So their functions that load
are wrapped: where an error comes out of a model with layers of this library, it is put back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from peft import PeftModel
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from ...files.other_base import on_other_base
from ...models.unchanged import Snapshot, values_unchanged_on_error
from .config import LowRankConfig
from .files import to_load
from .layer import Factors, PeftLowRankLinear
from .mixed import BASE

HUB = ("revision", "subfolder", "token", "cache_dir", "local_files_only")


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
    elif hasattr(Factors(), name) or hasattr(nn.ModuleDict(), name):
        reason = "there is an attribute of that name where adapters are kept"
    else:
        return
    raise ValueError(f"adapter_name is {name!r}: {reason}; choose another name")


def values_of(model: nn.Module, adapter: str) -> Iterable[Tensor]:
    """The tensors that the file of an adapter may overwrite, each once."""
    return {id(tensor): tensor for tensor in _values_of(model, adapter)}.values()


def _values_of(model: nn.Module, adapter: str) -> Iterator[Tensor]:
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


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a model that adds or loads an adapter, and leaves nothing behind if it fails.

    It also takes on_other_base, "refuse" or "warn", as `load_adapter` does.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        way = kwargs.pop("on_other_base", None)
        given = signature.bind(model, *args, **kwargs).arguments
        name, before = given.get("adapter_name") or "default", Snapshot(model)
        try:
            unchanged = values_unchanged_on_error(values_of(model, name))
            with on_other_base(way, "the adapter"), unchanged:
                result = function(model, *args, **kwargs)
                if not isinstance(model, PeftModel):
                    check_loaded(model, name, given)
                return result
        except BaseException:
            if is_ours(model, given.values()):
                before.restore()
            raise

    return call


def is_ours(model: nn.Module, given: Iterable[Any] = ()) -> bool:
    """Whether layers or a configuration of this library are concerned."""
    return any(isinstance(one, LowRankConfig) for one in given) or any(
        isinstance(module, PeftLowRankLinear) for module in model.modules()
    )


def check_loaded(model: Any, adapter: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError if what transformers has loaded by itself is of another base model."""
    folder, tensors = given.get("peft_model_id"), given.get("adapter_state_dict")
    if not isinstance(model.peft_config[adapter], LowRankConfig):
        return
    if tensors is None and folder is not None:
        wanted = {**given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})}
        hub = {key: wanted[key] for key in HUB if wanted.get(key) is not None}
        tensors = load_peft_weights(folder, device="cpu", **hub)
    if tensors is not None:
        prefix = "base_model.model."
        to_load(model, adapter, {k.removeprefix(prefix): v for k, v in tensors.items()})


def whole_model(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.from_pretrained` that gives the base model back if it fails.

    It also takes on_other_base, "refuse" or "warn", as `load_adapter` does.
    """

    @functools.wraps(from_pretrained)
    def call(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before, way = Snapshot(model), kwargs.pop("on_other_base", None)
        try:
            with on_other_base(way, "the adapter"):
                return from_pretrained(cls, model, *args, **kwargs)
        except BaseException:
            if is_ours(model):
                before.restore()
            raise

    return call


def wrap() -> None:
    """Wrap the functions of PEFT and of transformers."""
    from_pretrained: Any = inspect.getattr_static(PeftModel, "from_pretrained")
    PeftModel.from_pretrained = classmethod(whole_model(from_pretrained.__func__))
    for owner, names in (
        (PeftModel, ("load_adapter",)),
        (PeftAdapterMixin, ("load_adapter", "add_adapter")),
    ):
        for name in names:
            setattr(owner, name, whole(getattr(owner, name)))
