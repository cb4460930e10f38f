"""The dequantised W of quantised layers: one at a time, whatever is computed over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from base_cases import model_of, shifted
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_lowrank import adapt
from fused_lowrank.compute.base import eightbit, kinds, subclass
from fused_lowrank.methods import dora
from fused_lowrank.testing import pinned_plan

K, LAYERS, ROWS = 192, 4, 5
BLOCK = 64  # rows of W that norms take at a time
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "lora_xs": {"r": 4},
    "dora": {"r": 4},
    "lora_xs with dora": {"r": 4, "dora": True},
}


class Alive(TorchDispatchMode):
    """The float memory that is as large as a block of W's rows, or larger, and is there at a time.

    `most` is in parts of a whole W; `whole` and `blocks` are how often W and blocks of it are made.
    """

    def __init__(self, at_least: int = BLOCK * K) -> None:
        super().__init__()
        self.at_least = at_least
        self.alive: dict[int, tuple[Any, int]] = {}
        self.most = 0.0
        self.whole = self.blocks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is computed, looked at."""
        result = func(*args, **(kwargs or {}))
        for own in result if isinstance(result, tuple | list) else (result,):
            plain = isinstance(own, Tensor) and not hasattr(own, "__tensor_flatten__")
            if plain and own.is_floating_point() and own.numel() >= self.at_least:
                memory = own.untyped_storage()
                if memory._cdata not in self.alive or self.alive[memory._cdata][0].expired():
                    size = memory.nbytes() // own.dtype.itemsize
                    self.alive[memory._cdata] = StorageWeakRef(memory), size
                self.most = max(self.most, self.count())
                if "dequantize" in str(func):
                    self.whole += own.numel() == K * K
                    self.blocks += own.numel() < K * K
        return result

    def count(self) -> float:
        """How many W there are now."""
        self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
        return sum(size for _, size in self.alive.values()) / K**2


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Models of several 4-bit layers by the word for their adapters."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def layer() -> nn.Module:
        return bitsandbytes.nn.Linear4bit(K, K, compute_dtype=torch.float32, quant_type="nf4")

    found: dict[str, nn.Module] = {}
    for word, own in ADAPTERS.items():
        torch.manual_seed(0)
        model = nn.Sequential(*(layer() for _ in range(LAYERS))).to("cpu")
        adapt(model, word.split()[0], target_modules=list("0123"), progress=False, **own)
        found[word] = shifted(model)
    return found


@pytest.mark.parametrize("plan", ["called", "aten"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("word", ADAPTERS)
def test_one_at_a_time(
    word: str, checkpointed: bool, plan: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of several layers; norms take blocks of rows and no second W."""
    monkeypatch.setattr(dora, "WIDENED", BLOCK * K)
    dora.forget()
    model, x = models[word], torch.randn(ROWS, K, requires_grad=True)
    with pinned_plan(plan), Alive() as alive:
        for _ in range(2):  # the second time norms' constants are known
            y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            assert alive.count() == 0
            y.square().sum().backward()
            assert alive.count() == 0
    assert alive.most == 1
    # A W for each pass over a layer: with a checkpoint its forward is computed twice.
    assert alive.whole == 2 * LAYERS * (3 if checkpointed else 2)
    assert (alive.blocks > 0) == ("dora" in word)


@pytest.mark.parametrize("method", ["lora", "lora_xs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_by_blocks_of_rows_are_those_of_the_whole(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a quantised W in any dtype, down trained or frozen."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    own = {"compute_dtype": dtype, "quant_type": "nf4"}
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(128, 192, **own)).to(dtype).to("cpu")
    adapt(model, method, r=4, dora=True, target_modules=["0"], progress=False)
    layer: Any = shifted(model)[0]
    down, core, up, _ = layer.row.made(layer.factors_now(), layer.base_weight, layer.scale)
    middle = down.double() if core is None else core.double().t() @ down.double()
    change = layer.scale * (up.double() @ middle).detach()
    exact = (layer.base_weight.values(torch.float64) + change).norm(dim=1)
    for rows in (64, 1000):
        monkeypatch.setattr(dora, "WIDENED", rows * 128)
        dora.forget()
        *_, gain = layer.own_tensors()
        norm = layer.magnitude.detach().double() / gain.values.double()
        torch.testing.assert_close(
            norm, exact, rtol=max(1e-6, torch.finfo(dtype).eps / 4), atol=0.0
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_eight_bits_are_scaled_in_one_pass(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits as in two, however many rows at a time: one rounding."""
    rows = torch.randint(-127, 128, (64, 96), dtype=torch.int8)
    scales = torch.rand(64, 1) * 0.01
    for at_once in (1, 7 * 96, 1 << 18):
        monkeypatch.setattr(eightbit, "AT_ONCE", at_once)
        made = eightbit.scaled(rows, scales, dtype)
        assert made.dtype == dtype
        assert torch.equal(made, rows.to(dtype).mul_(scales))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["subclass", "torchao-int8", "torchao-int4"])
def test_a_large_subclass_is_dequantised_by_blocks(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits, and the steps of its library are of a block: one W and as much as that."""
    if kind != "subclass":
        pytest.importorskip("torchao")
    base = kinds.base_of(model_of(kind, dtype).first, True)
    n, k = base.shape
    whole = {own: base.values(own) for own in (torch.float32, dtype)}
    monkeypatch.setattr(subclass, "BLOCK", n * k // 8)
    with Alive(at_least=n * k // 16) as alive:
        made = base.values(dtype)
        assert alive.count() * K * K == n * k
    assert torch.equal(made, whole[dtype])
    assert torch.equal(base.values(torch.float32), whole[torch.float32])
    cut = base.cut(4) is not None
    assert cut == (kind != "subclass")  # the stand-in cannot be
    assert not cut or alive.most * K * K <= 1.5 * n * k
