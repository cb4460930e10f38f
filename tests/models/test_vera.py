"""VeRA: PEFT's numbers, one pair of factors for all layers, its files, merging and a bank."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fused_lowrank import (
    AdapterBank,
    FusedVeraLinear,
    VeraLinear,
    adapt,
    export_lora,
    init_bases,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)

K, HIDDEN, N, R = 12, 20, 10, 6
NAMES = ["0", "2"]
QUIET: dict[str, Any] = {"progress": False}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, N))


def adapted(seed: int = 3, **keywords: Any) -> nn.Sequential:
    """Adapted, with values of d and b that are no first values."""
    model: Any = adapt(base(), "vera", target_modules=NAMES, r=R, seed=seed, **QUIET, **keywords)
    torch.manual_seed(1)
    for i in (0, 2):
        nn.init.normal_(model[i].d)
        nn.init.normal_(model[i].b)
    return model


def x() -> torch.Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(2))


def peft_model(**keywords: Any) -> Any:
    """PEFT's VeRA over the same base, with the values of `adapted`."""
    peft = pytest.importorskip("peft")
    config = peft.VeraConfig(
        r=R, target_modules=NAMES, projection_prng_key=3, save_projection=True, **keywords
    )
    model = peft.get_peft_model(base(), config)
    ours = adapted()
    for i in (0, 2):
        theirs = model.base_model.model[i]
        theirs.vera_lambda_d["default"].data.copy_(ours[i].d.data)
        theirs.vera_lambda_b["default"].data.copy_(ours[i].b.data)
    return model


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numbers_are_those_of_peft(fused: bool, dtype: torch.dtype) -> None:
    """The same seed gives the same factors, and these the same outputs and gradients."""
    theirs, ours = peft_model(), adapted(fused=fused)
    assert torch.equal(ours[0].down, theirs.base_model.vera_A["default"])
    assert torch.equal(ours[2].up, theirs.base_model.vera_B["default"])
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    for name in ("vera_A", "vera_B"):  # a BufferDict is moved once, and the layers read it
        assert getattr(theirs.base_model, name)["default"].dtype == dtype
    inputs = [x().to(dtype).requires_grad_() for _ in range(2)]
    outputs = [model(one) for model, one in zip((ours, theirs), inputs, strict=True)]
    for y in outputs:
        y.square().sum().backward()
    pairs = [outputs, [one.grad for one in inputs]]
    for i in (0, 2):
        layer = theirs.base_model.model[i]
        pairs.append([ours[i].d.grad, layer.vera_lambda_d["default"].grad])
        pairs.append([ours[i].b.grad, layer.vera_lambda_b["default"].grad])
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    for mine, other in pairs:
        assert torch.allclose(mine, other, rtol=exact, atol=exact * float(other.abs().max()))


def test_one_pair_of_factors() -> None:
    """In memory, in the optimiser's sight, in a state_dict, in copies and after `to`."""
    model = adapted()
    for each in (model, copy.deepcopy(model), adapted().double()):
        assert each[0].down is each[2].down
        assert each[0].up is each[2].up
    assert model[0].down.shape == (R, HIDDEN)
    assert model[0].up.shape == (HIDDEN, R)
    names = [name for name, _ in model.named_parameters()]
    assert names.count("0.down") == 1
    assert "2.down" not in names
    state = model.state_dict()
    assert {key for key in state if key.endswith((".down", ".up"))} == {"0.down", "0.up"}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["0.d", "0.b", "2.d", "2.b"]


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_goes_into_another_model(assign: bool) -> None:
    model, other = adapted(), adapt(base(), "vera", target_modules=NAMES, r=R, **QUIET)
    assert not torch.allclose(other(x()), model(x()))
    other.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(other(x()), model(x()))
    assert other[0].down is other[2].down
    lacking = {key: value for key, value in model.state_dict().items() if key != "0.down"}
    with pytest.raises(RuntimeError, match=r"0\.down"):
        other.load_state_dict(lacking)


def test_the_meta_device() -> None:
    """Made there, loaded later: one pair, drawn from the seed."""
    wanted = adapt(base(), "vera", target_modules=NAMES, r=R, seed=3, **QUIET)
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.Linear(K, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, N))
    adapt(model, "vera", target_modules=NAMES, r=R, seed=3, defer_bases=True, **QUIET)
    model.to_empty(device="cpu")
    model.load_state_dict(base().state_dict(), strict=False)
    init_bases(model, **QUIET)
    assert model[0].up is model[2].up
    assert torch.equal(model(x()), wanted(x()))
    assert torch.equal(model[0].up, wanted[0].up)


