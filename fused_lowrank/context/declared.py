"""Declarations of the rows of a module's input by the caller, where they cannot be followed.

What is said belongs to the calling thread or asyncio task, and is asked for by layers that get
adapters by sequence. A recomputation in a backward goes by what was said within it, or else by what
its forward found.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import Token
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calls import SAID, Call, Learned, Spread, expansion
from .following_rules import Where
from .recomputed import graph_task
from .whose_rows import followed, shown


class Numbers:
    """The entry's number for each row of x or each index of x's first dimensions; a copy."""

    def __init__(self, given: Any) -> None:
        if not isinstance(given, Tensor):
            try:
                given = torch.tensor(list(given))
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"{OTHER}, not {given!r}") from None
        if given.numel() == 0:
            given = given.long()
        if given.dim() == 0 or given.dtype not in INTEGERS:
            raise TypeError(f"{OTHER}, not {given.dtype} of {tuple(given.shape)}")
        with torch.inference_mode(False):
            self.host = given.detach().to("cpu", torch.int64, copy=True)
        self.highest = int(self.host.max()) if given.numel() else -1
        if given.numel() and int(self.host.min()) < 0:
            raise ValueError(f"rows has {int(self.host.min())}: sequences are counted from 0")
        self._there: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The numbers in a row, on a device."""
        found = self._there.get(device)
        if found is None:
            with torch.inference_mode(False):
                found = self._there[device] = self.host.flatten().to(device)
        return found


INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
OTHER = (
    "rows must be a dimension of x, or integers that number the sequence of each of its rows, or a "
    "function of x that returns either"
)
Said = int | Numbers
Given = int | Tensor | Sequence[int] | Callable[[Tensor], Any]


def said_by(rows: Any) -> Said:
    """The rows of a declaration, checked: a dimension of x, or `Numbers`."""
    if isinstance(rows, Tensor | list | tuple | range):
        return Numbers(rows)
    if isinstance(rows, bool):
        raise TypeError(f"{OTHER}, not {rows!r}")
    try:
        return operator.index(rows)
    except TypeError:
        return Numbers(rows)


class Owners:
    """Row m of a layer's input is of entry numbers[m // repeat]; a `Spread` that has no order."""

    outer = 0

    def __init__(self, numbers: Numbers, repeat: int) -> None:
        self.numbers, self.repeat = numbers, repeat

    def __eq__(self, other: object) -> bool:
        alike = isinstance(other, Owners) and self.repeat == other.repeat
        return alike and torch.equal(self.numbers.host, other.numbers.host)  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]

    def laid(self, entries: Tensor, dim: int = 0) -> Tensor:
        """The values of the entries, along dimension `dim`, one for each of the numbers."""
        return entries.index_select(dim, self.numbers.on(entries.device))


# --- saying it ---


class Declaration(NamedTuple):
    """A declaration that holds in a context, and the one around it."""

    modules: set[nn.Module]
    rows: Said | Callable[[Tensor], Any]
    task: int  # of the backward within which it was said; -1: none
    outer: Declaration | None


# How many contexts have said something, and whether any has: what compiled models are guarded by.
_count, ANYWHERE = [0], [False]
_lock = threading.Lock()
REASON = "declare_rows is of the call, not of the graph: enter it around the compiled model"


class declare_rows(AbstractContextManager[None]):
    """Say which sequence each row of a module's input is of, for calls within it.

        with bank.use(["alice", "bob"]), declare_rows(model.visual, [0, 0, 0, 1, 1]):
            model(**inputs)

    Where the sequences are in a layer's input is found by following them from the model's inputs.
    Of some layers nobody can find it: experts, patches of several images, batches that a model
    makes by itself, custom kernels. These are errors until it is said. It holds for `bank.use` and
    for PEFT's `adapter_names`, in this thread or asyncio task; what was said last of a layer
    counts. A model's own code may say it too, in its forward.

    Args:
        module: whose input it is said of; it holds for every adapted layer in it.
        rows: a dimension of x in which the sequences are, as many as there are. Or for each row
            of x the number of its sequence, from 0, as the names are ordered: integers of the shape
            of x's first dimensions, (rows,) of a flattened x; they are copied to the host. Or a
            function that a layer calls with its x, (…, K), and that returns either.

    Under `torch.compile` enter it around the compiled model: within one it breaks the graph, and
    with PEFT it does so at each layer that has names. With activation checkpointing, calls of one
    `use` that have x of the same shape and other rows need `bank.checkpoint_context`. For a CUDA
    graph enter it before the calls that warm up, and capture within it.

    Raises:
        TypeError, ValueError: when it is entered, for a module or rows of another kind, or rows
            below 0. When a layer is called, naming it, for rows that do not fit its x, that number
            a sequence without a name, or that are not what following found; nothing of that call
            is computed then.
        RuntimeError: it is entered a second time.
    """

    def __init__(self, module: nn.Module, rows: Given) -> None:
        self._module, self._rows = module, rows
        self._token: Token[Declaration | None] | None = None

    def __enter__(self) -> None:
        leave_graph()
        if self._token is not None:
            raise RuntimeError("this was entered already: call declare_rows again")
        if not isinstance(self._module, nn.Module):
            raise TypeError(f"module is a {type(self._module).__name__}: it must be an nn.Module")
        rows: Any = self._rows if callable(self._rows) else said_by(self._rows)
        declaration = Declaration(set(self._module.modules()), rows, graph_task(), SAID.get())
        self._token = SAID.set(declaration)
        counted(1)

    def __exit__(self, *_: object) -> None:
        leave_graph()
        assert self._token is not None
        SAID.reset(self._token)
        counted(-1)


