"""Put adapted layers into a model, and take them out again."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .disabling import disabled
from .layers import METHODS, LowRankLinear
from .layers.base import fsdp_error, why_not_adaptable
from .targets import (
    Patterns,
    check_patterns,
    match_saved,
    match_targets,
    modules_by_name,
    named_modules,
)

HOOKS = re.compile(
    r"_(forward|backward)(_pre)?_hooks(_with_kwargs|_always_called)?|_is_full_backward_hook"
)
Plan = dict[str, tuple[type[LowRankLinear], dict[str, Any]]]  # module → its class and keywords


def adapt(
    model: nn.Module,
    method: str = "lora_xs",
    *,
    target_modules: Patterns,
    exclude_modules: Patterns | None = None,
    modules_to_save: list[str] | tuple[str, ...] | None = None,
    fused: bool = True,
    progress: bool = True,
    defer_bases: bool = False,
    **method_keywords: Any,
) -> nn.Module:
    """Replace linear layers of `model` by adapted ones and freeze everything else, in place.

    Args:
        model: any module; it keeps its class.
        method: "lora", "lora_xs" or "lora_mini".
        target_modules: a list of module names or of their last parts; or a regular expression that
            must match whole names; or "all-linear": every nn.Linear but the output layer (what
            model.get_output_embeddings() returns or, without such a method, the last nn.Linear).
        exclude_modules: names, or a regular expression, of modules to leave alone.
        modules_to_save: names of modules to train whole, such as a new head; they are saved with
            the adapter.
        fused: the fused layers, or their plain references.
        progress: show a progress bar and, at the end, what is trained, on stderr.
        defer_bases: leave the factors uninitialised, for a model on the meta device; call
            `init_bases` when its weights are there.
        method_keywords: for the layers: r, alpha, dropout, train, dtype; svd (LoRA-XS); a, b, init
            (LoRA-Mini).

    Returns:
        The same model.

    Raises:
        ValueError: an unknown method; a pattern that matches nothing; a rank that does not fit a
            layer; a weight on the meta device; a module whose replacement would never be called.
        TypeError: a target that is no plain nn.Linear; a keyword that the method does not know;
            patterns that are no strings.

    Whatever is raised, the model is as it was.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(METHODS)}")
    if any(True for _ in adapted_layers(model)):
        raise ValueError("the model is adapted already: unload(model) first")
    cls = METHODS[method][fused]
    check_patterns("target_modules", target_modules)
    check_patterns("exclude_modules", exclude_modules or ())
    if isinstance(modules_to_save, str):
        raise TypeError(f"modules_to_save is {modules_to_save!r}: it must be a list of names")
    check_patterns("modules_to_save", modules_to_save or ())
    saved = match_saved(model, modules_to_save or ())
    targets = match_targets(model, target_modules, exclude_modules, saved)
    plan = dict.fromkeys(targets, (cls, method_keywords))
    with unchanged_on_error(model):
        layers = build(model, plan, progress=progress, defer_bases=defer_bases)
    place(model, layers, saved)
    if progress:
        print(describe(model), file=sys.stderr)
    return model


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give parameters their requires_grad back if anything is raised."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, required in before:
            parameter.requires_grad_(required)
        raise


def build(
    model: nn.Module, plan: Plan, *, progress: bool, defer_bases: bool
) -> dict[str, LowRankLinear]:
    """The adapted layers of a plan, by name, not yet in the model; all checks come first."""
    refuse_wrapped(model)
    modules = modules_by_name(model)
    for name, (cls, keywords) in plan.items():
        linear = modules[name]
        if reason := why_not_adaptable(linear, defer_bases):
            raise (ValueError if "meta device" in reason else TypeError)(f"{name} {reason}")
        try:  # on the meta device: all the checks, none of the work
            cls(linear.in_features, linear.out_features, **{**keywords, "device": "meta"})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    method = next(iter(plan.values()))[0].method
    return {
        name: cls.from_linear(modules[name], defer_bases=defer_bases, **keywords)
        for name, (cls, keywords) in tqdm(plan.items(), method, disable=not progress, unit="layer")
    }


