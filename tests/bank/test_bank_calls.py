"""Names, slots and handles of an AdapterBank, and the calls that use them."""

import contextvars
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from bank_cases import bank_of, close, kinds, model_of, picture, plain, x_of
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fused_lowrank import AdapterBank, FusedLoraXSLinear, merge
from fused_lowrank.bank.sources import cores_of

# --- names ---


def test_names() -> None:
    """New ones must be new, others must be there; order and len follow."""
    model, bank = bank_of(names="ab")
    before, other = picture(bank), model_of("cores", 3)
    for name in ("", None, 5, b"a", ("a",)):
        with pytest.raises(ValueError, match="no name: it must be a string"):
            bank.add(name, other)
    with pytest.raises(ValueError, match="'a' is in the bank already: replace it, or remove"):
        bank.add("a", other)
    for unknown in ("c", "A", "", None, ["a"]):
        with pytest.raises(
            ValueError, match=r"is not in the bank, .*holds 2 adapters: bank\.names"
        ):
            bank.replace(unknown, other)
        with pytest.raises(ValueError, match="is not in the bank"):
            bank.remove(unknown)
    for wrong in ("c", ["a", "c"], [["a", "c"]], [["a"], ["c"]]):
        with pytest.raises(ValueError, match="'c' is not in the bank"), bank.use(wrong):
            raise AssertionError
    for wrong in ([[]], [["a"], ["a", "b"]], ["a", ["a", "b"]]):
        with pytest.raises(ValueError, match="a list with a name or None"), bank.use(wrong):
            raise AssertionError
        with pytest.raises(ValueError, match="a list with a name or None"):
            bank.handles(wrong)
    assert picture(bank) == before
    bank.remove("a")
    with pytest.raises(ValueError, match="'a' is not in the bank"):
        bank.remove("a")
    with pytest.raises(ValueError, match="'a' is not in the bank"), bank.use("a"):
        raise AssertionError
    bank.add("a", other)
    assert bank.names == ["b", "a"]
    bank.replace("b", other)
    assert bank.names == ["b", "a"]
    x = x_of(2)
    with bank.use(["a", "b"]):
        close(model(x), other(x))


def test_many_names_at_once() -> None:
    """All of them, or none: one that is there, one that comes twice, an error in the middle."""
    _, bank = bank_of("pairs", 5, names="ab")
    before = picture(bank)
    cores = {
        name: tuple(part.repeat(3, *[1] * (part.dim() - 1)) for part in parts)
        for name, parts in cores_of(bank.store, bank.model, model_of("pairs", 9)).items()
    }
    for names, message in (("cda", "'a' is in the bank"), ("cdc", "'c' comes twice")):
        with pytest.raises(ValueError, match=message):
            bank.put(list(names), cores)
        assert picture(bank) == before
    left, right, scales = cores["second"]
    with pytest.raises((RuntimeError, ValueError)):
        bank.put(list("cde"), {**cores, "second": (left[:2], right, scales)})
    assert picture(bank) == before
    bank.put(list("cde"), cores)
    assert bank.names == list("abcde")
    bank.put([], {})


