"""The class that all adapted linear layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense

from ..compute import choose
from ..compute.dropout import Dropout, without_ranks
from ..compute.gain import trains
from ..compute.operands import Operands
from ..compute.reference import AnyCore, Core, chain
from ..context.called import Reader, note_call
from ..context.disabling import Switch
from ..context.elsewhere import HookSlot, hand_over, here
from ..context.learns import warn_of_nothing_learned, warn_of_scales
from ..functional import compute, prepared
from . import dora
from .accept import carry, clashes, give_back, is_dense, sides_of, why_not_linear
from .initial.starts import FILLS, check_learns, fill
from .initial.values import Inputs
from .keywords import check_keywords, check_settings, chosen, constructor_of, getter, picker, sized
from .merging import MergingLinear
from .method import Method, Parts
from .shared import fill_shared
from .state import delta_of
from .tensors import is_sharded, present, whole
from .variants import variant

if TYPE_CHECKING:
    from typing_extensions import Self


class LowRankLinear(MergingLinear):
    """A linear layer with a low-rank term: y = x·Wᵀ + bias + scale · ((x·downᵀ) · core) · upᵀ.

    Subclasses are methods: each has its `row`, which says which factors it has, of which shapes,
    how these start and what they make. `impl` says how the layer is computed: the reference layers
    in plain torch, the fused ones by `lowrank_linear(impl="auto")`. Weight and bias stay the
    Parameters they were.
    """

    row: Method  # of the class or, with DoRA's magnitude, the layer's own
    method: ClassVar[str]  # the row's name, and what else of it is asked for often
    factors: tuple[str, ...]
    learning_rate: ClassVar[float]  # to start from, with AdamW
    impl: str = "reference"
    output_factors: ClassVar[tuple[str, ...]]  # those on the output's side of the core
    rank_dropout: float = 0.0
    over: ClassVar[Any]  # (class) → that of its layers around what is no plain linear layer
    by_attributes: bool = False  # whether the parts are more than Parameters of theirs
    core_of: Callable[[Any], Core]  # of a layer's Parameters by name
    _hf_hook = HookSlot()

    uncalled: bool = True  # until its first call; see `called`
    reader: Reader | None = None
    asked: bool = False  # whether a call that was noted was one of training

    bias: nn.Parameter | None
    down: nn.Parameter
    up: nn.Parameter
    r: int
    inputs: Inputs | None  # what is known of x, while the factors get their first values

    if TYPE_CHECKING:  # each row's class has its own, which names its keywords

        def __init__(
            self, in_features: int, out_features: int, bias: bool = True, **keywords: Any
        ) -> None: ...

    def __init_subclass__(cls, row: Method | None = None, **keywords: Any) -> None:
        super().__init_subclass__(row, **keywords)
        if row is not None:
            cls.row, cls.method, cls.factors = row, row.name, tuple(row.factors)
            cls.learning_rate, cls.output_factors = row.learning_rate, row.outputs
            cls.__init__ = constructor_of(cls, row)  # type: ignore[method-assign]
            cls.by_attributes = row.parts is not None
            if row.parts is None:  # the way that costs the host least
                cls.core_factors = getter(row.core)  # type: ignore[assignment]
                cls.core_of = picker(row.core)
        if not {"weight", "down", "up", "bias", "parts", "factors_now"}.isdisjoint(vars(cls)):
            cls.by_attributes = True

    def build(self, in_features: int, out_features: int, bias: bool, given: Any) -> None:
        """The constructor's work; `given` has a value for every keyword."""
        super().__init__()
        row, train = variant(self.row, given), tuple(given["train"])
        if row is not self.row:
            self.row, self.factors = row, tuple(row.factors)
            self.by_attributes |= row.parts is not None
        self.in_features, self.out_features = in_features, out_features
        sizes = sized(row, in_features, out_features, given)
        self.ranks = {name: sizes[name] for name in row.ranks}
        vars(self).update(self.ranks)
        self.options = chosen(row, given)
        vars(self).update(self.options)
        self.train_names, self.dropout = train, float(given["dropout"])
        self.rank_dropout = float(given["rank_dropout"])
        check_learns(self)
        alpha, dtype, linear = given["alpha"], given["dtype"], given["_linear"]
        self.alpha = float(self.r if alpha is None else alpha)
        if given["impl"] is not None:
            self.impl = given["impl"]
        check_settings(self)
        self.scale = self.alpha / self.r
        self.disabled: bool | Switch = False  # in all contexts, or in some

        own_linear = linear is not None
        if linear is None:
            linear = nn.Linear(in_features, out_features, bias, given["device"], dtype)
            trained_dtype = linear.weight.dtype
            if not linear.weight.is_meta and not set(train).isdisjoint(self.factors):
                warn_of_scales({"": self.scale}, stacklevel=4)
        else:
            self.train(linear.training)
        self.take_base(linear)
        base = self.base_weight
        dora.check_rows(row, base)
        if own_linear:
            trained_dtype = dtype or torch.promote_types(base.dtype, torch.float32)
        given_shared = given.get("_shared") or {}
        for name in self.factors:
            if name in given_shared:
                self.register_parameter(name, given_shared[name])
                continue
            alike = row.factors[name].like or name
            kind = trained_dtype if alike in train else base.dtype
            factor = torch.empty(row.shape(name, sizes), dtype=kind, device=base.device)
            self.register_parameter(name, nn.Parameter(factor))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in train)
        self.bases_pending = given["_defer"] or base.is_meta
        self.inputs = given.get("_inputs")
        if own_linear and not self.bases_pending:
            self.keep_base()
        if not self.bases_pending:
            self.init_factors(with_shared=not given_shared)
        self.inputs = None  # they are as large as down, or K × K

    @property
    def inits(self) -> dict[str, str]:
        """The names of the factors' first values, by factor."""
        return self.row.inits(self.options.get("init"))

    @torch.no_grad()
    def init_factors(self, with_shared: bool = True) -> None:
        """Give the factors their initial values; LoRA-XS takes its bases from the weight.

        `with_shared` says whether those that other layers have as well are among them.

        Of a layer that is sharded, every rank must call this: its weight is gathered for it, and
        the first rank's values are taken.
        """
        self._require_plain_weight("initialise the factors of")
        if is_sharded(self.base_weight):
            self._init_sharded()
        else:
            self._init_factors(with_shared)
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

    def _init_factors(self, with_shared: bool) -> None:
        fill(self)
        if with_shared:
            fill_shared(self.row, self.factors_now(), self.options)
        dora.fill_magnitude(self)

    def fill_core(self, core: Any) -> None:
        """Give a core of this layer's shape and kind its initial values, in place."""
        parts = core if isinstance(core, tuple) else (core,)
        for name, part in zip(self.row.core, parts, strict=True):
            FILLS[self.inits[name]](part, self.options)

    @property
    def core_factors(self) -> Core:
        """The core as `lowrank_linear` takes it."""
        return self.parts().core

    def parts(self) -> Parts:
        """The equation's down, core, up and gain."""
        return dora.parts_of(self.row, self.factors_now(), self.base_weight, self.scale)

    @property
    def bases(self) -> tuple[Tensor, Tensor]:
        """down (P, K) and up (N, Q) as a fingerprint knows them: of factors, and cut to K and N.

        P or Q is 0 where the method has no factor of that side.
        """
        return self.row.bases_of(self.factors_now(), self.base_weight)

    def shared_parts(self) -> tuple[Tensor, Tensor]:
        """down and up of the equation, which all adapters in a bank have in common."""
        if self.row.parts is None:
            return self.down, self.up
        down, _, up, _ = self.parts()
        return down, up

    def factors_now(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {name: getattr(self, name) for name in self.factors}

    @property
    def in_bank(self) -> bool:
        """Whether a bank computes the layer."""
        return self.computed_by is not None and self.computed_by.is_bank

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
            **({"rank_dropout": self.rank_dropout} if self.rank_dropout else {}),
            "train": self.train_names,
            **{name: rank for name, rank in self.ranks.items() if name != "r"},
            **self.options,
            **({"dora": True} if self.row.dora else {}),
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
    def _around(
        cls, linear: nn.Linear, defer_bases: bool, keywords: dict[str, Any], own: Any = None
    ) -> Self:
        """`from_linear`, which leaves its warnings to the caller.

        `own` has keywords of the constructor that users do not give.
        """
        if reason := why_not_adaptable(linear, defer_bases):
            raise (ValueError if "meta device" in reason else TypeError)(f"linear {reason}")
        if not is_dense(linear):
            cls = cls.over(cls)
        if "device" in keywords:
            raise TypeError("from_linear takes no device: the layer stays where the linear is")
        check_keywords(cls, keywords)
        with here(linear):
            given = {**keywords, "_linear": linear, "_defer": defer_bases, **(own or {})}
            has_bias = getattr(linear, "bias", None) is not None
            layer = cls(*sides_of(linear), has_bias, **given)
            if reason := clashes(linear, layer):
                raise TypeError(f"linear {reason}")
            layer.carry_from(linear)
        hand_over(linear, layer)
        return layer

    def carry_from(self, linear: Any) -> None:
        """Take over what the linear layer has beside weight and bias."""
        carry(linear, self)

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
        if self.computed_by is not None:
            return self.computed_by(self, x)
        if self.disabled or self._original or self.bases_pending:
            return self.own(x)
        if self.uncalled:
            note_call(self)
        weight, down, core, up, bias, gain = self.own_tensors()
        return self.compute(x, weight, down, core, up, bias, None, gain)

    def own_tensors(self) -> tuple[Tensor, Tensor, Core, Tensor, Tensor | None, Tensor | None]:
        """(weight, down, core, up, bias, gain), by the way that costs the host least."""
        if not self.by_attributes:
            own: Any = self._parameters
            try:
                if self.row.dora:
                    made = dora.parts_of(self.row, own, own["weight"], self.scale)
                    return own["weight"], *made[:3], own["bias"], made.gain
                core = type(self).core_of(own)
                return own["weight"], own["down"], core, own["up"], own["bias"], None
            except KeyError:  # parametrised, or pruned, since
                pass
        down, core, up, gain = self.parts()
        return self.weight, down, core, up, self.bias, gain

    def own(self, x: Tensor) -> Tensor:
        """The layer with its own core, whoever else computes it."""
        if self.uncalled:
            note_call(self)
        if self.disabled:
            if self.disabled is not True:
                self.disabled.note()
            weight, bias = self.base()
            return dense(x, present(self, weight).to(x.device), bias)
        if self.merged:
            return dense(x, present(self, self.weight), self.bias)
        if self.bases_pending:
            self._require_factors()
        down, core, up, gain = self.parts()
        return self.compute(x, self.weight, down, core, up, self.bias, None, gain)

    def compute(
        self,
        x: Tensor,
        weight: Tensor,
        down: Tensor,
        core: AnyCore,
        up: Tensor,
        bias: Tensor | None,
        seed: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> Tensor:
        """y of these operands by this layer's implementation, with its scale and dropouts."""
        if self.rank_dropout and self.training:
            core, up = without_ranks(core, up, self.rank_dropout)
        dropout = Dropout(seed, self.dropout) if self.dropout and self.training else None
        if dropout is None and self.impl == "auto" and not trains(gain):
            try:  # the factors are the layer's own: only x can be wrong, and PyTorch sees that
                if choose.small(x):
                    return chain(x, weight, down, core, up, bias, self.scale, gain)
            except (AttributeError, IndexError, RuntimeError):
                pass  # the checks say it better
        operands = Operands(x, weight, down, core, up, bias, self.scale, dropout, gain=gain)
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

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = scale · up·coreᵀ·down, (out_features, in_features), in float32 or wider."""
        self._require_factors()
        dtype = torch.promote_types(self.base_weight.dtype, torch.float32)
        with here(self):
            for name in self.factors:
                present(self, getattr(self, name))
            return delta_of(self, self.factors_now(), self.base_weight, dtype)

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy of the layer, which is in no bank."""
        state = super().__getstate__()
        if self.in_bank:
            del state["computed_by"]
        return state

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        dora.forget()
        if self.computed_by is not None:
            self.computed_by.look_again(moved=True)
        return super()._apply(fn, recurse)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a Parameter; a bank that the layer is in looks at its factors again."""
        super().register_parameter(name, param)
        if self.computed_by is not None:
            self.computed_by.look_again()

    def extra_repr(self) -> str:
        """The sizes and settings, for print(model)."""
        sizes = ", ".join(f"{name}={value}" for name, value in self.settings().items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {sizes}"
        )


def why_not_adaptable(module: nn.Module, defer_bases: bool = False) -> str | None:
    """The reason why a module cannot be adapted, or None if it can."""
    if isinstance(module, LowRankLinear):
        return f"is a {type(module).__name__}: it is adapted already; unload it first"
    return why_not_linear(module, defer_bases)
