"""The names that the modules of `methods` had before, which models saved whole refer to.

torch.save writes a layer's class as `fused_lowrank.layers.lora_xs.FusedLoraXSLinear`, say.
"""

import sys

from ..methods import METHODS as METHODS
from ..methods import LowRankLinear as LowRankLinear
from ..methods import lora, lora_mini, lora_xs

for _module in (lora, lora_mini, lora_xs):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
