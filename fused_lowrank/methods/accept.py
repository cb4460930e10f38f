"""The linear layers that can be adapted, and the parts that an adapted one takes over from them.

Both ways into the library ask here: `adapt` and the layers, and the methods in PEFT.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product
from torch.nn.utils import parametrize

from ..compute.base import kinds
from ..compute.base.protocol import Base, sizes_of
from ..context.elsewhere import FSDP1, ZERO, hook_of, sharder_of
from ..context.readers import reads_only
from .tensors import is_sharded

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TENSORS = (nn.Parameter, Tensor)  # FSDP and functional_call put plain tensors in Parameters' places
DISABLED = torch._C._disabled_torch_function_impl
TORCH = ("torch._subclasses.", "torch.distributed.")  # DTensor, FakeTensor, FunctionalTensor, …
HOOKS = re.compile(
    r"_(forward|backward)(_pre)?_hooks(_with_kwargs|_always_called)?|_is_full_backward_hook"
)
STATE_HOOKS = re.compile(r"_(load_)?state_dict_(pre_|post_)?hooks")
SHAPES = ((4, 3), (2, 4, 3), (3,))  # of what a forward of their own is tried with
HELD = ("_parameters", "_buffers", "_modules")
OWN = {"in_features", "out_features", "weight", "bias"}  # what every nn.Linear has
FORWARD = {  # accelerate's, see `is_replaced`; and what torch.compile has made of one
    *("forward", "_old_forward", "_hf_hook", "_compiled_call_impl"),
}


ADAPT_FIRST = {
    FSDP1: "adapt before FullyShardedDataParallel",
    ZERO: (
        "adapt within deepspeed.zero.GatheredParameters(list(model.parameters())), or load the "
        "model without zero.Init and adapt before deepspeed.initialize"
    ),
}


def special_tensor(weight: Any) -> str | None:
    """The type's name of a tensor that is more than its values: quantised, packed, not made yet.

    A subclass that overrides nothing that tensors do is an ordinary one.
    """
    kind = type(weight)
    if kind in TENSORS:
        return None
    if not isinstance(weight, Tensor):
        return f"{kind.__name__} in place of a tensor"
    if kind.__module__.startswith(TORCH):
        local = getattr(weight, "_local_tensor", None)
        return None if local is None else special_tensor(local)
    for cls in kind.__mro__[: kind.__mro__.index(Tensor)]:
        for name, value in vars(cls).items() if cls not in TENSORS else ():
            does = not name.startswith("__") or name.startswith("__torch_")
            if does and hasattr(Tensor, name) and value is not DISABLED:
                return kind.__name__
    return None


def why_no_weight(weight: Any) -> str | None:
    """The reason why a tensor cannot be an adapted layer's weight, to end "it has", or None."""
    if kind := special_tensor(weight):
        return (
            f"a weight that is a {kind}: quantised and other special tensors are not supported; "
            "adapt a model that is not quantised, or dequantise it first"
        )
    if weight.dtype not in WEIGHT_DTYPES:
        return (
            f"a weight of {weight.dtype}: quantised weights are not supported; adapt before "
            "quantising, or dequantise first"
        )
    return None


def is_replaced(module: nn.Module) -> bool:
    """Whether the module's forward is not its class's: accelerate's hooks replace it.

    They leave the class's own behind where they are removed.
    """
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, offloading."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and is_replaced(module))
    )


def is_parametrized(linear: nn.Module) -> bool:
    """Whether weight or bias is computed: by a parametrisation, pruning, or weight norm of old."""
    own = linear._parameters
    return parametrize.is_parametrized(linear) or "weight" not in own or "bias" not in own


def has_product(linear: nn.Linear) -> bool:
    """Whether the forward of a layer's class is x·Wᵀ + bias, nn.Linear's or one of its own."""
    kind: Any = type(linear)
    return computes_product(kind, kind.forward)


@functools.cache
def computes_product(kind: type[nn.Linear], forward: Callable[..., Any]) -> bool:
    """Whether this forward, of a class of linear layers, is x·Wᵀ + bias, as nn.Linear's is.

    One of their own must use nothing of the layer but what every nn.Linear has, so that no other
    layer of the class does something else, and give in float64 what nn.Linear gives.
    """
    if forward is nn.Linear.forward:
        return True
    for cls in kind.__mro__[: kind.__mro__.index(nn.Linear)]:
        own = vars(cls).get("forward")
        if own is not None and not reads_only(getattr(own, "__code__", None), frozenset(OWN)):
            return False
    try:
        return all(gives_product(kind, shape, bias) for shape in SHAPES for bias in (True, False))
    except Exception:  # whatever their code raises where it is used in another way than meant
        return False


