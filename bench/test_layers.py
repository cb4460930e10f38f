"""`pytest bench/`: the smoke set by pytest-benchmark, anywhere. Figures come from run.py."""

import pytest
import torch

from bench import bank
from bench.support.bank_cases import BANK_SETS, BankCase, make_batch
from bench.support.bank_providers import BANK_PROVIDERS, BankProvider
from bench.support.cases import SETS, Case
from bench.support.harness import Runner, make_truth, prepare
from bench.support.providers import PROVIDERS, Absent, Provider
from bench.support.tensors import make_tensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK = [provider for provider in PROVIDERS.values() if not provider.slow]


@pytest.mark.parametrize("provider", QUICK, ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", SETS["smoke"], ids=lambda case: case.name)
def test_step(benchmark, case: Case, provider: Provider):  # type: ignore[no-untyped-def]
    """Forward and backward, checked first; peak and saved bytes and the error as extra_info."""
    if why := provider.why_absent(case, DEVICE):
        pytest.skip(why)
    tensors = make_tensors(case, DEVICE)
    try:
        runner = Runner(provider, case, tensors, provider.build(case, tensors))
    except Absent as error:
        pytest.skip(str(error))
    truth = make_truth(case, tensors, provider.equation, not provider.own_mask)
    with provider.pinned():
        row = prepare(runner, truth, DEVICE)

    def step() -> None:
        with provider.pinned():
            runner.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = case.name
    benchmark.extra_info.update(peak=row["peak"], saved=row["saved"], error=row["error"])
    benchmark.pedantic(step, rounds=10, iterations=1, warmup_rounds=2)


@torch.no_grad()
@pytest.mark.parametrize("provider", BANK_PROVIDERS.values(), ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", BANK_SETS["smoke"], ids=lambda case: case.name)
def test_mixed_batch(benchmark, case: BankCase, provider: BankProvider):  # type: ignore[no-untyped-def]
    """A forward, checked first; the error as extra_info."""
    if why := provider.why_absent(case, DEVICE):
        pytest.skip(why)
    batch = make_batch(case, DEVICE)
    with provider.pinned():
        runner = bank.Runner(provider, batch, provider.build(batch))
        error = runner.check(bank.make_truth(batch, provider.equation))

    def forward() -> None:
        with provider.pinned():
            runner.forward(0)()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = case.name
    benchmark.extra_info.update(error=error)
    benchmark.pedantic(forward, rounds=10, iterations=1, warmup_rounds=2)
