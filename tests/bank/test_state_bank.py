"""State under a bank: what is loaded, written or pruned there, and failures half way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import OutOfMemoryError, failing
from state_cases import QUIET, D, adapted, state, tiny
from tiny_model import same
from torch import nn

from fused_lowrank import AdapterBank, export_lora, load_adapter, merge, save_adapter, unmerge


@pytest.fixture
def banked(tmp_path: Path) -> tuple[Any, AdapterBank, Callable[[], torch.Tensor], Any]:
    """(model, bank with "alice", her logits, a model of other frozen factors)."""
    model, tokens = adapted("lora_mini"), torch.arange(5)
    save_adapter(model, tmp_path / "alice")
    bank = AdapterBank.from_model(model, slots=4)
    bank.add("alice", tmp_path / "alice")

    def alice() -> torch.Tensor:
        with bank.use("alice"):
            return model(tokens)

    return model, bank, alice, adapted("lora_mini", seed=1)


LOADS: dict[str, Callable[..., Any]] = {
    "load_adapter": lambda m, o, path: (save_adapter(o, path), load_adapter(m, path, **QUIET)),
    "load_state_dict": lambda m, o, _: m.load_state_dict(o.state_dict()),
    "assigned": lambda m, o, _: m.load_state_dict(o.state_dict(), assign=True),
    "of a part": lambda m, o, _: m.body.load_state_dict(o.body.state_dict()),
    "of a layer": lambda m, o, _: m.body.down.load_state_dict(o.body.down.state_dict()),
    "another base": lambda m, _, __: m.load_state_dict(tiny(8).state_dict(), strict=False),
    "merged": lambda m, o, _: m.load_state_dict(merge(o).state_dict()),
}


@pytest.mark.parametrize("way", LOADS)
def test_loading_under_a_bank(way: str, banked: Any, tmp_path: Path) -> None:
    """Other frozen factors are refused, with nothing changed; what is alike is taken."""
    model, bank, alice, other = banked
    y, before = alice(), state(model)
    with pytest.raises(ValueError, match=r"is in a bank.*(weight|down|up) is to be.*close\(\)"):
        LOADS[way](model, other, tmp_path / "other")
    assert same(state(model), before)
    assert torch.equal(alice(), y)
    bank.close()
    LOADS[way](model, adapted("lora_mini", seed=1), tmp_path / "other")
    assert not same(state(model), before)


def test_loading_what_fits_under_a_bank(banked: Any, tmp_path: Path) -> None:
    """Another core over the same factors is the model's own from then on; alice is as she was."""
    model, bank, alice, _ = banked
    y, tokens = alice(), torch.arange(5)
    other = adapted("lora_mini")
    nn.init.normal_(other.body.up.b_train)
    save_adapter(other, tmp_path / "core")
    for load in (
        lambda: load_adapter(model, tmp_path / "core", **QUIET),
        lambda: model.load_state_dict(other.state_dict()),
    ):
        load()
        assert torch.equal(model(tokens), other(tokens))
        assert torch.equal(alice(), y)
    bank.add("again", tmp_path / "alice")
    merge(model)
    unmerge(model)
    assert torch.equal(alice(), y)


def written(model: Any, other: Any) -> None:
    """In place."""
    with torch.no_grad():
        model.body.up.down.copy_(other.body.up.down)


def assigned(model: Any, other: Any) -> None:
    """Another Parameter."""
    model.body.up.up = nn.Parameter(other.body.up.up.detach().clone())


def by_state_dict(model: Any, other: Any) -> None:
    """Through what shares its memory."""
    model.state_dict()["body.up.down"].copy_(other.body.up.down)


def drawn_again(model: Any, _: Any) -> None:
    """By the method's own start."""
    model.body.up.init_factors()


def emptied(model: Any, _: Any) -> None:
    """New memory for all of it."""
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.zero_()


