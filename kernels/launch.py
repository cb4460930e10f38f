"""`Launch` is all of a kernel's launch but addresses; from the second time on it costs little.

An ordinary launch goes through Triton, which binds the arguments, works out what the kernel was
compiled for, looks it up, and makes tensor maps: for a layer and a shape the same every time. So a
launch is remembered under a key, of whatever its code, its grid and its integers depend on
(`key_of`). The first is an ordinary one; later ones take what it has found (`prepared`), with the
new addresses and what is of the moment: the stream and its counters, whether a graph is being
captured, hooks.

Where Triton launches in another way than is known, there is a warning, once in a process, and
launches stay ordinary ones. In the interpreter and on AMD's GPUs all are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import INTERPRETED, arrivals, cdiv
from .prepared import STATE, Prepared

Tensors = Sequence[torch.Tensor | None]
New = tuple[tuple[int, ...], torch.dtype]  # a tensor to be made: its shape and dtype
Again = Callable[[Sequence[int], Sequence[float]], list[Any]]

POSSIBLE = not INTERPRETED.value and torch.version.hip is None
LAUNCHES: dict[Any, Launch] = {}
MOST = 1024  # launches remembered; one more, and all are forgotten
MOST_MAPS = 256  # tensor maps kept for one operand of a launch
UNIT = 256  # bytes: scratch tensors begin at multiples of it
WARNED: list[str] = []  # at most one, why launches stay ordinary


def key_of(
    kernel: str, tensors: Tensors, *flags: Any, plain: Tensors = ()
) -> tuple[Any, list[int]]:
    """(the key of a launch, the addresses of its tensors); the key is None where none is kept.

    Launches of one key have the same code, grid and integers: `flags` are what these depend on
    besides shapes, dtypes and devices, among them the `Choice` of the tile. Of the addresses the
    key says which are multiples of 16: a kernel may ask that of some of them. The first two tensors
    may have any strides, which count; all others are contiguous.
    """
    runtime = knobs.runtime
    if not POSSIBLE or getattr(runtime, "add_stages_inspection_hook", None) is not None:
        return None, []
    parts: list[Any] = [kernel, flags, runtime.debug, knobs.compilation.instrumentation_mode]
    addresses: list[int] = []
    address, odd, before = 0, 0, None
    for tensor in tensors:
        if tensor is None:
            addresses.append(0)
            parts.append(None)
            continue
        if tensor is before:  # as a matrix is that stands in both places of a pair
            parts.append(True)
        else:
            address, before = tensor.data_ptr(), tensor
            if address & 15:
                odd |= 1 << len(addresses)
            parts += tensor.shape, tensor.dtype, tensor.get_device()
            if len(addresses) < 2:
                parts.append(tensor.stride())
        addresses.append(address)
    for tensor in plain:
        addresses.append(0 if tensor is None else tensor.data_ptr())
    parts.append(odd)
    return tuple(parts), addresses


def layout(shape: Sequence[int], dtype: torch.dtype) -> tuple[Any, Any, torch.dtype]:
    """(shape, strides, dtype) of a contiguous tensor."""
    return tuple(shape), torch.empty(shape, device="meta").stride(), dtype


def maker(device: torch.device) -> Callable[[Any, Any, torch.dtype], torch.Tensor]:
    """The function (shape, strides, dtype) → a new tensor on the current device of this kind.

    Where PyTorch has it, it is what Inductor's code allocates by, past the dispatcher.
    """
    found = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if found is not None:
        return found
    empty = torch.empty_strided
    return lambda shape, strides, dtype: empty(shape, strides, dtype=dtype, device=device)


@dataclass(eq=False)
class Launch:
    """A launch of `kernel` over `grid`, with all arguments but the addresses of its tensors.

    `inputs` names the caller's tensors. The tensors of `results` and `scratch`, by name, are made
    for each launch, those of `scratch` in one piece of memory. An absent tensor is None: the kernel
    is given the first input in its place, as it is for the pointers named by `unread`, which this
    launch does not read. An input named "" is not passed to the kernel.
    """

    kernel: Any  # a JIT function
    grid: tuple[int, ...]
    inputs: tuple[str, ...]
    results: dict[str, New | None]
    numbers: Mapping[str, float | None]
    constants: dict[str, Any]  # compile-time arguments, and the compiler's options
    device: torch.device
    varying: tuple[str, ...] = ()  # numbers that each call gives
    scratch: dict[str, New | None] = field(default_factory=dict)
    blocks: dict[str, tuple[Any, Any, list[int]]] = field(default_factory=dict)  # of descriptors:
    # a shape, strides and a block
    describe: Callable[..., Any] = TensorDescriptor  # makes one of these and a tensor
    unread: tuple[str, ...] = ()
    meets: bool = False  # at `arrivals`
    again: Again | None = None  # makes later launches

    def __call__(
        self, key: Any, tensors: Tensors, addresses: Sequence[int], *varying: float
    ) -> list[Any]:
        """Launch with these tensors; returns the results in their order. `key` is from `key_of`."""
        if self.again is not None and not self.kernel.pre_run_hooks:
            return self.again(addresses, varying)
        made, arguments = self.arguments(tensors, varying)
        compiled = self.kernel[self.grid](**arguments, **self.constants)
        if key is not None and key not in LAUNCHES:
            self.remember(key, compiled, arguments)
        return made

    def arguments(
        self, tensors: Tensors, varying: Sequence[float]
    ) -> tuple[list[Any], dict[str, Any]]:
        """(new results, the arguments of an ordinary launch by name)."""
        made = [
            None if new is None else torch.empty(new[0], dtype=new[1], device=self.device)
            for new in self.results.values()
        ]
        given: dict[str, Any] = dict(zip(self.inputs, tensors, strict=True))
        given.pop("", None)
        given |= zip(self.results, made, strict=True)
        places, size = self.room()
        if size:
            room = torch.empty(size, dtype=torch.uint8, device=self.device)
            for name, (first, last, dtype) in places.items():
                given[name] = room[first:last].view(dtype)
        if self.meets:
            given["arrivals_ptr"] = arrivals(self.device)
        given |= dict.fromkeys(self.without_tensor(), tensors[0])
        for name, (shape, strides, block) in self.blocks.items():
            given[name] = self.describe(given[name], list(shape), list(strides), block)
        return made, {**given, **self.numbers, **dict(zip(self.varying, varying, strict=True))}

    def room(self) -> tuple[dict[str, tuple[int, int, torch.dtype]], int]:
        """(first byte, end and dtype of each scratch tensor in their one piece, its bytes)."""
        places, size = {}, 0
        for name, new in self.scratch.items():
            if new is not None:
                end = size + torch.Size(new[0]).numel() * new[1].itemsize
                places[name] = size, end, new[1]
                size = cdiv(end, UNIT) * UNIT
        return places, size

    def without_tensor(self) -> list[str]:
        """The pointers in whose place the first input lies."""
        made = self.results | self.scratch
        return [*(name for name, new in made.items() if new is None), *self.unread]

    def remember(self, key: Any, compiled: Any, arguments: dict[str, Any]) -> None:
        """Keep this under its key, prepared if Triton is known; `compiled` is what was launched."""
        if not isinstance(compiled, triton.compiler.CompiledKernel):
            return  # nothing was launched, or not yet: a later launch may be remembered
        if self.device.index not in (None, driver.active.get_current_device()):
            return
        try:
            self.again = self.prepared(compiled, {**arguments, **self.constants})
        except Exception as error:
            if not WARNED:
                WARNED.append(f"{type(error).__name__}: {error}")
                warnings.warn(
                    f"Triton {triton.__version__} launches kernels in a way that is not known here "
                    f"({WARNED[0]}): each launch will cost the host more than it has to",
                    stacklevel=2,
                )
        if len(LAUNCHES) >= MOST:
            LAUNCHES.clear()
        LAUNCHES[key] = self

    def prepared(self, compiled: Any, arguments: dict[str, Any]) -> Again:
        """The function (addresses of the inputs, varying numbers) → results of a launch."""
        kernel = Prepared(compiled, self.grid, arguments, self.varying)
        places, size = self.room()
        names = [*STATE, *self.inputs, *self.results, *places]
        names += [*(["arrivals_ptr"] if self.meets else []), *self.varying]
        maps: list[tuple[int, Callable[[int], Any], dict[int, Any]]]
        maps = [(names.index(name), fill, {}) for name, fill in kernel.fills.items()]
        instead = dict.fromkeys(self.without_tensor(), len(STATE))
        launch = kernel.bind([*names, *kernel.fills], instead)
        new = [None if n is None else layout(*n) for n in self.results.values()]
        starts = [first for first, *_ in places.values()]
        active, device, meets, empty = kernel.driver, self.device, self.meets, maker(self.device)
        index = active.get_current_device()

        def again(addresses: Sequence[int], varying: Sequence[float]) -> list[Any]:
            made = [n if n is None else empty(*n) for n in new]
            stream = active.get_current_stream(index)
            values = [stream, None, None, None, *addresses]
            values += [0 if tensor is None else tensor.data_ptr() for tensor in made]
            if size:
                room = empty((size,), (1,), torch.uint8)
                base = room.data_ptr()
                values += [base + start for start in starts]
            if meets:
                counters = arrivals(device, stream)  # held until the launch is made
                values.append(counters.data_ptr())
            values += varying
            for at, fill, filled_before in maps:  # what is in a map follows from the address alone
                address = values[at]
                if (filled := filled_before.get(address)) is None:
                    if len(filled_before) >= MOST_MAPS:
                        filled_before.clear()
                    filled = filled_before[address] = fill(address)
                values.append(filled)
            launch(values)
            return made

        return again
