"""rank_pattern, alpha_pattern, use_rslora, layers_to_transform: PEFT's rules, PEFT's numbers."""

import json
import math
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fused_lowrank import (
    AdapterBank,
    adapt,
    explain,
    export_lora,
    load_adapter,
    merge,
    save_adapter,
    unload,
)
from fused_lowrank.methods import METHODS, LowRankLinear

D = 16
SETTINGS = {"lora": {"r": 4}, "lora_xs": {"r": 4}, "lora_mini": {"r": 4, "a": 8, "b": 8}}
METHOD = pytest.mark.parametrize("method", SETTINGS)


class Block(nn.Module):
    """Two projections and experts, which are numbered too."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.experts = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(D, D)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) → (..., D)."""
        y = torch.tanh(self.q_proj(x)) + self.v_proj(x)
        return y + sum(expert["up_proj"](x) for expert in self.experts)


class Model(nn.Module):
    """Blocks under `model.layers`, as transformers' models have them, and a head."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(blocks))})
        self.head = nn.Linear(D, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) → (..., 4)."""
        for block in self.model["layers"]:
            x = block(x)
        return self.head(x)


def plain(device: torch.device | str = "cpu") -> nn.Module:
    """Always the same."""
    torch.manual_seed(0)
    return Model().to(device)


def layers_of(model: nn.Module) -> dict[str, LowRankLinear]:
    """The adapted layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def randomise(model: nn.Module) -> nn.Module:
    """Trained factors that show."""
    for layer in layers_of(model).values():
        for factor in layer.trained_factors:
            nn.init.normal_(factor, std=0.3)
    return model


PATTERNS = {  # what PEFT takes: keywords of LoraConfig, lora_alpha apart
    "last part": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7.5}},
    "first counts": {"rank_pattern": {"layers.0.q_proj": 3, "q_proj": 2, ".*proj": 5}},
    "a dot before": {"rank_pattern": {"proj": 3, "up_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "from the start": {"rank_pattern": {"^model.layers.1.*": 6}},
    "alternatives": {"alpha_pattern": {r"(q|v)_proj": 2, r"layers\.[02]\..*up_proj": 9}},
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 5}},
    "layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1, "rank_pattern": {"q_proj": 1}},
    "counted": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "experts": {"layers_to_transform": [1], "layers_pattern": ["nowhere", "experts"]},
}
DECIDES_NOTHING = {"a dot before": {"proj"}}  # which PEFT passes over, and adapt refuses


@pytest.mark.parametrize("case", PATTERNS)
def test_as_peft_has_it(case: str) -> None:
    """The same layers, ranks and scales as of PEFT's LoRA with the same settings."""
    peft = pytest.importorskip("peft")
    given = PATTERNS[case]
    targets = ["up_proj"] if case == "experts" else ["q_proj", "v_proj", "up_proj"]
    settings = {**given, "r": 4, "target_modules": targets}
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(lora_alpha=6, **settings))
    expected = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    ours = dict(settings)
    for pattern in DECIDES_NOTHING.get(case, ()):
        ours["rank_pattern"] = {k: v for k, v in given["rank_pattern"].items() if k != pattern}
        with pytest.raises(ValueError, match=f"rank_pattern: '{pattern}' matches none"):
            adapt(plain(), "lora", alpha=6, progress=False, **settings)
    model = adapt(plain(), "lora", alpha=6, progress=False, **ours)
    found = {name: (layer.r, layer.scale) for name, layer in layers_of(model).items()}
    assert found.keys() == expected.keys()
    for name, (r, scale) in expected.items():
        assert found[name] == (r, pytest.approx(scale, rel=1e-15)), name


def test_a_whole_name_is_taken_whatever_its_layer() -> None:
    """As in PEFT: layers_to_transform is of what is named by its end."""
    peft = pytest.importorskip("peft")
    given = {"target_modules": ["q_proj", "model.layers.2.v_proj", "head"]}
    given["layers_to_transform"] = [0]
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(**given)).targeted_module_names
    model = adapt(plain(), r=2, progress=False, **given)
    assert set(layers_of(model)) == set(theirs)
    assert set(theirs) == {"model.layers.0.q_proj", "model.layers.2.v_proj", "head"}
    given["target_modules"] = ["model.layers.0.q_proj"]
    assert list(layers_of(adapt(plain(), r=2, progress=False, **given))) == given["target_modules"]


