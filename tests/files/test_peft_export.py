"""VeRA and AdaLoRA in PEFT's own format: what PEFT loads of it, and what is read back."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fused_lowrank import (
    AdapterBank,
    RankBudget,
    adapt,
    export_lora,
    export_peft,
    load_adapter,
    save_adapter,
)
from fused_lowrank.files import cli

peft: Any = pytest.importorskip("peft")

K, HIDDEN, N = 12, 20, 10
QUIET: dict[str, Any] = {"progress": False}
TARGETS = ["first", "second"]
METHODS: dict[str, dict[str, Any]] = {"vera": {"r": 6, "seed": 3}, "adalora": {"r": 4}}
methods = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(K, HIDDEN), nn.Linear(HIDDEN, N)
        self.norm = nn.LayerNorm(N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(torch.tanh(self.first(x))))


@torch.no_grad()
def shift(model: Any) -> Any:
    """The model with what is trained away from its start."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def adapted(method: str, **keywords: Any) -> Any:
    given = {"target_modules": TARGETS, **METHODS[method], **QUIET, **keywords}
    return shift(adapt(Net(), method, **given))


def x() -> torch.Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(2))


def loaded(folder: Path) -> Any:
    """PEFT's model of a folder."""
    return peft.PeftModel.from_pretrained(Net(), folder)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@methods