def leave_graph() -> None:
    """Break the graph that is compiled here; torch's decorator for that would import Triton."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=REASON)


def counted(more: int) -> None:
    """Count the contexts in which something is said."""
    with _lock:
        _count[0] += more
        ANYWHERE[0] = _count[0] > 0


@contextmanager
def said_again(head: Declaration | None) -> Any:
    """A context, in a recomputation, in which the declaration of its forward holds."""
    declarations = []
    while head is not None:
        declarations.append(head)
        head = head.outer
    for declaration in reversed(declarations):
        head = declaration._replace(task=graph_task(), outer=head)
    token = SAID.set(head)
    try:
        yield
    finally:
        SAID.reset(token)


# --- asking for it ---


def declaration_of(
    head: Declaration | None, module: nn.Module, task: int = -1
) -> Declaration | None:
    """The last declaration for a module's input in the chain that `head` begins, or None.

    With a `task` other than -1 only those count that were said within that backward.
    """
    while head is not None and (module not in head.modules or task not in (-1, head.task)):
        head = head.outer
    return head


def declaration_here(module: nn.Module) -> Declaration | None:
    """The declaration for a module in the running context, or None.

    In a recomputation only those count that were said within it.
    """
    return declaration_of(SAID.get(), module, graph_task())


def stated(module: nn.Module) -> Where | None:
    """The place of the sequences in a module's result, where a dimension of its x was said."""
    declaration = declaration_here(module)
    return Where(declaration.rows) if declaration and isinstance(declaration.rows, int) else None


def said_of(module: nn.Module, layer: str, x: Tensor) -> Said | None:
    """The rows that are declared here and now for a module's x, or None."""
    if SAID.get() is None:
        return None
    return said_in(declaration_here(module), layer, x)


def said_in(declaration: Declaration | None, layer: str, x: Tensor | None) -> Said | None:
    """The rows that a declaration says for a layer's x, or None without one."""
    if declaration is None:
        return None
    if isinstance(declaration.rows, int | Numbers):
        return declaration.rows
    assert x is not None
    try:
        return said_by(declaration.rows(x))
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"what declare_rows was given for {layer}, called with x of "
            f"{shown(x.shape[:-1])}: {error}"
        ) from error


def place_of(
    said: Said,
    layer: str,
    lead: Sequence[int],
    entries: int,
    call: Call | None,
    learned: Learned,
    x: Tensor | None,
) -> Spread | Owners:
    """The spread of a layer's x, (*lead, K), as is said; arguments as `whose_rows.spread`'s.

    Raises ValueError where it does not fit, or following has found something else.
    """
    rows = math.prod(lead)
    if entries == 1:
        return Spread(1, rows)
    found: Spread | Owners | str
    if isinstance(said, int):
        found = by_dimension(said, lead, entries, call)
    else:
        found = by_number(said, lead, entries)
    if isinstance(found, str):
        raise ValueError(
            f"declare_rows does not fit {layer}, called with x of {shown(lead)}: {found}"
        )
    as_followed = followed(layer, lead, entries, call, learned, x) if rows else None
    if as_followed is not None and not torch.equal(
        by_row(as_followed, rows, entries), by_row(found, rows, entries)
    ):
        raise ValueError(
            f"declare_rows says something else of {layer}, called with x of {shown(lead)}, than "
            "what its sequences, followed from the model's inputs, are: name the adapters in the "
            "order of these, and say nothing of this layer"
        )
    return found


def by_dimension(dim: int, lead: Sequence[int], entries: int, call: Call | None) -> Spread | str:
    """The spread of sequences in one of x's dimensions."""
    if not 0 <= dim < len(lead):
        return f"x has the dimensions 0 to {len(lead) - 1} before K, and it names {dim}"
    if call is not None and call.fits:
        n = call.n
    else:
        n = entries if lead[dim] == entries else entries * expansion()
    if lead[dim] != n:
        return (
            f"dimension {dim} of x is {lead[dim]}, and there are {n} sequences; where several "
            "indices are of one, number the sequence of each"
        )
    return Spread(math.prod(lead[:dim]), math.prod(lead[dim + 1 :]) * (n // entries))


def by_number(numbers: Numbers, lead: Sequence[int], entries: int) -> Owners | str:
    """The spread of x's rows, or of its first dimensions' indices, by the number given for each."""
    shape = tuple(numbers.host.shape)
    if shape != tuple(lead[: len(shape)]):
        return f"it has numbers of {shape}, which are not x's first dimensions"
    if numbers.highest >= entries:
        return f"it numbers sequence {numbers.highest}, and there are names for 0 to {entries - 1}"
    return Owners(numbers, math.prod(lead[len(shape) :]))


def by_row(place: Spread | Owners, rows: int, entries: int) -> Tensor:
    """The entry's number of each row: int64 (rows,) on the CPU."""
    if isinstance(place, Spread):
        return torch.arange(rows) // place.repeat % entries
    return place.numbers.host.flatten().repeat_interleave(place.repeat)
