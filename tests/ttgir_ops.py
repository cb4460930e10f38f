"""`BUILDERS` has, for each operation of TTGIR that computes, what makes a step of it.

A step is a function of a partition's registers, of which the first is the partition itself. It
returns None when the next step follows; a number is where to go on; `TURN`, `POLLED` and `BLOCKED` let
others have their turn, the last to try this step again.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

import numpy as np
from ttgir_memory import HELD, Array, Barrier, Fault, Pointer, Shared, View, rounded
from ttgir_parse import Operation, Type

TURN, POLLED, BLOCKED, END = -1, -2, -3, -4
Step = Callable[[list], int | None]
BUILDERS: dict[str, Callable] = {}


def operation(*names: str):
    def known(build: Callable) -> Callable:
        BUILDERS.update(dict.fromkeys(names, build))
        return build

    return known


class Product:
    """A sum that wgmma is still adding to: only another product may take it, until it is waited for."""

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


# ---------------------------------------------------------------------------- global memory


@operation("tt.addptr")
def add_pointer(op: Operation, build) -> Step:
    (a, b), d = build.inputs(op), build.output(op)

    def step(e):
        e[d] = Pointer(e[a].array, e[a].offset + e[b])

    return step


@operation("tt.load")
def load(op: Operation, build) -> Step:
    (a, *others), d = build.inputs(op), build.output(op)
    kind = build.function.result_type(op)

    def step(e):
        array, offset = e[a].array, e[a].offset
        if not kind.shape:
            array.check(np.asarray(offset))
            e[d] = array.flat[offset].item()
            return TURN
        mask = e[others[0]] if others else np.True_
        mask = np.broadcast_to(mask, kind.shape)
        array.check(offset[mask])
        if len(others) == 2:
            instead = np.broadcast_to(np.asarray(e[others[1]], array.flat.dtype), kind.shape)
        else:  # what a masked load gives is anything
            poison = np.nan if array.flat.dtype.kind == "f" else np.iinfo(array.flat.dtype).min
            instead = np.full(kind.shape, poison, array.flat.dtype)
        e[d] = np.where(mask, array.flat[np.where(mask, offset, 0)], instead)
        return TURN

    return step


@operation("tt.store")
def store(op: Operation, build) -> Step:
    a, value, *others = build.inputs(op)

    def step(e):
        array, offset = e[a].array, np.asarray(e[a].offset)
        mask = np.broadcast_to(e[others[0]] if others else np.True_, offset.shape)
        array.check(offset[mask])
        array.flat[offset[mask]] = np.broadcast_to(e[value], offset.shape)[mask]
        array.version += 1
        return TURN

    return step


def look(e: list, pointer: Pointer) -> int | None:
    """The integer there; None if this partition has seen it and done nothing else since."""
    array, offset = pointer.array, pointer.offset
    array.check(np.asarray(offset))
    value = array.flat[offset].item()
    seen = array.name, offset, value
    if e[0].seen == seen:
        e[0].waits = "for another value of {}[{}] than {}", array.name, offset, value
        return None
    e[0].seen = seen
    return value


@operation("tt.atomic_rmw")
def atomic(op: Operation, build) -> Step:
    (a, b, *others), d = build.inputs(op), build.output(op)
    if build.function.result_type(op).shape:
        raise build.unknown(op)
    name = re.match(r"\w+", op.head)[0]
    changes = {"add": operator.add, "exch": lambda old, new: new, "max": max, "min": min,
               "fadd": operator.add}  # fmt: skip
    if name not in changes:
        raise build.unknown(op)
    change = changes[name]

    def step(e):
        if others and not e[others[0]]:
            return None
        array, offset, value = e[a].array, e[a].offset, e[b]
        if name == "add" and value == 0:  # it only looks
            old = look(e, e[a])
            if old is None:
                return BLOCKED
            e[d] = old
            return POLLED
        array.check(np.asarray(offset))
        e[d] = array.flat[offset].item()
        array.flat[offset] = change(e[d], value)
        array.version += 1
        return TURN

    return step


@operation("tt.elementwise_inline_asm")
def assembly(op: Operation, build) -> Step:
    text = " ".join(op.assembly.split())
    inputs, d = build.inputs(op), build.output(op)
    if text.startswith("ld.acquire.gpu.global.u32 $0, [$1]"):

        def step(e):
            value = look(e, e[inputs[0]])
            if value is None:
                return BLOCKED
            e[d] = value
            return POLLED

        return step
    if re.search(r"red\.\w+\.gpu\.global\.inc\.u32 \[\$1\], \$2", text):

        def step(e):
            pointer, last = e[inputs[0]], e[inputs[1]]
            pointer.array.check(np.asarray(pointer.offset))
            old = pointer.array.flat[pointer.offset].item()
            pointer.array.flat[pointer.offset] = 0 if old >= last else old + 1
            pointer.array.version += 1
            e[d] = 0
            return TURN

        return step
    if re.fullmatch(r"mov\.[bus]32 \$0, \$1;", text):  # as it is, but not known to the compiler

        def step(e):
            e[d] = e[inputs[0]]

        return step
    if text.startswith("griddepcontrol."):  # the kernel before is over
        return lambda e: None
    raise build.unknown(op, f"tt.elementwise_inline_asm {text!r}")


# ---------------------------------------------------------------------------- shared memory


@operation("ttg.local_alloc")
def allocate(op: Operation, build) -> Step:
    inputs, d = build.inputs(op), build.output(op)
    kind = build.function.result_type(op)
    name = op.results[0].removeprefix("%")

    def step(e):
        e[d] = Shared(name, kind).view(0, kind)
        if inputs:
            put(e, e[d], e[inputs[0]])

    return step


@operation("ttg.memdesc_index")
def index(op: Operation, build) -> Step:
    inputs, d = build.inputs(op), build.output(op)
    kind, size = build.function.result_type(op), 0
    before = build.function.operand_types(op)[0]
    size = int(np.prod(kind.shape))
    constant = op.literals()[0] if len(inputs) == 1 else None

    def step(e):
        view = e[inputs[0]]
        at = constant if constant is not None else e[inputs[1]]
        if not 0 <= at < before.shape[0]:
            raise Fault(f"{view.memory.name} of {before.shape[0]} has no [{at}]")
        e[d] = view.memory.view(view.first + at * size, kind)

    return step


@operation("ttg.memdesc_reinterpret", "ttg.memdesc_trans", "ttg.memdesc_reshape")
def reinterpret(op: Operation, build) -> Step:
    (a,), d = build.inputs(op), build.output(op)
    kind = build.function.result_type(op)

    def step(e):
        e[d] = e[a].memory.view(e[a].first, kind)

    return step


def put(e: list, view: View, values: np.ndarray) -> None:
    """Store a tensor, which the asynchronous units do not see before the next fence."""
    view.check_writable()
    view.write(values, unfenced=True)
    e[0].unfenced.append(view)


@operation("ttg.local_store")
def local_store(op: Operation, build) -> Step:
    value, to = build.inputs(op)

    def step(e):
        put(e, e[to], e[value])
        return TURN

    return step


@operation("ttg.local_load")
def local_load(op: Operation, build) -> Step:
    (a, *_), d = build.inputs(op), build.output(op)

    def step(e):
        e[d] = e[a].read(asynchronous=False).copy()
        return TURN

    return step


@operation("ttng.fence_async_shared")
def fence(op: Operation, build) -> Step:
    def step(e):
        for view in e[0].unfenced:
            view.fence()
        e[0].unfenced.clear()

    return step


@operation("gpu.barrier", "ttg.barrier", "ttg.local_dealloc", "ttng.inval_barrier")
def nothing(op: Operation, build) -> Step:
    return lambda e: None


# ---------------------------------------------------------------------------- barriers


def barrier_of(view: View) -> Barrier:
    found = view.memory.barriers.get(view.first)
    if found is None:
        raise Fault(f"{view} is no barrier yet")
    return found


@operation("ttng.init_barrier")
def init_barrier(op: Operation, build) -> Step:
    (a,), (count,) = build.inputs(op), op.literals()

    def step(e):
        e[a].memory.barriers[e[a].first] = Barrier(count)

    return step


@operation("ttng.barrier_expect")
def expect(op: Operation, build) -> Step:
    (a, condition), (size,) = build.inputs(op), op.literals()

    def step(e):
        if e[condition]:
            barrier_of(e[a]).expect(size)

    return step


@operation("ttng.arrive_barrier")
def arrive(op: Operation, build) -> Step:
    (a, *condition), (count,) = build.inputs(op), op.literals()

    def step(e):
        if not condition or e[condition[0]]:
            barrier_of(e[a]).arrive(count)
        return TURN

    return step


@operation("ttng.wait_barrier")
def wait(op: Operation, build) -> Step:
    a, parity, *condition = build.inputs(op, until=" deps ")

    def step(e):
        if condition and not e[condition[0]]:
            return None
        barrier = barrier_of(e[a])
        if barrier.phase != e[parity]:  # the phase of that parity is over
            e[0].barrier = None
            return TURN
        e[0].barrier, e[0].parity = barrier, e[parity]
        e[0].waits = "for {} to pass phase {}: it is {}", e[a], e[parity], barrier
        return BLOCKED

    return step


# ---------------------------------------------------------------------------- bulk copies


@operation("ttng.async_tma_copy_global_to_local")
def bulk_load(op: Operation, build) -> Step:
    desc, *coordinates, to, bar, condition = build.inputs(op)
    block = build.block(op)

    def step(e):
        if not e[condition]:
            return None
        view, array, barrier = e[to], e[desc], barrier_of(e[bar])
        first = [e[c] for c in coordinates]
        view.begin_copy()

        def land():
            view.write(array.load(block.shape, first), unfenced=False)
            barrier.land(size_of(block))

        e[0].program.launch.flying.append((e[0].program, f"the bulk copy into {view}", land))
        return TURN

    return step


def size_of(kind: Type) -> int:
    """The bytes of a tile."""
    return int(np.prod(kind.shape)) * {"bf16": 2, "f16": 2, "f32": 4, "i32": 4}[kind.element]


@operation("ttng.async_tma_copy_local_to_global")
def bulk_store(op: Operation, build) -> Step:
    desc, *coordinates, source = build.inputs(op)
    block = build.block(op)

    def step(e):
        agent, view, array = e[0], e[source], e[desc]
        values = view.read(asynchronous=True).reshape(block.shape).copy()
        first = [e[c] for c in coordinates]
        view.hold()
        agent.stored += 1
        ticket = agent.stored
        agent.stores.append(ticket)

        def land():
            array.store(values, first)
            view.release()
            agent.stores.remove(ticket)

        agent.program.launch.flying.append((agent.program, f"the bulk store of {view}", land))
        return TURN

    return step


@operation("ttng.async_tma_store_wait")
def store_wait(op: Operation, build) -> Step:
    left = op.number("pendings")

    def step(e):
        agent = e[0]
        if not agent.stores or agent.stores[0] > agent.stored - left:  # they end in any order
            return None
        agent.waits = "for its bulk stores, of which {} are in flight", agent.stores
        return BLOCKED

    return step


# ---------------------------------------------------------------------------- products


@operation("ttng.warp_group_dot", "tt.dot")
def dot(op: Operation, build) -> Step:
    (a, b, c, *use), d = build.inputs(op), build.output(op)
    in_flight = "isAsync = true" in op.attributes

    def step(e):
        agent, total = e[0], e[c]
        total = total.values if isinstance(total, Product) else total
        held, factors = [], []
        for operand in (e[a], e[b]):
            if isinstance(operand, View):
                factors.append(operand.read(asynchronous=True))
                held.append(operand)
            else:
                factors.append(operand)
        result = np.matmul(*factors)
        if not use or e[use[0]]:
            result += total
        if not in_flight:
            e[d] = result
            return TURN
        agent.products += 1
        agent.multiplying.append((agent.products, [view.hold() for view in held]))
        e[d] = Product(result, agent.products)
        return TURN

    return step


@operation("ttng.warp_group_dot_wait")
def dot_wait(op: Operation, build) -> Step:
    inputs, outputs = build.inputs(op), [build.define(name) for name in op.results]
    left = op.number("pendings")

    def step(e):
        agent = e[0]
        while len(agent.multiplying) > left:
            agent.done, views = agent.multiplying.pop(0)
            for view in views:
                view.release()
        for i, o in zip(inputs, outputs, strict=True):
            value = e[i]
            finished = isinstance(value, Product) and value.number <= agent.done
            e[o] = value.values if finished else value
        return TURN

    return step
