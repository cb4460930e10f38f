"""LoRA-XS and LoRA-Mini in PEFT: frozen factors, once and never trained; merging."""

import warnings
from pathlib import Path

import pytest
import torch
from peft_cases import (
    CLOSE,
    config,
    every_method,
    inputs,
    methods,
    mlp,
    peft,
    same,
    state,
)
from torch import nn

from fused_lowrank.integrations.peft import LoraXSConfig


@methods
def test_bases_are_those_of_the_method(method: str) -> None:
    """LoRA-XS: Σ·Dᵀ and S; LoRA-Mini: within Kaiming's bounds, others by module and by seed."""
    model = peft.get_peft_model(mlp(), config(method))
    layer = model.base_model.model.lin0
    if method == "lora_xs":
        left, sigma, right = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
        outer = layer.basis_up @ layer.basis_down
        torch.testing.assert_close(outer, left[:, :4] * sigma[:4] @ right[:4], **CLOSE)
        torch.testing.assert_close(layer.basis_down @ layer.basis_down.t(), (sigma[:4] ** 2).diag())
        return
    assert layer.basis_down.abs().max() <= 12**-0.5
    assert layer.basis_down.abs().max() > 0.8 * 12**-0.5
    assert layer.basis_up.abs().max() <= 4**-0.5
    assert layer.basis_up.abs().max() > 0.8 * 4**-0.5
    draws = {
        name: factor.flatten()[:40] * 4**0.5 * (3**0.5 if name.startswith("down") else 1)
        for name, factor in {
            "down": layer.basis_down,
            "up": layer.basis_up.t(),
            "up of another": model.base_model.model.lin1.basis_up.t(),
        }.items()
    }
    for name, draw in draws.items():
        assert not any(torch.allclose(draw, d) for n, d in draws.items() if n != name)
    other = peft.get_peft_model(mlp(), config(method, projection_seed=1)).base_model.model.lin0
    assert not torch.allclose(other.basis_down, layer.basis_down)
    again = peft.get_peft_model(mlp(), config(method)).base_model.model.lin0
    assert torch.equal(again.basis_down, layer.basis_down)
    assert torch.equal(again.basis_up, layer.basis_up)


def train(model: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    """Some steps of AdamW on whatever requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@methods
def test_bases_are_never_trained(method: str) -> None:
    """Through everything that sets requires_grad, and through training, in an optimiser's state."""
    model = peft.get_peft_model(mlp(), config(method, bias="all"))
    layer = model.base_model.model.lin0
    bases = {n: p for n, p in model.named_parameters() if "basis_" in n}
    assert len(bases) == 4
    before = {name: p.detach().clone() for name, p in bases.items()}
    model.add_adapter("two", config(method))
    model.set_adapter("two")
    model.base_model.set_adapter(["default", "two"])
    model.set_requires_grad(["default", "two"])
    with model.disable_adapter():
        pass
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    model.unmerge_adapter()
    optimizer = train(model)
    for name, base in bases.items():
        assert not base.requires_grad
        assert base.grad is None
        assert torch.equal(base, before[name])
        assert base not in optimizer.state
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p in optimizer.state}
    factors = {
        f"base_model.model.{lin}.{factor}"
        for lin in ("lin0", "lin1")
        for factor in layer.adapter_layer_names
    }
    assert factors <= trained
    assert not any("basis" in name or "weight" in name for name in trained)


@methods
def test_bases_are_one_pair(method: str) -> None:
    """Whatever adapters come: the same storage, or a longer one that begins with the same."""
    model = peft.get_peft_model(mlp(), config(method))
    layer = model.base_model.model.lin0
    pair = [layer.basis_down, layer.basis_up]
    pointers = [base.data_ptr() for base in pair]
    x = inputs()
    y = layer(x)
    for name in ("same", "lower"):
        lower = {"r": 2, "a": 3, "b": 2} if method == "lora_mini" else {"r": 2}
        model.add_adapter(name, config(method, **(lower if name == "lower" else {})))
        assert [layer.basis_down.data_ptr(), layer.basis_up.data_ptr()] == pointers
        assert layer.basis_down is pair[0]
    higher = {"r": 2, "a": 9, "b": 7} if method == "lora_mini" else {"r": 9}
    model.add_adapter("higher", config(method, **higher))
    rows = 5 if method == "lora_mini" else 4
    assert layer.basis_down.shape[0] == 9
    assert torch.equal(layer.basis_down[:rows], pair[0])
    assert torch.equal(layer.basis_up[:, : pair[1].shape[1]], pair[1])
    torch.testing.assert_close(layer(x), y, **CLOSE)
    assert sum("basis_" in name for name, _ in model.named_parameters()) == 4
    assert not any("basis_" in n for n, _ in model.named_buffers())
    if method == "lora_xs":  # what is added is what the singular vectors go on with
        left, sigma, right = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
        outer = layer.basis_up @ layer.basis_down
        torch.testing.assert_close(outer, left[:, :9] * sigma[:9] @ right[:9], **CLOSE)
    else:
        new = layer.basis_up[:, 4:]
        assert 0.3 * 4**-0.5 < new.square().mean().sqrt() < 4**-0.5


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    """Bases in the weight's dtype, what is trained in fp32, outputs in x's; and all in 16 bits."""
    for autocast, trained in ((True, torch.float32), (False, dtype)):
        model = peft.get_peft_model(mlp(dtype), config(method), autocast_adapter_dtype=autocast)
        kinds = {n: p.dtype for n, p in model.named_parameters()}
        assert {kind for n, kind in kinds.items() if "basis_" in n} == {dtype}
        assert {kind for n, kind in kinds.items() if "default" in n} == {trained}
        y = model(inputs(dtype=dtype))
        assert y.dtype == dtype
        y.float().square().sum().backward()
        assert all(p.grad.dtype == trained for p in model.parameters() if p.requires_grad)


