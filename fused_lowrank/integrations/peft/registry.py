"""The parts of PEFT that the methods need, and their names in PeftType."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import peft
from peft import PeftType
from peft.tuners import tuners_utils

from ...methods.family.lora_fa import LORA_FA
from ...methods.family.lora_mini import LORA_MINI
from ...methods.family.lora_xs import LORA_XS
from ...methods.family.melora import MELORA
from ...methods.family.nola import NOLA
from ...methods.family.tied_lora import TIED_LORA

TESTED = "0.21.2"
ROWS = (LORA_XS, LORA_MINI, LORA_FA, TIED_LORA, MELORA, NOLA)  # that this package brings to PEFT
METHODS = tuple(row.name.upper() for row in ROWS)


def takes(function: Callable[..., Any], *names: str) -> bool:
    """Whether a function takes arguments of these names."""
    return set(names) <= set(inspect.signature(function).parameters)


def probe() -> None:
    """Raise ImportError if PEFT lacks something that is used here, naming it."""
    tuner: Any = getattr(tuners_utils, "BaseTuner", None)
    layer: Any = getattr(tuners_utils, "BaseTunerLayer", None)
    parts = {
        "peft.utils.register_peft_method": lambda: takes(
            peft.utils.register_peft_method, "name", "config_cls", "model_cls", "prefix"
        ),
        "peft.tuners.tuners_utils.check_adapters_to_merge": lambda: callable(
            tuners_utils.check_adapters_to_merge
        ),
        "peft.tuners.tuners_utils._maybe_include_all_linear_layers": lambda: callable(
            tuners_utils._maybe_include_all_linear_layers
        ),
        "BaseTuner._prepare_model(peft_config, model)": lambda: takes(
            tuner._prepare_model, "peft_config", "model"
        ),
        "peft.utils.other.get_pattern_key": lambda: callable(peft.utils.other.get_pattern_key),
        "peft.utils.other.AuxiliaryTrainingWrapper": lambda: inspect.isclass(
            peft.utils.other.AuxiliaryTrainingWrapper
        ),
        "BaseTuner._create_and_replace(peft_config, adapter_name, target, …)": lambda: takes(
            tuner._create_and_replace, "peft_config", "adapter_name", "target", "target_name"
        ),
        "BaseTuner._get_adapter_state_dict(model, config, …)": lambda: takes(
            tuner._get_adapter_state_dict, "model", "config", "adapter_name", "state_dict"
        ),
        "BaseTuner._remap_adapter_state_dict_for_load(model, config, …)": lambda: takes(
            tuner._remap_adapter_state_dict_for_load, "model", "config", "adapter_name"
        ),
        "BaseTunerLayer.set_adapter(adapter_names, inference_mode)": lambda: takes(
            layer.set_adapter, "adapter_names", "inference_mode"
        ),
        "BaseTunerLayer._move_adapter_to_device_of_base_layer": lambda: takes(
            layer._move_adapter_to_device_of_base_layer, "adapter_name", "device"
        ),
        f"a PeftType without {' and '.join(METHODS)}": lambda: (
            not any(name in PeftType.__members__ for name in METHODS)
        ),
    }
    missing = []
    for name, present in parts.items():
        try:
            found = present()
        except (AttributeError, TypeError):
            found = False
        if not found:
            missing.append(name)
    if missing:
        raise ImportError(
            f"PEFT {peft.__version__} is not as fused_lowrank.integrations.peft needs it; it was "
            f"tested with {TESTED}. Missing: {'; '.join(missing)}"
        )


def add_member(name: str) -> None:
    """Add a member to the closed enum PeftType, whose value is its name."""
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)


probe()
for _name in METHODS:
    add_member(_name)
