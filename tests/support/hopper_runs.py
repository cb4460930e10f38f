"""`execute_case` executes the kernels for Hopper, as Triton compiles them for sm_90, on a CPU.

A launch is the library's own: its function is called with tensors on the CPU; what it would launch
is taken, compiled as far as TTGIR, and executed (`ttgir_run`), and the results lie in its tensors.
That takes a process that does not interpret: test_hopper_kernels.py has one.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gate
import hopper_banks
import numpy as np
import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction
from ttgir_kernel import Kernel
from ttgir_memory import Fault
from ttgir_run import launch

from fused_lowrank import kernels as package

SM_90 = GPUTarget("cuda", 90, 32)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAUNCHES = 3  # in a row
TRIES = 6  # runs in which a planted fault is to be seen
SUM = 2.0**-20  # how far sums in fp32 may be off, of the sum of their terms' sizes
SCALE = 1.5


@dataclass(frozen=True)
class Case:
    """A call of a kernel's function, but for the sizes M, N and K."""

    kernel: str  # "gemm_tail" or "relay"
    transposed: bool = False  # as in a backward pass: W lies as (K, N), the factors likewise
    dtype: str = "bf16"
    p: int = 16  # relay
    q: int = 16  # 0: gemm_tail without a tail
    core: str = "bf16"  # relay: its dtype; "one": none; "pair" or "diagonal" of bf16, or "… fp32"
    infinite: bool = False  # the core has an infinity
    bias: bool = False
    gain: bool = False
    want_t: bool = True
    width: int = 128  # of a tile
    stages: int = 3
    parts: int = 2
    group_m: int = 2
    makers: int = 1  # relay: of t
    turned: bool = False  # W lies the other way round than it does in such a pass
    mix: int = 0  # relay: cores to a row, each of a bank's; 0: one core for all
    weighted: bool = False
    repeat: int = 1  # rows to an entry of the bank's
    r: int = 8  # of a pair


@dataclass(frozen=True)
class Planted:
    """A fault to be put into a source, and what is to come of it."""

    file: str
    text: str
    instead: str
    case: Case
    seen: str  # in what is raised, a regular expression


# ---------------------------------------------------------------------------- compiling


def ttgir(ast: Any, options: dict) -> str:
    """What Triton makes of a kernel before registers and LLVM: its own first stages."""
    backend = make_backend(SM_90)
    options = backend.parse_options(dict(options, **ast.parse_options()))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    module = ast.make_ir(SM_90, options, functions, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, ast.language)
    return str(stages["ttgir"](module, {}))


class Executor:
    """What `JITFunction.run` is replaced with, for launches of one case: they are executed."""

    def __init__(self) -> None:
        self.programs = 1  # that run at once
        self.seed = 0
        self.arguments: dict[str, Any] = {}  # of the last launch
        self.compiled: dict[JITFunction, Kernel] = {}

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        assert not args, "launches name their arguments"
        if kernel not in self.compiled:
            ast, options = gate.source(lambda: kernel[grid](**given), gate.TARGETS["sm_90"])
            self.compiled[kernel] = Kernel(ttgir(ast, options))
        self.arguments = given
        self.seed += 1
        execute(self.compiled[kernel], given, grid[0], self.seed)

    def at_once(self, device: torch.device) -> int:
        return self.programs

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            run = lambda *args, **given: self.run(*args, **given)  # noqa: E731
            stack.enter_context(mock.patch.object(JITFunction, "run", run))
            for name in ("gemm_tail_hopper", "relay_hopper", "relay_slices_hopper"):
                patched = mock.patch.object(module(name), "multiprocessors", self.at_once)
                stack.enter_context(patched)
            yield


def execute(kernel: Kernel, arguments: dict[str, Any], programs: int, seed: int) -> None:
    """Run a kernel with a launch's arguments; the tensors that it writes are written."""
    places: dict[str, torch.Tensor] = {}
    given: dict[str, Any] = {}
    for name in (parameter.removeprefix("%") for parameter in kernel.function.parameters):
        value = arguments.get(name)
        if hasattr(value, "base"):  # a descriptor
            value = torch.as_strided(value.base, tuple(value.shape), tuple(value.strides))
        elif isinstance(value, torch.Tensor):
            value = value.view(-1)
        if isinstance(value, torch.Tensor):
            places[name] = value
            value = np.array(value.float() if value.is_floating_point() else value, order="C")
        if value is not None:
            given[name] = value
    addresses = [place.data_ptr() for place in places.values()]
    for name, array in launch(kernel, given, programs, seed).arrays.items():
        if array.version:
            if addresses.count(places[name].data_ptr()) > 1:  # as where a result is not wanted
                raise Fault(f"{name} is written, where another argument lies")
            places[name].copy_(torch.from_numpy(array.values.reshape(places[name].shape)))