def test_two_threads_add_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is refused, even where both were free to begin."""
    model, bank = bank_of()
    write, x = bank.store._write, x_of(2)

    def overtaken(*args: Any) -> None:
        monkeypatch.setattr(bank.store, "_write", write)
        bank.add("a", model_of("cores", 2))
        write(*args)

    monkeypatch.setattr(bank.store, "_write", overtaken)
    with pytest.raises(ValueError, match="'a' is in the bank already"):
        bank.add("a", model_of("cores", 1))
    assert len(bank.store._free) == 3
    with bank.use("a"):
        close(model(x), model_of("cores", 2)(x))


# --- slots ---


def test_full() -> None:
    """The error says how many slots would do, and what is kept by calls."""
    model, bank = bank_of("cores", 2, names="ab")
    before = picture(bank)
    full = r"full: 1 slot is needed and 0 of 2 are free\. Make it with slots=3 or more, or remove"
    with pytest.raises(RuntimeError, match=full):
        bank.add("c", model_of("cores", 3))
    with pytest.raises(RuntimeError, match=full):
        bank.replace("a", model_of("cores", 3))
    assert picture(bank) == before
    with bank.use("b"):
        model(x_of(1))
        bank.remove("a")
        with pytest.raises(RuntimeError, match="free, and 1 are kept by calls under way"):
            bank.add("c", model_of("cores", 3))
    bank.add("c", model_of("cores", 3))
    assert bank.names == ["b", "c"]


@pytest.mark.parametrize("names", ["a", ["a", "b"]])
@pytest.mark.parametrize("change", ["replace", "remove"])
def test_a_call_under_way_keeps_its_adapters(names: Any, change: str) -> None:
    """What a thread has begun with stays until it ends, whatever is put in meanwhile."""
    model, bank = bank_of("cores", 4, names="ab")
    began, changed, seen, x = threading.Event(), threading.Event(), [], x_of(2)

    def call() -> None:
        with bank.use(names):
            seen.append(model(x))
            began.set()
            changed.wait(10)
            seen.append(model(x))

    thread = threading.Thread(target=call)
    thread.start()
    began.wait(10)
    if change == "replace":
        bank.replace("a", model_of("cores", 3))
    else:
        bank.remove("a")
    while bank.store._free:
        bank.add(str(len(bank)), model_of("cores", 4))
    with pytest.raises(RuntimeError, match="1 are kept by calls under way"):
        bank.add("one more", model_of("cores", 4))
    changed.set()
    thread.join(10)
    assert torch.equal(seen[0], seen[1])
    expected = [model_of("cores", 1)(x[0]), model_of("cores", 1 if names == "a" else 2)(x[1])]
    close(seen[0], torch.stack(expected))
    bank.add("last", model_of("cores", 5))  # its slot is free now
    if change == "replace":
        with bank.use("a"):
            close(model(x), model_of("cores", 3)(x))


@kinds
@pytest.mark.parametrize("names", ["a", ["a", None, "b"]])
@pytest.mark.parametrize("change", ["replace", "remove"])
def test_a_backward_keeps_its_adapters(kind: str, names: Any, change: str) -> None:
    """A graph reads what its forward read, and the slots are free when it is gone."""
    model, bank = bank_of(kind, 3, names="ab")
    x, used = x_of(3).requires_grad_(), [1, 1, 1] if names == "a" else [1, None, 2]
    sources = [plain if seed is None else model_of(kind, seed) for seed in used]
    expected = torch.stack([f(row) for f, row in zip(sources, x, strict=True)])
    (dx,) = torch.autograd.grad(expected.sum(), x)
    with bank.use(names):
        y = model(x)
    if change == "replace":
        bank.replace("a", model_of(kind, 3))
    else:
        bank.remove("a")
        bank.add("c", model_of(kind, 3))
    if names != "a":  # of one adapter, the graph has a copy
        with pytest.raises(RuntimeError, match="1 are kept by calls under way"):
            bank.add("d", model_of(kind, 4))
    else:
        bank.add("d", model_of(kind, 4))
        bank.remove("d")
    y.sum().backward()
    close(y, expected)
    close(x.grad, dx)
    del y
    gc.collect()
    bank.add("d", model_of(kind, 4))


# --- handles ---


@kinds
def test_handles_of_what_is_gone(kind: str) -> None:
    """They act as None, `check` says so once, and whoever has the slot now is not read."""
    for change in ("remove", "replace"):
        model, bank = bank_of(kind, 3, names="ab")
        handles, x = bank.handles(["a", "b"]), x_of(2)
        assert handles.shape == (2, 1)
        assert handles.dtype == torch.int64
        slot = bank.store._slots["a"]
        if change == "remove":
            bank.remove("a")
        else:
            bank.replace("a", model_of(kind, 3))
        bank.check()
        while slot not in bank.store._slots.values():
            name = f"{len(bank)} more"
            bank.add(name, model_of(kind, 4))
            if slot not in bank.store._slots.values():
                bank.remove(name)
        expected = torch.stack([plain(x[0]), model_of(kind, 2)(x[1])])
        with bank.use(handles):
            close(model(x), expected)
        with pytest.raises(RuntimeError, match="had been replaced or removed"):
            bank.check()
        bank.check()
        (tenant,) = (name for name, taken in bank.store._slots.items() if taken == slot)
        with bank.use(bank.handles([tenant, "b"])):
            close(model(x), torch.stack([model_of(kind, 4)(x[0]), model_of(kind, 2)(x[1])]))
        bank.check()


def test_handles_are_read_when_the_call_runs() -> None:
    """A buffer of handles serves whatever it holds then."""
    model, bank = bank_of(names="ab")
    buffer, x = bank.handles([None, None]), x_of(2)
    with bank.use(buffer):
        close(model(x), plain(x))
        buffer.copy_(bank.handles(["b", "a"]))
        close(model(x), torch.stack([model_of("cores", s)(x[2 - s]) for s in (2, 1)]))
        buffer.fill_(10**12)
        close(model(x), plain(x))
    with pytest.raises(RuntimeError, match="not of this bank"):
        bank.check()


HANDLES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "dtype": (lambda h: h.int(), TypeError, "handles are torch.int32: they must be int64"),
    "float": (lambda h: h.double(), TypeError, "they must be int64"),
    "scalar": (lambda h: h[0, 0], ValueError, r"they must be \(lines,\) or"),
    "cube": (lambda h: h[None], ValueError, r"handles are \(1, 2, 1\): they must be"),
    "empty": (lambda h: h[:0], ValueError, r"handles are \(0, 1\)"),
    "device": (lambda h: h.to("meta"), ValueError, "handles are on meta, but the bank on cpu"),
    "strides": (lambda h: h.repeat(1, 4)[:, ::2], ValueError, "must be contiguous"),
}


@pytest.mark.parametrize("case", HANDLES)
def test_refused_handles(case: str) -> None:
    """Handles that are none."""
    _, bank = bank_of(names="ab")
    change, error, message = HANDLES[case]
    with pytest.raises(error, match=message), bank.use(change(bank.handles(["a", "b"]))):
        raise AssertionError


WEIGHTS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "shape": ([["a", "b"]], torch.ones(2, 1), ValueError, r"weights are \(2, 1\).*\(1, 2\)"),
    "vector": (["a", "b"], torch.ones(2), ValueError, r"\(2,\): they must be as the names"),
    "one name": ("a", torch.ones(1, 1), ValueError, "they must be as the names"),
    "gradient": ([["a", "b"]], torch.ones(1, 2, requires_grad=True), TypeError, "detach them"),
    "integers": ([["a", "b"]], torch.ones(1, 2).long(), TypeError, "weights are torch.int64"),
    "device": ([["a", "b"]], torch.ones(1, 2, device="meta"), TypeError, "on meta: float, on"),
    "list": ([["a", "b"]], [[1.0, 2.0]], TypeError, "weights are a list: they must be a tensor"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_refused_weights(case: str) -> None:
    """Weights that do not go with the names."""
    _, bank = bank_of(names="ab")
    names, weights, error, message = WEIGHTS[case]
    with pytest.raises(error, match=message), bank.use(names, weights):
        raise AssertionError


# --- calls ---


def test_lines() -> None:
    """A line is a sequence, or a row of packed input; else the error says where."""
    model, bank = bank_of(names="ab")
    for x in (x_of(2), x_of(2, 3), x_of(2, 3, 2), x_of(2, 2), x_of(2, 2, 2)):
        with bank.use(["a", "b"]):
            y = model(x)
        half = len(x) // 2
        expected = [model_of("cores", 1)(x[:half]), model_of("cores", 2)(x[half:])]
        close(y, torch.cat(expected))
    where = r"first was called with x of \(.*K\).*2 adapters"
    for x in (x_of(3), x_of(1), x_of(3, 2), x_of(1, 3), x_of(4), x_of(6, 2)):
        with pytest.raises(ValueError, match=where), bank.use(["a", "b"]):
            model(x)


def test_an_empty_batch() -> None:
    """It has no names and no rows; rows without names are an error, and so is what is no list."""
    model, bank = bank_of(names="ab")
    for names in ([], ()):
        with bank.use(names):
            assert model(x_of(0)).shape == (0, 5)
            assert model(x_of(0, 3)).shape == (0, 3, 5)
            with pytest.raises(ValueError, match=r"first was called with x of .*0 adapters"):
                model(x_of(2))
    for wrong in (3, 2.5, object()):
        with pytest.raises(TypeError, match=r"it must be a name, None, a list"), bank.use(wrong):
            raise AssertionError


def test_a_thread_without_the_context() -> None:
    """The error says how to take it there, and that works."""
    model, bank = bank_of(names="a")
    x = x_of(1)
    with ThreadPoolExecutor() as pool:
        with pytest.raises(RuntimeError, match=r"contextvars\.copy_context"), bank.use("a"):
            pool.submit(model, x).result()
        with bank.use("a"):
            y = pool.submit(contextvars.copy_context().run, model, x).result()
    close(y, model_of("cores", 1)(x))


def test_another_model() -> None:
    """A call of another model is an error at the end; an error of the caller's own stays."""
    model, bank = bank_of(names="a")
    for names in ("a", ["a"], None):
        with pytest.raises(RuntimeError, match="was it another model"), bank.use(names):
            model_of("cores")(x_of(1))
        with pytest.raises(KeyError, match="own"), bank.use(names):
            raise KeyError("own")
    model, outer = bank_of(names="a")
    inner, x = bank_of(names="b")[1], x_of(1)
    with outer.use("a"):
        with pytest.raises(RuntimeError, match="was it another model"), inner.use("b"):
            close(model(x), model_of("cores", 1)(x))
        with outer.use(None):
            close(model(x), plain(x))
        close(model(x), model_of("cores", 1)(x))
    assert torch.equal(model(x), model_of("cores")(x))


