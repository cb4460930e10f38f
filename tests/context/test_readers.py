"""Layers whose weights are read instead of being called, and what "all-linear" leaves out."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_cases import integration, peft
from reader_cases import SETTINGS, D, Head, fused_loss_forward, in_peft, native, randomise, ways
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lowrank import merge
from fused_lowrank.context.readers import readers
from fused_lowrank.models.adapt import adapted_layers

methods = pytest.mark.parametrize("method", SETTINGS)


def names(model: nn.Module) -> list[str]:
    """Where the adapted layers are."""
    model = getattr(getattr(model, "base_model", model), "model", model)
    own = [name for name, _ in adapted_layers(model)]
    return own or [name for name, m in model.named_modules() if hasattr(m, "basis_down")]


# --- models that read ---


class Mixer(nn.Module):
    """Reads `dt` always; `out` where it trains; `old` in modes that are off; `fine` of a child."""

    def __init__(self, slices: int = 1, whole: bool = False) -> None:
        super().__init__()
        self.slices, self.whole = slices, whole
        self.into, self.dt, self.out, self.old = (nn.Linear(D, D) for _ in range(4))
        self.inner = nn.ModuleDict({"whole": nn.Linear(D, D)})
        self.inner.fine = nn.Linear(D, D)

    def fused(self, x: Tensor, scale: float) -> Tensor:
        """As kernels take them."""
        weight = self.out.weight
        return x @ weight.t() * scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x.to(self.into.weight.dtype)) if self.into.weight.dim() else x
        if isinstance(self.out.weight, Tensor) and x.device == self.into.weight.device:
            x = F.linear(x, self.dt.weight.data, self.dt.bias)
        if self.slices > 1 and not self.whole:
            x = x @ torch.cat(self.old.weight.split(self.slices))
            return self.out(x)
        x = x @ self.old.weight if self.whole else self.old(x)
        x = x + F.linear(x, self.inner.fine.weight)
        return self.fused(x, 1.0) if self.training and x.requires_grad else self.out(x)


def test_readers() -> None:
    """What is used of a weight counts, what is asked of it does not; nor what is switched off."""
    for modes, extra in (((1,), set()), ((2,), {"old"}), ((1, True), {"old"}), ((0,), set())):
        model = nn.Sequential(Mixer(*modes), nn.Linear(D, D))
        found = readers(model)
        by_id = {id(module): name for name, module in model[0].named_modules()}
        assert {by_id[key] for key in found} == {"dt", "out", "inner.fine"} | extra
        assert found[id(model[0].out)] == "Mixer.fused"
        assert found[id(model[0].dt)] == "Mixer.forward"


@ways
@methods
def test_read_weights_are_refused_and_left_out(way: Callable[..., nn.Module], method: str) -> None:
    """By name, with who reads them; "all-linear" says what it leaves out, once."""
    for target in ("dt", "out", "fine"):
        model = nn.Sequential(Mixer(), nn.Linear(D, D))
        with pytest.raises(
            ValueError, match=rf"{target}.*Mixer\.\w+ reads the weight.*exclude_mod"
        ):
            way(model, method, ["into", target])
        assert type(model[0].into) is nn.Linear
    model = nn.Sequential(Mixer(), nn.Linear(D, D), nn.Linear(D, D))
    with pytest.warns(UserWarning, match="'all-linear' leaves out .*dt") as caught:
        model = way(model, method, "all-linear")
    ours = [str(w.message) for w in caught if "leaves out" in str(w.message)]
    assert len(ours) == 1
    assert all(name in ours[0] for name in ("dt", "out", "fine"))
    assert {name.rpartition(".")[2] for name in names(model)} >= {"into", "old"}
    assert not {name.rpartition(".")[2] for name in names(model)} & {"dt", "out", "fine"}


def mamba() -> nn.Module:
    """A tiny one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4
    )
    return transformers.MambaForCausalLM(config)


