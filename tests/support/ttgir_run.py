"""`launch` executes the TTGIR that Triton compiled of a kernel: on numbers, without a GPU.

Each partition of each program goes on by itself, as a seed decides; bulk copies land at any time
from then on, stores to global memory by the next release; all programs of a launch run at the same
time. Products are in fp32, casts to nearest
even, and what is not written is NaN. Shared memory is `ttgir_memory`'s; layouts of registers do not
matter. `Fault` is raised where the hardware would go on with wrong bytes, or stand still:

- shared memory read that was never written, or not fenced, or into which a bulk copy is in flight;
- shared memory overwritten while a product or a bulk store reads it, or before a copy has landed;
- more arrivals or more bytes than a barrier counts;
- sums read before their products were waited for, and bulk copies in flight at a program's end;
- what a partition has stored to global memory read by itself before its warps have met;
- an address outside of its tensor;
- nothing moves: then it is a `Deadlock`, which says where everybody waits, and for what.

Not modelled: what a multiprocessor sees of another's writes without acquiring them, and in general
the order of memory between them (a release here makes all that its partition has stored seen by
everyone that its warps have met after); the warps of a partition, which go in step here, so that a
missing barrier among them is seen of what they store to global memory alone; registers; time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ttgir_kernel import Kernel
from ttgir_memory import Array, Barrier, Deadlock, Fault, Pointer
from ttgir_values import BLOCKED, END, TURN, Product

MOST_TURNS = 5_000_000  # of a launch; beyond, something goes round for ever


@dataclass(eq=False)
class Flight:
    """Something that an agent has started and that lands when it pleases."""

    program: Program
    what: str
    land: Callable[[], None]
    array: Array | None = None  # of a store to global memory
    places: Any = None  # in it
    met: bool = True  # whether the warps of its partition have met since


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
        self.unfenced: list = []  # what it has stored to shared memory since its last fence
        self.unordered: list[Flight] = []  # its stores to global memory, since its last release
        self.unmet: list[Flight] = []  # and those since its warps last met
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

    def start(self, what: str, land: Callable[[], None]) -> None:
        """Let something land at any time."""
        self.program.launch.flying.append(Flight(self.program, what, land))

    def store(self, land: Callable[[], None], array: Array, places: np.ndarray) -> None:
        """Let a store to these places land by the next release after the warps have met."""
        flight = Flight(self.program, f"a store to {array.name}", land, array, places, met=False)
        self.program.launch.flying.append(flight)
        self.unordered.append(flight)
        self.unmet.append(flight)

    def meet(self) -> None:
        """All warps have come here."""
        for flight in self.unmet:
            flight.met = True
        self.unmet = []

    def check_met(self, array: Array, places: np.ndarray) -> None:
        """No warp reads what another may have stored since they met."""
        for flight in self.unmet:
            if flight.array is array and np.isin(places, flight.places).any():
                raise Fault(f"{array.name} is read before the warps that stored it have met")

    def publish(self, array: Array | None = None, met: bool = False) -> None:
        """What this has stored to global memory, or to one array, is there for all: a release.

        One of a single warp's, as an atomic is, is of what was stored before the warps `met`.
        """
        flying, left = self.program.launch.flying, []
        for flight in self.unordered:
            if (array is not None and flight.array is not array) or (met and not flight.met):
                left.append(flight)
            elif flight in flying:
                flying.remove(flight)
                flight.land()
        self.unordered = left

    def end(self) -> None:
        self.ended = True
        self.publish()
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
    """All programs of a launch, and the copies and stores that are in flight."""

    def __init__(self, kernel: Kernel, grid: int, registers: list, generator: random.Random):
        self.kernel = kernel
        self.grid = grid
        self.random = generator
        self.flying: list[Flight] = []
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
        """One of those in flight, whichever."""
        flight = self.flying.pop(int(self.random.random() * len(self.flying)))
        try:
            flight.land()
        except Fault as fault:
            raise Fault(f"{flight.what}: {fault}") from None

    def any_moves(self) -> bool:
        """Whether a bulk copy lands, or anybody goes on, if each has a turn."""
        if self.flying:
            self.land()
            return True
        moved = [self.step(agent) for agent in list(self.agents)]  # each of them
        return any(moved)

    def check_end(self, program: Program) -> None:
        """If the program has ended, nothing of it is in flight."""
        if any(agent.program is program for agent in self.agents):
            return
        for flight in self.flying:
            if flight.program is program:
                raise Fault(f"program {program.number} ends while {flight.what} is in flight")

    def report(self) -> str:
        lines = []
        for agent in self.agents[:24]:
            text, *places = agent.waits
            lines.append(f"  {agent.where(self.kernel)} waits {text.format(*places)}")
        return "\n".join(lines)


def launch(kernel: Kernel, arguments: Mapping[str, Any], grid: int, seed: int) -> Launch:
    """Run with these arguments, by the parameters' names, in `grid` programs.

    Tensors are numpy arrays, float32 for 16-bit elements, of values that these have; they are
    changed in place. Raises `Fault`, with where and what.
    """
    registers, arrays = list(kernel.registers), {}
    for parameter, kind in kernel.function.parameters.items():
        name = parameter.removeprefix("%")
        if kind.kind in ("tensordesc", "pointer"):
            if name not in arguments:
                raise TypeError(f"no argument {name}")
            array = arrays[name] = Array(name, arguments[name], kind.element)
            value = array if kind.kind == "tensordesc" else Pointer(array, 0)
        elif name in arguments:
            value, divisor = arguments[name], kernel.function.divisible.get(parameter)
            if divisor and value % divisor:
                raise TypeError(f"{name} = {value}: compiled for multiples of {divisor}")
        else:
            continue  # of a descriptor: its shape and strides
        registers[kernel.names[parameter]] = value
    made = Launch(kernel, grid, registers, random.Random(seed))
    made.arrays = arrays
    made.run()
    return made
