"""The kinds of checkpoints that a function may be called by."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Call = Callable[[Tensor], Tensor]


CHECKPOINTS: dict[str, Callable[[Call, Tensor], Tensor]] = {
    "reentrant": lambda call, x: checkpoint(call, x, use_reentrant=True),
    "not reentrant": lambda call, x: checkpoint(call, x, use_reentrant=False),
    "nested": lambda call, x: checkpoint(
        lambda h: checkpoint(call, h, use_reentrant=False), x, use_reentrant=False
    ),
    "nested, reentrant": lambda call, x: checkpoint(
        lambda h: checkpoint(call, h, use_reentrant=True), x, use_reentrant=True
    ),
}
