"""Which adapters the rows of a call go to.

A `Routing` belongs to the calling context: a thread or an asyncio task. Layers ask `current` for
theirs when they run. What activation checkpointing recomputes runs later, in the backward, on
whatever thread and in nobody's context; so modules that hold routed layers remember with which
routing they were called on which storage (`remember`). A checkpoint keeps the storage, calls the
module on it again, and the routing is found by it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ContextDecorator, contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..calls import Call, Learned, Spread, begin, end, not_known, spread
from ..compute.reference import Rows


class Shelf(NamedTuple):
    """The cores of one layer, by slot."""

    table: Tensor  # (slots, P, Q), or (slots, P, r) where there is a `right`
    right: Tensor | None  # (slots, r, Q)
    scales: Tensor  # float32 (slots,)


class Store(Protocol):
    """Who has the shelves that a routing leads to: a bank, or what is trained of it."""

    shelves: dict[str, Shelf]
    generations: Tensor
    refused: Tensor


@dataclass(eq=False)
class Routing:
    """The adapters of a call: a line of handles for each sequence, or one for all of it."""

    key: int  # of the bank
    store: Store
    names: Sequence[str | None]  # of the lines, or of the one; empty: the handles are the caller's
    handles: Tensor | None = None  # int64 (lines, k)
    weights: Tensor | None = None  # float32 (lines, k)
    slot: int = -1  # where there are no handles
    bare: bool = False  # all of the call is declared to be the base model's
    empty: bool = False  # whether it is of an empty batch
    outer: Routing | None = None
    served: bool = False  # whether a layer has asked for it, or for one inside it
    known: tuple[Tensor, Tensor | None] | None = None  # the slots of handles, where they are known
    own: tuple[Tensor, ...] = ()  # what the caller may write to, of the handles and the weights
    learned: Learned = field(default_factory=Learned)  # of the bank's model
    _ones: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    spreads: dict[tuple[str, tuple[int, ...]], Spread | None] = field(default_factory=dict)
    # By layer and x's dimensions, for what is computed again in the backward; None: of two calls.

    @property
    def version(self) -> int:
        """It rises when the caller writes to the handles or the weights."""
        version = 0
        for tensor in self.own:
            if not tensor.is_inference():
                version += tensor._version
        return version

    def rows(
        self, layer: str, lead: Sequence[int], call: Call | None, x: Tensor | None = None
    ) -> Rows:
        """The cores for the rows of x, which is (*lead, K); as `calls.spread` says whose they are.

        Raises ValueError where that is not known.
        """
        assert self.handles is not None
        outer, repeat = self._spread(layer, lead, call, x)
        handles, weights, known = self.handles, self.weights, self.known
        if outer > 1:  # the lines come again and again
            handles = handles.repeat(outer, 1)
            weights = None if weights is None else weights.repeat(outer, 1)
            if known is not None:
                slots, valid = known
                known = slots.repeat(1, outer), None if valid is None else valid.repeat(1, outer)
        store = self.store
        table, right, scales = store.shelves[layer]
        return Rows(
            table,
            right,
            handles,
            weights,
            scales,
            store.generations,
            store.refused,
            repeat,
            self,
            known,
        )

    def _spread(
        self, layer: str, lead: Sequence[int], call: Call | None, x: Tensor | None
    ) -> Spread:
        assert self.handles is not None
        lines, key = self.handles.shape[0], (layer, tuple(lead))
        if self.empty:
            self.require_rows(layer, lead)
        if graph_task() >= 0:  # what is computed again, as it was
            before = self.spreads.get(key)
            if before is None:
                raise RuntimeError(LOST)
            return before
        sizes, last = None, self.learned.found.get(layer)
        if call is not None and call.follower is None and x is not None:
            sizes = lead, lines, call.n, call.axis
        if sizes is not None and last is not None and last[0] == sizes:
            found = last[1]
        else:
            new = spread(layer, lead, lines, call, self.learned, x)
            if isinstance(new, str):
                raise not_known(layer, lead, lines, "bank.use", new)
            found = new
            if sizes is not None:
                self.learned.found[layer] = sizes, found
        if self.spreads.setdefault(key, found) != found:
            self.spreads[key] = None
        return found

    def require_rows(self, layer: str, lead: Sequence[int]) -> None:
        """Raise ValueError if there are rows and no names."""
        if self.empty and 0 not in lead:
            raise not_known(layer, lead, 0, "bank.use", "no name was given")

    def one(self, layer: str) -> tuple[Tensor, Tensor | None]:
        """The core of the one adapter, times its scale: copies, whatever becomes of its slot."""
        found = self._ones.get(layer)
        if found is None:
            table, right, scales = self.store.shelves[layer]
            wide = torch.promote_types(table.dtype, torch.float32)
            with torch.inference_mode(False):  # on the device: nobody waits for the scale
                left = table[self.slot].to(wide) * scales[self.slot].to(wide)
                found = left, None if right is None else right[self.slot].clone()
            self._ones[layer] = found
        return found


ACTIVE: ContextVar[Routing | None] = ContextVar("fused_lowrank_routing", default=None)
graph_task = torch._C._current_graph_task_id  # of the backward that runs here; -1: none


def find(head: Routing | None, key: int) -> Routing | None:
    """The innermost routing of a bank among those that were entered."""
    while head is not None and head.key != key:
        head = head.outer
    return head


def current(key: int) -> Routing | None:
    """The routing of a bank for the call that is running, or None outside `bank.use`.

    Raises RuntimeError where a checkpoint recomputes a call and nothing says what its routing was.
    """
    task = graph_task()
    routing = find(ACTIVE.get(), key) if task < 0 else recalled(task, key)
    outer = routing
    while outer is not None and not outer.served:
        outer.served, outer = True, find(outer.outer, key)
    return routing


class Use(ContextDecorator, AbstractContextManager[None]):
    """Calls within it have the routing that `begin` gives; it can be entered again after its end.

    A class, for a generator costs more at each call of a model.
    """

    def __init__(self, begin: Callable[..., Routing], *given: Any) -> None:
        self._begin, self._given = begin, given
        self._entered: tuple[Routing, Token[Routing | None]] | None = None

    def _recreate_cm(self) -> Use:  # a decorated function may be called within itself
        return Use(self._begin, *self._given)

    def routing(self) -> Routing:
        """What it would route by, not entered."""
        return self._begin(*self._given)

    def __enter__(self) -> None:
        if self._entered is not None:
            raise RuntimeError("this use was entered already: make another by bank.use(names)")
        routing = self.routing()
        if routing.learned.fresh and routing.handles is not None and len(routing.handles) > 1:
            routing.learned.first_use()
        routing.outer = ACTIVE.get()
        self._entered = routing, ACTIVE.set(routing)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._entered is not None
        (routing, token), self._entered = self._entered, None  # whoever keeps this keeps no slot
        ACTIVE.reset(token)
        if routing.learned.eager:
            routing.learned.used()
        if kind is None and routing.names and not routing.served:
            raise RuntimeError(
                "no layer of this bank's model was called inside bank.use: was it another model? "
                "Or on another thread, which has no part in it? "
                "contextvars.copy_context().run(call) takes it there"
            )


# --- recomputation ---

LOST = (
    "a checkpoint recomputes a layer of a bank, and its adapters are not known any more. "
    "Checkpoint whole modules, called with the hidden states as their first tensor; or pass "
    "use_reentrant=False, context_fn=bank.checkpoint_context"
)
WRITTEN = (
    "the handles, or the weights, that bank.use was given were written to between the forward and "
    "its backward: give it a copy where gradients are wanted"
)
PURGE = 256  # memories at which those of storages that are gone are dropped


Others = tuple[tuple[weakref.ref["Routing"], int], ...]


class Memory(NamedTuple):
    """With which routing a module was called on a storage."""

    storage: StorageWeakRef
    routing: weakref.ref[Routing] | None  # None: outside `bank.use`
    kept: Routing | None  # where autograd keeps none: a reentrant checkpoint runs without gradients
    certain: bool  # it was always the same, and unwritten to, since the last one was gone
    version: int  # of the routing then
    others: Others  # routings of earlier calls, which may yet be recomputed, and their versions

    @property
    def alive(self) -> bool:
        """Whether a routed call on the storage may still be recomputed."""
        return self.routing is not None and bool(self.routing()) and not self.storage.expired()

    def of(self, head: Routing | None) -> bool:
        """Whether it was this one."""
        weak = self.routing
        return weak is None if head is None else weak is not None and weak() is head

    def then(self, head: Routing | None, version: int) -> tuple[bool, int, Others]:
        """`certain`, `version` and `others` of a call with a routing after this one."""
        certain, others = True, self.others
        if self.of(head):
            certain = self.certain and self.version == version
        elif self.routing is None or self.routing() is not None:
            certain = False
            if self.routing is not None:
                living = (other for other in others if other[0]() is not None)
                others = *living, (self.routing, self.version)
        return certain, version, others

    def beside(self) -> bool:
        """Whether one of the others lives."""
        own = self.routing, self.version
        return any(other[0]() is not None and other != own for other in self.others)

    def recall(self) -> Routing | None:
        """The routing; raises RuntimeError where it is uncertain, or gone."""
        routing = None if self.routing is None else self.routing()
        if self.beside():
            purge()  # memories that are over may have kept it
        if not self.certain or (self.routing is not None and routing is None) or self.beside():
            raise RuntimeError(LOST)
        if routing is not None and routing.version != self.version:
            raise RuntimeError(WRITTEN)
        return routing


MEMORIES: dict[int, Memory] = {}  # by the storage's address, which a weak reference keeps taken
_lock = threading.Lock()
_size = [PURGE]  # at which MEMORIES is purged next
_thread = threading.local()
# .place: (address, task, node), what was recalled last, and where in which backward
# .context: (routing,), what checkpoint_context found


def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
    """A forward pre-hook of the modules that hold routed layers: remember, or recall."""
    if torch.compiler.is_compiling() or not (module.training or torch.is_grad_enabled()):
        return
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return remember_storage(value)


class Watch:
    """Forward hooks of the modules that hold a bank's layers: the outermost is the model's call."""

    def __init__(self, key: int) -> None:
        self.key = key

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before it."""
        if torch.compiler.is_compiling():
            return
        routing = find(ACTIVE.get(), self.key)
        lines = 0 if routing is None or routing.handles is None else routing.handles.shape[0]
        if routing is not None and lines > 1 and graph_task() < 0:
            begin(self.key, lines, module, args, kwargs, routing.learned)

    def end(self, module: nn.Module, args: Any, result: Any) -> None:
        """After it, or after its error."""
        if not torch.compiler.is_compiling():
            end(self.key, module, result)


