"""`BUILDERS` has, for each operation of TTGIR that computes, what makes a step of it.

A step is a function of a partition's registers, the first of which is the partition itself. It
returns None where the next step follows, or the number of the step that does. `TURN`, `POLLED`
(a flag was looked at) and `BLOCKED` (this step is to be tried again) let others go on.

Here are the operations on values; others are in `ttgir_global` and `ttgir_shared`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

import numpy as np
from ttgir_memory import HELD, Pointer, rounded
from ttgir_parse import Operation

TURN, POLLED, BLOCKED, END = -1, -2, -3, -4
Step = Callable[[list], int | None]
BUILDERS: dict[str, Callable] = {}


def operation(*names: str):
    def known(build: Callable) -> Callable:
        BUILDERS.update(dict.fromkeys(names, build))
        return build

    return known


class Product:
    """A sum that wgmma is still adding to: until it is waited for, only a product may take it."""

    __array_ufunc__ = None

    def __init__(self, values: np.ndarray, number: int):
        self.values = values
        self.number = number


# ---------------------------------------------------------------------------- elementwise


def wrapped(value, bits: int = 32):
    """A number as a signed integer of so many bits; arrays do it by themselves."""
    if isinstance(value, int):
        half = 1 << (bits - 1)
        return (value + half) % (half * 2) - half
    return value


def quotient(a, b):
    """a / b towards zero."""
    found = abs(a) // abs(b)
    if isinstance(found, int):
        return found if (a < 0) == (b < 0) else -found
    return np.where((a < 0) == (b < 0), found, -found)


def unsigned(a):
    return a % (1 << 32) if isinstance(a, int) else a.astype(np.int64) % (1 << 32)


BINARY = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "divsi": quotient,
    "remsi": lambda a, b: a - quotient(a, b) * b,
    "divui": lambda a, b: unsigned(a) // unsigned(b),
    "remui": lambda a, b: unsigned(a) % unsigned(b),
    "andi": operator.and_,
    "ori": operator.or_,
    "xori": operator.xor,
    "shli": operator.lshift,
    "shrsi": operator.rshift,
    "addf": operator.add,
    "subf": operator.sub,
    "mulf": operator.mul,
    "divf": operator.truediv,
    "maximumf": np.maximum,
    "minimumf": np.minimum,
    "maxnumf": np.fmax,
    "minnumf": np.fmin,
}
SCALAR = {"maxsi": max, "minsi": min, "maxui": max, "minui": min}
ARRAY = {"maxsi": np.maximum, "minsi": np.minimum, "maxui": np.maximum, "minui": np.minimum}
COMPARE = {
    "eq": operator.eq, "ne": operator.ne,
    "slt": operator.lt, "sle": operator.le, "sgt": operator.gt, "sge": operator.ge,
    "ult": operator.lt, "ule": operator.le, "ugt": operator.gt, "uge": operator.ge,
    "oeq": operator.eq, "une": operator.ne, "olt": operator.lt, "ole": operator.le,
    "ogt": operator.gt, "oge": operator.ge,
}  # fmt: skip


@operation(*(f"arith.{name}" for name in {**BINARY, **SCALAR}))
def binary(op: Operation, build) -> Step:
    (a, b), d = build.inputs(op), build.output(op)
    kind = build.function.result_type(op)
    name = op.name.removeprefix("arith.")
    act = BINARY.get(name) or (ARRAY if kind.shape else SCALAR)[name]
    if kind.shape or kind.element not in ("i32", "f32"):

        def step(e):
            e[d] = act(e[a], e[b])

    elif kind.element == "f32":

        def step(e):
            e[d] = float(np.float32(act(e[a], e[b])))

    else:

        def step(e):
            e[d] = wrapped(act(e[a], e[b]))

    return step


@operation("arith.cmpi", "arith.cmpf")
def compare(op: Operation, build) -> Step:
    (a, b), d = build.inputs(op), build.output(op)
    name = re.match(r"\w+", op.head)[0]
    act = COMPARE[name]
    if name in ("ult", "ule", "ugt", "uge"):

        def step(e):
            e[d] = act(unsigned(e[a]), unsigned(e[b]))

    else:

        def step(e):
            e[d] = act(e[a], e[b])

    return step


@operation("arith.select")
def select(op: Operation, build) -> Step:
    (c, a, b), d = build.inputs(op), build.output(op)

    def step(e):
        chosen = e[c]
        if isinstance(chosen, np.ndarray):
            e[d] = np.where(chosen, e[a], e[b])
        else:
            e[d] = e[a] if chosen else e[b]

    return step


@operation("arith.negf", "math.absf")
def unary(op: Operation, build) -> Step:
    (a,), d = build.inputs(op), build.output(op)
    act = {"arith.negf": operator.neg, "math.absf": abs}[op.name]

    def step(e):
        e[d] = act(e[a])

    return step


@operation("arith.truncf", "arith.extf", "arith.sitofp", "arith.fptosi", "arith.extsi",
           "arith.extui", "arith.trunci", "arith.index_cast")  # fmt: skip
def convert(op: Operation, build) -> Step:
    (a,), d = build.inputs(op), build.output(op)
    kind, before = build.function.result_type(op), build.function.operand_types(op)[0]
    if kind.element in ("bf16", "f16", "f32", "f64"):
        if not kind.shape:

            def step(e):
                e[d] = float(rounded(np.asarray([e[a]], np.float64), kind.element)[0])

        else:

            def step(e):
                e[d] = rounded(e[a], kind.element)

    elif kind.shape:
        held = HELD.get(kind.element, bool)

        def step(e):
            e[d] = e[a].astype(held)

    elif op.name == "arith.extsi" and before.element == "i1":

        def step(e):
            e[d] = -int(e[a])

    else:
        bits = {"index": 64, "i1": 1}.get(kind.element) or int(kind.element[1:])

        def step(e):
            e[d] = int(e[a]) & 1 if bits == 1 else wrapped(int(e[a]), bits)

    return step


# ---------------------------------------------------------------------------- shapes


@operation("ttg.convert_layout", "tt.ptr_to_int", "tt.bitcast")
def same(op: Operation, build) -> Step:
    (a,), d = build.inputs(op), build.output(op)
    if op.name == "tt.bitcast" and build.function.result_type(op).kind != "pointer":
        raise build.unknown(op)

    def step(e):
        value = e[a]
        if isinstance(value, Product):
            raise TypeError("a product")
        e[d] = value

    return step


def shaping(op: Operation, build, act: Callable) -> Step:
    """A step that changes a tensor's shape, or that of the offsets of pointers."""
    (a,), d = build.inputs(op), build.output(op)

    def step(e):
        value = e[a]
        if isinstance(value, Pointer):
            e[d] = Pointer(value.array, act(value.offset))
        else:
            e[d] = act(value)

    return step