def refuse_wrapped(model: nn.Module) -> None:
    """Raise for a model in a wrapper that has noted its parameters, and would not see new ones."""
    for wrapper in ("DistributedDataParallel", "DeepSpeedEngine"):
        if any(type(module).__name__ == wrapper for module in model.modules()):
            raise ValueError(
                f"the model is in {wrapper}, which would not reduce the gradients of parameters "
                "that are made now: adapt the model first, then wrap it"
            )


def place(model: nn.Module, layers: dict[str, LowRankLinear], saved: list[str]) -> None:
    """Put built layers in their places and freeze everything but them and the modules to save."""
    own = {id(p) for layer in layers.values() for p in layer.parameters() if p.requires_grad}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    modules = modules_by_name(model)
    replace_modules(model, {id(modules[name]): layer for name, layer in layers.items()})
    for name in saved:
        keep_original(modules[name])
    leave_fast_paths(model)


def replace_modules(model: nn.Module, new: dict[int, Any]) -> None:
    """Put new[id(module)] wherever that module stands, also where it stands more than once."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                setattr(parent, name, carry_hooks(child, new[id(child)]))


def carry_hooks(old: nn.Module, new: nn.Module) -> nn.Module:
    """The new module with the old one's forward and backward hooks."""
    for name, value in vars(old).items():
        if HOOKS.fullmatch(name) and value:
            vars(new)[name] = value
    return new


# --- torch's encoder fast path ---


def leave_fast_paths(model: nn.Module) -> None:
    """Make torch's encoder fast path, which reads linear1 and linear2 by their weights, unreachable
    in encoder layers with an adapted layer; `restore_fast_paths` undoes it.
    """
    for module in model.modules():
        inside = any(isinstance(child, LowRankLinear) for child in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer) and inside:
            vars(module)["_lowrank_fast_path"] = module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and inside:
            vars(module)["_lowrank_fast_path"] = module.use_nested_tensor
            module.use_nested_tensor = False


def restore_fast_paths(model: nn.Module) -> None:
    """Undo `leave_fast_paths`."""
    for module in model.modules():
        if "_lowrank_fast_path" in vars(module):
            layer = isinstance(module, nn.TransformerEncoderLayer)
            name = "activation_relu_or_gelu" if layer else "use_nested_tensor"
            setattr(module, name, vars(module).pop("_lowrank_fast_path"))


# --- modules trained whole ---


def keep_original(module: nn.Module) -> None:
    """Train a module whole, and keep a copy of it as it is for `disable_adapters` and `unload`."""
    vars(module)["_lowrank_original"] = {
        name: tensor.clone() for name, tensor in module.state_dict().items()
    }
    module.requires_grad_(True)


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules trained whole, by name."""
    return {n: m for n, m in named_modules(model) if "_lowrank_original" in vars(m)}


def originals_of(model: nn.Module) -> dict[Tensor, Tensor]:
    """Each tensor of the modules trained whole, with its value as it was."""
    originals: dict[Tensor, Tensor] = {}
    for module in saved_modules(model).values():
        present = module.state_dict(keep_vars=True)
        for name, original in vars(module)["_lowrank_original"].items():
            tensor = present[name]
            originals.setdefault(tensor, original.to(tensor.device, tensor.dtype))
    return originals


@contextmanager
def originals_in_place(model: nn.Module) -> Iterator[None]:
    """Within it the modules trained whole, and whatever is tied to them, have the kept values."""
    originals = originals_of(model)
    if originals:
        require_not_fsdp(model, "disable modules trained whole")
    exchange = {
        tensor: nn.Parameter(original, requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else original.clone()
        for tensor, original in originals.items()
    }
    holders: list[dict[str, Any]] = [
        slot for module in model.modules() for slot in (module._parameters, module._buffers)
    ]
    slots = [
        (slot, name, tensor)
        for slot in holders
        for name, tensor in slot.items()
        if tensor is not None and tensor in exchange
    ]
    for slot, name, tensor in slots:
        slot[name] = exchange[tensor]
    try:
        yield
    finally:
        for slot, name, tensor in slots:
            slot[name] = tensor


# --- the whole model's adapters ---


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """(name, layer) of every adapted layer."""
    for name, module in named_modules(model):
        if isinstance(module, LowRankLinear):
            yield name, module


def require_adapted(model: nn.Module) -> dict[str, LowRankLinear]:
    """The adapted layers by name; raises ValueError if there are none."""
    layers = dict(adapted_layers(model))
    if not layers:
        what = "adapt(model, …) first"
        if hasattr(model, "peft_config"):
            what = "it is a model of PEFT, which saves, merges and unloads itself"
        raise ValueError(f"the model has no adapted layers: {what}")
    return layers


def init_bases(model: nn.Module, *, progress: bool = True) -> nn.Module:
    """Initialise the factors of layers that were made before their weights were there.

    For models built on the meta device: build, `adapt(..., defer_bases=True)` if it is not built of
    adapted layers, `to_empty`, load the weights, then this. Layers that are initialised are left as
    they are. Raises ValueError if a weight is still on the meta device.
    """
    pending = {name: m for name, m in require_adapted(model).items() if m.bases_pending}
    for name, layer in pending.items():
        if layer.weight.is_meta:
            raise ValueError(f"{name}.weight is still on the meta device: load the weights first")
    for layer in tqdm(pending.values(), "init_bases", disable=not progress, unit="layer"):
        layer.init_factors()
    return model


def require_not_fsdp(model: nn.Module, what: str) -> None:
    """Raise if `fully_shard` manages parameters of the model: it would put back its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        raise fsdp_error(what)


