"""merge_and_restart: what a model computes stays, its base and its adapters do not."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_lowrank import (
    AdapterBank,
    adapt,
    disable_adapters,
    init_bases,
    load_adapter,
    merge,
    merge_and_restart,
    parameter_groups,
    save_adapter,
    unload,
)
from fused_lowrank.methods import METHODS

D = 24
SETTINGS = {
    "lora": {"r": 3},
    "lora_xs": {"r": 3},
    "lora_mini": {"r": 3, "a": 8, "b": 8},
    "lora_fa": {"r": 3},
    "melora": {"r": 2, "n": 2},
    "nola": {"r": 3, "m": 5},
    "adalora": {"r": 3},
    "vera": {"r": 3},
    "tied_lora": {"r": 3},
}
SHARED = [method for method, kinds in METHODS.items() if kinds[0].row.shared]
METHOD = pytest.mark.parametrize("method", [name for name in METHODS if name not in SHARED])


def plain(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Linear(D, 4)).to(dtype)


def adapted(method: str = "lora", **given: object) -> nn.Sequential:
    """Of the first two linear layers."""
    settings = {"target_modules": ["0", "2"], "progress": False, **SETTINGS[method], **given}
    return adapt(plain(), method, **settings)


def optimizer_of(model: nn.Module, kind: Callable = torch.optim.AdamW) -> torch.optim.Optimizer:
    return kind(parameter_groups(model, 0.05))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 1
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, D, generator=generator, dtype=torch.float64)
        (model(x) - x[:, :4].sin()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


X = torch.randn(5, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@METHOD
def test_the_function_stays_and_the_adapters_begin_anew(method: str) -> None:
    """The outputs are the same, ΔW is 0 in the same Parameters, and all of the method learns on."""
    model = adapted(method)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    y, parameters = model(X), dict(model.named_parameters())
    deltas = {i: model[i].delta_weight() for i in (0, 2)}
    weights = {i: model[i].weight.detach().clone() for i in (0, 2)}
    assert merge_and_restart(model, optimizer, progress=False) is model
    torch.testing.assert_close(model(X), y, rtol=1e-10, atol=1e-10)
    assert all(parameters[name] is own for name, own in model.named_parameters())
    for i, delta in deltas.items():
        assert not model[i].delta_weight().any()
        assert torch.equal(model[i].weight, weights[i] + delta)
        assert delta.norm() > 1e-3
        assert not model[i].weight.requires_grad
    before = [model[i].delta_weight() for i in (0, 2)]
    train(model, optimizer, seed=2)
    assert all(
        (model[i].delta_weight() - old).norm() > 1e-3 for i, old in zip((0, 2), before, strict=True)
    )


@pytest.mark.parametrize("method", SHARED)
def test_factors_that_layers_share_have_no_restart(method: str) -> None:
    """It is refused, and nothing has changed."""
    model = adapted(method)
    before = {name: own.clone() for name, own in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"shares factors of {method} .* it has no restart"):
        merge_and_restart(model, None, progress=False)
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())


@METHOD
def test_new_factors_are_those_of_a_model_adapted_anew(method: str) -> None:
    """As `unload(model, merge=True)` and `adapt` would give with the same random numbers, but for
    the core of LoRA-XS, which is zero."""
    model = adapted(method)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    twin = unload(copy.deepcopy(model), merge=True)
    torch.manual_seed(3)
    merge_and_restart(model, optimizer, progress=False)
    torch.manual_seed(3)
    adapt(twin, method, target_modules=["0", "2"], progress=False, **SETTINGS[method])
    for i in (0, 2):
        for name in model[i].factors:
            own, other = getattr(model[i], name), getattr(twin[i], name)
            assert torch.equal(own, torch.zeros_like(own) if name == "core" else other), name


def test_the_sum_has_a_higher_rank() -> None:
    """Four updates of LoRA, of rank 3 each, are together of rank 12; new bases of LoRA-XS span what
    the old ones did, as the docstring says, while the leading directions lead.
    """
    ranks = {}
    for method in ("lora", "lora_mini", "lora_xs"):
        model, base = adapted(method), plain()
        if method == "lora_xs":  # a weight whose leading directions stand out
            for part in (model, base):
                u, s, v = torch.linalg.svd(plain()[0].weight.detach())
                s[:3] += 50
                part[0].weight.data.copy_(u @ s.diag() @ v)
            model[0].init_factors()
        optimizer = optimizer_of(model)
        for restart in range(4):
            train(model, optimizer, seed=restart)
            merge_and_restart(model, optimizer, progress=False)
        total = (model[0].weight - base[0].weight).detach()
        ranks[method] = int(torch.linalg.matrix_rank(total, atol=1e-6))
    assert ranks == {"lora": 12, "lora_mini": 12, "lora_xs": 3}


@METHOD
def test_the_base_is_the_new_one(method: str, tmp_path: Path) -> None:
    """base(), disable_adapters, unload and files mean the weights as they are since."""
    model = adapted(method)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    y = model(X).detach()
    merge_and_restart(model, optimizer, progress=False)
    assert all(torch.equal(model[i].base()[0], model[i].weight) for i in (0, 2))
    train(model, optimizer, seed=2)
    after = model(X).detach()
    assert not torch.allclose(after, y, atol=1e-3)
    with disable_adapters(model):
        torch.testing.assert_close(model(X), y, rtol=1e-10, atol=1e-10)
    for bases in (True, method != "lora_xs"):  # LoRA-XS's are computed again, from the new weight
        save_adapter(model, tmp_path / "adapter", bases=bases)
        if method != "adalora":  # whose small ΔW a fingerprint takes for rounding
            with pytest.raises(ValueError, match="was made for another base model: the weight of"):
                load_adapter(plain(), tmp_path / "adapter", progress=False)
        base = unload(copy.deepcopy(model))
        assert torch.allclose(base(X), y, rtol=1e-10, atol=1e-10)
        loaded = load_adapter(base, tmp_path / "adapter", progress=False)
        torch.testing.assert_close(loaded(X), after, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(merge(model)(X), after, rtol=1e-10, atol=1e-10)
    unload(model, merge=True)
    torch.testing.assert_close(model(X), after, rtol=1e-10, atol=1e-10)


def test_modules_trained_whole_and_biases_go_on() -> None:
    """Their values and the optimiser's state of them stay; the base of a bias is what it was."""
    model = adapted(train=("down", "up", "bias"), modules_to_save=["3"])
    optimizer = optimizer_of(model)
    train(model, optimizer)
    others = [model[3].weight, model[3].bias, model[0].bias, model[2].bias]
    before = [(own.detach().clone(), optimizer.state[own]["exp_avg"].clone()) for own in others]
    merge_and_restart(model, optimizer, progress=False)
    for own, (value, moment) in zip(others, before, strict=True):
        assert torch.equal(own, value)
        assert moment.any()
        assert torch.equal(optimizer.state[own]["exp_avg"], moment)
    assert torch.equal(model[0].base()[1], plain()[0].bias)


