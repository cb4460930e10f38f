"""Models in wrappers (DDP, DataParallel, AveragedModel, …): their adapters' files name the model's
own modules.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fused_lowrank import AdapterBank, adapt, export_lora, load_adapter, save_adapter
from fused_lowrank.models.targets import named_modules

D = 8


class Model(nn.Module):
    """A module that is called as a wrapper calls what it wraps, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
        self.head = nn.Linear(D, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) to (…, 3)."""
        return self.head(self.module(x))


def adapted(model: nn.Module, **keywords: Any) -> nn.Module:
    """The model with an adapter that does something, and a head trained whole."""
    torch.manual_seed(3)
    keywords = {"modules_to_save": ["head"], **keywords}
    adapt(model, target_modules=["0", "1"], r=2, progress=False, **keywords)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def with_checkpoint(model: nn.Module) -> nn.Module:
    """A part of the model in torch's own checkpoint."""
    model.module = checkpoint_wrapper(model.module)
    return model


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "DDP of a checkpoint": lambda model: DistributedDataParallel(with_checkpoint(model)),
    "AveragedModel of DDP": lambda model: AveragedModel(DistributedDataParallel(model)),
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_files(case: str, tmp_path: Path) -> None:
    """They are the same as of the bare model; the bare one and the wrapped one read them."""
    base = Model()
    model = adapted(copy.deepcopy(base))
    wrapped = WRAPPERS[case](copy.deepcopy(model))
    files = []
    for name, each in (("model", model), ("wrapped", wrapped)):
        save_adapter(each, tmp_path / name)
        export_lora(each, tmp_path / f"{name}-lora")
        folder = tmp_path / f"{name}-lora"
        files.append(
            (
                load_file(tmp_path / name),
                load_file(folder / "adapter_model.safetensors"),
                (folder / "adapter_config.json").read_text(),
            )
        )
    for ours, theirs in zip(files[0][:2], files[1][:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert files[0][2] == files[1][2]
    x = torch.randn(2, D)
    for into in (base, wrapped):
        with torch.no_grad():
            loaded = load_adapter(into, tmp_path / "wrapped", progress=False)
            torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("case", WRAPPERS)
def test_bank(case: str, tmp_path: Path) -> None:
    """A bank of a wrapped model, and one of the model, read the files of either."""
    model = adapted(Model(), modules_to_save=None)
    wrapped, x = WRAPPERS[case](copy.deepcopy(model)), torch.randn(2, D)
    for source in (model, wrapped):
        save_adapter(source, tmp_path / "file")
        for into in (copy.deepcopy(model), wrapped):
            bank = AdapterBank.from_model(into, slots=2)
            bank.add("a", tmp_path / "file")
            with bank.use("a"), torch.no_grad():
                torch.testing.assert_close(into(x), model(x))
            bank.close()


def test_too_late(tmp_path: Path) -> None:
    """DDP would not reduce the gradients of parameters that are made after it."""
    save_adapter(adapted(Model()), tmp_path / "file")
    wrapped = DistributedDataParallel(Model())
    for put in (adapted, lambda model: load_adapter(model, tmp_path / "file", progress=False)):
        with pytest.raises(ValueError, match="adapt the model first, then wrap it"):
            put(wrapped)
    assert all(parameter.requires_grad for parameter in wrapped.parameters())


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_names() -> None:
    """Only what a wrapper adds is left out: a module may be called as it likes."""
    expected = [name for name, _ in Model().named_modules()]
    sharded = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
    for wrap in (DistributedDataParallel, sharded):
        names = [name for name, _ in named_modules(wrap(Model()))]
        assert names == ["", *expected]
    model = nn.ModuleDict({"a": nn.DataParallel(Model()), "module": nn.Linear(D, D)})
    names = [f"a.{name}" for name in expected if name]
    assert [name for name, _ in named_modules(model)] == ["", "a", "a", *names, "module"]
