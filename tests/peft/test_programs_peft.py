"""Random programs over one model of PEFT's, against a plain account of what it should compute.

PROGRAMS=5000 python -m pytest tests/peft/test_programs_peft.py      so many, in place of 250
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from program_cases import LAYERS, SETTINGS, Model, Weights, X, close, computed
from torch import Tensor, nn

peft = pytest.importorskip("peft")
integration = pytest.importorskip("fused_lowrank.integrations.peft", exc_type=ImportError)

NAMES = st.sampled_from("uvw")


class Peft(RuleBasedStateMachine):
    """add_adapter, set_adapter, merge, mix, mixed batches, save, load, delete, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.deltas: dict[str, Weights] = {}
        self.files: list[tuple[Path, Weights]] = []
        self.merged: list[str] = []

    def teardown(self) -> None:
        """Remove the files."""
        self.folder.cleanup()

    @initialize(method=st.sampled_from(["lora_xs", "lora_mini"]), seed=st.integers(0, 3))
    def begin(self, method: str, seed: int) -> None:
        """A model with one adapter."""
        torch.manual_seed(seed)
        base = Model().double()
        self.biases: Weights = {n: getattr(base, n).bias.detach().clone() for n in LAYERS}
        self.weights: Weights = {
            n: getattr(base, n).weight.detach().clone() for n in (*LAYERS, "head")
        }
        self.base = copy.deepcopy(base)
        self.method = method
        self.model: Any = peft.get_peft_model(base, self.config(2, 3.0), "u").eval()
        self.active = ["u"]
        self.write("u", seed)

    def config(self, r: int, alpha: float) -> Any:
        """Of this method."""
        sides = {} if self.method == "lora_xs" else {"a": 4, "b": 3}
        kind = {"lora_xs": integration.LoraXSConfig, "lora_mini": integration.LoraMiniConfig}
        return kind[self.method](r=r, lora_alpha=alpha, target_modules=list(LAYERS), **sides)

    def layers(self) -> dict[str, Any]:
        """The adapted layers."""
        return {n: getattr(self.model.base_model.model, n) for n in LAYERS}

    def write(self, name: str, seed: int) -> None:
        """Random values into an adapter; and what it adds then."""
        generator = torch.Generator().manual_seed(seed)
        self.deltas[name] = {}
        for key, layer in self.layers().items():
            with torch.no_grad():
                for factor in layer.trained_factors(name):
                    factor.normal_(generator=generator)
                core = layer.core(name)
                core = core[0] @ core[1] if isinstance(core, tuple) else core
                down, up = layer.bases(*layer.sides[name])
                delta = layer.scaling[name] * up @ core.t() @ down
                self.deltas[name][key] = delta.detach().clone()

    def with_adapters(self, names: list[str]) -> Weights:
        """The weights with what adapters add."""
        weights = dict(self.weights)
        for name in names:
            for key, delta in self.deltas[name].items():
                weights[key] = weights[key] + delta
        return weights

    @invariant()
    def computes(self) -> None:
        """The model computes the base with its active adapters, or with the merged ones."""
        if hasattr(self, "model"):
            with torch.no_grad():
                expected = self.with_adapters(self.merged or self.active)
                close(self.model(X), computed(expected, self.biases))

    # --- programs ---

    @precondition(lambda self: not self.merged)
    @rule(
        name=NAMES, r=st.integers(1, 3), alpha=st.sampled_from([1.0, 4.0]), seed=st.integers(0, 9)
    )
    def add(self, name: str, r: int, alpha: float, seed: int) -> None:
        """A new adapter, of any rank; the others stay what they are."""
        if name not in self.deltas:
            self.model.add_adapter(name, self.config(r, alpha))
            self.write(name, seed)

    @precondition(lambda self: not self.merged)
    @rule(data=st.data(), seed=st.integers(0, 9))
    def train(self, data: st.DataObject, seed: int) -> None:
        """One of them becomes something else."""
        self.write(data.draw(st.sampled_from(sorted(self.deltas))), seed)

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def set_active(self, data: st.DataObject) -> None:
        """One or several."""
        names = data.draw(
            st.lists(st.sampled_from(sorted(self.deltas)), min_size=1, max_size=3, unique=True)
        )
        self.model.base_model.set_adapter(names)
        self.active = names

    @precondition(lambda self: not self.merged)
    @rule()
    def merge(self) -> None:
        """What is active."""
        self.model.base_model.merge_adapter()
        self.merged = list(self.active)

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        """All of it."""
        self.model.base_model.unmerge_adapter()
        self.merged = []

    @precondition(lambda self: not self.merged)
    @rule()
    def disable(self) -> None:
        """Within it the model is the base."""
        with self.model.disable_adapter(), torch.no_grad():
            close(self.model(X), computed(self.weights, self.biases))

    @precondition(lambda self: not self.merged and len(self.deltas) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        """One that is not active."""
        # PEFT's forward asks for the config of the one that was active before several were.
        others = sorted(set(self.deltas) - {*self.active, self.model.active_adapter})
        if others:
            name = data.draw(st.sampled_from(others))
            self.model.delete_adapter(name)
            del self.deltas[name]

    @precondition(lambda self: not self.merged)
    @rule(name=NAMES, data=st.data())
    def mix(self, name: str, data: st.DataObject) -> None:
        """The weighted sum of others, exactly."""
        if name in self.deltas:
            return
        of = data.draw(st.lists(st.sampled_from(sorted(self.deltas)), min_size=1, unique=True))
        shares = data.draw(
            st.lists(st.sampled_from([-1.0, 0.25, 2.0]), min_size=len(of), max_size=len(of))
        )
        self.model.base_model.add_weighted_adapter(of, shares, name)
        self.deltas[name] = {
            key: sum(w * self.deltas[n][key] for n, w in zip(of, shares, strict=True))
            for key in LAYERS
        }

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def serve(self, data: st.DataObject) -> None:
        """Each row has its own adapter."""
        there = st.sampled_from(["__base__", *sorted(self.deltas)])
        names = data.draw(st.lists(there, min_size=len(X), max_size=len(X)))
        with torch.no_grad():
            y = self.model(X, adapter_names=names)
        for i, name in enumerate(names):
            weights = self.with_adapters([] if name == "__base__" else [name])
            close(y[i], computed(weights, self.biases, X[i : i + 1])[0])

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        """One of them, to a folder."""
        name = data.draw(st.sampled_from(sorted(self.deltas)))
        path = Path(self.folder.name) / str(len(self.files))
        self.model.save_pretrained(path, selected_adapters=[name])
        self.files.append((path / name, dict(self.deltas[name])))

    @precondition(lambda self: self.files and not self.merged)
    @rule(data=st.data(), name=NAMES)
    def load(self, data: st.DataObject, name: str) -> None:
        """Beside the others, or into a model of its own."""
        path, deltas = data.draw(st.sampled_from(self.files))
        if name not in self.deltas:
            self.model.load_adapter(path, name)
            self.deltas[name] = deltas
        else:
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(self.base), path)
            weights = {k: self.weights[k] + deltas.get(k, 0) for k in self.weights}
            with torch.no_grad():
                close(loaded(X), computed(weights, self.biases))

    @rule()
    def copied(self) -> None:
        """Go on with a copy."""
        self.model = copy.deepcopy(self.model)

    @rule(merge=st.booleans())
    def unload(self, merge: bool) -> None:
        """A copy's layers are plain again, with the base's weights or with what was active.

        What was merged stays so, as PEFT has it for its own methods.
        """
        other: Any = copy.deepcopy(self.model).base_model
        plain: nn.Module = other.merge_and_unload() if merge else other.unload()
        assert type(plain.a) is nn.Linear
        expected = self.with_adapters(self.merged or (self.active if merge else []))
        with torch.no_grad():
            y: Tensor = plain(X)
            close(y, computed(expected, self.biases))


Peft.TestCase.settings = SETTINGS
TestPeft = Peft.TestCase
