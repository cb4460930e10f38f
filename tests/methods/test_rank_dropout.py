"""rank_dropout: columns of u that are zero in training, for all rows of a call the same."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_lowrank import AdapterBank, adapt, load_adapter, save_adapter
from fused_lowrank.methods import METHODS, LowRankLinear

D, N, P = 24, 20, 0.4
SETTINGS = {
    "lora": {"r": 5, "alpha": 3},
    "lora_xs": {"r": 5, "alpha": 3},
    "lora_mini": {"r": 3, "a": 8, "b": 6, "alpha": 2},
    "lora_fa": {"r": 5, "alpha": 3},
    "vera": {"r": 5, "alpha": 3},
    "tied_lora": {"r": 5, "alpha": 3},
    "melora": {"r": 2, "n": 4, "alpha": 3},
    "nola": {"r": 5, "m": 3, "alpha": 3},
    "adalora": {"r": 5, "alpha": 3},
}
METHOD = pytest.mark.parametrize("method", METHODS)
IMPL = pytest.mark.parametrize("impl", ["reference", "aten", "auto", "triton"])


def layer_of(method: str, impl: str | None = None, **more: object) -> LowRankLinear:
    """A layer in float64 with trained factors that show."""
    torch.manual_seed(0)
    linear = nn.Linear(D, N).double()
    settings = {"rank_dropout": P, "dtype": torch.float64, **SETTINGS[method], **more}
    layer = METHODS[method][1].from_linear(linear, impl=impl, **settings)
    for factor in layer.trained_factors:
        nn.init.normal_(factor)
    return layer.train()


def mask_of(seed: int, layer: LowRankLinear) -> Tensor:
    """(Q,): what a call draws after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    return (torch.rand(layer.parts().up.shape[1]) >= P) / (1 - P)


def expected(layer: LowRankLinear, x: Tensor, mask: Tensor) -> Tensor:
    """y with the columns of u that the mask has, in plain torch."""
    down, core, up, _ = layer.parts()
    t = x @ down.t()
    for part in core if isinstance(core, tuple) else () if core is None else (core,):
        t = t * part if part.dim() == 1 else t @ part
    return nn.functional.linear(x, layer.weight, layer.bias) + layer.scale * (t * mask) @ up.t()


@METHOD
@IMPL
def test_output_and_gradients(method: str, impl: str) -> None:
    """Of every implementation those of the masked equation; whole columns of u, for all rows."""
    layer = layer_of(method, impl)
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    inputs, masks = [x, *layer.trained_factors], []
    for seed in (1, 2, 3):
        mask = mask_of(seed, layer)
        masks.append(mask)
        wanted = expected(layer, x, mask)
        torch.manual_seed(seed)
        y = layer(x)
        torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
        weight = torch.randn_like(y)
        got, exact = (torch.autograd.grad((own * weight).sum(), inputs) for own in (y, wanted))
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    assert any(mask.eq(0).any() for mask in masks)
    assert any(mask.ne(0).any() for mask in masks)
    assert len({tuple(mask.tolist()) for mask in masks}) == 3


@METHOD
def test_in_training_alone(method: str) -> None:
    """In eval mode, and merged, the layer is what it is without; nothing is drawn."""
    layer, without = layer_of(method), layer_of(method, rank_dropout=0.0)
    x = torch.randn(4, D, dtype=torch.float64)
    state = torch.get_rng_state()
    assert torch.equal(layer.eval()(x), without(x))
    assert torch.equal(layer.delta_weight(), without.delta_weight())
    layer.train().merge()
    torch.testing.assert_close(layer(x), without(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.get_rng_state(), state)
    layer.unmerge()
    assert not torch.allclose(layer(x), without(x))


def test_the_mean_is_what_it_is_without() -> None:
    """A kept column is scaled by 1 / (1 - p): over 4000 calls within 5 standard errors."""
    layer, without = layer_of("lora_xs"), layer_of("lora_xs", rank_dropout=0.0)
    x = torch.randn(1, D, dtype=torch.float64)
    torch.manual_seed(5)
    with torch.no_grad():
        ys = torch.cat([layer(x) for _ in range(4000)])
        error = (ys.mean(0) - without(x)[0]).abs()
    assert (error < 5 * ys.std(0) / 4000**0.5 + 1e-12).all()
    assert (ys.std(0) > 0.01).all()


def test_beside_dropout() -> None:
    """Both act: the input of down is masked, and so are the columns of u."""
    layer = layer_of("lora_xs", "reference", dropout=0.5)
    x = torch.randn(6, D, dtype=torch.float64)
    mask = mask_of(3, layer)
    low = nn.functional.dropout(x, 0.5) if mask.any() else x
    own = nn.functional.linear(low, layer.weight, layer.bias)
    wanted = expected(layer, low, mask) - own + nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-9, atol=1e-9)


