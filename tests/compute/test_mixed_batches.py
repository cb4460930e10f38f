"""Mixed batches: each row of a call with its own adapter, against LoRA with materialised factors,
and the promise that a row depends on its own input and its own adapter alone."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leaking_library import leaking_library
from torch import nn

from fused_lowrank import AdapterBank, FusedLoraMiniLinear, FusedLoraXSLinear
from fused_lowrank.compute import isolation
from fused_lowrank.testing import pinned_plan

IMPLS = ("triton", "aten")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def one_layer(
    device: torch.device,
    impl: str,
    dtype: torch.dtype = torch.float64,
    *,
    method: str = "lora_xs",
    k: int = 23,
    n: int = 19,
    r: int = 5,
) -> tuple[nn.Sequential, FusedLoraXSLinear | FusedLoraMiniLinear]:
    """A model of one adapted layer, computed by an implementation."""
    linear = nn.Linear(k, n, device=device, dtype=dtype)
    if method == "lora_xs":
        layer = FusedLoraXSLinear.from_linear(linear, r=r, dtype=dtype)
    else:
        layer = FusedLoraMiniLinear.from_linear(linear, r=2, a=r + 3, b=r, dtype=dtype)
    layer.impl = impl
    return nn.Sequential(layer), layer


def filled(model: nn.Sequential, slots: int, seed: int = 0) -> AdapterBank:
    """A bank with an adapter "0", "1", … in every slot, each of its own scale."""
    layer = model[0]
    bank = AdapterBank.from_model(model, slots=slots, dtype=layer.weight.dtype)
    made = torch.Generator(layer.weight.device).manual_seed(seed)
    table = bank.store.tables["0"]

    def values(like: torch.Tensor | None) -> torch.Tensor | None:
        if like is None:
            return None
        return torch.randn(like.shape, generator=made, device=like.device).to(like.dtype)

    scales = 0.5 + torch.rand(slots, generator=made, device=layer.weight.device)
    cores = values(table.left), values(table.right), scales
    bank.put([str(slot) for slot in range(slots)], {"0": cores})
    return bank


def core(bank: AdapterBank, name: str) -> torch.Tensor:
    """scale · core of an adapter, (P, Q), in float64."""
    slot, table = bank.store._slots[name], bank.store.tables["0"]
    matrix = table.left[slot].double()
    if table.right is not None:
        matrix = matrix @ table.right[slot].double()
    return matrix * table.scales[slot].double()


def materialised(bank: AdapterBank, x: torch.Tensor, entries: list, weights: torch.Tensor | None):
    """y of x (entries, positions, K), row by row through LoRA's A = coreᵀ·down and B = up."""
    layer = bank.layers["0"]
    y = torch.empty(*x.shape[:2], layer.out_features, dtype=torch.float64, device=x.device)
    for i, entry in enumerate(entries):
        names = entry if isinstance(entry, list) else [entry]
        for position in range(x.shape[1]):
            row = x[i, position].double()
            y[i, position] = layer.weight.double() @ row + layer.bias.double()
            for j, name in enumerate(names):
                if name is not None:
                    lora_a = core(bank, name).t() @ layer.down.double()
                    factor = 1.0 if weights is None else weights[i, j].double()
                    y[i, position] += factor * (layer.up.double() @ (lora_a @ row))
    return y


