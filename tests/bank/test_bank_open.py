"""A model whose bank is open: its layers are not taken away under it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bank_cases import bank_of, model_of, x_of
from torch import nn

from fused_lowrank import AdapterBank, adapt, disable_adapters, unload

TAKEN: dict[str, Callable[[Any], Any]] = {
    "unload": unload,
    "unload, merged": lambda model: unload(model, merge=True),
    "unload of a part": lambda model: unload(nn.Sequential(model.second)),
    "unload within another": lambda model: unload(nn.ModuleDict({"m": model})),
    "unload while disabled": lambda model: disabled(model),
}


def disabled(model: nn.Module) -> None:
    """`unload` where the layers do not act."""
    with disable_adapters(model):
        unload(model)


def parts(model: nn.Module) -> list[Any]:
    """All modules and parameters, and the values of these."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return [list(model.modules()), list(model.parameters()), state, flags]


def same(before: list[Any], after: list[Any]) -> bool:
    """Whether two `parts` are of one model that has not changed."""
    pairs = [*zip(before[0], after[0], strict=True), *zip(before[1], after[1], strict=True)]
    state = all(torch.equal(before[2][name], after[2][name]) for name in before[2] | after[2])
    return all(a is b for a, b in pairs) and state and before[3] == after[3]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("case", TAKEN)
def test_layers_of_an_open_bank_stay(case: str, inside: bool) -> None:
    """The error names a layer and what to do, and nothing has changed, in a `use` or outside."""
    model, bank = bank_of(names="ab")
    x, before = x_of(2), parts(model)
    with torch.no_grad():
        with bank.use(["a", "b"]):
            y = model(x)
        message = r"cannot unload: (first|second) is in a bank.*close\(\) the bank first"
        if inside:
            with bank.use(["a", "b"]):
                with pytest.raises(ValueError, match=message):
                    TAKEN[case](model)
                assert torch.equal(model(x), y)
        with pytest.raises(ValueError, match=message):
            TAKEN[case](model)
        assert same(before, parts(model))
        with bank.use(["a", "b"]):
            assert torch.equal(model(x), y)


def test_an_adapted_model_is_not_adapted_under_its_bank() -> None:
    """Nor does a bank change that."""
    model, bank = bank_of(names="ab")
    before = parts(model)
    for _ in range(2):
        with bank.use(["a", "b"]), torch.no_grad():
            model(x_of(2))
            with pytest.raises(ValueError, match="adapted already"):
                adapt(model, target_modules=["first"], progress=False)
    assert same(before, parts(model))


def test_a_bank_that_is_closed_or_gone_holds_nothing() -> None:
    """Whoever has no bank any more cannot close it; training keeps one."""
    model, bank = bank_of(names="ab")
    bank.close()
    unload(model)
    assert type(model.first) is nn.Linear

    model, bank = bank_of(names="ab")
    trainable = bank.trainable(["a", "b"])
    del bank
    with pytest.raises(ValueError, match="is in a bank"):
        unload(model)
    trainable.close()
    del trainable
    unload(model)
    assert type(model.first) is nn.Linear

    model = model_of("cores")
    with AdapterBank.from_model(model, slots=1).use(None):
        with pytest.raises(ValueError, match="is in a bank"):
            unload(model)
        model(x_of(2))
    unload(model)


def test_a_copy_is_in_no_bank() -> None:
    """Its layers may go, and those of the bank stay."""
    model, bank = bank_of(names="ab")
    unload(copy.deepcopy(model))
    with bank.use(["a", "b"]), torch.no_grad():
        model(x_of(2))


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_peft_around_a_bank(end: str) -> None:
    """PEFT's adapters of other layers come and go; those of the bank stay in it."""
    peft = pytest.importorskip("peft")
    model, bank = bank_of(names="ab")
    x = x_of(2)
    with torch.no_grad():
        with bank.use(["a", "b"]):
            y = model(x)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["head"]))
        with bank.use(["a", "b"]):
            assert torch.equal(wrapped(x), y)  # PEFT's LoRA starts at zero
        plain = getattr(wrapped, end)()
        with bank.use(["a", "b"]):
            assert torch.equal(plain(x), y)


def test_a_bank_made_in_inference_mode() -> None:
    """As a server makes it: adapters come and go outside, and gradients go through them."""
    model = model_of("cores")
    with torch.inference_mode():
        bank = AdapterBank.from_model(model, slots=2)
        bank.add("a", model_of("cores", 1))
    bank.add("b", model_of("cores", 2))
    bank.remove("a")
    bank.add("c", model_of("cores", 3))
    x = x_of(2).requires_grad_()
    with bank.use(["b", "c"]):
        y = model(x)
    expected = torch.stack([model_of("cores", i)(row) for i, row in zip((2, 3), x, strict=True)])
    torch.testing.assert_close(y, expected)
