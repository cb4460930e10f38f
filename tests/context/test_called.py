"""Adapted layers that are read and never called: noticed, and nothing else is."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from called_cases import merged, save
from reader_cases import Head, fused_loss_forward, native, randomise, ways
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lowrank import adapt, export_lora, load_adapter, merge, save_adapter, unload

D = 12
Way = Callable[..., nn.Module]


def inner(model: Any) -> Any:
    """The model that was adapted."""
    return model.base_model.model if hasattr(model, "peft_config") else model


@contextmanager
def quiet() -> Iterator[None]:
    """Within it a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="(merging lost|Already|.*nested)")
        yield


def check_noticed(model: Any, path: Path, name: str, reader: str, *others: str) -> None:
    """One warning when it is saved, an error when it is merged, but not by its name."""
    with pytest.warns(UserWarning, match=rf"{name}.* by {reader} .*no effect") as caught:
        save(model, path)
    assert len([w for w in caught if "no effect" in str(w.message)]) == 1
    weights = [module.weight for module in inner(model).modules() if hasattr(module, "merge")]
    with pytest.raises(ValueError, match=rf"{name}.* by {reader} .*get_submodule\('"):
        merged(model)
    with pytest.raises(ValueError, match="merging would change"):
        model.merge_and_unload() if hasattr(model, "peft_config") else unload(model, merge=True)
    now = [module.weight for module in inner(model).modules() if hasattr(module, "merge")]
    assert all(a is b for a, b in zip(weights, now, strict=True))
    for each in [name, *others]:
        inner(model).get_submodule(each).merge()
    merged(model)


class Aliased(nn.Module):
    """Reads a weight in a way that its source does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.ModuleList([nn.Linear(D, D)])

    def forward(self, x: Tensor) -> Tensor:
        (last,) = self.second
        return F.linear(self.first(x), last.weight, last.bias)


def step(model: nn.Module, x: Tensor) -> None:
    """A step with gradients, as one trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()(x).square().sum().backward()
    optimizer.step()


@ways
def test_read_by_the_model(way: Way, tmp_path: Path) -> None:
    """Whatever else is adapted; compiled in parts, too."""
    for targets in (["first", "0"], ["0"]):
        model = randomise(way(Aliased(), "lora_xs", targets))
        y = model(torch.ones(2, D))
        check_noticed(model, tmp_path / "a", "second.0", "forward")
        assert not torch.allclose(model(torch.ones(2, D)), y)
    model = randomise(
        way(nn.Sequential(Aliased(), nn.Linear(D, D)), "lora_xs", ["first", "1", "0.second.0"])
    )
    step(model, torch.randn(2, D))
    check_noticed(model, tmp_path / "b", "0.second.0", "forward")


def chunked_loss(hidden: Tensor, head: nn.Module) -> Tensor:
    """As fused losses compute it, of a head that they are given."""
    return sum((part @ head.weight.t()).logsumexp(-1).sum() for part in hidden.chunk(2))


@ways
def test_head_read_by_a_loss(way: Way, tmp_path: Path) -> None:
    """Outside the model, or in a forward that is replaced after it was adapted."""
    x = torch.randn(4, D)
    model = way(Head(), "lora_xs", ["body", "head"])
    chunked_loss(inner(model).body(x), inner(model).head).backward()
    check_noticed(model, tmp_path / "a", "head", "chunked_loss")
    model = way(Head(), "lora_xs", ["body", "head"])
    model(x)
    inner(model).forward = fused_loss_forward.__get__(inner(model))
    step(model, x)
    check_noticed(model, tmp_path / "b", "head", "fused_loss_forward")


class Attention(nn.Module):
    """As diffusers has it: three layers that can be fused into one."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.fused = False

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Copies the weights."""
        weights = torch.cat([layer.weight.data for layer in (self.to_q, self.to_k)])
        weights = torch.cat([weights, self.to_v.weight.data])
        self.to_qkv = nn.Linear(D, 3 * D, bias=False)
        self.to_qkv.weight.copy_(weights)
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.to_qkv(x).chunk(3, -1)[0]
        return self.to_q(x) + self.to_k(x) + self.to_v(x)


@ways
@pytest.mark.parametrize("called", [False, True])
def test_fused_projections(way: Way, called: bool, tmp_path: Path) -> None:
    """Noticed where they are fused after they were adapted, called before or not."""
    model = way(nn.Sequential(Attention()), "lora_xs", ["to_q", "to_k", "to_v"])
    if called:
        step(model, torch.randn(2, D))
    inner(model)[0].fuse_projections()
    model(torch.randn(2, D))
    check_noticed(model, tmp_path / "a", "0.to_k", "fuse_projections", "0.to_q", "0.to_v")


def test_export_says_it(tmp_path: Path) -> None:
    """Exported it would act where it did not."""
    model = native(Aliased(), "lora_xs", ["first", "0"])
    model(torch.ones(2, D))
    with pytest.warns(UserWarning, match="second.0 by forward"):
        export_lora(model, tmp_path / "lora")


