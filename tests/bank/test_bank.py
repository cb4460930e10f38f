"""AdapterBank: what is put in comes out, and what is refused leaves no trace."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_cases import (
    D,
    bank_of,
    close,
    kinds,
    model_of,
    picture,
    plain,
    trained_state,
    x_of,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fused_lowrank import adapt, merge, save_adapter
from fused_lowrank.bank import AdapterBank

# --- from_model ---

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {  # a model → what the error says
    "plain": (lambda: nn.Linear(2, 2), "no adapted layers"),
    "lora": (lambda: adapted_by("lora"), r"first \(lora\) trains down, up"),
    "bases": (lambda: model_of("cores", train=("core", "up")), "first .* trains up"),
    "bias": (lambda: model_of("cores", train=("core", "bias")), "first .* trains bias"),
    "merged": (lambda: merge(model_of("cores")), "first is merged: unmerge"),
    "meta": (lambda: pending(), "first has no factors: init_bases"),
    "twice": (lambda: bank_of()[0], "first is in a bank already: close"),
}


def adapted_by(method: str) -> nn.Module:
    """A model with one layer, first."""
    model = nn.Sequential()
    model.add_module("first", nn.Linear(D, D))
    return adapt(model, method, target_modules=["first"], progress=False)


def pending() -> nn.Module:
    """Adapted on the meta device."""
    model = nn.Sequential()
    model.add_module("first", nn.Linear(D, D, device="meta"))
    return adapt(model, target_modules=["first"], r=2, defer_bases=True, progress=False)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_model(case: str) -> None:
    """Models whose adapters are more than cores, or that are not ready; they stay as they are."""
    make, message = REFUSED[case]
    model = make()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    computed_by = [getattr(module, "computed_by", None) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        AdapterBank.from_model(model, slots=2)
    assert computed_by == [getattr(module, "computed_by", None) for module in model.modules()]
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("slots", [0, -1, 1 << 31, 2.0])
def test_refused_slots(slots: Any) -> None:
    """A number of slots that is none."""
    with pytest.raises(ValueError, match=r"slots is .*(at least 1|an integer)"):
        AdapterBank.from_model(model_of("cores"), slots=slots)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, "float32"])
def test_refused_dtype(dtype: Any) -> None:
    """A dtype that no core has."""
    with pytest.raises(ValueError, match=r"dtype is .* one of .*torch\.bfloat16"):
        AdapterBank.from_model(model_of("cores"), slots=1, dtype=dtype)


@kinds
def test_the_model_is_as_before(kind: str) -> None:
    """Outside `use`, and after `close`, the model computes, holds and is called the same."""
    model = model_of(kind, 1)
    x = x_of(3)
    before, state = model(x), {n: v.clone() for n, v in model.state_dict().items()}
    bank = AdapterBank.from_model(model, slots=2)
    bank.add("a", model_of(kind, 2))
    for _ in range(2):
        assert torch.equal(model(x), before)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
        bank.close()
    assert not model._forward_pre_hooks
    with pytest.raises(RuntimeError, match="was it another model"), bank.use("a"):
        assert torch.equal(model(x), before)


def test_a_bank_after_another() -> None:
    """A closed bank that is closed again leaves the next one alone."""
    model, first = bank_of(names="a")
    first.close()
    second = AdapterBank.from_model(model, slots=1)
    first.close()
    second.add("b", model_of("cores", 2))
    x = x_of(2)
    with second.use("b"):
        close(model(x), model_of("cores", 2)(x))


@kinds
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_in_no_bank(kind: str, copied: Callable[[Any], Any]) -> None:
    """A copy of the model leaves the bank behind, and can have its own."""
    model, bank = bank_of(kind, names="a")
    clone, x = copied(model), x_of(2)
    with bank.use("a"):
        model(x)
        assert torch.equal(clone(x), model_of(kind)(x))
    other = AdapterBank.from_model(clone, slots=1)
    other.add("a", model_of(kind, 2))
    with other.use("a"), bank.use("a"):
        close(clone(x), model_of(kind, 2)(x))
        close(model(x), model_of(kind, 1)(x))
    assert b"AdapterBank" not in pickle.dumps(model)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_nbytes(dtype: torch.dtype | None) -> None:
    """All tables, the generations, and the word of refusals."""
    size = 8 if dtype is None else dtype.itemsize
    for kind, numbers in (("cores", 16), ("pairs", 32), ("products", 16)):
        bank = AdapterBank.from_model(model_of(kind), slots=10, dtype=dtype)
        assert bank.nbytes == 2 * 10 * (numbers * size + 4) + 10 * 4 + 4
        assert (
            repr(bank)
            == f"AdapterBank(0 of 10 slots, 2 layers, {bank.nbytes // 10} bytes an adapter)"
        )


# --- sources ---


@kinds
@pytest.mark.parametrize("source", ["model", "merged", "file", "no bases", "state_dict", "trained"])
def test_what_is_put_in_comes_out(kind: str, source: str, tmp_path: Path) -> None:
    """For a whole batch, and for each row its own: the outputs of the source itself."""
    keywords = {"alpha": None} if source in ("state_dict", "trained") else {}
    sources = [model_of(kind, seed, **keywords) for seed in (1, 2)]
    model, bank = bank_of(kind)
    x = x_of(3, 2)
    expected = sources[0](x[0]), model_of(kind)(x[1]), sources[1](x[2])
    alone = sources[0](x)
    expected = expected[0], plain(x[1]), expected[2]
    for name, adapted in zip("ab", sources, strict=True):
        what: Any = adapted
        if source == "merged":
            merge(adapted)
        elif source in ("file", "no bases"):
            what = tmp_path / name
            save_adapter(adapted, what, bases=source == "file")
            what = str(what) if name == "a" else what
        elif source != "model":
            what = adapted.state_dict() if source == "state_dict" else trained_state(adapted)
        bank.add(name, what)
    assert bank.names == ["a", "b"]
    assert len(bank) == 2
    assert "a" in bank
    assert "c" not in bank
    with bank.use(["a", None, "b"]):
        close(model(x), torch.stack(expected))
    with bank.use("a"):
        close(model(x), alone)
    with bank.use(None):
        close(model(x), plain(x))
    with bank.use(bank.handles(["a", None, "b"])):
        close(model(x), torch.stack(expected))


@kinds
def test_fresh(kind: str) -> None:
    """An adapter as the method starts one, at the model's alpha."""
    model, bank = bank_of(kind, alpha=3.0)
    expected = copy.deepcopy(model)
    torch.manual_seed(3)
    for layer in (expected.first, expected.second):
        with torch.no_grad():
            layer.fill_core(layer.core_factors)
    torch.manual_seed(3)
    bank.add("a")
    x = x_of(2)
    with bank.use(["a", "a"]):
        close(model(x), expected(x))
    assert not torch.equal(expected(x), plain(x)) or kind != "cores"


