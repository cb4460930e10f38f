"""The assignment of a call that a checkpoint computes again.

What activation checkpointing recomputes runs later, in the backward, on whatever thread and in
nobody's context. So a layer's assignment is noted for the checkpoints around its call (`note_for`)
and asked for there again. For those that are not found on the stack, modules that hold layers of a
bank remember with which assignment they were called on which storage (`remember`): a checkpoint
keeps the storage, calls the module on it again, and the assignment is found by it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..compute.choose import transformed
from ..context.calls import SAID
from ..context.declared import said_again
from ..context.recomputed import (
    NOTES,
    around,
    closed_over,
    graph_task,
    may_recompute,
    noted,
    saving,
)
from .assignment import ACTIVE, LOST, Assignment, find

WRITTEN = (
    "the handles, or the weights, that bank.use was given were written to between the forward and "
    "its backward: give it a copy where gradients are wanted"
)
PURGE = 256  # memories at which those of storages that are gone are dropped


Others = tuple[tuple[weakref.ref[Assignment], int], ...]


class Memory(NamedTuple):
    """The assignment with which a module was called on a storage."""

    storage: StorageWeakRef
    assignment: weakref.ref[Assignment] | None  # None: outside `bank.use`
    kept: Assignment | None  # where autograd keeps none: under a reentrant checkpoint
    certain: bool  # it was always the same, and unwritten to, since the last one was gone
    version: int  # of the assignment then
    others: Others  # of earlier calls, which may yet be recomputed, and their versions

    @property
    def alive(self) -> bool:
        """Whether a call on the storage may still be recomputed."""
        weak = self.assignment
        return weak is not None and weak() is not None and not self.storage.expired()

    def of(self, head: Assignment | None) -> bool:
        """Whether this assignment is the one that is remembered."""
        weak = self.assignment
        return weak is None if head is None else weak is not None and weak() is head

    def then(self, head: Assignment | None, version: int) -> tuple[bool, int, Others]:
        """`certain`, `version` and `others` of a call with an assignment after this one."""
        certain, others = True, self.others
        if self.of(head):
            certain = self.certain and self.version == version
        elif self.assignment is None or self.assignment() is not None:
            certain = False
            if self.assignment is not None:
                living = (other for other in others if other[0]() is not None)
                others = *living, (self.assignment, self.version)
        return certain, version, others

    def beside(self) -> bool:
        """Whether one of the other assignments is still alive."""
        own = self.assignment, self.version
        return any(other[0]() is not None and other != own for other in self.others)

    def recall(self) -> Assignment | None:
        """The assignment; raises RuntimeError where it is uncertain, or gone."""
        found = None if self.assignment is None else self.assignment()
        if self.beside():
            purge()  # memories that are over may have kept it
        if not self.certain or (self.assignment is not None and found is None) or self.beside():
            raise RuntimeError(LOST)
        if found is not None and found.version != self.version:
            raise RuntimeError(WRITTEN)
        return found


MEMORIES: dict[int, Memory] = {}  # by the storage's address, which a weak reference keeps taken
_lock = threading.Lock()
_size = [PURGE]  # at which MEMORIES is purged next
_thread = threading.local()
# .place: (address, task, node), what was recalled last, and where in which backward
# .context: (assignment,), what checkpoint_context found


def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
    """A forward pre-hook of the modules that hold layers of a bank: remember, or recall."""
    if torch.compiler.is_compiling() or not (module.training or may_recompute()):
        return
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return remember_storage(value)


def remember_storage(x: Tensor) -> None:
    """Remember the assignment of a call on x or, in a recomputation, recall it."""
    try:
        storage = x.untyped_storage()
    except NotImplementedError:  # of a tensor that wraps another
        if not transformed():
            raise
        raise RuntimeError(
            "the model is in a bank, of which torch.func's transforms (vmap, grad, jvp) see no "
            "call: close() the bank, or call it on the whole batch and with autograd"
        ) from None
    address, task = storage._cdata, graph_task()
    before = MEMORIES.get(address)  # of this storage: its weak reference keeps the address taken
    if task >= 0:
        if before is not None:
            _thread.place = address, *running_node(task)
        return
    head = ACTIVE.get()
    kept = None if torch.is_grad_enabled() else head
    version = 0 if head is None else head.version
    if before is not None and before.kept is kept and before.version == version and before.of(head):
        return  # the same would be remembered again
    weak = None if head is None else weakref.ref(head)
    with _lock:
        before = MEMORIES.get(address)
        if before is None:
            memory = Memory(StorageWeakRef(storage), weak, kept, True, version, ())
        else:
            memory = Memory(before.storage, weak, kept, *before.then(head, version))
        MEMORIES[address] = memory
        if len(MEMORIES) >= _size[0]:
            _purge()


def _purge() -> None:
    for address in [key for key, memory in MEMORIES.items() if memory.storage.expired()]:
        del MEMORIES[address]
    _size[0] = max(PURGE, 2 * len(MEMORIES))


def purge() -> None:
    """Drop the memories of storages that are gone, and the assignments that they kept."""
    with _lock:
        _purge()


def running_node(task: int) -> tuple[int, int]:
    """The node that a backward is at, its graph not kept alive: a recomputation is within one."""
    node = torch._C._current_autograd_node()
    return task, -1 if node is None else node._sequence_nr()


class Around(NamedTuple):
    """The assignment of a bank around a checkpoint, as far as calls within it have shown."""

    assignment: Assignment | None
    version: int  # of it then

    def beside(self, found: Assignment | None, key: int) -> Around:
        """The same after one more call, whose assignment was `found`.

        Either assignment may be that of a `with` within the checkpoint: the result is the innermost
        that is around both.
        """
        outer, inner = self.assignment, found
        while outer is not None and inner is not outer:
            inner = found
            while inner is not None and inner is not outer:
                inner = outside(inner, key)
            if inner is None:
                outer = outside(outer, key)
        return self if outer is self.assignment else Around(outer, version_of(outer))


def outside(inner: Assignment, key: int) -> Assignment | None:
    """The assignment around that of a `with`, or None.

    Around a recomputation that is the assignment of its forward.
    """
    outer, task = find(inner.outer, key), graph_task()
    if inner.task < 0 or (outer is not None and outer.task == inner.task):
        return outer
    if inner.task != task:
        raise RuntimeError(LOST)  # of a recomputation that is over
    return recalled(task, key)


def version_of(assignment: Assignment | None) -> int:
    """The version of an assignment; 0 without one."""
    return 0 if assignment is None else assignment.version


def note_for(key: int, found: Assignment | None) -> None:
    """Note a call's assignment for the checkpoints around it, if any.

    Where gradients are wanted, the innermost is found by its hook for saved tensors, and what was
    noted for that was for all of them: only a new assignment has the stack looked at.
    """
    if torch.is_grad_enabled():
        hooks = saving(True)
        if hooks is None:
            return
        own = closed_over(hooks[0])
        before = None if own is None else NOTES.get(own, {}).get((Around, key))
        if before is not None and before.assignment is found:
            return
    elif not may_recompute():
        return
    for checkpoint in around():
        notes = NOTES.setdefault(checkpoint, {})
        before = notes.get((Around, key))
        new = Around(found, version_of(found)) if before is None else before.beside(found, key)
        notes[Around, key] = new


def recalled(task: int, key: int) -> Assignment | None:
    """The assignment of the forward that the running backward recomputes."""
    context = getattr(_thread, "context", None)
    if context is not None:
        return find(context[0], key)
    note: Around | None = noted((Around, key))
    if note is not None:
        if version_of(note.assignment) != note.version:
            raise RuntimeError(WRITTEN)
        return note.assignment
    address, *there = getattr(_thread, "place", (0, -1, -1))
    memory = MEMORIES.get(address)
    if memory is not None and tuple(there) == running_node(task):
        return find(memory.recall(), key)
    with _lock:
        alive = any(memory.alive for memory in MEMORIES.values())
    if alive or find(ACTIVE.get(), key) is not None:
        raise RuntimeError(LOST)
    return None


def current(key: int) -> Assignment | None:
    """The assignment of a bank for the call that is running, or None outside `bank.use`.

    Raises RuntimeError where a checkpoint recomputes a call and nothing says what that had.
    """
    task, found = graph_task(), find(ACTIVE.get(), key)
    if task >= 0 and (found is None or found.task != task):  # not entered by what is computed again
        found = recalled(task, key)
    outer = found
    while outer is not None and not outer.served:
        outer.served, outer = True, find(outer.outer, key)
    return found


def checkpoint_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for torch.utils.checkpoint's `context_fn`: a recomputation has this assignment."""
    head, said = ACTIVE.get(), SAID.get()
    version = 0 if head is None else head.version

    @contextmanager
    def recomputing() -> Iterator[None]:
        if head is not None and head.version != version:
            raise RuntimeError(WRITTEN)
        before, _thread.context = getattr(_thread, "context", None), (head,)
        try:
            with said_again(said):
                yield
        finally:
            _thread.context = before

    return nullcontext(), recomputing()
