"""Random programs over one model, against a plain account of what it should compute.

PROGRAMS=5000 python -m pytest tests/models/test_programs.py      so many, in place of 250
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from program_cases import LAYERS, SETTINGS, Model, Weights, X, close, computed
from torch import Tensor, nn

from fused_lowrank import (
    AdapterBank,
    adapt,
    disable_adapters,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from fused_lowrank.models.adapt import adapted_layers

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "lora_xs": {"r": 3},
    "lora_mini": {"r": 2, "a": 4, "b": 3},
}


def deltas_of(model: nn.Module) -> Weights:
    """ΔW of each adapted layer, from its factors."""
    found = {}
    for name, layer in adapted_layers(model):
        core: Any = layer.core_factors
        core = torch.eye(layer.r).double() if core is None else core
        core = core[0] @ core[1] if isinstance(core, tuple) else core
        found[name] = (layer.scale * layer.up @ core.t() @ layer.down).detach().clone()
    return found


@dataclass
class Adapter:
    """What an adapter adds, and how it was made."""

    how: tuple[Any, ...]  # method, alpha, whether the head is trained
    deltas: Weights
    head: Tensor | None
    factors: Weights  # the frozen ones, which banks ask for


@dataclass
class Account:
    """What the model should be."""

    weights: Weights
    biases: Weights
    adapter: Adapter | None = None
    merged: bool = False
    bank: dict[str, Adapter] = field(default_factory=dict)

    def with_adapter(self, adapter: Adapter | None) -> Weights:
        """The weights with what an adapter adds."""
        weights = dict(self.weights)
        if adapter is not None:
            for name, delta in adapter.deltas.items():
                weights[name] = weights[name] + delta
            if adapter.head is not None:
                weights["head"] = adapter.head
        return weights


SCALES = 2**-23  # to which a bank keeps its adapters' scales, which are float32


methods = st.sampled_from(sorted(METHODS))


class Native(RuleBasedStateMachine):
    """adapt, load_adapter, merge, disable_adapters, banks and unload, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.files: list[tuple[Path, Adapter, Weights]] = []  # with the base's weights of then
        self.bank: AdapterBank | None = None

    def teardown(self) -> None:
        """Remove the files."""
        self.folder.cleanup()

    @initialize(seed=st.integers(0, 3), method=st.none() | methods, served=st.booleans())
    def begin(self, seed: int, method: str | None, served: bool) -> None:
        """A plain model, or one that was adapted and trained, maybe with a bank of its adapter."""
        torch.manual_seed(seed)
        self.model: nn.Module = Model().double()
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.account = Account(
            {name: state[f"{name}.weight"] for name in (*LAYERS, "head")},
            {name: state[f"{name}.bias"] for name in LAYERS},
        )
        if method is not None:
            self.adapt(method, 3.0, head=False)
            self.train(seed)
            if served and method != "lora":
                self.bank_of_a_file(bases=True)

    # --- what is there ---

    @property
    def adapted(self) -> bool:
        """Whether the model has adapted layers."""
        return self.account.adapter is not None

    @property
    def free(self) -> bool:
        """Whether it has, and no bank holds them, and they are not merged."""
        return self.adapted and self.bank is None and not self.account.merged

    def taken(self, how: tuple[Any, ...]) -> Adapter:
        """The adapter that the model has."""
        factors = {
            f"{name}.{side}": getattr(layer, side).detach().clone()
            for name, layer in adapted_layers(self.model)
            for side in ("down", "up")
        }
        head = self.model.head.weight.detach().clone() if how[2] else None
        return Adapter(how, deltas_of(self.model), head, factors)

    @invariant()
    def computes(self) -> None:
        """The model computes what it should."""
        if hasattr(self, "account"):
            with torch.no_grad():
                expected = computed(
                    self.account.with_adapter(self.account.adapter), self.account.biases
                )
                close(self.model(X), expected)

    def refused(self, call: Callable[[], Any], *kinds: type[Exception]) -> None:
        """A call that raises; the invariant then sees that nothing has changed."""
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        flags = [parameter.requires_grad for parameter in self.model.parameters()]
        with pytest.raises(kinds or ValueError):
            call()
        now = self.model.state_dict()
        assert state.keys() == now.keys()
        assert all(torch.equal(state[name], now[name]) for name in state)
        assert flags == [parameter.requires_grad for parameter in self.model.parameters()]

    # --- programs ---

    @rule(method=methods, alpha=st.sampled_from([1.0, 3.0]), head=st.booleans())
    def adapt(self, method: str, alpha: float, head: bool) -> None:
        """Adapt a plain model; an adapted one refuses."""
        saved = {"modules_to_save": ["head"]} if head else {}
        keywords = {"target_modules": list(LAYERS), "alpha": alpha, "progress": False}
        keywords |= METHODS[method] | saved
        if self.adapted:
            self.refused(lambda: adapt(self.model, method, **keywords))
        else:
            adapt(self.model, method, **keywords)
            self.account.adapter = self.taken((method, alpha, head))

    @precondition(lambda self: self.free)
    @rule(seed=st.integers(0, 9))
    def train(self, seed: int) -> None:
        """All that is trained becomes something else."""
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        self.account.adapter = self.taken(self.account.adapter.how)

    @rule(bases=st.booleans())
    def save(self, bases: bool) -> None:
        """To a new file."""
        path = Path(self.folder.name) / str(len(self.files))
        if not self.adapted:
            self.refused(lambda: save_adapter(self.model, path))
            return
        save_adapter(self.model, path, bases=bases or self.account.adapter.how[0] != "lora_xs")
        self.files.append((path, self.account.adapter, dict(self.account.weights)))

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        """Into a plain model, or an adapted one of the same kind; else it is refused."""
        path, adapter, origin = data.draw(st.sampled_from(self.files))
        there = self.account.adapter
        apart = max(
            float((self.account.weights[name] - origin[name]).norm() / origin[name].norm())
            for name in LAYERS
        )
        if 0 < apart < 0.5:
            return  # it is hard to say whether it is the same base
        other = there is not None and (there.how != adapter.how or self.account.merged)
        if self.bank is not None:
            other |= any(not torch.equal(there.factors[k], v) for k, v in adapter.factors.items())
        if apart or other:
            self.refused(lambda: load_adapter(self.model, path, progress=False))
        else:
            load_adapter(self.model, path, progress=False)
            self.account.adapter = adapter

    @rule()
    def merge(self) -> None:
        """Once or again."""
        if not self.adapted:
            self.refused(lambda: merge(self.model))
        else:
            merge(self.model)
            self.account.merged = True

    @precondition(lambda self: self.adapted)
    @rule()
    def unmerge(self) -> None:
        """Whether merged or not."""
        unmerge(self.model)
        self.account.merged = False

    @precondition(lambda self: self.adapted)
    @rule(fails=st.booleans())
    def disable(self, fails: bool) -> None:
        """Within it the model is the base, also where something is raised in it."""
        base = computed(self.account.weights, self.account.biases)
        try:
            with disable_adapters(self.model), torch.no_grad():
                close(self.model(X), base)
                if fails:
                    raise KeyError
        except KeyError:
            assert fails

    @rule(merged=st.booleans())
    def unload(self, merged: bool) -> None:
        """Leave the base as it was, or with what the adapter adds."""
        if self.bank is not None:
            self.close()
        if not self.adapted:
            self.refused(lambda: unload(self.model, merge=merged))
            return
        if merged:
            self.account.weights = self.account.with_adapter(self.account.adapter)
        unload(self.model, merge=merged)
        self.account.adapter, self.account.merged = None, False
        assert type(self.model.a) is nn.Linear

    @rule(how=st.sampled_from(["deepcopy", "state_dict", "file"]))
    def copied(self, how: str) -> None:
        """Go on with a copy; a bank stays with the model that it was made for."""
        if self.bank is not None:
            self.close()
        if how == "deepcopy":
            self.model = copy.deepcopy(self.model)
        elif how == "file":
            torch.save(self.model, Path(self.folder.name) / "whole")
            self.model = torch.load(Path(self.folder.name) / "whole", weights_only=False)
        elif not self.account.merged:
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(1)
            self.model.load_state_dict(state)

    # --- banks ---

    @rule(slots=st.integers(1, 3))
    def make_bank(self, slots: int) -> None:
        """Of a model that trains cores alone."""
        fits = self.free and self.account.adapter.how[0] != "lora"
        if not fits:
            self.refused(lambda: AdapterBank.from_model(self.model, slots=slots))
        else:
            self.bank = AdapterBank.from_model(self.model, slots=slots)

    def bank_of_a_file(self, bases: bool) -> None:
        """A bank whose first adapter is the model's own, from a file."""
        self.save(bases)
        self.make_bank(2)
        path, adapter, _ = self.files[-1]
        self.bank.add("u", path)
        self.account.bank["u"] = adapter

    @precondition(lambda self: self.bank is not None)
    @rule(name=st.sampled_from("uvw"), data=st.data())
    def add(self, name: str, data: st.DataObject) -> None:
        """From a file, or a model adapted alike."""
        own = self.account.adapter
        source: Any = self.model
        adapter, alike = own, own.head is None
        if self.files and data.draw(st.booleans()):
            source, adapter, origin = data.draw(st.sampled_from(self.files))
            alike = adapter.how[0] == own.how[0] and adapter.head is None
            alike &= all(torch.equal(own.factors[k], v) for k, v in adapter.factors.items())
            alike &= all(torch.equal(self.account.weights[name], origin[name]) for name in LAYERS)
        known = self.account.bank
        if not alike or name in known:
            self.refused(lambda: self.bank.add(name, source))
        elif len(known) == self.bank.slots:
            self.refused(lambda: self.bank.add(name, source), RuntimeError)
        else:
            self.bank.add(name, source)
            known[name] = adapter
        assert set(self.bank.names) == set(known)

    @precondition(lambda self: self.account.bank)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """Make room."""
        name = data.draw(st.sampled_from(sorted(self.account.bank)))
        self.bank.remove(name)
        del self.account.bank[name]

    @precondition(lambda self: self.account.bank)
    @rule(data=st.data())
    def serve(self, data: st.DataObject) -> None:
        """Each row has its own."""
        names = data.draw(
            st.lists(st.sampled_from([None, *sorted(self.account.bank)]), min_size=5, max_size=5)
        )
        if self.account.merged:
            with pytest.raises(RuntimeError, match="is merged"), self.bank.use(names):
                self.model(X)
            return
        with self.bank.use(names), torch.no_grad():
            y = self.model(X)
        head = self.account.adapter.head
        for i, name in enumerate(names):
            weights = self.account.with_adapter(self.account.bank.get(name))
            weights["head"] = weights["head"] if head is None else head
            expected = computed(weights, self.account.biases, X[i : i + 1])[0]
            close(y[i], expected, SCALES)

    @precondition(lambda self: self.bank is not None)
    @rule()
    def close(self) -> None:
        """The model is as it was before the bank."""
        self.bank.close()
        self.bank = None
        self.account.bank = {}


Native.TestCase.settings = SETTINGS
TestNative = Native.TestCase