@pytest.mark.parametrize("of", ["model", "file", "convert"])
def test_peft_loads_what_is_exported(
    method: str, of: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The same outputs, of any source, and PEFT has nothing to say; then the same layers here."""
    model, file, folder = adapted(method), tmp_path / "adapter", tmp_path / "peft"
    save_adapter(model, file)
    if of == "convert":
        assert cli.main(["convert", str(file), str(folder), "--to", "peft"]) == 0
    else:
        export_peft(model if of == "model" else file, folder)
    theirs = loaded(folder)
    assert theirs.peft_config["default"].peft_type.value == method.upper()
    torch.testing.assert_close(theirs(x()), model(x()))
    ours = load_adapter(Net(), folder, **QUIET)
    assert ours.first.method == method
    torch.testing.assert_close(ours(x()), model(x()))
    for name, value in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert not [str(w.message) for w in recwarn if "Unexpected keyword" in str(w.message)]


@methods
def test_from_peft_and_back(method: str, tmp_path: Path) -> None:
    """PEFT's folder, read here and written again, is the same adapter to PEFT."""
    if method == "vera":
        config = peft.VeraConfig(
            r=6, target_modules=TARGETS, projection_prng_key=5, vera_dropout=0.1
        )
    else:
        config = peft.AdaLoraConfig(
            init_r=5,
            lora_alpha=7,
            target_modules=TARGETS,
            total_step=9,
            lora_dropout=0.1,
        )
    theirs = shift(peft.get_peft_model(Net(), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(Net(), tmp_path / "theirs", **QUIET)
    export_peft(ours, tmp_path / "ours")
    back = loaded(tmp_path / "ours")
    torch.testing.assert_close(back(x()), theirs(x()))
    there, here = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours")
    )
    assert there.keys() <= here.keys()
    for name, value in there.items():
        assert torch.equal(value, here[name]), name
    dropout = "vera_dropout" if method == "vera" else "lora_dropout"
    assert settings(tmp_path / "ours")[dropout] == 0.1
    if method == "vera":
        assert settings(tmp_path / "ours")["projection_prng_key"] == 5


@methods
def test_it_is_trained_on_by_peft(method: str, tmp_path: Path) -> None:
    """What PEFT loads as trainable has gradients where PEFT's own has."""
    export_peft(adapted(method), tmp_path)
    model = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    model(x()).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    parts = (
        ("vera_lambda_d", "vera_lambda_b") if method == "vera" else ("lora_A", "lora_B", "lora_E")
    )
    assert len(trained) == 2 * len(parts)
    assert all(any(part in name for part in parts) for name in trained)


@methods
@pytest.mark.parametrize("alpha", [None, 9.0, -2.0, 0.0])
def test_scales(method: str, alpha: float | None, tmp_path: Path) -> None:
    """PEFT's VeRA has none, and its AdaLoRA one above zero for all layers."""
    if alpha == 0:
        model = adapted(method, alpha=1.0)
        for layer in model.first, model.second:
            layer.alpha = layer.scale = 0.0
    else:
        pattern = {"second": 3.0} if alpha else None
        model = adapted(method, alpha=alpha, alpha_pattern=pattern)
    export_peft(model, tmp_path)
    torch.testing.assert_close(loaded(tmp_path)(x()), model(x()))


def budgeted(**keywords: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model that a budget has taken ranks from, and its masks."""
    model = adapted("adalora", **keywords)
    budget = RankBudget(model, target_r=2, total_step=6, tinit=1, tfinal=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, 7):
        optimizer.zero_grad()
        model(x()).square().mean().backward()
        optimizer.step()
        masks = budget.update_and_allocate(step)
    return model, masks


@pytest.mark.parametrize("of", ["model", "file"])
def test_ranks_that_a_budget_left(of: str, tmp_path: Path) -> None:
    """rank_pattern has the budget's masks, and the tensors the rows that they leave."""
    model, masks = budgeted()
    assert sum(int(mask.sum()) for mask in masks.values()) == 4
    save_adapter(model, tmp_path / "adapter")
    export_peft(model if of == "model" else tmp_path / "adapter", tmp_path / "peft")
    config = settings(tmp_path / "peft")
    assert config["init_r"] == 4
    assert config["target_r"] == 2
    expected = {f"{name}.lora_E": mask.tolist() for name, mask in masks.items()}
    assert config["rank_pattern"] == expected
    written = tensors(tmp_path / "peft")
    for name, mask in masks.items():
        own = written[f"base_model.model.{name}.lora_E"]
        assert torch.equal(own[:, 0], model.get_submodule(name).core[mask])
    theirs = loaded(tmp_path / "peft")
    torch.testing.assert_close(theirs(x()), model(x()))
    theirs.save_pretrained(tmp_path / "again")  # as PEFT itself writes it
    again = tensors(tmp_path / "again")
    assert again.keys() == written.keys()
    assert all(torch.equal(again[name], value) for name, value in written.items())
    ours = load_adapter(Net(), tmp_path / "peft", **QUIET)
    torch.testing.assert_close(ours(x()), model(x()))
    assert [ours.first.r, ours.second.r] == [int(mask.sum()) for mask in masks.values()]
    export_peft(ours, tmp_path / "third")  # of layers that have what was left of their ranks
    torch.testing.assert_close(loaded(tmp_path / "third")(x()), model(x()))


def test_a_layer_of_no_rank_and_layers_of_different_ones(tmp_path: Path) -> None:
    model = adapted("adalora", rank_pattern={"second": 2})
    model.first.core.data.zero_()
    export_peft(model, tmp_path / "some")
    pattern = settings(tmp_path / "some")["rank_pattern"]
    assert pattern == {"first.lora_E": [False] * 4, "second.lora_E": [True] * 2 + [False] * 2}
    torch.testing.assert_close(loaded(tmp_path / "some")(x()), model(x()))
    model.second.core.data.zero_()  # as at the start: no budget has taken them all
    export_peft(model, tmp_path / "none")
    pattern = settings(tmp_path / "none")["rank_pattern"]
    assert pattern == {"first.lora_E": [True] * 4, "second.lora_E": [True] * 2 + [False] * 2}
    torch.testing.assert_close(loaded(tmp_path / "none")(x()), Net()(x()))


@methods
def test_biases_and_modules_trained_whole(method: str, tmp_path: Path) -> None:
    own = {"vera": ("d", "b"), "adalora": ("down", "core", "up")}[method]
    model = adapted(method, train=(*own, "bias"), modules_to_save=["norm"])
    assert not torch.equal(model.norm.weight, Net().norm.weight)
    export_peft(model, tmp_path)
    assert settings(tmp_path)["bias"] == ("vera_only" if method == "vera" else "lora_only")
    torch.testing.assert_close(loaded(tmp_path)(x()), model(x()))
    back = load_adapter(Net(), tmp_path, **QUIET)
    torch.testing.assert_close(back(x()), model(x()))
    export_peft(back, tmp_path / "again")
    torch.testing.assert_close(loaded(tmp_path / "again")(x()), model(x()))


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_a_bank(method: str, tmp_path: Path) -> None:
    """In PEFT's own format and as plain LoRA: the core is the adapter's, the rest is shared."""
    of = {"vera": {"train": ("d",), "d_initial": 0.0, "b_initial": 1.0}}
    of["adalora"] = {"train": ("core",)}
    first, second = (adapted(method, **of[method]) for _ in range(2))
    for layer in second.first, second.second:
        getattr(layer, layer.row.core[0]).data.mul_(-0.7)
    bank = AdapterBank.from_model(copy.deepcopy(first), slots=3)
    bank.add("first", first)
    bank.add("second", second)
    for name, model in ("first", first), ("second", second):
        for export in export_peft, export_lora:
            folder = tmp_path / f"{name}-{export.__name__}"
            export(bank, folder, name=name)
            torch.testing.assert_close(loaded(folder)(x()), model(x()))
    with pytest.raises(ValueError, match="say by name which"):
        export_peft(bank, tmp_path / "none")


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A method of no format of PEFT's own, a trained weight, values that are no numbers, a path."""
    given: dict[str, Any] = {"target_modules": ["first"], **QUIET}
    folder = tmp_path / "folder"
    plain = adapt(Net(), "lora", r=2, **given)
    with pytest.raises(ValueError, match=r"first is of lora, and .* VeRA and AdaLoRA: export_lora"):
        export_peft(plain, folder)
    save_adapter(plain, tmp_path / "adapter")
    assert cli.main(["convert", str(tmp_path / "adapter"), str(folder), "--to", "peft"]) == 1
    assert "convert --to peft-lora" in capsys.readouterr().err
    for method in ("lora", "vera", "adalora"):
        made = adapt(Net(), method, r=2, dora=True, **given)
        said = rf"first is of {method} with dora, .*dora=True.*peft-dora"
        with pytest.raises(ValueError, match=said):
            export_peft(made, folder)
    vera = adapt(Net(), "vera", r=2, train=("d", "b", "weight"), **given)
    with pytest.raises(ValueError, match=r"first trains its weight.*merge instead"):
        export_peft(vera, folder)
    broken = adapted("adalora")
    broken.second.core.data[1] = math.nan
    with pytest.raises(ValueError, match=r"core of second holds NaN"):
        export_peft(broken, folder)
    with pytest.raises(TypeError, match=r"call export_peft\(model, folder\)"):
        export_peft(folder, adapted("vera"))  # type: ignore[arg-type]
    save_adapter(adapted("vera"), tmp_path / "without", bases=False)
    with pytest.raises(ValueError, match=r"without its frozen factors has to be loaded"):
        export_peft(tmp_path / "without", folder)
    assert not folder.exists()
