"""Training many adapters of a bank at once, each as if it were trained alone.

A trained layer's cores are one Parameter with an adapter to each index of its first dimension. A
row of the batch reaches the gradient of its own adapter only. What else joins adapters in a
training step, the mean over the batch, clipping and the optimiser, is here by adapter.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compute.reference import NONE
from ..context.called import shown
from .assignment import Assignment, Use
from .inputs import HandleCache, entries_of
from .store import AdapterStore
from .tables import CoreTable

Entries = Sequence[str | None]


class Trainable:
    """Adapters of a bank as Parameters, to be trained. Given out by `AdapterBank.trainable`.

        trainable = bank.trainable(["alice", "bob"])
        optimizer = trainable.optimizer(lr=4e-3)
        for names, x, target in batches:  # a name for each sequence
            with trainable.use(names):
                losses = F.cross_entropy(model(x), target, reduction="none")
            trainable.loss(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
        trainable.commit()
        trainable.close()

    For each layer there is one Parameter, (adapters, P, Q), or a pair, (adapters, P, r) and
    (adapters, r, Q), where the bank holds pairs. LoRA-Mini's cores that the bank holds as products
    are trained as whole cores. float64 where the bank's table is, otherwise float32. Every adapter
    keeps its scale. The bank's own adapters stay as they are until `commit`.
    """

    tables: dict[str, CoreTable]
    generations: Tensor  # int32 (adapters,): zeros, for nothing here is ever replaced
    refused: Tensor
    bank: Any = None  # that gave it out, which is open as long

    def __init__(self, store: AdapterStore, names: Sequence[str]) -> None:
        self.store, self.names, self.device = store, list(names), store.device
        self.closed = False
        self._committed: set[str] = set()
        self.present: set[int] = set()  # the adapters whose gradient the next step will take
        self._index = {name: i for i, name in enumerate(self.names)}
        self._entries: Entries | str | None = ()  # of the last `use`
        self._cache = HandleCache(self.device)
        slots = torch.tensor(store.slots_of(self.names), device=self.device)
        self.tables = {layer: trained(table, slots) for layer, table in store.tables.items()}
        self.generations = torch.zeros(len(slots), dtype=torch.int32, device=self.device)
        self.refused = torch.zeros(1, dtype=torch.int32, device=self.device)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The Parameters, by names that stay the same and that each has alone.

        A layer has {layer}.core for LoRA-XS. For LoRA-Mini it has {layer}.a_train and .b_train, or
        {layer}.core_product where the bank holds their product; that is in no layer's state.
        """
        for layer, (left, right, _) in self.tables.items():
            core = self.store.layers[layer].row.core
            parts = dict(zip(core, (left, right), strict=False))
            if right is None and len(core) == 2:
                parts = {"core_product": left}
            for part, parameter in parts.items():
                yield f"{layer}.{part}", parameter  # type: ignore[misc]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The Parameters: one or two of each layer."""
        return (parameter for _, parameter in self.named_parameters())

    def __repr__(self) -> str:
        each = sum(parameter[0].numel() for parameter in self.parameters())
        return f"Trainable({len(self.names)} adapters of {each:,} numbers)"

    # --- a step ---

    @contextmanager
    def use(self, names: Entries | str | None) -> Iterator[None]:
        """A context like `AdapterBank.use`, over adapters in training: a name or None per sequence.

        Raises:
            ValueError: a name that is not in training; none at all.
            RuntimeError: after `close`.
        """
        if self.closed:
            raise RuntimeError("this training is closed: bank.trainable(names) starts another")
        entries = names if names is None or isinstance(names, str) else list(names)
        with Use(self._assign, entries):
            self._entries = entries
            yield

    def _assign(self, names: Entries | str | None) -> Assignment:
        """The assignment of a `use` that is entered now; it holds no slot of the bank."""
        store = self.store
        store.shared.check(thorough=False)
        entries = entries_of(names)
        with store.lock:
            handles, slots = self._cache.of(entries, self.handles)
        return Assignment(
            store.key,
            self,
            entries,
            handles,
            base_only=names is None,
            resolved_slots=slots,
            learned=store.learned,
        )

    def handles(self, entries: Entries) -> Tensor:
        """Handles of names: int64 (entries, 1), the index of each one's adapter."""
        if not entries:
            raise ValueError("names is empty: it must have a name or None for each sequence")
        found = [NONE if name is None else self._find(name) for name in entries]
        return on_device(found, torch.int64, self.device)[:, None]

    def _find(self, name: Any) -> int:
        try:
            return self._index[name]
        except (KeyError, TypeError):
            raise ValueError(
                f"{name!r} is not in training; {len(self.names)} adapters are: trainable.names"
            ) from None

    def loss(self, losses: Tensor, reduction: str = "mean") -> Tensor:
        """The sum over adapters of the mean over each one's own losses, a number to differentiate.

        So an adapter's gradient is what the mean over its own sequences would give it alone,
        however many others there are. Its backward notes for the optimiser which adapters it was
        of. To accumulate gradients, call it for each part.

        Args:
            losses: (entries,), one for each sequence of the last `use`; those of None are ignored.
                Where that was one name for all of the batch, any number of them.
            reduction: of an adapter's own losses, "mean" or "sum".

        Raises ValueError for losses of another shape or another reduction, and RuntimeError where
        nothing has been in `use` yet.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}: it must be 'mean' or 'sum'")
        entries = self._entries
        if entries == ():
            raise RuntimeError("losses of what? Call the model inside trainable.use(names) first")
        if losses.dim() != 1:
            raise ValueError(
                f"losses are {tuple(losses.shape)}: they must be (lines,), a number for each "
                "sequence; cross_entropy(…, reduction='none') and a mean over positions give that"
            )
        if entries is None or isinstance(entries, str):
            entries = [entries] * len(losses)
        if len(losses) != len(entries):
            raise ValueError(
                f"losses are ({len(losses)},), but the last use had {len(entries)} sequences"
            )
        counts = Counter(entries)
        shares = [1.0 if reduction == "sum" else 1.0 / counts[name] for name in entries]
        shares = [0.0 if name is None else s for name, s in zip(entries, shares, strict=True)]
        wide = torch.promote_types(losses.dtype, torch.float32)
        weights = on_device(shares, wide, losses.device)
        # By selection: what is ignored may be NaN.
        total = (losses.to(wide).where(weights != 0, 0.0) * weights).sum()
        if total.requires_grad:
            there = {self._index[name] for name in counts if name is not None}
            total.register_hook(lambda _: self.present.update(there))
        return total

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale each adapter's gradient, over all layers, to a norm of at most `max_norm`.

        As torch.nn.utils.clip_grad_norm_ of each by itself. Returns the norms before, (adapters,).
        """
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if not grads:
            return torch.zeros(len(self.names), device=self.device)
        norms = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads]
        total = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factor.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1)))
        return total

    def optimizer(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> AdapterAdamW:
        """AdamW by adapter over all Parameters; see `AdapterAdamW`."""
        return AdapterAdamW(self, lr, betas, eps, weight_decay)

    # --- the end ---

    @torch.no_grad()
    def commit(self, names: Sequence[str] | None = None) -> None:
        """Give the bank the trained values, of all adapters or of those named; training may go on.

        Calls of the bank under way keep the adapters as they were. While there are such calls it
        needs a free slot for each adapter, otherwise one. A UserWarning names the adapters of which
        most is lost to rounding, in a bank of 16 bits, when they are first committed.

        Raises:
            ValueError: an adapter that is NaN or Inf, or is in the bank no more. Nothing has been
                written then.
            RuntimeError: too few free slots; nothing has been written.
        """
        names = self.names if names is None else list(names)
        indices = [self._find(name) for name in names]
        where = torch.tensor(indices, dtype=torch.int64, device=self.device)
        cores: Any = {
            layer: tuple(None if part is None else part.detach()[where] for part in table)
            for layer, table in self.tables.items()
        }
        self._check_finite(names, cores)
        with self.store.lock:  # no call starts meanwhile
            lost = self._lost(names, self.store.slots_of(names), cores)
            self.store.replace_in_turn(names, cores)
        self._committed.update(names)
        if lost:
            dtypes = ", ".join(
                dict.fromkeys(str(table.left.dtype) for table in self.store.tables.values())
            )
            warnings.warn(
                f"more than half of what {shown(lost)} learned is lost to rounding in the bank's "
                f"{dtypes}: make the bank with dtype=torch.float32, or train further, by larger "
                "steps; the Parameters here have kept it",
                stacklevel=3,  # above is torch's decorator
            )

    def _lost(self, names: Sequence[str], slots: Sequence[int], cores: Any) -> list[str]:
        """The adapters whose first update is mostly lost to rounding in the bank's tables."""
        where = torch.tensor(slots, dtype=torch.int64, device=self.device)
        moved = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        lost = moved.clone()
        for layer, sides in cores.items():
            for table, side in zip(self.store.tables[layer][:2], sides[:2], strict=True):
                if table is None or table.itemsize >= 4:
                    continue
                old = table[where].to(side.dtype)
                update, stored = side - old, side.to(table.dtype).to(side.dtype) - old
                moved += update.double().square().flatten(1).sum(1)
                lost += (update - stored).double().square().flatten(1).sum(1)
        mostly = (lost > 0.25 * moved).tolist()  # of the norm, a half
        return [
            name
            for name, most in zip(names, mostly, strict=True)
            if most and name not in self._committed
        ]

    def _check_finite(self, names: Sequence[str], cores: Any) -> None:
        finite = torch.ones(len(names), dtype=torch.bool, device=self.device)
        for layer, sides in cores.items():
            for table, side in zip(self.store.tables[layer][:2], sides[:2], strict=True):
                if table is not None:
                    finite &= side.to(table.dtype).isfinite().flatten(1).all(1)
        bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
        if bad:
            raise ValueError(
                f"{bad[0]!r}{f' and {len(bad) - 1} others' if bad[1:] else ''} would be NaN or Inf "
                "in the bank: name the others, commit(names), or train anew at a lower lr"
            )

    def close(self) -> None:
        """End the training; what has not been committed is in these Parameters alone."""
        self.closed = True
        if self.store.trained is self:
            self.store.trained = None


def trained(table: CoreTable, slots: Tensor) -> CoreTable:
    """A layer's table of Parameters, with a bank's values."""

    def parameter(part: Tensor) -> nn.Parameter:
        return nn.Parameter(part[slots].to(torch.promote_types(part.dtype, torch.float32)))

    left, right, scales = table
    return CoreTable(
        parameter(left), None if right is None else parameter(right), scales[slots].clone()
    )


def on_device(values: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host's as a tensor there, without waiting for the device."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class AdapterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) by adapter, for a `Trainable`.

    A step moves the adapters of the losses (`Trainable.loss`) that were differentiated since the
    last one, each as torch.optim.AdamW would move it alone: with a step count of its own, by which
    its moments are corrected. The others keep weight, moments and count. torch.optim.AdamW would
    move them too, by their old moments and by weight decay, and corrects all moments by one count,
    as torch.optim.SparseAdam does as well.

    Everything is computed on the device, for all adapters of a step at once. State of a Parameter:
    `steps` (adapters,), `exp_avg` and `exp_avg_sq`, like the Parameter. `zero_grad` forgets which
    adapters were in losses, as it forgets their gradients.
    """

    def __init__(
        self,
        trainable: Trainable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is {value}: it must be at least 0 and finite")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}: they must be at least 0 and below 1")
        self.trainable = trainable
        rest = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(trainable.parameters(), {**rest, "adapters": list(trainable.names)})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step of the adapters in the losses since the last.

        Raises RuntimeError where no loss of `Trainable.loss` has been differentiated since.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        present = sorted(self.trainable.present)
        if not present:
            raise RuntimeError(
                "no adapter has been in a loss since the last step: make the loss by "
                "trainable.loss(losses) and call its backward() before optimizer.step()"
            )
        device, everybody = self.trainable.device, len(present) == len(self.trainable.names)
        where = slice(None) if everybody else on_device(present, torch.int64, device)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group, where)
        self.trainable.present.clear()
        return result

    def _move(self, parameter: Tensor, group: dict[str, Any], where: Any) -> None:
        """AdamW of parameter[where]; in torch's order of operations."""
        state = self.state[parameter]
        if not state:
            state["steps"] = parameter.new_zeros(len(parameter))
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        assert parameter.grad is not None
        grad = parameter.grad[where]
        steps, mean, square = (state[name][where] for name in ("steps", "exp_avg", "exp_avg_sq"))
        steps.add_(1)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        count = steps.double()  # in float32, 1 - beta2ᵗ would lose its first digits
        rate = (-lr / (1 - beta1**count)).to(grad.dtype)[:, None, None]
        root = (1 - beta2**count).sqrt().to(grad.dtype)[:, None, None]
        weight = parameter[where] * (1 - lr * decay)
        weight.addcdiv_(mean * rate, (square.sqrt() / root).add_(group["eps"]))
        parameter[where] = weight
        state["steps"][where], state["exp_avg"][where] = steps, mean
        state["exp_avg_sq"][where] = square

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as torch's; the next step is of the adapters in later losses."""
        super().zero_grad(set_to_none)
        self.trainable.present.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as torch's does; raises ValueError for the state of other adapters."""
        if any(g.get("adapters") != self.trainable.names for g in state_dict["param_groups"]):
            raise ValueError(
                "the state is of other adapters, or of these in another order: its param_groups "
                "say of which; start bank.trainable with the same names"
            )
        super().load_state_dict(state_dict)