@kinds
def test_mixtures(kind: str) -> None:
    """The weighted sum of each row's adapters, of all layers alike."""
    model, bank = bank_of(kind, names="ab")
    x, weights = x_of(2), torch.tensor([[0.25, -2.0], [0.5, 3.0]])
    expected = []
    for i, names in enumerate((("a", "b"), ("b", None))):
        y = x[i]
        for layer in ("first", "second"):
            own = plain_layer(layer, y)
            for name, weight in zip(names, weights[i].tolist(), strict=True):
                if name is not None:
                    adapted = getattr(model_of(kind, 1 + "ab".index(name)), layer)
                    own = own + weight * (adapted(y) - plain_layer(layer, y))
            y = own
        expected.append(model.head(y))
    with bank.use([["a", "b"], ["b", None]], weights):
        close(model(x), torch.stack(expected))


def plain_layer(name: str, x: Tensor) -> Tensor:
    """A layer of the base model."""
    return nn.functional.linear(
        x, *(getattr(model_of("cores"), name).get_parameter(n) for n in ("weight", "bias"))
    )


def smaller(nested: bool = True) -> Any:
    """An adapter of rank 2, whose factors are the first of those of rank 4, or are not."""
    whole, small = model_of("cores"), model_of("cores", 5, r=2)
    for name in ("first", "second"):
        ours, theirs = getattr(small, name), getattr(whole, name)
        for factor, value in (("down", theirs.down[:2]), ("up", theirs.up[:, :2])):
            with torch.no_grad():
                getattr(ours, factor).copy_(value if nested else value.flip(0))
    return small


@pytest.mark.parametrize("source", ["model", "file", "no bases", "state_dict"])
def test_smaller_ranks(source: str, tmp_path: Path) -> None:
    """Ranks below the bank's fit where the factors are the first of the bank's."""
    for nested in (True, False):
        model, bank = bank_of(names="a")
        small = smaller(nested)
        what: Any = small if source == "model" else small.state_dict()
        if source in ("file", "no bases"):
            save_adapter(small, what := tmp_path / str(nested), bases=source == "file")
        before = picture(bank)
        if not nested:
            with pytest.raises(ValueError, match=r"another base: down .*of first"):
                bank.add("b", what)
            assert picture(bank) == before
            continue
        bank.add("b", what)
        x = x_of(2)
        if source == "state_dict":  # at the model's own alpha, which is 4
            for layer in (small.first, small.second):
                layer.scale = 1.0
        with bank.use("b"):
            close(model(x), small(x))


def test_smaller_pairs() -> None:
    """A pair of a smaller r fits whatever the factors."""
    model, bank = bank_of("pairs")
    small, x = model_of("pairs", 3, r=1, alpha=0.5), x_of(2)
    for ours, theirs in ((small.first, model.first), (small.second, model.second)):
        ours.down, ours.up = theirs.down, theirs.up
    bank.add("a", small)
    with bank.use("a"):
        close(model(x), small(x))


