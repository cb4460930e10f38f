"""The family of methods: numbers as published, PEFT's where it has them, files, refusals."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fused_lowrank import (
    AdapterBank,
    adapt,
    export_lora,
    load_adapter,
    lowrank_linear,
    merge,
    save_adapter,
    unload,
)
from fused_lowrank.methods import METHODS, LowRankLinear
from fused_lowrank.methods.method import Factor, Method, Parts
from fused_lowrank.models.budget import RankBudget, orthogonality

K, HIDDEN, N = 12, 20, 8
NAMES = ["0", "2"]
QUIET: dict[str, Any] = {"progress": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora_fa": {"r": 4},
    "vera": {"r": 4, "seed": 3},
    "tied_lora": {"r": 4},
    "melora": {"r": 2, "n": 2},
    "nola": {"r": 4, "m": 5, "seed": 3},
    "adalora": {"r": 4},
}
methods = pytest.mark.parametrize("method", SETTINGS)


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, N))


def adapted(method: str, **keywords: Any) -> nn.Sequential:
    """Adapted, every trained factor random."""
    keywords = {**SETTINGS[method], **QUIET, **keywords}
    model: Any = adapt(base(), method, target_modules=NAMES, **keywords)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.4)
    return model


def x() -> torch.Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(2))


def delta(layer: Any) -> torch.Tensor:
    """ΔW (N, K) / scale, written out for each method."""
    f = {name: factor.detach().double() for name, factor in layer.factors_now().items()}
    k, n = layer.in_features, layer.out_features
    if layer.method == "vera":
        return (f["b"][:, None] * f["up"][:n]) @ (f["d"][:, None] * f["down"][:, :k])
    if layer.method == "tied_lora":
        return (f["v"][:, None] * f["up"][:n]) @ (f["u"][:, None] * f["down"][:, :k])
    if layer.method == "melora":
        blocks = zip(f["down"].chunk(layer.n), f["up"].chunk(layer.n), strict=True)
        return torch.block_diag(*(up @ down for down, up in blocks))
    if layer.method == "nola":
        down = sum(a * one[:, :k] for a, one in zip(f["a"], f["down_bases"], strict=True))
        return sum(b * one[:n] for b, one in zip(f["b"], f["up_bases"], strict=True)) @ down
    if layer.method == "adalora":
        return f["up"] @ torch.diag(f["core"]) @ f["down"]
    return f["up"] @ f["down"]


@methods
@pytest.mark.parametrize("fused", [True, False])
def test_the_equation(method: str, fused: bool) -> None:
    """y is (W + scale · ΔW)·x + bias, with the gradients of that for exactly what is trained."""
    layer: Any = adapted(method, alpha=6.0, fused=fused).double()[2]
    given = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    expected = given @ (layer.weight + 6.0 / layer.r * delta(layer)).t() + layer.bias
    assert torch.allclose(layer(given), expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(layer.delta_weight(), 6.0 / layer.r * delta(layer), atol=1e-6)
    trained = [getattr(layer, name) for name in layer.train_names]
    assert torch.autograd.gradcheck(lambda *_: layer(given), (given, *trained), atol=1e-6)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(layer.row.trained)


@methods
def test_starts_as_the_base_and_learns(method: str) -> None:
    model = adapt(base(), method, target_modules=NAMES, **QUIET, **SETTINGS[method])
    assert torch.allclose(model(x()), base()(x()), atol=1e-7)
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(30):
        loss = (model(x()) - 1.0).square().mean()
        losses.append(float(loss))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]
    after = model.state_dict().items()
    changed = {key.rpartition(".")[2] for key, value in after if (value != before[key]).any()}
    assert changed == set(METHODS[method][0].row.trained)


@methods
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("bases", [False, True])
def test_files(method: str, there: bool, bases: bool, tmp_path: Path) -> None:
    if method == "lora_fa" and not bases:
        pytest.skip("its frozen factor is random")
    model = adapted(method)
    save_adapter(model, tmp_path / "adapter", bases=bases)
    other: Any = base()
    if there:
        adapt(other, method, target_modules=NAMES, **QUIET, **SETTINGS[method])
    load_adapter(other, tmp_path / "adapter", **QUIET)
    assert torch.equal(other(x()), model(x()))
    again = adapt(base(), method, target_modules=NAMES, **QUIET, **SETTINGS[method])
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x()), model(x()))


@methods
@pytest.mark.parametrize("of", ["model", "file"])
def test_merge_and_export(method: str, of: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(method)
    y = model(x())
    save_adapter(model, tmp_path / "adapter")
    if method == "nola" and of == "file":
        with pytest.raises(ValueError, match=r"has no 0\.down_bases: .* loaded into its base"):
            export_lora(tmp_path / "adapter", tmp_path / "lora")
        return
    export_lora(model if of == "model" else tmp_path / "adapter", tmp_path / "lora")
    exported = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert torch.allclose(exported(x()), y, atol=1e-5)
    assert torch.allclose(merge(model)(x()), y, atol=1e-5)
    assert torch.equal(unload(model)(x()), base()(x()))


def test_lora_fa_saves_no_input() -> None:
    """Its backward needs t = x·downᵀ of r columns, not x of in_features."""
    layer: Any = METHODS["lora_fa"][1](64, 48, r=4)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(512, 64))
    assert 512 * 4 in sizes
    assert max(sizes) < 512 * 48


def test_nola_saves_coefficients_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = adapted("nola")
    save_adapter(model, tmp_path / "adapter")
    parts = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter")}
    assert parts == {"a", "b", "fingerprint"}
    own = {key.rpartition(".")[2] for key in model.state_dict()}
    assert own == {"weight", "bias", "a", "b", "_extra_state"}  # the last has the seed
    other = adapt(base(), "nola", target_modules=NAMES, r=4, m=5, seed=4, **QUIET)
    with pytest.raises(ValueError, match="seed of 0 is 4 here and 3 there"):
        load_adapter(other, tmp_path / "adapter", **QUIET)
    with pytest.raises(ValueError, match=r"train names .*down_bases"):
        adapted("nola", train=("b", "down_bases"))


def test_melora_needs_sides_that_n_divides() -> None:
    with pytest.raises(ValueError, match="0: n is 5: it must divide in_features, which is 12"):
        adapt(base(), "melora", target_modules=NAMES, r=2, n=5, **QUIET)


@pytest.mark.parametrize("method", ["vera", "tied_lora", "nola"])
def test_what_is_shared_is_on_one_device(method: str) -> None:
    model = base()
    model[0].to("meta")
    with pytest.raises(ValueError, match="on several devices"):
        adapt(model, method, target_modules=NAMES, defer_bases=True, **QUIET, **SETTINGS[method])
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("method", ["vera", "tied_lora", "melora", "nola"])
def test_slices_of_a_layer_are_refused(method: str) -> None:
    """Tensor parallelism needs factors whose slices make a slice of the layer."""
    from fused_lowrank.parallel import LowRankColwiseParallel, LowRankRowwiseParallel

    layer, mesh = METHODS[method][1](K, N, **SETTINGS[method]), object()
    for style in (LowRankColwiseParallel(), LowRankRowwiseParallel()):
        with pytest.raises(ValueError, match=f"{method} cannot be parallelised"):
            style._apply(layer, mesh)


# --- AdaLoRA beside PEFT's ---


def peft_adalora(**keywords: Any) -> Any:
    peft = pytest.importorskip("peft")
    given = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "tinit": 2, "tfinal": 3, "total_step": 12}
    config = peft.AdaLoraConfig(target_modules=NAMES, deltaT=2, **{**given, **keywords})
    model = peft.get_peft_model(base(), config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.4)
    return model


def as_ours(theirs: Any) -> Any:
    """Our model with the values of PEFT's."""
    model: Any = adapt(
        base(), "adalora", target_modules=NAMES, r=4, alpha=6 * 4 / (4 + 1e-5), **QUIET
    )
    for i in (0, 2):
        layer = theirs.base_model.model[i]
        model[i].to(layer.lora_A["default"].dtype)
        model[i].down.data.copy_(layer.lora_A["default"].data)
        model[i].core.data.copy_(layer.lora_E["default"].data[:, 0])
        model[i].up.data.copy_(layer.lora_B["default"].data)
    return model


