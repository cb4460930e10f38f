"""Whether a module's call is its forward, and nothing else happens in it."""

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, offloading."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and is_replaced(module))
    )


def is_replaced(module: nn.Module) -> bool:
    """Whether the module's forward is not its class's: accelerate's hooks replace it.

    They leave the class's own behind where they are removed.
    """
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward
