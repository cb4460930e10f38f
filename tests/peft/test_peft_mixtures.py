"""PEFT: mixtures of adapters, of other sides and of names that end alike."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import config, integration, layers, methods, mlp, peft
from peft_state_cases import logits, of, x
from torch import nn

CASES: dict[str, list[dict[str, Any]]] = {
    "other layers": [{}, {"a": 12, "b": 10, "target_modules": ["lin0"]}],
    "of one side": [{"a": 1, "b": 1, "r": 1}, {"a": 9, "b": 7, "target_modules": ["lin1"]}],
    "apart": [{"target_modules": ["lin0"]}, {"a": 7, "b": 3, "target_modules": ["lin1"]}],
    "beyond a layer": [{"a": 16, "b": 16}, {"a": 3, "b": 2, "r": 1, "lora_alpha": 5.0}],
    "three": [
        {"a": 2, "b": 9, "lora_alpha": 3.0},
        {"a": 11, "b": 2, "use_rslora": True},
        {"target_modules": ["lin1"], "r": 4, "a": 6, "b": 6, "alpha_pattern": {"lin1": 9.0}},
    ],
}


@methods
@pytest.mark.parametrize("case", CASES)
def test_mixtures_of_other_sides(method: str, case: str, tmp_path: Path) -> None:
    """They are exact sums, whichever layers, ranks, sides and scales their adapters have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        given = [
            {k: v for k, v in one.items() if method == "lora_mini" or k not in ("a", "b")}
            for one in CASES[case]
        ]
        if method == "lora_xs":
            given = [{**one, "r": i * 3 + 1} for i, one in enumerate(given)]
        model = of(method, **given[0])
        for i, one in enumerate(given[1:]):
            model.add_adapter(str(i), config(method, **one))
        names, weights = list(model.peft_config), [0.5, -2.0, 3.0][: len(given)]
        for name in names:
            for layer in layers(model).values():
                for own in layer.adapter_layer_names:
                    if name in getattr(layer, own):
                        nn.init.normal_(getattr(layer, own)[name], std=0.3)
        before = {n: logits(model, n) for n in names}
        deltas: dict[str, torch.Tensor] = {}
        for key, layer in layers(model).items():
            own = [(n, w) for n, w in zip(names, weights, strict=True) if n in layer.scaling]
            deltas[key] = sum(w * layer.get_delta_weight(n) for n, w in own)  # type: ignore[assignment]
        model.base_model.add_weighted_adapter(names, weights, "mixed")
    for key, layer in layers(model).items():
        torch.testing.assert_close(
            layer.get_delta_weight("mixed"), deltas[key], rtol=1e-10, atol=1e-10
        )
    for name in names:
        torch.testing.assert_close(logits(model, name), before[name], rtol=1e-12, atol=1e-12)
    wanted = logits(model, "mixed")
    model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "mixed")
    torch.testing.assert_close(loaded(x()), wanted, rtol=1e-10, atol=1e-10)


@methods
def test_mixtures_where_a_name_ends_another(method: str) -> None:
    """Layers `lin` and `inner.lin` of other ranks; or the second without an adapter."""
    for targets in (["^lin$", "inner.lin"], [r"^lin$"]):
        model = nn.Sequential()
        model.add_module("lin", nn.Linear(12, 12))
        model.add_module("inner", nn.Sequential())
        model.inner.add_module("lin", nn.Linear(12, 12))
        more = {"a": 9, "b": 9} if method == "lora_mini" else {}
        pattern = {"^lin": 2, "inner.lin": 3}
        given = {"target_modules": "|".join(targets).replace("^", "").replace("$", "")}
        model = peft.get_peft_model(
            model.double(), config(method, rank_pattern=pattern, **given, **more)
        )
        ranks = {key: layer.r["default"] for key, layer in layers(model).items()}
        wanted = {k: 2.0 * m.get_delta_weight("default") for k, m in layers(model).items()}
        model.base_model.add_weighted_adapter(["default"], [2.0], "twice")
        assert {key: layer.r["twice"] for key, layer in layers(model).items()} == ranks
        for key, layer in layers(model).items():
            torch.testing.assert_close(layer.get_delta_weight("twice"), wanted[key])


def test_mixtures_of_fused_lora() -> None:
    """PEFT's own: what it adds is computed by fused layers too, as PEFT's are."""
    models = []
    for fuse in (False, True):
        torch.manual_seed(0)
        given = {"init_lora_weights": False, "target_modules": ["lin0", "lin1"]}
        model = peft.get_peft_model(mlp(), peft.LoraConfig(r=4, **given)).eval()
        model.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=3, **given))
        models.append(integration.fuse_lora(model) if fuse else model)
    for kind in ("cat", "svd"):
        for model in models:
            model.add_weighted_adapter(["default", "b"], [1.0, -0.5], kind, kind)
        plain, fused = (logits(model, kind) for model in models)
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)