@st.composite
def batches(draw: st.DrawFn) -> dict:
    """A mixed batch: one adapter, all distinct, mixtures, none, the last slot."""
    slots, entries = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    names = st.one_of(st.none(), st.integers(0, slots - 1).map(str), st.just(str(slots - 1)))
    mixture = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["any", "one", "distinct", "none"]))
    if kind == "one":
        chosen = [[draw(names)] * mixture] * entries
    elif kind == "distinct":
        chosen = [[str((i + j) % slots) for j in range(mixture)] for i in range(entries)]
    elif kind == "none":
        chosen = [[None] * mixture] * entries
    else:
        chosen = [[draw(names) for _ in range(mixture)] for _ in range(entries)]
    if mixture == 1 and draw(st.booleans()):
        chosen = [entry[0] for entry in chosen]
    return {
        "slots": slots,
        "entries": chosen,
        "weights": draw(st.booleans()),
        "positions": draw(st.integers(1, 4)),
        "method": draw(st.sampled_from(["lora_xs", "lora_mini"])),
        "sizes": {
            "k": draw(st.integers(9, 40)),
            "n": draw(st.integers(9, 40)),
            "r": draw(st.integers(2, 6)),
        },
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_every_row_is_lora_with_materialised_factors(impl: str, batch: dict) -> None:
    """y and dx in float64."""
    device = torch.device("cpu")
    torch.manual_seed(batch["seed"])
    model, layer = one_layer(device, impl, method=batch["method"], **batch["sizes"])
    bank = filled(model, batch["slots"], batch["seed"])
    entries, positions = batch["entries"], batch["positions"]
    mixture = len(entries[0]) if isinstance(entries[0], list) else 1
    weights = torch.rand(len(entries), mixture) - 0.5 if batch["weights"] else None
    x = torch.randn(len(entries), positions, layer.in_features, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with bank.use(entries, weights):
        y = model(ours)
    expected = materialised(bank, theirs, entries, weights)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)
    bank.check()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits, in which NaN equals NaN."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(sizes[tensor.itemsize])


def step(
    bank: AdapterBank, model: nn.Module, x: torch.Tensor, names: list, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, dx) of a call."""
    x = x.clone().requires_grad_()
    with bank.use(names):
        y = model(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


OWN = [(impl, dtype, "own") for impl in (*IMPLS, "reference") for dtype in DTYPES]
LEAKING = [(impl, torch.bfloat16, "leaking") for impl in ("aten", "reference")]


@pytest.fixture
def library(request: pytest.FixtureRequest, device: torch.device):
    """The CPU's own library, or a stand-in for one whose products read beyond rows."""
    if request.param == "leaking" and device.type != "cpu":
        pytest.skip("a GPU's library is no CPU's")
    with leaking_library() if request.param == "leaking" else nullcontext():
        yield


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("impl", "dtype", "library"), OWN + LEAKING, indirect=["library"])
@pytest.mark.parametrize("rows", [7, 70])
def test_a_row_depends_on_its_own_input_and_adapter_alone(
    impl: str, rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Bit for bit, whatever the other rows hold and whoever's they are."""
    model, _ = one_layer(device, impl, dtype, k=80, n=48)
    bank = filled(model, 6)
    x = torch.randn(rows, 80, device=device).to(dtype)
    dy = torch.randn(rows, 48, device=device).to(dtype)
    names = [None if i % 5 == 4 else str(i % 6) for i in range(rows)]
    y, dx = step(bank, model, x, names, dy)
    bank.store.tables["0"].left.data[0] = float("nan")  # "0" spoils its own rows alone
    for poison, other in itertools.product((float("nan"), float("inf"), 1e4), ("0", None, "5")):
        for kept in (1, 4, rows - 2):
            assert names[kept] != "0"
            others = torch.arange(rows, device=device) != kept
            spoiled, spoiled_dy = x.clone(), dy.clone()
            spoiled[others], spoiled_dy[others] = poison, poison
            given_names = [names[i] if i == kept else other for i in range(rows)]
            now, now_dx = step(bank, model, spoiled, given_names, spoiled_dy)
            assert torch.equal(bits(now[kept]), bits(y[kept]))
            assert torch.equal(bits(now_dx[kept]), bits(dx[kept]))


PLANS = [(plan, dtype, "own") for plan in ("aten", "split", "decode") for dtype in DTYPES]
PLANS += LEAKING[:1]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("plan", "dtype", "library"), PLANS, indirect=["library"])
@pytest.mark.parametrize("rows", [7, 70])
def test_a_row_without_an_adapter_is_the_bare_layers(
    plan: str, rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Bit for bit, by the same plan, also where its u would be NaN."""
    if plan == "decode" and rows > 64:
        pytest.skip("decode is for few rows")
    model, layer = one_layer(device, "auto", dtype, k=80, n=48)
    bank = filled(model, 2)
    bank.store.tables["0"].left.data[:] = float("nan")
    x = torch.randn(rows, 80, device=device).to(dtype)
    x[2, 3] = float("inf")
    names = [None if i % 2 == 0 else "1" for i in range(rows)]
    with pinned_plan(plan), torch.no_grad():
        with bank.use(names):
            y = model(x)
        if plan == "aten":
            with bank.use(None):
                bare = model(x)
            if isolation.readable(80, dtype) == 80:
                torchs = nn.functional.linear(x, layer.weight, layer.bias)
                assert torch.equal(bits(bare), bits(torchs))
        else:  # a core of zeros
            layer.core.zero_()
            finite = x.nan_to_num(posinf=0.0)
            bare = layer(finite)
            y, bare = y[torch.arange(rows) != 2], bare[torch.arange(rows) != 2]
            names = names[:2] + names[3:]
    none = torch.tensor([name is None for name in names])
    assert torch.equal(bits(y[none]), bits(bare[none]))
    assert y[~none].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_launches_do_not_depend_on_who_is_asked_for(
    impl: str, counted_launches, device: torch.device
) -> None:
    """Neither how many, nor which kernels."""
    model, _ = one_layer(device, impl, torch.float32)
    bank = filled(model, 6)
    x = torch.randn(6, 23, device=device)
    counts = []
    for names in (["0"] * 6, [None] * 6, [str(i) for i in range(6)], ["5", None] * 3):
        with counted_launches() as count, bank.use(names), torch.no_grad():
            model(x)
        counts.append(dict(count))
    assert all(count == counts[0] for count in counts)
    assert (sum(counts[0].values()) == 0) == (impl == "aten")


def trained_step(
    bank: AdapterBank, model: nn.Module, x: torch.Tensor, names: list, dy: torch.Tensor
) -> dict[str, list[torch.Tensor]]:
    """The gradient of each trained adapter's core, or of its two factors."""
    trained = bank.trainable(["3", "0", "1"])
    with trained.use(names):
        y = model(x)
    y.backward(dy)
    grads = [parameter.grad for parameter in trained.parameters()]
    trained.close()
    return {name: [grad[i] for grad in grads] for i, name in enumerate(trained.names)}


@pytest.mark.parametrize("method", ["lora_xs", "lora_mini"])
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_trained_core_gets_the_gradient_of_its_own_rows(
    impl: str, method: str, device: torch.device
) -> None:
    """In float64 that of materialised LoRA; bit for bit the same whatever other rows hold."""
    model, layer = one_layer(device, impl, method=method)
    bank = filled(model, 4)
    names = ["3", "0", None, "0", "3", "0"]
    x, dy = (
        torch.randn(6, 3, size, dtype=torch.float64, device=device)
        for size in (layer.in_features, layer.out_features)
    )
    grads = trained_step(bank, model, x, names, dy)
    table = bank.store.tables["0"]
    leaves = [None if part is None else part.clone().requires_grad_() for part in table[:2]]
    bank.store.tables["0"] = table._replace(left=leaves[0], right=leaves[1])
    materialised(bank, x, names, None).backward(dy)
    bank.store.tables["0"] = table
    for name, mine in grads.items():
        expected = [leaf.grad[int(name)] for leaf in leaves if leaf is not None]
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
        assert any(grad.any() for grad in mine) == (name in names)
    for poison in (float("nan"), float("inf")):
        spoiled, spoiled_dy = x.clone(), dy.clone()
        others = torch.tensor([name != "0" for name in names], device=device)
        spoiled[others], spoiled_dy[others] = poison, poison
        now = trained_step(bank, model, spoiled, names, spoiled_dy)
        for before, after in zip(grads["0"] + grads["1"], now["0"] + now["1"], strict=True):
            assert torch.equal(bits(before), bits(after))
        assert all(grad.isnan().any() for grad in now["3"])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("impl", "dtype", "library"), LEAKING, indirect=["library"])
