"""What all adapted linear layers share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense

from ..called import Reader, note_call, note_reading
from ..compute import choose
from ..compute.autograd import chain
from ..compute.dropout import Dropout
from ..compute.operands import Operands
from ..compute.reference import Core
from ..disabling import Switch
from ..elsewhere import FSDP1, ZERO, HookSlot, hand_over, here, hook_of, kept, replace, sharder_of
from ..functional import compute, prepared
from ..learns import warn_of_nothing_learned, warn_of_scales
from .accept import WEIGHT_DTYPES as WEIGHT_DTYPES
from .accept import carry, clashes, give_back, why_no_weight, why_not_plain
from .keywords import check_keywords, integer
from .state import MERGED, product_of, refuse_wrong, unmerged

if TYPE_CHECKING:
    from typing_extensions import Self


class LowRankLinear(nn.Module):
    """A linear layer with a low-rank term: y = x·Wᵀ + bias + scale · ((x·downᵀ) · core) · upᵀ.

    Subclasses are methods: they say which `factors` they have, of which shapes, and how these
    start. `impl` says how the layer is computed: the reference layers in plain torch, the fused
    ones by `lowrank_linear(impl="auto")`. Weight and bias stay the Parameters they were.
    """

    method: ClassVar[str]
    factors: ClassVar[tuple[str, ...]]
    learning_rate: ClassVar[float]  # to start from, with AdamW
    impl: str = "reference"
    by_attributes: ClassVar[bool] = False  # whether a subclass has made one of its own of a factor
    routed: Any = None  # a layer's `Place` in a bank, which is called for it; where there is one
    sharded: Callable[[LowRankLinear, Tensor], Tensor] | None = None  # by `parallel`, where it is
    _hf_hook = HookSlot()

    uncalled: bool = True  # until its first call; see `called`
    reader: Reader | None = None
    asked: bool = False  # whether a call that was noted was one of training

    bias: nn.Parameter | None
    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        shapes: dict[str, tuple[int, int]],
        *,
        r: int,
        alpha: float | None,
        dropout: float,
        train: tuple[str, ...],
        impl: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        linear: nn.Linear | None,
        defer: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.r, self.alpha = r, float(r if alpha is None else alpha)
        self.dropout, self.train_names = float(dropout), tuple(train)
        if impl is not None:
            self.impl = impl
        self._check_settings()
        self.scale = self.alpha / r
        self.disabled: bool | Switch = False  # in all contexts, or in some
        self._original: tuple[nn.Parameter] | None = None  # the weight as it was, while merged

        own_linear = linear is not None
        if linear is None:
            linear = nn.Linear(in_features, out_features, bias, device, dtype)
            trained_dtype = linear.weight.dtype
            if not linear.weight.is_meta and not set(train).isdisjoint(self.factors):
                warn_of_scales({"": self.scale}, stacklevel=4)
        else:
            trained_dtype = dtype or torch.promote_types(linear.weight.dtype, torch.float32)
            self.train(linear.training)
        self.weight = cast(nn.Parameter, linear.weight)
        self.register_parameter("bias", linear.bias)
        for name, size in shapes.items():
            kind = trained_dtype if name in self.train_names else self.weight.dtype
            factor = torch.empty(size, dtype=kind, device=self.weight.device)
            self.register_parameter(name, nn.Parameter(factor))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self.train_names)
        self.bases_pending = defer or self.weight.is_meta
        self._base: dict[str, Tensor] = {}  # what is trained of weight and bias, as it was
        self.base_lost = False  # whether nobody knows, for a state_dict brought it as trained
        if own_linear and not self.bases_pending:
            self.keep_base()

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if not {"weight", "down", "up", "bias"}.isdisjoint(vars(cls)):
            cls.by_attributes = True

    def _check_settings(self) -> None:
        known = ("weight", "bias", *self.factors)
        if unknown := [name for name in self.train_names if name not in known]:
            raise ValueError(f"train names {unknown}: it may name {', '.join(known)}")
        choose.check_known(self.impl)
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha is {self.alpha}: it must be finite")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: it must be at least 0 and below 1")

    @classmethod
    def _check_learns(cls, train: tuple[str, ...], zero: str) -> None:
        """Raise if factors are trained beside `zero`, which starts at 0 and is not."""
        others = [name for name in train if name in cls.factors]
        if others and zero not in others:
            raise ValueError(
                f"train is {train}, but {zero} starts at zero: as long as it is not "
                f"trained, the gradients of the other factors are zero. Add {zero!r} to train"
            )

    @torch.no_grad()
    def init_factors(self) -> None:
        """Give the factors their initial values; LoRA-XS takes its bases from the weight.

        Of a layer that is sharded, every rank must call this: its weight is gathered for it, and
        the first rank's values are taken.
        """
        self._require_plain_weight("initialise the factors of")
        if is_sharded(self.weight):
            self._init_sharded()
        else:
            self._init_factors()
        self.bases_pending = False

    def _init_sharded(self) -> None:
        from torch.distributed.tensor import distribute_tensor

        linear = nn.Linear(self.in_features, self.out_features, False, device="meta")
        linear.weight = nn.Parameter(whole(self.weight), requires_grad=False)
        layer = self._around(linear, False, self.settings())
        for name in self.factors:
            own: Any = getattr(self, name)
            value = getattr(layer, name).detach().to(own.dtype)
            own.copy_(distribute_tensor(value, own.device_mesh, own.placements))

    def _init_factors(self) -> None:
        raise NotImplementedError

    def trained_base(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of weight and bias, where they are trained."""
        for name, own in ("weight", self.base_weight), ("bias", self.bias):
            if name in self.train_names and own is not None:
                yield name, own

    def keep_base(self) -> None:
        """Copy what is trained of weight and bias: it is the base model's until it is trained."""
        self._base = {name: own.detach().clone() for name, own in self.trained_base()}

    def share_base(self, copies: dict[Tensor, Tensor]) -> None:
        """Have one copy of a parameter with whom it is tied to; `copies` are by parameter."""
        for name, own in self.trained_base():
            if name in self._base:
                self._base[name] = copies.setdefault(own, self._base[name])

    def originals(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, its value in the base model) of weight and bias, where they are trained."""
        for name, own in self.trained_base():
            if name in self._base:
                yield own, self._base[name].to(own.device, own.dtype)

    def base(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the base model: without ΔW, and as they were before training."""
        weight, bias, values = self.base_weight, self.bias, dict(self.originals())
        return values.get(weight, weight), bias if bias is None else values.get(bias, bias)

    def fill_core(self, core: Any) -> None:
        """Give a core of this layer's shape and kind its initial values, in place."""
        raise NotImplementedError

    @property
    def core_factors(self) -> Core:
        """The core as `lowrank_linear` takes it."""
        raise NotImplementedError

    @property
    def trained_factors(self) -> list[nn.Parameter]:
        """The factors that are trained."""
        return [getattr(self, name) for name in self.factors if name in self.train_names]

    def settings(self) -> dict[str, Any]:
        """The keywords that `from_linear` needs to make such a layer again."""
        return {
            "r": self.r,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "train": self.train_names,
        }

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, defer_bases: bool = False, **keywords: Any) -> Self:
        """An adapted layer around `linear`: its weight and bias are the very same Parameters.

        Keywords are the constructor's, less the sizes and device. `dtype` is that of the trained
        factors: by default float32 where the weight is float16 or bfloat16, for an optimiser's
        steps are lost in those. `defer_bases` leaves the factors uninitialised, for `init_bases` or
        a file to fill; a weight on the meta device is refused without it. Hooks and attributes of
        the linear come along.

        Raises:
            TypeError: `linear` is not a plain nn.Linear: quantised, adapted already, parametrised,
                with a forward that was replaced, or attributes that layers have for themselves.
            ValueError: its weight is on the meta device, or for LoRA-XS holds NaN or Inf; a rank,
                alpha, … out of range.

        A UserWarning says that nothing would be learned: alpha is 0, or LoRA-XS's weight is.
        """
        layer = cls._around(linear, defer_bases, keywords)
        warn_of_nothing_learned({"": layer}, stacklevel=3)
        return layer

    @classmethod
    def _around(cls, linear: nn.Linear, defer_bases: bool, keywords: dict[str, Any]) -> Self:
        """`from_linear`, which leaves its warnings to the caller."""
        if reason := why_not_adaptable(linear, defer_bases):
            raise (ValueError if "meta device" in reason else TypeError)(f"linear {reason}")
        if "device" in keywords:
            raise TypeError("from_linear takes no device: the layer stays where the linear is")
        check_keywords(cls, keywords)
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        with here(linear):
            layer = cls(*sizes, _linear=linear, _defer=defer_bases, **keywords)  # type: ignore[call-arg]
            if reason := clashes(linear, layer):
                raise TypeError(f"linear {reason}")
            carry(linear, layer)
        hand_over(linear, layer)
        return layer

    def stays(self) -> tuple[str, ...]:
        """The names of what no hook may take away between calls: what is trained."""
        return self.train_names

    def to_linear(self) -> nn.Linear:
        """The plain layer with the present weight (merged or not) and bias Parameters.

        Hooks and attributes that the layer took over are on it again; offloaded Parameters are
        brought to it as they were to this layer.
        """
        self._require_own_weight("unload")
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        give_back(self, linear)
        hand_over(self, linear)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        if self.routed is not None:
            return self.routed(self, x)
        if self.disabled or self._original or self.bases_pending or self.sharded is not None:
            return self.own(x)
        if self.uncalled:
            note_call(self)
        weight, down, up, bias = self.own_tensors()
        return self.compute(x, weight, down, self.core_factors, up, bias)

    @property
    def weight(self) -> nn.Parameter:
        """W, (out_features, in_features); who computes with it, instead of calling the layer, is
        remembered.
        """
        own: Any = vars(self)
        weight = own["weight"] if "weight" in own else own["_parameters"].get("weight")
        if weight is None:
            raise AttributeError("weight")
        note_reading(self)
        return cast(nn.Parameter, weight)

    @weight.setter
    def weight(self, value: Any) -> None:
        """A tensor that is no Parameter, as pruning and functional calls put it there."""
        vars(self)["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        """Such a tensor, as FSDP1 and the end of pruning take it away."""
        vars(self).pop("weight", None)

    def own_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(weight, down, up, bias), by the way that costs the host least."""
        if not self.by_attributes:
            own: Any = self._parameters
            try:
                return own["weight"], own["down"], own["up"], own["bias"]
            except KeyError:  # parametrised, or pruned, since
                pass
        return self.weight, self.down, self.up, self.bias

    def own(self, x: Tensor) -> Tensor:
        """The layer with its own core, whatever a bank has for it."""
        if self.uncalled:
            note_call(self)
        if self.disabled:
            weight, bias = self.base()
            return dense(x, present(self, weight).to(x.device), bias)
        if self.merged:
            return dense(x, present(self, self.weight), self.bias)
        if self.bases_pending:
            self._require_factors()
        if self.sharded is not None:
            return self.sharded(self, x)
        return self.compute(x, self.weight, self.down, self.core_factors, self.up, self.bias)

    def compute(
        self,
        x: Tensor,
        weight: Tensor,
        down: Tensor,
        core: Core,
        up: Tensor,
        bias: Tensor | None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """y of these operands by this layer's implementation, with its scale and dropout."""
        dropout = Dropout(seed, self.dropout) if self.dropout and self.training else None
        operands = Operands(x, weight, down, core, up, bias, self.scale, dropout)
        if dropout is None and self.impl == "auto":
            try:  # the factors are the layer's own: only x can be wrong, and PyTorch sees that
                if choose.small(x):
                    return chain(operands)
            except (AttributeError, IndexError, RuntimeError):
                pass  # the checks say it better
        try:
            return compute(prepared(operands), self.impl)
        except ValueError:
            for own in self.parameters():
                present(self, own)
            raise

    def _require_factors(self) -> None:
        if self.bases_pending:
            raise RuntimeError(
                "the factors of this layer are not initialised: it was made on the meta device. "
                "Load its weights, then call init_bases(model), or load an adapter"
            )

    def _require_own_weight(self, what: str) -> None:
        """Raise where FSDP or ZeRO-3 has the weight: they put back the one they know."""
        weight: Any = self.weight
        if is_sharded(weight) and (self.sharded is None or weight.device_mesh.ndim > 1):
            raise fsdp_error(what)
        if sharder := sharder_of(weight):
            raise fsdp_error(what, sharder)

    def _require_plain_weight(self, what: str) -> None:
        if reason := why_no_weight(self.weight):
            raise TypeError(f"cannot {what} a layer with {reason}")

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = scale · up·coreᵀ·down, (out_features, in_features), in float32 or wider."""
        self._require_factors()
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with here(self):
            present(self, self.up)
            return self.scale * product_of([getattr(self, name) for name in self.factors], dtype)

    @property
    def base_weight(self) -> nn.Parameter:
        """The weight without ΔW, merged or not."""
        return self.weight if self._original is None else self._original[0]

    @property
    def merged(self) -> bool:
        """Whether `weight` is W + ΔW now; no longer where somebody has put W back, to tie it."""
        return self._original is not None and self._original[0] is not self.weight

    @torch.no_grad()
    def merge(self) -> float:
        """Make `weight` W + ΔW, in new storage; return the part of ΔW lost to rounding.

        That is ‖lost‖/‖ΔW‖, 0.0 for float32 and wider; a UserWarning says it where it is not 0.
        The weight as it was is kept for `unmerge`, untouched, whoever shares it. Does nothing to a
        layer that is merged. Raises ValueError, the layer as it was, if ΔW holds NaN or Inf, or the
        sum is more than the weight's dtype can hold.
        """
        if self.merged:
            return 0.0
        self._require_own_weight("merge")
        self._require_plain_weight("merge into")
        with here(self):
            delta, lost = self.delta_weight(), 0.0
            weight = (self.weight + delta).to(self.weight.dtype)
            if reason := why_not_finite(delta, self.weight, weight):
                raise ValueError(f"cannot merge: {reason}")
            if self.weight.itemsize < 4:
                lost = lost_to_rounding(delta, self.weight, weight)
                if lost:
                    warnings.warn(
                        f"merging into {self.weight.dtype} lost {lost:.2%} of ΔW to rounding",
                        stacklevel=2,
                    )
            self._original = (kept(self, "weight"),)
            replace(self, "weight", nn.Parameter(weight, requires_grad=self.weight.requires_grad))
        return lost

    def unmerge(self) -> None:
        """Put back the weight as it was before `merge`, the same Parameter."""
        if self._original is not None:
            (original,), self._original = self._original, None
            replace(self, "weight", original)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the layer is in no bank."""
        return {name: value for name, value in super().__getstate__().items() if name != "routed"}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        if self.merged:  # .to(), .cuda(), … move what is kept too
            kept = self.base_weight
            kept.data = fn(kept.data)
        for name, value in self._base.items():
            new = fn(value)
            if torch._has_compatible_shallow_copy_type(value, new):
                value.data = new  # for whomever it is shared with, too
            else:
                self._base[name] = new
        if self.routed is not None:
            self.routed.look_again()
        return super()._apply(fn, recurse)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As PyTorch's; a bank that the layer is in looks at its factors again."""
        super().register_parameter(name, param)
        if self.routed is not None:
            self.routed.look_again()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + MERGED] = torch.ones(1, dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        refuse_wrong(self, state_dict, prefix)
        if prefix + MERGED in state_dict:
            state_dict = unmerged(self, state_dict, prefix, rest[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        values = [(state_dict.get(prefix + name), getattr(self, name)) for name in self.factors]
        if not self.down.is_meta and all(is_other(value, own) for value, own in values):
            self.base_lost |= self.bases_pending and any(True for _ in self.trained_base())
            self.bases_pending = False

    def extra_repr(self) -> str:
        """The sizes and settings, for print(model)."""
        sizes = ", ".join(f"{name}={value}" for name, value in self.settings().items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {sizes}"
        )


def lost_to_rounding(delta: Tensor, before: Tensor, after: Tensor) -> float:
    """‖lost‖/‖ΔW‖ of a sum `after` = `before` + ΔW that was rounded; 0 where ΔW is.

    Where `before` is not finite nothing is lost.
    """
    if not (norm := float(delta.norm())):
        return 0.0
    lost = delta - (after.to(delta.dtype) - before)
    size = float(lost.norm())
    return (size if math.isfinite(size) else float(lost.nan_to_num(0.0, 0.0, 0.0).norm())) / norm


def why_not_finite(delta: Tensor, before: Tensor, after: Tensor) -> str | None:
    """Why a sum `after` = `before` + ΔW holds NaN or Inf where `before` does not, or None."""
    if is_finite(after):
        return None
    if not is_finite(delta):
        return "the adapter holds NaN or Inf"
    if is_finite(after.where(before.isfinite(), 0.0)):
        return None
    return f"W + ΔW is more than {after.dtype} can hold; float32 weights would hold it"


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; of a DTensor every rank must ask."""
    return float(whole((tensor.detach() * 0).sum())) == 0.0


def is_other(value: Any, own: Any) -> bool:
    """Whether a value to be loaded is there, and not the parameter itself: what
    torch.distributed.checkpoint loads into a model has the model's own tensors for what it lacks.
    """
    value, own = (getattr(tensor, "_local_tensor", tensor) for tensor in (value, own))
    return value is not None and (not own.numel() or value.data_ptr() != own.data_ptr())


def fsdp_error(what: str, sharder: str = "fully_shard") -> RuntimeError:
    """The error of what FSDP or ZeRO-3 would silently undo."""
    return RuntimeError(
        f"cannot {what} under {sharder}, which puts back the parameters it knows: "
        f"save the adapter, load it into the plain model, and {what} there"
    )


def present(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor that is about to be computed with; RuntimeError, which says of which layer it is,
    where it is on the meta device: beside others PyTorch would take memory that nobody has written.
    """
    if tensor.is_meta:
        raise RuntimeError(
            f"weights of the layer {layer!r} are on the meta device: load them; or, if they are "
            "offloaded, call the whole model, whose hooks bring them"
        )
    return tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; PyTorch's distributed part is not imported to ask."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The tensor; all of it where it is a DTensor, and then every rank must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


ADAPT_FIRST = {
    FSDP1: "adapt before FullyShardedDataParallel",
    ZERO: (
        "adapt within deepspeed.zero.GatheredParameters(list(model.parameters())), or load the "
        "model without zero.Init and adapt before deepspeed.initialize"
    ),
}


def why_not_adaptable(module: nn.Module, defer_bases: bool = False) -> str | None:
    """Why a module cannot be adapted, or None if it can."""
    kind = type(module).__name__
    if isinstance(module, LowRankLinear):
        return f"is a {kind}: it is adapted already; unload it first"
    if kind == "Conv1D":
        return (
            "is a Conv1D: only nn.Linear can be adapted; transformers' Conv1D can by PEFT, with "
            "the configurations of fused_lowrank.integrations.peft"
        )
    if not isinstance(module, nn.Linear):
        return f"is a {kind}: only nn.Linear can be adapted"
    if reason := why_not_plain(module):
        return reason
    if is_sharded(module.weight):
        return "has its weight sharded: adapt before fully_shard or parallelize_module"
    if sharder := sharder_of(module.weight):
        return f"has its weight sharded by {sharder}: {ADAPT_FIRST[sharder]}"
    if module.weight.is_meta and not defer_bases and hook_of(module) is None:
        return (
            "has its weight on the meta device: load the weights first, or pass "
            "defer_bases=True and call init_bases(model) once they are loaded"
        )
    return None


def check_rank(name: str, value: Any, limit: int, of: str) -> int:
    """The value as an int; ValueError unless it is an integer and 1 ≤ value ≤ limit."""
    value = integer(name, value)
    if not 1 <= value <= limit:
        raise ValueError(f"{name} is {value}: it must be at least 1 and at most {limit}, {of}")
    return value