def edited(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A file of "a", its tensors changed."""
    save_adapter(model_of("cores", 1), path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata)
    return path


def saved(path: Path, model: nn.Module) -> Path:
    """A file of a model's adapter."""
    save_adapter(model, path)
    return path


def with_state(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The state of "a", changed."""
    state = dict(model_of("cores", 1).state_dict())
    change(state)
    return state


def other_base() -> Any:
    """An adapter for other weights."""
    model = model_of("cores", 1)
    nn.init.normal_(model.second.weight)
    return model


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {  # source → what the error says
    "kind": (lambda p: 5, "source is a int: it must be a path"),
    "plain model": (lambda p: nn.Linear(2, 2), "first is not adapted there and lora_xs here"),
    "method": (lambda p: model_of("pairs", 1), "first is lora_mini there and lora_xs here"),
    "file's method": (lambda p: saved(p, model_of("pairs", 1)), "first is lora_mini there"),
    "rank": (lambda p: model_of("cores", 1, r=5), r"first is \(5, 5\) there and at most \(4, 4\)"),
    "base": (lambda p: other_base(), "model was made for another base: the weight of second"),
    "state's base": (lambda p: other_base().state_dict(), "another base: the weight of second"),
    "file's base": (lambda p: saved(p, other_base()), "another base: the weight of second"),
    "bases": (
        lambda p: with_state(lambda s: s.update({"first.up": s["first.up"] + 1})),
        "base: up",
    ),
    "no file": (lambda p: edited(p, lambda t: t.clear()), "lacks first.core"),
    "no fingerprint": (lambda p: edited(p, lambda t: t.pop("first.fingerprint")), "lacks .*print"),
    "fingerprint": (
        lambda p: edited(p, lambda t: t.update({"first.fingerprint": torch.zeros(3)})),
        "the fingerprint of first is not of its ranks",
    ),
    "file's NaN": (
        lambda p: edited(p, lambda t: t["second.core"].fill_(torch.nan)),
        "second holds NaN",
    ),
    "NaN": (lambda p: with_state(lambda s: s["first.core"].fill_(torch.nan)), "first holds NaN"),
    "one Inf": (
        lambda p: with_state(lambda s: s["second.core"][1, 2].fill_(-torch.inf)),
        "the core of second holds NaN, Inf",
    ),
    "alpha": (lambda p: model_of("cores", 1, alpha=1e40), "first holds NaN, Inf"),
    "nothing": (lambda p: {}, "the state_dict lacks first.core"),
    "no tensor": (
        lambda p: with_state(lambda s: s.update({"first.core": 1.0})),
        "lacks first.core",
    ),
    "vector": (lambda p: with_state(lambda s: s.update({"first.core": torch.ones(4)})), "damaged"),
    "integers": (
        lambda p: with_state(lambda s: s.update({"first.core": torch.ones(4, 4).long()})),
        "the core of first is damaged",
    ),
    "small without bases": (
        lambda p: trained_state(smaller()),
        "smaller rank than the bank's, and without its down and up nobody can say",
    ),
    "trained bias": (lambda p: model_of("cores", 1, train=("core", "bias")), "more of first than"),
    "file's bias": (
        lambda p: saved(p, model_of("cores", 1, train=("core", "bias"))),
        "trains more of first than its core: core, bias",
    ),
    "head": (lambda p: model_of("cores", 1, modules_to_save=["head"]), "trains head whole"),
    "file's head": (
        lambda p: saved(p, model_of("cores", 1, modules_to_save=["head"])),
        "head whole",
    ),
    "meta": (lambda p: model_of("cores", 1).to("meta"), "first is not initialised"),
}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_refused_source(case: str, new: bool, tmp_path: Path) -> None:
    """The error says what is wrong, and the bank is as it was."""
    make, message = BAD[case]
    _, bank = bank_of(names="ab")
    source, before = make(tmp_path / "file"), picture(bank)
    with pytest.raises(ValueError, match=message):
        bank.add("c", source) if new else bank.replace("a", source)
    assert picture(bank) == before


def test_half_of_a_pair() -> None:
    """Two parts that cannot be multiplied."""
    _, bank = bank_of("pairs")
    state = trained_state(model_of("pairs", 1))
    state["first.b_train"] = state["first.b_train"][:1]
    with pytest.raises(ValueError, match="the two parts of the core of first"):
        bank.add("a", state)


def test_more_than_the_dtype_holds() -> None:
    """A value that would be Inf in the table."""
    bank = AdapterBank.from_model(model_of("cores"), slots=1, dtype=torch.float16)
    state = trained_state(model_of("cores", 1))
    state["first.core"][0, 0] = 1e5
    with pytest.raises(ValueError, match=r"more than torch\.float16 can hold"):
        bank.add("a", state)
    state["first.core"][0, 0] = 6e4
    bank.add("a", state)
