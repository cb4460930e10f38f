"""The model's call: how many sequences it has, and what is remembered of the calls before it.

Sequences are counted where they are known, in the inputs of the outermost module that is called
with adapters by sequence. Where they are in what a layer of it gets is followed (`following`) in
the first call of each kind and remembered by layer, so that later calls need look at sizes alone
(`whose_rows`). A kind is of the arguments that may choose what is done, and of the modules'
attributes that may (`flags`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .flags import Flags
from .following import Follower
from .following_rules import MIXED, State, Where

# Parts of the names of inputs.
MAIN = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
ASIDE = (
    "position",
    "mask",
    "past",
    "grid",
    "index",
)  # in names of inputs that need not be followed
MEDIA = (
    "pixel",
    "image",
    "video",
    "audio",
    "feature",
    "patch",
)  # beside text: as many as there are
CHOICES = 8  # integers up to this may choose what a model does; larger ones are amounts
KINDS = 256  # of calls that are remembered for one model


class Spread(NamedTuple):
    """Row m of a layer's input is of entry (m // repeat) % entries.

    The entries are what a call with adapters by sequence names: an adapter, or a mixture of some,
    for each sequence.
    """

    outer: int  # how often all the entries come one after the other
    repeat: int

    def laid(self, entries: Tensor, dim: int = 0) -> Tensor:
        """The values of the entries, along dimension `dim`, once for each time that they come."""
        return torch.cat([entries] * self.outer, dim)


class Layout(NamedTuple):
    """The dimension before K that has the sequences."""

    dim: int
    inner: bool = False  # whether something lies within them in that dimension,
    outer: bool = False  # or around them


VARIES = Layout(-1)
# Of one layer, by the call's axis and x's dimensions; or why there is none.
Layouts = dict[tuple[int, int], Layout | str]


@dataclass
class Learned:
    """Facts that are remembered of a model, for all of its layers."""

    kinds: set[Any] = field(default_factory=set)  # of calls that have been followed
    layouts: dict[str, Layouts] = field(default_factory=dict)  # by layer
    seen: set[Any] = field(default_factory=set)  # calls of one tensor that were of these kinds
    found: dict[str, tuple[Any, Spread]] = field(default_factory=dict)  # by layer, of the last call
    flags: dict[int, Flags] = field(default_factory=dict)  # of modules that were called, by id
    varies: bool = False  # whether a layer is called in several ways: then every call is followed
    fresh: bool = True  # whether no call has begun yet
    eager: bool = False  # whether compiled models run as they were written meanwhile

    def first_use(self) -> None:
        """Have compiled models run as written from now on: their calls could not be followed."""
        self.fresh, self.eager = False, True
        eagerly(1)

    def used(self) -> None:
        """End the first use: compiled models run compiled again."""
        if self.eager:
            self.eager = False
            eagerly(-1)


@dataclass(eq=False, slots=True)
class Call:
    """A call of a model, or of a part of it, with an entry (see `Spread`) for each sequence."""

    key: Any  # of whose adapters
    module: nn.Module
    entries: int  # how many there are
    n: int  # sequences: as many as the entries, or as many times that as `generate` makes of each
    axis: int  # of the inputs, along which they are; 1 where each row of packed input is named
    given: str  # the input that said so
    learned: Learned
    kind: Any = None
    media: tuple[str, ...] = ()  # inputs of images, sounds, … beside text
    paired: bool = True  # whether there is one of them for each sequence
    follower: Follower | None = None
    outer: Call | None = None
    token: Token[Call | None] | None = None
    depth: int = 1

    @property
    def fits(self) -> bool:
        """Whether the sequences are as many as the adapters."""
        return self.n > 0


CALL: ContextVar[Call | None] = ContextVar("fused_lowrank_call", default=None)
# What `declared` is told; a call with such is of another kind than one without.
SAID: ContextVar[Any] = ContextVar("fused_lowrank_said", default=None)


def call_of(key: Any) -> Call | None:
    """The call that is running with the adapters of this bank or model."""
    call = CALL.get()
    while call is not None and call.key != key:
        call = call.outer
    return call


def begin(
    key: Any, entries: int, module: nn.Module, args: Any, kwargs: Any, learned: Learned
) -> None:
    """Note that a module is called; `end` must follow. Within another call it is a part of that."""
    call = call_of(key)
    if call is not None:
        call.depth += call.module is module
        return
    flags = flags_of(module, learned)
    first: Any = args[0] if args and not kwargs else None
    if type(first) is Tensor and len(args) == 1:  # as one before it, mostly
        seen: Any = id(module), flags, entries, first.shape, SAID.get() is None
        if seen in learned.seen and not learned.varies:
            call = Call(key, module, entries, entries, 0, "", learned, outer=CALL.get())
            call.token = CALL.set(call)
            return
    n, axis, main, given = counted(entries, args, kwargs)
    call = Call(key, module, entries, n, axis, given, learned, outer=CALL.get())
    if call.fits and main is not None:
        call.media = beside_text(main, kwargs)
        call.paired = not call.media or paired(module, main)
        call.kind = flags, *kind_of(call, main, args, kwargs)
        if learned.varies or not call.paired or call.kind not in learned.kinds:
            call.follower = Follower(n)
            for x, state in inputs_of(call, main, args, kwargs):
                call.follower.mark(x, state)
            eagerly(1)
            call.follower.__enter__()
        elif (
            main is first and (n, axis, len(args)) == (entries, 0, 1) and len(learned.seen) < KINDS
        ):
            learned.seen.add((id(module), flags, entries, first.shape, SAID.get() is None))
    call.token = CALL.set(call)


def end(key: Any, module: nn.Module, result: Any) -> None:
    """Note that a module's call is over; without a result it has failed."""
    call = call_of(key)
    if call is None or call.module is not module:
        return
    call.depth -= 1
    if call.depth == 0 and call.token is not None:
        CALL.reset(call.token)
        if call.follower is not None:
            call.follower.__exit__(None, None, None)
            eagerly(-1)
            if result is not None and len(call.learned.kinds) < KINDS:
                call.learned.kinds.add(call.kind)