@operation("tt.splat")
def splat(op: Operation, build) -> Step:
    kind = build.function.result_type(op)
    held = np.int64 if "ptr" in kind.element else {**HELD, "i1": bool}.get(kind.element, np.float32)
    return shaping(op, build, lambda value: np.full(kind.shape, value, held))


@operation("tt.expand_dims")
def expand(op: Operation, build) -> Step:
    axis = op.number("axis")
    return shaping(op, build, lambda value: np.expand_dims(value, axis))


@operation("tt.broadcast")
def broadcast(op: Operation, build) -> Step:
    shape = build.function.result_type(op).shape
    return shaping(op, build, lambda value: np.broadcast_to(value, shape))


@operation("tt.reshape")
def reshape(op: Operation, build) -> Step:
    if "allow_reorder" in op.head + op.attributes:
        raise build.unknown(op)
    shape = build.function.result_type(op).shape
    return shaping(op, build, lambda value: value.reshape(shape))


@operation("tt.trans")
def transpose(op: Operation, build) -> Step:
    order = op.numbers("order")
    return shaping(op, build, lambda value: value.transpose(order))


@operation("tt.reduce")
def reduction(op: Operation, build) -> Step:
    (a,), d, axis = build.inputs(op), build.output(op), op.number("axis")
    (region,) = op.regions
    if [inner.name for inner in region.operations] != ["arith.addf", "tt.reduce.return"]:
        raise build.unknown(op)

    def step(e):
        e[d] = np.add.reduce(e[a], axis, e[a].dtype)

    return step


@operation("tt.make_range")
def make_range(op: Operation, build) -> Step:
    values, d = np.arange(op.number("start"), op.number("end"), dtype=np.int32), build.output(op)

    def step(e):
        e[d] = values

    return step


@operation("tt.split")
def split(op: Operation, build) -> Step:
    (a,) = build.inputs(op)
    first, second = (build.define(name) for name in op.results)

    def step(e):
        e[first], e[second] = e[a][..., 0], e[a][..., 1]

    return step


@operation("tt.join")
def join(op: Operation, build) -> Step:
    (a, b), d = build.inputs(op), build.output(op)

    def step(e):
        e[d] = np.stack([e[a], e[b]], -1)

    return step


@operation("tt.get_program_id", "tt.get_num_programs")
def program_id(op: Operation, build) -> Step:
    d, ours = build.output(op), op.name == "tt.get_program_id"
    if op.head != "x":  # grids have one side
        return lambda e: e.__setitem__(d, 0 if ours else 1)

    def step(e):
        e[d] = e[0].program.number if ours else e[0].program.launch.grid

    return step