# ---------------------------------------------------------------------------- cases


def module(name: str) -> Any:
    """A module of the kernels, as they are now: `planted` puts others in their place."""
    return importlib.import_module(f"{package.__name__}.{name}")


def tile(case: Case) -> Any:
    sides = 128, case.width, 64
    given = {"hopper": True, "parts": case.parts, "makers": case.makers}
    return module("tiles").TileConfig(*sides, 4, case.stages, case.group_m, 168, **given)


class Operands:
    """What a case is computed of, of given sizes; all lie forward here, and a launch turns them."""

    def __init__(self, case: Case, sizes: tuple[int, int, int], seed: int):
        self.case, self.sizes = case, sizes
        self.generator = torch.Generator().manual_seed(seed)
        _, n, k = sizes
        self.weight, self.bias = self.draw(n, k), self.draw(n) if case.bias else None
        self.gain = self.draw(n, kind=torch.float32) if case.gain else None
        self.down, self.up = self.draw(case.p, k), self.draw(n, case.q)
        kind = torch.float32 if "fp32" in case.core else DTYPES[case.dtype]
        self.factors: tuple[torch.Tensor, ...] = ()  # of the core
        slots = (hopper_banks.SLOTS,) if case.mix else ()
        if case.core.startswith("pair"):
            sides = (case.p, case.r), (case.r, case.q)
            self.factors = tuple(self.draw(*slots, *side, kind=kind) for side in sides)
        elif self.diagonal:
            self.factors = (self.draw(*slots, case.p, kind=kind),)
        elif case.core != "one":
            self.factors = (self.draw(*slots, case.p, case.q, kind=kind),)
        if case.infinite:
            self.factors[0].view(-1)[0] = torch.inf
        self.results: dict[int, tuple[torch.Tensor | None, ...]] = {}  # by the seed of x

    def draw(self, *shape: int, kind: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.generator)
        return values.to(kind or DTYPES[self.case.dtype])

    def turned(self, factor: torch.Tensor) -> torch.Tensor:
        return factor.mT.contiguous() if self.case.transposed else factor

    def launch(self, executor: Executor, seed: int) -> float:
        """Compute of the x of a seed; the largest error, as a share of what it may be.

        Raises Fault beyond that, and where the same x has given other bits before.
        """
        self.generator.manual_seed(seed)
        case, x = self.case, self.draw(self.sizes[0], self.sizes[2])
        if case.kernel == "gemm_tail":
            u = self.draw(len(x), case.q) if case.q else None
            y = self.gemm_tail(x, u)
            self.keep(seed, y)
            return self.error_of_y(x, u, y)
        if case.mix:
            kind = case.mix, case.weighted, case.repeat
            self.bank = hopper_banks.Bank(len(x), *kind, self.generator)
        y, t = self.relay(x)
        self.keep(seed, y, t)
        worst = 0.0 if t is None else share("t", t, *self.t_of(x))
        u, off = self.u_of(x, t)
        if case.makers == 1:
            made = executor.arguments["u_ptr"].view(len(x), -1)
            if bool((made[:, case.q :] != 0).any()):
                raise Fault("u is not zero beyond Q")
            made = made[:, : case.q]
            worst = max(worst, share("u", made, u, off), self.error_of_y(x, made, y))
        else:  # u is in shared memory alone
            worst = max(worst, self.error_of_y(x, u, y, off))
        if case.mix and bool(self.bank.refused) != self.bank.refuses:
            raise Fault(f"refused is {int(self.bank.refused)}, not {self.bank.refuses}")
        if bool(executor.arguments["arrivals_ptr"].any()):
            raise Fault("flags are not zero again")
        return worst

    def keep(self, seed: int, *results: torch.Tensor | None) -> None:
        """Remember the bits of results, or hold them to those of the same seed."""
        bits = tuple(result if result is None else result.view(torch.int16) for result in results)
        for found, first in zip(bits, self.results.setdefault(seed, bits), strict=True):
            if found is not None and not torch.equal(found, first):
                raise Fault("other bits than at the first time")

    def turned_weight(self) -> torch.Tensor:
        """(N, K), as the case has it lie."""
        case, weight = self.case, self.weight
        return weight if case.transposed == case.turned else weight.t().contiguous().t()

    def gemm_tail(self, x: torch.Tensor, u: torch.Tensor | None) -> torch.Tensor:
        """y, of a u (M, Q), or without a tail."""
        case, chosen, up = self.case, tile(self.case), None
        if u is not None:
            u = torch.nn.functional.pad(u, (0, module("tiles").padded(case.q) - case.q))
            up = self.turned(self.up)
        operands = x, self.turned_weight(), u, up, self.bias, case.transposed, None
        return module("gemm_tail").gemm_tail(*operands, lambda *_: chosen, self.gain)

    def relay(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(y, t)."""
        case, chosen = self.case, tile(self.case)
        core: Any = [f if self.diagonal else self.turned(f) for f in self.factors]
        core = tuple(core[::-1] if case.transposed else core)
        if case.mix:
            core = self.bank.rows(core)
        else:
            core = core if len(core) == 2 else core[0] if core else None
        factors = self.turned(self.down), core, self.turned(self.up)
        flags = SCALE, case.transposed, case.want_t, lambda *_: chosen, self.gain
        return module("relay").relay(x, self.turned_weight(), *factors, self.bias, *flags)

    def t_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, how far it may be off), in float64."""
        exact = x.double() @ self.down.double().t()
        sums = x.double().abs() @ self.down.double().t().abs() * SUM
        return exact, self.unit * exact.abs() + sums

    def u_of(self, x: torch.Tensor, t: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(u, how far it may be off), in float64: of this t, where it was stored."""
        case, (exact, off) = self.case, self.t_of(x)
        if not self.factors:  # u is made of t before it is rounded
            return SCALE * exact, SCALE * off
        if t is not None and (case.mix or not self.diagonal):  # else of t before it is rounded
            exact, off = t.double(), torch.zeros_like(off)
        core_off = 0.0
        if case.mix:  # a pair's first product stays in float32
            core_off = SUM
        elif self.factors[0].dtype != x.dtype:
            core_off = 2.0**-16  # it is multiplied as two bf16
        elif len(self.factors) == 2:  # its product is rounded
            core_off = self.unit
        u = self.through_core(exact, sizes=False)
        u_off = self.through_core(off, sizes=True)
        u_off += self.through_core(exact.abs(), sizes=True) * (core_off + SUM)
        return u, self.unit * u.abs() + 2 * u_off

    def through_core(self, t: torch.Tensor, sizes: bool) -> torch.Tensor:
        """SCALE · t · core in float64; with `sizes`, that of their sizes."""
        factors = [factor.double().abs() if sizes else factor.double() for factor in self.factors]
        core = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
        core = torch.diag_embed(core) if self.diagonal else core
        return SCALE * (self.bank.through(t, core) if self.case.mix else t @ core)

    def error_of_y(
        self,
        x: torch.Tensor,
        u: torch.Tensor | None,
        y: torch.Tensor,
        off: torch.Tensor | None = None,
    ) -> float:
        """That of y, of the u that it was made of, or of one that may be so far off."""
        pairs = [(x, self.weight), *([] if u is None else [(u[:, : self.case.q], self.up)])]
        exact = sum(a.double() @ b.double().t() for a, b in pairs)
        sums = sum(a.double().abs() @ b.double().t().abs() for a, b in pairs) * SUM
        if off is not None:
            sums = sums + off @ self.up.double().t().abs()
        if self.gain is not None:
            exact, sums = exact * self.gain.double(), sums * self.gain.double().abs()
        if self.bias is not None:
            exact = exact + self.bias.double()
        return share("y", y, exact, self.unit * exact.abs() + 2 * sums)

    @property
    def diagonal(self) -> bool:
        """Whether the core is a diagonal, or that of each row."""
        return self.case.core.startswith("diagonal")

    @property
    def unit(self) -> float:
        """How far the nearest number is off, at most, of the size of what is rounded."""
        return {"bf16": 2.0**-8, "fp16": 2.0**-11}[self.case.dtype]


def share(name: str, found: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> float:
    """The largest error as a share of its bound; raises Fault beyond that."""
    errors = (found.double() - exact).abs() / (bound + 1e-6)  # fp16 is coarser near zero
    errors = errors.where(found != exact, 0.0)  # as where both are infinite
    worst, at = errors.nan_to_num(nan=torch.inf).flatten().max(0)
    if worst > 1:
        row, column = divmod(int(at), found.shape[1])
        raise Fault(
            f"{name}[{row}, {column}] is {found[row, column]}, not {exact[row, column]:.5f}: "
            f"{worst:.3g} times what it may be off"
        )
    return float(worst)


def sizes_of(case: Case, chance: random.Random) -> tuple[int, int, int]:
    """M, N and K of a run: a few tiles, most of them ragged, and enough for all makers."""
    m, more = chance.choice((1, 77, 128, 200, 300)), case.makers - 1
    n = chance.choice((8, case.width, case.width + 8, 2 * case.width, 2 * case.width + 40))
    return m, n + more * case.width, chance.choice((8, 64, 136, 200)) + more * 64


def execute_case(
    case: Case, runs: int, seed: int, sizes: tuple[int, int, int] | None = None
) -> tuple[int, float]:
    """(launches, the largest error as a share of what it may be) of so many runs of a case.

    A run is LAUNCHES launches in a row, of sizes, programs and schedules that the seed gives; the
    last computes what the first has computed.
    """
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN, or the largest integer
    executor, worst, launches = Executor(), 0.0, 0
    chance = random.Random(seed)
    with executor.installed():
        for run in range(runs):
            module("common").arrivals(torch.device("cpu")).zero_()
            chosen = sizes or sizes_of(case, chance)
            operands = Operands(case, chosen, seed + run)
            for number in range(LAUNCHES):
                executor.programs = chance.randint(case.makers, 5)
                executor.seed = chance.getrandbits(32)
                try:
                    worst = max(worst, operands.launch(executor, number % (LAUNCHES - 1)))
                except Fault as fault:
                    what = f"M, N, K = {chosen}, {executor.programs} programs, launch {number}"
                    raise type(fault)(f"{what}: {fault}") from None
                launches += 1
    return launches, worst


@contextlib.contextmanager
def planted(file: str, text: str, instead: str) -> Iterator[None]:
    """The kernels' modules, with one text in one of them replaced."""
    folder = Path(package.__path__[0])
    assert (folder / file).read_text().count(text) == 1, f"{text!r} is not once in {file}"
    before = forget_modules()
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        path = Path(copy, file)
        path.write_text(path.read_text().replace(text, instead))
        package.__path__ = [copy]
        try:
            yield
        finally:
            forget_modules()
            package.__path__ = [str(folder)]
            for name, found in before.items():
                sys.modules[name] = found
                setattr(package, name.rpartition(".")[2], found)


def forget_modules() -> dict[str, Any]:
    """Make the next import of a module of the kernels read its file; those that there were."""
    prefix = f"{package.__name__}."
    found = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(prefix)}
    for name in found:
        package.__dict__.pop(name.removeprefix(prefix), None)
    return found


def execute_planted(fault: Planted, sizes: tuple[int, int, int]) -> None:
    """Some runs of a kernel with a fault in its source; raises what is seen."""
    with planted(fault.file, fault.text, fault.instead):
        execute_case(fault.case, TRIES, 0, sizes)


def execute_apart(case: Case, seed: int) -> None:
    """Whether a row of a bank's keeps its bits, whatever the others are; raises Fault if not."""
    torch.use_deterministic_algorithms(True)
    executor, chance = Executor(), random.Random(seed)
    with executor.installed(), np.errstate(invalid="ignore"):
        operands = Operands(case, (200, case.width + 40, 136), seed)

        def launch(call: Any) -> Any:
            executor.programs, executor.seed = chance.randint(1, 5), chance.getrandbits(32)
            return call()

        hopper_banks.check_apart(operands, launch)


def execute_planted_apart(fault: Planted) -> None:
    """`execute_apart` of a kernel with a fault in its source; raises what is seen."""
    with planted(fault.file, fault.text, fault.instead):
        execute_apart(fault.case, 0)
