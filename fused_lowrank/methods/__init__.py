"""The methods as layers: for each, the reference in plain PyTorch and its fused drop-in.

    initial           first values of factors, what they are made of, a file each
    initial.triples   singular triples of a weight
    initial.values    first values of factors, as functions
    initial.starts    those by the names that rows give them
    initial.bases     frozen factors that a seed determines, for PEFT
    method            a method as a row of data: Factor, Parts, Method
    variants          rows that settings add factors to: DoRA's, what residual inits started as
    tensors           tensors that are sharded, or on the meta device
    dora              DoRA's norms, and the gain that is made of them and a magnitude
    keywords          keywords that all layers take, those by other names, integers of any kind
    accept            which linear layers can be adapted; what is taken over from them
    shared            factors that all layers of a model have in common
    state             what a state_dict of a layer means, merged or not
    computer          the slot of a layer for who computes it in its place
    merging           W, and W + ΔW in its place
    layer             what all layers have in common
    over              layers around modules whose weight is no plain matrix
    family            the methods themselves, one a file
    family.lora
    family.lora_fa
    family.lora_xs
    family.lora_mini
    family.tied_lora
    family.melora
    family.nola
    family.adalora
    family.vera

A module imports those above it in this list.
"""

from collections.abc import Mapping
from typing import Any

from .family.adalora import AdaLoraLinear, FusedAdaLoraLinear
from .family.lora import FusedLoraLinear, LoraLinear
from .family.lora_fa import FusedLoraFALinear, LoraFALinear
from .family.lora_mini import FusedLoraMiniLinear, LoraMiniLinear
from .family.lora_xs import FusedLoraXSLinear, LoraXSLinear
from .family.melora import FusedMeloraLinear, MeloraLinear
from .family.nola import FusedNolaLinear, NolaLinear
from .family.tied_lora import FusedTiedLoraLinear, TiedLoraLinear
from .family.vera import FusedVeraLinear, VeraLinear
from .layer import LowRankLinear
from .method import Method
from .over import OverBase
from .variants import variant

# method → (reference layer, fused layer)
METHODS: dict[str, tuple[type[LowRankLinear], type[LowRankLinear]]] = {
    cls.method: (cls, fused)
    for cls, fused in (
        (LoraLinear, FusedLoraLinear),
        (LoraXSLinear, FusedLoraXSLinear),
        (LoraMiniLinear, FusedLoraMiniLinear),
        (LoraFALinear, FusedLoraFALinear),
        (VeraLinear, FusedVeraLinear),
        (TiedLoraLinear, FusedTiedLoraLinear),
        (MeloraLinear, FusedMeloraLinear),
        (NolaLinear, FusedNolaLinear),
        (AdaLoraLinear, FusedAdaLoraLinear),
    )
}

DORA = "dora"  # the name of LoRA with it


def named(method: Any, keywords: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(method, keywords) as METHODS and its layers know them; raises for an unknown method."""
    names = ", ".join([*METHODS, DORA])
    if not isinstance(method, str):
        raise TypeError(
            f"method is a {type(method).__name__}: it must be a name, one of {names}; "
            "a config of PEFT's goes to peft.get_peft_model"
        )
    if method == DORA:
        if keywords.get(DORA, True) is not True:
            raise ValueError(f"dora is {keywords[DORA]!r}, but method is 'dora': take 'lora'")
        return "lora", {**keywords, DORA: True}
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: it must be one of {names}")
    return method, dict(keywords)


def row_of(entry: Mapping[str, Any]) -> Method:
    """The row of a layer as files describe it, by its method and settings."""
    return variant(METHODS[entry["method"]][0].row, entry["settings"])


LowRankLinear.over = staticmethod(OverBase.of)

__all__ = [cls.__name__ for pair in METHODS.values() for cls in pair]
