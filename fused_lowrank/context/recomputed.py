"""Notes for a checkpoint, by which its recomputation is the same as its forward.

A checkpoint calls its function once more in the backward: in nobody's context, maybe on another
thread, when a `with` around the forward may be over. So what a call has from its context is noted
for the checkpoints around it, which are found on the stack: a custom autograd.Function by its ctx,
torch's own that is not reentrant by its frame. Noting and asking are for calls that are rare.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import FunctionCtx

graph_task = torch._C._current_graph_task_id  # of the backward that runs here; -1: none
saving: Any = torch._C._autograd._top_saved_tensors_default_hooks  # the innermost hooks, or None
has_forward_mode = torch._C._is_fwd_grad_enabled
NOTES: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def may_recompute() -> bool:
    """Whether what runs here may be computed again in a backward.

    A reentrant checkpoint runs it without gradients, as inference does, but in the forward of an
    autograd.Function, in which PyTorch has forward-mode gradients off; no_grad leaves them on.
    """
    if torch.is_grad_enabled():
        return True
    return not (has_forward_mode() or torch.is_inference_mode_enabled())


class Entered(NamedTuple):
    """Where a `with` was entered: a checkpoint around it enters it again when it computes again."""

    task: int  # the backward; -1: none
    around: tuple[weakref.ref[Any], ...]  # the checkpoints

    @classmethod
    def now(cls) -> Entered:
        """Where it is now."""
        found = around() if may_recompute() and not torch.compiler.is_compiling() else ()
        return cls(graph_task(), tuple(map(weakref.ref, found)))


OUTSIDE = Entered(-1, ())


def note(key: Hashable, value: Any, entered: Entered = OUTSIDE) -> list[Any]:
    """Note something for the checkpoints around the running call, and return these."""
    outer = [checkpoint() for checkpoint in entered.around]
    found = [one for one in around() if not any(one is each for each in outer)]
    for checkpoint in found:
        NOTES.setdefault(checkpoint, {})[key] = value
    return found


def noted(key: Hashable) -> Any:
    """The value noted for the checkpoint that is computing again here, or None."""
    found = again()
    return None if found is None else NOTES.get(found, {}).get(key)


def stack() -> Iterator[tuple[str, FrameType]]:
    """The frames that run, the innermost first, with the names of their functions."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_name, frame
        frame = frame.f_back


def around() -> Iterator[Any]:
    """The checkpoints whose forward this is, up to one that is computing again."""
    hooks = saving(True)
    if hooks is not None and (own := closed_over(hooks[0])) is not None:
        yield own
    for name, frame in stack():
        if name == "forward" and (ctx := ctx_of(frame)) is not None:
            yield ctx
        elif name == "checkpoint" and (generator := frame.f_locals.get("gen")) is not None:
            if (inner := getattr(generator, "gi_frame", None)) is not None:
                own = inner.f_locals.get("new_frame")
                if own is not None:
                    yield own
        elif computes_again(name, frame) is not None:
            return


def again() -> Any:
    """The checkpoint that is computing again here, or None."""
    for name, frame in stack():
        found = computes_again(name, frame)
        if found is not None:
            return found
    return None


def computes_again(name: str, frame: FrameType) -> Any:
    """The checkpoint of which a frame is the recomputation, or None."""
    if name == "backward":
        return ctx_of(frame)
    return frame.f_locals.get("frame") if name == "unpack_hook" else None


def ctx_of(frame: FrameType) -> Any:
    """The ctx of a custom autograd.Function's forward or backward, or None."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if isinstance(first, FunctionCtx) else None


def closed_over(hook: Any) -> Any:
    """The frame of torch's checkpoint, of which this is the hook for saved tensors, or None."""
    code = getattr(hook, "__code__", None)
    if code is None or "frame" not in code.co_freevars:
        return None
    return hook.__closure__[code.co_freevars.index("frame")].cell_contents