def unload(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Take the adapted layers out, in place: plain nn.Linear with the original weights again.

    With merge=True their weights are W + ΔW instead, and modules trained whole keep what they have
    learned. What is frozen stays frozen.
    """
    layers = require_adapted(model)
    require_not_fsdp(model, "unload")
    if merge:
        merge_layers(layers, model)
    else:
        unmerge(model)
        with torch.no_grad():
            for tensor, original in originals_of(model).items():
                tensor.copy_(original)
    replace_modules(model, {id(layer): layer.to_linear() for layer in layers.values()})
    for module in saved_modules(model).values():
        del vars(module)["_lowrank_original"]
    restore_fast_paths(model)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Make every adapted layer's weight W + ΔW, in new storage; `unmerge` undoes it.

    One UserWarning says how much of ΔW was lost to rounding, where the weights are below float32,
    and another which weights were tied to others: those others keep W.
    """
    merge_layers(require_adapted(model), model)
    return model


def tied_layers(layers: dict[str, LowRankLinear], model: nn.Module) -> list[str]:
    """The names of the layers, not merged yet, whose weights other modules have as well."""
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, LowRankLinear)
        for parameter in module._parameters.values()
    }
    return [name for name, m in layers.items() if not m.merged and id(m.weight) in others]


def merge_layers(layers: dict[str, LowRankLinear], model: nn.Module) -> None:
    """Merge, with one warning for all."""
    require_not_fsdp(model, "merge")
    tied = tied_layers(layers, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lost = {name: layer.merge() for name, layer in layers.items()}
    if tied:
        warnings.warn(
            f"the weights of {', '.join(tied)} were tied to others, which keep their values: "
            "they are tied no longer while merged",
            stacklevel=3,
        )
    worst = max(lost, key=lost.__getitem__)
    if lost[worst]:
        warnings.warn(
            f"merging lost up to {lost[worst]:.2%} of ΔW to rounding (in {worst}); "
            "float32 weights would keep it",
            stacklevel=3,
        )


def unmerge(model: nn.Module) -> nn.Module:
    """Put back every weight as it was before `merge`, bit for bit."""
    for layer in require_adapted(model).values():
        layer.unmerge()
    return model


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model is the one it was before `adapt`: the reference model of DPO, say.

    That holds for calls of the same thread or asyncio task. Modules that are trained whole, and
    graphs of torch.compile outside a bank, are disabled for all of the process.
    """
    with disabled(list(require_adapted(model).values())), originals_in_place(model):
        yield model


def describe(model: nn.Module) -> str:
    """What is trained, of how much, and with which learning rate to start."""
    layers = require_adapted(model)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    first = next(iter(layers.values()))
    return (
        f"{first.method}: {len(layers)} layers adapted; {trained:,} of {total:,} parameters "
        f"trained ({trained / total:.3%}); "
        f"a learning rate to start from (AdamW): {first.learning_rate:g}"
    )
