"""PEFT's own LoRA through the fused kernels: `fuse_lora(model)` and back, `unfuse_lora(model)`.

A fused layer is PEFT's layer of another class: Parameters, state_dict, adapters and files are the
same. Each call is computed by `lowrank_linear` where that is the same computation, and by PEFT's
own forward everywhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense

from ...compute import choose
from ...compute.autograd import fold
from ...compute.operands import Operands
from ...compute.reference import chain
from ...compute.run import under_autocast
from ...context.calls import Learned
from ...context.declared import ANYWHERE, Owners, by_row, stated
from ...context.readers import leave_fast_paths, restore_fast_paths
from ...functional import DTYPES, lowrank_linear
from ...methods import dora
from ...methods.accept import TENSORS, is_hooked, is_replaced
from ...methods.method import MAGNITUDE, Parts
from .mixed import Entries, Switched, as_before, hooked, uncompiled
from .registry import TESTED

try:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel, variants
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.layer import Linear, LoraLayer
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(f"{error}: fuse_lora was tested with peft {TESTED}") from error

Model = TypeVar("Model", bound=nn.Module)
DORA = variants.DoraLinearVariant
MICA = getattr(variants, "MiCALinearVariant", None)  # LoRA beside which B is frozen
BASES = (nn.Linear.forward, Conv1D.forward)  # the forwards that the equation replaces
USED = (
    *("_disable_adapters", "active_adapters", "base_layer", "lora_A", "lora_B", "lora_dropout"),
    *("lora_magnitude_vector", "lora_variant", "merged_adapters", "scaling", "unmerge"),
    "update_layer",
)


def check_peft() -> None:
    """Raise ImportError, naming what is missing, if PEFT's LoRA layer is not as it is used here."""
    try:
        with torch.device("meta"):  # draws nothing from anybody's generator
            layer = Linear(nn.Linear(1, 1), "probe", config=LoraConfig(), r=1)
        missing = [name for name in USED if not hasattr(layer, name)]
    except Exception as error:
        missing = [f"Linear(base_layer, adapter_name, config=, r=) ({error})"]
    if missing:
        raise ImportError(
            f"PEFT {peft.__version__} is not as fuse_lora needs it; it was tested with {TESTED}. "
            f"Missing in peft.tuners.lora.layer: {', '.join(missing)}"
        )


check_peft()


