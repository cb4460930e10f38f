"""Operations of TTGIR on global memory by addresses, and the inline assembly that is known."""

from __future__ import annotations

import operator
import re

import numpy as np
from ttgir_memory import Pointer
from ttgir_parse import Operation
from ttgir_values import BLOCKED, POLLED, TURN, Step, operation


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
            e[0].check_met(array, offset)
            e[0].publish(array)  # it sees its own
            e[d] = array.flat[offset].item()
            return TURN
        mask = e[others[0]] if others else np.True_
        mask = np.broadcast_to(mask, kind.shape)
        array.check(offset[mask])
        e[0].check_met(array, offset[mask])
        e[0].publish(array)
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
        places, values = offset[mask], np.broadcast_to(e[value], offset.shape)[mask]
        array.check(places)

        def land():
            array.flat[places] = values
            array.version += 1

        e[0].store(land, array, places)
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
    name, order = re.match(r"(\w+), (\w+)", op.head).groups()
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
        if order in ("release", "acq_rel"):
            e[0].publish(met=True)
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
    if re.search(r"mov\.s32 one, %nctaid\.y; mul\.lo\.s32 \$0, one, \$1;", text):

        def step(e):
            e[d] = e[inputs[0]]  # a grid has one side

        return step
    if "@p prefetch.global.L2 [$1];" in text:  # it changes nothing

        def step(e):
            pointer, there = e[inputs[0]], np.asarray(e[inputs[1]], bool)
            pointer.array.check(np.asarray(pointer.offset)[there])
            e[d] = np.zeros(there.shape, np.int32)

        return step
    if text.startswith("griddepcontrol."):  # the kernel before is over
        return lambda e: None
    raise build.unknown(op, f"tt.elementwise_inline_asm {text!r}")
