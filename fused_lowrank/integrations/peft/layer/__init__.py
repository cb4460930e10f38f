"""The layers of PEFT: a linear layer and adapters on it, of two kinds.

    state     what a state_dict means for a layer
    weight    the base's weight, merged or not
    base      what all layers have in common
    cores     adapters that are cores, between one pair of frozen factors for a layer
    own       adapters with factors of their own, which all layers may share
    over      both kinds around a module whose W is no plain matrix

A module imports those above it in this list.
"""

from .base import Factors, PeftLowRankLinear, layers_of
from .cores import PeftCoreLinear
from .over import PeftOverBase, has_matrix, layer_for, of_base
from .own import PeftOwnLinear, share, share_unsaved

__all__ = [
    "Factors",
    "PeftCoreLinear",
    "PeftLowRankLinear",
    "PeftOverBase",
    "PeftOwnLinear",
    "has_matrix",
    "layer_for",
    "layers_of",
    "of_base",
    "share",
    "share_unsaved",
]
