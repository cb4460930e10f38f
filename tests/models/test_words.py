"""Small mistakes, and the words that say what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_cases import bank_of, model_of, x_of
from torch import nn

from fused_lowrank import explain, export_lora, load_adapter, save_adapter

TRANSFORMS: dict[str, Callable[[Any, Any], Any]] = {
    "vmap": lambda model, x: torch.vmap(model)(x),
    "grad": lambda model, x: torch.func.grad(lambda t: model(t).sum())(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "of a part": lambda model, x: torch.vmap(model.first)(x),
}


@pytest.mark.parametrize("names", [["a", "b"], "a", None])
@pytest.mark.parametrize("case", TRANSFORMS)
def test_transforms_of_a_model_in_a_bank(case: str, names: Any) -> None:
    """An error of ours; as before once the bank is closed."""
    model, bank = bank_of(names="ab")
    x = x_of(2)
    with bank.use(names):
        y = model(x)
        with pytest.raises(RuntimeError, match=r"in a bank.*vmap.*close\(\)"):
            TRANSFORMS[case](model, x)
        assert torch.equal(model(x), y)
    bank.close()
    TRANSFORMS[case](model, x)


def test_folders_are_made(tmp_path: Path) -> None:
    """As `export_lora` and PEFT do; a folder is no file."""
    model, bank = bank_of(names="ab")
    save_adapter(model, tmp_path / "one" / "two" / "a.safetensors")
    save_adapter(model, str(tmp_path / "three" / "a.safetensors"))
    bank.save(tmp_path / "four" / "all.safetensors")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    with pytest.raises(ValueError, match="is a folder: path is the file"):
        save_adapter(model, tmp_path / "one")


def test_swapped_arguments(tmp_path: Path) -> None:
    """The call as it is to be."""
    model = model_of("cores")
    given: Any = tmp_path / "lora", model
    with pytest.raises(TypeError, match=r"path is a Sequential.*export_lora\(model, folder\)"):
        export_lora(*given)
    with pytest.raises(TypeError, match=r"path is a Sequential.*save_adapter\(model, path\)"):
        save_adapter(*given)
    pytest.importorskip("peft")
    from fused_lowrank.integrations.peft import save_as_lora

    with pytest.raises(TypeError, match=r"path is a Sequential.*save_as_lora\(folder, model\)"):
        save_as_lora(*given[::-1])
    with pytest.raises(TypeError, match=r"model is a str.*save_as_lora\(folder, model\)"):
        save_as_lora(given[0], "model")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_explain_a_plain_layer() -> None:
    """What would make it one."""
    with pytest.raises(TypeError, match=r"layer is a Linear.*adapt\("):
        explain(nn.Linear(4, 4), 8)  # type: ignore[arg-type]


def test_plain_lora_is_peft_s(tmp_path: Path) -> None:
    """It is loaded by PEFT, and through the kernels then."""
    model = model_of("cores")
    export_lora(model, tmp_path)
    with pytest.raises(ValueError, match=r"plain LoRA.*from_pretrained.*fuse_lora"):
        load_adapter(model_of("cores"), tmp_path)
