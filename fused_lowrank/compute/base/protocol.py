"""`Base` is W of a frozen linear layer where it is no plain matrix, as the equation takes it.

It stands where a weight does, in `Operands` and in layers, and has what these ask of one: sizes, a
dtype, a device. Its products are its own library's, or of its values, which are made for a pass and
gone after it: the allocator gives their memory to the next layer's. Nothing of it is ever saved for
a backward but the module, which is there anyway.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

SIZES = ("in_features", "out_features"), ("infeatures", "outfeatures")
NOT_YET = "is a {} that is not quantised yet: move it to its device first"
AT_ONCE = 1024  # rows of x by which an opaque module is asked for its values


class Base:
    """W (N, K) of a module that computes x·Wᵀ + bias, or, opaque, anything from K to N features.

    An opaque one is called as a whole and differentiated by autograd: it has no `product`.
    """

    kind = "opaque"  # by this the planner knows it
    holders: tuple[str, ...] = ("weight",)  # the attributes of the module that W is stored in
    form: str | None = None  # what W is stored as, for a file to tell it from the original's
    requires_grad = False

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        sizes = sizes_of(module)
        assert sizes is not None
        self.shape = torch.Size(reversed(sizes))  # (N, K)

    @classmethod
    def of(cls, module: Any) -> Base | str:
        """W of a module that is of this kind, or why it has none by now, to follow "it"."""
        return cls(module)

    # --- what a tensor has ---

    @property
    def device(self) -> torch.device:
        """The device of what is stored."""
        return next((own.device for own in self.stored()), torch.device("cpu"))

    @property
    def is_cpu(self) -> bool:
        """Whether what is stored is on a CPU."""
        return self.device.type == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        floats = (own.dtype for own in self.stored() if own.is_floating_point())
        return next((dtype for dtype in floats if dtype.itemsize > 1), torch.get_default_dtype())

    @property
    def is_meta(self) -> bool:
        """Whether the values are not there yet."""
        return any(own.is_meta for own in self.stored())

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        """2: it is a matrix."""
        return 2

    def stride(self) -> tuple[int, int]:
        """The strides of the values."""
        return self.shape[1], 1

    def data_ptr(self) -> int:
        """0, an address that is a multiple of all that kernels ask for, as that of the values is.

        Whoever wants to know what is stored asks for `stored`.
        """
        return 0

    def new_empty(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the values' dtype on their device."""
        return torch.empty(sizes, dtype=dtype or self.dtype, device=self.device)

    def split(self, rows: int) -> Iterator[Tensor]:
        """The values, some rows at a time."""
        yield from self.values().split(rows)

    def t(self) -> Turned:
        """Wᵀ, whose product is dy·W."""
        return Turned(self)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The values in a dtype, as `values`."""
        return self.values(dtype)

    def like(self, dtype: torch.dtype) -> Tensor:
        """A tensor like the values in a dtype, without memory."""
        return torch.empty(self.shape, dtype=dtype, device="meta")

    # --- what the equation asks ---

    @property
    def bias(self) -> Tensor | None:
        """The module's bias, which PEFT may train if it is a Parameter."""
        bias = getattr(self.module, "bias", None)
        return bias if bias is None or isinstance(bias, nn.Parameter) else bias.detach()

    def stored(self) -> list[Tensor]:
        """The tensors that the values are made of."""
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return [own for name, own in named if name != "bias"]

    def bits(self) -> list[Tensor]:
        """Those of the stored tensors whose bits are no number, whatever their dtype is."""
        return []

    def require_bits(self, move: Callable[[Tensor], Tensor]) -> None:
        """Raise TypeError if such a move, as nn.Module.to makes, would cast what is packed."""
        for dtype in {own.dtype for own in self.bits() if own.is_floating_point()}:
            if (other := move(torch.empty(0, dtype=dtype)).dtype) != dtype:
                raise TypeError(
                    f"the weight of a {type(self.module).__name__} is packed into {dtype}, and a "
                    f"cast to {other} would make other numbers of its bits: load the model in the "
                    "dtype that it is to have, or quantise it with a storage of torch.uint8"
                )

    def is_called(self) -> bool:
        """Whether only a call of the module gives its product: it is opaque, or has hooks now."""
        return True

    def is_exact(self) -> bool:
        """Whether `product` is that of the values: not where x is quantised for it."""
        return False

    def is_only_called(self) -> bool:
        """Whether no values can stand for the product."""
        return self.is_called() or not self.is_exact()

    def is_only_called_back(self) -> bool:
        """Whether no values can stand for the product on the way back."""
        return self.is_called()

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which an x of this one is computed; y is of x's again."""
        return dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias (M, N) of x (M, K), by its library, without autograd: a tensor of our own."""
        raise NotImplementedError

    def back(self, dy: Tensor) -> Tensor:
        """dy·W (M, K) of dy (M, N)."""
        return dy @ self.values(dy.dtype)

    @torch.no_grad()
    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (N, K), dequantised; of an opaque module what it makes of unit vectors.

        Raises ValueError where the module is not linear.
        """
        training, own = self.module.training, self.dtype
        self.module.eval()
        try:  # in float32, if the module takes it, beside whose bias W is rounded less
            for kind in dict.fromkeys((torch.promote_types(own, torch.float32), own)):
                try:
                    values = self._by_unit_vectors(kind)
                except Exception:
                    if kind == own:
                        raise
                    continue
                if agrees(self, values):
                    return values.to(dtype or own)
        finally:
            self.module.train(training)
        raise ValueError(
            f"is a {type(self.module).__name__}, which is not linear: it has no W that factors "
            "could be taken from, or norms"
        )

    def _by_unit_vectors(self, dtype: torch.dtype) -> Tensor:
        n, k = self.shape
        x = self.new_empty(1, k, dtype=dtype).zero_()
        zero = self.module(x)  # hooks may take away what they have brought, and the device
        values = zero.new_empty(n, k)
        for first in range(0, k, AT_ONCE):
            count = min(AT_ONCE, k - first)
            units = x.new_zeros(count, k)
            units[torch.arange(count), torch.arange(first, first + count)] = 1.0
            values[:, first : first + count] = (self.module(units) - zero).t()
        return values

    def works(self, x: Tensor) -> bool:
        """Whether a small call of this x (2, K) gives what a linear layer's would, and dx."""
        expected = 2, self.shape[0]
        if type(self).product is not Base.product:
            y = self.product(x, None)
            return y.shape == expected and self.back(y).shape == x.shape
        with torch.enable_grad():
            y = self.module(x.requires_grad_())
            if not (isinstance(y, Tensor) and y.requires_grad and y.shape == expected):
                return False
            return torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is not None

    def for_products(self, dtype: torch.dtype) -> Any:
        """A pass's own values, for plans of plain matrices."""
        return self.values(dtype)

    def before_loading(self, state: dict[str, Any], prefix: str) -> None:
        """Get the module ready for a state_dict, whose keys of it begin so and may be taken out."""

    def why_not_requantised(self) -> str | None:
        """The reason why no sum can be stored as W is, to follow "it"; None where one can."""
        return f"lies over {type(self.module).__name__}, whose weight is no plain matrix"

    def values_to_merge(self) -> Tensor:
        """W (N, K) as the base's library dequantises it, for something to be added."""
        return self.values()

    def requantised(self, values: Tensor) -> nn.Module:
        """A module like this one that stores such values (N, K) as W is stored, by its library."""
        raise NotImplementedError

    def __repr__(self) -> str:
        n, k = self.shape
        return f"{type(self).__name__}({type(self.module).__name__}, ({n}, {k}))"


