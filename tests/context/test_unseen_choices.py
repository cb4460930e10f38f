"""Calls whose layout an attribute of the model chooses, which no argument shows."""

from typing import Any

import pytest
import torch
from rows_cases import NAMES, Native, Peft
from torch import Tensor, nn

K = 8


class Chooses(nn.Module):
    """Time first or sequences first, by an attribute of itself or of what is in it."""

    mode = 0

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode:
            return self.proj(x.transpose(0, 1).contiguous()).transpose(0, 1)
        return self.proj(x)


class Within(nn.Module):
    """The same, two modules deep."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Chooses())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("way", [Native, Peft])
@pytest.mark.parametrize("kind", [Chooses, Within])
@pytest.mark.parametrize("values", [(0, 1), (False, True), ("", "time")])
@pytest.mark.parametrize("named", [False, True])
def test_an_attribute_chooses(way: Any, kind: type[nn.Module], values: Any, named: bool) -> None:
    """Each row has its own adapter before and after it is flipped, in either order."""
    torch.manual_seed(0)
    for first, second in (values, values[::-1]):
        model = kind().double()
        run = way(model, ["proj"])
        chooser = next(m for m in model.modules() if isinstance(m, Chooses))
        x = torch.randn(4, 4, K, dtype=torch.float64)
        for value in (first, second, first):
            chooser.mode = value
            with torch.no_grad():
                together = run(NAMES, **({"x": x} if named else {})) if named else run(NAMES, x)
                alone = [run([n], x[i : i + 1])[0] for i, n in enumerate(NAMES)]
            assert torch.allclose(together, torch.stack(alone)), value


def test_counters_are_no_choice() -> None:
    """A model that counts its calls is not followed in each."""
    model = Chooses().double()
    run = Native(model, ["proj"])
    model.register_forward_pre_hook(lambda m, _: setattr(m, "calls", getattr(m, "calls", 0) + 1))
    x = torch.randn(2, 3, K, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(30):
            run(["a", "b"], x)
    assert 0 < len(run.bank.store.learned.kinds) < 15
