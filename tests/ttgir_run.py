"""`Kernel` executes the TTGIR that Triton compiled of a kernel: on numbers, without a GPU.

Each partition of each program goes on by itself, a step here and a step there, as a seed decides; bulk
copies land when it pleases. All programs of a launch are resident. Layouts of registers are ignored;
shared memory is `ttgir_memory`'s. Products are in fp32, casts to nearest even. A `Fault` is raised where
the hardware would go on with wrong bytes, or stand still:

- a stage read that was never written, is not fenced, or whose bulk copy is in flight;
- a stage overwritten while a product or a bulk store reads it, or a bulk copy is on its way to it;
- more arrivals, or more bytes, than a barrier counts; nothing moves (`Deadlock`: who waits for what);
- a sum read before its products were waited for; a program that ends with bulk copies in flight;
- an address outside of its tensor.

What is not written is NaN. Not modelled: in which order writes of one multiprocessor are seen by
another (here at once: a release without its acquire passes), and time.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ttgir_memory import HELD, Array, Barrier, Deadlock, Fault, Pointer
from ttgir_ops import BLOCKED, BUILDERS, END, POLLED, TURN, Product, Step
from ttgir_parse import Operation, Region, Type, parse

MOST_TURNS = 5_000_000  # of a launch; beyond, something goes round for ever


class Agent:
    """A partition of a program: its registers, where it is, and what it has under way."""

    def __init__(self, program: Program, name: str, registers: list, at: int):
        self.program = program
        self.name = name
        self.registers = registers
        registers[0] = self
        self.at = at
        self.waits: tuple = ("",)  # a text with places, and what stands there
        self.barrier: Barrier | None = None  # that it waits for, to pass the phase `parity`
        self.parity = 0
        self.seen: Any = None  # the last flag looked at, if nothing was done since
        self.multiplying: list[tuple[int, list]] = []
        self.products = 0
        self.done = 0  # the last product that has been waited for
        self.stored = 0
        self.stores: list[int] = []  # the numbers of its bulk stores that are in flight
        self.unfenced: list = []
        self.pace = program.launch.random.choice((1.0, 1.0, 0.3, 0.05))
        self.ended = False

    def turn(self, kernel: Kernel) -> bool:
        """Go on to where others may see it; whether anything was done."""
        steps, registers, at = kernel.steps, self.registers, self.at
        moved = False
        try:
            while True:
                result = steps[at](registers)
                if result is None:
                    at += 1
                elif result >= 0:
                    at = result
                elif result == BLOCKED:
                    self.at = at
                    return moved
                else:
                    if result == END:
                        self.end()
                    elif result == TURN:
                        self.seen = None
                    self.at = at + 1
                    return True
                moved = True
        except Fault as fault:
            raise type(fault)(f"{self.where(kernel, at)}: {fault}") from None
        except Exception as error:
            op = kernel.where[at]
            values = [registers[i] for i in kernel.reads.get(at, ())]
            if any(isinstance(value, Product) for value in values):
                raise Fault(
                    f"{self.where(kernel, at)}: a sum is read before its products were waited for"
                ) from error
            raise RuntimeError(f"{self.where(kernel, at)}: {op.name}: {error!r}") from error

    def end(self) -> None:
        self.ended = True
        if self.multiplying:
            raise Fault("ends before its products were waited for")
        if self.stores:
            raise Fault("ends while its bulk stores read shared memory")

    def where(self, kernel: Kernel, at: int | None = None) -> str:
        op = kernel.where[self.at if at is None else at]
        source = kernel.function.source(op.location)
        return f"program {self.program.number} {self.name}, {source} (ttgir line {op.line})"


class Program:
    """One of a launch's programs."""

    def __init__(self, launch: Launch, number: int):
        self.launch = launch
        self.number = number