@METHOD
def test_ranks_and_scales_of_every_method(method: str) -> None:
    """Shapes and the numbers of a call follow; alpha None is the layer's own r."""
    r = SETTINGS[method]
    model = adapt(
        plain(),
        method,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.v_proj": 6},
        use_rslora=True,
        progress=False,
        **r,
    )
    for name, layer in layers_of(randomise(model)).items():
        rank = 2 if name.endswith("q_proj") else 4
        alpha = 6 if name == "model.layers.1.v_proj" else rank
        assert layer.r == rank
        assert layer.scale == pytest.approx(alpha / math.sqrt(rank), rel=1e-15)
        shapes = {n: tuple(getattr(layer, n).shape) for n in layer.train_names}
        own = {
            "lora": {"down": (rank, D), "up": (D, rank)},
            "lora_xs": {"core": (rank, rank)},
            "lora_mini": {"a_train": (8, rank), "b_train": (rank, 8)},
        }
        assert shapes == own[method]
        x = torch.randn(5, D)
        delta = (layer(x) - nn.functional.linear(x, layer.weight, layer.bias)).detach()
        core = layer.core_factors
        core = torch.eye(rank) if core is None else core[0] @ core[1] if method[-1] == "i" else core
        expected = alpha / math.sqrt(rank) * x @ layer.down.t() @ core @ layer.up.t()
        torch.testing.assert_close(delta, expected.detach(), rtol=1e-4, atol=1e-5)


@METHOD
def test_the_settings_go_through_files(method: str, tmp_path: Path) -> None:
    """Saved and loaded, exported and read by PEFT: the same layers, scales and outputs."""
    given = {"rank_pattern": {"q_proj": 2, "layers.1.v_proj": 3}, "alpha_pattern": {"v_proj": 6}}
    given |= {"use_rslora": True, "layers_to_transform": [0, 1], **SETTINGS[method]}
    targets = ["q_proj", "v_proj"]
    model = adapt(plain(), method, target_modules=targets, progress=False, **given)
    x = torch.randn(3, D)
    y = randomise(model)(x)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(plain(), tmp_path / "adapter", progress=False)
    assert torch.equal(again(x), y)
    settings = {name: layer.settings() for name, layer in layers_of(model).items()}
    assert {name: layer.settings() for name, layer in layers_of(again).items()} == settings
    load_adapter(model, tmp_path / "adapter", progress=False)  # into the adapted one as well
    wrong = adapt(plain(), method, target_modules=targets, progress=False, **{**given, "r": 1})
    with pytest.raises(ValueError, match=r"does not fit this (adapted )?model"):
        load_adapter(wrong, tmp_path / "adapter", progress=False)

    export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    ranks = {name: layer.r for name, layer in layers_of(model).items()}
    assert config["r"] == 4
    assert config["rank_pattern"] == {
        "^" + name.replace(".", r"\."): r for name, r in ranks.items() if r != 4
    }
    assert config["alpha_pattern"].keys() == config["rank_pattern"].keys()
    assert config["use_rslora"] is False  # lora_alpha is alpha·√r there, as in the layers
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / "lora")
    torch.testing.assert_close(theirs(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ["LoraXSConfig", "LoraMiniConfig"])
def test_a_folder_of_peft_with_all_of_them(config: str, tmp_path: Path) -> None:
    """`load_adapter` has the ranks and scales that `adapt` gives with the same settings."""
    peft = pytest.importorskip("peft")
    from fused_lowrank.integrations import peft as ours

    sides = {"a": 8, "b": 8} if config == "LoraMiniConfig" else {}
    given = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.2.v_proj": 5}, "r": 4}
    given |= {"use_rslora": True, "layers_to_transform": [1, 2], **sides}
    given["target_modules"] = ["q_proj", "v_proj"]
    model = peft.get_peft_model(plain(), getattr(ours, config)(lora_alpha=3, **given))
    model.save_pretrained(tmp_path)
    loaded = layers_of(load_adapter(plain(), tmp_path, progress=False))
    method = getattr(ours, config).method
    adapted = layers_of(adapt(plain(), method, alpha=3, progress=False, **given))
    assert loaded.keys() == adapted.keys()
    for name, layer in adapted.items():
        assert (loaded[name].r, loaded[name].alpha) == (layer.r, layer.alpha), name


@pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])
def test_a_bank_has_layers_of_other_ranks(method: str, tmp_path: Path) -> None:
    """Rows of several adapters are as each alone; `explain` says P and Q of each layer."""
    given = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 6}, "use_rslora": True}
    given |= {"target_modules": ["q_proj", "v_proj"], "progress": False, **SETTINGS[method]}
    if method == "lora_xs":
        given["rank_pattern"] = {"q_proj": 2, "layers.2.v_proj": 3}
    model = adapt(plain(), method, **given)
    for name in ("one", "two"):
        save_adapter(randomise(model), tmp_path / name)
    bank = AdapterBank.from_model(model, slots=4)
    for name in ("one", "two"):
        bank.add(name, tmp_path / name)
    x = torch.randn(3, D)
    with bank.use(["two", None, "one"]):
        y = model(x)
    alone = {n: load_adapter(plain(), tmp_path / n, progress=False)(x) for n in ("one", "two")}
    expected = torch.stack([alone["two"][0], plain()(x)[1], alone["one"][2]])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    if method == "lora_xs":
        said = [explain(layer, 8).layer for layer in layers_of(model).values()]
        assert [f"P = {p}" in text for p, text in zip((2, 4, 2, 4, 2, 3), said, strict=True)]


