"""PEFT's own LoRA through the fused kernels: the same results, and only where that is known."""

import copy
import io
import pickle
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
import architectures
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from fused_lowrank.integrations.peft import fuse_lora, lora, unfuse_lora
from fused_lowrank.testing import measure, pooled_ratio

K, N, R, ALPHA = 96, 80, 4, 6  # alpha / r is 1.5: no power of two
SMALL_ROWS, ROWS = 7, 700  # on a CPU, 700 x 96 is no longer a small call
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def config(**settings: Any) -> LoraConfig:
    """LoRA on `proj`, of both if there are several."""
    return LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": ["proj"], **settings})


def fill(model: nn.Module) -> nn.Module:
    """Give every factor and bias values, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.endswith("bias"):
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.copy_(values)
    return model


def layer(base: nn.Module | None = None, dtype: torch.dtype = F32, **settings: Any) -> Linear:
    """PEFT's layer around `base`."""
    model = nn.Module()
    model.proj = (base or nn.Linear(K, N)).to(dtype)
    return fill(inject_adapter_in_model(config(**settings), model)).proj


class Block(nn.Module):
    """Two layers to adapt in a model; the second is called with what the first gives."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.proj = nn.Linear(16, 24)
        self.out = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.proj(self.embed(x))))


def block(**settings: Any) -> PeftModel:
    """A PeftModel of it."""
    torch.manual_seed(3)
    return fill(get_peft_model(Block(), config(**settings)))


def ids(device: torch.device, length: int = 5) -> torch.Tensor:
    """Inputs, the same ones every time."""
    return (torch.arange(2 * length, device=device) * 7 % 11).view(2, length)


def gpt2() -> nn.Module:
    """GPT-2 in small: its layers are Conv1D."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=architectures.VOCABULARY, **sizes)).eval()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often which of our ways computed a layer."""
    counts: Counter = Counter()

    def counted(name: str, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return call(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(lora, "lowrank_linear", counted("large", lora.lowrank_linear))
    monkeypatch.setattr(lora.ops, "small", counted("small", lora.ops.small))
    return counts


def gradients(model: nn.Module, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of a sum that weighs the outputs differently."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: nn.Module, theirs: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs and all gradients are alike; of models in fp64, where rounding plays no part."""
    y, expected = ours(*args, **kwargs), theirs(*args, **kwargs)
    if not isinstance(y, torch.Tensor):
        y, expected = y.logits, expected.logits
    torch.testing.assert_close(y, expected)
    got, wanted = gradients(ours, y), gradients(theirs, expected)
    assert got.keys() == wanted.keys()
    assert any("lora_A" in name for name in got)
    for name in got:
        torch.testing.assert_close(got[name], wanted[name])


# --- a layer ---

BASES = {
    "linear": lambda: nn.Linear(K, N),
    "no bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": lambda: Conv1D(N, K),
}
# x and weight, factors, autocast
DTYPES = {
    "fp32": (F32, F32, None),
    "fp64": (F64, F64, None),
    "bf16": (BF16, BF16, None),
    "fp16": (F16, F16, None),
    "bf16 beside fp32": (BF16, F32, None),
    "fp32 beside bf16": (F32, BF16, None),
    "autocast": (F32, F32, BF16),
    "autocast of fp16": (F16, F32, F16),
}


def calls(module: Linear, autocast: torch.dtype | None) -> Any:
    """The layer as a function of its operands, as `measure` calls it."""

    def call(x, weight, bias, down, up, up_bias):
        operands = {
            "base_layer.weight": weight,
            "base_layer.bias": bias,
            "lora_A.default.weight": down,
            "lora_B.default.weight": up,
            "lora_B.default.bias": up_bias,
        }
        given = {name: value for name, value in operands.items() if value is not None}
        # The truth is computed in fp64, which autocast leaves alone.
        with torch.autocast(x.device.type, autocast) if autocast else nullcontext():
            return functional_call(module, given, (x,))

    return call


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rows", [SMALL_ROWS, ROWS])
def test_results_are_within_the_error_budget(
    rows: int, base: str, dtypes: str, device: torch.device, ran: Counter
) -> None:
    """y and every gradient, in PEFT's dtypes, with rsLoRA and a bias of the factor's too."""
    wide, narrow, autocast = DTYPES[dtypes]
    theirs = layer(BASES[base](), wide, use_rslora=True, lora_bias=True).to(device)
    for part in theirs.lora_A, theirs.lora_B:
        part.to(narrow)
    ours = fuse_lora(copy.deepcopy(theirs))
    assert ours.scaling["default"] == ALPHA / R**0.5
    if theirs.base_layer.bias is not None:
        theirs.base_layer.bias.requires_grad_()
    torch.manual_seed(2)
    x = torch.randn(rows, K, device=device).to(wide).requires_grad_()
    operands = {
        "x": x,
        "weight": theirs.base_layer.weight.detach(),
        "bias": theirs.base_layer.bias,  # which bias="all" trains
        "down": theirs.lora_A["default"].weight,
        "up": theirs.lora_B["default"].weight,
        "up_bias": theirs.lora_B["default"].bias,
    }
    dy = torch.randn(rows, N, device=device)
    measured = measure(calls(ours, autocast), calls(theirs, autocast), operands, dy)
    assert len(measured) == 2 + sum(
        isinstance(value, nn.Parameter) and value.requires_grad for value in operands.values()
    )
    assert all(m.within for m in measured), measured
    if wide == narrow and not autocast:
        assert pooled_ratio(measured) <= 1.0, measured
    way = "small" if rows == SMALL_ROWS and not autocast and device.type == "cpu" else "large"
    assert ran[way] > 0
    assert set(ran) == {way}


@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (2, 3, 5)])
def test_shapes_of_x(lead: tuple[int, ...], device: torch.device) -> None:
    """Any leading dimensions, none at all, and no rows."""
    theirs, x = layer(dtype=F64).to(device), torch.randn(*lead, K, device=device, dtype=F64)
    assert_same(fuse_lora(copy.deepcopy(theirs)), theirs, x)


@pytest.mark.parametrize("base", BASES)
def test_triton(base: str, device: torch.device, counted_launches: Any) -> None:
    """The kernels compute the layer, forward and backward; also from a transposed factor."""
    dtype = F64 if device.type == "cpu" else F32  # which the interpreter takes, too
    theirs = layer(BASES[base](), dtype).to(device)
    down = torch.randn(K, R, device=device, dtype=dtype).t()
    theirs.lora_A["default"].weight = nn.Parameter(down)
    ours = fuse_lora(copy.deepcopy(theirs))
    ours.impl = "triton"
    x = torch.randn(3, 5, K, device=device, dtype=dtype, requires_grad=True)
    with counted_launches() as counts:
        y = ours(x)
        forward = sum(counts.values())
        gradients(ours, y)
    assert 0 < forward < sum(counts.values())
    if dtype == F64:
        assert_same(ours, theirs, x)


def test_gradients_go_to_what_requires_them(device: torch.device) -> None:
    """One factor, x alone, a trained weight, and nothing at all."""
    for wanted in ({"lora_A"}, {"lora_B"}, {"base_layer"}, set()):
        for wants_x in (True, False):
            theirs = layer(dtype=F64).to(device)
            for name, parameter in theirs.named_parameters():
                parameter.requires_grad_(name.partition(".")[0] in wanted)
            ours = fuse_lora(copy.deepcopy(theirs))
            for rows in (SMALL_ROWS, ROWS):
                x = torch.randn(rows, K, device=device, dtype=F64, requires_grad=wants_x)
                y, expected = ours(x), theirs(x)
                assert y.requires_grad == expected.requires_grad == bool(wanted or wants_x)
                if not y.requires_grad:
                    continue
                got = [gradients(ours, y), x.grad]
                x.grad = None
                want = [gradients(theirs, expected), x.grad]
                x.grad = None
                torch.testing.assert_close(got, want)


def test_fp16_beside_fp32_is_trained_by_peft(device: torch.device, ran: Counter) -> None:
    """Small gradients of fp32 factors would vanish in fp16; inference has none."""
    theirs = layer(dtype=F16).to(device)
    theirs.lora_A.float(), theirs.lora_B.float()
    theirs.lora_B["default"].weight.data.mul_(1e-6)
    ours = fuse_lora(copy.deepcopy(theirs))
    x = torch.randn(ROWS, K, device=device, dtype=F16)
    dy = torch.full((ROWS, N), 1e-3, device=device, dtype=F16)
    for module in (ours, theirs):
        module(x).backward(dy)
    down = ours.lora_A["default"].weight.grad
    assert torch.equal(down, theirs.lora_A["default"].weight.grad)
    assert down.abs().max() > 0
    assert not ran
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
    assert ran["large"] == 1


# --- dropout ---


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [SMALL_ROWS, ROWS])
def test_dropout(rows: int, compiled: bool, device: torch.device, ran: Counter) -> None:
    """The share that PEFT drops, scaled as it does, the same in the backward, none in eval."""
    p, base = 0.25, nn.Linear(K, K, bias=False)
    nn.init.zeros_(base.weight)
    theirs = layer(base, r=K, lora_alpha=3 * K, lora_dropout=p).to(device)
    for part in theirs.lora_A, theirs.lora_B:  # y = 3 · dropout(x)
        nn.init.eye_(part["default"].weight)
    ours = fuse_lora(copy.deepcopy(theirs))
    if compiled:
        torch._dynamo.reset()
        ours = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.ones(rows, K, device=device, requires_grad=True)
    y = ours(x)
    kept = y != 0
    torch.testing.assert_close(y, kept * (3 / (1 - p)))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y)
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(1 - kept.float().mean() - p) < 5 * deviation
    assert not torch.equal(ours(x), y)
    assert compiled or ran.total() == 2
    torch.testing.assert_close(ours.eval()(x), 3 * x)
    ours.train().lora_dropout.eval()  # it is dropout's own mode that counts
    torch.testing.assert_close(ours(x), 3 * x)