# --- merging ---


@every_method
def test_merge(method: str) -> None:
    """The same outputs merged; the same bits after; several at once; unloaded into plain layers."""
    model = peft.get_peft_model(mlp(), config(method, target_modules=["lin0", "lin1", "conv"]))
    model.add_adapter("two", config(method))
    model.eval()
    x, before = inputs(), state(model)
    y = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, **CLOSE)
    assert not torch.equal(
        model.base_model.model.lin0.base_layer.weight,
        before["base_model.model.lin0.base_layer.weight"],
    )
    model.unmerge_adapter()
    assert same(state(model), before)
    model.base_model.set_adapter(["default", "two"])
    y = model(x)
    model.merge_adapter(["default"], safe_merge=True)
    model.merge_adapter(["two"], safe_merge=True)
    torch.testing.assert_close(model(x), y, **CLOSE)
    model.unmerge_adapter()
    assert same(state(model), before)
    assert torch.equal(model.unload()(x), mlp()(x))


def test_a_merged_model_is_moved_with_what_it_was() -> None:
    """Unmerged it is in the new dtype as a whole."""
    model = peft.get_peft_model(mlp(), config("lora_xs"))
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    weight = model.base_model.model.lin0.base_layer.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, mlp().lin0.weight.float())


def test_merge_of_sharded_weights(tmp_path: Path) -> None:
    """Refused, and so is unloading: fully_shard would put back the weights that it knows."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = peft.get_peft_model(mlp(), config("lora_xs")).eval()
        fully_shard(model)
        with pytest.raises(RuntimeError, match="cannot merge under fully_shard"):
            model.merge_adapter()
        model = peft.get_peft_model(mlp(), config("lora_xs", target_modules=["lin1"])).eval()
        fully_shard(model.base_model.model.lin0)
        fully_shard(model)
        x = inputs()
        with torch.no_grad():
            y = model(x)  # after which the root's weights are whole, for a time
        for method in (model.merge_adapter, model.merge_and_unload, model.unload):
            with pytest.raises(RuntimeError, match="under fully_shard"):
                method()
        with torch.no_grad():
            assert torch.equal(model(x), y)
    finally:
        dist.destroy_process_group()


def test_merge_broken() -> None:
    """safe_merge refuses NaN and leaves the layer as it was."""
    model = peft.get_peft_model(mlp(), config("lora_xs"))
    before = state(model.base_model.model.lin0.base_layer)
    with torch.no_grad():
        model.base_model.model.lin0.lora_xs_core["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected.*default seems to be broken \(in lin0\)"):
        model.merge_adapter(safe_merge=True)
    assert same(state(model.base_model.model.lin0.base_layer), before)
    assert not model.base_model.model.lin0.merged


def test_merge_below_float32_says_what_is_lost() -> None:
    """One warning, of the worst layer."""
    model = peft.get_peft_model(mlp(torch.bfloat16), config("lora_xs"))
    with torch.no_grad():
        model.base_model.model.lin1.lora_xs_core["default"] *= 1e-3
    with pytest.warns(UserWarning, match=r"lost up to .*% of ΔW to rounding \(in lin1\)"):
        model.merge_and_unload()


def test_merge_of_tied_weights() -> None:
    """The embeddings that share the merged weight keep theirs."""
    pytest.importorskip("transformers")
    from architectures import tiny

    base = tiny("llama", tie_word_embeddings=True)
    embeddings = base.get_input_embeddings().weight
    values = embeddings.detach().clone()
    given = LoraXSConfig(r=4, target_modules=["lm_head"], init_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = peft.get_peft_model(base, given)
        model.merge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, values)
    assert not torch.equal(base.lm_head.base_layer.weight, values)
    model.unmerge_adapter()
    assert base.lm_head.base_layer.weight is embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        x = torch.randn(2, embeddings.shape[1])
        y = base.lm_head(x)
        model.merge_adapter()
    base.lm_head.base_layer.weight = embeddings  # as tie_weights() does
    assert not base.lm_head.merged
    torch.testing.assert_close(base.lm_head(x), y)
