"""adapt: which modules it replaces, what it refuses, and that all comes back."""

import warnings
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
from tiny_model import SETTINGS, D, methods
from torch import nn

from fused_lowrank import adapt, disable_adapters, init_bases, merge, unload, unmerge
from fused_lowrank.methods import METHODS, LowRankLinear
from fused_lowrank.methods.initial import values


def plain_model(device: torch.device | str = "cpu") -> nn.Sequential:
    """Two blocks of two linears each, a norm and a head."""
    block = lambda: nn.Sequential(OrderedDict(up=nn.Linear(D, D + 4), down=nn.Linear(D + 4, D)))  # noqa: E731
    model = OrderedDict(first=block(), second=block(), norm=nn.BatchNorm1d(D), head=nn.Linear(D, 5))
    return nn.Sequential(model).to(device)


def adapted_names(model: nn.Module) -> list[str]:
    """Where the adapted layers are."""
    return [name for name, m in model.named_modules() if isinstance(m, LowRankLinear)]


def randomise(model: nn.Module) -> nn.Module:
    """Give every factor values that show."""
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            for name in module.factors:
                nn.init.normal_(getattr(module, name), std=0.3)
    return model


def picture(model: nn.Module) -> list[object]:
    """All that `adapt` could change: modules, Parameters, their flags, values, attributes."""
    modules = [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()]
    parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    return [modules, parameters, [(n, v.tolist()) for n, v in model.state_dict().items()]]


@pytest.fixture
def transformers() -> ModuleType:
    """The package, where it is installed."""
    return pytest.importorskip("transformers")


SIZES = {
    "vocab_size": 32,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def llama(transformers: ModuleType, device: torch.device, **more: object) -> nn.Module:
    """A random LLaMA of one small layer."""
    return (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more)).to(device).eval()
    )


# --- which modules ---


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (["up"], None, ["first.up", "second.up"]),
        (["first.up", "head"], None, ["first.up", "head"]),
        (("second.down",), None, ["second.down"]),
        (["up", "down"], ["first.up", "second.down"], ["first.down", "second.up"]),
        (["up", "down"], r"first\..*", ["second.up", "second.down"]),
        (r"first\.\w+", None, ["first.up", "first.down"]),
        (r".*\.(up|down)", ["second.up"], ["first.up", "first.down", "second.down"]),
        ("all-linear", None, ["first.up", "first.down", "second.up", "second.down"]),
        ("all-linear", ["up"], ["first.down", "second.down"]),
    ],
)
def test_targets(target: object, exclude: object, expected: list[str]) -> None:
    """Names, suffixes, regular expressions over whole names, all-linear; less what is excluded."""
    model = adapt(plain_model(), target_modules=target, exclude_modules=exclude, r=2)
    assert adapted_names(model) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_of_a_transformer(
    tied: bool, transformers: ModuleType, device: torch.device
) -> None:
    """All but the output embeddings; the model computes, keeps its class and comes back."""
    model = llama(transformers, device, tie_word_embeddings=tied)
    ids = torch.arange(6, device=device)[None]
    before, y = picture(model), model(ids).logits
    cls = type(model)
    adapt(model, "lora_mini", target_modules="all-linear", r=2, a=4, b=4, init="paper")
    ends = {name.rpartition(".")[2] for name in adapted_names(model)}
    assert ends == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert type(model) is cls
    assert not torch.allclose(model(ids).logits, y)
    unload(model)
    assert torch.equal(model(ids).logits, y)
    assert picture(model)[2] == before[2]
    assert [p[1] for p in picture(model)[1]] == [p[1] for p in before[1]]


