"""Rules that give the place of the sequences in an operation's results.

One rule for each kind of operation that makes new storage; `Follower` has the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Where(NamedTuple):
    """Index i along `dim` is of the sequence (i // inner) % n."""

    dim: int
    inner: int = 1


class Unknown(NamedTuple):
    """A tensor's state where the sequences have no known place in it, with the reason."""

    why: str


NOBODY = Unknown("is the same for every sequence")
LOST = Unknown("comes from an operation that could not be followed")
MIXED = Unknown("has rows that are of no one sequence, or in an order that values decide")

State = Where | Unknown


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of nested containers."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Op:
    """An operation, for its rule."""

    def __init__(
        self, follower: Any, func: Any, args: Any, kwargs: Any, states: dict[int, State]
    ) -> None:
        self.follower, self.n = follower, follower.n
        self.schema, self.tags = func._schema, func.tags
        self.name = self.schema.name.split("::")[1].removesuffix("_")
        self.args, self.kwargs, self.states = args, kwargs, states

    def state(self, x: Any) -> State:
        """The place of the sequences in an argument."""
        return self.states.get(id(x), NOBODY)

    def state_of(self, out: Tensor) -> State:
        """The place of the sequences in one of the results."""
        states = set(self.states.values())
        if self.name.endswith("_like") or self.name.startswith(("new_", "empty")):
            return LOST if "empty" in self.name else NOBODY
        if states <= {NOBODY}:
            return NOBODY
        rule = RULES.get(self.name)
        if rule is None:
            if torch.Tag.pointwise in self.tags:
                rule = pointwise
            else:
                rule = next((r for part, r in BY_PART if part in self.name), None)
        if rule is None:
            return LOST
        state = rule(self, out)
        if isinstance(state, Where):
            fits = state.dim < out.dim() and out.shape[state.dim] % (state.inner * self.n) == 0
            return state if fits else LOST
        return state

    def argument(self, name: str, position: int, default: Any = None) -> Any:
        return self.kwargs.get(name, self.args[position] if len(self.args) > position else default)

    def dims(self, x: Tensor) -> set[int]:
        """The argument `dim` or `dims`, as a set of numbers from 0; of all, where it names none."""
        given: Any = None
        for position, argument in enumerate(self.schema.arguments):
            if argument.name in ("dim", "dims"):
                given = self.argument(argument.name, position, argument.default_value)
        if given is None or given == []:
            return set(range(x.dim()))
        return {d % max(x.dim(), 1) for d in ([given] if isinstance(given, int) else given)}


def joined(states: list[State]) -> State:
    """The place in a result that is computed element by element, from those that are known."""
    places = {state for state in states if isinstance(state, Where)}
    if len(places) == 1:
        return places.pop()
    if places or MIXED in states:
        return MIXED
    return LOST if LOST in states else NOBODY


def aligned(x: Any, state: State, out: Tensor) -> State:
    """A place in x as one in the tensor that x is broadcast to."""
    if not isinstance(state, Where):
        return state
    dim = state.dim + out.dim() - x.dim()
    return Where(dim, state.inner) if x.shape[state.dim] == out.shape[dim] else MIXED


def pointwise(op: Op, out: Tensor) -> State:
    given = tensors_in((op.args, {k: v for k, v in op.kwargs.items() if k != "out"}))
    return joined([aligned(x, op.state(x), out) for x in given])


def along(op: Op, out: Tensor) -> State:
    """The place after an operation along dimensions that are not the sequences'."""
    x = op.args[0]
    state = op.state(x)
    if not isinstance(state, Where):
        return state if state is not NOBODY else LOST
    same = x.dim() == out.dim() and x.shape[state.dim] == out.shape[state.dim]
    return state if same and state.dim not in op.dims(x) else MIXED


def first(op: Op, out: Tensor) -> State:
    """The place in the first argument, whose first dimensions stay as they are."""
    x = op.args[0]
    state = op.state(x)
    if not isinstance(state, Where):
        return state if state is not NOBODY else LOST
    same = x.shape[: state.dim + 1] == out.shape[: state.dim + 1]
    return state if same else MIXED


def reduced(op: Op, out: Tensor) -> State:
    x = op.args[0]
    state = op.state(x)
    if not isinstance(state, Where):
        return state
    dims = op.dims(x)
    if state.dim in dims:
        return MIXED
    before = 0 if out.dim() == x.dim() else sum(d < state.dim for d in dims)
    return Where(state.dim - before, state.inner)


def normed(op: Op, out: Tensor) -> State:
    x, state = op.args[0], op.state(op.args[0])
    if isinstance(state, Where) and state.dim >= x.dim() - len(op.args[1]):
        return MIXED
    return first(op, out)


def product(op: Op, out: Tensor) -> State:
    """mm, bmm and what adds to them: a's last dimension and b's last but one are gone."""
    added = op.name in ("addmm", "baddbmm", "addmv")
    a, b = op.args[1:3] if added else op.args[:2]
    own = [op.state(a), op.state(b)]
    if isinstance(own[0], Where) and own[0].dim == a.dim() - 1:
        own[0] = MIXED
    if isinstance(own[1], Where) and own[1].dim == max(b.dim() - 2, 0):
        own[1] = MIXED
    if MIXED in own:
        return MIXED
    if added:
        own.append(aligned(op.args[0], op.state(op.args[0]), out))
    return joined(own)


def attention(op: Op, out: Tensor) -> State:
    """The place in the result of queries, keys and values, (…, positions, size)."""
    own = [op.state(x) for x in op.args[:3] if isinstance(x, Tensor)]
    state = joined(own)
    if isinstance(state, Where) and state.dim >= out.dim() - 2 and out.dim() == op.args[0].dim():
        return MIXED
    return state


def first_dimension(op: Op, out: Tensor) -> State:
    """Convolutions, pools: the sequences stay in the first dimension."""
    state = op.state(op.args[0])
    if not isinstance(state, Where) or any(op.state(x) != NOBODY for x in tensors_in(op.args[1:])):
        return LOST if state is NOBODY else state if not isinstance(state, Where) else LOST
    return state if state.dim == 0 and op.args[0].shape[0] == out.shape[0] else MIXED


def embedding(op: Op, out: Tensor) -> State:
    return op.state(op.args[1]) if op.state(op.args[0]) is NOBODY else MIXED


def concatenated(op: Op, out: Tensor) -> State:
    parts = list(op.args[0])
    states = [op.state(x) for x in parts]
    state = joined(states)
    if isinstance(state, Where) and op.argument("dim", 1, 0) % out.dim() == state.dim:
        return state if all(s == state for s in states) else MIXED  # tiled
    return state


def stacked(op: Op, out: Tensor) -> State:
    state = joined([op.state(x) for x in op.args[0]])
    if not isinstance(state, Where):
        return state
    return Where(state.dim + (op.argument("dim", 1, 0) % out.dim() <= state.dim), state.inner)


def repeated(op: Op, out: Tensor) -> State:
    x, state = op.args[0], op.state(op.args[0])
    return (
        Where(state.dim + out.dim() - x.dim(), state.inner) if isinstance(state, Where) else state
    )


def interleaved(op: Op, out: Tensor) -> State:
    x, state = op.args[0], op.state(op.args[0])
    dim = op.argument("dim", 2)
    if not isinstance(state, Where) or not isinstance(op.args[1], int) or dim is None:
        return state if not isinstance(state, Where) else MIXED
    return Where(state.dim, state.inner * (op.args[1] if dim % x.dim() == state.dim else 1))


def indexed(op: Op, out: Tensor) -> State:
    """x[indices]: the sequences are kept where they are not indexed, or by their own numbers."""
    x, indices = op.args[0], list(op.args[1])
    state = op.state(x)
    by = [i for i, index in enumerate(indices) if index is not None]
    block = max((indices[i].dim() for i in by), default=0)
    start = by[0] if by and by == list(range(by[0], by[-1] + 1)) else 0
    inside = [op.state(indices[i]) for i in by]
    if any(indices[i].dtype in (torch.bool, torch.uint8) for i in by):
        return MIXED
    if not isinstance(state, Where):
        own = joined(inside)
        if not isinstance(own, Where) or state is not NOBODY:
            return state if state is not NOBODY else own
        shift = max(indices[i].dim() for i in by) - indices[by[inside.index(own)]].dim()
        return Where(start + own.dim + shift, own.inner)
    if state.dim not in by:
        rest = [d for d in range(x.dim()) if d not in by]
        before = rest.index(state.dim)
        return Where(before + (block if before >= start else 0), state.inner)
    index = indices[state.dim]
    if state.inner == 1 and x.shape[state.dim] == op.n and op.follower.counts(index):
        axis = next((d for d, size in enumerate(index.shape) if size == op.n), 0)
        return Where(start + axis + block - index.dim())
    return MIXED


def put(op: Op, out: Tensor) -> State:
    """The place in x after a write here and there: unchanged if that goes where it belongs."""
    state = op.state(op.args[0])
    written = [x for x in tensors_in(op.args[1:]) if op.state(x) is not NOBODY]
    place = LOST if not written or state is MIXED else written_to(op, state, written[-1], out)
    if place is LOST:
        return state if state is not NOBODY else LOST
    return MIXED if isinstance(state, Where) and place != state else place


def written_to(op: Op, state: State, source: Tensor, out: Tensor) -> State:
    """The place of the sequences of a written tensor in the result; LOST where nothing says so."""
    own, dim = op.state(source), op.argument("dim", 1)
    index = op.args[1] if isinstance(op.args[1], list | tuple) else {dim: op.argument("index", 2)}
    indices = dict(enumerate(index)) if not isinstance(index, dict) else index
    by = {d: i for d, i in indices.items() if isinstance(i, Tensor) and isinstance(d, int)}
    if not by or any(i.dtype in (torch.bool, torch.uint8) for i in by.values()):
        return LOST  # by a mask, which takes what is there in its order
    if own is MIXED:  # as an expert's rows, back in their places; but whole sequences elsewhere
        dims = {d % out.dim() for d in by}
        if isinstance(state, Where) and dims == {state.dim} and out.shape[state.dim] == op.n:
            return MIXED
        return LOST
    if not isinstance(own, Where):
        return LOST
    if isinstance(index, dict):
        if source.dim() != out.dim() or source.shape[own.dim] > out.shape[own.dim]:
            return LOST
        through = own.dim if own.dim in {d % out.dim() for d in by} else None
    else:
        block = max(i.dim() for i in by.values())
        start = min(by) if max(by) - min(by) + 1 == len(by) else 0
        rest = [d for d in range(out.dim()) if d not in by]
        places: list[int | None] = [*rest[:start], *[None] * block, *rest[start:]]
        there = own.dim + len(places) - source.dim()
        if places[there] is not None:
            return Where(places[there] or 0, own.inner)
        axes = {d: there - start + i.dim() - block for d, i in by.items()}
        through = next((d for d, axis in axes.items() if axis >= 0 and by[d].shape[axis] > 1), None)
    if through is None:
        return own
    counts = own.inner == 1 and out.shape[through] == op.n and op.follower.counts(by[through])
    return Where(through) if counts else MIXED


def looked_up(op: Op, out: Tensor) -> State:
    """gather: x and the indices lie alike."""
    x, dim, index = op.args[:3]
    states = [op.state(x), op.state(index)]
    state = joined(states)
    if isinstance(state, Where) and op.state(x) != NOBODY:
        return state if state.dim != dim % x.dim() else MIXED
    return state if state is not NOBODY else LOST


def by_values(op: Op, out: Tensor) -> State:
    return MIXED


Rule = Callable[[Op, Tensor], State]


def ruled(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **ruled(pointwise, "clone _to_copy copy where masked_fill native_dropout _fused_dropout"),
    **ruled(
        pointwise, "bernoulli nan_to_num lift_fresh_copy bucketize searchsorted addcmul addcdiv"
    ),
    **ruled(pointwise, "fill zero normal uniform exponential hardswish hardtanh hardsigmoid"),
    **ruled(pointwise, "leaky_relu _prelu_kernel rrelu_with_noise log_sigmoid_forward threshold"),
    **ruled(along, "_softmax softmax _log_softmax log_softmax cumsum cumprod logcumsumexp cummax"),
    **ruled(along, "sort topk argsort flip roll index_select glu kthvalue"),
    **ruled(reduced, "sum mean amax amin max min var std var_mean argmax argmin any all prod"),
    **ruled(reduced, "linalg_vector_norm logsumexp median count_nonzero norm nansum aminmax"),
    **ruled(normed, "native_layer_norm _fused_rms_norm"),
    **ruled(first, "native_group_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm"),
    **ruled(first, "_native_batch_norm_legit_no_training _batch_norm_with_update tril triu"),
    **ruled(first, "miopen_batch_norm _batch_norm_no_update constant_pad_nd mul_scalar"),
    **ruled(product, "mm addmm bmm baddbmm mv addmv _int_mm"),
    **ruled(embedding, "embedding"),
    **ruled(concatenated, "cat"),
    **ruled(stacked, "stack"),
    **ruled(repeated, "repeat expand_copy"),
    **ruled(interleaved, "repeat_interleave"),
    **ruled(indexed, "index _unsafe_index"),
    **ruled(put, "index_put _unsafe_index_put _index_put_impl index_copy index_add index_fill"),
    **ruled(put, "scatter scatter_add scatter_reduce masked_scatter slice_scatter select_scatter"),
    **ruled(looked_up, "gather"),
    **ruled(by_values, "nonzero masked_select unique _unique _unique2 unique_dim addbmm"),
}
BY_PART: list[tuple[str, Rule]] = [
    ("attention", attention),
    ("conv", first_dimension),
    ("pool", first_dimension),
    ("upsample", first_dimension),
    ("im2col", first_dimension),
    ("pad", first),
]
