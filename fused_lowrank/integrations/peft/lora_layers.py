"""PEFT's layers of LoRA, computed by the equation: over a plain W, and over one that is quantised.

A fused layer is of a class made of PEFT's own; `fused_of` has the one for each.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense

from ...compute import choose
from ...compute.autograd import fold
from ...compute.base.apart import Apart
from ...compute.base.calls import alone, over_base
from ...compute.base.eightbit import EightBit
from ...compute.base.fourbit import FourBit
from ...compute.base.kinds import base_of
from ...compute.base.protocol import Base
from ...compute.base.subclass import Subclass
from ...compute.dropout import Dropout
from ...compute.operands import Operands
from ...compute.reference import chain
from ...compute.run import under_autocast
from ...context.declared import ANYWHERE, Owners, by_row, stated
from ...functional import DTYPES, lowrank_linear
from ...methods import dora
from ...methods.accept import TENSORS, is_hooked
from ...methods.method import MAGNITUDE, Parts
from .mixed import Entries, Switched, as_before, uncompiled
from .registry import TESTED

try:
    from peft.tuners.lora import variants
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(f"{error}: fuse_lora was tested with peft {TESTED}") from error

DORA = variants.DoraLinearVariant
MICA = getattr(variants, "MiCALinearVariant", None)  # LoRA beside which B is frozen
BASES = (nn.Linear.forward, Conv1D.forward)  # the forwards that the equation replaces
QUANTISED = {  # the module of PEFT, which may not be there to be imported → its layers
    "peft.tuners.lora.bnb": ("Linear4bit", "Linear8bitLt"),
    "peft.tuners.lora.torchao": ("TorchaoLoraLinear",),
}
LIBRARIES = "bitsandbytes.", "torch."  # that the forwards of such bases are from

if TYPE_CHECKING:
    from peft.tuners.lora.layer import Linear as Plain
else:
    Plain = object


class Fused(Switched, Plain):
    """A layer of PEFT through the fused kernels, where these compute the same."""

    plain: ClassVar[Any]  # PEFT's class
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
        raise NotImplementedError

    def gain_of(self, adapter: str, weight: Any, down: Tensor, up: Tensor) -> Tensor | None:
        """The gain of an adapter with DoRA, whose norm is of the factors as they are now."""
        magnitude = {MAGNITUDE: magnitude_of(self, adapter)._parameters["weight"]}
        made, scale = Parts(down, None, up), self.scaling[adapter]
        return dora.with_gain(made, magnitude, weight, scale).gain

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


class FusedLinear(Fused, Linear):
    """`peft.tuners.lora.layer.Linear` through the fused kernels, where these compute the same."""

    plain = Linear

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
        """The layer with DoRA.

        `low` is x after a dropout, if there is one. The gain is then of what is computed from it,
        the base's product among it, and what the base lacks of x comes to that without a gain.
        """
        x, weight, down, _, up, bias, scale, *_ = operands
        gain = self.gain_of(adapter, weight, down, up)
        given: dict[str, Any] = {"scale": scale, "impl": self.impl, "gain": gain}
        if low is None:
            return lowrank_linear(x, weight, down, None, up, bias, **given)
        return lowrank_linear(low, weight, down, None, up, **given) + dense(x - low, weight, bias)


class FusedOver(Fused):
    """PEFT's layer over a quantised base: the base's product, and the term as over any other."""

    def fused(self, x: Tensor, adapter: str) -> Tensor | None:
        """The layer with one adapter, or None for an x that is left to PEFT."""
        module, a, b, dropout = parts(self, adapter)
        base, scale = quantised(module), self.scaling[adapter]
        down, up, up_bias = a._parameters["weight"], b._parameters["weight"], b.bias
        if base is None or not takes_over(x, base, down, has_gain(self, adapter)):
            return None
        if not under_autocast(x) and is_narrower(base.computes_in(x.dtype), x.dtype):
            base = Apart(base)
        dropout_p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        operands = Operands(x, base, down, None, up, base.bias, scale)
        if has_gain(self, adapter):
            operands = operands._replace(gain=self.gain_of(adapter, base, down, up))
            if dropout_p and self.training:  # as `FusedLinear.with_gain`
                low = dropout(x)
                y = over_base(operands._replace(x=low, bias=None), self.impl)
                return y + alone(base, x - low)
        elif dropout_p:
            operands = operands._replace(dropout=Dropout(None, dropout_p))
        y = over_base(operands, self.impl)
        return y if up_bias is None else y + (up_bias * scale).to(y.dtype)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as PEFT does, into a weight that lies as it was quantised."""
        self.unpack()
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """Undo `merge`, as PEFT does."""
        self.unpack()
        super().unmerge()

    def unpack(self) -> None:
        """Take back what bitsandbytes does to a 4-bit weight in inference on a CPU.

        PEFT would read what is packed then as if it were not, and merge into numbers of no meaning.
        """
        base = quantised(self._modules["base_layer"])
        if isinstance(base, FourBit):
            base.state()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt, (self.plain,), dict(vars(self))


MADE: dict[type, Any] = {Linear: FusedLinear}  # PEFT's class → ours


def fused_of(kind: type) -> Any:
    """The fused class of one of PEFT's, or None."""
    if kind not in MADE and kind.__name__ in QUANTISED.get(kind.__module__, ()):
        own = {"plain": kind, "__module__": __name__, "__doc__": FusedOver.__doc__}
        MADE[kind] = type(f"Fused{kind.__name__}", (FusedOver, kind), own)
    return MADE.get(kind)


def rebuilt(kind: type) -> Any:
    """An empty layer of such a class, for a copy to be put into it."""
    made = fused_of(kind)
    return made.__new__(made)


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
    over = isinstance(layer, FusedOver)
    if over and quantised(base) is None:
        return f"around a {type(base).__name__}, which is not quantised in a way that is known"
    if not over and type(base).forward not in BASES:
        return f"around a {type(base).__name__}, which is no plain nn.Linear or Conv1D"
    for part in (a, b, *of_gain) if over else (base, a, b, *of_gain):
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


def quantised(module: Any) -> Base | None:
    """W of a base that is quantised, if it is computed by its library alone, or None."""
    forward = type(module).forward
    if not forward.__module__.startswith(LIBRARIES):
        return None
    base = base_of(module, forward is nn.Linear.forward)
    return base if isinstance(base, FourBit | EightBit | Subclass) else None


def is_narrower(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype does not hold all that another one does."""
    return torch.promote_types(one, other) is not one


def takes_over(x: Tensor, base: Base, down: Tensor, gained: bool) -> bool:
    """Whether the equation over a quantised base gives what PEFT's forward gives for this x.

    Under autocast bitsandbytes' 4-bit layers give x's dtype, others what their library makes of it,
    and PEFT's DoRA promotes to its magnitude's. torchao's take an x of their own dtype alone.
    """
    if not takes(x, x, down) or x.dtype is torch.float64:
        return False
    if isinstance(base, Subclass) and x.dtype is not base.dtype:
        return False
    if not under_autocast(x):
        return True
    if gained and x.dtype is not torch.float32:
        return False
    return isinstance(base, FourBit) or x.dtype is torch.get_autocast_dtype(x.device.type)
