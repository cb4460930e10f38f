"""The bench tells the truth of DoRA: what is checked, what is saved, what is reported."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import report
from bench.support import cases, harness
from bench.support.providers import PROVIDERS
from bench.support.tensors import make_tensors

CPU = torch.device("cpu")
CASE = cases.parse("tiny", "square", 8, "fp32")


@pytest.mark.parametrize("case", cases.SETS["smoke"][:3], ids=lambda case: case.name)
def test_dora_is_checked_and_costs_one_vector(case):
    """What is saved: t, x for a trained down, the gain; and the result, which is there anyway."""
    tensors, saved = make_tensors(case, CPU), {}
    for name in ("eager-dora", "auto-dora", "peft-dora"):
        provider = PROVIDERS[name]
        if provider.why_absent(case, CPU) is None:
            truth = harness.make_truth(case, tensors, provider.equation, not provider.own_mask)
            runner = harness.Runner(provider, case, tensors, provider.build(case, tensors))
            runner.check(truth)
            saved[name] = harness.saved_bytes(runner.forward(0), tensors.fixed_storages())
    columns = case.p + case.n + (case.k if case.method == "lora" else 0)
    assert saved["auto-dora"] == case.rows * columns * case.torch_dtype.itemsize + case.n * 4


@pytest.mark.parametrize("name", ["auto-dora", "eager-dora", "peft-dora"])
def test_a_layer_that_forgets_the_gain_is_refused(name):
    tensors, provider = make_tensors(CASE, CPU), PROVIDERS[name]
    plain = PROVIDERS["eager" if provider.equation.startswith("method") else "eager-lora"]
    call = plain.build(CASE, tensors)
    truth = harness.make_truth(CASE, tensors, provider.equation, False)

    def forgets(x: torch.Tensor) -> torch.Tensor:
        return call(x) + 0.0 * tensors.magnitude.sum()

    with pytest.raises(harness.WrongResult, match="error of y"):
        harness.Runner(provider, CASE, tensors, forgets).check(truth)


def test_dora_is_reported_beside_the_same_provider_without_it():
    device = report.Device({"device": "x"})
    rows = [
        {"provider": name, "status": "ok", "step": [1.0] * 3, "relative": {"step": [value] * 3}}
        for name, value in {"auto": 1.1, "auto-dora": 1.21, "peft-lora": 1.5}.items()
    ]
    line = {"kind": "case", "case": "c", "rows": rows}
    device.add([line, {"kind": "end", "missing": 0}])
    assert "| c | 1.10 | – | – |" in report.dora_text(device)
