"""Low-rank adapter layers on fused Triton kernels: LoRA-XS, LoRA-Mini and LoRA.

    y = x·Wᵀ + bias + scale · ((x·downᵀ) · core) · upᵀ

Importing this initialises no GPU and needs no Triton.
"""

from . import methods
from .bank import AdapterBank
from .config import use_batch_invariance
from .context.declared import declare_rows
from .explain import Explanation, explain
from .files.adapter import load_adapter, save_adapter
from .files.lora_export import export_lora
from .files.official import load_official_lora_xs
from .files.peft_export import export_peft
from .functional import lowrank_linear
from .methods import *  # noqa: F403 - the layers of every method
from .models.adapt import adapt, disable_adapters, init_bases, merge, unload, unmerge
from .models.budget import RankBudget, orthogonality
from .models.groups import parameter_groups
from .models.restarts import merge_and_restart

__version__ = "0.1.0"
__all__ = [
    "AdapterBank",
    "Explanation",
    "RankBudget",
    "adapt",
    "declare_rows",
    "disable_adapters",
    "explain",
    "export_lora",
    "export_peft",
    "init_bases",
    "load_adapter",
    "load_official_lora_xs",
    "lowrank_linear",
    "merge",
    "merge_and_restart",
    "orthogonality",
    "parameter_groups",
    "save_adapter",
    "unload",
    "unmerge",
    "use_batch_invariance",
]
__all__ += methods.__all__