ADAMS = [torch.optim.AdamW, torch.optim.Adam, torch.optim.Adamax, torch.optim.RAdam]
OTHERS = [torch.optim.NAdam, torch.optim.Rprop, torch.optim.RMSprop, torch.optim.Adafactor]


def with_momentum(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9, dampening=0.5)


@pytest.mark.parametrize("kind", [*ADAMS, *OTHERS, with_momentum], ids=lambda kind: kind.__name__)
def test_the_optimizer_forgets_all(kind: Callable) -> None:
    """After a restart it steps as one that is new, bit for bit, whatever it keeps."""
    model = adapted("lora_mini")
    optimizer = optimizer_of(model, kind)
    train(model, optimizer)
    merge_and_restart(model, optimizer, progress=False)
    twin = copy.deepcopy(model)
    new = optimizer_of(twin, kind)
    train(model, optimizer, seed=2)
    train(twin, new, seed=2)
    assert model[0].b_train.any()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, other)


def test_state_is_forgotten_in_place_where_graphs_read_it() -> None:
    """Adam's moments and counts are the tensors that they were."""
    model = adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    tensors = dict(optimizer.state[model[0].up])
    merge_and_restart(model, optimizer, progress=False)
    assert tensors.keys() == {"step", "exp_avg", "exp_avg_sq"}
    for key, value in optimizer.state[model[0].up].items():
        assert value is tensors[key]
        assert not value.any()


