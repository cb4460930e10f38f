"""LoRA-XS and LoRA-Mini as methods of PEFT.

Importing this registers them:

    import peft
    from fused_lowrank.integrations.peft import LoraXSConfig

    model = peft.get_peft_model(model, LoraXSConfig(r=16, target_modules="all-linear"))

Raises ImportError if PEFT lacks something that is used here, naming it.
"""

from peft.utils import register_peft_method

from .config import LoraMiniConfig, LoraXSConfig
from .conversion import convert_to_lora, save_as_lora
from .model import LoraMiniModel, LoraXSModel

for _config, _model in ((LoraXSConfig, LoraXSModel), (LoraMiniConfig, LoraMiniModel)):
    register_peft_method(
        name=_config.method, config_cls=_config, model_cls=_model, prefix=_model.prefix
    )

__all__ = [
    "LoraMiniConfig",
    "LoraMiniModel",
    "LoraXSConfig",
    "LoraXSModel",
    "convert_to_lora",
    "save_as_lora",
]
