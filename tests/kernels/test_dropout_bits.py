"""Dropout's mask as bits: what the kernels draw and keep, and what reads it afterwards."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from fused_lowrank import AdapterBank, FusedLoraXSLinear, config, lowrank_linear
from fused_lowrank.compute import devices
from fused_lowrank.kernels import shrink as shrink_module
from fused_lowrank.kernels.common import mask_width
from fused_lowrank.kernels.dropout import drawn_bits, dropped
from fused_lowrank.kernels.gemm_tail import gemm_tail
from fused_lowrank.kernels.shrink import shrink
from fused_lowrank.kernels.tiles import TileConfig, padded
from fused_lowrank.testing import pinned_tiles

SEED = 0x1234_5678_9ABC_DEF0
SHAPES = [(100, 112), (37, 45), (1, 1), (70, 331), (5, 7), (130, 264)]
CONTIGUOUS = torch.contiguous_format
BITWISE = 1 << torch.arange(8)


def philox(seed: int, m: int, k: int) -> np.ndarray:
    """16 bits for each element of an (m, k), by Philox 4x32-10 (Salmon et al., SC 2011).

    The key is the seed, the counter (row, column // 8, 0, 0), and of the four words that come out
    the order is first, third, second, fourth: of each the lower half, then the upper.
    """
    word = np.uint64(0xFFFFFFFF)
    rows, eighths = np.meshgrid(np.arange(m), np.arange(-(-k // 8)), indexing="ij")
    c0, c1 = rows.astype(np.uint64), eighths.astype(np.uint64)
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (second >> np.uint64(32)) ^ c1 ^ np.uint64(key0), second & word
        c2, c3 = (first >> np.uint64(32)) ^ c3 ^ np.uint64(key1), first & word
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.stack([c0, c2, c1, c3], axis=-1)
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1)
    return halves.reshape(m, -1)[:, :k].astype(np.int64)


def expanded(bits: torch.Tensor, k: int) -> torch.Tensor:
    """Whether each element is kept, bool (M, K)."""
    each = bits[:, :, None] & BITWISE.to(bits.device)
    return each.reshape(len(bits), -1)[:, :k] != 0


def seed_of(device: torch.device) -> torch.Tensor:
    return torch.tensor([SEED], device=device)


def made_by_shrink(x: torch.Tensor, p: float, tile: TileConfig) -> torch.Tensor:
    """The bits of a forward."""
    down = torch.randn(16, x.shape[1], device=x.device, dtype=x.dtype)
    dropout = seed_of(x.device), p
    flags = False, True, True, dropout, lambda *_: tile
    t, u, bits = shrink(x, down, None, 1.0, *flags, want_bits=True)
    assert bits.dtype == torch.uint8
    assert bits.shape == (len(x), mask_width(x.shape[1]))
    assert bits.is_contiguous()
    without = shrink(x, down, None, 1.0, *flags)
    assert all(torch.equal(one, other) for one, other in zip((t, u), without, strict=True))
    return bits


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1 - 1e-9])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_the_mask_is_philox(m: int, k: int, p: float, device: torch.device) -> None:
    """By the paper's own words, from what `drawn_bits` draws, and from what `dropped` leaves."""
    expected = torch.from_numpy(philox(SEED, m, k) >= round(p * 65536)).to(device)
    tiles = devices.tiles(device)
    bits = drawn_bits(seed_of(device), p, m, k, tiles)
    assert torch.equal(expanded(bits, k), expected)
    x = torch.randn(m, k, device=device)
    assert torch.equal(dropped(x, bits, tiles), x * expected)
    turned = torch.randn(2 * k, m, device=device).t()[:, ::2]
    assert torch.equal(dropped(turned, bits, tiles), turned * expected)


@pytest.mark.parametrize(("split", "strided", "block_k"), [(1, True, 64), (3, False, 16)])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_shrink_keeps_the_mask_that_it_has_drawn(
    m: int, k: int, split: int, strided: bool, block_k: int, device: torch.device, monkeypatch
) -> None:
    """All of it, whatever the tile, and however many programs share K."""
    monkeypatch.setattr(shrink_module, "splits", lambda *_: split)
    x = (
        torch.randn(m, 2 * k, device=device)[:, ::2]
        if strided
        else torch.randn(m, k, device=device)
    )
    bits = made_by_shrink(x, 0.25, TileConfig(16, 16, block_k, 4, 1))
    drawn = drawn_bits(seed_of(device), 0.25, m, k, devices.tiles(device))
    assert torch.equal(expanded(bits, k), expanded(drawn, k))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(("m", "n"), [(150, 272), (65, 48)])
def test_the_tail_is_added_where_the_bits_say(
    m: int, n: int, persistent: bool, device: torch.device
) -> None:
    """Bit by bit: x·Wᵀ is zero, and so is what comes out where it is dropped."""
    if persistent and devices.target(device).name not in ("sm_90", "sm_100"):
        pytest.skip("tensor descriptors are for sm_90 and sm_100")
    tile = TileConfig(64, 64, 32, 4, 2, persistent=persistent)
    made = {"x": (m, 32), "weight": (n, 32), "u": (m, padded(16)), "up": (16, n)}
    made = {s: torch.ones(size, device=device).bfloat16() for s, size in made.items()}
    made["x"].zero_()
    bits = torch.randint(256, (m, mask_width(n)), device=device).to(torch.uint8)
    y = gemm_tail(**made, bias=None, transposed=True, bits=bits, choose=lambda *_: tile)
    assert torch.equal(y, 16.0 * expanded(bits, n))


# --- kept or drawn again ---

TRAIN = {"all": "x weight down core up bias", "x": "x core", "down": "down core"}
KINDS = {
    "plain": {},
    "small tiles": {"tiles": True},
    "odd": {"m": 37, "k": 45, "n": 38},
    "few rows": {"m": 3, "k": 400},
    "strided": {"strided": True},
    "three dims": {"lead": (4, 25)},
    "bf16": {"dtype": torch.bfloat16},
    "no rows": {"m": 0},
}
SMALL_TILES = {
    "shrink": TileConfig(16, 16, 16, 4, 1),
    "gemm_tail": TileConfig(16, 32, 16, 4, 1, group_m=2),
}
WAYS = [("split", "all", kind) for kind in KINDS]
WAYS += [("split", train, kind) for train in ("x", "down") for kind in ("plain", "odd")]
WAYS += [(plan, "all", "bf16") for plan in ("split:pointers", "fixed", "auto", "aten")]
WAYS += [("fixed", "all", "odd"), ("aten", "down", "odd")]


def masks(saved: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those that have memory of their own: what stands in for a mask shares that of the seed."""
    seeds = {t.untyped_storage().data_ptr() for t in saved if t.dtype == torch.int64}
    bits = [t for t in saved if t.dtype == torch.uint8]
    return [t for t in bits if t.untyped_storage().data_ptr() not in seeds]


def gradients(
    plan: str, train: str, kind: dict, redraw: bool | None, device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(y and the gradients, what is saved of M) of a call with dropout."""
    kind = {"m": 100, "k": 112, "n": 80, "dtype": torch.float32, **kind}
    m, k, n, dtype = (kind[name] for name in ("m", "k", "n", "dtype"))
    torch.manual_seed(0)
    sizes = {"x": (m, k), "weight": (n, k), "down": (5, k), "core": (5, 6), "up": (n, 6)}
    made = {s: torch.randn(size, device=device).to(dtype) for s, size in sizes.items()}
    made["bias"] = torch.randn(n, device=device).to(dtype)
    if kind.get("strided"):
        made["x"] = torch.randn(2 * k, m, device=device).to(dtype).t()[:, ::2]
    if lead := kind.get("lead"):
        made["x"] = made["x"].view(*lead, k)
    leaves = [made[name].requires_grad_() for name in train.split()]
    dy = torch.randn(*made["x"].shape[:-1], n, device=device).to(dtype)
    pins = SMALL_TILES if kind.get("tiles") else {}
    named: dict = {} if plan in ("auto", "fixed") else {"plan": plan}
    named |= {"batch_invariance": plan == "fixed" or None, "redraw_dropout": redraw}
    saved: list[torch.Tensor] = []
    call = {**made, "dropout_p": 0.4, "training": True, "seed": seed_of(device)}
    hooks = saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with pinned_tiles(**pins), config.use(**named), hooks:
        y = lowrank_linear(**call, impl="triton")
    result = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    return result, masks(saved)


@pytest.mark.parametrize(("plan", "train", "kind"), WAYS)
def test_kept_or_drawn_again_gives_the_same_bits(
    plan: str, train: str, kind: str, device: torch.device
) -> None:
    """y and every gradient; what is kept besides is M·K/8 bytes, or nothing."""
    given = KINDS[kind]
    keeping, bits = gradients(plan, TRAIN[train], given, None, device)
    drawing, none = gradients(plan, TRAIN[train], given, True, device)
    assert all(torch.equal(one, other) for one, other in zip(keeping, drawing, strict=True))
    assert not none
    m, k = given.get("m", 100), given.get("k", 112)
    expected = [(m, mask_width(k))] if m > 0 else []
    assert [t.shape for t in bits] == expected
    assert [t.untyped_storage().nbytes() for t in bits] == [m * width for m, width in expected]


@pytest.mark.parametrize("train", ["core", "core up", "bias"])
def test_no_bits_are_kept_that_nobody_reads(train: str, device: torch.device) -> None:
    """The gradients of the core and of what lies above it need t alone."""
    _, bits = gradients("split", train, {}, None, device)
    assert not bits


@pytest.mark.parametrize("plan", ["first", "mixed"])
def test_forwards_whose_backward_is_another_step_s(plan: str, device: torch.device) -> None:
    """Plans that have no way back for x under a mask: the gradient of down sees it all the same."""
    keeping, bits = gradients(plan, "down core", {}, None, device)
    drawing, none = gradients(plan, "down core", {}, True, device)
    assert all(torch.equal(one, other) for one, other in zip(keeping, drawing, strict=True))
    assert len(bits) == 1
    assert not none


@pytest.mark.parametrize("redraw", [None, True])
def test_launches(redraw: bool | None, device: torch.device, counted_launches) -> None:
    """Drawing again is one launch for each reader; otherwise nobody draws after the forward."""
    with counted_launches() as launches:
        gradients("split", "x down", {}, redraw, device)
    expected = {"shrink_kernel": 2, "gemm_tail_kernel": 2, "dropped_kernel": 1}
    assert launches == expected | ({"drawn_kernel": 2} if redraw else {})


def test_the_setting_of_the_forward_holds_for_its_backward(device: torch.device) -> None:
    """Outside the context, and inside one that says otherwise."""
    layer = FusedLoraXSLinear(64, 48, r=8, dropout=0.5, device=device, impl="triton")
    x = torch.randn(70, 64, device=device, requires_grad=True)
    found = []
    for inner, outer in ((True, False), (False, True)):
        torch.manual_seed(1)
        with config.use(redraw_dropout=inner):
            y = layer(x)
        with config.use(redraw_dropout=outer):
            found.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    assert torch.equal(*found)


@pytest.mark.skipif(not devices.interpreted(), reason="the compiled kernels have no fp64")
@pytest.mark.parametrize("redraw", [None, True])
def test_gradcheck_under_a_mask(redraw: bool | None, device: torch.device) -> None:
    """Numerical differentiation of the kernels under one seed."""
    sizes = {"x": (3, 9), "weight": (2, 9), "down": (2, 9), "core": (2, 2), "up": (2, 2)}
    inputs = [
        torch.randn(size, device=device, dtype=torch.float64).requires_grad_()
        for size in sizes.values()
    ]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        with config.use(redraw_dropout=redraw):
            return lowrank_linear(
                *tensors, dropout_p=0.5, training=True, impl="triton", seed=seed_of(device)
            )

    assert torch.autograd.gradcheck(call, inputs)


def test_a_banks_rows_keep_their_mask_too(device: torch.device) -> None:
    """A core for each row: the bits are those of x, whatever the core."""
    layer = FusedLoraXSLinear(64, 48, r=8, dropout=0.5, device=device, impl="triton")
    torch.nn.init.normal_(layer.core)
    model = torch.nn.Sequential(layer)
    bank = AdapterBank.from_model(model, slots=2)
    bank.add("a", model)
    x = torch.randn(6, 64, device=device, requires_grad=True)
    found, kept = [], []
    for redraw in (None, True):
        torch.manual_seed(1)
        hooks = saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
        with config.use(redraw_dropout=redraw), bank.use(["a", None] * 3), hooks:
            y = model.train()(x)
        found.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    assert torch.equal(*found)
    assert [t.shape for t in masks(kept)] == [(6, 16)]


# --- checkpointing ---


def block(device: torch.device) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """(two layers one after the other, what requires a gradient: x and the cores)."""
    torch.manual_seed(0)
    layers = [
        FusedLoraXSLinear(64, 64, r=8, dropout=0.5, device=device, impl="triton") for _ in range(2)
    ]
    for layer in layers:
        torch.nn.init.normal_(layer.core)
    x = torch.randn(6, 64, device=device, requires_grad=True)
    return torch.nn.Sequential(*layers).train(), [x, *(layer.core for layer in layers)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("again", [None, True])
@pytest.mark.parametrize("redraw", [None, True])
def test_a_recomputation_need_not_see_the_setting(
    redraw: bool | None, again: bool | None, reentrant: bool, device: torch.device
) -> None:
    """As it does not on a GPU, where it runs on a thread of autograd's own."""
    layers, leaves = block(device)
    torch.manual_seed(1)
    expected = torch.autograd.grad(layers(leaves[0]).sum(), leaves)
    torch.manual_seed(1)
    with config.use(redraw_dropout=redraw):
        y = checkpoint(layers, leaves[0], use_reentrant=reentrant)
    with config.use(redraw_dropout=again):
        y.sum().backward()
    assert all(torch.equal(t.grad, other) for t, other in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("redraw", [None, True])
@pytest.mark.parametrize("plans", [("aten", "split"), ("split", "aten")])
def test_what_is_kept_does_not_depend_on_the_plan(
    plans: tuple[str, str], redraw: bool | None, device: torch.device
) -> None:
    """So that a checkpoint may compute again by another one, whatever its own masks are."""
    layers, leaves = block(device)
    with config.use(plan=plans[0], redraw_dropout=redraw):
        torch.manual_seed(1)
        expected = torch.autograd.grad(layers[0](leaves[0]).sum(), leaves[:2])
        torch.manual_seed(1)
        y = checkpoint(layers[0], leaves[0], use_reentrant=False)
    with config.use(plan=plans[1]):
        y.sum().backward()
    for leaf, other in zip(leaves, expected, strict=False):
        torch.testing.assert_close(leaf.grad, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("redraw", [None, True])
def test_hooks_may_save_a_copy(redraw: bool | None, device: torch.device) -> None:
    """As those do that save on the CPU: what stands in for a mask is not taken for one."""
    layers, leaves = block(device)
    copied = saved_tensors_hooks(lambda t: t.clone(memory_format=CONTIGUOUS), lambda t: t)
    found = []
    for hooks in (nullcontext(), copied):
        torch.manual_seed(1)
        with config.use(redraw_dropout=redraw), hooks:
            y = layers(leaves[0])
        found.append(torch.autograd.grad(y.sum(), leaves))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