@pytest.mark.parametrize("bases", [True, False])
@pytest.mark.parametrize("there", [False, True])
def test_files(bases: bool, there: bool, tmp_path: Path) -> None:
    """One copy of the shared factors, or none; into a plain model, and an adapted one."""
    from safetensors.torch import load_file

    model, path = adapted(), tmp_path / "adapter.safetensors"
    save_adapter(model, path, bases=bases)
    keys = load_file(path).keys()
    assert {key for key in keys if key.endswith((".down", ".up"))} == (
        {"*.down", "*.up"} if bases else set()
    )
    seed = 4 if bases else 3  # of another seed, the file's factors take the place of the model's
    other: Any = adapted(seed) if there else base()
    load_adapter(other, path, **QUIET)
    assert torch.equal(other(x()), model(x()))
    assert other[0].down is other[2].down


def test_a_file_of_another_seed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    save_adapter(adapted(), path, bases=False)
    with pytest.raises(ValueError, match="without its frozen factors"):
        load_adapter(adapted(seed=4), path, **QUIET)
    other = base()
    other[0].weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(other, path, **QUIET)


def test_merging_and_unloading() -> None:
    model, plain = adapted(), base()
    y = model(x())
    assert torch.allclose(merge(model)(x()), y, atol=1e-6)
    assert torch.allclose(unmerge(model)(x()), y)
    assert torch.equal(unload(model)(x()), plain(x()))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("of", ["model", "file"])
def test_export_to_lora(of: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    export_lora(model if of == "model" else tmp_path / "adapter", tmp_path / "lora")
    exported = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert torch.allclose(exported(x()), model(x()), atol=1e-6)


def test_a_bank_of_cores(tmp_path: Path) -> None:
    """Adapters whose d differs, over one b: each row with its own; with another b it is refused."""
    said = r"trains b, which adapters in a bank share: .* or by vera with train=\('d',\)"
    with pytest.raises(ValueError, match=said):
        AdapterBank.from_model(adapted(), slots=2)
    of = {"train": ("d",), "d_initial": 0.0, "b_initial": 1.0}
    first, second, other = (adapted(**of) for _ in range(3))
    for i in (0, 2):
        second[i].d.data.neg_()
        other[i].b.data.neg_()
    bank = AdapterBank.from_model(copy.deepcopy(first), slots=3)
    save_adapter(second, tmp_path / "second")
    bank.add("first", first)
    bank.add("second", tmp_path / "second")
    bank.add("fresh")
    with pytest.raises(ValueError, match="another b of 0"):
        bank.add("other", other)
    save_adapter(other, tmp_path / "other")
    with pytest.raises(ValueError, match="another b of 0"):
        bank.add("other", tmp_path / "other")
    bank.save(tmp_path / "bank")
    again = AdapterBank.from_model(copy.deepcopy(first), slots=3)
    again.load(tmp_path / "bank", **QUIET)
    with pytest.raises(ValueError, match="another b of 0"):
        AdapterBank.from_model(other, slots=3).load(tmp_path / "bank", **QUIET)
    for each in (bank, again):
        with each.use(["second", "first", None]):
            y = each.model(torch.stack([x(), x(), x()]))
        wanted = torch.stack([second(x()), first(x()), base()(x())])
        assert torch.allclose(y, wanted, atol=1e-6)


def test_a_layer_alone() -> None:
    """Both classes are alike, start as the base layer, and learn."""
    linear = nn.Linear(K, N)
    plain, fused = (cls.from_linear(linear, r=R, seed=5) for cls in (VeraLinear, FusedVeraLinear))
    assert fused.down.shape == (R, K)
    assert torch.equal(plain.up, fused.up)
    assert torch.equal(fused(x()), linear(x()))
    fused(x()).sum().backward()
    assert fused.b.grad.abs().max() > 0
    assert fused.down.grad is None
    with pytest.raises(ValueError, match=r"b starts at zero.* or give b_initial another value"):
        FusedVeraLinear(K, N, r=R, train=("d",))
    with pytest.raises(ValueError, match="d and b both start at zero"):
        FusedVeraLinear(K, N, r=R, d_initial=0)
    with pytest.raises(ValueError, match=r"seed is 1\.5: it must be an integer"):
        FusedVeraLinear(K, N, r=R, seed=1.5)
    assert FusedVeraLinear(K, N, r=64)(x()).shape == (5, N)  # more than its sides
