"""The places of a batch's sequences in tensors, followed through the operations of a model.

Sizes do not tell: (4, 4, K) may be four sequences of four positions, or four positions of four
sequences. So a `Follower` watches a call: it knows where the sequences are in the model's inputs,
and says of each result where they are in it. It reads shapes and strides, never values.

A sequence's number is a digit of an element's offset in its storage: (offset // stride) % n. That
is true of the storage, so views need no rules: where the sequences are in one follows from its
strides. What makes new storage has a rule here; of the result of anything else nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .following_rules import LOST, MIXED, NOBODY, Op, State, Unknown, Where, tensors_in


class Follower(TorchDispatchMode):
    """Follows n sequences; entered around a model's call."""

    supports_higher_order_operators = True

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.paused = n, False
        # Of storages, by their addresses, which the weak references keep taken: bytes to a step of
        # the digit, or why there is none. NOBODY's are not in it.
        self._steps: dict[int, tuple[StorageWeakRef, int | Unknown]] = {}
        self._counts: dict[int, StorageWeakRef] = {}  # storages that hold 0, 1, …, n - 1

    # --- what is known of a tensor ---

    def where(self, x: Tensor) -> State:
        """The place of the sequences in a tensor."""
        found = self._steps.get(address_of(x))
        if found is None:
            return NOBODY
        step = found[1]
        if isinstance(step, Unknown):
            return step
        return digit(x, step // x.itemsize, self.n) if step % x.itemsize == 0 else LOST

    def mark(self, x: Tensor, state: State) -> None:
        """Say where the sequences are in a tensor, and so in all views of its storage."""
        step: int | Unknown
        if isinstance(state, Unknown):
            step = state
        else:
            step = state.inner * x.stride(state.dim) * x.itemsize
            if step == 0 or digit(x, step // x.itemsize, self.n) != state:
                step = LOST
        address = address_of(x)
        if step is NOBODY:
            self._steps.pop(address, None)
        elif address:
            self._steps[address] = StorageWeakRef(x.untyped_storage()), step
        self._counts.pop(address, None)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A context in which nothing is followed: its user says where a result's sequences are."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    # --- operations ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload) and func.has_kernel_for_dispatch_key(
            torch._C.DispatchKey.CompositeImplicitAutograd
        ):  # in inference mode they come whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        given = tensors_in((args, kwargs))
        states = [self.where(x) for x in given]  # before the call, which may write to them
        result = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload):
            self._note(func, args, kwargs, given, states, result)
        else:
            for out in tensors_in(result):
                self.mark(out, LOST)
        return result

    def _note(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        states: list[State],
        result: Any,
    ) -> None:
        """Mark the results of an operation."""
        storages = {address_of(x) for x in given}
        op = Op(self, func, args, kwargs, dict(zip(map(id, given), states, strict=True)))
        for out in tensors_in(result):
            here = address_of(out) in storages
            if here and not func._schema.is_mutable:
                continue  # a view
            state = op.state_of(out)
            if not (
                here and state is NOBODY
            ):  # what is written is of nobody: the rest is as it was
                self.mark(out, state)
        numbers = op.name == "arange" and args in ((self.n,), (0, self.n))
        if numbers or (op.name == "_to_copy" and self.counts(args[0])):
            self._counts[address_of(result)] = StorageWeakRef(result.untyped_storage())

    def counts(self, x: Any) -> bool:
        """Whether a tensor is 0, 1, …, n - 1, whatever dimensions of one it has."""
        return isinstance(x, Tensor) and x.numel() == self.n and address_of(x) in self._counts


def address_of(x: Tensor) -> int:
    """The storage's; 0 where there is none."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def digit(x: Tensor, step: int, n: int) -> State:
    """The place of the digit (offset // step) % n in a tensor's dimensions; `step` in elements."""
    low = x.storage_offset() % step
    found = None
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size <= 1 or stride % (step * n) == 0:
            continue
        if stride * (size - 1) < step:
            low += stride * (size - 1)
            continue
        inner = 1 if stride == step else step // stride
        if found is not None or inner * stride != step or size % (inner * n):
            return MIXED
        found = Where(dim, inner)
        low += (inner - 1) * stride
    if found is None or low >= step or x.storage_offset() // step % n:
        return MIXED
    return found