def test_dropout_of_small_calls_is_peft_s(device: torch.device) -> None:
    """On a CPU they draw the very same mask."""
    if device.type != "cpu":
        pytest.skip("there are no small calls there")
    theirs = layer(lora_dropout=0.5)
    ours = fuse_lora(copy.deepcopy(theirs))
    x, y = torch.randn(SMALL_ROWS, K), []
    for module in (ours, theirs):
        torch.manual_seed(4)
        y.append(module(x))
    torch.testing.assert_close(*y)


# --- what is left to PEFT ---


def test_states_of_the_adapters(device: torch.device, ran: Counter) -> None:
    """Each set_adapter, disabling, merging, mixed batches, deletion: as PEFT does it."""
    theirs = block(target_modules=["proj", "out"])
    theirs.add_adapter("second", config(r=3, lora_alpha=2, use_rslora=True, lora_bias=True))
    theirs = fill(theirs).to(device).double().eval()
    ours, x = fuse_lora(copy.deepcopy(theirs)), ids(device)

    def check(layers: int, exact: bool = False, **keywords: Any) -> None:
        """Both give the same; of ours, so many layers were computed by us."""
        ran.clear()
        y, expected = ours(x, **keywords), theirs(x, **keywords)
        assert ran.total() == layers
        torch.testing.assert_close(y, expected, **({"rtol": 0, "atol": 0} if exact else {}))

    check(2)
    for model in (ours, theirs):
        model.set_adapter("second")
    check(1)  # `out` has no such adapter
    assert_same(ours, theirs, x)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "second"])
    check(1)  # two at once in `proj`
    for model in (ours, theirs):
        model.set_adapter("default")
    with ours.disable_adapter(), theirs.disable_adapter():
        check(0, exact=True)
    check(0, exact=True, adapter_names=["second", "__base__"])
    for model in (ours, theirs):
        model.merge_adapter()
    check(0, exact=True)
    for model in (ours, theirs):
        model.unmerge_adapter()
    check(2)
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, Linear):
                module.set_scale("default", 0.25)
    check(2)
    for model in (ours, theirs):
        model.delete_adapter("default")
        model.set_adapter("second")
    check(1)
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    assert type(merged.proj) is nn.Linear
    for name, value in merged.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])


