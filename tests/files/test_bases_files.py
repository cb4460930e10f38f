"""Adapters between the quantised forms of one base model, and to the model itself and back."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from base_cases import KINDS, Net, adapted, inputs, layers_of, model_of, needs, shifted
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fused_lowrank import AdapterBank, adapt, load_adapter, save_adapter

FORMS = {
    "plain": "a plain matrix",
    "nf4": "nf4 of bitsandbytes",
    "fp4": "fp4 of bitsandbytes",
    "int8": "int8 of bitsandbytes",
    "torchao-int8": "Int8Tensor",
    "torchao-fp8": "Float8Tensor",
    "subclass": "Rows8",
}


def forms(*left_out: str) -> list[Any]:
    """The forms as parameters, each with what it needs."""
    known = [form for form in FORMS if form not in left_out]
    return [pytest.param(f, marks=needs(KINDS[f][1]) if f in KINDS else []) for f in known]


def base(form: str) -> Any:
    """The same model in one of its forms."""
    if form != "plain":
        return model_of(form)
    torch.manual_seed(0)
    return Net(nn.Linear)


def over(form: str, method: str = "lora", **keywords: Any) -> Any:
    """It, adapted, what is trained moved; random factors are the same over each form."""
    own: dict[str, Any] = {"target_modules": ["first", "second"], "r": 4, "progress": False}
    model = base(form)
    torch.manual_seed(2)
    return shifted(adapt(model, method, **own, **keywords))


def without_a_word(call: Callable[[], Any]) -> Any:
    """What a call returns, which warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return call()


@pytest.mark.parametrize("here", forms())
@pytest.mark.parametrize("there", forms())
def test_from_one_form_to_another(there: str, here: str, tmp_path: Path) -> None:
    """Refused, with what both are, or taken with a warning; to its own form as it was."""
    model, file = over(there), tmp_path / "file"
    save_adapter(model, file)
    if there == here:
        loaded = without_a_word(lambda: load_adapter(base(here), file, progress=False))
        torch.testing.assert_close(loaded(inputs()), model(inputs()), rtol=0, atol=0)
        return
    said = f"{FORMS[there]} there, {FORMS[here]} here"
    seems = "the weight of first is .*, quantised from the same or from each other as it seems"
    for given in (lambda: base(here), lambda: over(here)):
        with pytest.raises(ValueError, match=f"made for another base model: {seems}") as caught:
            load_adapter(given(), file, progress=False)
        assert said in str(caught.value)
    other = base(here)
    with pytest.warns(UserWarning, match="another base model: the weights of first, second") as one:
        loaded = load_adapter(other, file, progress=False, on_other_base="warn")
    assert len(one) == 1
    assert f"({said})" in str(one[0].message)
    for ours, theirs in zip(layers_of(loaded), layers_of(model), strict=True):
        torch.testing.assert_close(ours.delta_weight(), theirs.delta_weight(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", forms("plain", "nf4", "fp4"))
def test_factors_made_of_another_form_stay_refused(form: str, tmp_path: Path) -> None:
    """LoRA-XS's without its bases: those of this base are others."""
    save_adapter(over(form, "lora_xs"), tmp_path / "lean", bases=False)
    with pytest.raises(ValueError, match=r"there, a plain matrix here.*comes without its frozen"):
        load_adapter(base("plain"), tmp_path / "lean", progress=False, on_other_base="warn")


@pytest.mark.parametrize("form", forms("plain"))
def test_factors_of_a_seed_are_the_same_over_another_form(form: str, tmp_path: Path) -> None:
    """NOLA's are in no file, and of no base."""
    model = over(form, "nola", m=6)
    save_adapter(model, tmp_path / "file")
    with pytest.warns(UserWarning, match="another base model: the weights of first, second"):
        loaded = load_adapter(
            base("plain"), tmp_path / "file", progress=False, on_other_base="warn"
        )
    for ours, theirs in zip(layers_of(loaded), layers_of(model), strict=True):
        torch.testing.assert_close(ours.delta_weight(), theirs.delta_weight(), rtol=0, atol=0)


@pytest.mark.parametrize("form", forms("plain", "torchao-int8", "torchao-fp8", "subclass"))
def test_a_state_dict_with_seeds(form: str) -> None:
    """NOLA's seeds are the layer's, not of the module within; others are refused."""
    model, other = over(form, "nola", m=6), over(form, "nola", m=6)
    with torch.no_grad():
        other.first.a.mul_(2.0)
    state = model.state_dict()
    other.load_state_dict(copy.deepcopy(state))
    torch.testing.assert_close(other(inputs()), model(inputs()), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="the state_dict is of seed=0"):
        over(form, "nola", m=6, seed=1).load_state_dict(state)


def test_weights_that_are_others(tmp_path: Path) -> None:
    """Nothing is said then of the same weights."""
    save_adapter(over("subclass"), tmp_path / "file")
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="is Rows8 there, a plain matrix here; on_other_base="):
        load_adapter(Net(nn.Linear), tmp_path / "file", progress=False)


@pytest.mark.parametrize("form", forms("plain", "nf4", "fp4", "torchao-fp8"))
@pytest.mark.parametrize("turned", [False, True], ids=["bank of it", "into a plain bank"])
def test_banks(form: str, turned: bool, tmp_path: Path) -> None:
    """Files, models and other banks are told apart as well."""
    there, here = ("plain", form) if turned else (form, "plain")
    mini: Any = {"method": "lora_mini", "a": 8, "b": 6}
    model, file = over(there, **mini), tmp_path / "file"
    save_adapter(model, file)
    own = AdapterBank.from_model(model, slots=4)
    own.add("a", file)
    own.save(tmp_path / "bank")
    bank = AdapterBank.from_model(over(here, **mini), slots=8)
    said = f"{FORMS[there]} there, {FORMS[here]} here"
    for i, source in enumerate((file, model)):
        with pytest.raises(ValueError, match=f"{said}, quantised from the same"):
            bank.add(str(i), source)
        with pytest.warns(UserWarning, match=rf"\({said}\)"):
            bank.add(str(i), source, on_other_base="warn")
    with pytest.raises(ValueError, match=said):
        bank.load(tmp_path / "bank", progress=False)
    own.close()
    again = AdapterBank.from_model(over(there, **mini), slots=4)
    without_a_word(lambda: again.load(tmp_path / "bank", progress=False))


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=needs("bitsandbytes"))])
def test_a_file_that_does_not_say_it(kind: str, tmp_path: Path) -> None:
    """One of an older version is taken as before, where the fingerprint is near enough."""
    save_adapter(adapted(kind), tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = json.loads(metadata["config"])
    for entry in config["layers"].values():
        assert entry.pop("base") == FORMS[kind]
    save_file(tensors, tmp_path / "old", {**metadata, "config": json.dumps(config)})
    without_a_word(lambda: load_adapter(base("plain"), tmp_path / "old", progress=False))