def test_all_linear_keeps_the_scales_of_ranks_that_do_not_fit() -> None:
    """A rank of rank_pattern is taken down as r is, with the scale of the rank asked for."""
    model = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, D), nn.Linear(D, 2))
    with pytest.warns(UserWarning, match=r"r=9 is more than 1 layers have room for \(0, …\)"):
        adapt(
            model,
            "lora",
            target_modules="all-linear",
            r=2,
            alpha=4,
            rank_pattern={"0": 9},
            use_rslora=True,
            progress=False,
        )
    assert (model[0].r, model[2].r) == (3, 2)
    assert model[0].scale == pytest.approx(4 / 3, rel=1e-15)
    assert model[2].scale == pytest.approx(4 / math.sqrt(2), rel=1e-15)


def test_merged_and_unloaded_like_any_other() -> None:
    """The merged model computes the same, and unload gives the base back."""
    given = {"rank_pattern": {"q_proj": 2}, "use_rslora": True, "target_modules": ["q_proj"]}
    model, x = adapt(plain(), "lora", r=3, progress=False, **given), torch.randn(3, D)
    y = randomise(model)(x)
    torch.testing.assert_close(merge(model)(x), y, rtol=1e-4, atol=1e-5)
    assert torch.equal(unload(model)(x), plain()(x))