@pytest.mark.parametrize("later", [False, True])
def test_dora_is_left_alone(later: bool, device: torch.device, ran: Counter) -> None:
    """And said once, whether it is there from the start or added afterwards."""
    theirs = block()
    if not later:
        theirs.add_adapter("dora", config(use_dora=True))
    ours = copy.deepcopy(theirs)
    with nullcontext() if later else pytest.warns(match="left to PEFT.*proj.*'dora'.*Dora") as said:
        fuse_lora(ours)
    if later:
        theirs.add_adapter("dora", config(use_dora=True))
        with pytest.warns(match="left to PEFT.*'dora'.*Dora") as said:
            ours.add_adapter("dora", config(use_dora=True))
    assert len([w for w in said if "left to PEFT" in str(w.message)]) == 1
    ours.load_state_dict(theirs.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(ids(device)), theirs(ids(device))
        assert ran.total() == 1
        for model in (ours, theirs):
            model.set_adapter("dora")
        assert torch.equal(ours(ids(device)), theirs(ids(device)))
    assert ran.total() == 1


def test_other_kinds_are_named(device: torch.device, ran: Counter) -> None:
    """An embedding, a subclass with a forward of its own, a parametrised weight: one warning."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    theirs = Block()
    theirs.proj, theirs.more = Doubled(16, 24), nn.Linear(16, 16)
    settings = config(target_modules=["embed", "proj", "out", "more"])
    for name in ("default", "second"):
        theirs = inject_adapter_in_model(settings, theirs, name)
    theirs.more.forward = theirs.more.base_layer.forward
    torch.nn.utils.parametrizations.orthogonal(theirs.out.base_layer)
    theirs = fill(theirs).to(device)
    ours = copy.deepcopy(theirs)
    with pytest.warns(match="left to PEFT's own forward") as said:
        fuse_lora(ours)
    (warning,) = said
    assert warning.filename == __file__
    for part in (
        "embed: a layer of another kind (Embedding)",
        "proj: a layer around a Doubled",
        "; out: a layer with a weight that is parametrised",
        "more: a layer whose forward has been replaced",
    ):
        assert part in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ours(ids(device)), theirs(ids(device)))
    assert not ran


class Marked(torch.Tensor):
    """A tensor of another class, which what is computed from it has too."""


class Halved(nn.Linear):
    """A factor that is not what the equation says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def replace_factor(module: Linear) -> None:
    module.lora_A["default"] = Halved(K, R, bias=False, device=module.weight.device)


def replace_dropout(module: Linear) -> None:
    module.lora_dropout["default"] = nn.ReLU()


def drop_all(module: Linear) -> None:
    module.lora_dropout["default"] = nn.Dropout(1.0)


def complex_numbers(module: Linear) -> None:
    module.to(torch.complex64)


@pytest.mark.parametrize("change", [replace_factor, replace_dropout, drop_all, complex_numbers])
def test_what_the_equation_does_not_say(change: Any, device: torch.device, ran: Counter) -> None:
    """Other modules in the factors' and dropout's places, nothing kept at all, complex numbers."""
    theirs = layer().to(device)
    change(theirs)
    ours = fuse_lora(copy.deepcopy(theirs))
    x = torch.randn(ROWS, K, device=device, dtype=theirs.weight.dtype)
    assert torch.equal(ours(x), theirs(x))
    assert not ran


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "dropout"])
def test_hooks_inside_a_layer_are_called(part: str, device: torch.device, ran: Counter) -> None:
    """Then PEFT's forward calls the modules, as long as there is a hook."""
    ours = fuse_lora(layer().to(device))
    name = "lora_dropout.default" if part == "dropout" else part
    x, seen = torch.randn(SMALL_ROWS, K, device=device, requires_grad=True), []
    inner = ours.get_submodule(name)
    for register in (
        inner.register_forward_hook,
        inner.register_forward_pre_hook,
        inner.register_full_backward_hook,
        inner.register_full_backward_pre_hook,
    ):
        handle = register(lambda *args: seen.append(args[0]))
        ours(x).sum().backward()
        handle.remove()
        assert seen.pop() is inner
    assert not ran
    ours(x)
    assert ran.total() == 1