@torch.inference_mode(False)
@torch.enable_grad()
def gives_product(kind: type[nn.Linear], shape: tuple[int, ...], bias: bool) -> bool:
    """Whether a small layer of this class gives what nn.Linear gives, and its gradients."""
    layer = nn.Linear(shape[-1], 2, bias, device="meta")
    for name, parameter in list(layer.named_parameters()):
        layer._parameters[name] = nn.Parameter(values(parameter.shape))
    layer.__class__ = kind
    x, own = values(shape).requires_grad_(), list(layer.parameters())
    y, expected = layer.forward(x), product(x, *own)
    found, wanted = ([v, *torch.autograd.grad(v.exp().sum(), [x, *own])] for v in (y, expected))
    return all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, wanted, strict=True)
    )


def values(shape: tuple[int, ...]) -> Tensor:
    """A tensor whose values have no pattern; nothing is drawn from anybody's generator."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float64, device="cpu").mul(1.7).sin().view(shape)


def is_dense(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is a plain matrix."""
    return (
        isinstance(module, nn.Linear)
        and not is_parametrized(module)
        and has_product(module)
        and why_no_weight(module.weight) is None
    )


def base_of(module: nn.Module) -> Base | str:
    """The W of a module that is no such layer, or the reason why there is none."""
    return kinds.base_of(module, isinstance(module, nn.Linear) and has_product(module))


def sides_of(linear: nn.Module) -> tuple[int, int]:
    """(K, N) of a module that says them; see `compute.base.protocol.sizes_of`."""
    found = sizes_of(linear)
    assert found is not None
    return found


def matrix_of(linear: nn.Module) -> Any:
    """W of a module that can be adapted: its weight, or a `Base`."""
    return linear.weight if is_dense(linear) else base_of(linear)


def why_no_base(module: nn.Module) -> str | None:
    """The reason why a module that is no plain linear layer cannot be adapted, or None."""
    base, kind = base_of(module), type(module).__name__
    if (isinstance(base, Base) and base.is_meta) or hook_of(module) is not None:
        return (
            f"is a {kind} whose weight is on the meta device or offloaded: load it onto its device "
            "first, and adapt then"
        )
    reason = base if isinstance(base, str) else kinds.why_not_usable(base)
    unknown = type(base) in (str, Base) and kinds.kind_of(module) is None
    if reason and unknown and isinstance(module, nn.Linear):
        weight = why_no_weight(module.weight)
        reason = reason if weight is None else f"is a {kind} with {weight}. It {reason}"
    return reason


def why_not_plain(linear: nn.Linear) -> str | None:
    """The reason why a layer is not the x·Wᵀ + bias that an adapted one computes, or None."""
    kind = type(linear).__name__
    if is_parametrized(linear):
        return "is parametrised (or pruned, or weight-normed): remove that first"
    if not has_product(linear):
        return (
            f"is a {kind}, whose forward is not nn.Linear's: quantised and custom linear layers "
            "are not supported; dequantise it, leave it out by exclude_modules, or train it whole "
            "by modules_to_save"
        )
    if reason := why_no_weight(linear.weight):
        return f"is a {kind} with {reason}"
    hooks = [name for name, value in vars(linear).items() if STATE_HOOKS.match(name) and value]
    if hooks and not hasattr(linear.weight, "full_tensor"):  # fully_shard's own are not the matter
        return f"has hooks on its state_dict ({', '.join(hooks)}): remove them first"
    return why_not_carried(linear) if is_replaced(linear) else None


