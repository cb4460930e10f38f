"""The layers of the methods in PEFT, each generated from its row."""

from __future__ import annotations

from ...methods.family.lora_mini import LORA_MINI
from ...methods.family.lora_xs import LORA_XS
from .layer import PeftLowRankLinear


class PeftLoraXSLinear(PeftLowRankLinear, row=LORA_XS):
    """LoRA-XS: a core (r, r) between the leading singular vectors of the weight."""


class PeftLoraMiniLinear(PeftLowRankLinear, row=LORA_MINI):
    """LoRA-Mini: a core that is the product of (a, r) and (r, b), between random factors."""