class Seen(ModelHook):
    """An accelerate hook that counts the calls."""

    count = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return args, kwargs


@pytest.mark.parametrize("first", ["hook", "fuse"])
def test_accelerate_hooks(first: str, device: torch.device, ran: Counter) -> None:
    """On the layer: called, and the layer is fused inside; on its base: PEFT calls the base."""
    model, hook, x = layer().to(device), Seen(), torch.randn(SMALL_ROWS, K, device=device)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if first == "hook":
            fuse_lora(add_hook_to_module(model, hook))
        else:
            add_hook_to_module(fuse_lora(model), hook)
    torch.testing.assert_close(model(x), expected)
    assert (hook.count, ran.total()) == (1, 1)
    remove_hook_from_module(unfuse_lora(model))
    assert torch.equal(model(x), expected)
    assert (hook.count, ran.total()) == (1, 1)
    assert type(model) is Linear

    add_hook_to_module(fuse_lora(model).base_layer, hook)
    assert torch.equal(model(x), expected)
    assert (hook.count, ran.total()) == (2, 1)
    with pytest.warns(match="hooks"):
        fuse_lora(model)
    remove_hook_from_module(model.base_layer)
    torch.testing.assert_close(model(x), expected)
    assert (hook.count, ran.total()) == (2, 2)


