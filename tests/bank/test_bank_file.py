"""AdapterBank.save and load: round trips, and files that are refused and leave no trace."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_cases import bank_of, close, kinds, model_of, picture, x_of
from failures import Watched
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fused_lowrank import load_adapter, save_adapter
from fused_lowrank.bank import AdapterBank
from fused_lowrank.bank import file as bank_file

NAMES = ["a", "line\nbreak", "nul\0", " ", "é", "名前", "\ud800", "a" * 10_000, "{layer}.core"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the bank is saved."""
    return tmp_path / "bank.safetensors"


def contents(bank: AdapterBank) -> dict[str, list[Any]]:
    """Of each adapter, in order, all its numbers."""
    parts = [part for table in bank.store.tables.values() for part in table if part is not None]
    return {name: [part[bank.store._slots[name]].tolist() for part in parts] for name in bank.names}


def many(kind: str) -> AdapterBank:
    """A bank whose slots do not follow each other, with different alphas and odd names."""
    bank = bank_of(kind, 20)[1]
    for i, name in enumerate(NAMES):
        bank.add(name, model_of(kind, i, alpha=i + 0.5))
        bank.add("gone", model_of(kind, 99))
        bank.remove("gone")
    bank.replace("a", model_of(kind, 50))
    return bank


# --- round trips ---


@kinds
def test_round_trip(kind: str, path: Path) -> None:
    """Bit for bit, in order, into a bank of other slots that holds others."""
    bank = many(kind)
    before = picture(bank)
    bank.save(path)
    assert picture(bank) == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    model, other = bank_of(kind, 15)
    other.add("first one")
    other.load(str(path), progress=False)
    assert other.names == ["first one", *NAMES]
    other.remove("first one")
    assert contents(other) == contents(bank)
    x = x_of(2)
    with other.use(["é", "a"]):
        close(model(x), torch.stack([model_of(kind, 4, alpha=4.5)(x[0]), model_of(kind, 50)(x[1])]))