@pytest.mark.parametrize("dx", [False, True])
def test_a_trained_core_beside_a_library_that_leaks(
    impl: str, dtype: torch.dtype, dx: bool, device: torch.device
) -> None:
    """No other row reaches its gradient, whether x needs one or not."""
    model, layer = one_layer(device, impl, dtype, method="lora_xs", k=23, n=19)
    bank = filled(model, 4)
    names = ["3", "0", None, "0", "3", "0"]
    x, dy = (torch.randn(6, 3, size).to(dtype) for size in (layer.in_features, layer.out_features))
    grads = trained_step(bank, model, x.requires_grad_(dx), names, dy)
    spoiled, spoiled_dy = x.detach().clone(), dy.clone()
    spoiled[[0, 2, 4]], spoiled_dy[[0, 2, 4]] = torch.nan, torch.inf
    now = trained_step(bank, model, spoiled.requires_grad_(dx), names, spoiled_dy)
    assert torch.equal(bits(grads["0"][0]), bits(now["0"][0]))
    assert grads["0"][0].isfinite().all()


@pytest.mark.parametrize("rows", [40, 200, 2500])
@pytest.mark.parametrize("plan", ["decode", "relay", "split"])
def test_on_a_gpu_a_named_plan_is_right_and_keeps_rows_apart(
    plan: str, rows: int, device: torch.device
) -> None:
    """y and dx beside the reference's error; the same bits again and again, and beside NaN."""
    if device.type != "cuda":
        pytest.skip("the interpreter runs no kernel for Hopper")
    if plan == "relay" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the relay is a kernel for Hopper")
    if (plan == "decode" and rows > 64) or (plan == "relay" and rows <= 64):
        pytest.skip("not of so many rows")
    model, layer = one_layer(device, "auto", torch.bfloat16, k=1032, n=776, r=16)
    bank = filled(model, 300)
    names = [None if i % 7 == 6 else str(i % 299) for i in range(rows)]
    x = (torch.randn(rows, 1032, device=device) / 32).bfloat16()
    dy = (torch.randn(rows, 776, device=device) / 32).bfloat16()
    layer.impl = "reference"
    reference = step(bank, model, x, names, dy)
    exact_model, _ = one_layer(device, "reference", torch.float64, k=1032, n=776, r=16)
    exact_model.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    exact_bank = filled(exact_model, 300)
    table = bank.store.tables["0"]
    exact_bank.store.tables["0"] = exact_bank.store.tables["0"]._replace(
        left=table.left.double(), scales=table.scales
    )
    exact = step(exact_bank, exact_model, x.double(), names, dy.double())
    layer.impl = "auto"
    with pinned_plan(plan):
        first = step(bank, model, x, names, dy)
        for got, same, truth in zip(first, reference, exact, strict=True):
            assert (got.double() - truth).norm() <= 1.05 * (same.double() - truth).norm()
        for _ in range(5):
            assert all(map(torch.equal, step(bank, model, x, names, dy), first))
        others = torch.arange(rows, device=device) % 2 == 0
        spoiled, spoiled_dy = (t.masked_fill(others[:, None], torch.nan) for t in (x, dy))
        for got, before in zip(step(bank, model, spoiled, names, spoiled_dy), first, strict=True):
            assert torch.equal(bits(got[~others]), bits(before[~others]))
            assert got[others].isnan().all()
    bank.check()
