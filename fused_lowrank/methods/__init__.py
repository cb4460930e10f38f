"""The methods as layers: for each, the reference in plain PyTorch and its fused drop-in.

    triples           singular triples of a weight
    initialisers      first values of factors, by name
    keywords          keywords that all layers take, those by other names, integers of any kind
    tensors           tensors that are sharded, or on the meta device
    accept            which linear layers can be adapted; what is taken over from them
    state             what a state_dict of a layer means, merged or not
    computer          the slot of a layer for who computes it in its place
    merging           W, and W + ΔW in its place
    layer             what all layers have in common
    lora, lora_xs     the methods themselves, one a file
    lora_mini

A module imports those above it in this list.
"""

from .layer import LowRankLinear
from .lora import FusedLoraLinear, LoraLinear
from .lora_mini import FusedLoraMiniLinear, LoraMiniLinear
from .lora_xs import FusedLoraXSLinear, LoraXSLinear

# method → (reference layer, fused layer)
METHODS: dict[str, tuple[type[LowRankLinear], type[LowRankLinear]]] = {
    "lora": (LoraLinear, FusedLoraLinear),
    "lora_xs": (LoraXSLinear, FusedLoraXSLinear),
    "lora_mini": (LoraMiniLinear, FusedLoraMiniLinear),
}
