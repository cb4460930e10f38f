"""Files damaged at random: an error that says so, or an adapter that works; no half of one.

PYTHONPATH=tests/support python tests/files/test_damaged_files.py 10000

damages so many of each kind, and prints what came of them.
"""

import collections
import copy
import json
import math
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official_cases import settings, state_of, write
from torch import nn

from fused_lowrank import (
    AdapterBank,
    adapt,
    export_lora,
    load_adapter,
    load_official_lora_xs,
    save_adapter,
)
from fused_lowrank.files.inspection import describe

D, COUNT = 8, 60
Random = random.Random


def base() -> nn.Module:
    """The same model at every call."""
    generator, model = torch.Generator().manual_seed(7), nn.Sequential()
    for name, module in {
        "a": nn.Linear(D, D),
        "b": nn.Linear(D, D),
        "head": nn.Linear(D, 3),
    }.items():
        model.add_module(name, module)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model


def adapted(method: str = "lora_xs", **keywords: Any) -> nn.Module:
    """The model with an adapter of random values."""
    torch.manual_seed(3)
    sizes = {"r": 2, "a": 4, "b": 3} if method == "lora_mini" else {"r": 2}
    adapt(model := base(), method, target_modules=["a", "b"], progress=False, **sizes, **keywords)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


# --- what is done to files ---

STRANGE: list[Any] = [
    *(None, True, "", "x", -1, 0, 1, 2, 3, 64, 2**40, 0.5, -0.5, 1e300, math.nan, math.inf),
    *([], [1], ["a"], {}, {"a": 1}, "float64", "core", ["core", "up"], "\ud800"),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    found = []
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += [(value, key), *places(value[key])]
    return found


def change_json(value: Any, chance: Random) -> None:
    """Take something out, put something strange in, or call something otherwise."""
    if not (there := places(value)):
        return
    holder, key = chance.choice(there)
    how = chance.randrange(4)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[chance.choice(["a", "b", "head", "c", "", "r", "core", f"{key}x"])] = holder.pop(key)
    elif how == 2 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] += chance.choice([-1, 1, -8, 8])
    else:
        holder[key] = copy.deepcopy(chance.choice(STRANGE))


def in_json(data: bytes, chance: Random) -> bytes:
    """A JSON file with something else in it."""
    value = json.loads(data)
    change_json(value, chance)
    return json.dumps(value).encode()