def test_adalora_is_pefts() -> None:
    """Outputs, gradients, the penalty, and which ranks are taken when, over a whole training."""
    theirs = peft_adalora().double()
    ours = as_ours(theirs).double()
    given = x().double()
    budget = RankBudget(ours, target_r=2, tinit=2, tfinal=3, total_step=12, deltaT=2)
    of = theirs.base_model
    optimisers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
        for model in (ours, theirs)
    ]
    for step in range(1, 13):
        penalty = orthogonality(ours)
        (ours(given).square().mean() + 0.1 * penalty).backward()
        wanted = torch.stack(
            [
                torch.norm(c - torch.eye(len(c), dtype=c.dtype))
                for i in (0, 2)
                for c in (
                    of.model[i].lora_A["default"] @ of.model[i].lora_A["default"].T,
                    of.model[i].lora_B["default"].T @ of.model[i].lora_B["default"],
                )
            ]
        ).mean()
        assert torch.allclose(penalty, wanted, rtol=1e-9)
        (of.model(given).square().mean() + 0.1 * wanted).backward()
        for i in (0, 2):
            own = ours[i].core.grad, of.model[i].lora_E["default"].grad[:, 0]
            assert torch.allclose(*own, rtol=1e-6, atol=1e-9)
        for optimiser in optimisers:
            optimiser.step()
        budget.update_and_allocate(step)
        of.update_and_allocate(step)
        for i in (0, 2) if step < 9 else ():
            a, e, b = (of.rankallocator._element_score(f"{i}.lora_{f}.default") for f in "AEB")
            scores = e[:, 0] + a.mean(1) + b.mean(0)
            assert torch.allclose(budget.scores(str(i)), scores, rtol=1e-3)
        for optimiser in optimisers:
            optimiser.zero_grad()
        for i in (0, 2):
            mine, other = ours[i].core, of.model[i].lora_E["default"][:, 0]
            assert torch.equal(mine == 0, other == 0), step
            assert torch.allclose(mine, other, rtol=1e-6, atol=1e-9)
    assert sum(int((ours[i].core != 0).sum()) for i in (0, 2)) == 4