class Corrector(nn.Module):
    """Is used by a method that is no forward, as Gemma 3n's AltUp is; `spare` by none in use."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients, self.spare, self.plain = (nn.Linear(D, D) for _ in range(3))

    def correct(self, x: Tensor) -> Tensor:
        """By the weight in training alone."""
        if self.training:
            return self.product(x)
        return self.coefficients(x)

    def product(self, x: Tensor) -> Tensor:
        """Within the bounds."""
        return F.linear(x, self.coefficients.weight.clamp(-9, 9), self.coefficients.bias)

    def merged(self) -> Tensor:
        """Is called by nobody."""
        return self.spare.weight + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.spare(self.plain(x))


class Holder(nn.Module):
    """Calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.ModuleDict({"inner": Corrector()})
        self.inner = Corrector()
        self.inner.part = self.part["inner"]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner.part.correct(x)


@ways
def test_methods_that_another_module_calls(way: Callable[..., nn.Module]) -> None:
    """What they read is found as what a forward reads; methods that nobody calls are no readers."""
    with pytest.warns(UserWarning, match=r"coefficients \(weights that the model reads"):
        model = way(nn.Sequential(Holder(), nn.Linear(D, D)), "lora_xs", "all-linear")
    assert {name.rpartition(".")[2] for name in names(model)} >= {"spare", "plain"}
    assert not any("coefficients" in name for name in names(model))
    with pytest.raises(ValueError, match=r"coefficients.*Corrector.product reads the weight"):
        way(nn.Sequential(Holder()), "lora_xs", ["coefficients"])


@ways
@methods
def test_mamba(way: Callable[..., nn.Module], method: str) -> None:
    """Merged it computes what it did adapted, and all that is trained gets a gradient."""
    for target in ("dt_proj", "out_proj"):
        with pytest.raises(ValueError, match=rf"{target}.*MambaMixer\.forward reads the weight"):
            way(mamba(), method, [target])
    with pytest.warns(UserWarning, match="leaves out.*dt_proj"):
        model = way(mamba(), method, "all-linear")
    randomise(model)
    ids = torch.arange(6)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    y = model.eval()(input_ids=ids).logits
    merge(model) if way is native else model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, y, rtol=1e-3, atol=1e-4)


