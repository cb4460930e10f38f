"""fuse_lora on QLoRA models as their users make them: loaded, prepared, trained, merged, saved."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
import transformers
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft_lora_cases import ALPHA, R, counted
from peft_qlora_cases import layers_of, shifted, trained

from fused_lowrank.integrations.peft import fuse_lora, unfuse_lora

BF16 = torch.bfloat16


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often which of our ways computed a layer."""
    return counted(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16, in a folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    path = tmp_path_factory.mktemp("llama")
    model.to(BF16).save_pretrained(path)
    return path


def loaded(folder: Path, bits: int) -> Any:
    """The model as QLoRA's users load it."""
    how: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        how |= {"bnb_4bit_compute_dtype": BF16, "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(**how)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=BF16
    )


def prepared(folder: Path, bits: int, **settings: Any) -> Any:
    """A PeftModel of it, in training with checkpoints, its factors away from their start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = prepare_model_for_kbit_training(
            loaded(folder, bits), gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        own = {"r": R, "lora_alpha": ALPHA, "target_modules": "all-linear", **settings}
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(**own))
    return shifted(model).train()


def ids() -> Tensor:
    """A batch, always the same."""
    return torch.arange(16).view(2, 8) * 7 % 64


def losses(model: Any, autocast: bool) -> list[float]:
    """Those of some steps."""
    optimizer, found = torch.optim.SGD(trained(model), 0.05), []
    for _ in range(3):
        with torch.autocast("cpu", BF16, enabled=autocast):
            loss = model(input_ids=ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


TRAINED = [(4, False, False), (4, True, False), (4, False, True), (8, False, False)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("bits", "autocast", "dora"), TRAINED)
def test_trains_as_peft_does(
    bits: int, autocast: bool, dora: bool, folder: Path, ran: Counter
) -> None:
    """Prepared for k-bit training, under checkpoints: the losses of the same steps are alike."""
    theirs, ours = (prepared(folder, bits, use_dora=dora) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_lora(ours) is ours
    expected = losses(theirs, autocast)
    assert not ran
    found = losses(ours, autocast)
    assert ran["over"] == 3 * 2 * len(layers_of(ours))  # each layer is computed again
    assert found == pytest.approx(expected, rel=1e-2 if autocast else 2e-4)
    assert expected[-1] < expected[0]


@pytest.mark.filterwarnings("ignore")
def test_adapters_merging_and_files(folder: Path, tmp_path: Path, ran: Counter) -> None:
    """Several adapters, disabled ones, mixed batches, merging, files and copies stay PEFT's."""
    theirs, ours = (prepared(folder, 4) for _ in range(2))
    for model in (theirs, ours):
        torch.manual_seed(4)
        model.add_adapter("second", LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj"]))
        model.gradient_checkpointing_disable()
        shifted(model)
    fuse_lora(ours)

    def check(fused: int, **keywords: Any) -> Tensor:
        """Both give the same; so many layers of ours were fused."""
        ran.clear()
        with torch.no_grad():
            y = ours(input_ids=ids(), **keywords).logits
            expected = theirs(input_ids=ids(), **keywords).logits
        assert ran["over"] == fused
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
        return y

    total = len(layers_of(ours))
    assert total == 14
    first = check(total)
    for model in (theirs, ours):
        model.set_adapter("second")
    assert not torch.equal(check(2), first)
    for model in (theirs, ours):
        model.base_model.set_adapter(["default", "second"])
    check(total - 2)
    for model in (theirs, ours):
        model.set_adapter("default")
    with ours.disable_adapter(), theirs.disable_adapter():
        check(0)
    again = copy.deepcopy(ours)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids()).logits, ours(input_ids=ids()).logits)
    ours.save_pretrained(tmp_path)
    read = fuse_lora(PeftModel.from_pretrained(loaded(folder, 4), tmp_path))
    layer, other = (layers_of(model)[0] for model in (ours, read))
    assert torch.equal(layer.lora_A["default"].weight, other.lora_A["default"].weight)
    for model in (theirs, ours):
        model.merge_adapter()
    check(0)
    for model in (theirs, ours):
        model.unmerge_adapter()
    check(total)
    for model in (theirs, ours):
        model.eval()
    check(0, adapter_names=["second", "default"])
    check(total)
    assert unfuse_lora(ours) is ours
    assert {type(layer) for layer in layers_of(ours)} == {
        type(layer) for layer in layers_of(theirs)
    }
    check(0)
    assert fuse_lora(ours).merge_and_unload().model.layers[0].self_attn.q_proj.weight.quant_state