def test_some_names(path: Path) -> None:
    """Those that are named, in this order, once; an unknown one leaves the file as it was."""
    bank = bank_of("cores", 3, names="abc")[1]
    bank.save(path, ["c", "a", "c"])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'d' is not in the bank"):
        bank.save(path, ["a", "d"])
    assert path.read_bytes() == before
    other = bank_of()[1]
    other.load(path, progress=False)
    assert other.names == ["c", "a"]
    held = contents(bank)
    assert contents(other) == {"c": held["c"], "a": held["a"]}
    bank.save(path, [])
    other.load(path, progress=False)
    assert other.names == ["c", "a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, path: Path) -> None:
    """Each is written as it is, and read into a bank of another."""
    bank = AdapterBank.from_model(model_of("pairs"), slots=2, dtype=dtype)
    bank.add("a", model_of("pairs", 1))
    bank.save(path)
    with safe_open(path, "pt") as file:
        assert file.get_tensor("first.left").dtype == dtype
        sizes = {key: file.get_tensor(key).itemsize for key in file.keys()}  # noqa: SIM118
    data = path.read_bytes()
    begins = 8 + int.from_bytes(data[:8], "little")
    assert not begins % 8
    header = json.loads(data[8:begins])
    assert all(not header[key]["data_offsets"][0] % size for key, size in sizes.items())
    for wider in (dtype, torch.float64):
        other = AdapterBank.from_model(model_of("pairs"), slots=1, dtype=wider)
        other.load(path, progress=False)
        assert contents(other) == contents(bank)


def test_as_other_kinds_store_them(path: Path) -> None:
    """Pairs become products where the bank holds those; products do not become pairs."""
    pairs, products = model_of("pairs"), model_of("pairs", r=4)
    for ours, theirs in ((products.first, pairs.first), (products.second, pairs.second)):
        ours.down, ours.up = theirs.down, theirs.up
    sources = AdapterBank.from_model(pairs, slots=1), AdapterBank.from_model(products, slots=1)
    sources[0].add("a", model_of("pairs", 1))
    sources[0].save(path)
    sources[1].load(path, progress=False)
    x = x_of(2)
    with sources[1].use("a"):
        close(products(x), model_of("pairs", 1)(x))
    sources[1].save(path)
    sources[0].remove("a")
    with pytest.raises(ValueError, match=r"bank\.safetensors holds cores of first, where .* pairs"):
        sources[0].load(path, progress=False)


@pytest.mark.parametrize("nested", [True, False])
def test_smaller_ranks(nested: bool, path: Path) -> None:
    """A bank of rank 2 goes into one of rank 4 whose first factors are its own."""
    small, model = model_of("cores", r=2), model_of("cores")
    for ours, theirs in ((small.first, model.first), (small.second, model.second)):
        with torch.no_grad():
            ours.down.copy_(theirs.down[:2] if nested else theirs.down[2:])
            ours.up.copy_(theirs.up[:, :2] if nested else theirs.up[:, 2:])
    source, bank = (AdapterBank.from_model(m, slots=5) for m in (small, model))
    for name in "ab":
        source.add(name, {f"{n}.core": torch.randn(2, 2).double() for n in ("first", "second")})
    source.save(path)
    if not nested:
        with pytest.raises(ValueError, match="another base: down and up of first are not"):
            bank.load(path, progress=False)
        assert not bank.names
        return
    bank.load(path, progress=False)
    x = x_of(2)
    with source.use(["b", "a"]):
        expected = small(x) * 2  # alpha is the rank in both, so the scales are alike
    with bank.use(["b", "a"]):
        close(model(x) * 2, expected)


def test_progress(path: Path, capfd: pytest.CaptureFixture) -> None:
    """A bar over the layers, on stderr, unless it is not wanted."""
    bank_of(names="a")[1].save(path)
    bank_of()[1].load(path, progress=False)
    assert capfd.readouterr() == ("", "")
    bank_of()[1].load(path)
    out, err = capfd.readouterr()
    assert not out
    assert "2/2" in err
    assert "layer" in err


# --- refused files ---


def damaged(path: Path, change: Callable[[dict[str, Any], dict[str, str], dict], Any]) -> None:
    """Write the file anew, its tensors, metadata and config changed."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    config = json.loads(metadata["config"])
    change(tensors, metadata, config)
    if "config" in metadata and metadata["config"] != "{":
        metadata["config"] = json.dumps(config)
    save_file(tensors, path, metadata)


def put(key: str, value: Tensor) -> Callable[[dict, dict, dict], Any]:
    """A change of one tensor."""
    return lambda t, m, c: t.update({key: value})


FILES: dict[str, tuple[Callable[[dict, dict, dict], Any], str]] = {  # change → what the error says
    "foreign": (lambda t, m, c: m.clear(), "no bank of this library"),
    "format": (lambda t, m, c: m.update(format="fused_lowrank"), "no bank of this library"),
    "version": (lambda t, m, c: m.update(version="2"), "format version 2; this library reads 1"),
    "no config": (lambda t, m, c: m.pop("config"), "config cannot be read"),
    "bad config": (lambda t, m, c: m.update(config="{"), "config cannot be read"),
    "method": (lambda t, m, c: c["layers"]["first"].update(method="?"), "config cannot be read"),
    "no layers": (lambda t, m, c: c.update(layers={}), "config cannot be read"),
    "a layer more": (
        lambda t, m, c: c["layers"].update(third=c["layers"]["first"]),
        "third is lora_mini there and not adapted here",
    ),
    "a layer less": (lambda t, m, c: c["layers"].pop("second"), "second is not adapted there and"),
    "other method": (
        lambda t, m, c: c["layers"]["second"].update(
            method="lora_xs",
            settings={"r": 2, "alpha": 2.0, "dropout": 0.0, "train": ["core"], "svd": "exact"},
        ),
        "second is lora_xs there and lora_mini here",
    ),
    "a tensor less": (lambda t, m, c: t.pop("second.right"), r"lacks second\.right"),
    "no names": (lambda t, m, c: t.pop("names"), "lacks names"),
    "a tensor more": (put("third.core", torch.ones(2)), r"holds an unexpected third\.core"),
    "fewer cores": (put("first.left", torch.ones(1, 8, 2)), "the core of first is damaged"),
    "a flat core": (put("second.left", torch.ones(2, 16)), "the core of second is damaged"),
    "integers": (put("first.left", torch.ones(2, 8, 2).long()), "the core of first is damaged"),
    "a short pair": (put("first.left", torch.ones(2, 8, 1)), "parts of the core of first are not"),
    "large cores": (put("first.left", torch.ones(2, 9, 2)), r"first is \(9, 2\) there and at most"),
    "NaN": (lambda t, m, c: t["second.right"][1, 1, 7].fill_(torch.nan), "second holds NaN"),
    "Inf": (lambda t, m, c: t["first.left"][0, 0, 0].fill_(torch.inf), "first holds NaN, Inf"),
    "scale": (lambda t, m, c: t["first.scales"][1].fill_(torch.nan), "first holds NaN"),
    "few scales": (put("first.scales", torch.ones(1)), r"first\.scales are not one for each"),
    "double scales": (put("first.scales", torch.ones(2).double()), r"first\.scales are not one"),
    "base": (
        lambda t, m, c: t["second.fingerprint"][-2].mul_(1.5),
        "was made for another base: the weight of second differs",
    ),
    "factors": (
        lambda t, m, c: t["second.fingerprint"][0].add_(9),
        "down and up of second are not",
    ),
    "fingerprint": (put("first.fingerprint", torch.ones(3)), "fingerprint of first is not of its"),
    "names twice": (put("names", torch.tensor(list(b"aa"), dtype=torch.uint8)), "'a' comes twice"),
    "empty name": (put("names.offsets", torch.tensor([0, 0, 2])), "'' is no name"),
    "there already": (put("names", torch.tensor(list(b"az"), dtype=torch.uint8)), "'z' is in the"),
    "no UTF-8": (put("names", torch.tensor([255, 97], dtype=torch.uint8)), "names cannot be read"),
    "longer names": (put("names", torch.ones(3, dtype=torch.uint8)), "names cannot be read"),
    "signed names": (put("names", torch.ones(2, dtype=torch.int8)), "names cannot be read"),
    "backwards": (put("names.offsets", torch.tensor([0, 3, 2])), "names cannot be read"),
    "begun late": (put("names.offsets", torch.tensor([1, 1, 2])), "names cannot be read"),
    "no offsets": (put("names.offsets", torch.tensor([]).long()), "names cannot be read"),
    "one offset": (put("names.offsets", torch.tensor(2)), "names cannot be read"),
    "float offsets": (put("names.offsets", torch.tensor([0.0, 1, 2])), "names cannot be read"),
    "a name less": (put("names.offsets", torch.tensor([0, 2])), "the core of first is damaged"),
}


@pytest.mark.parametrize("case", FILES)
def test_refused_file(case: str, path: Path) -> None:
    """A ValueError that says what is wrong, and the bank as it was."""
    bank_of("pairs", names="ab")[1].save(path)
    change, message = FILES[case]
    damaged(path, change)
    bank = bank_of("pairs", 5)[1]
    bank.add("z", model_of("pairs", 3))
    before = picture(bank)
    with pytest.raises(ValueError, match=message):
        bank.load(path, progress=False)
    assert picture(bank) == before


@pytest.mark.parametrize("length", [0, 5, 100, 1500, -1])
def test_truncated(length: int, path: Path) -> None:
    """A file that ends too early."""
    bank = bank_of(names="ab")[1]
    bank.save(path)
    path.write_bytes(path.read_bytes()[:length])
    before = picture(bank)
    with pytest.raises(ValueError, match=r"bank\.safetensors is truncated, or no safetensors"):
        bank.load(path, progress=False)
    assert picture(bank) == before


def test_an_adapter_is_no_bank(path: Path) -> None:
    """And a bank no adapter; a missing file is a FileNotFoundError."""
    bank = bank_of(names="a")[1]
    with pytest.raises(FileNotFoundError):
        bank.load(path)
    save_adapter(model_of("cores"), path)
    with pytest.raises(ValueError, match="no bank of this library"):
        bank.load(path)
    bank.save(path)
    with pytest.raises(ValueError, match="no adapter of this library"):
        load_adapter(model_of("cores"), path)
    with pytest.raises(ValueError, match="no adapter of this library"):
        bank.add("b", path)


def test_too_few_slots(path: Path) -> None:
    """The error says how many would do, and nothing is put in."""
    bank_of("cores", names="abc")[1].save(path)
    bank = bank_of("cores", 3)[1]
    bank.add("z")
    before = picture(bank)
    with pytest.raises(RuntimeError, match=r"3 slots are needed and 2 of 3 are free.*slots=4"):
        bank.load(path, progress=False)
    assert picture(bank) == before


@kinds
def test_an_error_in_the_middle(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second layer cannot be written, nothing is there of the first."""
    bank_of(kind, names="abc")[1].save(path)
    bank = bank_of(kind, 5)[1]
    bank.add("z")
    before, original = picture(bank), Tensor.__setitem__
    calls = []

    def fail(self: Tensor, *rest: Any) -> None:
        calls.append(rest)
        if len(calls) == 4:
            raise MemoryError("no space")
        original(self, *rest)

    monkeypatch.setattr(Tensor, "__setitem__", fail)
    with pytest.raises(MemoryError, match="no space"):
        bank.load(path, progress=False)
    monkeypatch.undo()
    assert picture(bank) == before
    bank.load(path, progress=False)
    assert bank.names == ["z", "a", "b", "c"]


# --- saving that is interrupted ---


def watch(monkeypatch: pytest.MonkeyPatch, at: int, then: Callable[[], Any]) -> None:
    """Do something in the middle of a save."""
    watched = lambda *args: Watched(open(*args), at, then)  # noqa: E731, SIM115
    monkeypatch.setattr(bank_file, "open", watched, raising=False)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_full_disk(at: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file stays whole, and nothing else is left."""
    bank = bank_of(names="ab")[1]
    bank.save(path)
    before = path.read_bytes()
    bank.remove("a")

    def fail() -> None:
        raise OSError("no space left")

    watch(monkeypatch, at, fail)
    with pytest.raises(OSError, match="no space left"):
        bank.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    assert not bank.store._running
    bank.save(path)
    assert path.read_bytes() != before


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from bank_cases import bank_of
from fused_lowrank.bank import file as bank_file
from failures import Watched
path, at = sys.argv[2], int(sys.argv[3])
bank = bank_of(names="ab")[1]
bank.save(path)
bank.remove("a")
print("saved", flush=True)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
bank_file.open = lambda *args: Watched(open(*args), at, die)
os.replace = die
bank.save(path)
"""


@pytest.mark.parametrize("at", [2, 5, 100])
def test_killed_while_saving(at: int, path: Path) -> None:
    """The old file stays whole: killed in the middle, and before the new one takes its place."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(root / "tests/support"), str(path), str(at)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == "saved\n"
    bank = bank_of()[1]
    bank.load(path, progress=False)
    assert bank.names == ["a", "b"]


@kinds
@pytest.mark.parametrize("at", [1, 5, 7])
def test_changes_beside_a_save(
    kind: str, at: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has what was there when it began, whole; changes need not wait."""
    bank = bank_of(kind, 5, names="ab")[1]
    before = contents(bank)

    def change() -> None:
        bank.replace("a", model_of(kind, 3))
        bank.remove("b")
        for name in "cd":
            bank.add(name, model_of(kind, 4))
        with pytest.raises(RuntimeError, match="2 are kept by calls under way"):
            bank.add("e", model_of(kind, 4))

    watch(monkeypatch, at, change)
    bank.save(path)
    assert bank.names == ["a", "c", "d"]
    bank.add("e", model_of(kind, 4))
    other = bank_of(kind)[1]
    other.load(path, progress=False)
    assert contents(other) == before
