"""`bank.use` of names again: the same handles without new work, and never a stale one."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_cases import bank_of, close, kinds, model_of, plain, x_of
from torch import Tensor

from fused_lowrank.bank import AdapterBank
from fused_lowrank.bank import inputs as bank_input
from fused_lowrank.bank.assignment import Assignment
from fused_lowrank.bank.recompute import current
from fused_lowrank.bank.sources import cores_of

PAIR = ["a", "b"]


def assignment_of(owner: Any, *given: Any) -> Assignment:
    """The assignment of a `use`; it lives as long as it is held."""
    with owner.use(*given):
        assignment = current(owner.store.key)
    assert assignment is not None
    return assignment


def outputs(x: Tensor, *seeds: int | None) -> Tensor:
    """Rows of x through the adapters of `model_of`."""
    each = [plain if seed is None else model_of("cores", seed) for seed in seeds]
    return torch.stack([call(row) for call, row in zip(each, x, strict=True)])


class Counted:
    """How often a function was called."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.count = call, 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return self.call(*args)


# --- the same names ---


@pytest.mark.parametrize(
    ("names", "again"),
    [
        (["a", None, "b"], ("a", None, "b")),
        ([["a", "b"], [None, "a"]], (("a", "b"), (None, "a"))),
        ([None], [None]),
        (None, None),
    ],
)
def test_the_same_names_are_the_same_tensors(
    names: Any, again: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor is made and goes to the device once, whatever kind of sequence names them."""
    _, bank = bank_of(names="ab")
    made = Counted(torch.from_numpy)
    monkeypatch.setattr(torch, "from_numpy", made)
    first = assignment_of(bank, names)
    before = made.count
    assert before
    for given in (names, again, [*names] if names else names):
        second = assignment_of(bank, given)
        assert second is not first
        assert second.handles is first.handles
        assert second.resolved_slots is first.resolved_slots
    assert made.count == before
    assignment_of(bank, ["b", *names] if names and isinstance(names[0], str) else ["b"])
    assert made.count > before


def test_training_remembers_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapters never change their places, also when the bank's do."""
    _, bank = bank_of(names="ab")
    trainable = bank.trainable(["b", "a"])
    first = assignment_of(trainable, ["a", None, "b"])
    assert first.handles.tolist() == [[1], [-1], [0]]
    bank.replace("a", model_of("cores", 5))
    assert assignment_of(trainable, ("a", None, "b")).handles is first.handles
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'c' is not in training"):
            assignment_of(trainable, ["a", "c"])
        with pytest.raises(ValueError, match=r"\['a'\] is not in training"):
            assignment_of(trainable, [["a"], ["b"]])
    assert assignment_of(bank, ["a", None, "b"]).handles.tolist() != first.handles.tolist()


def test_mixtures_are_not_taken_for_lines() -> None:
    """The same names in other shapes are others."""
    _, bank = bank_of(names="ab")
    shapes = {
        (2, 1): (["a", "b"], [["a"], ["b"]], [("a",), "b"]),
        (1, 2): ([["a", "b"]], (("a", "b"),)),
        (4, 1): (["a", "b", "a", "b"],),
        (2, 2): ([["a", "b"], ["a", "b"]],),
    }
    for _ in range(2):
        for shape, ways in shapes.items():
            for names in ways:
                handles = assignment_of(bank, names).handles
                assert handles.shape == shape
                assert handles.flatten().tolist() == [0, 1] * (handles.numel() // 2)
        for wrong in (["a", ["a", "b"]], [["a"], ["a", "b"]], [[]]):
            with pytest.raises(ValueError, match="a list with a name or None"):
                assignment_of(bank, wrong)


def test_a_list_that_the_caller_changes() -> None:
    """What counts is what it holds when it is entered."""
    model, bank = bank_of(names="ab")
    x, names, mixture = x_of(2), ["a", "b"], [["a"], ["b"]]
    for given, change in ((names, names.reverse), (mixture, mixture[0].reverse)):
        with bank.use(given):
            close(model(x), outputs(x, 1, 2))
            change()
            close(model(x), outputs(x, 1, 2))
    with bank.use(names):
        close(model(x), outputs(x, 2, 1))
    mixture[1][0] = "a"
    with bank.use(mixture):
        close(model(x), outputs(x, 1, 1))
    later = bank.use(names)
    names[:] = ["a", None]
    with later:
        close(model(x), outputs(x, 1, None))


@pytest.mark.parametrize("name", [{1}, {}, [["a"]]])
def test_names_that_cannot_be_looked_up(name: Any) -> None:
    """They are in no bank, before and after others were remembered."""
    _, bank = bank_of(names="ab")
    for _ in range(2):
        assignment_of(bank, ["a", "b"])
        with pytest.raises(ValueError, match=r"is not in the bank|a list with a name or None"):
            assignment_of(bank, ["a", name])


def test_handles_given_out_are_the_callers() -> None:
    """Writing to them changes no `use` of names."""
    model, bank = bank_of(names="ab")
    x = x_of(2)
    for _ in range(2):
        with bank.use(PAIR):
            close(model(x), outputs(x, 1, 2))
        bank.handles(PAIR).fill_(-1)
    assert assignment_of(bank, PAIR).version == 0


def test_made_in_inference_mode() -> None:
    """What a `use` in inference mode has made serves one whose gradients are wanted."""
    model, bank = bank_of(names="ab")
    trainable, x = bank.trainable(PAIR), x_of(2)
    for store in (bank, trainable):
        with torch.inference_mode(), store.use(PAIR):
            model(x)
        grad = x.clone().requires_grad_()
        with store.use(PAIR):
            model(grad).sum().backward()
        assert grad.grad is not None


# --- changes between two uses ---


def replaced(bank: AdapterBank, path: Path) -> None:
    bank.replace("a", model_of("cores", 5))


def removed_and_added(bank: AdapterBank, path: Path) -> None:
    bank.remove("a")
    bank.add("a", model_of("cores", 5))


def its_slot_taken(bank: AdapterBank, path: Path) -> None:
    """Who has the slot now is another."""
    slot = bank.store._slots["a"]
    bank.replace("a", model_of("cores", 5))
    for name in "cdefgh":
        bank.add(name, model_of("cores", 6))
        if bank.store._slots[name] == slot:
            return
    raise AssertionError


def put_at_once(bank: AdapterBank, path: Path) -> None:
    bank.put(["b", "a"], {n: join(bank, n, 2, 5) for n in bank.layers}, new=False)


def join(bank: AdapterBank, layer: str, *seeds: int) -> Any:
    """Some models' cores of a layer."""
    each = [cores_of(bank.store, bank.model, model_of("cores", seed))[layer] for seed in seeds]
    return torch.cat([e[0] for e in each]), None, torch.cat([e[2] for e in each])


def loaded(bank: AdapterBank, path: Path) -> None:
    _, other = bank_of(names="")
    other.add("a", model_of("cores", 5))
    other.save(path)
    bank.remove("a")
    bank.load(path, progress=False)


def committed(bank: AdapterBank, path: Path) -> None:
    trainable = bank.trainable(["a"])
    source = cores_of(bank.store, bank.model, model_of("cores", 5))
    with torch.no_grad():
        for layer, table in trainable.tables.items():
            table.left.copy_(source[layer][0])
    trainable.commit()
    trainable.close()


CHANGES = [replaced, removed_and_added, its_slot_taken, put_at_once, loaded, committed]


@pytest.mark.parametrize("names", [["a", "b"], [["a"], ["b"]], ("a", "b")])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_uses(names: Any, change: Callable, tmp_path: Path) -> None:
    """The second use has the new adapter, and `check` finds nothing."""
    model, bank = bank_of("cores", 8, names="ab")
    x = x_of(2)
    for _ in range(2):
        with bank.use(names):
            close(model(x), outputs(x, 1, 2))
    change(bank, tmp_path / "file")
    for _ in range(2):
        with bank.use(names):
            close(model(x), outputs(x, 5, 2))
    handles = bank.handles(names)
    with bank.use(handles):
        close(model(x), outputs(x, 5, 2))
    assert torch.equal(assignment_of(bank, names).handles, handles)
    bank.check()


def test_a_name_that_is_gone() -> None:
    """It is an error, however often its handle was given; and the others are as they were."""
    model, bank = bank_of(names="ab")
    x = x_of(2)
    for _ in range(2):
        assignment_of(bank, PAIR)
    bank.remove("a")
    for _ in range(2):
        with pytest.raises(ValueError, match="'a' is not in the bank"):
            assignment_of(bank, PAIR)
    with bank.use(["b", None]):
        close(model(x), outputs(x, 2, None))


def test_a_new_name_changes_no_other() -> None:
    """Adding keeps what is remembered: handles of names that are there stay what they are."""
    _, bank = bank_of(names="ab")
    first = assignment_of(bank, PAIR)
    with pytest.raises(ValueError, match="'c' is not in the bank"):
        assignment_of(bank, ["a", "c"])
    bank.add("c", model_of("cores", 3))
    assert assignment_of(bank, PAIR).handles is first.handles
    assert assignment_of(bank, ["a", "c"]).handles.shape == (2, 1)


def test_a_change_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank = bank_of(names="ab")
    x = x_of(2)
    assignment_of(bank, PAIR)
    for change in (lambda: bank.replace("a", {}), lambda: bank.replace("c", model_of("cores", 3))):
        with pytest.raises(ValueError, match=r"lacks|not in the bank"):
            change()
        with bank.use(PAIR):
            close(model(x), outputs(x, 1, 2))


def test_calls_under_way_keep_theirs() -> None:
    """A use that began before a replacement goes on with the old adapter, by handles it shares."""
    model, bank = bank_of(names="ab")
    x = x_of(2)
    assignment_of(bank, PAIR)
    with bank.use(PAIR):
        bank.replace("a", model_of("cores", 5))
        with bank.use(PAIR):
            close(model(x), outputs(x, 5, 2))
        close(model(x), outputs(x, 1, 2))
        with pytest.raises(RuntimeError, match="kept by calls under way"):
            bank.put(list("cd"), {n: join(bank, n, 3, 4) for n in bank.layers})
    bank.put(list("cd"), {n: join(bank, n, 3, 4) for n in bank.layers})
    bank.check()


def test_threads_that_repeat_their_names() -> None:
    """Beside replacements, every row is of a version that was current during its call."""
    model, bank = bank_of("cores", 70, names="ab")
    x, versions = x_of(2), 60
    expected = [outputs(x, 10 + i, 2) for i in range(versions)]
    sources = [cores_of(bank.store, bank.model, model_of("cores", 10 + i)) for i in range(versions)]
    bank.put(["a"], sources[0], new=False)
    begun, done, errors, over = [0], [0], [], threading.Event()

    def call() -> None:
        try:
            while not over.is_set():
                low = done[0]
                with torch.no_grad(), bank.use(PAIR):
                    y = model(x)
                high = begun[0]
                assert any(torch.allclose(y, e, 1e-9, 1e-9) for e in expected[low : high + 1])
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(1, versions):
            begun[0] = i
            bank.put(["a"], sources[i], new=False)
            done[0] = i
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
    assert not errors
    bank.check()


# --- what is kept ---


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In number and in the names of all together; the oldest goes first."""
    _, bank = bank_of(names="ab")
    first = weakref.ref(assignment_of(bank, ["a"]).handles)
    for lines in range(2, bank_input.CACHED + 1):
        assignment_of(bank, ["a"] * lines)
    assert first() is not None
    assignment_of(bank, ["b"])
    assert first() is None
    assert len(bank.store._cache) == bank_input.CACHED
    monkeypatch.setattr(bank_input, "CACHED_NAMES", 100)
    _, bank = bank_of(names="ab")
    kept = [weakref.ref(assignment_of(bank, ["a"] * 40 + ["b"] * i).handles) for i in range(3)]
    assert [ref() is not None for ref in kept] == [False, True, True]
    whole = weakref.ref(assignment_of(bank, ["a"] * 101).handles)  # more than there is room for
    assert whole() is None
    assert [ref() is not None for ref in kept] == [False, True, True]
    bank.remove("b")
    assert len(bank.store._cache) == 0
    assert [ref() is not None for ref in kept] == [False, False, False]
    kept = [weakref.ref(assignment_of(bank, ["a"] * i).handles) for i in (49, 50, 51)]
    assert [ref() is not None for ref in kept] == [False, False, True]


@kinds
def test_it_keeps_no_slot(kind: str) -> None:
    """A slot is free when its uses are over, also that of names that are remembered."""
    model, bank = bank_of(kind, 2, names="ab")
    entered = bank.use(PAIR)
    for _ in range(2):
        with entered:
            model(x_of(2))
    assert not bank.store._running
    bank.replace("b", None) if bank.store._free else bank.remove("a")
    assert list(bank.store._free) == [0]
    with pytest.raises(ValueError, match="'a' is not in the bank"), entered:
        raise AssertionError


def test_what_use_gives_back() -> None:
    """A context manager that may be entered again after its end, but not within; a decorator."""
    model, bank = bank_of(names="ab")
    x = x_of(2)
    entered = bank.use(PAIR)
    with pytest.raises(RuntimeError, match="entered already"), entered, entered:
        raise AssertionError
    assert current(bank.store.key) is None
    with entered:
        close(model(x), outputs(x, 1, 2))

    @bank.use(PAIR)
    def call(depth: int) -> Tensor:
        return model(x) if depth == 0 else call(depth - 1)

    for depth in (0, 2):
        close(call(depth), outputs(x, 1, 2))
    bank.replace("a", model_of("cores", 5))
    close(call(0), outputs(x, 5, 2))
    with pytest.raises(KeyError, match="own"), bank.use(PAIR):
        raise KeyError("own")
    with pytest.raises(RuntimeError, match="was it another model"), entered:
        pass
    assert current(bank.store.key) is None
    gc.collect()
    assert not bank.store._running