def test_everything_else_is_frozen(
    capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    """Only trained factors and modules to save require gradients, and the report counts them."""
    model = plain_model(device)
    adapt(model, "lora", target_modules=["up"], modules_to_save=["head"], r=4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = {f"{block}.up.{name}" for block in ("first", "second") for name in ("down", "up")}
    assert trained == {"head.weight", "head.bias", *factors}
    count = 2 * 4 * (D + D + 4) + 5 * D + 5
    total = 2 * ((D + 1) * (D + 4) + (D + 5) * D) + 2 * D + count
    report = capsys.readouterr().err
    assert f"lora: 2 layers adapted; {count:,} of {total:,} parameters" in report
    assert f"({count / total:.3%})" in report
    adapt(plain_model(), target_modules=["up"], r=2, progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("fused", [False, True])
@methods
def test_classes_and_modes(method: str, fused: bool) -> None:
    """fused= chooses the class; each layer keeps its own mode, then and back."""
    model = plain_model().train()
    model.first.eval()
    adapt(model, method, target_modules=["up"], fused=fused, **SETTINGS[method])
    for _ in range(2):
        assert not model.first.up.training
        assert model.second.up.training
        assert type(model.first.up) in (METHODS[method][fused], nn.Linear)
        if adapted_names(model):
            unload(model)
    assert type(model.first.up) is nn.Linear


class Shared(nn.Module):
    """One linear under two names of one module, and in a second module."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.two = nn.Linear(D, D)
        self.inner = nn.ModuleDict({"three": self.one})
        self.last = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner["three"](self.two(self.one(x))))


@pytest.mark.parametrize("target", [["one"], ["two"], ["inner.three"], "all-linear", r"one|two"])
def test_shared_module(target: object) -> None:
    """A module used under several names is adapted once and replaced under all, there and back."""
    model = Shared()
    linear = model.one
    adapt(model, target_modules=target, r=2)
    assert isinstance(model.one, LowRankLinear)
    assert model.one is model.two is model.inner["three"]
    assert model.one.weight is linear.weight
    unload(model)
    assert type(model.one) is nn.Linear
    assert model.one is model.two is model.inner["three"]


def test_hooks_still_fire(device: torch.device) -> None:
    """Hooks of a linear fire once adapted and once unloaded, and their handles remove them."""
    model, calls = plain_model(device), []
    up = model.first.up
    handles = [
        up.register_forward_pre_hook(lambda *_: calls.append("pre")),
        up.register_forward_hook(lambda *_, **k: calls.append("with"), with_kwargs=True),
        up.register_full_backward_hook(lambda *_: calls.append("backward")),
        up.register_full_backward_pre_hook(lambda *_: calls.append("before")),
    ]
    expected = ["pre", "with", "before", "backward"]
    for change in (lambda: None, lambda: adapt(model, target_modules=["up"], r=2), unload):
        change(model) if change is unload else change()
        calls.clear()
        x = torch.randn(3, D, device=device, requires_grad=True)
        model(x).sum().backward()
        assert calls == expected
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x).sum().backward()
    assert calls == []


# --- refusals, after which the model is as it was ---


def with_experts() -> nn.Module:
    """A linear beside experts that are one 3-D Parameter."""
    model = plain_model()
    model.first.experts = nn.Module()
    model.first.experts.gate_up = nn.Parameter(torch.randn(3, D, D))
    return model


REFUSALS = {
    "unknown method": (
        {"method": "bora", "target_modules": ["up"]},
        ValueError,
        "method is 'bora'",
    ),
    "a config for a method": (
        {"method": {"r": 8}, "target_modules": ["up"]},
        TypeError,
        "method is a dict: it must be a name.*peft.get_peft_model",
    ),
    "no match": ({"target_modules": ["up", "q_proj"]}, ValueError, "'q_proj'.*called down, head"),
    "regex without match": ({"target_modules": "q_proj"}, ValueError, "'q_proj'.*down, head, up"),
    "bad regex": ({"target_modules": "("}, ValueError, "target_modules.*'\\('"),
    "all excluded": (
        {"target_modules": ["up"], "exclude_modules": ["up"]},
        ValueError,
        "no module to adapt",
    ),
    "empty": ({"target_modules": []}, ValueError, "target_modules"),
    "none": ({"target_modules": None}, TypeError, "target_modules"),
    "excluded number": ({"target_modules": ["up"], "exclude_modules": 3}, TypeError, "exclude_mod"),
    "saved as string": (
        {"target_modules": ["up"], "modules_to_save": "head"},
        TypeError,
        "to_save",
    ),
    "saved unknown": ({"target_modules": ["up"], "modules_to_save": ["hd"]}, ValueError, "'hd'"),
    "not linear": ({"target_modules": ["up", "norm"]}, TypeError, "norm is a BatchNorm1d"),
    "rank": ({"target_modules": ["up", "head"], "r": 6}, ValueError, "head: r is 6.*at most 5"),
    "keyword": ({"target_modules": ["up"], "rank": 2}, TypeError, "rank"),
    "device": ({"target_modules": ["up"], "device": "cpu"}, TypeError, "device"),
    "late failure": ({"target_modules": ["up", "down"]}, torch.linalg.LinAlgError, "diverged"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what is wrong, and the model is exactly as it was."""
    keywords, error, message = REFUSALS[case]
    model = plain_model()
    model.first.up.weight.requires_grad = False
    if case == "late failure":
        svd, left = values.svd_bases, [2]

        def fails(*arguments: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise torch.linalg.LinAlgError("diverged")
            return svd(*arguments)

        monkeypatch.setattr(values, "svd_bases", fails)
    before = picture(model)
    with pytest.raises(error, match=message):
        adapt(model, **{"r": 2, **keywords})
    assert picture(model) == before


def test_refused_twice() -> None:
    """An adapted model is not adapted again."""
    model = adapt(plain_model(), target_modules=["up"], r=2)
    before = picture(model)
    with pytest.raises(ValueError, match="adapted already"):
        adapt(model, target_modules=["down"], r=2)
    assert picture(model) == before
    for call in (unload, merge, unmerge, init_bases, lambda m: disable_adapters(m).__enter__()):
        with pytest.raises(ValueError, match="no adapted layers"):
            call(plain_model())


def test_experts() -> None:
    """Experts are refused by name, not if they are excluded; all-linear warns of them."""
    for target in (["gate_up", "up"], ["experts"], r"first\.(up|experts\.gate_up)"):
        model = with_experts()
        before = picture(model)
        with pytest.raises(ValueError, match=r"first\.experts\.gate_up.*\(3, 16, 16\)"):
            adapt(model, target_modules=target, r=2)
        assert picture(model) == before
    model = adapt(with_experts(), target_modules=r"first.*up", exclude_modules=["gate_up"], r=2)
    assert adapted_names(model) == ["first.up"]
    with pytest.warns(UserWarning, match=r"1 Param.*first\.experts\.gate_up") as caught:
        adapt(with_experts(), target_modules="all-linear", r=2)
    assert caught[0].filename == __file__


def test_experts_of_mixtral(transformers: ModuleType) -> None:
    """The same for a real mixture of experts."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    before = picture(model)
    for target in (["q_proj", "down_proj"], ["gate_up_proj"], ["experts"]):
        with pytest.raises(ValueError, match=r"target_modules: model\.layers\.0\.mlp\.experts"):
            adapt(model, target_modules=target, r=2)
        assert picture(model) == before
    with pytest.warns(UserWarning, match=r"2 Parameters of MoE experts.*mlp\.experts"):
        adapt(model, target_modules="all-linear", r=2)


# --- torch's encoder fast path ---


@pytest.mark.parametrize("nested", [False, True])
def test_encoder_fast_path(nested: bool, device: torch.device) -> None:
    """In eval mode without gradients adapters act, with a padding mask too; unload undoes it."""
    layer = nn.TransformerEncoderLayer(D, 2, 24, batch_first=True, device=device)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x = torch.randn(2, 5, D, device=device)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2], device=device)
    flags = [model.use_nested_tensor, *(each.activation_relu_or_gelu for each in model.layers)]
    assert flags[1:] == [1, 1]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, torch says
        before = [model(x), model(x, src_key_padding_mask=mask)]
        adapt(model, "lora", target_modules=["layers.1.linear1"], r=4)
        same = [model(x), model(x, src_key_padding_mask=mask)]
        randomise(model)
        after = [model(x), model(x, src_key_padding_mask=mask)]
        slow = model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        trained = slow(x, src_key_padding_mask=mask)
        unload(model).eval()
        restored = [model(x), model(x, src_key_padding_mask=mask)]
    valid = ~mask
    torch.testing.assert_close(same[0], before[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same[1][valid], before[1][valid], rtol=1e-4, atol=1e-5)
    assert (after[0] - before[0]).abs().max() > 0.05
    assert (after[1] - before[1])[valid].abs().max() > 0.05
    torch.testing.assert_close(after[1][valid], trained[valid], rtol=1e-4, atol=1e-5)
    assert flags == [model.use_nested_tensor, *(e.activation_relu_or_gelu for e in model.layers)]
    assert all(torch.equal(a, b) for a, b in zip(before, restored, strict=True))
    assert not any("_lowrank" in name for module in model.modules() for name in vars(module))


def test_multihead_attention() -> None:
    """Its out_proj, never called, is refused by name and left out by all-linear."""
    model = nn.TransformerEncoderLayer(D, 2, 24)
    before = picture(model)
    with pytest.raises(ValueError, match=r"self_attn\.out_proj.*never calls it"):
        adapt(model, target_modules=["linear1", "out_proj"], r=2)
    assert picture(model) == before
    model = adapt(nn.Sequential(model, nn.Linear(D, 2)), target_modules="all-linear", r=2)
    assert adapted_names(model) == ["0.linear1", "0.linear2"]
