"""Plans that are pinned, or named by explain; layers without rows; lacks that are told."""

import concurrent.futures
import contextlib
import warnings
from dataclasses import replace

import pytest
import torch
from planner_cases import OutOfResources, at

from fused_lowrank import (
    AdapterBank,
    FusedLoraXSLinear,
    LoraXSLinear,
    config,
    explain,
    lowrank_linear,
    use_batch_invariance,
)
from fused_lowrank.compute import choose, devices
from fused_lowrank.compute import measured as tuning
from fused_lowrank.compute.operands import Operands, problem_of
from fused_lowrank.compute.plans import PLANS
from fused_lowrank.compute.run import run
from fused_lowrank.kernels.tiles import TileConfig
from fused_lowrank.testing import pinned_plan


def test_a_pinned_plan_that_cannot_says_why(device: torch.device) -> None:
    """Rather than another one's result under its name."""
    layer = FusedLoraXSLinear(96, 64, r=4, dropout=0.5, device=device)
    with pinned_plan("first"):
        y = layer(torch.randn(5, 96, device=device, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"first cannot.*dropout"):
        y.sum().backward()


def taken() -> dict[bool, str]:
    """transposed → the plan that calls have been given since `choose.CHOSEN` was cleared."""
    return {of.transposed: decision.plans[0] for (of, _), decision in choose.CHOSEN.items()}


@pytest.mark.parametrize(
    ("tiles", "said"),
    [
        ({"shrunk": TileConfig(16, 16, 16, 4, 1)}, r"'shrunk': it must have .* shrink, gemm_tail"),
        ({"shrink": 3}, r"tiles has 3 for 'shrink'"),
    ],
)
def test_tiles_that_are_none_are_refused(tiles: dict, said: str) -> None:
    """Before anything is computed with them, and the context stays as it was."""
    before = config.current()
    with pytest.raises(ValueError, match=said), config.use(tiles=tiles):
        pass
    assert config.current() == before


@pytest.mark.cpu("a plan for a GPU, asked for on a CPU")
def test_a_plan_that_is_not_for_this_device_says_so(device: torch.device) -> None:
    layer, x = FusedLoraXSLinear(64, 64, r=8, device=device), torch.randn(65, 64, device=device)
    said = "relay cannot compute this: it is a kernel for Hopper .* Without config.use"
    with config.use(plan="relay"), pytest.raises(RuntimeError, match=said):
        layer(x)


@pytest.mark.parametrize("rows", ["8", 8.5, torch.tensor(8), None])
def test_explain_wants_a_number_of_rows(rows: object) -> None:
    with pytest.raises(TypeError, match=r"rows is a .*: it must be an int"):
        explain(FusedLoraXSLinear(8, 8, r=2), rows)


def test_why_float32_takes_library_products_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(choose.devices, "why_not_triton", lambda *args: None)
    problem = at(device=torch.device("cuda"))
    assert "in float32" in choose.decide(problem, "auto", mode="off").why
    assert "impl='aten'" in choose.decide(problem, "aten", mode="off").why


def test_explain_says_what_a_call_does(device: torch.device) -> None:
    """Plan, costs, floor, tiles and why, for both passes; a call then takes that plan."""
    choose.CHOSEN.clear()
    layer = FusedLoraXSLinear(256, 512, r=8, device=device)
    layer.impl = "triton"
    explanation = explain(layer, 300)
    said = str(explanation)
    wanted = "256 → 512|P = 8|300 rows|rows up to 512|forward: |backward: |why: |GFLOP|MB|floor"
    for text in [*wanted.split("|"), "bare layer", "shrink: ", "gemm_tail: "]:
        assert text in said, text
    choose.CHOSEN.clear()
    layer(torch.randn(300, 256, device=device, requires_grad=True)).sum().backward()
    assert taken() == {one.problem.transposed: one.plan for one in explanation.passes}
    assert len(taken()) == 2


def plans_of(call) -> set[str]:
    """The names of the plans that passes of a call were computed by."""
    from fused_lowrank.compute import autograd

    names = set()

    def noted(*args):
        done = run(*args)
        names.add(done.plan.name)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "run", noted)
        call()
    return names


