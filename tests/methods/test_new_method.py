"""A method that the library does not have: a row, its two classes and a line in METHODS are all.

It is LoRA with a trained diagonal between frozen random factors. docs/design.md, "A new method".
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_lowrank import (
    AdapterBank,
    adapt,
    disable_adapters,
    explain,
    export_lora,
    load_adapter,
    merge,
    parameter_groups,
    save_adapter,
    unload,
    unmerge,
)
from fused_lowrank.files import cli
from fused_lowrank.methods import METHODS, LowRankLinear
from fused_lowrank.methods.method import Factor, Method
from fused_lowrank.models.adapt import describe
from fused_lowrank.testing import measure, pinned_plan

# --- the first file: methods/family/gates.py ---

GATES = Method(
    name="gates",
    title="Gates",
    ranks={"r": 16},
    factors={
        "down": Factor("rK", "kaiming"),
        "core": Factor("r", "zeros", trained=True),
        "up": Factor("Nr", "kaiming"),
    },
    learning_rate=1e-2,
    core=("core",),
    dora=False,
)


class GatesLinear(LowRankLinear, row=GATES):
    """A trained diagonal core (r,) between random factors, in plain PyTorch."""


class FusedGatesLinear(GatesLinear):
    """`GatesLinear` through the fused kernels."""

    impl = "auto"


# --- the second: methods/__init__.py ---


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "gates", (GatesLinear, FusedGatesLinear))


K, HIDDEN, N = 24, 20, 18
TARGETS: dict[str, Any] = {"target_modules": ["0", "2"], "r": 5, "progress": False}


def base() -> nn.Sequential:
    """The same model every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, N))


def adapted(**keywords: Any) -> Any:
    """Adapted, the trained factors away from their start."""
    model = adapt(base(), "gates", **TARGETS, alpha=8, **keywords)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter)
    return model


def x() -> Tensor:
    return torch.randn(6, K, generator=torch.Generator().manual_seed(2))


def test_it_is_adapted_trained_and_described() -> None:
    """The model starts as the base, one diagonal is trained, and who asks is told so."""
    model = adapt(base(), "gates", **TARGETS)
    torch.testing.assert_close(model(x()), base()(x()))
    assert describe(model).startswith("gates: 2 layers adapted; 10 of 1,298 parameters trained")
    assert "FusedGatesLinear 24 → 20, P = 5, Q = 5" in str(explain(model[0], 64))
    (group,) = parameter_groups(model, lr=0.1, weight_decay=0.01)
    optimizer = torch.optim.AdamW([group])
    losses = []
    for _ in range(20):
        loss = (model(x()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]
    with pytest.raises(TypeError, match="gates has no keyword 'rank': it is called r"):
        adapt(base(), "gates", target_modules=["0"], rank=3)
    with pytest.raises(ValueError, match="r is 25: it must be at least 1 and at most 20"):
        adapt(base(), "gates", **{**TARGETS, "target_modules": ["0"], "r": 25})


@pytest.mark.parametrize("plan", [None, "split", "decode", "aten"])
def test_it_is_computed_by_the_kernels(plan: str | None, device: torch.device) -> None:
    """Output and gradients through every way are the formula's, within the error budget."""
    layer: Any = FusedGatesLinear(K, N, r=5, alpha=8, device=device)
    nn.init.normal_(layer.core)

    def formula(x: Tensor, core: Tensor) -> Tensor:
        w, down, up, bias = (
            getattr(layer, name).detach().to(x.dtype) for name in ("weight", "down", "up", "bias")
        )
        return x @ w.t() + layer.scale * ((x @ down.t()) * core) @ up.t() + bias

    def ours(x: Tensor, core: Tensor) -> Tensor:
        with pinned_plan(plan) if plan else torch.enable_grad():
            return torch.func.functional_call(layer, {"core": core}, (x,))

    core = layer.core.detach().clone().requires_grad_()
    made = {"x": x().to(device).requires_grad_(), "core": core}
    errors = measure(ours, formula, made, torch.randn(6, N, device=device))
    assert [one.name for one in errors] == ["y", "dx", "dcore"]
    assert all(one.within for one in errors), errors


@pytest.mark.parametrize("bases", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_it_goes_through_files(
    dora: bool, bases: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file, which the command line knows; a state_dict; without the frozen factors a refusal."""
    path, model = tmp_path / "a.safetensors", adapted(dora=dora)
    y = model(x())
    save_adapter(model, path, bases=bases)
    if bases:
        assert torch.equal(load_adapter(base(), path, progress=False)(x()), y)
    else:
        other = base()
        torch.manual_seed(1)  # of the factors that would be drawn
        with pytest.raises(ValueError, match="down"):
            load_adapter(other, path, progress=False)
    again = adapt(base(), "gates", **TARGETS, alpha=8, dora=dora)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x()), y)
    assert cli.main(["inspect", str(path)]) == 0
    assert "gates" in capsys.readouterr().out


@pytest.mark.parametrize("dora", [True, False])
def test_it_is_merged_exported_and_taken_out(dora: bool, tmp_path: Path) -> None:
    """ΔW goes into the weight and out again; PEFT computes the export; the base is given back."""
    peft = pytest.importorskip("peft")
    model = adapted(dora=dora)
    y = model(x())
    export_lora(model, tmp_path / "lora", dora=dora)
    exported = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
    torch.testing.assert_close(exported(x()), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merge(model)(x()), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unmerge(model)(x()), y, rtol=0, atol=0)
    with disable_adapters(model):
        assert torch.equal(model(x()), base()(x()))
    assert torch.equal(unload(model)(x()), base()(x()))


def test_it_goes_into_a_bank() -> None:
    """Its core is all that is trained, so adapters of one model are a table of diagonals."""
    model = adapted()
    cores = [torch.randn(2, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected = []
    for own in cores:
        model[0].core.data, model[2].core.data = own
        expected.append(model(x()))
    bank = AdapterBank.from_model(model, slots=2)
    for name, own in zip("ab", cores, strict=True):
        bank.add(name, {"0.core": own[0], "2.core": own[1]})
    with bank.use(["a", None, "b", "a", "b", None]):
        y = model(x())
    (a, b), bare = expected, base()(x())
    whole = torch.stack([own[row] for row, own in enumerate([a, bare, b, a, b, bare])])
    torch.testing.assert_close(y, whole, rtol=1e-4, atol=1e-5)
