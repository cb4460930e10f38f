"""The rank budget of AdaLoRA: which entries of the layers' cores stay, by their importance.

An entry's importance is that of its core's value and the mean of those of its row of down and its
column of up; of a value v with gradient g it is the smoothed |v·g| times the smoothed distance of
|v·g| from that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.family.adalora import ADALORA
from ..methods.keywords import integer, number
from .adapt import require_adapted


class RankBudget:
    """Takes ranks from layers of `adapt(model, "adalora")`, down to `target_r` on average.

        budget = RankBudget(model, target_r=8, total_step=1000, tinit=100, tfinal=200)
        for step, batch in enumerate(batches, 1):
            loss = model(**batch).loss + 0.5 * orthogonality(model)
            loss.backward()
            optimizer.step()
            budget.update_and_allocate(step)
            optimizer.zero_grad()

    Until `tinit` all ranks stay; from then on they fall, as a cube, every `deltaT` steps, until
    total_step - tfinal; for the rest they stay as they are. beta1 and beta2 smooth the importance.
    Names and numbers are those of PEFT's AdaLoraConfig.

    Raises ValueError if no layer is of adalora, or one of them does not train down, core and up;
    for a target_r that is more than the layers' mean rank or below 1, and for steps or betas that
    are no numbers or out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_r: int = 8,
        total_step: int,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        layers = require_adapted(model)
        self.layers = {name: m for name, m in layers.items() if m.method == ADALORA.name}
        if not self.layers:
            raise ValueError('the model has no layer of adalora: adapt(model, "adalora", …) first')
        for name, layer in self.layers.items():
            if still := [part for part in ADALORA.factors if part not in layer.train_names]:
                raise ValueError(
                    f"{name} does not train {' and '.join(still)}: the importance of its ranks is "
                    "of the gradients of down, core and up; adapt with all three in train"
                )
        target_r, total_step = integer("target_r", target_r), integer("total_step", total_step)
        tinit, tfinal = integer("tinit", tinit), integer("tfinal", tfinal)
        deltaT = integer("deltaT", deltaT)
        beta1, beta2 = number("beta1", beta1), number("beta2", beta2)
        self.initial = sum(layer.r for layer in self.layers.values())
        self.target = target_r * len(self.layers)
        if not target_r >= 1 or self.target > self.initial:
            raise ValueError(
                f"target_r is {target_r}: it must be at least 1 and at most the layers' mean rank, "
                f"{self.initial / len(self.layers):g}"
            )
        if not 0 <= tinit < total_step - tfinal or tfinal < 0 or deltaT < 1:
            raise ValueError(
                f"tinit is {tinit}, tfinal {tfinal}, deltaT {deltaT} and total_step {total_step}: "
                "there must be steps between tinit and total_step - tfinal, and deltaT at least 1"
            )
        if not (0 < beta1 < 1 and 0 < beta2 < 1):
            raise ValueError(f"beta1 and beta2 are {beta1}, {beta2}: they must be within 0 and 1")
        self.start, self.stop, self.each = tinit, total_step - tfinal, deltaT
        self.betas = beta1, beta2
        self.means: dict[str, tuple[Tensor, Tensor]] = {}  # by layer.factor: |v·g|, its spread
        self.masks: dict[str, Tensor] = {}  # bool (r,), by layer: the entries that stay

    def at(self, step: int) -> tuple[int, bool]:
        """(ranks that may stay, whether they are taken now) at a step."""
        if step <= self.start:
            return self.initial, False
        if step > self.stop:
            return self.target, True
        left = 1 - (step - self.start) / (self.stop - self.start)
        size = int((self.initial - self.target) * left**3 + self.target)
        return size, step % self.each == 0

    @torch.no_grad()
    def update_and_allocate(self, global_step: int) -> dict[str, Tensor]:
        """Take note of the gradients and set to zero what the budget has no room for.

        To be called at every step, after backward and before zero_grad. Returns the entries that
        stay, bool (r,), by layer; none before the first were taken.

        Raises RuntimeError where a factor of a layer has no gradient, ValueError for a step that is
        no integer.
        """
        global_step = integer("global_step", global_step)
        if global_step < self.stop:
            self.note()
            size, now = self.at(global_step)
            if now:
                self.masks = self.chosen(size)
        elif global_step == self.stop:
            self.masks = self.chosen(self.target)
            self.means.clear()
        for name, mask in self.masks.items():
            if global_step > self.stop or self.at(global_step)[1] or global_step == self.stop:
                self.layers[name].core.masked_fill_(~mask, 0.0)  # type: ignore[operator]
        return self.masks

    def note(self) -> None:
        """Smooth the importance of every value."""
        beta1, beta2 = self.betas
        for name, layer in self.layers.items():
            for part in ADALORA.factors:
                own: Any = getattr(layer, part)
                if own.grad is None:
                    raise RuntimeError(
                        f"{name}.{part} has no gradient: call update_and_allocate after backward "
                        "and before zero_grad, with down, core and up trained"
                    )
                now = (own * own.grad).abs()
                zero = torch.zeros_like(now)
                mean, spread = self.means.get(f"{name}.{part}", (zero, zero))
                mean = beta1 * mean + (1 - beta1) * now
                spread = beta2 * spread + (1 - beta2) * (now - mean).abs()
                self.means[f"{name}.{part}"] = mean, spread

    def scores(self, name: str) -> Tensor:
        """The importance of a layer's entries, (r,)."""
        down, core, up = (torch.mul(*self.means[f"{name}.{part}"]) for part in ADALORA.factors)
        return core + (down.mean(1) + up.mean(0))

    def chosen(self, size: int) -> dict[str, Tensor]:
        """The most important entries, so many that no more than `size` stay."""
        scores = {name: self.scores(name) for name in self.layers}
        drop = self.initial - size
        if drop < 1:
            return {name: torch.ones_like(own, dtype=torch.bool) for name, own in scores.items()}
        device = next(iter(scores.values())).device
        every = torch.cat([own.to(device) for own in scores.values()])
        threshold = torch.kthvalue(every, drop).values
        return {name: ~(own <= threshold.to(own.device)) for name, own in scores.items()}


def orthogonality(model: nn.Module) -> Tensor:
    """The mean of ‖down·downᵀ − 1‖ and ‖upᵀ·up − 1‖ (Frobenius) over the layers of adalora.

    A scalar with gradients, to be added to the loss times a weight (0.5 in PEFT).
    Raises ValueError if no layer is of adalora.
    """
    layers = [m for m in require_adapted(model).values() if m.method == ADALORA.name]
    if not layers:
        raise ValueError('the model has no layer of adalora: adapt(model, "adalora", …) first')
    return torch.stack(list(distances(layers))).mean()


def distances(layers: Iterable[Any]) -> Iterable[Tensor]:
    """How far each factor is from orthogonal ones."""
    for layer in layers:
        for product in (layer.down @ layer.down.t(), layer.up.t() @ layer.up):
            one = torch.eye(len(product), dtype=product.dtype, device=product.device)
            yield torch.linalg.matrix_norm(product - one)
