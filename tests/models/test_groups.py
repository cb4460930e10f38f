"""parameter_groups: LoRA+ for every method, no decay where it does harm, each parameter once."""

import pytest
import torch
from tiny_model import SETTINGS
from torch import nn

from fused_lowrank import adapt, parameter_groups

D = 16
OUTPUT = {  # with the greater rate
    "lora": ["up"],
    "lora_xs": [],
    "lora_mini": ["b_train"],
    "lora_fa": ["up"],
    "vera": ["b"],
    "melora": ["up"],
    "adalora": ["up"],
    "nola": ["b"],
}


def plain() -> nn.Sequential:
    """Two linear layers, norms, and a head beside its embedding."""
    torch.manual_seed(0)
    layers = [nn.Embedding(7, D), nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D), nn.RMSNorm(D)]
    return nn.Sequential(*layers, nn.Linear(D, 7))


def named(model: nn.Module, groups: list[dict]) -> dict[str, list[str]]:
    """The names of the parameters of each group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(own)] for own in group["params"]] for group in groups}


@pytest.mark.parametrize("method", OUTPUT)
def test_every_method(method: str) -> None:
    """Factors by their side, everything else apart, and nothing of it twice."""
    settings = {"target_modules": ["1", "3"], "progress": False, **SETTINGS[method]}
    model = adapt(plain(), method, modules_to_save=["2", "4", "5"], **settings)
    groups = parameter_groups(model, 1e-3, loraplus_ratio=16, weight_decay=0.1)
    found = named(model, groups)
    trained = model[1].train_names
    output = [f"{i}.{name}" for i in (1, 3) for name in OUTPUT[method]]
    others = [f"{i}.{n}" for i in (1, 3) for n in trained if n not in OUTPUT[method]]
    for kind, names in (("factors", others), ("output_factors", output)):  # vectors do not decay
        assert sorted(found.pop(kind, []) + found.pop(f"{kind}_no_decay", [])) == sorted(names)
    assert found == {
        "others": ["5.weight"],
        "others_no_decay": ["2.weight", "2.bias", "4.weight", "5.bias"],
    }
    expected = {"factors": (1e-3, 0.1), "output_factors": (16e-3, 0.1)}
    expected |= {"factors_no_decay": (1e-3, 0.0), "output_factors_no_decay": (16e-3, 0.0)}
    expected |= {"others": (1e-3, 0.1), "others_no_decay": (1e-3, 0.0)}
    for group in groups:
        lr, decay = expected[group["name"]]
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(lr), decay)
    count = sum(len(group["params"]) for group in groups)
    assert count == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("train", "output"), [(("core", "up"), ["1.up"]), (("up",), ["1.up"])])
def test_other_factors_that_are_trained(train: tuple[str, ...], output: list[str]) -> None:
    """What is trained beside the core has the rate of its side."""
    model = adapt(plain(), target_modules=["1"], train=train, r=2, progress=False)
    found = named(model, parameter_groups(model, 1e-3, loraplus_ratio=4))
    assert found["output_factors"] == output
    assert found.get("factors", []) == [f"1.{name}" for name in train if name != "up"]


def test_trained_biases_weights_and_ties() -> None:
    """A trained weight is no factor; biases have no decay; a tied tensor is there once."""
    model = plain()
    model[5].weight = model[0].weight
    given = {"target_modules": ["1"], "modules_to_save": ["0"], "r": 2, "progress": False}
    adapt(model, "lora", train=("down", "up", "weight", "bias"), **given)
    found = named(model, parameter_groups(model, 1e-3, weight_decay=0.1))
    assert found == {
        "factors": ["1.down"],
        "output_factors": ["1.up"],
        "others": ["0.weight", "1.weight"],
        "others_no_decay": ["1.bias"],
    }


def test_as_pefts_lora_plus() -> None:
    """The same rates and decays of the same factors as PEFT's create_loraplus_optimizer; and the
    same values after steps of both."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft.get_peft_model(
        plain(), peft.LoraConfig(r=4, lora_alpha=4, target_modules=["1", "3"])
    )
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8, loraplus_weight_decay=0.1
    )
    rates = {
        id(own): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for own in group["params"]
    }
    model = adapt(plain(), "lora", target_modules=["1", "3"], r=4, progress=False)
    ours = torch.optim.AdamW(parameter_groups(model, 1e-2, loraplus_ratio=8, weight_decay=0.1))
    pairs = []
    for i in (1, 3):
        layer = theirs.base_model.model[i]
        pairs += [(model[i].down, layer.lora_A["default"].weight)]
        pairs += [(model[i].up, layer.lora_B["default"].weight)]
    own = {id(p): (g["lr"], g["weight_decay"]) for g in ours.param_groups for p in g["params"]}
    for mine, other in pairs:
        assert own[id(mine)] == rates[id(other)]
        mine.data.copy_(other.data)
    ids = torch.arange(7)
    for _ in range(3):
        for stepped, each in ((ours, model), (optimizer, theirs)):
            nn.functional.cross_entropy(each(ids), ids.flip(0)).backward()
            stepped.step()
            stepped.zero_grad()
    assert all(mine.any() for mine, _ in pairs)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_wrappers_and_rates_as_tensors() -> None:
    """A wrapped model has the same groups; a tensor as rate is taken, as torch takes it."""
    model = adapt(plain(), "lora", target_modules=["1"], r=2, progress=False)
    wrapped = nn.DataParallel(model)
    rate = torch.tensor(1e-3)
    groups = parameter_groups(wrapped, rate, loraplus_ratio=2)
    assert named(model, groups) == {"factors": ["1.down"], "output_factors": ["1.up"]}
    assert groups[0]["lr"] is rate
    assert groups[1]["lr"] == 2e-3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loraplus_ratio": 0}, "loraplus_ratio is 0: it must be above 0"),
        ({"loraplus_ratio": float("nan")}, "loraplus_ratio is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: it must be at least 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("inf")}, "lr is inf"),
    ],
)
def test_numbers_out_of_range(given: dict[str, float], said: str) -> None:
    model = adapt(plain(), "lora", target_modules=["1"], r=2, progress=False)
    with pytest.raises(ValueError, match=said):
        parameter_groups(model, **{"lr": 1e-3, **given})


def test_models_of_which_nothing_is_to_be_had() -> None:
    """Not adapted, frozen, PEFT's: each says what to do."""
    with pytest.raises(ValueError, match=r"no adapted layers: adapt\(model, …\) first"):
        parameter_groups(plain(), 1e-3)
    model = adapt(plain(), "lora", target_modules=["1"], r=2, progress=False)
    with pytest.raises(ValueError, match="nothing in the model is trained"):
        parameter_groups(model.requires_grad_(False), 1e-3)
    model[1].up.requires_grad_(True).ds_id = 3  # as ZeRO-3 marks what it has cut up
    with pytest.raises(ValueError, match=r"ZeRO-3.* has cut up the parameters"):
        parameter_groups(model, 1e-3)
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["1"]))
    with pytest.raises(ValueError, match="create_loraplus_optimizer"):
        parameter_groups(theirs, 1e-3)
