"""AdamW by adapter: common batches of hundreds of adapters against as many trainings alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from training_cases import (
    NAMES,
    POSITIONS,
    K,
    Setting,
    inputs,
    losses_of,
    methods,
    rows_of,
    setting,
)

from fused_lowrank.bank.training import AdapterAdamW
from fused_lowrank.testing import FACTOR


@pytest.fixture
def s(device: torch.device) -> Setting:
    """LoRA-XS in fp64."""
    return setting("lora_xs", device)


def states(optimizer: AdapterAdamW) -> list[Tensor]:
    """Everything that a step may change, with the adapters in the first dimension."""
    kept = [value for state in optimizer.state.values() for value in state.values()]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    return [tensor.detach().clone() for tensor in (*weights, *kept)]


def step(s: Setting, optimizer: AdapterAdamW, lines: list[str | None], x: Tensor) -> None:
    with s.trainable.use(lines):
        losses = losses_of(s.model(x))
    s.trainable.loss(losses).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_absent_adapters_stay(s: Setting, device: torch.device) -> None:
    """Their weights, moments and counts are bit for bit the same; weight decay or not."""
    optimizer = s.trainable.optimizer(lr=0.1, weight_decay=0.5)
    step(s, optimizer, [*NAMES], inputs(5, device))
    before = states(optimizer)
    step(s, optimizer, ["dan", None, "ben"], inputs(3, device))
    for old, new in zip(before, states(optimizer), strict=True):
        assert torch.equal(old[[0, 2, 4]], new[[0, 2, 4]])
        assert all(not torch.equal(old[i], new[i]) for i in (1, 3))
    counts = [state["steps"].tolist() for state in optimizer.state.values()]
    assert counts == [[1, 2, 1, 2, 1]] * 3


def test_accumulation(s: Setting, device: torch.device) -> None:
    """A step is of all adapters in the losses since the last one, also of those of `zero_grad`."""
    optimizer = s.trainable.optimizer(lr=0.1, weight_decay=0.1)
    start = states(optimizer)
    for name in ("ann", "dan"):
        with s.trainable.use([name]):
            s.trainable.loss(losses_of(s.model(inputs(1, device)))).backward()
    with s.trainable.use(["eve"]), torch.no_grad():  # an evaluation
        s.trainable.loss(losses_of(s.model(inputs(1, device))))
    with s.trainable.use(["eve"]):  # never differentiated
        s.trainable.loss(losses_of(s.model(inputs(1, device))))
    optimizer.step()
    for old, new in zip(start, states(optimizer), strict=False):
        assert (old != new).flatten(1).any(1).tolist() == [True, False, False, True, False]
    with pytest.raises(RuntimeError, match="no adapter has been in a loss"):
        optimizer.step()
    with s.trainable.use(["ben"]):
        s.trainable.loss(losses_of(s.model(inputs(1, device)))).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no adapter has been in a loss"):
        optimizer.step()


def test_clipping(s: Setting) -> None:
    """Each adapter's norm over all layers, as torch clips it alone; NaN stays where it is."""
    parameters = list(s.trainable.parameters())
    grads = [torch.randn_like(parameter) for parameter in parameters]
    grads[1][2, 0, 0] = torch.nan
    for bound in (1e-3, 1e3):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        norms = s.trainable.clip_grad_norm_(bound)
        for i in (0, 1, 3, 4):
            alone = [nn.Parameter(grad[i]) for grad in grads]
            for single, grad in zip(alone, grads, strict=True):
                single.grad = grad[i].clone()
            torch.testing.assert_close(norms[i], nn.utils.clip_grad_norm_(alone, bound))
            for parameter, single in zip(parameters, alone, strict=True):
                torch.testing.assert_close(parameter.grad[i], single.grad)
        assert norms[2].isnan()


