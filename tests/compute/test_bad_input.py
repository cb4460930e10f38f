"""Bad input raises before any work, naming the argument, what it is and what it must be."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fused_lowrank import AdapterBank, FusedLoraXSLinear, adapt, lowrank_linear
from fused_lowrank.methods import METHODS

K, N, P, Q = 8, 6, 4, 3
ones = torch.ones


def operands(device: torch.device) -> dict[str, Any]:
    """A call that is right."""
    shapes = {"x": (2, K), "weight": (N, K), "down": (P, K), "core": (P, Q), "up": (N, Q)}
    named = {name: ones(shape, device=device) for name, shape in shapes.items()}
    return {**named, "bias": ones(N, device=device)}


# what is wrong → the changed arguments, the error, what its message matches
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # shapes
    "x width": ({"x": ones(2, K + 1)}, ValueError, r"x is \(2, 9\) and weight \(6, 8\)"),
    "x 0-D": ({"x": torch.tensor(1.0)}, ValueError, r"x is \(\)"),
    "weight 1-D": ({"weight": ones(K)}, ValueError, r"weight \(8\)"),
    "weight 0-D": ({"weight": torch.tensor(1.0)}, ValueError, r"weight \(\)"),
    "weight 3-D": ({"weight": ones(1, N, K)}, ValueError, r"weight \(1, 6, 8\)"),
    "weight width": ({"weight": ones(N, K + 1)}, ValueError, r"weight \(6, 9\)"),
    "weight height": ({"weight": ones(N + 1, K)}, ValueError, r"up is \(6, 3\).*\(7, Q\)"),
    "down width": ({"down": ones(P, K - 1)}, ValueError, r"down is \(4, 7\).*\(P, 8\)"),
    "down 1-D": ({"down": ones(K)}, ValueError, r"down is \(8\)"),
    "down 0-D": ({"down": torch.tensor(1.0)}, ValueError, r"down is \(\)"),
    "down empty": (
        {"down": ones(0, K), "core": ones(0, Q)},
        ValueError,
        r"down is \(0, 8\).*least 1",
    ),
    "up height": ({"up": ones(N - 1, Q)}, ValueError, r"up is \(5, 3\).*\(6, Q\)"),
    "up 1-D": ({"up": ones(N)}, ValueError, r"up is \(6\)"),
    "up 0-D": ({"up": torch.tensor(1.0)}, ValueError, r"up is \(\)"),
    "up empty": ({"up": ones(N, 0), "core": ones(P, 0)}, ValueError, r"up is \(6, 0\).*least 1"),
    "core turned": ({"core": ones(Q, P)}, ValueError, r"core is \(3, 4\).*\(4, 3\)"),
    "core 1-D": ({"core": ones(P)}, ValueError, r"core is \(4\), a diagonal.*P=4.*Q=3.*\(4, 3\)"),
    "diagonal length": (
        {"core": ones(P + 1), "up": ones(N, P)},
        ValueError,
        r"core is \(5\): .*\(4, 4\) or, of a diagonal, \(4,\)",
    ),
    "diagonal of one": (
        {"core": ones(1), "up": ones(N, P)},
        ValueError,
        r"core is \(1\): .*\(4,\)",
    ),
    "diagonal 2-D": ({"core": ones(1, P), "up": ones(N, P)}, ValueError, r"core is \(1, 4\): "),
    "diagonal in a pair": (
        {"core": (ones(P), ones(P)), "up": ones(N, P)},
        ValueError,
        r"core is \(4\)·\(4\)",
    ),
    "diagonal beside a matrix": (
        {"core": (ones(P), ones(P, Q))},
        ValueError,
        r"core is \(4\)·\(4, 3\)",
    ),
    "diagonal int": (
        {"core": ones(P, dtype=torch.int32), "up": ones(N, P)},
        TypeError,
        r"core is torch\.int32",
    ),
    "diagonal elsewhere": (
        {"core": torch.empty(P, device="meta"), "up": ones(N, P)},
        ValueError,
        "core is on meta, but x on",
    ),
    "core 0-D": ({"core": torch.tensor(1.0)}, ValueError, r"core is \(\)"),
    "core left out": ({"core": None}, ValueError, "core is None.*P=4.*Q=3"),
    "pair inside": ({"core": (ones(P, 2), ones(3, Q))}, ValueError, r"core is \(4, 2\)·\(3, 3\)"),
    "pair left": ({"core": (ones(5, 2), ones(2, Q))}, ValueError, r"core is \(5, 2\)·\(2, 3\)"),
    "pair right": ({"core": (ones(P, 2), ones(2, 5))}, ValueError, r"core is \(4, 2\)·\(2, 5\)"),
    "pair 1-D": ({"core": (ones(P), ones(2, Q))}, ValueError, r"core is \(4\)·\(2, 3\)"),
    "bias length": ({"bias": ones(N + 1)}, ValueError, r"bias is \(7\).*\(6,\)"),
    "bias 2-D": ({"bias": ones(1, N)}, ValueError, r"bias is \(1, 6\)"),
    "bias 0-D": ({"bias": torch.tensor(1.0)}, ValueError, r"bias is \(\)"),
    "gain length": ({"gain": ones(N + 1)}, ValueError, r"gain is \(7\).*\(6,\)"),
    "gain 2-D": ({"gain": ones(1, N)}, ValueError, r"gain is \(1, 6\)"),
    "gain 0-D": ({"gain": torch.tensor(1.0)}, ValueError, r"gain is \(\)"),
    # dtypes
    "x integer": ({"x": ones(2, K, dtype=torch.int64)}, TypeError, r"x is torch\.int64.*float32"),
    "x bool": ({"x": ones(2, K, dtype=torch.bool)}, TypeError, r"x is torch\.bool"),
    "x complex": ({"x": ones(2, K, dtype=torch.complex64)}, TypeError, r"x is torch\.complex64"),
    "x wider": (
        {"x": ones(2, K).double()},
        TypeError,
        r"x is torch\.float64 and weight torch\.float32",
    ),
    "x narrower": ({"x": ones(2, K).bfloat16()}, TypeError, r"x is torch\.bfloat16 and weight"),
    "weight int8": ({"weight": ones(N, K, dtype=torch.int8)}, TypeError, r"weight is torch\.int8"),
    "bias narrower": ({"bias": ones(N).half()}, (TypeError, ValueError), r"bias.*torch\.float16"),
    "down int": ({"down": ones(P, K, dtype=torch.int32)}, TypeError, r"down is torch\.int32"),
    "core int": ({"core": ones(P, Q, dtype=torch.int32)}, TypeError, r"core is torch\.int32"),
    "gain int": ({"gain": ones(N, dtype=torch.int32)}, TypeError, r"gain is torch\.int32"),
    "up int": ({"up": ones(N, Q, dtype=torch.int32)}, TypeError, r"up is torch\.int32"),
    # devices
    **{
        f"{name} elsewhere": (
            {name: torch.empty(shape, device="meta")},
            ValueError,
            f"{name} is on meta, but x on",
        )
        for name, shape in {
            "weight": (N, K),
            "down": (P, K),
            "core": (P, Q),
            "up": (N, Q),
            "bias": (N,),
            "gain": (N,),
        }.items()
    },
    # what is no tensor
    **{
        f"{name} {kind}": ({name: value}, TypeError, rf"\b{name}\b")
        for name in ("x", "weight", "down", "up", "bias", "gain")
        for kind, value in (("list", [[1.0]]), ("None", None), ("number", 1.0))
        if (name, kind) not in (("bias", "None"), ("gain", "None"))
    },
    "core number": ({"core": 1.0}, TypeError, r"\bcore\b"),
    "core of one": ({"core": (ones(P, Q),)}, (TypeError, ValueError), r"\bcore\b"),
    "core of three": ({"core": (ones(P, Q),) * 3}, (TypeError, ValueError), r"\bcore\b"),
    "core with None": ({"core": (ones(P, Q), None)}, (TypeError, ValueError), r"\bcore\b"),
    "core of lists": ({"core": [[1.0], [2.0]]}, TypeError, r"\bcore\b"),
    # values
    "dropout negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p is -0\.1"),
    "dropout one": ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1\.0.*below 1"),
    "dropout nan": ({"dropout_p": math.nan}, ValueError, "dropout_p is nan"),
    "impl": ({"impl": "cuda"}, ValueError, "impl is 'cuda'.*triton"),
    "impl None": ({"impl": None}, (TypeError, ValueError), "impl is None"),
    "scale string": ({"scale": "big"}, (TypeError, ValueError), r"\bscale\b"),
    "scale None": ({"scale": None}, (TypeError, ValueError), r"\bscale\b"),
    "keyword": ({"alpha": 1.0}, TypeError, "alpha"),
}


@pytest.mark.parametrize("case", CALLS)
def test_lowrank_linear(case: str, device: torch.device) -> None:
    """lowrank_linear with one argument that does not fit."""
    changes, error, message = CALLS[case]

    def here(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(here, value))
        on_device = isinstance(value, torch.Tensor) and not value.is_meta
        return value.to(device) if on_device else value

    call = operands(device)
    assert lowrank_linear(**call).shape == (2, N)
    with pytest.raises(error, match=message):
        lowrank_linear(**{**call, **{name: here(value) for name, value in changes.items()}})


def test_triton_that_cannot(device: torch.device) -> None:
    """impl="triton" says why the kernels cannot run; impl="auto" computes it another way."""
    call = operands(device)
    call.update(down=ones(300, K, device=device), core=ones(300, Q, device=device))
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot.*P=300.*at most 256"):
        lowrank_linear(**call, impl="triton")
    assert lowrank_linear(**call).shape == (2, N)
    meta = {name: tensor.to("meta") for name, tensor in operands(device).items()}
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot.*x is on meta"):
        lowrank_linear(**meta, impl="triton")


# --- layers ---

GOOD = {
    "lora": {"r": 2},
    "lora_xs": {"r": 2},
    "lora_mini": {"r": 2, "a": 3, "b": 4},
    "lora_fa": {"r": 2},
    "vera": {"r": 2},
    "tied_lora": {"r": 2},
    "melora": {"r": 2, "n": 2},
    "nola": {"r": 2, "m": 3},
    "adalora": {"r": 2},
}
EVERY = tuple(METHODS)
# the methods concerned, the keywords, the error, its message
SETTINGS: list[tuple[tuple[str, ...], dict[str, Any], type[Exception], str]] = [
    (EVERY, {"r": 0}, ValueError, "r is 0: it must be at least 1"),
    (EVERY, {"r": -2}, ValueError, "r is -2: it must be at least 1"),
    (EVERY, {"r": 2.0}, ValueError, r"r is 2\.0"),
    (EVERY, {"r": "2"}, ValueError, "r is '2': it must be an integer"),
    (EVERY, {"r": None}, ValueError, "r is None"),
    (("lora", "lora_xs"), {"r": 7}, ValueError, "r is 7: .*at most 6"),
    (("lora_mini",), {"r": 4}, ValueError, "r is 4: .*at most 3"),
    (("lora_mini",), {"a": 0}, ValueError, "a is 0: .*at most 8"),
    (("lora_mini",), {"a": -1}, ValueError, "a is -1"),
    (("lora_mini",), {"a": 9}, ValueError, "a is 9: .*at most 8"),
    (("lora_mini",), {"b": 0}, ValueError, "b is 0: .*at most 6"),
    (("lora_mini",), {"b": 7}, ValueError, "b is 7: .*at most 6"),
    (("lora_mini",), {"init": "zero"}, ValueError, "init is 'zero'.*ever be learned"),
    (("lora_xs",), {"svd": "fast"}, ValueError, "svd is 'fast'.*exact"),
    (EVERY, {"alpha": math.nan}, ValueError, "alpha is nan"),
    (EVERY, {"alpha": math.inf}, ValueError, "alpha is inf"),
    (EVERY, {"dropout": 1.0}, ValueError, r"dropout is 1\.0.*below 1"),
    (EVERY, {"dropout": -0.5}, ValueError, r"dropout is -0\.5"),
    (EVERY, {"dropout": math.nan}, ValueError, "dropout is nan"),
    (EVERY, {"impl": "cuda"}, ValueError, r"impl is 'cuda'.*auto, triton, aten, reference"),
    (EVERY, {"train": ("cor",)}, ValueError, r"train names \['cor'\].*weight, bias, (down|a)"),
    (EVERY, {"train": "weight"}, (TypeError, ValueError), "train"),
    (("lora",), {"train": ("down",)}, ValueError, "train is .*up starts at zero"),
    (("lora_mini",), {"train": ("a_train",)}, ValueError, "train is .*b_train starts at zero"),
    (EVERY, {"rank": 2}, TypeError, "rank"),
]


@pytest.mark.parametrize(
    ("method", "keywords", "error", "message"),
    [(m, *rest) for each, *rest in SETTINGS for m in each],
)
def test_settings(method: str, keywords: dict, error: type[Exception], message: str) -> None:
    """Constructors, from_linear and adapt refuse the same settings, for the same reason."""
    keywords = {**GOOD[method], **keywords}
    for cls in METHODS[method]:
        with pytest.raises(error, match=message):
            cls(K, N, **keywords)
        linear = nn.Linear(K, N)
        with pytest.raises(error, match=message):
            cls.from_linear(linear, **keywords)
        assert linear.weight.requires_grad
    model = nn.Sequential(linear)
    with pytest.raises(error, match=message):
        adapt(model, method, target_modules=["0"], **keywords)
    assert model[0] is linear
    assert linear.weight.requires_grad


class Quantised(nn.Linear):
    """As 8-bit libraries do it: integers for a weight."""

    def __init__(self) -> None:
        super().__init__(K, N)
        self.weight = nn.Parameter(ones(N, K, dtype=torch.int8), requires_grad=False)


class Quantised4(nn.Linear):
    """As 4-bit libraries do it: a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def parametrised() -> nn.Module:
    """A weight computed from others by torch.nn.utils.parametrize."""
    return parametrizations.weight_norm(nn.Linear(K, N))