def test_transforms_and_traces_are_peft_s(device: torch.device) -> None:
    """Gradients by torch.func for each sample, and torch.jit.trace."""
    theirs = layer(dtype=F64).to(device)
    ours = fuse_lora(copy.deepcopy(theirs))
    x = torch.randn(2, ROWS, K, device=device, dtype=F64)

    def by_sample(module: nn.Module) -> dict[str, torch.Tensor]:
        def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return functional_call(module, parameters, (x,)).square().sum()

        values = {name: p.detach() for name, p in module.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)

    torch.testing.assert_close(by_sample(ours), by_sample(theirs))
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), theirs(x))


def test_trained_scaling_is_peft_s(device: torch.device, ran: Counter) -> None:
    """A tensor in scaling's place keeps its gradient."""
    ours, scale = fuse_lora(layer().to(device)), torch.ones((), device=device, requires_grad=True)
    ours.scaling["default"] = scale
    ours(torch.randn(3, K, device=device)).sum().backward()
    assert scale.grad is not None
    assert not ran


def test_inputs_of_other_dtypes_are_peft_s(device: torch.device, ran: Counter) -> None:
    """Its error for an x that does not fit, and its own computation of tensors of other kinds."""
    ours = fuse_lora(layer().to(device))
    with pytest.raises(RuntimeError, match="dtype"):
        ours(torch.randn(ROWS, K, device=device, dtype=BF16))
    marked = torch.randn(ROWS, K, device=device).as_subclass(Marked)
    assert type(ours(marked)) is Marked
    nested = torch.nested.nested_tensor([torch.randn(n, K, device=device) for n in (2, 3)])
    assert ours(nested).is_nested
    assert not ran