def test_merged_meanwhile() -> None:
    """A merged layer has its own adapter in its weight: that is refused in `use`."""
    model, bank = bank_of(names="a")
    merge(model)
    with pytest.raises(RuntimeError, match="first is merged: unmerge"), bank.use("a"):
        model(x_of(1))


@pytest.mark.parametrize("name", [{1}, 5, b"a", {}])
def test_what_is_no_name_is_not_in_the_bank(name: object) -> None:
    model, bank = bank_of(names="a")
    with pytest.raises(ValueError, match="is not in the bank"):
        bank.handles(["a", name, None])
    with pytest.raises(ValueError, match="is not in the bank"), bank.use([name]):
        model(x_of(1))


@pytest.mark.parametrize("way", ["parametrised", "pruned", "property"])
def test_a_layer_that_is_changed_after_the_bank_was_made(way: str) -> None:
    """Its weight is what its attribute says, in the bank and outside."""

    class Doubled(FusedLoraXSLinear):
        @property
        def weight(self):
            return 2 * self._parameters["weight"]

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    linear = nn.Linear(24, 20, dtype=torch.float64)
    layer = FusedLoraXSLinear.from_linear(linear, r=4, dtype=torch.float64)
    model = nn.Sequential(layer)
    bank = AdapterBank.from_model(model, slots=1)
    bank.add("a")
    if way == "parametrised":
        parametrize.register_parametrization(layer, "weight", Double())
    elif way == "property":
        layer.__class__ = Doubled
    else:
        prune.l1_unstructured(layer, "weight", 0.5)
    x = torch.randn(6, 24, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)  # the core is 1e-5
    for names in (["a"] * 6, "a", None):
        with bank.use(names):
            torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    if way == "pruned":
        prune.remove(layer, "weight")
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
