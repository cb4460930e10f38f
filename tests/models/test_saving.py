"""save_pretrained of a model after adapt: it says that from_pretrained would lose the adapter."""

import copy
import pickle
import warnings

import pytest

from fused_lowrank import adapt, load_adapter, save_adapter, unload

transformers = pytest.importorskip("transformers")


def llama() -> object:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=32,
        )
    )


def said(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    found = [w for w in caught if "save_pretrained" in str(w.message)]
    assert all(w.filename == __file__ for w in found)
    return [str(w.message) for w in found]


def test_save_pretrained_says_what_it_loses(tmp_path) -> None:
    model = adapt(llama(), "lora_xs", target_modules=["q_proj"], r=2, progress=False)
    (one,) = said(lambda: model.save_pretrained(tmp_path / "a"))
    assert "save_adapter(model, path)" in one
    assert not said(lambda: (model.state_dict(), save_adapter(model, tmp_path / "file")))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(said(lambda copied=copied: copied.save_pretrained(tmp_path / "b"))) == 1
    unload(model, merge=True)
    assert not model._state_dict_pre_hooks
    assert not said(lambda: model.save_pretrained(tmp_path / "c"))
    loaded = load_adapter(llama(), tmp_path / "file", progress=False, on_other_base="warn")
    assert len(said(lambda: loaded.save_pretrained(tmp_path / "d"))) == 1
    assert not said(lambda: llama().save_pretrained(tmp_path / "e"))


def test_a_part_of_a_model(tmp_path) -> None:
    model = llama()
    adapt(model.model, "lora_mini", target_modules=["q_proj"], r=2, a=4, b=4, progress=False)
    assert len(said(lambda: model.save_pretrained(tmp_path))) == 1
    unload(model)
    assert not said(lambda: model.save_pretrained(tmp_path))


def test_a_trainers_checkpoints_say_nothing(tmp_path) -> None:
    """They go back into the adapted model; what is saved in the end is another matter."""
    pytest.importorskip("accelerate")
    model = adapt(llama(), "lora_xs", target_modules=["q_proj"], r=2, progress=False)
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert (tmp_path / "checkpoint-1").is_dir()
    assert not [w for w in caught if "save_pretrained" in str(w.message)]
    with pytest.warns(UserWarning, match="save_pretrained writes adapted layers"):
        trainer.save_model(tmp_path / "end")