@METHOD
def test_a_checkpoint_draws_it_again(method: str) -> None:
    """What is computed again is as it was: torch's generator is put back."""
    layer = layer_of(method)
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)
        y = call(x)
        torch.rand(3)
        results.append([y, *torch.autograd.grad(y.exp().sum(), [x, *layer.trained_factors])])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_in_one_graph() -> None:
    """torch.compile takes it whole; each call of the graph draws anew."""
    layer = layer_of("lora_xs")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, D, dtype=torch.float64)
    torch.manual_seed(1)
    ys = [compiled(x).detach() for _ in range(8)]
    whole = layer.eval()(x).detach()
    assert all(y.isfinite().all() and not torch.allclose(y, whole) for y in ys)
    assert len({float(y.sum()) for y in ys}) > 4


@METHOD
def test_settings_and_files(method: str, tmp_path: Path) -> None:
    """In files and `settings` where it is on; a file without it is as files were before."""
    settings = {"target_modules": ["0"], "progress": False, **SETTINGS[method]}
    for p in (P, 0.0):
        model = adapt(nn.Sequential(nn.Linear(D, N)), method, rank_dropout=p, **settings)
        assert ("rank_dropout" in model[0].settings()) == (p > 0)
        assert ("rank_dropout=0.4" in repr(model)) == (p > 0)
        save_adapter(model, tmp_path / "adapter")
        base = nn.Sequential(nn.Linear(D, N))
        base[0].load_state_dict({"weight": model[0].weight, "bias": model[0].bias})
        assert load_adapter(base, tmp_path / "adapter", progress=False)[0].rank_dropout == p


@METHOD
@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_out_of_range(method: str, p: float) -> None:
    with pytest.raises(ValueError, match=r"rank_dropout is .*: it must be at least 0 and below 1"):
        layer_of(method, rank_dropout=p)


@pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])
def test_in_a_bank(method: str, tmp_path: Path) -> None:
    """Rows with adapters of their own have the mask of their call; in eval mode there is none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, N)).double()
    given = {"rank_dropout": P, "dtype": torch.float64, "progress": False, **SETTINGS[method]}
    adapt(model, method, target_modules=["0"], **given)
    cores = {}
    for name in ("one", "two"):
        for factor in model[0].trained_factors:
            nn.init.normal_(factor)
        save_adapter(model, tmp_path / name)
        cores[name] = [factor.detach().clone() for factor in model[0].trained_factors]
    bank = AdapterBank.from_model(model, slots=4, dtype=torch.float64)
    for name in ("one", "two"):
        bank.add(name, tmp_path / name)
    x = torch.randn(3, D, dtype=torch.float64)

    def alone(name: str, mask: Tensor) -> Tensor:
        for factor, value in zip(model[0].trained_factors, cores[name], strict=True):
            factor.data.copy_(value)
        return expected(model[0], x, mask).detach()

    for names in (["two", "one", "two"], "one"):
        each = [names] * 3 if isinstance(names, str) else names
        for training in (True, False):
            model.train(training)
            mask = mask_of(6, model[0]) if training else torch.ones(model[0].up.shape[1])
            torch.manual_seed(6)
            with bank.use(names):
                y = model(x)
            wanted = torch.stack([alone(name, mask)[i] for i, name in enumerate(each)])
            torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with bank.use(["two", "one", "two"]):
        sums = {float(compiled(x).sum().detach()) for _ in range(8)}
    assert len(sums) > 4
