"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695): adapters merged and begun anew, in training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..compute.base.protocol import Base
from ..context.called import refuse_passed_over, shown
from ..context.elsewhere import fill_in, here
from ..methods import LowRankLinear
from ..methods.initial.values import needs
from ..methods.state import low_rank_of
from ..methods.tensors import fsdp_error, is_sharded
from .adapt import require_adapted, tied_layers
from .refusals import require_not_fsdp

Factors = dict[str, Tensor]
# Parts of optimisers' states that are zero before a parameter's first step: those of Adam and kin.
ZERO_AT_FIRST = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"}


def merge_and_restart(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    prune: float = 1.0,
    progress: bool = True,
) -> nn.Module:
    """Add every ΔW to its weight for good, and begin the adapters anew, in the same Parameters.

    ReLoRA's restart: between two steps, after `optimizer.zero_grad()`. The model computes what it
    did, for the new factors start with ΔW = 0: LoRA's are drawn anew with up zero, LoRA-Mini's
    with b_train zero; LoRA-XS takes its bases from the new weight, as `adapt` would, with a core of
    zeros. What it has learned before is W now, and the sum of all updates may have a higher rank
    than each. LoRA-XS's gains little of it: as long as training leaves the leading directions of
    the weight in the lead, the new bases span what the old ones did.

    `optimizer` forgets its state of the factors; the learning rate should start at zero again and
    rise over some steps, which is for your scheduler to do.

    What the base model was is not kept: after this `base()`, `disable_adapters`, `unload` and the
    fingerprint in a file mean the new weights. So a file of `save_adapter` belongs to these: save
    them too (`unload(model)`, or `unload(model, merge=True)` at the end). Modules and biases that
    are trained go on as they were.

    Args:
        model: what `adapt` or `load_adapter` returned. Where several processes train it
            (torch.distributed), all must call this; the new factors are those of the first.
        optimizer: whose parameters the trained factors are.
        prune: the part of the optimiser's state that is set to zero: 1.0 all, after which the
            factors are to it as new parameters are; below, those elements of each moment that are
            smallest, 0.99 say as in the paper, while the count of steps goes on.
        progress: show a progress bar on stderr.

    Returns:
        The same model.

    Raises, the model and the optimiser as they were:
        ValueError: no adapted layers; one that is in a bank, merged, disabled, not initialised,
            trains its weight or not its core, or whose weight is tied to another's or read
            elsewhere; an optimiser of other parameters; prune outside 0 … 1; a sum that is not
            finite.
        TypeError: a quantised weight.
        RuntimeError: a sharded model.

    A UserWarning says how much of ΔW was lost to rounding, where weights are below float32.
    """
    layers = require_adapted(model)
    require_not_fsdp(model, "merge and restart")
    for name, layer in layers.items():
        refuse(name, layer)
    refuse_passed_over(layers)
    if tied := tied_layers(layers, model):
        raise ValueError(
            f"the weights of {shown(tied)} are tied to others, which would change with them: give "
            "them Parameters of their own, or leave the layers out by exclude_modules"
        )
    trained = [factor for layer in layers.values() for factor in layer.trained_factors]
    check_optimizer(optimizer, trained, prune)
    fresh, lost = {}, {}
    for name, layer in tqdm(layers.items(), "restart", disable=not progress, unit="layer"):
        try:
            fresh[name], lost[name] = restarted(layer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    with torch.no_grad():
        for name, layer in layers.items():
            with here(layer):
                weight, _ = layer.merged_weight()
            fill_in(layer, "weight", weight)
            for factor, value in fresh[name].items():
                fill_in(layer, factor, value)
        for parameter in trained:
            parameter.grad = None
        for parameter, state in states_of(optimizer, trained):
            forget(optimizer, parameter, state, prune)
    worst = max(lost, key=lost.__getitem__)
    if lost[worst]:
        warnings.warn(
            f"merging lost up to {lost[worst]:.2%} of ΔW to rounding (in {worst}), for good; "
            "float32 weights would keep it",
            stacklevel=2,
        )
    return model


def refuse(name: str, layer: LowRankLinear) -> None:
    """Raise if a layer cannot be merged for good and begun anew."""
    if layer.in_bank:
        raise ValueError(f"{name} is in a bank, whose adapters share its weight: close() it first")
    if layer.computed_by is not None or is_sharded(layer.base_weight):
        raise fsdp_error("merge and restart", "parallelize_module")
    if layer.merged:
        raise ValueError(f"{name} is merged: unmerge(model) before a restart")
    if layer.disabled:
        raise ValueError(f"{name} is disabled: restart outside disable_adapters")
    if layer.bases_pending:
        raise ValueError(f"{name} is not initialised: load its weights and call init_bases")
    if isinstance(layer.base_weight, Base):
        raise TypeError(
            f"cannot merge into {name} for good: it lies over "
            f"{type(layer.base_weight.module).__name__}, in which each restart would lose some of "
            "ΔW, or all: train over a base that is not quantised"
        )
    if reason := layer.why_not_merged():
        raise TypeError(f"cannot merge into {name}, which {reason}")
    if layer.row.shared:
        raise ValueError(f"{name} shares factors of {layer.method} with others: it has no restart")
    if "weight" in layer.train_names:
        raise ValueError(
            f"{name} trains its weight, to which a restart would add: train the factors alone"
        )
    zero = zero_factor(layer)
    if zero is not None and zero not in layer.train_names:
        raise ValueError(
            f"{name} does not train {zero}, which starts at zero after a restart, so that nothing "
            f"would ever be learned: name {zero} in train"
        )


def zero_factor(layer: LowRankLinear) -> str | None:
    """The factor of a core that is zero after a restart; None where another starts so anyway."""
    core = layer.core_factors
    last = core[-1] if isinstance(core, tuple) else core
    return next((name for name in layer.factors if getattr(layer, name) is last), None)


@torch.no_grad()
def restarted(layer: LowRankLinear) -> tuple[Factors, float]:
    """(new factors, the part of ΔW lost to rounding); the layer stays as it is.

    Raises ValueError if W + ΔW is not finite.
    """
    with here(layer):
        weight, lost = layer.merged_weight()
    linear = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if needs(init := layer.options.get("init", "")):
        raise ValueError(
            f"{layer.method} started by init={init!r}, of inputs that a restart does not see, so "
            "it cannot be begun anew"
        )
    new = type(layer)._around(linear, False, layer.settings())
    if zero := zero_factor(new):
        getattr(new, zero).zero_()
    low, _ = low_rank_of(new, new.factors_now(), weight, torch.float32)
    if low.any():
        raise ValueError(f"{layer.method} starts with ΔW ≠ 0 here, so it cannot be begun anew")
    factors = {name: getattr(new, name).detach() for name in layer.factors}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for factor in factors.values():
            torch.distributed.broadcast(factor, 0)
    return factors, lost


# --- the optimiser's state ---


def check_optimizer(optimizer: Any, trained: list[nn.Parameter], prune: float) -> None:
    """Raise ValueError unless it trains these, and can forget so much of its state of them."""
    if not (isinstance(prune, int | float) and 0.0 <= prune <= 1.0):
        raise ValueError(f"prune is {prune!r}: it must be from 0 to 1")
    held = {id(own) for group in optimizer.param_groups for own in group["params"]}
    if missing := sum(id(factor) not in held for factor in trained):
        raise ValueError(
            f"the optimizer lacks {missing} of the {len(trained)} trained factors: make it of "
            "parameter_groups(model, lr), after adapt and load_adapter"
        )
    kind = type(getattr(optimizer, "optimizer", optimizer))  # accelerate's has another in it
    if prune == 1.0 and issubclass(kind, torch.optim.Adagrad):
        raise ValueError(
            "Adagrad makes its state with itself, and cannot begin anew: make a new optimizer, or "
            "give prune below 1"
        )
    if 0.0 < prune < 1.0:
        for parameter, state in states_of(optimizer, trained):
            if state and not any(True for _ in moments(parameter, state)):
                raise ValueError(
                    f"{kind.__name__} keeps no state of a parameter's shape: take prune=1.0"
                )


def states_of(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    """(parameter, state) of those of which an optimiser has one."""
    return [(own, optimizer.state[own]) for own in parameters if own in optimizer.state]


def moments(parameter: Tensor, state: dict[str, Any]) -> Iterator[Tensor]:
    """The parts of a parameter's state that have a number for each element of it."""
    for value in state.values():
        alike = isinstance(value, Tensor) and value.shape == parameter.shape
        if alike and value.is_floating_point():
            yield value


def forget(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Any], prune: float
) -> None:
    """Set a part of a parameter's state to zero; all of it is as if there had been no step."""
    if prune == 1.0 and state.keys() <= ZERO_AT_FIRST:
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()  # in place, for graphs read it there
            elif value is not None:
                state[key] = 0
    elif prune == 1.0:
        del optimizer.state[parameter]
    elif count := math.ceil(prune * parameter.numel()):
        for moment in moments(parameter, state):
            size = moment.abs()
            moment.mul_(size > size.flatten().kthvalue(count).values)
