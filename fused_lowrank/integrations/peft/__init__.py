"""The methods that PEFT lacks as methods of PEFT, and its own LoRA through the fused kernels.

Importing this registers the methods:

    import peft
    from fused_lowrank.integrations.peft import LoraXSConfig, fuse_lora

    model = peft.get_peft_model(model, LoraXSConfig(r=16, target_modules="all-linear"))
    model = fuse_lora(peft.get_peft_model(model, peft.LoraConfig(r=16, …)))

Raises ImportError if PEFT lacks something that is used here, naming it.
"""

from peft.utils import register_peft_method

from .config import (
    CONFIGS,
    LoraFAConfig,
    LoraMiniConfig,
    LoraXSConfig,
    MeloraConfig,
    NolaConfig,
    TiedLoraConfig,
)
from .conversion import convert_to_lora, save_as_lora
from .lora import fuse_lora, unfuse_lora
from .methods import (
    MODELS,
    LoraFAModel,
    LoraMiniModel,
    LoraXSModel,
    MeloraModel,
    NolaModel,
    TiedLoraModel,
)
from .whole import wrap

wrap()
for _config, _model in zip(CONFIGS, MODELS, strict=True):
    register_peft_method(
        name=_config.method, config_cls=_config, model_cls=_model, prefix=_model.prefix
    )

__all__ = [
    "LoraFAConfig",
    "LoraFAModel",
    "LoraMiniConfig",
    "LoraMiniModel",
    "LoraXSConfig",
    "LoraXSModel",
    "MeloraConfig",
    "MeloraModel",
    "NolaConfig",
    "NolaModel",
    "TiedLoraConfig",
    "TiedLoraModel",
    "convert_to_lora",
    "fuse_lora",
    "save_as_lora",
    "unfuse_lora",
]