class Launch:
    """All programs of a launch, and the bulk copies that are in flight."""

    def __init__(self, kernel: Kernel, grid: int, registers: list, generator: random.Random):
        self.kernel = kernel
        self.grid = grid
        self.random = generator
        self.flying: list[tuple[Program, str, Any]] = []
        self.agents: list[Agent] = []
        self.turns = 0
        self.arrays: dict[str, Array] = {}  # the arguments that are tensors
        self.landing = generator.choice((0.02, 0.3, 0.8))
        for number in range(grid):
            self.start(Program(self, number), "all warps", list(registers), 0)

    def start(self, program: Program, name: str, registers: list, at: int) -> Agent:
        agent = Agent(program, name, registers, at)
        self.agents.append(agent)
        return agent

    def run(self) -> None:
        """To the end of all programs."""
        chance, idle = self.random.random, 0
        while self.agents:
            self.turns += 1
            if self.turns > MOST_TURNS:
                raise Deadlock(f"no end after {MOST_TURNS} turns\n{self.report()}")
            if self.flying and chance() < self.landing:
                self.land()
                idle = 0
            agent = self.agents[int(chance() * len(self.agents))]
            if agent.barrier is not None and agent.barrier.phase == agent.parity:
                idle += 1
            elif agent.pace < 1 and idle < len(self.agents) and chance() > agent.pace:
                continue
            else:
                idle = 0 if self.step(agent) else idle + 1
            if idle > 3 * len(self.agents):
                if not self.any_moves():
                    raise Deadlock(f"nothing moves\n{self.report()}")
                idle = 0
        assert not self.flying

    def step(self, agent: Agent) -> bool:
        """Whether the agent went on; it leaves when it has ended."""
        moved = agent.turn(self.kernel)
        if agent.ended:
            self.agents.remove(agent)
            self.check_end(agent.program)
        return moved

    def land(self) -> None:
        """One of the bulk copies in flight, whichever."""
        _, what, land = self.flying.pop(int(self.random.random() * len(self.flying)))
        try:
            land()
        except Fault as fault:
            raise Fault(f"{what}: {fault}") from None

    def any_moves(self) -> bool:
        """Whether a bulk copy lands, or anybody goes on, if each has a turn."""
        if self.flying:
            self.land()
            return True
        return any([self.step(agent) for agent in list(self.agents)])

    def check_end(self, program: Program) -> None:
        """If the program has ended, nothing of it is in flight."""
        if any(agent.program is program for agent in self.agents):
            return
        for owner, what, _ in self.flying:
            if owner is program:
                raise Fault(f"program {program.number} ends while {what} is in flight")

    def report(self) -> str:
        lines = []
        for agent in self.agents[:24]:
            text, *places = agent.waits
            lines.append(f"  {agent.where(self.kernel)} waits {text.format(*places)}")
        return "\n".join(lines)


class Kernel:
    """A kernel as compiled, made into steps; `launch` runs it."""

    def __init__(self, text: str):
        self.function = parse(text)
        self.names: dict[str, int] = {}
        self.registers: list = [
            None
        ]  # what a partition begins with: constants; the first is itself
        self.steps: list[Step] = []
        self.where: list[Operation] = []  # of each step
        self.reads: dict[int, tuple[int, ...]] = {}
        self.inputs_of: tuple[int, ...] = ()
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
        self.inputs_of = tuple(found)
        return found

    def output(self, op: Operation) -> int:
        (name,) = op.results
        return self.define(name)

    def block(self, op: Operation) -> Type:
        """What a bulk copy moves: the type of its descriptor's block."""
        return next(kind for kind in self.function.operand_types(op) if kind.kind == "tensordesc")

    def unknown(self, op: Operation, what: str = "") -> NotImplementedError:
        where = self.function.source(op.location)
        text = f"ttgir operation {what or op.name}: add it to tests/ttgir_ops.py"
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
                self.inputs_of = ()
                at = self.emit(op, build(op, self))
                self.reads[at] = self.inputs_of
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

    # Launches.

    def launch(self, arguments: Mapping[str, Any], grid: int, seed: int) -> Launch:
        """Run with these arguments, by the parameters' names, in `grid` programs.

        Tensors are numpy arrays, float32 for 16-bit elements, of values that these have; they are
        changed in place. Raises `Fault`, with where and what.
        """
        registers, arrays = list(self.registers), {}
        for parameter, kind in self.function.parameters.items():
            name = parameter.removeprefix("%")
            if kind.kind in ("tensordesc", "pointer"):
                if name not in arguments:
                    raise TypeError(f"no argument {name}")
                array = arrays[name] = Array(name, arguments[name], kind.element)
                value = array if kind.kind == "tensordesc" else Pointer(array, 0)
            elif name in arguments:
                value, divisor = arguments[name], self.function.divisible.get(parameter)
                if divisor and value % divisor:
                    raise TypeError(f"{name} = {value}: compiled for multiples of {divisor}")
            else:
                continue  # of a descriptor: its shape and strides
            registers[self.names[parameter]] = value
        launch = Launch(self, grid, registers, random.Random(seed))
        launch.arrays = arrays
        launch.run()
        return launch


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
