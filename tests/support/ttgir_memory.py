"""`Shared`, `Barrier` and `Array` are the memory that an executed kernel works on.

Shared memory is kept as it lies, but for the order that Hopper's layouts give to 16-byte pieces
within 8 rows: a tile wider than its swizzle lies in panels of that width, one after the other. So
the same bytes can be read in another shape, as the hardware would, not under another swizzle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from ttgir_parse import Type

CELL = 8  # elements, or fewer, whose state is kept together
BITS = {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "i1": 8, "i8": 8, "i32": 32, "i64": 64}
HELD = {"f64": np.float64, "i32": np.int32, "i64": np.int64}  # all other elements: float32


class Fault(Exception):
    """What the hardware would not have complained of."""


class Deadlock(Fault):
    """Nothing moves, and not all are done."""


def rounded(values: np.ndarray, element: str) -> np.ndarray:
    """The nearest values that `element` has, ties to even, as float32 (float64 for f64)."""
    if element == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if element == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
        return np.where(np.isnan(values), np.float32(np.nan), bits.view(np.float32))
    return values.astype(HELD.get(element, np.float32))


class Barrier:
    """An mbarrier: arrivals that are missing, bytes that are still to land, and its phase."""

    def __init__(self, count: int):
        self.count = count
        self.missing = count
        self.bytes = 0
        self.phase = 0

    def arrive(self, count: int) -> None:
        if count > self.missing:
            raise Fault(f"more arrivals than the barrier counts, which is {self.count}")
        self.missing -= count
        self.turn()

    def expect(self, size: int) -> None:
        self.bytes += size
        self.arrive(1)

    def land(self, size: int) -> None:
        self.bytes -= size
        if self.bytes < 0 and self.missing == 0:
            raise Fault(f"{-self.bytes} bytes more land than the barrier expects")
        self.turn()

    def turn(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.count, self.phase ^ 1

    def __str__(self) -> str:
        state = f"in phase {self.phase}, {self.missing} of {self.count} arrivals missing"
        return state + (f", {self.bytes} bytes still to land" if self.bytes else "")


TAGS: dict[str, int] = {}  # of layouts


@dataclass(frozen=True)
class Layout:
    """How a tile lies: in panels of `width` elements a row, which only `tag` can read again."""

    tag: int
    width: int
    transposed: bool

    @classmethod
    def of(cls, kind: Type) -> Layout:
        columns = kind.shape[-1]
        if "nvmma_shared" in kind.layout:
            swizzle = int(re.search(r"swizzlingByteWidth = (\d+)", kind.layout)[1])
            transposed = "transposed = true" in kind.layout
            if transposed and len(kind.shape) > 1:
                columns = kind.shape[-2]
            width = min(max(swizzle, 16) * 8 // BITS[kind.element], columns)
            name = f"nvmma {swizzle}"
        else:  # whatever it is, who reads it must name the same
            width, transposed, name = columns, False, kind.layout
        return cls(TAGS.setdefault(name, len(TAGS) + 1), width, transposed)


class Shared:
    """One allocation of a program's shared memory: values, and what is going on with them."""

    # The state of a cell: the layout that it was written in (0: never), how many bulk copies have
    # not landed, how many products and bulk stores read it, and whether a fence is missing.
    LANDING, READER, UNFENCED = 1 << 8, 1 << 14, 1 << 24
    LAYOUT, LANDINGS, READERS = LANDING - 1, READER - LANDING, UNFENCED - READER

    def __init__(self, name: str, kind: Type, place: str = ""):
        count = int(np.prod(kind.shape))
        self.name, self.place = name, place  # in the source
        self.element = kind.element
        self.values = np.full(count, np.nan, np.float32)
        self.state = np.zeros(-(-count // CELL), np.int32)
        self.barriers: dict[int, Barrier] = {}
        self.views: dict[tuple, View] = {}

    def view(self, first: int, kind: Type) -> View:
        """A tile of this type that begins at element `first`."""
        key = first, id(kind)  # a function has one object for each type
        found = self.views.get(key)
        if found is None:
            found = self.views[key] = View(self, first, kind)
        return found


class View:
    """A tile, or several, in shared memory."""

    def __init__(self, memory: Shared, first: int, kind: Type):
        self.memory = memory
        self.first = first
        self.kind = kind
        self.count = int(np.prod(kind.shape))
        if kind.element != memory.element:
            raise NotImplementedError(f"{memory.name} of {memory.element} read as {kind.element}")
        if not 0 <= first <= first + self.count <= memory.values.size:
            raise Fault(f"{memory.name} has no {self.count} elements from {first}")
        self.layout = Layout.of(kind)
        self.values = memory.values[first : first + self.count]
        self.state = memory.state[first // CELL : -(-(first + self.count) // CELL)]
        self.shape = kind.shape[::-1] if self.layout.transposed else kind.shape  # as it lies
        self.panels = self.shape[-1] // self.layout.width

    def __str__(self) -> str:
        return f"{self.memory.name}[{self.first // self.count}]{self.memory.place}"

    def read(self, asynchronous: bool) -> np.ndarray:
        """What lies there; not to be changed."""
        mask = Shared.LAYOUT | Shared.LANDINGS | (Shared.UNFENCED if asynchronous else 0)
        if np.any((self.state & mask) != self.layout.tag):
            self.complain(mask)
        if self.panels > 1:
            rows, columns = self.shape  # many tiles at once are not read
            values = self.values.reshape(self.panels, rows, self.layout.width)
            values = values.swapaxes(0, 1).reshape(rows, columns)
        else:
            values = self.values.reshape(self.shape)
        return values.T if self.layout.transposed else values

    def complain(self, mask: int) -> None:
        """Why this cannot be read."""
        state = self.state & mask
        if np.any(state & Shared.LANDINGS):
            raise Fault(f"{self} is read while a bulk copy into it is in flight")
        if not np.all(state & Shared.LAYOUT):
            raise Fault(f"{self} is read and was never written")
        if np.any(state & Shared.UNFENCED):
            raise Fault(f"{self} was stored without a fence_async_shared before it is read")
        raise Fault(f"{self} is read in another layout than it was written in")

    def check_writable(self) -> None:
        """Nobody else reads this or writes it."""
        if np.any(self.state & (Shared.READERS | Shared.LANDINGS)):
            if np.any(self.state & Shared.READERS):
                raise Fault(f"{self} is overwritten while it is read")
            raise Fault(f"{self} is overwritten while a bulk copy into it is in flight")

    def write(self, values: np.ndarray, unfenced: bool) -> None:
        """Store a tile; with `unfenced` the asynchronous units do not see it yet."""
        if values.shape != self.kind.shape:
            raise Fault(f"{values.shape} stored into {self} of {self.kind.shape}")
        if self.layout.transposed:
            values = values.T
        if self.panels > 1:
            rows, _ = self.shape
            values = values.reshape(rows, self.panels, self.layout.width).swapaxes(0, 1)
            self.values.reshape(values.shape)[:] = values
        else:
            self.values.reshape(self.shape)[:] = values
        self.state[:] = self.layout.tag | (Shared.UNFENCED if unfenced else 0)

    def fence(self) -> None:
        self.state &= ~Shared.UNFENCED

    def begin_copy(self) -> None:
        """A bulk copy is on its way; what was there is gone."""
        self.check_writable()
        self.values[:] = np.nan
        self.state[:] = Shared.LANDING

    def hold(self) -> View:
        """Somebody reads it until `release`."""
        self.state += Shared.READER
        return self

    def release(self) -> None:
        self.state -= Shared.READER


class Array:
    """A tensor in global memory, contiguous; the caller's own numbers, which are changed."""

    def __init__(self, name: str, values: np.ndarray, element: str):
        held = HELD.get(element, np.float32)
        if values.dtype != held or not values.flags.c_contiguous:
            raise TypeError(f"{name}: {element} is kept as contiguous {held.__name__}")
        self.name = name
        self.element = element
        self.values = values
        self.flat = values.reshape(-1)
        self.version = 0  # how often it was written

    def check(self, offsets: np.ndarray) -> None:
        if offsets.size and (offsets.min() < 0 or offsets.max() >= self.flat.size):
            raise Fault(f"{self.name} of {self.flat.size} elements is reached outside of them")

    def box(self, block: tuple[int, ...], first: list[int]) -> tuple[tuple, tuple]:
        """Where a bulk copy's block lies: (slices of the tensor, slices of the block)."""
        here, there = [], []
        for size, start, length in zip(self.values.shape, first, block, strict=True):
            low, high = min(max(start, 0), size), min(max(start + length, 0), size)
            here.append(slice(low, high))
            there.append(slice(low - start, high - start) if high > low else slice(0, 0))
        return tuple(here), tuple(there)

    def load(self, block: tuple[int, ...], first: list[int]) -> np.ndarray:
        """A bulk load: zero where there is nothing."""
        here, there = self.box(block, first)
        values = np.zeros(block, self.values.dtype)
        values[there] = self.values[here]
        return values

    def store(self, values: np.ndarray, first: list[int]) -> None:
        """A bulk store: what lies outside is dropped."""
        here, there = self.box(values.shape, first)
        self.values[here] = values[there]
        self.version += 1


class Pointer:
    """An address, or many: an array and the offsets of elements in it."""

    __slots__ = ("array", "offset")

    def __init__(self, array: Array, offset):
        self.array = array
        self.offset = offset
