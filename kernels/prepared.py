"""`Prepared` launches a compiled kernel by the function in C that Triton's launcher calls (NVIDIA).

How that function is called is not written down here: it is recorded. Triton's launcher is given a
recorder in its place, and marks in the place of whatever differs between launches: the stream,
hooks, addresses, some numbers. Each mark must come out exactly once; what is not a mark is passed
on as it was. So it is with what fills tensor maps: it is called again with another address.

Where anything is not as expected, `Unknown` is raised, and the caller stays with ordinary launches.
"""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

from triton import knobs
from triton.runtime import driver

STATE = ("stream", "metadata", "enter", "exit")  # what a launcher is given besides the operands
FILLS = ("fill_tma_descriptor_tiled", "fill_tma_descriptor")  # of Triton 3.7, and of 3.6
SCRATCH = ("global_scratch_size", "profile_scratch_size")
RECORDING = threading.Lock()


class Unknown(Exception):
    """This Triton does not launch in the way that is known here."""


class Mark(str):
    """The name of an operand, in its place while a launch is recorded."""


def need(condition: Any, what: str) -> None:
    """Raise Unknown unless the condition holds."""
    if not condition:
        raise Unknown(what)


def is_mark(value: Any) -> bool:
    """Whether this stands for an operand; a kernel's arguments may be of any type."""
    return type(value) is Mark


class Prepared:
    """A launch of `compiled`, which an ordinary launch over `grid` has returned.

    `arguments` are that launch's, by name; pointers, tensor descriptors and the numbers named in
    `varying` are operands. `fills` has, for each descriptor, the function from an address to its
    tensor map, of the same sizes.
    """

    def __init__(
        self,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: dict[str, Any],
        varying: tuple[str, ...],
    ) -> None:
        from triton.backends.nvidia.driver import CudaLauncher

        self.compiled, self.grid, self.driver = compiled, (*grid, 1, 1)[:3], driver.active
        run, function, signature = compiled.run, compiled.src.fn, compiled.src.signature
        need(type(run) is CudaLauncher, "its launcher")
        need(all(getattr(run, name, 1) == 0 for name in SCRATCH), "scratch of a kernel's own")
        need(function.launch_metadata is None and not function.pre_run_hooks, "hooks of a kernel")
        kinds = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        need(all(isinstance(kind, str) for kind in kinds.values()), "a tuple of arguments")
        described = [name for name, kind in kinds.items() if kind.startswith("tensordesc")]
        marked = [name for name, kind in kinds.items() if kind[0] == "*" or name in varying]
        given = [Mark(n) if n in marked else arguments.get(n) for n in signature]
        with RECORDING:
            call = self.recorded(given, [(name, arguments[name].base) for name in described])
        # From Triton 3.7 on the kernel's arguments are one sequence, the last that is passed.
        nested = type(call[-1]) in (tuple, list)
        self.flat = len(call) - 1 if nested else None
        self.values = [*call[:-1], *call[-1]] if nested else call
        found = sorted(filter(is_mark, self.values))
        need(found == sorted([*STATE, *marked, *described]), f"the operands {found}")
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # An empty chain of hooks calls nobody; whatever else there is, is called.
        self.chains: list[Any] = [h if hasattr(h, "calls") else self for h in hooks]

    def recorded(self, given: list[Any], described: list[tuple[str, Any]]) -> list[Any]:
        """The arguments of the function in C, a mark in the place of each tensor map too."""
        calls: list[tuple[Any, ...]] = []
        probe, native = copy.copy(self.compiled.run), self.compiled.run.launch
        probe.launch = lambda *args: calls.append(args)
        if isinstance(native, types.FunctionType):  # fills tensor maps, and calls that in C
            code, cells = native.__code__, list(native.__closure__ or ())
            need("launcher" in code.co_freevars, "what fills tensor maps")
            at = code.co_freevars.index("launcher")
            native, cells[at] = cells[at].cell_contents, types.CellType(probe.launch)
            wrapper = self.compiled.run.launch
            probe.launch = types.FunctionType(code, wrapper.__globals__, closure=tuple(cells))
        need(callable(native) and not isinstance(native, types.FunctionType), "a function in C")
        self.native = native
        stream, *hooks = map(Mark, STATE)
        of_kernel = self.compiled.function, self.compiled.packed_metadata
        with self.seen_filling(bool(described)) as filled:
            probe(*self.grid, stream, *of_kernel, *hooks, *given)
        need(len(calls) == 1 and len(filled) == len(described), "one launch")
        *call, last = calls[0]
        nested = type(last) in (tuple, list)
        values = list(last) if nested else [*call, last]
        self.fills: dict[str, Callable[[int], Any]] = {}
        for (name, base), (fill, args, tensor_map) in zip(described, filled, strict=True):
            address, places = base.data_ptr(), [i for i, v in enumerate(values) if v is tensor_map]
            of_base = [i for i, arg in enumerate(args) if type(arg) is int and arg == address]
            need(len(places) == len(of_base) == 1, "a tensor map")
            values[places[0]] = Mark(name)
            before, after = args[: of_base[0]], args[of_base[0] + 1 :]
            self.fills[name] = lambda a, f=fill, b=before, c=after: f(*b, a, *c)  # type: ignore[misc]
        return [*call, values] if nested else values

    @contextmanager
    def seen_filling(self, wanted: bool) -> Iterator[list[tuple[Any, Any, Any]]]:
        """A context that lists (function, arguments, result) of this thread's new tensor maps."""
        filled: list[tuple[Any, Any, Any]] = []
        if not wanted:
            yield filled
            return
        utils, thread = self.driver.utils, threading.get_ident()
        name = next((name for name in FILLS if hasattr(utils, name)), "")
        need(name, "what makes tensor maps")
        fill = getattr(utils, name)

        def seen(*args: Any) -> Any:
            tensor_map = fill(*args)
            if threading.get_ident() == thread:
                filled.append((fill, args, tensor_map))
            return tensor_map

        setattr(utils, name, seen)
        try:
            yield filled
        finally:
            setattr(utils, name, fill)

    def bind(self, names: list[str], instead: dict[str, int]) -> Callable[[list[Any]], None]:
        """The function launch(values); values has a value for each of `names`, and is changed.

        Of two values under one name the later counts. STATE comes first: the stream, and None three
        times, which the hooks replace, if there are any. `instead` gives, for operands without a
        value of their own, the place of the one that they take.
        """
        at = {**{name: i for i, name in enumerate(names)}, **instead}
        constants = [value for value in self.values if not is_mark(value)]
        of_constants = iter(range(len(names), len(names) + len(constants)))
        order = [at[v] if is_mark(v) else next(of_constants) for v in self.values]
        # Of a single place itemgetter would give no tuple: no launch has so few.
        head, tail = itemgetter(*order[: self.flat]), itemgetter(*order[self.flat or 0 :])
        native, nested, runtime = self.native, self.flat is not None, knobs.runtime
        compiled, grid, (no_enter, no_exit) = self.compiled, self.grid, self.chains

        def launch(values: list[Any]) -> None:
            enter, exit = runtime.launch_enter_hook, runtime.launch_exit_hook
            if enter is not no_enter or exit is not no_exit or enter.calls or exit.calls:
                values[1:4] = compiled.launch_metadata(grid, values[0]), enter, exit
            values += constants
            if nested:
                native(*head(values), tail(values))
            else:
                native(*head(values))

        return launch
