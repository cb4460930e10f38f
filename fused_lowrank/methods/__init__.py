"""The methods as layers: for each, the reference in plain PyTorch and its fused drop-in."""

from .base import LowRankLinear
from .lora import FusedLoraLinear, LoraLinear
from .lora_mini import FusedLoraMiniLinear, LoraMiniLinear
from .lora_xs import FusedLoraXSLinear, LoraXSLinear

# method → (reference layer, fused layer)
METHODS: dict[str, tuple[type[LowRankLinear], type[LowRankLinear]]] = {
    "lora": (LoraLinear, FusedLoraLinear),
    "lora_xs": (LoraXSLinear, FusedLoraXSLinear),
    "lora_mini": (LoraMiniLinear, FusedLoraMiniLinear),
}