def in_header(data: bytes, chance: Random) -> bytes:
    """A safetensors file with another header: its config, names, shapes, dtypes or places."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if "config" in metadata and chance.random() < 0.6:
        metadata["config"] = in_json(metadata["config"].encode(), chance).decode()
    elif chance.random() < 0.3:
        names = [name for name in header if name != "__metadata__"]
        one, other = chance.sample(names, 2)
        header[one], header[other] = header[other], header[one]
    else:
        change_json(header, chance)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def in_bytes(data: bytes, chance: Random) -> bytes:
    """A file cut off, with bytes flipped, left out or put in."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 20])):
        place, how = chance.randrange(len(changed)), chance.randrange(4)
        if how == 0:
            changed[place] ^= 1 << chance.randrange(8)
        elif how == 1:
            changed[place] = chance.randrange(256)
        elif how == 2:
            del changed[place : place + chance.choice([1, 8, 1000])]
        else:
            changed[place:place] = bytes(
                chance.randrange(256) for _ in range(chance.choice([1, 8]))
            )
        if not changed:
            break
    return bytes(changed[: chance.choice([len(changed), len(changed), len(changed) // 2])])


# --- ways in ---


def picture(model: nn.Module) -> list[Any]:
    """All that half an adapter would change."""
    values = [(n, v.shape, v.dtype, v.numpy().tobytes()) for n, v in model.state_dict().items()]
    flags = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    return [[(n, id(m), m.training) for n, m in model.named_modules()], flags, values]


def into(load: Callable[[nn.Module, Path], Any], model: nn.Module, path: Path) -> None:
    """Load into a model, and see that it computes; or that it is as it was."""
    before = picture(model)
    try:
        load(model, path)
    except BaseException:
        assert picture(model) == before, "it changed the model"
        raise
    assert model(torch.ones(2, D)).shape == (2, 3)
    model(torch.ones(2, D)).sum().backward()


def into_bank(load: Callable[[AdapterBank, Path], Any], method: str, path: Path) -> None:
    """Load into a bank, and see that all its adapters compute; or that it is as it was."""
    model = adapted(method)
    bank = AdapterBank.from_model(model, slots=3)
    bank.add("there", adapted(method))
    x = torch.ones(1, D)
    with torch.no_grad(), bank.use("there"):
        y = model(x)
    try:
        load(bank, path)
    except BaseException:
        assert list(bank.names) == ["there"], "it left something in the bank"
        bank.add("x", adapted(method))
        bank.remove("x")
        raise
    finally:
        with torch.no_grad(), bank.use("there"):
            assert torch.equal(model(x), y), "another adapter is another now"
    for name in bank.names:
        with torch.no_grad(), bank.use(name):
            assert model(x).shape == (1, 3)
    tables = [part for table in bank.store.tables.values() for part in table if part is not None]
    assert all(table.isfinite().all() for table in tables)


def plain(model: nn.Module, path: Path) -> None:
    """`load_adapter` without a progress bar."""
    load_adapter(model, path, progress=False)


def official(model: nn.Module, path: Path) -> None:
    """`load_official_lora_xs` without a progress bar."""
    load_official_lora_xs(model, path, progress=False)


def exported(path: Path) -> None:
    """`export_lora` of a file."""
    export_lora(path, path.parent / "exported")


Case = tuple[Callable[[Path], Path], Callable[[Path], Any]]


def our_file(method: str, bases: bool = True, **keywords: Any) -> Callable[[Path], Path]:
    """A file of `save_adapter` in a folder."""

    def made(folder: Path) -> Path:
        save_adapter(adapted(method, **keywords), folder / "file.safetensors", bases=bases)
        return folder / "file.safetensors"

    return made


def bank_file(folder: Path) -> Path:
    """A bank's file."""
    bank = AdapterBank.from_model(adapted("lora_mini"), slots=4)
    for name in ("one", "two"):
        bank.add(name, adapted("lora_mini"))
    bank.save(folder / "bank.safetensors")
    return folder / "bank.safetensors"


def peft_folder(folder: Path) -> Path:
    """A folder as the PEFT integration writes it."""
    peft = pytest.importorskip("peft")
    from fused_lowrank.integrations.peft import LoraXSConfig

    config = LoraXSConfig(r=2, target_modules=["a", "b"], modules_to_save=["head"])
    peft.get_peft_model(base(), config).save_pretrained(folder / "peft")
    (folder / "peft" / "README.md").unlink()
    return folder / "peft"


def official_folder(folder: Path) -> Path:
    """A checkpoint of the LoRA-XS authors' code."""
    torch.manual_seed(5)
    return write(folder / "official", state_of(base(), ["a", "b"], 2), settings(2, 4))


head = {"modules_to_save": ["head"]}
CASES: dict[str, Case] = {
    "a plain model": (our_file("lora_xs", **head), lambda p: into(plain, base(), p)),
    "an adapted one": (our_file("lora_xs", **head), lambda p: into(plain, adapted(**head), p)),
    "without bases": (our_file("lora_xs", bases=False), lambda p: into(plain, base(), p)),
    "LoRA-Mini": (our_file("lora_mini"), lambda p: into(plain, base(), p)),
    "LoRA": (our_file("lora", train=["down", "up", "bias"]), lambda p: into(plain, base(), p)),
    "a bank": (
        our_file("lora_mini"),
        lambda p: into_bank(lambda b, q: b.add("x", q), "lora_mini", p),
    ),
    "a bank's file": (
        bank_file,
        lambda p: into_bank(lambda b, q: b.load(q, progress=False), "lora_mini", p),
    ),
    "inspect": (our_file("lora_xs"), describe),
    "inspect a bank": (bank_file, describe),
    "export": (our_file("lora_mini"), exported),
    "PEFT's folder": (peft_folder, lambda p: into(plain, base(), p)),
    "inspect PEFT's": (peft_folder, describe),
    "the authors' folder": (official_folder, lambda p: into(official, base(), p)),
}


def damaged(file: Path, data: bytes, chance: Random) -> None:
    """Write a file's bytes with something wrong in them."""
    ways = [in_bytes, in_json if file.suffix == ".json" else in_header, in_header]
    if file.suffix == ".json":
        ways = [in_bytes, in_json, in_json]
    file.write_bytes(chance.choice(ways)(data, chance))


def run(case: str, folder: Path, count: int) -> collections.Counter[str]:
    """Damage a file so many times; how often it was refused, and how often it did."""
    make, use = CASES[case]
    source = make(folder)
    files = sorted(p for p in (source.rglob("*") if source.is_dir() else [source]) if p.is_file())
    whole = {file: file.read_bytes() for file in files}
    use(source)
    seen: collections.Counter[str] = collections.Counter()
    for seed in range(count):
        chance = Random(f"{case} {seed}")
        file = chance.choice(files)
        damaged(file, whole[file], chance)
        try:
            use(source)
            seen["taken"] += 1
        except ValueError:
            seen["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{case}, seed {seed}: {error!r}") from error
        file.write_bytes(whole[file])
    return seen


@pytest.mark.parametrize("case", CASES)
def test_damaged(case: str, tmp_path: Path) -> None:
    """A ValueError, and the model or the bank as it was; or one that works."""
    seen = run(case, tmp_path, COUNT)
    assert seen["refused"] > COUNT // 4


if __name__ == "__main__":
    import tempfile

    for name in CASES:
        with tempfile.TemporaryDirectory() as place:
            print(f"{name:<20} {dict(run(name, Path(place), int(sys.argv[1])))}", flush=True)