class Detached(nn.Module):
    """Goes through its first layer with no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).detach()))


@ways
@pytest.mark.parametrize("plan", ["eager", "compiled"])
def test_no_gradient(way: Way, plan: str, tmp_path: Path) -> None:
    """Of a layer that was called in training: named once, if others had theirs."""
    model = way(Detached(), "lora_mini", ["first", "second"])
    model.train()(torch.randn(2, D))
    with quiet():
        save(model, tmp_path / "a")
    step(model if plan == "eager" else torch.compile(model, backend="aot_eager"), torch.randn(2, D))
    model.zero_grad()
    with pytest.warns(UserWarning, match="no gradient reached first, which") as caught:
        save(model, tmp_path / "b")
    assert len([w for w in caught if "no gradient" in str(w.message)]) == 1
    inner(model).first(torch.randn(2, D)).sum().backward()
    with quiet():
        save(model, tmp_path / "c")
        save(copy.deepcopy(model), tmp_path / "d")
        merged(model)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            assert not parameter._post_accumulate_grad_hooks


@ways
def test_head_read_by_a_loss_and_called_before(way: Way, tmp_path: Path) -> None:
    """Named as one that no gradient reaches, where evaluation calls what training reads."""
    x = torch.randn(4, D)
    model = way(Head(), "lora_mini", ["body", "head"])
    model.eval()(x)
    model.train()
    chunked_loss(inner(model).body(x), inner(model).head).backward()
    with pytest.warns(UserWarning, match="no gradient reached head, which"):
        save(model, tmp_path / "a")


# --- what is no fault ---


class Branches(nn.Module):
    """Experts that may get no token, a branch that is off, a dtype that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.off = nn.Linear(D, D), nn.Linear(D, D)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.on = False

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.into.weight.dtype or not isinstance(self.off.weight, Tensor):
            x = x.to(self.experts[1].weight.dtype)
        x = self.experts[0](self.into(x))
        return self.off(x) if self.on else x


def fresh(model: nn.Module) -> None:
    """Saved at once."""


def evaluated(model: nn.Module) -> None:
    """Used."""
    with torch.no_grad():
        model(torch.randn(2, D))


def looked_at(model: nn.Module) -> None:
    """Weights are read before and after, as one does to see what changes."""
    seen = [m.weight.clone() for m in model.modules() if hasattr(m, "merge")]
    evaluated(model)
    assert [m.weight.norm() for m in [inner(model).into]] != seen
    assert inner(model).into.weight.detach().norm() > 0


def trained(model: nn.Module) -> None:
    """Steps, and a penalty on a weight that is called as well."""
    step(model, torch.randn(2, D))
    (model(torch.randn(2, D)).sum() + inner(model).into.weight.norm()).backward()


def in_parts(model: nn.Module) -> None:
    """One layer alone, as stages of a pipeline are."""
    inner(model).into(torch.randn(2, D))


def compiled(model: nn.Module) -> None:
    """Some of the model in a graph, the rest outside."""
    torch._dynamo.reset()
    inner(model).experts[0] = torch.compile(inner(model).experts[0], backend="eager")
    evaluated(model)
    inner(model).experts[0] = inner(model).experts[0]._orig_mod


def checkpointed(model: nn.Module) -> None:
    """With recomputation."""
    x = torch.randn(2, D, requires_grad=True)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).sum().backward()


USES = [fresh, evaluated, trained, in_parts, compiled, checkpointed]


@ways
@pytest.mark.parametrize("use", USES)
def test_ordinary_use(way: Way, use: Callable[[nn.Module], None], tmp_path: Path) -> None:
    """No word when it is saved, merged, copied and merged, or loaded and merged at once."""
    base = Branches()
    model = randomise(way(copy.deepcopy(base), "lora_xs", ["into", "off", r"0", "1", "2"]))
    use(model)
    with quiet():
        save(model, tmp_path / "adapter")
        twin = copy.deepcopy(model)
        merged(model)
        merged(twin)
        if way is native:
            again = load_adapter(copy.deepcopy(base), tmp_path / "adapter", progress=False)
            torch.testing.assert_close(merge(again).into.weight, model.into.weight)
            export_lora(twin, tmp_path / "lora") if not twin.into.merged else None


def test_weights_may_be_looked_at() -> None:
    """And merged at once: nobody was called meanwhile."""
    model = native(Branches(), "lora_xs", ["into", "off"])
    before = model.into.weight.clone()
    with quiet():
        merge(model)
    assert not torch.equal(model.into.weight, before)
    model = native(Branches(), "lora_xs", ["into", "off"])
    model(torch.randn(2, D))
    before = model.into.weight.clone()
    with quiet():
        merge(model)


def test_meta_and_state_dicts(tmp_path: Path) -> None:
    """Models made on the meta device, state_dicts, assigned ones."""
    from fused_lowrank import init_bases

    base = Branches()
    with torch.device("meta"):
        model = Branches()
    adapt(model, target_modules=["into", "off"], r=3, defer_bases=True, progress=False)
    model.load_state_dict(base.state_dict(), strict=False, assign=True)
    model.to_empty(device="cpu") if model.into.down.is_meta else None
    model.load_state_dict(base.state_dict(), strict=False)
    with quiet():
        init_bases(model, progress=False)
        model(torch.randn(2, D))
        save_adapter(model, tmp_path / "adapter")
        merge(model)


def test_the_weight_is_a_parameter_as_ever() -> None:
    """It can be set, taken away, and put there as a plain tensor, as libraries do."""
    layer = adapt(nn.Sequential(nn.Linear(D, D)), target_modules=["0"], r=3, progress=False)[0]
    weight = layer.weight
    assert dict(layer.named_parameters())["weight"] is weight
    del layer.weight
    assert not hasattr(layer, "weight")
    layer.weight = weight.detach() * 2
    assert torch.equal(layer.weight, weight * 2)
    assert "weight" not in dict(layer.named_parameters())
    del vars(layer)["weight"]
    layer.weight = weight
    assert layer.weight is weight
    new = nn.Parameter(torch.zeros(D, D))
    values = {"weight": new}
    y = torch.func.functional_call(layer, values, (torch.ones(1, D),))
    assert y.shape == (1, D)
    assert layer.weight is weight