def test_state_dict(device: torch.device) -> None:
    """Training that is interrupted goes on as if it had not been; not with other adapters."""
    whole, first = setting("lora_mini", device), setting("lora_mini", device)
    xs = [inputs(3, device) for _ in range(4)]
    optimizer, begun = whole.trainable.optimizer(0.1), first.trainable.optimizer(0.1)
    for x in xs:
        step(whole, optimizer, ["ann", "eve", None], x)
    for x in xs[:2]:
        step(first, begun, ["ann", "eve", None], x)
    first.trainable.commit()
    first.trainable.close()
    second = first._replace(trainable=first.bank.trainable(NAMES))
    again = second.trainable.optimizer(0.1)
    again.load_state_dict(copy.deepcopy(begun.state_dict()))
    for x in xs[2:]:
        step(second, again, ["ann", "eve", None], x)
    for one, two in zip(states(optimizer), states(again), strict=True):
        assert torch.equal(one, two)
    second.trainable.close()
    other = first.bank.trainable(NAMES[::-1]).optimizer(0.1)
    with pytest.raises(ValueError, match="state is of other adapters"):
        other.load_state_dict(begun.state_dict())


# --- hundreds of adapters against as many trainings ---

MANY = [f"adapter {i}" for i in range(256)]
STEPS, LR, DECAY, CLIP = 6, 0.02, 0.1, 0.05


def rate(step: int) -> float:
    """The schedule: it rises, then falls."""
    return (0.5, 1.0, 1.0, 0.7, 0.4, 0.1, 0.0)[step]


def many_batches(device: torch.device) -> list[tuple[list[str | None], Tensor]]:
    """Each with some of the adapters, 1 to 3 sequences of each, and some of nobody's, mixed."""
    random = torch.Generator().manual_seed(2)
    found = []
    for _ in range(STEPS):
        counts = torch.randint(-1, 4, (len(MANY),), generator=random).clamp(min=0).tolist()
        lines = [name for name, n in zip(MANY, counts, strict=True) for _ in range(n)] + [None] * 3
        order = torch.randperm(len(lines), generator=random).tolist()
        x = torch.randn(len(lines), POSITIONS, K, generator=random)
        found.append(([lines[i] for i in order], x.to(device)))
    return found


def together(s: Setting, batches: list, dtype: torch.dtype) -> Tensor:
    """The adapters after the common training, a row each."""
    optimizer = s.trainable.optimizer(LR, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for lines, x in batches:
        optimizer.zero_grad()
        with s.trainable.use(lines):
            losses = losses_of(s.model(x.to(dtype)))
        s.trainable.loss(losses).backward()
        s.trainable.clip_grad_norm_(CLIP)
        optimizer.step()
        schedule.step()
    return torch.cat([p.detach().flatten(1) for p in s.trainable.parameters()], 1)


def one_by_one(s: Setting, batches: list, dtype: torch.dtype) -> Tensor:
    """The same after as many trainings with the plain layers and torch's AdamW, in this dtype."""
    rows = []
    for name in MANY:
        model = s.alone(name).to(dtype)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, LR, weight_decay=DECAY)
        for t, (lines, x) in enumerate(batches):
            if not (own := rows_of(name, lines)):
                continue
            optimizer.param_groups[0]["lr"] = LR * rate(t)
            optimizer.zero_grad()
            losses_of(model(x[own].to(dtype))).mean().backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
        rows.append(torch.cat([p.detach().flatten() for p in parameters]))
    return torch.stack(rows)


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hundreds_at_once(method: str, dtype: torch.dtype, device: torch.device) -> None:
    """256 adapters in common batches are what 256 trainings give: in fp64 but for its rounding, in
    fp32 no further than those are from the same trainings in fp64.
    """
    batches, s = many_batches(device), setting(method, device, MANY, dtype)
    start = torch.cat([p.detach().flatten(1) for p in s.trainable.parameters()], 1)
    alone = one_by_one(s, batches, dtype)
    assert (alone - start).abs().amax(1).median() > LR  # some steps' worth
    truth = one_by_one(s, batches, torch.float64)
    ours = together(s, batches, dtype)
    if dtype == torch.float64:
        assert (ours - alone).abs().max() < 1e-12
    else:  # the median adapter's: Adam divides by a gradient's size, so some are all rounding
        mine, theirs = ((each - truth).norm(dim=1).median() for each in (ours, alone))
        assert mine <= FACTOR * theirs