# --- models ---


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("name", [*architectures.NAMES, "gpt2"])
def test_transformers_models(name: str, bias: str, device: torch.device, ran: Counter) -> None:
    """Logits and every gradient of PEFT's, by our layers alone; unfusing gives PEFT's exactly."""
    made = gpt2() if name == "gpt2" else architectures.tiny(name)
    targets = ["c_attn", "c_fc", "c_proj"] if name == "gpt2" else architectures.targets(name)
    settings = {"bias": bias, "fan_in_fan_out": name == "gpt2", "target_modules": targets}
    theirs = fill(get_peft_model(made, config(**settings))).to(device).double()
    ours = fuse_lora(copy.deepcopy(theirs))
    layers = sum(isinstance(module, Linear) for module in ours.modules())
    inputs = {key: value.to(device) for key, value in architectures.batch(name, 5).items()}
    assert_same(ours, theirs, **inputs)
    assert ran.total() == layers > 0
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert unfuse_lora(ours) is ours
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    assert ran.total() == layers
    assert not any(isinstance(module, lora.FusedLinear) for module in ours.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, device: torch.device, ran: Counter) -> None:
    """Both kinds, with dropout: the recomputation draws the mask again that the forward drew."""
    theirs = block(lora_dropout=0.5, target_modules=["proj", "out"]).to(device)
    ours = fuse_lora(copy.deepcopy(theirs))
    embedded = ours.base_model.model.embed(torch.arange(11, device=device)).detach()
    x = embedded.repeat(400, 1).requires_grad_()  # no small call
    body = ours.base_model.model

    def call(x: torch.Tensor) -> torch.Tensor:
        return body.out(torch.tanh(body.proj(x)))

    results = []
    for run in (call, lambda x: checkpoint(call, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        x.grad = None
        y = run(x)
        results.append([y, gradients(ours, y), x.grad.clone()])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert set(ran) == {"large"}


def test_compile(device: torch.device) -> None:
    """A whole Llama in one graph, our op at every layer, at most one recompile over the lengths."""
    torch._dynamo.reset()
    made = architectures.tiny("llama", num_hidden_layers=1)
    theirs = get_peft_model(made, config(target_modules="all-linear"))
    theirs = fill(theirs).to(device).double()
    ours, graphs = fuse_lora(copy.deepcopy(theirs)), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for length in (4, 5, 7, 12):
        x = ids(device, length)
        y, expected = compiled(x).logits, theirs(x).logits
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradients(ours, y), gradients(theirs, expected))
    assert len(graphs) <= 2
    for graph in graphs:
        names = [str(node.target) for node in graph.graph.nodes]
        assert sum("fused_lowrank.forward" in name for name in names) == 7


def test_switches_within_a_compiled_model(device: torch.device) -> None:
    """Another adapter, none, a new scale: each call as PEFT's, compiled or not."""
    torch._dynamo.reset()
    theirs = layer().to(device)
    theirs.update_layer("second", 3, lora_alpha=2, config=config())
    ours = fuse_lora(copy.deepcopy(fill(theirs)))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    x = torch.randn(SMALL_ROWS, K, device=device)
    for change in (
        lambda module: None,
        lambda module: module.set_adapter("second"),
        lambda module: module.set_scale("second", 0.3),
        lambda module: module.enable_adapters(False),
        lambda module: module.enable_adapters(True),
        lambda module: module.merge(),
    ):
        change(ours), change(theirs)
        torch.testing.assert_close(compiled(x), theirs(x))


def test_sharded(tmp_path: Path, device: torch.device, ran: Counter) -> None:
    """fully_shard around fused layers and of one: fused still; its class is not to be undone."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    theirs = block(target_modules=["proj", "out"]).to(device)
    ours = fuse_lora(copy.deepcopy(theirs))
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        fully_shard(ours.base_model.model.proj)
        fully_shard(ours)
        y, expected = ours(ids(device)), theirs(ids(device))
        torch.testing.assert_close(y, expected)
        wanted = gradients(theirs, expected)
        got = {name: grad.full_tensor() for name, grad in gradients(ours, y).items()}
        torch.testing.assert_close(got, wanted)
        assert ran.total() == 2
        with pytest.raises(ValueError, match=r"proj is a FSDPFusedLinear.*before sharding"):
            unfuse_lora(ours)
    finally:
        dist.destroy_process_group()


# --- the model as an object ---


def test_copies_and_files(tmp_path: Path, device: torch.device, ran: Counter) -> None:
    """deepcopy, pickle, torch.save and save_pretrained, and what PEFT reads back."""
    ours, x = fuse_lora(block()).to(device), ids(device)
    expected, state = ours(x), ours.state_dict()
    whole = io.BytesIO()
    torch.save(ours, whole)
    whole.seek(0)
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(whole, weights_only=False),
    ):
        ran.clear()
        assert torch.equal(copied(x), expected)
        assert ran.total() == 1
    ours.save_pretrained(tmp_path)
    torch.manual_seed(3)
    read = PeftModel.from_pretrained(Block(), tmp_path).to(device)
    assert all(torch.equal(read.state_dict()[n], v) for n, v in state.items() if "lora" in n)
    ours.load_adapter(tmp_path, "again")
    ours.set_adapter("again")
    ran.clear()
    torch.testing.assert_close(ours(x), expected)
    assert ran.total() == 1


def test_fuse_again(device: torch.device, ran: Counter) -> None:
    """It is for new layers, and changes nothing about the others; the class says what it is."""
    model = fuse_lora(block()).to(device)
    model.add_adapter("second", config(target_modules=["proj", "out"]))
    body = model.base_model.model
    assert (type(body.proj), type(body.out)) == (lora.FusedLinear, Linear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_lora(model) is model
    assert (type(body.proj), type(body.out)) == (lora.FusedLinear, lora.FusedLinear)
    assert repr(body.proj).startswith("lora.FusedLinear(")
    model.set_adapter("second")
    model(ids(device))
    assert ran.total() == 2


def test_nothing_to_do() -> None:
    """A model without LoRA, one that is not fused: an error that says what to do."""
    with pytest.raises(ValueError, match=r"no LoRA layers of PEFT's: get_peft_model"):
        fuse_lora(Block())
    with pytest.raises(ValueError, match=r"no fused LoRA layers: fuse_lora\(model\) first"):
        unfuse_lora(block())


def test_a_peft_without_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, with the version tested."""
    before = torch.get_rng_state()
    lora.check_peft()
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.delattr(lora.LoraLayer, "update_layer")
    with pytest.raises(ImportError, match=r"tested with 0\.21\.2.*update_layer"):
        lora.check_peft()
