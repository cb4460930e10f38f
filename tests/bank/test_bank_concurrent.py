"""100,000 adapters in a bank that is changed while four threads call it.

The layers are such that a row's output says whose core it went through: an adapter's cores are a
number times a pattern, the number names the adapter and its version, and every result is exact.
"""

import random
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fused_lowrank import adapt
from fused_lowrank.bank import AdapterBank

COUNT, CHANGES, THREADS, ROWS, SPARE = 100_000, 10_000, 4, 32, 2_000
D, R, VERSIONS = 32, 4, 16
PATTERN = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 3, 0]])
SUMS = PATTERN.sum(0)  # of ones: what a row is, over the number


class Both(nn.Module):
    """Two layers side by side, so that a row shows the cores of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(2, …, D)."""
        return torch.stack([self.first(x), self.second(x)])


def model_of() -> nn.Module:
    """x's first four columns go through the core, and nothing else."""
    model = adapt(Both().eval(), target_modules=["first", "second"], r=R, progress=False)
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight.zero_()
            layer.down.copy_(torch.eye(R, D))
            layer.up.copy_(torch.eye(D, R))
    return model


def number(name: int, version: int) -> int:
    """At most 1,600,000: three times that is exact in float32."""
    return name * VERSIONS + version


def cores(numbers: Tensor) -> Tensor:
    """(n,) → (n, R, R)."""
    return numbers[:, None, None] * PATTERN


def numbers_of(y: Tensor) -> list[int]:
    """What the rows say, (2, n, D) → n; both layers and all columns must say the same."""
    found = y[0, :, 0]
    assert torch.equal(y[:, :, :R], (found[:, None] * SUMS).expand(2, -1, -1)), "torn"
    assert not y[:, :, R:].any()
    return found.long().tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of all adapters in version 1."""
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    bank = AdapterBank.from_model(model_of(), slots=COUNT)
    numbers = torch.tensor([float(number(name, 1)) for name in range(COUNT)])
    each = cores(numbers), None, torch.ones(COUNT)
    bank.put([str(name) for name in range(COUNT)], {"first": each, "second": each})
    began = time.perf_counter()
    bank.save(path)
    print(f"save: {time.perf_counter() - began:.2f} s")
    return path


def test_changes_beside_calls(path: Path, tmp_path: Path) -> None:
    """Each row is one of the versions that were current during its call; nothing is lost."""
    model = model_of()
    bank = AdapterBank.from_model(model, slots=COUNT + SPARE)
    began = time.perf_counter()
    bank.load(path, progress=False)
    print(f"load: {time.perf_counter() - began:.2f} s")
    begun, done = [1] * COUNT, [1] * COUNT  # the version of each that is put in, and that is in
    hot = range(0, COUNT, COUNT // 1000)  # the names that change most
    errors, calls, over = [], [0] * THREADS, threading.Event()
    ones = torch.ones(ROWS, D)

    def call(thread: int) -> None:
        pick = random.Random(thread)
        often = [[pick.choice(hot) for _ in range(ROWS)] for _ in range(4)]
        try:
            while not over.is_set():
                names = [pick.choice(hot) for _ in range(ROWS - 8)] + pick.sample(range(COUNT), 8)
                if calls[thread] % 3 == 0:  # names that were asked for before
                    names = pick.choice(often)
                alone = calls[thread] % 4 == 0
                names = names[:1] * ROWS if alone else names
                oldest = [done[name] for name in names]
                given = str(names[0]) if alone else [str(name) for name in names]
                with torch.set_grad_enabled(thread % 2 == 0), bank.use(given):
                    y = model(ones)
                newest = [begun[name] for name in names]
                for name, low, high, found in zip(
                    names, oldest, newest, numbers_of(y), strict=True
                ):
                    assert number(name, low) <= found <= number(name, high), (name, found)
                calls[thread] += 1
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=call, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    began, pick = time.perf_counter(), random.Random(99)
    try:
        for i in range(CHANGES):
            name = pick.choice(hot) if i % 2 else pick.randrange(COUNT)
            if done[name] == VERSIONS - 1:
                continue
            begun[name] += 1
            core = cores(torch.tensor([float(number(name, begun[name]))]))[0]
            bank.replace(str(name), {"first.core": core, "second.core": core})
            done[name] += 1
            if i == CHANGES // 2:
                bank.save(tmp_path / "meanwhile")
            assert not errors
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    took = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{CHANGES} changes beside {sum(calls)} calls: {took:.1f} s; {memory:.0f} MiB at most")
    assert not errors
    assert min(calls) > 10

    expected = [number(name, version) for name, version in enumerate(done)]
    assert everything(bank, model) == expected
    assert bank.names == [str(name) for name in range(COUNT)]
    bank.remove("0")
    assert len(bank.store._free) == SPARE + 1

    bank.close()
    other = AdapterBank.from_model(model, slots=COUNT)
    other.load(tmp_path / "meanwhile", progress=False)
    found = everything(other, model)
    assert all(n // VERSIONS == i and n <= expected[i] for i, n in enumerate(found))
    assert sum(n % VERSIONS - 1 for n in found) in range(CHANGES // 3, CHANGES // 2 + 2)


def everything(bank: AdapterBank, model: nn.Module) -> list[int]:
    """The numbers of all adapters, by one call."""
    with bank.use([str(name) for name in range(COUNT)]):
        return numbers_of(model(torch.ones(COUNT, D)))
