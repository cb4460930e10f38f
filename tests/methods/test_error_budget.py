"""Every method's layer against its reference in float64, over whatever can be drawn of it."""

import zlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from fused_lowrank.compute import isolation
from fused_lowrank.methods import METHODS
from fused_lowrank.methods.initial.values import needs
from fused_lowrank.methods.method import MAGNITUDE
from fused_lowrank.testing import measure

CASES, COMPILED = 9, 3  # of each; on a GPU every case is compiled for seconds
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEADS = [(), (0,), (1,), (7,), (34,), (3, 5), (2, 0, 3), (2, 3, 11)]


@st.composite
def steps(
    draw: st.DrawFn, method: str, device: torch.device
) -> tuple[Any, Any, dict[str, Any], Tensor]:
    """(the fused layer, its reference, operands: x, scale and parameters by name, dy)."""
    # Those whose products on this CPU, which the reference's are, read nothing else.
    kinds = [kind for kind in DTYPES if isolation.readable(17, kind) == 17]
    row, dtype = METHODS[method][0].row, draw(st.sampled_from(kinds))
    ranks = {name: draw(st.integers(1, 12)) for name in row.ranks}
    divisor = ranks.get(row.divides, 1)
    k, n = (divisor * draw(st.integers(1, 40 // divisor)) for _ in "kn")
    keywords = {name: row.fitted(k, n, ranks)[name] for name in ranks}
    if row.inits_known:
        inits = [init for init in row.inits_known if not needs(init)]
        keywords["init"] = draw(st.sampled_from(inits)).replace("_N", "_4")
    if row.dora is not None:
        keywords["dora"] = draw(st.booleans())
    keywords["alpha"] = draw(st.sampled_from([None, 0.5, 7.0, -3.0]))
    keywords["dtype"] = draw(st.sampled_from([None, dtype]))  # of what is trained
    if draw(st.booleans()):
        saved = [name for name, factor in row.factors.items() if factor.saved]
        more = [MAGNITUDE] if keywords.get("dora") else []
        keywords["train"] = ("weight", "bias", *saved, *more)
    linear = nn.Linear(k, n, bias=draw(st.booleans()), device=device, dtype=dtype)
    if "train" in keywords and linear.bias is None:
        keywords["train"] = tuple(name for name in keywords["train"] if name != "bias")
    plain, fused = (
        cls.from_linear(linear, defer_bases=True, **keywords) for cls in METHODS[method]
    )
    for layer in (plain, fused):
        layer.bases_pending = False  # the values are drawn here
        layer.train(draw(st.booleans()))

    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def values(like: Tensor, name: str) -> Tensor:
        if name == MAGNITUDE:
            made = 0.5 + torch.rand(like.shape, generator=generator)
        else:
            made = torch.randn(like.shape, generator=generator)
            made *= like.shape[-1] ** -0.5 if like.dim() > 1 else 0.5
        return made.to(like.dtype).to(device).requires_grad_(like.requires_grad)

    parameters = {name: values(own, name) for name, own in plain.named_parameters()}
    lead = draw(st.sampled_from(LEADS))
    x, dy = (torch.randn(*lead, size, generator=generator).to(device) for size in (k, n))
    x = x.to(dtype).requires_grad_(draw(st.booleans()))
    return fused, plain, {"x": x, "scale": plain.scale, **parameters}, dy


def called(layer: Any) -> Any:
    """The layer as a function of x, its scale and its parameters."""

    def call(x: Tensor, scale: float, **parameters: Tensor) -> Tensor:
        layer.scale = scale
        return functional_call(layer, parameters, (x,))

    return call


def beside_bias(plain: Any, operands: dict[str, Any], dy: Tensor) -> float:
    """The error more that magnitude's gradient may have, as x·Wᵀ + … is had from a rounded y."""
    if MAGNITUDE not in operands:
        return 0.0
    with torch.no_grad():
        y = called(plain)(**operands).double().reshape(-1, dy.shape[-1])
        lost = (y.abs() * dy.double().abs().reshape(y.shape)).sum(0)
        lost /= operands[MAGNITUDE].double().abs()
    return float(torch.finfo(operands["x"].dtype).eps * lost.norm())


@pytest.mark.parametrize("impl", ["auto", "aten", "triton"])
@pytest.mark.parametrize("method", METHODS)
def test_error_budget(method: str, impl: str, device: torch.device) -> None:
    """No tensor's error is above the budget."""

    @seed(zlib.crc32(f"{method} {impl}".encode()))  # other cases for each
    @settings(
        max_examples=CASES if device.type == "cpu" else COMPILED,
        deadline=None,
        database=None,
        suppress_health_check=HealthCheck,
    )
    @given(steps(method, device))
    def check(step: tuple[Any, Any, dict[str, Any], Tensor]) -> None:
        fused, plain, operands, dy = step
        fused.impl = impl
        errors = measure(called(fused), called(plain), operands, dy)
        assert {f"d{name}" for name in plain.train_names} <= {one.name for one in errors}
        outside = [one for one in errors if not one.within]
        rounded = beside_bias(plain, operands, dy) if outside else 0.0
        for one in outside:
            assert one.name == f"d{MAGNITUDE}", (plain, one)
            assert one.error <= one.floor + rounded, (plain, one)

    check()
