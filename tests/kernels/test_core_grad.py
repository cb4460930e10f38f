"""core_grad: the gradients of one core, or of a pair, and the counters it leaves behind."""

import pytest
import torch
import triton

from fused_lowrank.kernels import core_grad as module
from fused_lowrank.kernels.common import arrivals
from fused_lowrank.kernels.tiles import TileConfig

ROWS, P, Q, R = 37, 20, 40, 7  # of tiles two by three
TILE = TileConfig(16, 16, 16, 4, 1)
Grads = tuple[torch.Tensor | None, torch.Tensor | None]


@pytest.fixture(autouse=True)
def _few_rows_to_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that three programs share the rows of a tile."""
    monkeypatch.setattr(module, "MIN_ROWS", 16)


def operands(device: torch.device, dtype: torch.dtype, pair: bool) -> dict:
    """t, g, and a core in fp32."""
    sizes = [(P, R), (R, Q)] if pair else [(P, Q)]
    factors = tuple(torch.randn(size, device=device) for size in sizes)
    rows = {name: torch.randn(ROWS, n, device=device).to(dtype) for name, n in (("t", P), ("g", Q))}
    return {**rows, "core": factors if pair else factors[0]}


def launched(
    t: torch.Tensor, g: torch.Tensor, core: object, want: tuple[bool, bool] = (True, True)
) -> Grads:
    """The gradients by the kernel, which finds its counters at zero and leaves them so."""
    assert not arrivals(t.device).any()
    grads = module.core_grad(t, g, core, 0.5, want, lambda *_: TILE)
    assert not arrivals(t.device).any()
    return grads


def expected(t: torch.Tensor, g: torch.Tensor, core: object) -> Grads:
    """The gradients by the equation."""
    dcore = 0.5 * t.double().t() @ g.double()
    if not isinstance(core, tuple):
        return dcore, None
    a, b = (factor.double() for factor in core)
    return dcore @ b.t(), a.t() @ dcore


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_and_the_counters(
    dtype: torch.dtype, pair: bool, device: torch.device
) -> None:
    """Launch after launch, of other sizes too, the same bits; the counters are zero between."""
    made = operands(device, dtype, pair)
    few = {**made, "t": made["t"][:16], "g": made["g"][:16]}
    first = launched(**made)
    launched(**few)
    for ours, again, exact in zip(first, launched(**made), expected(**made), strict=True):
        if exact is None:
            assert ours is again is None
            continue
        assert torch.equal(ours, again)
        assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-4)


def test_only_what_is_wanted_of_a_pair(device: torch.device) -> None:
    made = operands(device, torch.float32, pair=True)
    both = launched(**made)
    for want in ((True, False), (False, True), (False, False)):
        for whole, alone, wanted in zip(both, launched(**made, want=want), want, strict=True):
            assert torch.equal(whole, alone) if wanted else alone is None


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a GPU has an order of its own")
@pytest.mark.parametrize("pair", [False, True])
def test_the_order_of_the_programs_changes_no_bit(
    pair: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of all tiles come in turn, last to first."""
    from triton.runtime.interpreter import interpreter_builder

    made = operands(device, torch.float32, pair)
    first = launched(**made)
    start = interpreter_builder.set_grid_idx

    def other(x: int, y: int, z: int) -> None:
        parts, tiles, _ = interpreter_builder.grid_dim
        assert parts > 1
        at = parts * tiles - 1 - (x * tiles + y)
        start(at // tiles, at % tiles, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", other)
    for one, again in zip(first, launched(**made), strict=True):
        assert one is again is None or torch.equal(one, again)