class FusedLinear(Switched, Linear):
    """`peft.tuners.lora.layer.Linear` through the fused kernels, where these compute the same."""

    impl: ClassVar[str] = "auto"  # as in `lowrank_linear`
    takes_entries: ClassVar[bool] = True
    noted: bool = False  # whether a checkpoint was told how it was called
    _disable_adapters: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        if self.noted or self._disable_adapters:
            off, names = as_before(self, self._disable_adapters, kwargs.get("adapter_names"))
            if off is not self._disable_adapters or names is not kwargs.get("adapter_names"):
                return self.again(x, off, names, args, kwargs)
        if not (args or kwargs or self._disable_adapters or self.merged_adapters):
            factors: Any = self._modules["lora_A"]
            here = [name for name in self.active_adapters if name in factors]
            if len(here) == 1 and why_not_fused(self, here[0]) is None:
                y = self.fused(x, here[0])
                if y is not None:
                    return y
        if isinstance(names := kwargs.get("adapter_names"), Entries):
            as_before(self, False, names)
            return self.mixed(x, names, args, kwargs)
        return super().forward(x, *args, **kwargs)

    def again(self, x: Tensor, off: bool, names: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The forward that a checkpoint computes again: disabled or not, with names, as it was."""
        before, kwargs = self._disable_adapters, {**kwargs, "adapter_names": names}
        if names is None:
            del kwargs["adapter_names"]
        if off:
            return self.base_layer(x, *args, **kwargs)
        self._disable_adapters = False
        try:
            if names is None:
                return super().forward(x, *args, **kwargs)
            return self.mixed(x, names, args, kwargs)
        finally:
            self._disable_adapters = before

    def fused(self, x: Tensor, adapter: str) -> Tensor | None:
        """The layer with one adapter, or None for an x that is left to PEFT."""
        base, a, b, dropout = parts(self, adapter)
        weight, bias, scale = base._parameters["weight"], base.bias, self.scaling[adapter]
        down, up, up_bias = a._parameters["weight"], b._parameters["weight"], b.bias
        if not takes(x, weight, down):
            return None
        if up_bias is not None:
            folded = up_bias * scale if bias is None else torch.add(bias, up_bias, alpha=scale)
            bias = folded.to(weight.dtype)
        if type(base).forward is Conv1D.forward:
            weight = weight.t()
        dropout_p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        if has_gain(self, adapter):
            low = dropout(x) if dropout_p and self.training else None
            return self.with_gain(Operands(x, weight, down, None, up, bias, scale), adapter, low)
        if self.impl == "auto" and (choose.short(x) if dropout_p else choose.small(x)):
            low = torch.dropout(x, dropout_p, True) if dropout_p else None
            return chain(x, weight, down, None, up, bias, scale, low=low)
        return lowrank_linear(
            *(x, weight, down, None, up, bias),
            scale=scale,
            dropout_p=dropout_p,
            training=True,
            impl=self.impl,
        )

    def with_gain(self, operands: Operands, adapter: str, low: Tensor | None) -> Tensor:
        """The layer with DoRA, whose norm is of the factors as they are now.

        `low` is x after a dropout, if there is one. The gain is then of what is computed from it,
        the base's product among it, and what the base lacks of x comes to that without a gain.
        """
        x, weight, down, _, up, bias, scale, *_ = operands
        magnitude = {MAGNITUDE: magnitude_of(self, adapter)._parameters["weight"]}
        made = Parts(down, None, up)
        gain = dora.with_gain(made, magnitude, weight, scale).gain
        given: dict[str, Any] = {"scale": scale, "impl": self.impl, "gain": gain}
        if low is None:
            return lowrank_linear(x, weight, down, None, up, bias, **given)
        return lowrank_linear(low, weight, down, None, up, **given) + dense(x - low, weight, bias)

    def mixed(self, x: Tensor, entries: Entries, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """PEFT's forward with a name for each of x's first dimension, or for each row."""
        if torch.compiler.is_compiling() and ANYWHERE[0]:
            return uncompiled(self.mixed, x, entries, args, kwargs)
        call = None if torch.compiler.is_compiling() else entries.call
        if call is not None and call.follower is not None and not call.follower.paused:
            state = stated(self) or call.follower.where(x)
            with call.follower.pause():
                y = self.mixed(x, entries, args, kwargs)
            call.follower.mark(y, state)
            return y
        place = entries.spread(self, f"a {type(self).__name__} {id(self):x}", x)
        each, left = divmod(len(x), max(1, len(entries)))
        rows = x if place.outer == 1 and not left else fold(x)
        if isinstance(place, Owners):
            names = [entries[number] for number in by_row(place, len(rows), len(entries)).tolist()]
        else:
            times = each if rows is x else place.repeat
            names = [name for name in entries for _ in range(times)]
            names *= 1 if rows is x else place.outer
        y = super().forward(rows, *args, **{**kwargs, "adapter_names": names})
        return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; says so if it is one that PEFT's own forward computes."""
        super().update_layer(adapter_name, *args, **kwargs)
        dora.forget()
        if reason := why_not_fused(self, adapter_name):
            warnings.warn(f"left to PEFT's own forward: a layer {reason}", stacklevel=2)

    def unmerge(self) -> None:
        """Undo `merge`, as PEFT does: it writes to the base's weight by way of `.data`."""
        super().unmerge()
        dora.forget()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        dora.forget()
        return super()._apply(fn, recurse)


class FusedLoraModel(LoraModel):
    """PEFT's tuner, whose `adapter_names` are of the calling thread or task, and follow the rows.

    PEFT itself gives every layer one name for each of its x's first dimension, by hooks that other
    threads' calls meet as well.
    """

    learned: Learned  # of where the sequences are in the layers' inputs

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None or kwargs.get("alora_offsets") is not None or self.training:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        if "learned" not in vars(self):
            self.learned = Learned()
        layers = [layer for layer in self.modules() if isinstance(layer, LoraLayer)]
        there = {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
        with hooked(self, names, there, LoraLayer):
            yield


def parts(layer: Linear, adapter: str) -> tuple[Any, Any, Any, Any]:
    """(base, A, B, dropout): the modules that PEFT's forward calls for an adapter."""
    modules: Any = layer._modules  # asked by name, a module takes the host ten times as long
    names = "lora_A", "lora_B", "lora_dropout"
    return modules["base_layer"], *(modules[name]._modules[adapter] for name in names)


def has_gain(layer: Linear, adapter: str) -> bool:
    """Whether an adapter is one with DoRA."""
    return bool(layer.lora_variant) and type(layer.lora_variant.get(adapter)) is DORA


def magnitude_of(layer: Linear, adapter: str) -> Any:
    """The module that has the magnitude of an adapter with DoRA."""
    modules: Any = layer._modules
    return modules["lora_magnitude_vector"]._modules[adapter]


def why_not_fused(layer: Linear, adapter: str) -> str | None:
    """The reason why PEFT's own forward computes a layer with this adapter, or None."""
    variant = layer.lora_variant.get(adapter)
    if variant is not None and type(variant) not in (DORA, MICA):
        return f"whose adapter {adapter!r} is neither LoRA nor DoRA ({type(variant).__name__})"
    if not isinstance(layer.scaling[adapter], int | float):
        return f"whose adapter {adapter!r} has a tensor for its scaling"
    base, a, b, dropout = called = parts(layer, adapter)
    of_gain = (magnitude_of(layer, adapter),) if has_gain(layer, adapter) else ()
    for part in (*called, *of_gain):
        if is_hooked(part):
            return "inside which there are hooks (of offloading, say)"
    if type(base).forward not in BASES:
        return f"around a {type(base).__name__}, which is no plain nn.Linear or Conv1D"
    for part in (base, a, b, *of_gain):
        weight = part._parameters.get("weight")
        if type(weight) not in TENSORS or weight.dtype not in DTYPES:
            return "with a weight that is parametrised, sharded or quantised"
    for part in a, b:
        if type(part).forward is not nn.Linear.forward:
            return f"whose adapter {adapter!r} has a {type(part).__name__} for an nn.Linear"
    for part in of_gain:
        if type(part).forward is not DoraLinearLayer.forward:
            return f"whose adapter {adapter!r} has a {type(part).__name__} for its DoRA"
        if part._parameters["weight"].device != base._parameters["weight"].device:
            return f"whose adapter {adapter!r} has its magnitude on another device than the base"
        if b.bias is not None:
            return f"whose adapter {adapter!r} has a bias in lora_B, of which are PEFT's norms, too"
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.p >= 1):
        return f"with {dropout}"
    return None


def takes(x: Tensor, weight: Tensor, down: Tensor) -> bool:
    """Whether `lowrank_linear` gives what PEFT's forward gives for this x.

    float16 beside wider factors is left to PEFT where a gradient is wanted: float32 holds small
    gradients of theirs that would vanish in float16. Under autocast PEFT computes in float16 too.
    torch.func's transforms and torch.jit.trace do not see through our functions.
    """
    if type(x) is not Tensor or x.is_nested:
        return False
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return False
    if x.dtype == weight.dtype and (
        x.dtype != torch.float16 or down.dtype == x.dtype or not torch.is_grad_enabled()
    ):
        return True
    return under_autocast(x)


def fuse_lora(model: Model) -> Model:
    """Compute the model's PEFT LoRA layers by the fused kernels, in place; returns the model.

    For a PeftModel, and for any model with layers by `inject_adapter_in_model`:

        model = fuse_lora(get_peft_model(model, LoraConfig(…)))

    Layers around nn.Linear and transformers' Conv1D are fused, with any r, alpha, rsLoRA, initial
    values, bias, lora_bias and dropout, and with DoRA. All else is left to PEFT's own forward:
    other kinds of layers and of LoRA, hooks inside a layer, several active adapters at once, merged
    and disabled ones. Mixed batches are left to it as well, which refuses them with DoRA, but the
    rows of each adapter are found as with the methods of this library: `adapter_names` belong to
    the calling thread or task, and are followed to each layer's rows. One UserWarning names the
    layers that are left, and why. Adapters may be added, changed and deleted afterwards; if one
    brings new layers, call this again. Call it before `fully_shard`.

    torch's encoder layers with a fused layer are kept off their fast path, which PEFT's own layers
    leave reading the base weights: in eval mode their adapters act, too.

    Outputs and gradients are PEFT's but for rounding, and in the same dtypes: factors wider than x
    are used in x's dtype, as under autocast. Dropout draws another mask of the same distribution,
    from a seed; calls of few elements on a CPU have torch's own, and are computed by library
    operations then, whatever plan is asked for: a checkpoint finds the same mask under another one.
    A second differentiation raises: `unfuse_lora` first. So does a backward with DoRA in training
    if the layer's output was written to in place: the magnitude's gradient is computed from it.

    Raises:
        ValueError: the model has no LoRA layers of PEFT's.
        ImportError: PEFT's LoRA layer is not as it is used here; raised by the import.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    if not layers:
        raise ValueError(
            "the model has no LoRA layers of PEFT's: get_peft_model(model, LoraConfig(…)) first "
            "(for layers of this library there is adapt(model, method='lora'))"
        )
    left: dict[str, list[str]] = {}
    for name, layer in layers.items():
        for reason in reasons(layer):
            left.setdefault(reason, []).append(name or "the model")
        if type(layer) is Linear:
            change_class(layer, FusedLinear)
    for tuner in model.modules():
        if type(tuner) is LoraModel:
            tuner.__class__ = FusedLoraModel
    leave_fast_paths(model, FusedLinear)
    if left:
        said = "; ".join(f"{', '.join(names)}: a layer {reason}" for reason, names in left.items())
        warnings.warn(f"left to PEFT's own forward: {said}", stacklevel=2)
    return model


def unfuse_lora(model: Model) -> Model:
    """Undo `fuse_lora`, in place; returns the model.

    Raises:
        ValueError: the model has no fused LoRA layers, or one whose class was changed since.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FusedLinear)}
    if not layers:
        raise ValueError("the model has no fused LoRA layers: fuse_lora(model) first")
    for name, layer in layers.items():
        if type(layer) is not FusedLinear:
            raise ValueError(f"{name} is a {type(layer).__name__} by now: unfuse before sharding")
    for layer in layers.values():
        change_class(layer, Linear)
    for tuner in model.modules():
        if type(tuner) is FusedLoraModel:
            tuner.__class__ = LoraModel
    restore_fast_paths(model)
    return model


def reasons(layer: Any) -> list[str]:
    """The reasons why calls of a layer are left to PEFT."""
    if type(layer) not in (Linear, FusedLinear):
        return [f"of another kind ({type(layer).__name__})"]
    if is_replaced(layer) and "_old_forward" not in vars(layer):
        return ["whose forward has been replaced"]
    return list(filter(None, dict.fromkeys(why_not_fused(layer, name) for name in layer.lora_A)))


def change_class(layer: Linear, kind: type[Linear]) -> None:
    """Make the layer one of that class, also where accelerate's hooks have kept its forward."""
    for name in "forward", "_old_forward":
        bound = vars(layer).get(name)
        if getattr(bound, "__func__", None) is type(layer).forward:
            vars(layer)[name] = kind.forward.__get__(layer)
    layer.__class__ = kind
