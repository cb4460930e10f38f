"""Checkpoints of the LoRA-XS authors' code, by their published formula."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

PREFIX = "base_model.model."
STRIPPED = "{}_lora_latent_mapping.weight"  # as PEFT 0.10 writes it: without ".default"


def bases(weight: Tensor, r: int, random: bool = False) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B, as scikit-learn's TruncatedSVD of the transposed weight makes them.

    components_ are the right singular vectors of Wᵀ, and what is transformed is Wᵀ·components_ᵀ.
    """
    if random:
        n, k = weight.shape
        return torch.randn(r, k).to(weight), torch.randn(n, r).to(weight)
    components = torch.linalg.svd(weight.t(), full_matrices=False)[2][:r]
    components = components * torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]).to(weight)[:r]
    return (weight.t() @ components.t()).t().contiguous(), components.t().contiguous()


def state_of(model: nn.Module, names: list[str], r: int, random: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint with random R."""
    state = {}
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        a, b = bases(weight, r, random)
        state[f"{PREFIX}{name}.lora_A.weight"] = a
        state[f"{PREFIX}{name}.lora_B.weight"] = b
        state[PREFIX + STRIPPED.format(name)] = torch.randn(r, r).to(weight)
    return state


def settings(r: int, alpha: float, **more: Any) -> dict[str, Any]:
    """adapter_config.json."""
    own = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none", "lora_dropout": 0.0}
    return {**own, "use_rslora": False, "rank_pattern": {}, "modules_to_save": None, **more}


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """The folder that the authors' code leaves."""
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