def remember_storage(x: Tensor) -> None:
    """Remember the routing of a call on x or, in a recomputation, recall it."""
    storage = x.untyped_storage()
    address, task = storage._cdata, graph_task()
    before = MEMORIES.get(address)  # of this storage: its weak reference keeps the address taken
    if task >= 0:
        if before is not None:
            _thread.place = address, *place(task)
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
    """Drop the memories of storages that are gone, and the routings that they kept."""
    with _lock:
        _purge()


def place(task: int) -> tuple[int, int]:
    """Where a backward is, without keeping its graph alive: a recomputation is within one node."""
    node = torch._C._current_autograd_node()
    return task, -1 if node is None else node._sequence_nr()


def recalled(task: int, key: int) -> Routing | None:
    """The routing of the forward that the running backward recomputes."""
    context = getattr(_thread, "context", None)
    if context is not None:
        return find(context[0], key)
    address, *there = getattr(_thread, "place", (0, -1, -1))
    memory = MEMORIES.get(address)
    if memory is not None and tuple(there) == place(task):
        return find(memory.recall(), key)
    with _lock:
        alive = any(memory.alive for memory in MEMORIES.values())
    if alive or find(ACTIVE.get(), key) is not None:
        raise RuntimeError(LOST)
    return None


def checkpoint_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For torch.utils.checkpoint's `context_fn`: the recomputation has this call's routing."""
    head = ACTIVE.get()
    version = 0 if head is None else head.version

    @contextmanager
    def recomputing() -> Iterator[None]:
        if head is not None and head.version != version:
            raise RuntimeError(WRITTEN)
        before, _thread.context = getattr(_thread, "context", None), (head,)
        try:
            yield
        finally:
            _thread.context = before

    return nullcontext(), recomputing()
