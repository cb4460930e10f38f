"""Whole models with fused LoRA layers: compiled, checkpointed, sharded, copied, saved."""

import copy
import io
import pickle
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")
import architectures
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from peft_lora_cases import (
    F64,
    SMALL_ROWS,
    Block,
    K,
    assert_same,
    block,
    config,
    counted,
    fill,
    gpt2,
    gradients,
    ids,
    layer,
)

from fused_lowrank import config as configuration
from fused_lowrank.integrations.peft import fuse_lora, lora, lora_layers, unfuse_lora


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often which of our ways computed a layer."""
    return counted(monkeypatch)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("name", [*architectures.NAMES, "gpt2"])
def test_transformers_models(name: str, bias: str, device: torch.device, ran: Counter) -> None:
    """Logits and every gradient of PEFT's, by our layers alone; unfusing gives PEFT's exactly."""
    made = gpt2() if name == "gpt2" else architectures.tiny(name)
    targets = ["c_attn", "c_fc", "c_proj"] if name == "gpt2" else architectures.targets(name)
    settings = {"bias": bias, "fan_in_fan_out": name == "gpt2", "target_modules": targets}
    theirs = fill(get_peft_model(made, config(**settings))).to(device).double()
    ours = fuse_lora(copy.deepcopy(theirs))
    layers = sum(isinstance(module, Linear) for module in ours.modules())
    inputs = {key: value.to(device) for key, value in architectures.batch(name, 5).items()}
    assert_same(ours, theirs, **inputs)
    assert ran.total() == layers > 0
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert unfuse_lora(ours) is ours
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    assert ran.total() == layers
    assert not any(isinstance(module, lora_layers.FusedLinear) for module in ours.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, device: torch.device, ran: Counter) -> None:
    """Both kinds, with dropout: the recomputation draws the mask again that the forward drew."""
    theirs = block(lora_dropout=0.5, target_modules=["proj", "out"]).to(device)
    ours = fuse_lora(copy.deepcopy(theirs))
    embedded = ours.base_model.model.embed(torch.arange(11, device=device)).detach()
    x = embedded.repeat(400, 1).requires_grad_()  # no small call
    body = ours.base_model.model

    def call(x: torch.Tensor) -> torch.Tensor:
        return body.out(torch.tanh(body.proj(x)))

    results = []
    for run in (call, lambda x: checkpoint(call, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        x.grad = None
        y = run(x)
        results.append([y, gradients(ours, y), x.grad.clone()])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert set(ran) == {"large"}


def test_compile(device: torch.device) -> None:
    """A whole Llama in one graph, our op at every layer, at most one recompile over the lengths."""
    torch._dynamo.reset()
    made = architectures.tiny("llama", num_hidden_layers=1)
    theirs = get_peft_model(made, config(target_modules="all-linear"))
    theirs = fill(theirs).to(device).double()
    ours, graphs = fuse_lora(copy.deepcopy(theirs)), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for length in (4, 5, 7, 12):
        x = ids(device, length)
        y, expected = compiled(x).logits, theirs(x).logits
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradients(ours, y), gradients(theirs, expected))
    assert len(graphs) <= 2
    for graph in graphs:
        names = [str(node.target) for node in graph.graph.nodes]
        assert sum("fused_lowrank.forward" in name for name in names) == 7


def test_switches_within_a_compiled_model(device: torch.device) -> None:
    """Another adapter, none, a new scale: each call as PEFT's, compiled or not."""
    torch._dynamo.reset()
    theirs = layer(dtype=F64).to(device)
    theirs.update_layer("second", 3, lora_alpha=2, config=config())
    ours = fuse_lora(copy.deepcopy(fill(theirs).double()))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    x = torch.randn(SMALL_ROWS, K, device=device, dtype=F64)
    for change in (
        lambda module: None,
        lambda module: module.set_adapter("second"),
        lambda module: module.set_scale("second", 0.3),
        lambda module: module.enable_adapters(False),
        lambda module: module.enable_adapters(True),
        lambda module: module.merge(),
    ):
        change(ours), change(theirs)
        torch.testing.assert_close(compiled(x), theirs(x))


