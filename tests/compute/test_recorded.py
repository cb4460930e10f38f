"""The results of small calls by every plan have the bits that were recorded (recorded.py)."""

import pytest

pytest.importorskip("triton")

import recorded
import torch

BEFORE = recorded.recorded()
RENEW = "If this was meant to change: python tests/support/recorded.py --write"


@pytest.mark.parametrize("name", recorded.CASES)
def test_a_result_has_the_bits_that_were_recorded(name: str, device: torch.device) -> None:
    """y and each gradient, bit for bit; of -0 and 0 only one is told."""
    if device.type != "cpu":
        pytest.skip("recorded in Triton's interpreter")
    now, before = recorded.pictures(name), BEFORE[name]
    assert list(now) == list(before), f"{name}: another set of results. {RENEW}"
    differing = [
        f"{name}: {tensor} was\n    {before[tensor]}\nand is\n    {now[tensor]}"
        for tensor in now
        if now[tensor] != before[tensor]
    ]
    assert not differing, "\n".join([*differing, RENEW])


def test_the_file_and_the_cases_have_the_same_names() -> None:
    """In the same order, so that a renewed file differs where results do."""
    assert list(recorded.CASES) == list(BEFORE), RENEW
