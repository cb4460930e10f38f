"""Initial factors: PEFT's where it has them, the published equations where it has not."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lowrank.methods.initial import values
from fused_lowrank.methods.initial.values import (
    Inputs,
    lora_start,
    mini_bases,
    needs,
    xs_bases,
)

N, K, R, ALPHA = 48, 40, 8, 12
SCALE = ALPHA / R


def decaying(n: int = N, k: int = K) -> Tensor:
    """A weight whose singular values are well apart."""
    (left, _), (right, _) = (torch.linalg.qr(torch.randn(side, min(n, k))) for side in (n, k))
    return (left * torch.linspace(3, 0.1, min(n, k))) @ right.t()


def peft_start(init: Any, weight: Tensor) -> SimpleNamespace:
    """PEFT's lora_A, lora_B and base weight of a layer with this weight."""
    model = nn.Sequential(nn.Linear(K, N))
    model[0].weight.data = weight.clone()
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=init)
    layer: Any = get_peft_model(model, config).base_model.model[0]
    own = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    return SimpleNamespace(
        **dict(zip(("down", "up", "weight"), map(Tensor.detach, own), strict=True))
    )


def close(ours: Tensor, theirs: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def assert_as_peft(ours: Any, theirs: Any, weight: Tensor, atol: float = 2e-5) -> None:
    """The same factors up to each triple's sign, the same product and what it leaves of W."""
    sign = (ours.down * theirs.down).sum(1).sign()
    close(ours.down, theirs.down * sign[:, None], atol)
    close(ours.up, theirs.up * sign, atol)
    close(ours.up @ ours.down, theirs.up @ theirs.down, atol)
    close(beside(ours, weight), theirs.weight, atol)


def beside(start: Any, weight: Tensor) -> Tensor:
    """What a residual init leaves of the weight, which trains beside the factors in PEFT."""
    return (weight.to(start.up.dtype) - SCALE * start.up @ start.down).to(weight.dtype)


# --- LoRA ---


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_residual_as_peft(init: str) -> None:
    """Factors, product and residual are PEFT's; √(Σ/scale) is on either side in PiSSA's."""
    left, sigma, right = torch.linalg.svd(decaying(), full_matrices=False)
    sigma[R:] *= 0.1  # PEFT's randomised SVD has no vectors to spare: it needs the gap
    weight = (left * sigma) @ right
    assert_as_peft(lora_start(init, weight, R, SCALE), peft_start(init, weight), weight, 1e-4)


@pytest.mark.parametrize(("peft", "init"), [(True, "kaiming"), ("gaussian",) * 2])
def test_random_as_peft(peft: Any, init: str) -> None:
    """down is drawn from PEFT's distribution; up is 0, and the weight stays."""
    torch.manual_seed(0)
    ours = lora_start(init, torch.empty(64, 4096), R, SCALE)
    assert not ours.up.any()
    assert ours.up.shape == (64, R)
    std = 1 / R if init == "gaussian" else 1 / math.sqrt(3 * 4096)
    assert float(ours.down.std()) == pytest.approx(std, rel=0.02)
    theirs = peft_start(peft, decaying()).down
    expected = std if init == "gaussian" else 1 / math.sqrt(3 * K)
    assert float(theirs.std()) == pytest.approx(expected, rel=0.2)


def test_orthogonal_as_peft() -> None:
    """The same draws give PEFT's factors, whose product is 0."""
    weight = decaying()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    ours = lora_start("orthogonal", weight, R, SCALE)
    torch.set_rng_state(state)
    theirs = peft_orthogonal(weight)
    close(ours.down, theirs[0], 1e-6)
    close(ours.up, theirs[1], 1e-6)
    assert ours.down.any()
    assert ours.up.any()
    close(ours.up @ ours.down, torch.zeros(N, K), 1e-5)
    with pytest.raises(ValueError, match=r"r is 7.*even"):
        lora_start("orthogonal", weight, 7, SCALE)


def peft_orthogonal(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What PEFT's orthogonal_init draws, from the generator as it is."""
    layer: Any = SimpleNamespace(
        r={"a": R},
        in_features=K,
        out_features=N,
        lora_A={"a": SimpleNamespace()},
        lora_B={"a": SimpleNamespace()},
        get_base_layer=lambda: SimpleNamespace(weight=weight),
    )
    LoraLayer.orthogonal_init(layer, "a")
    return layer.lora_A["a"].weight.detach(), layer.lora_B["a"].weight.detach()


def test_milora() -> None:
    """The smallest triples are taken out: what is left has the others, and W is made again."""
    weight = decaying()
    ours = lora_start("milora", weight, R, SCALE)
    sigma = torch.linalg.svdvals(weight)
    close(torch.linalg.svdvals(beside(ours, weight))[: K - R], sigma[: K - R])
    close(SCALE * torch.linalg.svdvals(ours.up @ ours.down)[:R], sigma[-R:])
    close(ours.up.norm(dim=0), ours.down.norm(dim=1))


@pytest.mark.parametrize(("init", "mode"), [("corda", "ipm"), ("corda_kpm", "kpm")])
def test_corda_as_peft(init: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both modes, with the covariance that PEFT gathers of one sample."""
    if importlib.util.find_spec("attr") is None:  # PEFT has a dataclass from it, and no more
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    weight, x = decaying(), torch.randn(200, K) * torch.linspace(1, 3, K)
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    model[0].weight.data = weight.clone()
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=["0"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode, prune_temporary_fields=False),
    )
    preprocess_corda(model, config, run_model=lambda: model(x))
    covariance = model[0].covariance_matrix.clone()
    layer: Any = get_peft_model(model, config).base_model.model[0]
    theirs = SimpleNamespace(
        down=layer.lora_A["default"].weight.detach(),
        up=layer.lora_B["default"].weight.detach(),
        weight=layer.base_layer.weight.detach(),
    )
    ours = lora_start(init, weight, R, SCALE, Inputs(covariance=covariance))
    assert_as_peft(ours, theirs, weight, 2e-4)


def test_eva() -> None:
    """down is the first directions, up is 0."""
    directions = torch.linalg.qr(torch.randn(K, 12))[0].t()
    inputs = Inputs(directions, torch.ones(12))
    ours = lora_start("eva", decaying(), R, SCALE, inputs)
    assert torch.equal(ours.down, directions[:R])
    assert not ours.up.any()
    with pytest.raises(ValueError, match=r"needs 13 directions.*12 are known"):
        lora_start("eva", decaying(), 13, SCALE, inputs)


class Made(TorchDispatchMode):
    """Notes how many numbers the tensors have that operations make, not as views of others."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view:
            self.sizes.append(made.numel())
        return made


@pytest.mark.parametrize("init", ["pissa", "milora", "corda"])
def test_makes_no_residual(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the decomposition nothing is made of the weight's size: the layer keeps its W."""
    weight, made = decaying(), Made()
    parts = torch.randn(R, K), torch.ones(R), torch.randn(N, R)
    monkeypatch.setattr(values, "decomposed", lambda *a: parts)
    with made:
        lora_start(init, weight, R, SCALE)
    assert made.sizes
    assert max(made.sizes) < N * K


@pytest.mark.parametrize("init", ["pissa", "milora", "olora", "pissa_niter_4", "corda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_residual_dtypes(init: str, dtype: torch.dtype) -> None:
    """The factors of a residual init are in float32 or wider, whatever the weight's dtype."""
    weight = decaying().to(dtype)
    ours = lora_start(init, weight, R, SCALE, Inputs(covariance=torch.eye(K)))
    assert ours.down.dtype == ours.up.dtype == torch.promote_types(dtype, torch.float32)


# --- LoRA-XS and LoRA-Mini ---


def test_xs_bases() -> None:
    """down = upᵀ·W for triples of W, leading or smallest; of W within the directions for "eva"."""
    weight = decaying()
    sigma = torch.linalg.svdvals(weight)
    for init, expected in ("svd", sigma[:R]), ("minor", sigma[-R:]):
        down, up = xs_bases(init, weight, R)
        close(up.t() @ weight, down)
        close(up.t() @ up, torch.eye(R))
        close(down.norm(dim=1), expected, 1e-4)
    directions = torch.linalg.qr(torch.randn(K, 12))[0].t()
    down, up = xs_bases("eva", weight, R, inputs=Inputs(directions, torch.ones(12)))
    within = weight @ directions[:R].t() @ directions[:R]
    close(up.t() @ up, torch.eye(R))
    close(up @ down, within)
    torch.manual_seed(1)
    down, up = xs_bases("random", weight, R)
    assert down.abs().max() <= 1 / math.sqrt(K)
    assert up.abs().max() <= 1 / math.sqrt(R)


@pytest.mark.parametrize("init", ["svd", "qr", "eva"])
@pytest.mark.parametrize(("a", "b"), [(6, 10), (10, 6)])
def test_mini_bases(init: str, a: int, b: int) -> None:
    """They span what they are named after, in the size of Kaiming-uniform ones."""
    weight = decaying()
    directions = torch.linalg.qr(torch.randn(K, 12))[0].t()
    strengths = torch.linspace(5, 1, 12)
    down, up = mini_bases(init, weight, a, b, Inputs(directions, strengths))
    assert down.shape == (a, K)
    assert up.shape == (N, b)
    assert float(down.norm()) == pytest.approx(math.sqrt(a / 3), rel=1e-4)
    close(up.t() @ up, torch.eye(b) * N / 3 / b, 1e-4)
    if init == "svd":
        left, _, right = torch.linalg.svd(weight)
    elif init == "qr":
        left, right = torch.linalg.qr(weight)
    else:
        right = directions
        most = max(a, b)
        left = torch.linalg.svd(weight @ (directions[:most].t() * strengths[:most]))[0]
    assert span_error(down.t(), right[:a].t()) < 1e-4
    assert span_error(up, left[:, :b]) < 1e-3


def span_error(ours: Tensor, theirs: Tensor) -> float:
    """How far `theirs` is from the span of `ours`."""
    basis, theirs = torch.linalg.qr(ours)[0], torch.linalg.qr(theirs)[0]
    return float((theirs - basis @ (basis.t() @ theirs)).norm())


def test_mini_kaiming() -> None:
    """Those of "identity" and "paper" are within Kaiming's bounds."""
    for init in ("identity", "paper"):
        down, up = mini_bases(init, decaying().bfloat16(), 6, 10)
        assert down.dtype == up.dtype == torch.bfloat16
        assert 0 < down.abs().max() <= 1 / math.sqrt(K) + 1e-3
        assert 0 < up.abs().max() <= 1 / math.sqrt(10) + 1e-3


# --- what is refused ---


def test_names() -> None:
    """A name says what it needs; one that a function does not know is an error there as well."""
    assert needs("eva") == "directions"
    assert needs("corda_kpm") == "covariance"
    assert needs("loftq") == "original"
    assert needs("pissa") is None
    for start, names in (
        (lambda init: lora_start(init, decaying(), R, SCALE), ("svd", "qr", "pissa_niter_N")),
        (lambda init: xs_bases(init, decaying(), R), ("pissa_niter_3", "qr")),
        (lambda init: mini_bases(init, decaying(), R, R), ("milora", "random")),
    ):
        for name in names:
            with pytest.raises(ValueError, match=f"init is '{name}', which is none of these"):
                start(name)


@pytest.mark.parametrize("init", ["eva", "corda", "corda_kpm"])
def test_without_data(init: str) -> None:
    """What needs inputs says how to give them."""
    with pytest.raises(ValueError, match=f"init='{init}' needs to see inputs.*data=batches"):
        lora_start(init, decaying(), R, SCALE)
    if init == "eva":
        for start in (xs_bases, lambda *a: mini_bases(*a, R)):
            with pytest.raises(ValueError, match="data=batches"):
                start(init, decaying(), R)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "milora", "olora"])
def test_refuses(init: str) -> None:
    """A weight that is not finite and a scale of 0: before anything."""
    with pytest.raises(ValueError, match="NaN or Inf"):
        lora_start(init, torch.full((N, K), float("nan")), R, SCALE)
    with pytest.raises(ValueError, match="alpha 0 or below"):
        lora_start(init, decaying(), R, 0.0)


def test_refuses_bases() -> None:
    """No covariance to invert; ranks without rows; nothing to take."""
    with pytest.raises(ValueError, match="covariance of the inputs is 0"):
        lora_start("corda", decaying(), R, SCALE, Inputs(covariance=torch.zeros(K, K)))
    for init in ("svd", "qr", "eva"):
        with pytest.raises(ValueError, match=f"at most {K}, the smaller side"):
            mini_bases(init, decaying(), K, K + 1)
    for init in ("svd", "qr"):
        with pytest.raises(ValueError, match="which is 0"):
            mini_bases(init, torch.zeros(N, K), 4, 4)