@pytest.mark.parametrize("change", [written, assigned, by_state_dict, drawn_again, emptied])
def test_writing_under_a_bank(change: Callable[..., None], banked: Any, tmp_path: Path) -> None:
    """What nothing could refuse is noticed before it is used, until it is put back."""
    model, bank, alice, other = banked
    y, before = alice(), state(model)
    change(model, other)
    uses = (
        alice,
        lambda: bank.add("bob", tmp_path / "alice"),
        lambda: bank.add("bob"),
        lambda: bank.save(tmp_path / "bank"),
        lambda: export_lora(bank, tmp_path / "lora", name="alice"),
    )
    for use in uses:
        with pytest.raises(RuntimeError, match=r"has another .*than the bank was made over"):
            use()
    assert bank.names == ["alice"]
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(before[name])
    assert torch.equal(alice(), y)
    bank.add("bob", tmp_path / "alice")


def through_data(model: Any, other: Any) -> None:
    """Which PyTorch does not count."""
    model.body.up.down.data.copy_(other.body.up.down)


def data_itself(model: Any, other: Any) -> None:
    """Other memory for the same Parameter."""
    model.body.down.up.data = other.body.down.up.detach().clone()


def weight_through_data(model: Any, other: Any) -> None:
    """What LoRA-Mini's factors do not depend on, and its adapters do."""
    model.body.up.weight.data.add_(1.0)


def half_through_data(model: Any, other: Any) -> None:
    """The last rows alone, as a shard is loaded."""
    model.body.up.weight.data[D // 2 :] = 0.0


@pytest.mark.parametrize(
    "change", [through_data, data_itself, weight_through_data, half_through_data]
)
def test_writing_through_data_under_a_bank(
    change: Callable[..., None], banked: Any, tmp_path: Path
) -> None:
    """Noticed by who adds, saves or exports, and by a use after that, until it is put back."""
    model, bank, alice, other = banked
    y, before = alice(), state(model)
    change(model, other)
    for use in (
        lambda: bank.add("bob", tmp_path / "alice"),
        lambda: bank.replace("alice"),
        lambda: bank.save(tmp_path / "bank"),
        lambda: export_lora(bank, tmp_path / "lora", name="alice"),
        *([] if "weight" in change.__name__ or "half" in change.__name__ else [alice]),
    ):
        with pytest.raises(RuntimeError, match=r"has another .*than the bank was made over"):
            use()
    for name, value in model.state_dict().items():
        value.data.copy_(before[name])
    assert torch.equal(alice(), y)
    bank.add("bob", tmp_path / "alice")


def test_a_base_that_is_pruned_under_a_bank(banked: Any, tmp_path: Path) -> None:
    """Its adapters act on W as it is; what comes in or goes out is refused, until W is put back."""
    model, bank, alice, _ = banked
    with torch.no_grad():
        before = model.body.up.weight.clone()
        model.body.up.weight.mul_(0.5)
    alice()
    for use in (
        lambda: bank.add("bob"),
        lambda: bank.add("bob", tmp_path / "alice"),
        lambda: bank.save(tmp_path / "bank"),
    ):
        with pytest.raises(RuntimeError, match=r"has another weight than the bank was made over"):
            use()
    with torch.no_grad():
        model.body.up.weight.copy_(before)
    bank.add("bob", tmp_path / "alice")


def test_a_bank_under_another_dtype(banked: Any) -> None:
    """A model that is rounded is still the one that the bank was made over."""
    model, bank, alice, _ = banked
    y = alice()
    model.bfloat16().float()
    torch.testing.assert_close(alice(), y, rtol=0.05, atol=0.05)
    bank.add("new")


def test_bank_that_fails(banked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """add, replace and load that run out of memory leave the bank's names, slots and logits."""
    _, bank, alice, _ = banked
    bank.save(tmp_path / "bank")
    y = alice()
    calls = (
        lambda: bank.add("bob", tmp_path / "alice"),
        lambda: bank.replace("alice", adapted("lora_mini")),
        lambda: AdapterBank.load(bank, tmp_path / "bank", **QUIET),
    )
    for call in calls:
        if call is calls[-1]:
            bank.remove("alice")
        names, free = bank.names, list(bank.store._free)
        with monkeypatch.context() as patch:
            failing(patch, torch.Tensor, "to", 3)
            with pytest.raises(OutOfMemoryError):
                call()
        assert bank.names == names
        assert sorted(bank.store._free) == sorted(free)
        call()
    assert torch.equal(alice(), y)
