"""adapter_names of models of fuse_lora: of the calling thread, followed to each layer's rows."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel

from fused_lowrank import declare_rows
from fused_lowrank.integrations.peft import fuse_lora, unfuse_lora
from fused_lowrank.integrations.peft.mixed import Entries, Hooks


class TimeFirst(nn.Module):
    """A layer that sees time first between two that do not, and one that sees flattened rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.lin = nn.Linear(8, 8), nn.Linear(8, 8)
        self.flat, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(self.inp(x).transpose(0, 1)).transpose(0, 1)
        return self.head(self.flat(x.reshape(-1, 8)).reshape(x.shape).tanh())


def tuned() -> nn.Module:
    """With adapters a and b."""
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["inp", "lin", "flat"], "init_lora_weights": False}
    model = get_peft_model(
        TimeFirst().double(), LoraConfig(**settings, modules_to_save=["head"]), adapter_name="a"
    )
    model.add_adapter("b", LoraConfig(**settings, modules_to_save=["head"]))
    return fuse_lora(model).eval()


def each_alone(model: nn.Module, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Every sequence by a call of its own, without adapter_names."""
    rows = []
    for one, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(one[None])[0])
        else:
            model.set_adapter(name)
            rows.append(model(one[None])[0])
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("time", [4, 3, 8, 1])
def test_rows_are_followed(time: int) -> None:
    """As many positions as sequences, fewer, twice as many: each sequence is as it is alone."""
    model, names = tuned(), ["a", "b", "__base__", "b"]
    x = torch.randn(4, time, 8, dtype=torch.float64)
    expected = each_alone(model, x, names)
    for _ in range(2):  # followed, and remembered
        torch.testing.assert_close(model(x, adapter_names=names), expected)


@torch.no_grad()
def test_rows_that_are_declared() -> None:
    """What cannot be followed, said; it is an error without."""
    model, names = tuned(), ["a", "b", "__base__"]
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    expected = each_alone(model, x, names)
    lin = model.base_model.model.lin
    order = torch.tensor([4, 0, 3, 5, 1, 2])  # in which a kernel of its own would hand rows over

    def handed(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        rows = args[0].transpose(0, 1).reshape(6, 8).numpy()
        return (torch.from_numpy(rows[order.numpy()]),)

    def back(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        return y[order.argsort()].view(3, 2, 8).transpose(0, 1)

    lin.register_forward_pre_hook(handed)
    lin.register_forward_hook(back)
    with pytest.raises(ValueError, match="declare_rows"):
        model(x, adapter_names=names)
    flat = model.base_model.model.flat  # what it sees comes of that
    with declare_rows(lin, order // 2), declare_rows(flat, [0, 0, 1, 1, 2, 2]):
        torch.testing.assert_close(model(x, adapter_names=names), expected)


@torch.no_grad()
def test_two_threads() -> None:
    """Neither meets the other's names, nor does a call without names."""
    model, errors = tuned(), []
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    calls = [["a", "b", "b", "a"], ["b", "__base__", "a", "a"], None]
    model.set_adapter("a")
    expected = [model(x) if names is None else each_alone(model, x, names) for names in calls]
    model.set_adapter("a")
    entered = threading.Barrier(len(calls))

    def inside(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        entered.wait(30)  # so that all hooks are there

    handle = model.base_model.model.register_forward_pre_hook(inside)

    def run(names: list[str] | None, wanted: torch.Tensor) -> None:
        try:
            with torch.no_grad():
                got = model(x) if names is None else model(x, adapter_names=names)
            torch.testing.assert_close(got, wanted)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(calls, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert not errors, errors


@pytest.mark.parametrize("hook", ["begin", "give"])
def test_hooks_that_are_half_registered(hook: str) -> None:
    """PyTorch calls one without keywords on another thread, in the moment of its registration."""
    call = getattr(Hooks(Entries(["a", "b"])), hook)
    assert call(nn.Linear(2, 2), (torch.ones(2),)) is None


REFUSED: dict[str, tuple[Callable[[nn.Module, torch.Tensor], object], str]] = {
    "unknown": (lambda m, x: m(x, adapter_names=["a", "x", "a", "b"]), "non-existing adapter"),
    "too few": (lambda m, x: m(x, adapter_names=["a", "b"]), "Length of `adapter_names`"),
    "training": (lambda m, x: m.train()(x, adapter_names=["a"] * 4), "training mode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    """As PEFT does."""
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(tuned(), torch.randn(4, 3, 8, dtype=torch.float64))


def test_unfused() -> None:
    """The tuner is PEFT's own again."""
    model = tuned()
    assert type(model.base_model) is not LoraModel
    assert isinstance(model.base_model, LoraModel)
    unfuse_lora(model)
    assert type(model.base_model) is LoraModel
