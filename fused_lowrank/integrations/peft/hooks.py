"""Whether a module's call is its forward, and nothing else happens in it."""

from torch import nn

from ...methods.accept import is_replaced


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, offloading."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and is_replaced(module))
    )