_stance: list[Any] = [0, None]  # how many calls are followed, and torch's way of running then
_lock = threading.Lock()


def eagerly(more: int) -> None:
    """Count the calls that are followed: while there are any, compiled parts run as written."""
    with _lock:
        before, _stance[0] = _stance[0], _stance[0] + more
        if before == 0:
            compiling = "torch._dynamo" in sys.modules
            _stance[1] = torch.compiler.set_stance("force_eager") if compiling else None
        elif _stance[0] == 0 and _stance[1] is not None:
            _stance[1].__exit__(None, None, None)


# --- the inputs ---


def counted(entries: int, args: Any, kwargs: Any) -> tuple[int, int, Tensor | None, str]:
    """(sequences, or 0 if they do not fit the entries; axis; the input that says so; its name)."""
    name, main = main_input(args, kwargs)
    if main is None:
        return entries, 0, None, ""
    given = f"{name} is {tuple(main.shape)}" if name else f"its input is {tuple(main.shape)}"
    count = main.shape[0]
    if count == entries or (count % entries == 0 and count == entries * expansion()):
        return count, 0, main, given
    if count == 1 and main.dim() > 1 and main.shape[1] == entries:
        return entries, 1, main, given
    return 0, 0, main, given


def main_input(args: Any, kwargs: Any) -> tuple[str, Tensor | None]:
    """The input whose first dimension is the batch, and its name."""
    for name in MAIN:
        value = kwargs.get(name)
        if isinstance(value, Tensor):
            return name, value
    named = [("", value) for value in args]
    named += [item for item in kwargs.items() if not any(part in item[0] for part in ASIDE)]
    for rank in (2, 1):
        for name, value in named:
            if isinstance(value, Tensor) and value.dim() >= rank:
                return name, value
    for name, value in named:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.dim():
                return name, leaf
    return "", None


def inputs_of(call: Call, main: Tensor, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, State]]:
    """The inputs with their states: those with a row for each sequence, and others."""
    yield main, Where(call.axis)
    lead = main.shape[: call.axis + 1]
    for name, value in [("", value) for value in args] + list(kwargs.items()):
        if any(part in name for part in ASIDE):
            continue
        for leaf in tree_leaves(value):
            if not isinstance(leaf, Tensor) or leaf is main:
                continue
            alike = leaf.shape[: call.axis + 1] == lead
            if name in call.media and not (alike and call.paired):
                yield leaf, MIXED
            elif alike and (leaf.is_floating_point() or "ids" in name):
                yield leaf, Where(call.axis)


def beside_text(main: Tensor, kwargs: Any) -> tuple[str, ...]:
    """The names of inputs that are images, sounds, …, where the first one is text."""
    if main.is_floating_point():
        return ()
    return tuple(
        name
        for name, value in kwargs.items()
        if value is not None
        and any(part in name for part in MEDIA)
        and not any(part in name for part in ASIDE)
    )


def paired(module: nn.Module, text: Tensor) -> bool:
    """Whether each sequence of text has as many places for images, sounds, … as the others.

    A model whose configuration names no such places, as CLIP's, takes one of each.
    """
    config = getattr(module, "config", None)
    for kind in ("image", "video", "audio"):
        token = getattr(config, f"{kind}_token_id", getattr(config, f"{kind}_token_index", None))
        if isinstance(token, int):
            counts = (text == token).flatten(1).sum(1) if text.dim() > 1 else text[:1]
            if bool((counts != counts[0]).any()):
                return False
    return True


def kind_of(call: Call, main: Tensor, args: Any, kwargs: Any) -> Any:
    """The key that calls have in common that run the same code, as far as can be seen.

    Where positions are as many as sequences, sizes could not show that a layer is called in another
    way than the one that is remembered; so such calls are of a kind of their own.
    """
    rest = main.shape[call.axis + 1 :]
    like = tuple(main.shape) if call.n in rest else (main.dim(), 1 in rest)
    given = tuple([(name, choice(v)) for name, v in kwargs.items() if v is not None])
    places = tuple([choice(value) for value in args])
    own = id(call.module), SAID.get() is None
    return own, call.axis, places, given, like


def flags_of(module: nn.Module, learned: Learned) -> tuple[Any, ...]:
    """The choices by the attributes of a called module; also whether it is in training."""
    flags = learned.flags.get(id(module))
    if flags is None or flags.module() is not module:
        flags = learned.flags[id(module)] = Flags(module)
    return module.training, *flags.values(choice)


def choice(value: Any) -> Any:
    """An argument or attribute that may choose what a model does; of an amount, nothing."""
    if isinstance(value, bool | str | Enum):
        return value
    return value if isinstance(value, int) and abs(value) <= CHOICES else None


def expansion() -> int:
    """The copies that `generate`, where it is the caller, makes of each sequence: beams, samples.

    It repeats each one so often in its place.
    """
    generation: Any = sys.modules.get("transformers.generation.utils")
    frame = sys._getframe(1) if generation is not None else None
    while frame is not None:
        if frame.f_code.co_name == "generate":
            own = frame.f_locals
            config = own.get("generation_config")
            if config is not None and isinstance(own.get("self"), generation.GenerationMixin):
                return max(config.num_beams or 1, config.num_return_sequences or 1)
        frame = frame.f_back
    return 1
