"""The gain over outputs: its gradient, what is saved for it, and what cannot be had."""

from typing import Any

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_lowrank import lowrank_linear
from fused_lowrank.compute import gain as by_library
from fused_lowrank.compute.autograd import backward_op, forward_op
from fused_lowrank.compute.gain import add_tail_, back_by_rows, gain_back, tail_by_rows_
from fused_lowrank.compute.plans import PLANS
from fused_lowrank.compute.reference import TORCH, wide_dtype
from fused_lowrank.kernels.gain_back import gain_back as our_gain_back
from fused_lowrank.kernels.tiles import TileConfig
from fused_lowrank.testing import check_pooled, measure, pinned_plan, pinned_tiles

INTERPRETED = triton.knobs.runtime.interpret
IMPLS = ("triton", "aten", "auto")
CASES = 60
NAMES = {"x", "weight", "down", "core", "up", "bias", "gain"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILES = {
    "gemm_tail": TileConfig(16, 32, 16, 4, 1, group_m=2),
    "gain_back": TileConfig(16, 16, 16, 4, 1),
}


def operands(
    device: torch.device,
    *,
    m: int = 37,
    k: int = 24,
    n: int = 20,
    r: int = 5,
    core: str = "core",
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    wide: torch.dtype | None = None,
    train: tuple[str, ...] = ("x", "core", "gain"),
) -> dict[str, Any]:
    """Operands of a call; those named in `train` require a gradient. Gains are about 1."""

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(kind)

    made: dict[str, Any] = {
        "x": draw(m, k),
        "weight": draw(n, k) * k**-0.5,
        "down": draw(r, k) * k**-0.5,
        "core": {"core": (draw(r, r),), "pair": (draw(r, 3), draw(3, r)), "none": ()}[core],
        "up": draw(n, r),
        "bias": draw(n) / 4 if bias else None,
        "scale": 0.5,
        "gain": (0.5 + torch.rand(n, device=device)).to(wide or dtype),
    }
    made["core"] = made["core"] if core == "pair" else (*made["core"], None)[0]
    for name in train:
        for tensor in made[name] if isinstance(made[name], tuple) else (made[name],):
            if tensor is not None:
                tensor.requires_grad_()
    return made


def reference(**given: Any) -> Tensor:
    """The same call by the reference."""
    return lowrank_linear(**given, impl="reference")


def lost_beside_bias(made: dict[str, Any], dy: Tensor) -> float:
    """The error that dgain may have because z is had from y, which was rounded beside the bias."""
    with torch.no_grad():
        y = reference(**made).double()
        lost = (y.abs() * dy.double().abs()).sum(0) / made["gain"].double().abs()
    return float(torch.finfo(made["x"].dtype).eps * lost.norm().detach())


@pytest.mark.parametrize("impl", [*IMPLS, "split", "decode", "isolated"])
def test_error_budget(impl: str, device: torch.device) -> None:
    """Output and gradients against float64, and pooled no larger than the reference's errors."""
    measured = []
    sizes = st.integers(1, 80) if device.type == "cpu" else st.sampled_from([16, 80])

    @settings(
        max_examples=CASES, derandomize=True, deadline=None, suppress_health_check=HealthCheck
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        draw, flag = data.draw, st.booleans()
        m = draw(st.sampled_from([0, 1, 7, 48, 64] if impl == "decode" else [0, 1, 7, 67, 130]))
        dtype = draw(st.sampled_from(DTYPES))
        names = NAMES if impl != "decode" else NAMES - {"down"}
        made = operands(
            device,
            m=m,
            k=draw(sizes),
            n=draw(sizes),
            r=draw(st.integers(1, 32)) if device.type == "cpu" else 16,
            core=draw(st.sampled_from(["core", "pair", "none"])),
            bias=draw(flag),
            dtype=dtype,
            wide=draw(st.sampled_from([dtype, torch.float32])),
            train=tuple(name for name in sorted(names) if draw(flag)),
        )
        made["gain"] = (made["gain"] * (-1) ** draw(st.integers(0, 1))).detach()
        made["gain"].requires_grad_(draw(flag))
        dy = torch.randn(m, len(made["weight"]), device=device)
        if draw(flag):
            dy = dy[:, :1].expand(dy.shape)  # as the backward of a sum gives it
        named = impl not in IMPLS
        asked = {"isolated": "aten"}.get(impl, "triton") if named else impl

        def ours(**given: Any) -> Tensor:
            with pinned_tiles(**TILES if draws_tiles and not named else {}):
                if not named or m == 0:
                    return lowrank_linear(**given, impl=asked)
                with pinned_plan(impl):
                    return lowrank_linear(**given, impl=asked)

        draws_tiles = draw(flag) and device.type == "cpu"
        errors = measure(ours, reference, made, dy)
        rounded = lost_beside_bias(made, dy)
        outside = [one for one in errors if not one.within]
        assert all(one.name == "dgain" and one.error <= rounded for one in outside), outside
        measured.extend(errors)

    check()
    check_pooled(measured)


@pytest.mark.parametrize("plan", ["split", "decode", "aten"])
@pytest.mark.parametrize("core", ["core", "pair", "none"])
@pytest.mark.skipif(not INTERPRETED, reason="the compiled kernels have no fp64")
def test_gradcheck(core: str, plan: str, device: torch.device) -> None:
    """Numerical differentiation through the kernels, in float64, of all operands."""
    names = tuple(NAMES if plan != "decode" else NAMES - {"down"})  # decode gives no u
    made = operands(device, m=5, k=6, n=4, r=2, core=core, dtype=torch.float64, train=names)
    plain = [name for name in made if name not in ("core", "scale")]
    parts = made["core"] if core == "pair" else (made["core"],)

    def call(*tensors: Tensor) -> Tensor:
        rest = tensors[len(plain) :]
        value = {"core": lambda: rest[0], "pair": lambda: rest, "none": lambda: None}[core]()
        named = dict(zip(plain, tensors, strict=False))
        with pinned_plan(plan):
            return lowrank_linear(core=value, scale=0.5, impl="triton", **named)

    inputs = [made[name] for name in plain] + [part for part in parts if part is not None]
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 100, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gain_back(
    dtype: torch.dtype,
    rows: int,
    bias: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ways back, several programs to a column, against float64; bits that come again."""
    monkeypatch.setattr(by_library, "AT_ONCE", 200 * 64)  # the last part has fewer rows
    n, tile = 200, TileConfig(16, 16, 128, 4, 1)
    z, dy = (torch.randn(rows, n, device=device).to(dtype) for _ in range(2))
    gain, b = torch.rand(n, device=device) + 0.5, torch.randn(n, device=device).to(dtype)
    y = (z * gain + b * bias).to(dtype)
    exact = (y.double() - b.double() * bias) * dy.double() / gain.double()
    dgain, size, exact_dz = exact.sum(0), exact.abs().sum(0), dy.double() * gain.double()

    def rowwise(dy: Tensor, y: Any, gain: Tensor, b: Any) -> Any:
        return back_by_rows(dy, y, gain, None if b is None else b.float())

    for call in (gain_back, rowwise, lambda *given: our_gain_back(*given, lambda *_: tile)):
        given = dy, y, gain, b if bias else None
        dz, found = call(*given)
        assert dz.dtype == dtype
        assert found.dtype == torch.float32
        rounded = torch.finfo(dtype).eps * exact_dz.abs() + 1e-7  # fp16 is coarser near zero
        assert bool(((dz.double() - exact_dz).abs() <= rounded).all())
        assert bool(((found.double() - dgain).abs() <= 1e-5 * size).all())
        again = call(*given)
        assert torch.equal(again[0], dz)
        assert torch.equal(again[1], found)
        assert call(dy, None, gain, None)[1] is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_tails(
    dtype: torch.dtype, bias: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of the last steps of a forward, in place, against float64."""
    monkeypatch.setattr(by_library, "AT_ONCE", 200 * 64)
    y, u, up = (torch.randn(*s, device=device).to(dtype) for s in ((150, 200), (150, 8), (8, 200)))
    wide = wide_dtype(dtype)
    gain = (torch.rand(200, device=device) + 0.5).to(wide)
    b = torch.randn(200, device=device).to(dtype) if bias else None
    exact = (y.double() + u.double() @ up.double()) * gain.double()
    exact = exact if b is None else exact + b.double()
    for call in (add_tail_, tail_by_rows_):
        own = y.clone()
        given = b if b is None or call is add_tail_ else b.to(wide)
        assert call(own, u, up, gain, given, TORCH).data_ptr() == own.data_ptr()
        assert float((own.double() - exact).norm()) <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("train", [("x", "core"), ("x", "core", "gain"), ("gain",), ("down",)])
def test_saves_t_and_numbers_of_n(train: tuple[str, ...], impl: str, device: torch.device) -> None:
    """Nothing of M × N but the result itself, and that only where the gain is trained."""
    kept: list[Tensor] = []
    made = operands(device, m=64, train=train, bias=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lowrank_linear(**made, impl=impl)
    large = [t for t in kept if 64 in t.shape and t.data_ptr() != y.data_ptr()]
    widths = ([24] if "down" in train else []) + ([5] if "core" in train else [])
    assert [tuple(t.shape) for t in large] == [(64, width) for width in widths]
    results = [t for t in kept if t.data_ptr() == y.data_ptr()]
    assert len(results) == ("gain" in train)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_an_output_that_was_written_to(
    lead: tuple[int, ...], impl: str, device: torch.device
) -> None:
    """The gradient of the gain cannot be had then, and the error says what to do."""
    made = operands(device, m=6)
    made["x"] = made["x"].detach().reshape(*lead, 24)
    y = lowrank_linear(**made, impl=impl)
    y += 1.0
    with pytest.raises(RuntimeError, match=r"inplace operation(.|\n)*y = y \+ …(.|\n)*reference"):
        y.sum().backward()
    made["gain"].requires_grad_(False)
    y = lowrank_linear(**made, impl=impl)
    y += 1.0
    y.sum().backward()
    y = lowrank_linear(**{**made, "gain": made["gain"].clone().requires_grad_()}, impl="reference")
    y += 1.0
    y.sum().backward()


def test_gains_of_zero(device: torch.device) -> None:
    """The chosen way on a CPU has their gradient; the others have NaN there, and say so."""
    made = operands(device, m=40, train=("x", "core"))
    gain = made.pop("gain").detach()
    gain[3] = 0.0

    def gradient(impl: str) -> Tensor:
        leaf = gain.clone().requires_grad_()
        lowrank_linear(**made, gain=leaf, impl=impl).square().sum().backward()
        return leaf.grad

    expected = gradient("reference")
    assert bool(expected[3].abs() > 0)
    if device.type == "cpu":
        torch.testing.assert_close(gradient("auto"), expected)
    for impl in ("triton", "aten"):
        found = gradient(impl)
        assert bool(found[3].isnan())
        rest = torch.arange(len(gain), device=device) != 3
        torch.testing.assert_close(found[rest], expected[rest], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["triton", "aten"])
@pytest.mark.parametrize("train", [(), ("x", "core", "gain"), ("gain",)])
def test_opcheck(train: tuple[str, ...], impl: str, device: torch.device) -> None:
    """Schema, fake tensors, autograd and AOT dispatch of the library ops with a gain."""
    made = operands(device, train=train)
    args = *(made[name] for name in ("x", "weight", "down", "core")), None, made["up"], made["bias"]
    flags = None, 0.5, 0.0, impl
    torch.library.opcheck(forward_op, (*args, *flags, "core" in train, made["gain"]))
    with torch.no_grad():
        y, t = forward_op(*args, *flags, True, made["gain"])
    x, weight, *factors, bias = (None if a is None else a.detach() for a in args)
    needs, gain = [True, True, True, True, False, True, True, True], made["gain"].detach()
    rest = x, weight, *factors, *flags, needs, gain, y, bias
    torch.library.opcheck(backward_op, (torch.randn_like(y), t, *rest))


@pytest.mark.parametrize("train", [("x", "core"), ("x", "down", "up", "bias", "gain")])
def test_compiled(train: tuple[str, ...], device: torch.device) -> None:
    """A graph gives the values and gradients of an eager call, and takes calls without a gain."""
    made = operands(device, train=train)
    compiled = torch.compile(lowrank_linear, fullgraph=True, backend="aot_eager")
    for call_of in (made, {**made, "gain": None}):
        leaves = [call_of[name] for name in train if call_of[name] is not None]
        found, expected = (call(**call_of, impl="aten") for call in (compiled, lowrank_linear))
        torch.testing.assert_close(found, expected)
        dy = torch.randn_like(expected)
        for one, other in zip(
            torch.autograd.grad(found, leaves, dy),
            torch.autograd.grad(expected, leaves, dy),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_schemas_take_what_older_graphs_hold() -> None:
    """The gain is an argument after all that there were, and may be left out."""
    for op, last in ((forward_op, ["gain"]), (backward_op, ["gain", "y", "bias"])):
        arguments = op._opoverload._schema.arguments
        assert [a.name for a in arguments[-len(last) :]] == last
        assert all(a.has_default_value() for a in arguments[-len(last) :])
        assert not any(a.has_default_value() for a in arguments[: -len(last)])


@pytest.mark.parametrize("name", ["first", "mixed"])
def test_plans_that_have_no_gain(name: str, device: torch.device) -> None:
    """They say why, and are not chosen."""
    made = operands(device, m=70)
    with pinned_plan(name), pytest.raises(RuntimeError, match="it has no gain"):
        lowrank_linear(**made, impl="triton")
    assert set(PLANS) > {"first", "mixed"}


def test_double_backward_is_refused(device: torch.device) -> None:
    """A second differentiation says what to do instead; the reference can."""
    made = operands(device)
    y = lowrank_linear(**made, impl="aten")
    (dgain,) = torch.autograd.grad(y.square().sum(), made["gain"], create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference' can"):
        dgain.sum().backward()


def test_a_large_bias_costs_digits_of_the_gradient(device: torch.device) -> None:
    """z is had from y: what y has lost beside a bias is lost; it stays within the budget."""
    torch.manual_seed(0)
    worst = {}
    for size in (0.0, 1.0, 100.0):
        made = operands(device, m=256, k=256, n=64, dtype=torch.bfloat16, wide=torch.float32)
        made["bias"] = 4 * size * made["bias"]
        errors = measure(
            lambda **given: lowrank_linear(**given, impl="aten"),
            reference,
            made,
            torch.randn(256, 64, device=device),
        )
        (one,) = (each for each in errors if each.name == "dgain")
        assert one.within, one
        worst[size] = one.error / one.reference
    assert worst[0.0] < 1.5
    assert worst[1.0] < 2.5
    assert worst[100.0] > 10  # as docs/design.md says
