"""The factors that all adapters of a bank share, compared with what they were when it was made."""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..compute.base.protocol import Base
from ..files.fingerprint import differing, fingerprint_of
from ..methods import LowRankLinear

SAMPLES = 64  # elements of a matrix by which a write that PyTorch does not count is noticed
VERSION = operator.attrgetter("_version")


class Stamp(NamedTuple):
    """The factors of a layer beside its core, and W, to know by whether they are still the same."""

    tensors: list[Tensor]  # the factors, and W, or what it is stored as
    factors: list[Tensor]
    marks: list[tuple[int, int]]  # of each tensor the address and the version

    @classmethod
    def of(cls, layer: LowRankLinear) -> Stamp:
        """The stamp of a layer as it is now."""
        factors = layer.factors_now().items()
        own = [factor for name, factor in factors if name not in layer.row.core]
        weight = layer.base_weight
        tensors = [*own, *(weight.stored() if isinstance(weight, Base) else (weight,))]
        marks = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        return cls(tensors, own, marks)

    def samples(self) -> list[Tensor]:
        """Views of some elements of each tensor, (n,), in its own memory."""
        return [some_of(tensor) for tensor in self.tensors if not tensor.is_meta]

    def same(self, other: Stamp) -> bool:
        """Whether nobody has replaced a tensor, or written to it, between the two."""
        return self.marks == other.marks and all(map(operator.is_, self.tensors, other.tensors))


def some_of(matrix: Tensor) -> Tensor:
    """Elements from the first row and column towards the last, a view (n,), n up to SAMPLES."""
    matrix = matrix if matrix.dim() == 2 else matrix.view(1, -1)
    n = min(SAMPLES, *matrix.shape)
    (rows, columns), (row, column), each = matrix.shape, matrix.stride(), max(n, 1)
    return matrix.detach().as_strided((n,), (rows // each * row + columns // each * column,))


def sampled(samples: list[Tensor]) -> Tensor:
    """A copy of them all in one."""
    wide = [
        one if one.element_size() > 1 else one.float() for one in samples
    ]  # float8 joins no others
    return torch.cat(wide).nan_to_num() if samples else torch.empty(0)


def versions(tensors: list[Tensor]) -> list[int]:
    """The versions of tensors, which tell how often each was written to."""
    return list(map(VERSION, tensors))


class SharedFactors:
    """Down, up and W of a bank's layers.

    `fingerprints` has, by layer, the result of `fingerprint.fingerprint_of` when the bank was made.
    """

    def __init__(self, layers: Mapping[str, LowRankLinear]) -> None:
        self.layers = layers
        self.fingerprints = {name: fingerprint_of(layer) for name, layer in layers.items()}
        self._stamps = {name: Stamp.of(layer) for name, layer in layers.items()}
        self._lock = threading.Lock()
        self._seen: list[int] | None = None  # versions of `_watched`; None: look again
        self._samples: list[Tensor] = []
        self._watch()

    def look_again(self, moved: bool = False) -> None:
        """Have the next check compare all tensors, of which some may be others from now on, or
        are moved to other memory: the old one is not kept.
        """
        self._seen = None
        if moved:
            self._samples = []

    def check(self, thorough: bool = True) -> None:
        """Raise RuntimeError if what the adapters share was replaced, or written to, since.

        Values are compared where tensors are others, lie elsewhere or were written to, as PyTorch
        counts it, or where some of their elements are others, for PyTorch does not count writes by
        `.data`. Without `thorough` only down and up are looked at, neither their place nor their
        elements, unless something was found before; that costs the host less.
        """
        if not thorough and versions(self._watched) == self._seen:
            return
        with self._lock:
            untouched = not self._samples or torch.equal(sampled(self._samples), self._values)
            self._seen = None
            for name, layer in self.layers.items():
                stamp = Stamp.of(layer)
                if untouched and stamp.same(self._stamps[name]):
                    continue
                down, up = layer.bases
                sides = down.shape[0], up.shape[1]
                found = differing(fingerprint_of(layer), self.fingerprints[name], *sides)
                if not thorough and found == ["weight"]:
                    continue  # somebody has pruned the base, say; who adds an adapter is told
                if found:
                    raise RuntimeError(
                        f"{name} has another {' and another '.join(found)} than the bank was made "
                        "over, to which its adapters belong: put those back; or close() the bank, "
                        "and make another with adapters of the model as it is now"
                    )
                self._stamps[name] = stamp
            self._watch()

    def _watch(self) -> None:
        tensors = [tensor for stamp in self._stamps.values() for tensor in stamp.factors]
        self._watched = [tensor for tensor in tensors if not tensor.is_inference()]
        self._samples = [one for stamp in self._stamps.values() for one in stamp.samples()]
        self._values = sampled(self._samples)
        self._seen = versions(self._watched)