@pytest.mark.parametrize("kind", ["adalora", "vera", "vera without its matrices"])
def test_peft_checkpoints_load(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if kind == "adalora":
        theirs = peft_adalora()
        pattern = {"0.lora_E": [True, False, True, True], "2.lora_E": [False, True, False, False]}
        theirs.peft_config["default"].rank_pattern = pattern
        for i, name in ((0, "0.lora_E"), (2, "2.lora_E")):
            own = theirs.base_model.model[i].lora_E["default"].data
            own[~torch.tensor(pattern[name])] = 0
    else:
        config = peft.VeraConfig(
            r=6, target_modules=NAMES, projection_prng_key=7, save_projection=kind == "vera"
        )
        theirs = peft.get_peft_model(base(), config)
        for name, parameter in theirs.named_parameters():
            if "vera_lambda" in name:
                nn.init.normal_(parameter)
    y = theirs.base_model.model(x())
    theirs.save_pretrained(tmp_path)
    if kind != "adalora":
        with pytest.raises(ValueError, match=r"how large|has no .*down"):
            export_lora(tmp_path, tmp_path / "lora")
    else:
        export_lora(tmp_path, tmp_path / "lora")
        exported = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
        assert torch.allclose(exported(x()), y, atol=1e-5)
    ours: Any = load_adapter(base(), tmp_path, **QUIET)
    assert torch.allclose(ours(x()), y, atol=1e-5)
    if kind == "adalora":
        assert (ours[0].r, ours[2].r) == (3, 1)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"target_r": 5}, "target_r is 5: .* mean rank, 4"),
        ({"target_r": 0}, "target_r is 0"),
        ({"tinit": 9}, "there must be steps between"),
        ({"beta1": 1.0}, "beta1 and beta2 are 1.0"),
        ({"beta2": "0.9"}, "beta2 is '0.9': it must be a finite number"),
        ({"target_r": "2"}, "target_r is '2': it must be an integer"),
        ({"target_r": 2.5}, "target_r is 2.5: it must be an integer"),
        ({"total_step": 9.5}, "total_step is 9.5: it must be an integer"),
        ({"deltaT": 1.5}, "deltaT is 1.5: it must be an integer"),
    ],
)
def test_budgets_that_are_none(keywords: dict[str, Any], said: str) -> None:
    model = adapted("adalora")
    with pytest.raises(ValueError, match=said):
        RankBudget(model, **{"target_r": 2, "total_step": 10, "tfinal": 2, **keywords})
    with pytest.raises(ValueError, match="no layer of adalora"):
        RankBudget(adapted("lora_fa"), target_r=2, total_step=10)
    with pytest.raises(RuntimeError, match="has no gradient"):
        RankBudget(model, target_r=2, total_step=10).update_and_allocate(1)
    with pytest.raises(ValueError, match=r"global_step is 1\.0: it must be an integer"):
        RankBudget(model, target_r=2, total_step=10).update_and_allocate(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0 does not train down and up: .* all three in train"):
        RankBudget(adapted("adalora", train=("core",)), target_r=2, total_step=10)


# --- a row of one's own ---

SCALED = Method(
    name="scaled",
    title="a row with a gain",
    ranks={"r": 2},
    factors={
        "down": Factor("rK", "kaiming", True),
        "up": Factor("Nr", "zeros", True),
        "magnitude": Factor("N", "ones", True),
    },
    learning_rate=1e-3,
    parts=lambda f, weight, scale: Parts(f["down"], None, f["up"], f["magnitude"]),
)


class ScaledLinear(LowRankLinear, row=SCALED):
    """A method with a gain."""


def test_a_row_is_a_method() -> None:
    """A row alone gives a layer: its keywords, its gradients, a gain over the outputs."""
    layer: Any = ScaledLinear(K, N, r=3, alpha=6.0).double()
    for factor in (layer.down, layer.up, layer.magnitude):
        nn.init.normal_(factor)
    given = torch.randn(4, K, dtype=torch.float64)
    plain = lowrank_linear(given, layer.weight, layer.down, None, layer.up, scale=2.0)
    assert torch.allclose(layer(given), layer.magnitude * plain + layer.bias)
    y = layer(given)
    y.sum().backward()
    assert layer.magnitude.grad is not None
    layer.merge()
    assert torch.allclose(layer(given), y)


def test_a_bank_of_adalora() -> None:
    """Its down and up are each adapter's own: refused, nothing changed; cores alone will do."""
    model = adapted("adalora")
    y, state = model(x()), copy.deepcopy(model.state_dict())
    said = r"trains down, up, which adapters in a bank share.* or by adalora with train=\('core',\)"
    with pytest.raises(ValueError, match=said):
        AdapterBank.from_model(model, slots=2)
    assert torch.equal(model(x()), y)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model = adapted("adalora", train=("core",))
    bank = AdapterBank.from_model(copy.deepcopy(model), slots=2)
    bank.add("one", model)
    bank.add("fresh")
    with bank.use(["one", "fresh"]):
        y = bank.model(torch.stack([x(), x()]))
    torch.testing.assert_close(y, torch.stack([model(x()), base()(x())]))
    with pytest.raises(ValueError, match="trains more of 0 than its core: down, core, up"):
        bank.add("other", adapted("adalora"))