@pytest.mark.parametrize("impl", ["auto", "aten", "triton"])
@pytest.mark.parametrize("way", ["plain", "invariant", "bank", "bank, invariant", "pinned"])
def test_explain_names_the_plans_that_are_run(way: str, impl: str, device: torch.device) -> None:
    """Under batch invariance, in a bank and under a pin, forward and backward."""
    layer = FusedLoraXSLinear(96, 64, r=8, device=device)
    layer.impl, model = impl, torch.nn.Sequential(layer)
    x = torch.randn(700, 96, device=device, requires_grad=True)
    if "bank" in way:
        bank = AdapterBank.from_model(model, slots=2)
        bank.add("a")

    def call() -> None:
        with bank.use(["a", None] * 350) if "bank" in way else contextlib.nullcontext():
            y = model(x)
        y.sum().backward()

    use_batch_invariance("invariant" in way)
    try:
        with config.use(plan="split" if way == "pinned" else None):
            expected = {one.plan for one in explain(layer, 700).passes}
            assert plans_of(call) == expected
    finally:
        use_batch_invariance(False)
    if "invariant" in way:
        assert expected <= {"fixed", "alone"}


def test_explain_where_no_plan_is_chosen() -> None:
    """Small calls on a CPU, and the reference layers; other things are refused."""
    assert "chain of library operations" in str(explain(FusedLoraXSLinear(64, 64, r=4), 1))
    assert "no plan" in str(explain(LoraXSLinear(64, 64, r=4), 1))
    merged = FusedLoraXSLinear(64, 64, r=4)
    merged.merge()
    assert "bare layer" in str(explain(merged, 1000))
    with pytest.raises(TypeError, match="layer is a Linear"):
        explain(torch.nn.Linear(4, 4), 1)
    with pytest.raises(ValueError, match="rows is 0"):
        explain(FusedLoraXSLinear(64, 64, r=4), 0)


def test_config_is_of_its_context() -> None:
    """It nests, is left again, and is not seen by another thread; a backward has its forward's."""
    layer = FusedLoraXSLinear(96, 64, r=8)
    x = torch.randn(700, 96, requires_grad=True)
    with config.use(plan="first"):
        with config.use(batch_invariance=True):
            assert config.current() == config.Config("first", (), True)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                assert pool.submit(config.current).result() == config.Config()
        y = layer(x)
    assert config.current() == config.Config()
    assert plans_of(lambda: y.sum().backward()) == {"first"}
    with config.use(plan="frist"), pytest.raises(ValueError, match=r"plan is 'frist'.*aten, first"):
        layer(x)