def pruned() -> nn.Module:
    """A weight computed from others by a hook."""
    return prune.l1_unstructured(nn.Linear(K, N), "weight", 0.5)


LINEARS: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "int8": (Quantised, TypeError, r"is a Quantised with a weight of torch\.int8.*dequantise"),
    "own forward": (
        lambda: Quantised4(K, N),
        TypeError,
        r"is a Quantised4, which makes no \(2, 6\)",
    ),
    "parametrised": (parametrised, TypeError, "is parametrised"),
    "pruned": (pruned, TypeError, "is parametrised"),
    "adapted": (lambda: METHODS["lora"][1](K, N, r=2), TypeError, "is adapted|adapted already"),
    "convolution": (lambda: nn.Conv1d(2, 2, 1), TypeError, "only nn.Linear"),
    "meta": (lambda: nn.Linear(K, N, device="meta"), ValueError, "meta device.*defer_bases"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", LINEARS)
def test_linears(case: str, method: str) -> None:
    """Modules that cannot be adapted, alone and in a model, which stays as it was."""
    make, error, message = LINEARS[case]
    linear = make()
    before = copy.deepcopy({name: p.requires_grad for name, p in linear.named_parameters()})
    with pytest.raises(error, match="linear .*" + message):
        METHODS[method][1].from_linear(linear, **GOOD[method])
    model = nn.Sequential(nn.Linear(K, N), linear)
    refusal = (ValueError, "adapted already") if case == "adapted" else (error, "1 .*" + message)
    if case != "convolution":
        with pytest.raises(refusal[0], match=refusal[1]):
            adapt(model, method, target_modules=["0", "1"], **GOOD[method])
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad
    assert {name: p.requires_grad for name, p in linear.named_parameters()} == before


def test_layer_input(device: torch.device) -> None:
    """The layers' own inputs are checked like the function's."""
    for method, (_, fused) in METHODS.items():
        layer = fused(K, N, device=device, **GOOD[method])
        with pytest.raises(TypeError, match=r"x is torch\.int64"):
            layer(torch.ones(2, K, dtype=torch.int64, device=device))
        with pytest.raises(ValueError, match=re.escape(f"x is (2, {K + 1})")):
            layer(torch.ones(2, K + 1, device=device))
        with pytest.raises(ValueError, match=r"weight is on .*x on meta"):
            layer(torch.ones(2, K, device="meta"))


@pytest.mark.parametrize("banked", [False, True])
@pytest.mark.parametrize("value", [1.0, -0.5, math.nan])
def test_a_dropout_that_was_set_later_is_checked(value: float, banked: bool) -> None:
    """It is a plain attribute of a layer, which a schedule may write to."""
    layer = FusedLoraXSLinear(24, 20, r=4, dropout=0.5)
    model = torch.nn.Sequential(layer)
    layer.dropout = value
    x = torch.randn(6, 24)
    if not banked:
        with pytest.raises(ValueError, match="dropout_p is"):
            model(x)
        return
    bank = AdapterBank.from_model(model, slots=1)
    bank.add("a")
    with bank.use(["a"] * 6), pytest.raises(ValueError, match="dropout_p is"):
        model(x)
