"""Operations of TTGIR on shared memory: barriers, bulk copies, products."""

from __future__ import annotations

import numpy as np
from ttgir_memory import Barrier, Fault, Shared, View
from ttgir_parse import Operation, Type
from ttgir_values import BLOCKED, TURN, Product, Step, operation


@operation("ttg.local_alloc")
def allocate(op: Operation, build) -> Step:
    inputs, d = build.inputs(op), build.output(op)
    kind = build.function.result_type(op)
    name = "x".join([*map(str, kind.shape), kind.element])
    place = f" of {build.function.source(op.location, caller=True)}"

    def step(e):
        e[d] = Shared(name, kind, place).view(0, kind)
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
            raise Fault(f"{view.memory.name}{view.memory.place} has no [{at}]")
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


@operation("gpu.barrier", "ttg.barrier")
def meeting(op: Operation, build) -> Step:
    return lambda e: e[0].meet()


@operation("ttg.local_dealloc", "ttng.inval_barrier")
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
            e[0].publish()
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

        e[0].start(f"the bulk copy into {view}", land)
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

        agent.start(f"the bulk store of {view}", land)
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
