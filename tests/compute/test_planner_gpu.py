"""Which plan computes a pass on a GPU, on paper: the planner takes a device for an H200."""

import pytest
import torch
from planner_cases import H200, at

from fused_lowrank import config
from fused_lowrank.compute import choose, costs, devices
from fused_lowrank.compute.operands import Operands, has_doubles
from fused_lowrank.compute.plans import PLANS


def test_a_product_takes_waves_of_tiles(hopper: torch.device) -> None:
    """One tile more than a GPU has multiprocessors is another wave; a CPU has none."""
    of = at(128, 4096, 132 * 256, device=hopper, dtype=torch.bfloat16)
    one, two = (costs.waves(at, (128, 256), 4096) for at in (of, of._replace(n=of.n + 1)))
    assert two == 2 * one == 2 * costs.of_tile(of, (128, 256), 4096)
    pure = 2.0 * 128 * 256 * 4096 * 132 / H200.narrow
    assert one == pytest.approx(pure)
    assert costs.of_tile(of, (64, 64), 4096) > pure / 8  # which is fed no faster


def test_the_choice_on_paper_for_a_gpu(hopper: torch.device) -> None:
    """Few rows in one launch where there is such a plan; library steps lose to fused ones."""
    for m in (1024, 8192):
        of = at(m, 4096, 4096, device=hopper, dtype=torch.bfloat16)
        seconds = {
            name: choose.predict(PLANS[name], of).seconds for name in ("split", "first", "aten")
        }
        assert min(seconds.values()) < seconds["aten"]
    assert seconds["split"] < 1.15 * costs.total([costs.base(of)], of).seconds


@pytest.fixture
def hopper(monkeypatch) -> torch.device:
    """A device that the planner takes for an H200."""
    tiles = pytest.importorskip("fused_lowrank.kernels.tiles")
    monkeypatch.setattr(devices, "target", lambda device: tiles.TARGETS["sm_90"])
    monkeypatch.setattr(costs, "peaks", lambda device: H200)
    return torch.device("cuda:0")


@pytest.mark.parametrize("transposed", [False, True])
def test_plans_of_a_gpu(transposed: bool, hopper: torch.device) -> None:
    """Library steps and kernels; in one launch where rows are few; none that is not proven."""
    pair = {"device": hopper, "dtype": torch.bfloat16, "transposed": transposed}
    many, few = at(8192, **pair), at(64, **pair)
    assert choose.candidates(many, "auto") == ["aten", "first", "split", "mixed"]
    assert choose.candidates(few, "auto") == ["aten", "first", "split", "mixed", "decode"]
    assert choose.candidates(few, "triton") == ["split", "decode"]
    assert choose.candidates(few._replace(p=300), "auto") == ["aten", "first"]
    assert choose.candidates(few._replace(want_u=True), "auto") == choose.candidates(many, "auto")
    assert choose.decide(few, "auto", mode="off").plans[0] == "decode"
    assert choose.decide(many, "auto", mode="off").plans[0] != "aten"


@pytest.mark.parametrize("transposed", [False, True])
def test_float32_on_a_gpu(transposed: bool, hopper: torch.device) -> None:
    """aten, unless there is a mask or a core for each row; TF32 only by its name."""
    for m in (1, 64, 8192):
        of = at(m, 4096, 4096, device=hopper, transposed=transposed)
        assert choose.candidates(of, "auto") == ["aten"]
        assert "split" in choose.candidates(of, "triton")
        assert "split" in choose.candidates(of._replace(by_row=True), "auto")
        assert "split" in choose.candidates(of._replace(dropout=True), "auto")
    narrow = PLANS["split:tf32x3"]
    assert not narrow.automatic
    assert narrow.why_not(of) is None
    for other in ({"m": 64}, {"dropout": True}, {"regular": False}, {"dtype": torch.bfloat16}):
        assert "is for float32 without dropout" in narrow.why_not(of._replace(**other))
    assert "is for 16 bits" in PLANS["split:deep"].why_not(of)


def test_compiled_kernels_take_no_factor_in_float64(
    hopper: torch.device, device: torch.device, monkeypatch
) -> None:
    """Whatever the plan: Triton cannot compile some of them. It is the interpreter's alone."""
    made = {"x": (5, 16), "weight": (8, 16), "down": (4, 16), "core": (4, 6), "up": (8, 6)}
    made = {name: torch.zeros(size, device=device).bfloat16() for name, size in made.items()}
    pair = made["core"].double(), made["up"][:6]
    changes = [{}, *({name: made[name].double()} for name in ("down", "core", "up"))]
    changes += [{"core": None}, {"core": pair}, {"core": pair[::-1]}]
    found = [has_doubles(Operands(**{**made, **c}, bias=None, scale=1.0)) for c in changes]
    assert found == [False, True, True, True, False, True, True]
    whole = {name: tensor.double() for name, tensor in made.items()}
    assert not has_doubles(Operands(**whole, bias=None, scale=1.0))
    for by_row, m in ((False, 8), (False, 8192), (True, 8)):
        of = at(m, device=hopper, dtype=torch.bfloat16, doubles=True, by_row=by_row, bulk=m > 64)
        monkeypatch.setattr(devices, "interpreted", lambda: True)
        assert any(PLANS[name].ours for name in choose.candidates(of, "auto"))
        monkeypatch.setattr(devices, "interpreted", lambda: False)
        assert not any(PLANS[name].ours for name in choose.candidates(of, "auto"))
        assert "torch.float64" in PLANS["decode"].why_not(of)
        with pytest.raises(RuntimeError, match=r"impl='triton' cannot.*torch\.float64.*'auto' can"):
            choose.decide(of, "triton", mode="off")
    x = made["x"]
    monkeypatch.setattr(choose, "takes_kernels", lambda *_: True)
    for doubles, name in ((False, "split"), (True, "aten")):
        given = "auto", config.Config(), x, 4, 6, doubles
        assert choose.for_single_steps(*given).name == name


@pytest.mark.parametrize("rank", [16, 300])
def test_dropout_has_one_mask_forward_and_backward(rank: int, hopper: torch.device) -> None:
    """The kernels' and torch's differ: whichever plans two passes take, they are of one kind."""
    kinds = set()
    for transposed in (False, True):
        kind = {"dtype": torch.bfloat16, "transposed": transposed, "dropout": True}
        of = at(8192, rank=rank, device=hopper, **kind)
        names = choose.candidates(of, "auto")
        kinds |= {PLANS[name].ours for name in names}
    assert kinds == {rank == 16}


def test_what_cores_of_their_own_cost_a_relay_on_paper(hopper: torch.device) -> None:
    """What the first column's tiles read between their K-loop and the flag, once in each turn."""

    def seconds(m: int, p: int, name: str, by_row: bool) -> float:
        problem = at(m, 4096, 4096, device=hopper, dtype=torch.bfloat16, bulk=True, by_row=by_row)
        return choose.predict(PLANS[name], problem._replace(p=p, q=p)).seconds

    def added(m: int, p: int) -> float:
        return seconds(m, p, "relay", True) - seconds(m, p, "relay", False)

    assert added(8192, 16) == pytest.approx(added(256, 16))
    assert added(32768, 16) == pytest.approx(2 * added(8192, 16))
    assert added(8192, 64) > 10 * added(8192, 16)