def why_not_linear(module: nn.Module, defer_bases: bool = False) -> str | None:
    """The reason why a module that is not adapted yet cannot be, or None if it can."""
    kind = type(module).__name__
    if kind == "Conv1D":
        return (
            "is a Conv1D: only nn.Linear can be adapted; transformers' Conv1D can by PEFT, with "
            "the configurations of fused_lowrank.integrations.peft"
        )
    if not isinstance(module, nn.Linear):
        if sizes_of(module) is None:
            return (
                f"is a {kind}: only nn.Linear can be adapted, and modules that say their "
                "in_features and out_features as it does"
            )
        return why_no_base(module)
    if not (is_parametrized(module) or is_sharded(module.weight) or is_dense(module)):
        return why_no_base(module)
    if not is_parametrized(module) and is_sharded(module.weight):
        return "has its weight sharded: adapt before fully_shard or parallelize_module"
    if reason := why_not_plain(module):
        return reason
    if sharder := sharder_of(module.weight):
        return f"has its weight sharded by {sharder}: {ADAPT_FIRST[sharder]}"
    if module.weight.is_meta and not defer_bases and hook_of(module) is None:
        return (
            "has its weight on the meta device: load the weights first, or pass "
            "defer_bases=True and call init_bases(model) once they are loaded"
        )
    return None


def why_not_carried(linear: nn.Linear) -> str | None:
    """The reason why a replaced forward cannot be that of an adapted layer as well, or None."""
    hook = vars(linear).get("_hf_hook")
    if hook is None:
        return (
            "has had its forward replaced (`layer.forward = …`), which an adapted layer would "
            "lose: take that back first, or make it a forward hook"
        )
    for each in getattr(hook, "hooks", (hook,)):
        if hasattr(each, "storage_dtype"):
            return (
                "is cast at each call by accelerate, which would cast what is trained, too: adapt "
                "before attach_layerwise_casting_hooks, or remove its hook first"
            )
    return None


# --- what is taken over ---


def extras(linear: nn.Linear) -> dict[str, list[str]]:
    """The attributes of a layer that not every nn.Linear has, and what it holds, by kind."""
    usual = vars(nn.Module()).keys() | OWN | FORWARD
    found = {"": [name for name in vars(linear) if name not in usual]}
    for kind in HELD:
        found[kind] = [name for name in vars(linear)[kind] if name not in OWN]
    return found


def clashes(linear: nn.Linear, layer: nn.Module) -> str | None:
    """The reason why something of a linear layer cannot go to this adapted one, or None."""
    if not is_dense(linear):  # it stays where it is
        return None
    names = [name for kind in extras(linear).values() for name in kind if hasattr(layer, name)]
    if names:
        return (
            f"has {', '.join(names)} of its own, and so have adapted layers: give it another name"
        )
    return None


def carry(linear: nn.Linear, layer: nn.Module) -> None:
    """Give an adapted layer what the linear one has beside weight and bias: hooks, attributes."""
    found = extras(linear)
    move(linear, layer, found)
    vars(layer)["_carried"] = type(linear), found


def give_back(layer: nn.Module, linear: nn.Linear) -> None:
    """Give a plain layer what the adapted one took over, and its class."""
    kind, found = vars(layer).get("_carried", (nn.Linear, {}))
    linear.__class__ = kind
    move(layer, linear, found)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give one module the hooks of another, which has none then."""
    for name, value in list(vars(old).items()):
        if HOOKS.fullmatch(name) and value:
            vars(new)[name], vars(old)[name] = value, type(value)()
    if is_replaced(old) and (hook := vars(old).get("_hf_hook")) is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)


def move(old: nn.Module, new: nn.Module, found: dict[str, list[str]]) -> None:
    """Give `new` the hooks of `old`, and the attributes and the like that are named.

    Of accelerate's hooks those that offload are left out: they have tensors of `old`, and
    `elsewhere.hand_over` makes others of them.
    """
    for name, value in vars(old).items():
        if HOOKS.fullmatch(name) and value:
            vars(new)[name] = value
    for kind, names in found.items():
        source, target = (vars(m)[kind] if kind else vars(m) for m in (old, new))
        for name in names:
            value = source.get(name)
            if getattr(value, "__self__", None) is old:  # a method put there
                value = cast(Any, value).__func__.__get__(new)
            if name in source:
                target[name] = value
    new._non_persistent_buffers_set.update(old._non_persistent_buffers_set)
    if is_replaced(old) and (hook := vars(old).get("_hf_hook")) is not None:
        from accelerate.hooks import add_hook_to_module

        for each in getattr(hook, "hooks", (hook,)):
            if not getattr(each, "offload", False):
                add_hook_to_module(new, each, append=True)