BAD = {
    "no match": ({"rank_pattern": {"k_proj": 2}}, ValueError, r"'k_proj' matches none of the l"),
    "part of a word": ({"alpha_pattern": {"proj": 2}}, ValueError, "its end from a dot on"),
    "no end": ({"rank_pattern": {"layers.0": 2}}, ValueError, "'layers.0' matches none"),
    "not adapted": ({"rank_pattern": {"head": 2}}, ValueError, "rank_pattern: 'head' matches"),
    "no regex": ({"rank_pattern": {"(": 2}}, ValueError, r"'\(' is no regular expression"),
    "no rank": ({"rank_pattern": {"q_proj": 1.5}}, ValueError, r"\['q_proj'\] is 1.5: it must"),
    "rank 0": ({"rank_pattern": {"q_proj": 0}}, ValueError, r"\['q_proj'\] is 0: it must"),
    "rank too large": (
        {"rank_pattern": {"q_proj": 17}},
        ValueError,
        r"model.layers.0.q_proj: r is 17: .*at most 16.*exclude_modules",
    ),
    "no number": ({"alpha_pattern": {"q_proj": "8"}}, ValueError, "must be a finite number"),
    "inf": ({"alpha_pattern": {"q_proj": math.inf}}, ValueError, "must be a finite number"),
    "no dict": ({"rank_pattern": 3}, TypeError, "rank_pattern is 3: it must be a dict"),
    "keys": ({"rank_pattern": {3: 3}}, TypeError, "it must be a dict of names"),
    "rslora": ({"use_rslora": 8}, TypeError, "use_rslora is 8: it must be True or False"),
    "no layer": (
        {"layers_to_transform": [0, 7]},
        ValueError,
        "no target is in layer 7; .* 0, 1, 2",
    ),
    "none left": (
        {"layers_to_transform": 0, "exclude_modules": ["q_proj"]},
        ValueError,
        "leaves no module to adapt",
    ),
    "negative": ({"layers_to_transform": -1}, ValueError, "no target is in layer -1"),
    "no index": ({"layers_to_transform": ["0"]}, ValueError, "layers_to_transform is '0'"),
    "bool": ({"layers_to_transform": True}, ValueError, "layers_to_transform is True"),
    "no list": (
        {"layers_to_transform": 0, "layers_pattern": "h"},
        ValueError,
        "have no number after h in their names; layers_pattern is",
    ),
    "alone": ({"layers_pattern": "layers"}, ValueError, "layers_to_transform must be, too"),
    "bad list": (
        {"layers_to_transform": 0, "layers_pattern": "("},
        ValueError,
        "layers_pattern is",
    ),
    "regex": (
        {"layers_to_transform": 0, "target_modules": r".*q_proj"},
        ValueError,
        "goes with a list of names",
    ),
    "all": (
        {"layers_to_transform": 0, "target_modules": "all-linear"},
        ValueError,
        "goes with a list of names",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_is_changed(case: str) -> None:
    """Each error says which argument it is of; the model is as it was."""
    given, error, said = BAD[case]
    model = plain()
    before = [(name, id(module)) for name, module in model.named_modules()]
    state = torch.get_rng_state()
    with pytest.raises(error, match=said):
        adapt(model, "lora", r=2, progress=False, **{"target_modules": ["q_proj"], **given})
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_names_without_numbers_say_how_to_count() -> None:
    """PEFT's rule wants two parts before the number, where no list is named."""
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in "ab")}
    )
    given = {"target_modules": ["q"], "layers_to_transform": 1, "r": 2, "progress": False}
    with pytest.raises(
        ValueError, match=r"layers.0.q, layers.1.q have no number .* layers_pattern"
    ):
        adapt(model, **given)
    assert list(layers_of(adapt(model, layers_pattern="layers", **given))) == ["layers.1.q"]


def test_a_pattern_that_another_hides_is_said() -> None:
    """PEFT takes the first match without a word; what that makes void is named."""
    given = {"target_modules": ["q_proj"], "r": 2, "progress": False}
    hidden = {"q_proj": 3, "layers.0.q_proj": 4}
    with pytest.warns(UserWarning, match="'layers.0.q_proj' decides nothing.*put it first") as said:
        model = adapt(plain(), rank_pattern=hidden, **given)
    assert said[0].filename == __file__
    assert {layer.r for layer in layers_of(model).values()} == {3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(plain(), rank_pattern=dict(reversed(hidden.items())), layers_to_transform=[], **given)
        adapt(plain(), rank_pattern={}, alpha_pattern=None, layers_to_transform=None, **given)


def test_of_a_transformer(device: torch.device) -> None:
    """A LLaMA: layers_to_transform and patterns as a user writes them; it trains."""
    transformers: ModuleType = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(device)
    adapt(
        model,
        "lora_xs",
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[1, 2],
        rank_pattern={r"mlp\.down_proj": 8, "layers.2.self_attn.q_proj": 3},
        use_rslora=True,
        r=4,
        alpha=2,
        progress=False,
    )
    ranks = {name.removeprefix("model.layers."): m.r for name, m in layers_of(model).items()}
    assert ranks == {
        "1.self_attn.q_proj": 4,
        "1.mlp.down_proj": 8,
        "2.self_attn.q_proj": 3,
        "2.mlp.down_proj": 8,
    }
    ids = torch.arange(6, device=device)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", [name for name, (cls, _) in METHODS.items() if cls.row.shared])
def test_ranks_of_shared_factors_are_one(method: str) -> None:
    """All layers have the shared factors' rank: a pattern of others is refused."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=f"all layers of {method} share factors of one rank, r"):
        adapt(model, method, target_modules=["0", "1"], rank_pattern={"0": 2}, progress=False)
    assert type(model[0]) is nn.Linear