@ways
def test_patched_forward(way: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the class or the instance: what it reads is found, and only then."""
    way(Head(), "lora_xs", ["body", "head"])
    patched = Head()
    patched.forward = fused_loss_forward.__get__(patched)
    with pytest.raises(ValueError, match=r"head.*Head\.forward reads the weight"):
        way(patched, "lora_xs", ["body", "head"])
    monkeypatch.setattr(Head, "forward", fused_loss_forward)
    with pytest.raises(ValueError, match=r"head.*Head\.forward reads the weight"):
        way(Head(), "lora_xs", ["body", "head"])
    way(Head(), "lora_xs", ["body"])


# --- torch's encoder fast path ---


def encoders() -> list[nn.Module]:
    """A layer, and a stack of them with nested tensors."""
    make = lambda: nn.TransformerEncoderLayer(D, 2, 24, dropout=0.0, batch_first=True)  # noqa: E731
    return [nn.Sequential(make()), nn.TransformerEncoder(make(), 2), nn.Sequential(make(), make())]


@pytest.mark.parametrize("kind", ["lora_xs", "lora_mini", "fused lora"])
def test_encoder_layers_in_peft(kind: str) -> None:
    """Adapters act in eval mode as in training, with gradients and without; unload undoes it."""
    x = torch.randn(2, 5, D)
    for base in encoders():
        base.eval()
        before, flags = base(x), copy.deepcopy(base)
        if kind == "fused lora":
            given: Any = peft.LoraConfig(r=3, target_modules=["linear1", "linear2"])
            model: Any = integration.fuse_lora(peft.get_peft_model(base, given))
        else:
            model = in_peft(base, kind, ["linear1", "linear2"])
        randomise(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trained = model.train()(x)
            model.eval()
            with torch.no_grad():
                torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-5)
            assert (trained - before).abs().max() > 0.05
            if kind == "fused lora":
                integration.unfuse_lora(model)
            back = model.unload()
            with torch.no_grad():
                torch.testing.assert_close(back(x), before, rtol=1e-4, atol=1e-5)
        for module, was in zip(back.modules(), flags.modules(), strict=True):
            for flag in ("activation_relu_or_gelu", "use_nested_tensor"):
                assert getattr(module, flag, None) == getattr(was, flag, None)


# --- "all-linear" ---


class Router(nn.Linear):
    """An nn.Linear of another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Experts(nn.Module):
    """A mixture with a router, experts of two kinds, a gate of one output, and a narrow layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 5)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(5))
        self.shared_expert_gate = nn.Linear(D, 1)
        self.custom = Router(D, D)
        self.narrow, self.back = nn.Linear(D, 2), nn.Linear(2, D)
        self.router = nn.ModuleDict({"classifier": nn.Linear(D, 7)})

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        y = sum(weights[..., i : i + 1] * e(x) for i, e in enumerate(self.experts))
        y = y * self.shared_expert_gate(x) + self.custom(x) + self.back(self.narrow(x))
        return y + self.router["classifier"](x).sum()


@ways
@methods
def test_all_linear_takes_what_it_can(way: Callable[..., nn.Module], method: str) -> None:
    """Ranks are reduced with one warning, and one says what is left out, by kind."""
    model = nn.Sequential(Experts(), nn.Linear(D, D), nn.Linear(D, D))
    alpha = {"alpha" if way is native else "lora_alpha": 6.0}
    with pytest.warns(UserWarning, match="leaves out") as caught:
        model = way(model, method, "all-linear", **alpha)
    ours = [str(w.message) for w in caught if "leave" in str(w.message) or "room" in str(w.message)]
    assert len(ours) == 2
    for said in (
        "shared_expert_gate (layers of one output)",
        "custom (layers with a forward of their own)",
        "gate, classifier (routers of experts)",
    ):
        assert said in ours[0] or said.replace("gate, classifier", "classifier, gate") in ours[0]
    assert "more than 2 layers have room for" in ours[1]
    ends = {name.partition(".")[2] for name in names(model)}
    assert ends >= {"narrow", "back", "experts.0", "experts.4"}
    assert not ends & {"gate", "shared_expert_gate", "custom", "router.classifier"}
    if way is native:
        layers = dict(adapted_layers(model))
        assert {layers[name].scale for name in ("0.narrow", "0.back", "0.experts.0")} == {
            6.0 / SETTINGS[method]["r"]
        }
        assert layers["0.narrow"].r == 2


def test_narrow_layers_by_name_stay_an_error() -> None:
    """Which names what to do; a router by name is taken."""
    model = nn.Sequential(Experts())
    with pytest.raises(ValueError, match=r"narrow: r is 3.*exclude_modules.*modules_to_save"):
        native(model, "lora_xs", ["gate", "narrow"])
    not_linear = r"custom: is a Router, which is not linear.*exclude_modules.*modules_to_save"
    with pytest.raises(ValueError, match=not_linear):
        native(model, "lora_xs", ["gate", "custom"])
    assert names(native(model, "lora_xs", ["gate"])) == ["0.gate"]


def test_excluded_names_must_match() -> None:
    """A typo in exclude_modules is an error natively, and a warning in PEFT."""
    for exclude in (["into", "v_porj"], "v_porj"):
        with pytest.raises(ValueError, match=r"exclude_modules: 'v_porj' matches no module.*into"):
            native(nn.Sequential(Mixer()), "lora_xs", ["old"], exclude_modules=exclude)
        with pytest.warns(UserWarning, match="exclude_modules.*v_porj"):
            in_peft(nn.Sequential(Mixer()), "lora_xs", ["old"], exclude_modules=exclude)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_peft(nn.Sequential(Mixer()), "lora_xs", ["old"], exclude_modules=["into"])
        native(nn.Sequential(Mixer()), "lora_xs", r".*(old|into)", exclude_modules=r".*into")


def test_conv1d_of_transformers() -> None:
    """GPT-2's layers are named, with the way that takes them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    for targets, kind in (
        ("all-linear", ValueError),
        (["q_proj"], ValueError),
        (["c_fc"], TypeError),
    ):
        with pytest.raises(kind, match=r"Conv1D.*fused_lowrank\.integrations\.peft"):
            native(model, "lora_xs", targets)
