"""accelerate's offloading of modules of which some tensors stay where they are.

Imported where a module has a hook of accelerate, and so accelerate is there.
"""

from __future__ import annotations

from typing import Any

from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from torch import nn


class PartHook(AlignDevicesHook):
    """An offloading hook that takes and brings the tensors of some names, and of no others.

    accelerate's own works on all of a module's tensors: it is given a module that has these alone.
    """

    def __init__(self, hook: AlignDevicesHook, names: frozenset[str]) -> None:
        self.__dict__.update(vars(hook))
        self.names, self._part = names, nn.Module()
        devices: dict[str, Any] = vars(hook)["original_devices"]
        self.original_devices = {n: device for n, device in devices.items() if n in names}

    @classmethod
    def in_place_of(
        cls, hook: AlignDevicesHook, module: nn.Module, stay: frozenset[str]
    ) -> PartHook:
        """The hook for all tensors but those that stay; of these, what it has taken is put back."""
        for name in stay:
            own: Any = getattr(module, name)
            if own is None or not own.is_meta:
                continue
            if name not in hook.weights_map:
                raise ValueError(
                    f"{name} of a {type(module).__name__} is not among the weights that were "
                    "offloaded: adapt, or load the adapter, after offloading"
                )
            # A copy: it is going to be trained, and what lies there is never written to.
            value = hook.weights_map[name].to(hook.execution_device, own.dtype, copy=True)
            if isinstance(own, nn.Parameter):
                value = nn.Parameter(value, requires_grad=own.requires_grad)
            setattr(module, name, value)
        return cls(hook, getattr(hook, "names", frozenset(module._parameters)) - stay)

    @classmethod
    def carried(cls, hook: AlignDevicesHook, module: Any, names: frozenset[str]) -> None:
        """Have the tensors of these names brought to the module by what the hook has; they are
        taken away now.
        """
        stay = frozenset(module.stays()) if hasattr(module, "stays") else frozenset()
        new = cls(hook, (names & frozenset(module._parameters)) - stay)
        hook = getattr(module, "_hf_hook", None)
        if hook is None:
            add_hook_to_module(module, ModelHook())
        # Not by accelerate, which would take the tensors away anew.
        others = () if hook is None else getattr(hook, "hooks", (hook,))
        module._hf_hook = SequentialHook(*others, new) if others else new
        new.pre_forward(module)
        new.post_forward(module, None)

    def _lent(self, module: nn.Module) -> nn.Module:
        self._part._parameters = {
            name: own
            for name, own in module._parameters.items()
            if name in self.names and own is not None
        }
        return self._part

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Prepare the module, as accelerate does where hooks are put together anew."""
        super().init_hook(self._lent(module))
        module._parameters.update(self._part._parameters)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Bring the tensors."""
        given = super().pre_forward(self._lent(module), *args, **kwargs)
        module._parameters.update(self._part._parameters)
        return given

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Take them away."""
        output = super().post_forward(self._lent(module), output)
        module._parameters.update(self._part._parameters)
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Bring them for good."""
        super().detach_hook(self._lent(module))
        module._parameters.update(self._part._parameters)
        return module