@pytest.mark.parametrize(("prune", "left"), [(0.99, 0), (0.9, 7), (0.5, 36), (0.0, 72)])
def test_pruning_by_magnitude(prune: float, left: int) -> None:
    """The greatest of each moment stay, and the count of steps; of 72 numbers, so many."""
    model = adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    state = optimizer.state[model[0].down]
    before = {key: value.clone() for key, value in state.items()}
    merge_and_restart(model, optimizer, prune=prune, progress=False)
    assert torch.equal(state["step"], before["step"])
    for key in ("exp_avg", "exp_avg_sq"):
        stay = state[key] != 0
        assert int(stay.sum()) == left
        assert torch.equal(state[key][stay], before[key][stay])
        if 0 < left < 72:
            assert before[key][stay].abs().min() > before[key][~stay].abs().max()


def test_gradients_of_old_factors_are_dropped() -> None:
    """They would be steps of factors that are no more."""
    model = adapted()
    optimizer = optimizer_of(model)
    model(X).sum().backward()
    assert model[0].up.grad is not None
    merge_and_restart(model, optimizer, progress=False)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rounding_is_said() -> None:
    """Of 16-bit weights; without a word where nothing is lost."""
    for dtype, count in ((torch.bfloat16, 1), (torch.float32, 0)):
        model = plain(dtype)
        adapt(model, "lora", target_modules=["0"], r=3, progress=False)
        nn.init.normal_(model[0].up)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            merge_and_restart(model, optimizer_of(model), progress=False)
        assert len(said) == count
        if said:
            assert "of ΔW to rounding (in 0), for good" in str(said[0].message)
            assert said[0].filename == __file__


# --- refused, with everything as it was ---


@contextmanager
def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Values, Parameters, and the optimiser's state are what they were."""
    parameters = [(id(own), own.detach().clone()) for own in model.parameters()]
    state = copy.deepcopy(list(optimizer.state.values()))
    yield
    after = [(id(own), own) for own in model.parameters()]
    assert [key for key, _ in after] == [key for key, _ in parameters]
    for (_, own), (_, old) in zip(after, parameters, strict=True):
        assert own.is_meta or torch.equal(own.nan_to_num(7.0), old.nan_to_num(7.0))
    for own, old in zip(optimizer.state.values(), state, strict=True):
        assert own.keys() == old.keys()
        assert all(torch.equal(own[key], old[key]) for key in own)


def in_a_bank(model: nn.Module) -> None:
    model.bank = AdapterBank.from_model(model, slots=2)


def tie(model: nn.Module) -> None:
    model[3].weight = model[2].weight


def spoil(model: nn.Module) -> None:
    model[2].up.data[0, 0] = torch.inf


def disable(model: nn.Module) -> None:
    model.context = disable_adapters(model)
    model.context.__enter__()


def give_bytes(model: nn.Module) -> None:
    model[2].weight = nn.Parameter(torch.zeros(D, D, dtype=torch.int8), requires_grad=False)