@pytest.mark.parametrize("plan", [None, "aten", "split", "first"])
@pytest.mark.parametrize("impl", ["auto", "aten", "triton"])
@pytest.mark.parametrize("dx", [False, True])
def test_a_pinned_plan_keeps_one_mask(
    dx: bool, impl: str, plan: str | None, device: torch.device
) -> None:
    """Also where x needs no gradient: y is linear in down, so a difference is its gradient."""
    if plan == "first" and dx:
        pytest.skip("it has no dropout on the way back")
    torch.manual_seed(0)
    sizes = {"x": (70, 48), "weight": (32, 48), "down": (8, 48), "core": (8, 8), "up": (32, 8)}
    made = {n: torch.randn(s, device=device, dtype=torch.float64) for n, s in sizes.items()}
    if device.type == "cuda":
        made = {name: tensor.float() for name, tensor in made.items()}
    seed = torch.tensor([7], device=device)
    step, dy = torch.randn_like(made["down"]), torch.randn_like(made["x"][:, :32])

    def call(down: torch.Tensor) -> torch.Tensor:
        given = {**made, "down": down, "x": made["x"].detach().requires_grad_(dx)}
        with config.use(plan=plan):
            y = lowrank_linear(**given, dropout_p=0.5, training=True, impl=impl, seed=seed)
        return (y * dy).sum()

    leaf = made["down"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(call(leaf), leaf)
    difference = call(made["down"] + step).detach() - call(made["down"]).detach()
    rtol = 1e-9 if grad.dtype == torch.float64 else 1e-3
    torch.testing.assert_close((grad * step).sum(), difference, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize("plan", ["aten", "first", "split", "mixed"])
def test_a_pinned_plan_of_no_rows(plan: str, dx: bool, device: torch.device) -> None:
    """Nothing is launched, and the gradients are zero."""
    layer = FusedLoraXSLinear(96, 64, r=8, train=("down", "core", "up"), device=device)
    x = torch.randn(0, 96, device=device, requires_grad=dx)
    with config.use(plan=plan):
        y = layer(x)
    y.sum().backward()
    assert not any(p.grad.any() for p in (layer.down, layer.core, layer.up))


@pytest.mark.parametrize("train", ["x core", "down core up", "x weight down core up bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(("m", "n", "k"), [(5, 7, 0), (5, 0, 7), (100, 7, 0), (100, 0, 9)])
def test_an_empty_layer(
    m: int, n: int, k: int, dropout_p: float, train: str, device: torch.device
) -> None:
    """Without columns of x, or of y: y is the bias, or nothing, and no gradient is lost."""
    sizes = {"x": (m, k), "weight": (n, k), "down": (3, k), "core": (3, 4), "up": (n, 4)}
    made = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    made["bias"] = torch.randn(n, device=device)
    leaves = [made[name].requires_grad_() for name in train.split()]
    y = lowrank_linear(**made, dropout_p=dropout_p, training=True, impl="triton")
    assert torch.equal(y, made["bias"].expand(m, n))
    grads = torch.autograd.grad(y.sum(), leaves)
    for name, grad in zip(train.split(), grads, strict=True):
        assert torch.equal(grad, torch.full_like(grad, m if name == "bias" else 0))


def test_batch_invariance_of_the_process_reaches_into_contexts() -> None:
    """Switched on or off inside a context that says nothing of it."""
    with config.use(plan="aten"):
        use_batch_invariance(True)
        assert config.current() == config.Config("aten", (), True)
        with config.use(batch_invariance=False):
            assert not config.current().batch_invariance
        use_batch_invariance(False)
        assert not config.current().batch_invariance


def test_a_pinned_tile_that_is_too_large_takes_no_plan_from_others(monkeypatch) -> None:
    """What is pinned in a context counts there alone."""
    choose.CHOSEN.clear()
    decision = choose.decide(at(m=64), "auto", mode="off")
    pinned = config.Config(tiles=(("shrink", None),))
    error = OutOfResources("shared memory")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = choose.give_up(at(m=64), "auto", pinned, decision, error)
        assert left.plans == decision.plans[1:]
        assert not choose.CHOSEN
        choose.give_up(at(m=64), "auto", config.Config(), decision, error)
    assert choose.CHOSEN[at(m=64), "auto"] == left
    choose.CHOSEN.clear()


def test_explain_of_what_cannot_run_says_so(monkeypatch) -> None:
    """As a call does."""
    layer = FusedLoraXSLinear(96, 64, r=8, impl="triton")
    monkeypatch.setattr(devices, "target", lambda device: None)
    for asked in (lambda: explain(layer, 700), lambda: layer(torch.randn(700, 96))):
        with pytest.raises(RuntimeError, match="impl='triton' cannot compute this"):
            asked()


@pytest.mark.cpu("kernels for tensors that lie on it")
def test_a_core_for_each_row_is_for_some_plans_only(monkeypatch) -> None:
    """For those that give the bare layer's bits where it is zero, where there is room for it."""
    from fused_lowrank.kernels.tiles import TARGETS

    rows, one = (at(m=16, dtype=torch.bfloat16, by_row=value) for value in (True, False))
    assert choose.candidates(rows, "triton") == ["split", "decode"]
    assert choose.candidates(rows, "aten") == ["aten"]
    assert choose.candidates(rows, "auto") == ["aten"]
    assert choose.candidates(one, "auto") == ["aten", "first"]
    assert all(PLANS[name].why_not(rows) for name in ("first", "mixed"))
    monkeypatch.setattr(devices, "target", lambda device: TARGETS["gfx942"])
    assert choose.candidates(rows, "triton") == ["split"]
    assert choose.candidates(one, "triton") == ["split", "decode"]


def test_the_relay_is_chosen_by_itself_where_it_can_be_had(monkeypatch) -> None:
    """On Hopper, of what bulk copies can move, above the rows that `decode` is for."""
    from fused_lowrank.kernels.tiles import TARGETS, Target

    def offered(target: Target, **other: object) -> bool:
        monkeypatch.setattr(devices, "target", lambda device: target)
        problem = at(**{"m": 8192, "dtype": torch.bfloat16, "bulk": True, **other})
        there = "relay" in choose.candidates(problem, "triton")
        assert there == (PLANS["relay"].why_not(problem) is None)
        return there

    hopper = TARGETS["sm_90"]
    assert offered(hopper)
    assert offered(hopper, m=128, transposed=True)
    assert not offered(hopper, m=64)
    assert not offered(hopper, m=1 << 20)  # more rows than flags
    assert not offered(hopper, rank=100)
    for other in ("dropout", "want_u"):
        assert not offered(hopper, **{other: True})
    assert not offered(hopper, bulk=False)
    assert not offered(replace(hopper, gluon=False))
    assert not offered(TARGETS["sm_100"])


def test_the_relay_of_a_bank_is_chosen_by_itself_too(monkeypatch) -> None:
    """With a core for each row, wherever it can be had with one."""
    from fused_lowrank.kernels.tiles import TARGETS

    hopper = TARGETS["sm_90"]
    monkeypatch.setattr(devices, "target", lambda device: hopper)
    rows = at(m=8192, dtype=torch.bfloat16, bulk=True, by_row=True)
    for problem in (rows, rows._replace(m=128, transposed=True)):
        assert choose.candidates(problem, "triton") == ["split", "relay"]
    for change in ({"p": 100}, {"m": 64}, {"bulk": False}, {"dropout": True}):
        with pytest.raises(RuntimeError, match="the pinned plan relay cannot compute this"):
            choose.named("relay", rows._replace(**change), "triton")


def test_bulk_is_of_all_operands() -> None:
    """x, W, down and up of one dtype, and rows of 16 bytes each way."""
    made = [torch.zeros(size, dtype=torch.bfloat16) for size in ((300, 72), (40, 72), (9, 72))]
    x, weight, down = made
    operands = Operands(x, weight, down, None, torch.zeros_like(weight[:, :8]), None, 1.0)
    assert problem_of(operands, False).bulk
    assert problem_of(operands.of_backward(x.new_zeros(300, 40)), False).bulk
    assert not problem_of(operands.of_backward(x.new_zeros(300, 44)[:, :40]), False).bulk
    for change in (
        {"down": down.float()},
        {"up": weight[:, :9].contiguous()},
        {"x": x.new_zeros(300, 76)[:, :72]},
        {"x": x.new_zeros(300 * 72 + 1)[1:].view(300, 72)},
    ):
        assert not problem_of(operands._replace(**change), False).bulk


def test_a_device_without_the_kernels_for_hopper_is_told_once(monkeypatch) -> None:
    """With less shared memory than they take, or a Triton that has no Gluon."""
    from fused_lowrank.kernels.tiles import TARGETS

    hopper = TARGETS["sm_90"]
    devices.with_gluon.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.with_gluon(hopper) == hopper
        assert devices.with_gluon(TARGETS["sm_100"]) == TARGETS["sm_100"]
    less = replace(hopper, shared=100_000)
    with pytest.warns(UserWarning, match="100000 bytes of shared memory"):
        assert not devices.with_gluon(less).gluon

    def missing(name: str) -> None:
        raise ImportError("no module of that name")

    devices.with_gluon.cache_clear()
    monkeypatch.setattr(devices.importlib, "import_module", missing)
    with pytest.warns(UserWarning, match="has no Gluon"):
        assert devices.with_gluon(hopper) == replace(hopper, gluon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        devices.with_gluon(hopper)
    devices.with_gluon.cache_clear()


def test_a_refused_cooperative_launch_is_a_lack() -> None:
    """So the next plan takes its place."""
    said = "Triton Error [CUDA]: too many blocks in cooperative launch"
    assert tuning.is_lack(RuntimeError(said))
    assert not tuning.is_lack(RuntimeError("Triton Error [CUDA]: an illegal memory access"))