def test_sharded(tmp_path: Path, device: torch.device, ran: Counter) -> None:
    """fully_shard around fused layers and of one: fused still; its class is not to be undone."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    theirs = block(target_modules=["proj", "out"]).to(device).double()
    ours = fuse_lora(copy.deepcopy(theirs))
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        fully_shard(ours.base_model.model.proj)
        fully_shard(ours)
        y, expected = ours(ids(device)), theirs(ids(device))
        torch.testing.assert_close(y, expected)
        wanted = gradients(theirs, expected)
        got = {name: grad.full_tensor() for name, grad in gradients(ours, y).items()}
        torch.testing.assert_close(got, wanted)
        assert ran.total() == 2
        with pytest.raises(ValueError, match=r"proj is a FSDPFusedLinear.*before sharding"):
            unfuse_lora(ours)
    finally:
        dist.destroy_process_group()


# --- the model as an object ---


def test_copies_and_files(tmp_path: Path, device: torch.device, ran: Counter) -> None:
    """deepcopy, pickle, torch.save and save_pretrained, and what PEFT reads back."""
    ours, x = fuse_lora(block()).to(device), ids(device)
    expected, state = ours(x), ours.state_dict()
    whole = io.BytesIO()
    torch.save(ours, whole)
    whole.seek(0)
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(whole, weights_only=False),
    ):
        ran.clear()
        assert torch.equal(copied(x), expected)
        assert ran.total() == 1
    ours.save_pretrained(tmp_path)
    torch.manual_seed(3)
    read = PeftModel.from_pretrained(Block(), tmp_path).to(device)
    assert all(torch.equal(read.state_dict()[n], v) for n, v in state.items() if "lora" in n)
    ours.load_adapter(tmp_path, "again")
    ours.set_adapter("again")
    ran.clear()
    torch.testing.assert_close(ours(x), expected)
    assert ran.total() == 1


def test_fuse_again(device: torch.device, ran: Counter) -> None:
    """It is for new layers, and changes nothing about the others; the class says what it is."""
    model = fuse_lora(block()).to(device)
    model.add_adapter("second", config(target_modules=["proj", "out"]))
    body = model.base_model.model
    assert (type(body.proj), type(body.out)) == (lora_layers.FusedLinear, Linear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_lora(model) is model
    assert (type(body.proj), type(body.out)) == (lora_layers.FusedLinear, lora_layers.FusedLinear)
    assert repr(body.proj).startswith("lora.FusedLinear(")
    model.set_adapter("second")
    model(ids(device))
    assert ran.total() == 2


def test_nothing_to_do() -> None:
    """A model without LoRA, one that is not fused: an error that says what to do."""
    with pytest.raises(ValueError, match=r"no LoRA layers of PEFT's: get_peft_model"):
        fuse_lora(Block())
    with pytest.raises(ValueError, match=r"no fused LoRA layers: fuse_lora\(model\) first"):
        unfuse_lora(block())


def test_a_peft_without_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, with the version tested."""
    before = torch.get_rng_state()
    lora.check_peft()
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.delattr(lora.LoraLayer, "update_layer")
    with pytest.raises(ImportError, match=r"tested with 0\.21\.2.*update_layer"):
        lora.check_peft()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pins", [(None, "aten"), ("aten", None), (None, None), ("aten", "aten")])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_small_call_recomputed_under_another_plan(
    invariant: bool, pins: tuple[str | None, str | None], reentrant: bool
) -> None:
    """Its dropout is the forward's, whatever is pinned in either pass."""
    base = torch.nn.Sequential(torch.nn.Linear(16, 16))
    settings = LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False)
    model = fuse_lora(get_peft_model(base.double(), settings)).train()
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        with configuration.use(plan=pins[0], batch_invariance=invariant):
            y = run(x)
        x.grad = None
        with configuration.use(plan=pins[1]):
            y.sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])