CASES: dict[str, tuple[dict, Callable, type[Exception], str]] = {
    "merged": ({}, merge, ValueError, r"0 is merged: unmerge\(model\) before a restart"),
    "one merged": ({}, lambda model: model[2].merge(), ValueError, "2 is merged: unmerge"),
    "bank": ({"method": "lora_xs"}, in_a_bank, ValueError, r"0 is in a bank.*close\(\) it first"),
    "tied": ({}, tie, ValueError, "the weights of 2 are tied to others, which would change"),
    "disabled": ({}, disable, ValueError, "0 is disabled: restart outside disable_adapters"),
    "infinite": ({}, spoil, ValueError, "2: cannot merge: the adapter holds NaN or Inf"),
    "quantised": (
        {},
        give_bytes,
        TypeError,
        "cannot merge into 2, which has a weight of torch.int8",
    ),
    "weight": (
        {"train": ("down", "up", "weight")},
        lambda model: None,
        ValueError,
        "0 trains its weight, to which a restart would add",
    ),
    "core": (
        {"method": "lora_xs", "train": ("down", "up")},
        lambda model: None,
        ValueError,
        "0 does not train core, which starts at zero after a restart",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    given, prepare, error, said = CASES[case]
    model = adapted(**given)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    prepare(model)
    with unchanged(model, optimizer), pytest.raises(error, match=said):
        merge_and_restart(model, optimizer, progress=False)
    if case == "disabled":
        model.context.__exit__(None, None, None)


def test_refused_optimizers_and_models() -> None:
    """Of other parameters, of a kind that cannot begin anew; prune out of range; no adapters."""
    model = adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    other = torch.optim.AdamW([model[0].down, nn.Parameter(torch.zeros(1))])
    with unchanged(model, optimizer):
        with pytest.raises(ValueError, match=r"lacks 3 of the 4 trained factors: make it of param"):
            merge_and_restart(model, other, progress=False)
        for prune in (-0.1, 1.5, float("nan"), "all"):
            with pytest.raises(ValueError, match=r"prune is .*: it must be from 0 to 1"):
                merge_and_restart(model, optimizer, prune=prune, progress=False)
        with pytest.raises(ValueError, match="Adagrad makes its state with itself"):
            merge_and_restart(model, optimizer_of(model, torch.optim.Adagrad), progress=False)
    with pytest.raises(ValueError, match="no adapted layers"):
        merge_and_restart(plain(), optimizer, progress=False)
    factored = optimizer_of(model, torch.optim.Adafactor)
    train(model, factored)
    with unchanged(model, factored), pytest.raises(ValueError, match=r"take prune=1\.0"):
        merge_and_restart(model, factored, prune=0.99, progress=False)


def test_refused_before_the_weights_are_there() -> None:
    model = plain().to("meta")
    adapt(model, "lora_xs", target_modules=["0"], r=2, defer_bases=True, progress=False)
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match="0 is not initialised: load its weights"):
        merge_and_restart(model, optimizer, progress=False)
    model.to_empty(device="cpu").load_state_dict(plain().state_dict(), strict=False)
    init_bases(model, progress=False)
    merge_and_restart(model, optimizer_of(model), progress=False)


@METHOD
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_an_offloaded_model(method: str, way: str, tmp_path: Path) -> None:
    """Weights and frozen factors in RAM or on disk: what is new is where it is brought from."""
    accelerate = pytest.importorskip("accelerate")
    model = adapted(method)
    twin = copy.deepcopy(model)
    given = {"offload_dir": tmp_path} if way == "disk_offload" else {}
    model = getattr(accelerate, way)(model, execution_device="cpu", **given)
    both = [(each, optimizer_of(each)) for each in (model, twin)]
    for each, optimizer in both:
        train(each, optimizer)
        y = each(X)
        torch.manual_seed(4)
        merge_and_restart(each, optimizer, progress=False)
        torch.testing.assert_close(each(X), y, rtol=1e-10, atol=1e-10)
    assert torch.equal(model(X), twin(X))
    for each, optimizer in both:
        train(each, optimizer, seed=2)
    assert torch.equal(model(X), twin(X))
    assert not torch.allclose(model(X), y, atol=1e-3)
