"""`Kernel` makes steps of a kernel's TTGIR, which `ttgir_run` executes.

A step is a function of a partition's registers (`ttgir_values`). They stand in one list; loops and
branches are steps that say where to go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ttgir_global  # noqa: F401 - they add to BUILDERS
import ttgir_shared  # noqa: F401
from ttgir_memory import HELD
from ttgir_parse import Operation, Region, Type, parse
from ttgir_values import BLOCKED, BUILDERS, END, Step


class Kernel:
    """A kernel as compiled, made into steps."""

    def __init__(self, text: str):
        self.function = parse(text)
        self.names: dict[str, int] = {}
        self.registers: list = [None]  # with which a partition begins; the first is itself
        self.steps: list[Step] = []
        self.where: list[Operation] = []  # of each step
        self.reads: dict[int, list[int]] = {}  # the registers of a step's operands
        self.asked: list[int] = []  # those of the step being made
        for name in self.function.parameters:
            self.define(name)
        self.operations(self.function.operations)

    # What builders of steps ask for.

    def define(self, name: str) -> int:
        """The register of a new value."""
        self.registers.append(None)
        self.names[name] = len(self.registers) - 1
        return self.names[name]

    def inputs(self, op: Operation, until: str = "") -> list[int]:
        """The registers of the operands, or of those that stand before `until`."""
        operands = op.operands
        if until and until in op.head:
            operands = [name for name in operands if op.head.index(name) < op.head.index(until)]
        found = [self.names[name] for name in operands]
        self.asked = found
        return found

    def output(self, op: Operation) -> int:
        (name,) = op.results
        return self.define(name)

    def block(self, op: Operation) -> Type:
        """What a bulk copy moves: the type of its descriptor's block."""
        return next(kind for kind in self.function.operand_types(op) if kind.kind == "tensordesc")

    def unknown(self, op: Operation, what: str = "") -> NotImplementedError:
        where = self.function.source(op.location)
        places = "tests/support/ttgir_{values,global,shared}.py"
        text = f"ttgir operation {what or op.name}: add it to {places}"
        return NotImplementedError(f"{text} ({where}, ttgir line {op.line}: {op.head} {op.types})")

    # Control flow.

    def emit(self, op: Operation, step: Step) -> int:
        self.steps.append(step)
        self.where.append(op)
        return len(self.steps) - 1

    def operations(self, operations: Sequence[Operation]) -> None:
        for op in operations:
            if op.name == "arith.constant":
                self.constant(op)
            elif control := CONTROL.get(op.name):
                control(self, op)
            elif build := BUILDERS.get(op.name):
                self.asked = []
                at = self.emit(op, build(op, self))
                self.reads[at] = self.asked
            else:
                raise self.unknown(op)

    def inner(self, region: Region) -> None:
        """A region's operations, whose names are its own."""
        outside = dict(self.names)
        self.operations(region.operations)
        self.names = outside

    def constant(self, op: Operation) -> None:
        kind = self.function.type_of(op.types) if op.types else Type("scalar", (), "i1")
        text = op.head.removeprefix("dense<").removesuffix(">")
        named = {"true": 1, "false": 0}
        if kind.element.startswith(("i", "index")):
            value: Any = named[text] if text in named else int(text)
            held: Any = bool if kind.element == "i1" else HELD.get(kind.element, np.int64)
        else:
            held = HELD.get(kind.element, np.float32)
            value = float_of(text, kind.element)
        self.registers[self.output(op)] = np.full(kind.shape, value, held) if kind.shape else value

    def move(self, op: Operation, sources: list[int], targets: list[int], to: list[int]) -> None:
        """All sources into the targets, at once, and on to the step that `to` will hold."""
        if len(sources) == 1:
            source, target = sources[0], targets[0]

            def step(e):
                e[target] = e[source]
                return to[0] if to else None

        else:

            def step(e):
                for target, value in zip(targets, [e[source] for source in sources], strict=True):
                    e[target] = value
                return to[0] if to else None

        self.emit(op, step)

    def ending(self, region: Region, owner: Operation) -> tuple[Operation, list[int]]:
        """(the operation that ends a region, the registers of what it hands on); its steps made."""
        last = region.operations[-1] if region.operations else owner
        if last.name not in ("scf.yield", "scf.condition"):  # left out where nothing is handed on
            self.operations(region.operations)
            return owner, []
        self.operations(region.operations[:-1])
        return last, [self.names[name] for name in last.operands]

    def for_loop(self, op: Operation) -> None:
        (region,) = op.regions
        counter, low, high, by = op.operands[:4]
        pairs = op.operands[4:]
        low_, high_, by_ = (self.names[name] for name in (low, high, by))
        initial = [self.names[name] for name in pairs[1::2]]
        results = [self.define(name) for name in op.results]
        outside = dict(self.names)
        at = self.define(counter)
        carried = [self.define(name) for name in pairs[::2]]
        top, end = [-1], [-1]
        self.move(op, [low_, *initial], [at, *carried], [])
        top[0] = len(self.steps)
        self.emit(op, lambda e: None if e[at] < e[high_] else end[0])
        last, handed = self.ending(region, op)

        def again(e):
            for target, value in zip(carried, [e[source] for source in handed], strict=True):
                e[target] = value
            e[at] += e[by_]
            return top[0]

        self.emit(last, again)
        end[0] = len(self.steps)
        self.move(op, carried, results, [])
        self.names = outside

    def if_else(self, op: Operation) -> None:
        condition = self.names[op.operands[0]]
        results = [self.define(name) for name in op.results]
        outside = dict(self.names)
        otherwise, end = [-1], [-1]
        self.emit(op, lambda e: None if e[condition] else otherwise[0])
        for region in op.regions:
            last, handed = self.ending(region, op)
            self.move(last, handed, results, end)
            self.names = dict(outside)
            if otherwise[0] < 0:
                otherwise[0] = len(self.steps)
        end[0] = len(self.steps)
        self.names = outside

    def while_loop(self, op: Operation) -> None:
        before, after = op.regions
        results = [self.define(name) for name in op.results]
        outside = dict(self.names)
        initial = [self.names[name] for name in op.operands[1::2]]
        carried = [self.define(name) for name in op.operands[::2]]
        top, end = [-1], [-1]
        self.move(op, initial, carried, [])
        top[0] = len(self.steps)
        last, (condition, *handed) = self.ending(before, op)
        inside = [self.define(name) for name in after.arguments]

        def decide(e):
            go_on = e[condition]
            values = [e[source] for source in handed]
            for target, value in zip(inside if go_on else results, values, strict=True):
                e[target] = value
            return None if go_on else end[0]

        self.emit(last, decide)
        last, handed_back = self.ending(after, op)
        self.move(last, handed_back, carried, top)
        end[0] = len(self.steps)
        self.names = outside

    def warp_specialize(self, op: Operation) -> None:
        """The default region goes on by itself; each partition is another agent, until all end."""
        default, *partitions = op.regions
        given = [self.names[name] for name in op.operands]
        starts: list[tuple[str, int, list[int]]] = []

        def fork(e):
            agent = e[0]
            agent.name, agent.children = "default", []
            for name, at, arguments in starts:
                registers = list(e)
                for target, source in zip(arguments, given, strict=True):
                    registers[target] = e[source]
                child = agent.program.launch.start(agent.program, name, registers, at)
                agent.children.append(child)

        def join(e):
            e[0].waits = ("for its partitions to end",)
            return None if all(child.ended for child in e[0].children) else BLOCKED

        self.emit(op, fork)
        self.inner(Region("", [], default.operations[:-1]))
        self.emit(default.operations[-1], join)
        skip, over = [], [-1]
        self.move(op, skip, skip, over)
        for region in partitions:
            outside = dict(self.names)
            arguments = [self.define(name) for name in region.arguments]
            starts.append((region.title, len(self.steps), arguments))
            self.operations(region.operations)
            self.names = outside
        over[0] = len(self.steps)

    def end(self, op: Operation) -> None:
        self.emit(op, lambda e: END)


def float_of(text: str, element: str) -> float:
    """A floating constant, which MLIR writes in bits where it is not finite."""
    if not text.lower().startswith("0x"):
        return float(text)
    kind = {"f32": ("<u4", "<f4"), "f16": ("<u2", "<f2"), "f64": ("<u8", "<f8")}
    bits = int(text, 16)
    if element == "bf16":
        bits, element = bits << 16, "f32"
    as_integer, as_float = kind[element]
    return float(np.array([bits], as_integer).view(as_float)[0])


CONTROL = {
    "scf.for": Kernel.for_loop,
    "scf.if": Kernel.if_else,
    "scf.while": Kernel.while_loop,
    "ttg.warp_specialize": Kernel.warp_specialize,
    "ttg.warp_return": Kernel.end,
    "tt.return": Kernel.end,
}