class Turned:
    """Wᵀ (K, N) of a `Base`, as the way back takes it."""

    requires_grad = False

    def __init__(self, base: Base) -> None:
        self.base, self.kind = base, base.kind
        self.shape = torch.Size(reversed(base.shape))

    dtype = property(lambda self: self.base.dtype)
    device = property(lambda self: self.base.device)

    def stride(self) -> tuple[int, int]:
        """The strides of the values."""
        return 1, self.shape[0]

    def data_ptr(self) -> int:
        """As that of the base."""
        return 0

    def like(self, dtype: torch.dtype) -> Tensor:
        """As that of the base, transposed."""
        return self.base.like(dtype).t()

    def for_products(self, dtype: torch.dtype) -> Any:
        """As those of the base, transposed; where y0 was given, only that."""
        return self if isinstance(self.base, Given) else self.values(dtype)

    def is_only_called(self) -> bool:
        """Whether the base is opaque: the way back of others is by the values."""
        return self.base.is_only_called_back()

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x·W of x (M, N): the base's `back`."""
        return self.base.back(x)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """Wᵀ (K, N), a view of the values."""
        return self.base.values(dtype).t()


class Given(Base):
    """A module's y0 (M, N) where a base stands: it was called, and autograd knows its way back."""

    def __init__(self, base: Base, y0: Any, bias: Tensor | None = None) -> None:
        self.module, self.shape = base.module, base.shape
        self.y0, self.within = y0, bias  # None on the way back

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y0, less its bias unless that is asked for; a copy, for y0 may be saved by its maker."""
        y0 = self.y0.to(x.dtype)
        if bias is None and self.within is not None:
            return y0 - self.within.to(y0)
        return self.y0.clone() if y0 is self.y0 else y0

    def for_products(self, dtype: torch.dtype) -> Any:
        """The same: there are no values."""
        return self

    def back(self, dy: Tensor) -> Tensor:
        """Zeros (M, K): what goes through y0 is not for us to compute."""
        return dy.new_zeros(dy.shape[0], self.shape[1])


BASES = Base, Turned  # what stands where a weight does, forward and backward


def shell(module: nn.Module) -> Any:
    """A module of the same class with the same tensors and hooks, of which some can be others."""
    new = copy.copy(module)
    for slot in ("_parameters", "_buffers", "_modules"):
        vars(new)[slot] = dict(vars(module)[slot])
    return new


def is_plain(module: nn.Module) -> bool:
    """Whether a call of a module does no more than its class's forward."""
    own = vars(module)
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def sizes_of(module: Any) -> tuple[int, int] | None:
    """(K, N) of a module that says them, in the words of nn.Linear or of older libraries."""
    for names in SIZES:
        k, n = (getattr(module, name, None) for name in names)
        if type(k) is int and type(n) is int and k > 0 and n > 0:
            return k, n
    return None


@torch.no_grad()
def agrees(base: Base, values: Tensor) -> bool:
    """Whether a product of the module's is that of these values, but for rounding."""
    n, k = base.shape
    probe = torch.arange(1, k + 1, device=values.device).mul(1.7).sin().mul(3.0)
    x = torch.stack([probe, torch.zeros_like(probe)]).to(base.dtype)
    y, zero = base.module(x)
    expected = linear(x[:1].to(values), values)[0].float()
    error = (y - zero).float() - expected
    return bool(error.norm() <= 0.05 * expected.norm() + 1e-6 * math.sqrt(n))


def dense(weight: Any) -> Tensor:
    """A weight as a plain matrix: itself, or the values of a base."""
    return weight.values() if isinstance(weight, Base) else weight
