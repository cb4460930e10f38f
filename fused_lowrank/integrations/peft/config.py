"""The configurations of the methods, as PEFT's users expect them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig, PeftType
from torch import Tensor, nn

from ...methods.family.lora_fa import LORA_FA
from ...methods.family.lora_mini import LORA_MINI
from ...methods.family.lora_xs import LORA_XS
from ...methods.family.melora import MELORA
from ...methods.family.nola import NOLA
from ...methods.family.tied_lora import TIED_LORA
from ...methods.initial.starts import FILLS
from ...methods.keywords import integer, seed
from ...methods.method import Method
from ...models.patterns import check_layers, check_number, check_rank
from ...models.targets import matches
from . import registry  # noqa: F401 - adds the members of PeftType that are used below

NOT_SUPPORTED = {  # fields of PEFT's LoraConfig that are here to be refused
    "trainable_token_indices": (
        'train the whole embedding by modules_to_save=["embed_tokens"], or take PEFT\'s LoraConfig'
    ),
    "target_parameters": (
        "only nn.Linear and transformers' Conv1D have adapters, not Parameters such as experts "
        "of a mixture; name linear layers in target_modules, or take PEFT's LoraConfig"
    ),
}


@dataclass
class LowRankConfig(PeftConfig):
    """The settings that the configurations of all methods share.

    Args:
        r: rank of what is trained. A rank above a layer's smaller side is taken down to it, with
            one warning; the scaling keeps the one that was asked for.
        lora_alpha: scaling = lora_alpha / r; None: r, which makes the scaling 1.
        lora_dropout: probability with which an element of the input is zeroed on the low-rank path.
        target_modules: names of modules or their last parts, a regular expression that matches
            whole names, or "all-linear"; None: PEFT's choice for LoRA in this architecture.
        exclude_modules: names, or a regular expression, of modules to leave alone.
        bias: which biases are trained as well: "none", "all", or those of the adapted layers:
            "lora_only", or "lora_xs_only" with a method's own name.
        fan_in_fan_out: whether weights are stored (in, out), as transformers' Conv1D does.
        use_rslora: scaling = lora_alpha / √r (Kalajdzievski 2023, arXiv 2312.03732).
        rank_pattern: other ranks, for modules whose names match the key.
        alpha_pattern: other lora_alpha, for modules whose names match the key.
        layers_to_transform: the indices of the layers to adapt.
        layers_pattern: the name of the nn.ModuleList that these count.
        modules_to_save: modules to train whole and to save with the adapter.
        ensure_weight_tying: whether embeddings in modules_to_save and what is tied to them stay
            tied; without, PEFT trains copies of those named alone.
        trainable_token_indices, target_parameters: not supported; None, or an error says so.
        use_dora: DoRA (Liu et al. 2024, arXiv 2402.09353): each layer trains a magnitude (out,) as
            well, and its outputs, less the bias, are multiplied by that over the norms of the rows
            of W + ΔW, which are constants in the gradient. Dropout acts on the low-rank path alone.
        init_weights: True and "identity": the adapted model starts as the base model, and learns
            at once; False: random, and far from it; the words that a method has besides are its
            own.

    Raises:
        ValueError: a number out of range; an unknown `bias` or `init_weights`; `layers_pattern`
            without `layers_to_transform`, or this with a target_modules that is no list; a
            `rank_pattern` where all layers share one rank.
    """

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None
    ensure_weight_tying: bool = False
    init_weights: bool | str = True
    use_dora: bool = False

    row: ClassVar[Method]
    method: ClassVar[str]  # the row's name
    ranks: ClassVar[tuple[str, ...]]  # of the row
    words: ClassVar[tuple[str, ...]]  # that `init_weights` may be

    def __init_subclass__(cls, row: Method | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if row is not None:
            cls.row, cls.method, cls.ranks = row, row.name, tuple(row.ranks)
            drawn = [word for word in row.inits_known if {*row.inits(word).values()} <= {*FILLS}]
            cls.words = ("identity", *(["paper"] if row.bases else drawn))

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.peft_type = PeftType(self.method.upper())
        self.modules_to_tie = None  # of this model, by PEFT; not in files
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for name in self.ranks:
            setattr(self, name, check_rank(name, getattr(self, name)))
        self.rank_pattern = {
            key: check_rank(f"rank_pattern[{key!r}]", r) for key, r in self.rank_pattern.items()
        }
        if self.lora_alpha is not None:
            self.lora_alpha = check_number("lora_alpha", self.lora_alpha)
        self.alpha_pattern = {
            key: check_number(f"alpha_pattern[{key!r}]", a) for key, a in self.alpha_pattern.items()
        }
        check_layers(self.target_modules, self.layers_to_transform, self.layers_pattern)
        if isinstance(self.layers_to_transform, list | tuple):
            own = [integer("layers_to_transform", layer) for layer in self.layers_to_transform]
            self.layers_to_transform = own
        elif self.layers_to_transform is not None:
            self.layers_to_transform = integer("layers_to_transform", self.layers_to_transform)
        for name, value in self.row.options.items():
            if isinstance(value, int):
                setattr(self, name, seed(name, getattr(self, name)))
        if self.row.shared and self.rank_pattern:
            raise ValueError(
                f"rank_pattern is {self.rank_pattern!r}: all layers of {self.method} share factors "
                "of one rank, r"
            )
        if not isinstance(self.use_dora, bool):
            raise ValueError(f"use_dora is {self.use_dora!r}: it must be True or False")
        for name, instead in NOT_SUPPORTED.items():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is not supported by {self.method}: {instead}")
        self.lora_dropout = float(check_number("lora_dropout", self.lora_dropout))
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"lora_dropout is {self.lora_dropout}: it must be at least 0 and below 1"
            )
        if self.bias not in (biases := ("none", "all", "lora_only", f"{self.method}_only")):
            raise ValueError(f"bias is {self.bias!r}: it must be one of {', '.join(biases)}")
        if not (isinstance(self.init_weights, bool) or self.init_weights in self.words):
            *first, last = map(repr, self.words)
            known = f"{', '.join(['a bool', *first])} or {last}"
            raise ValueError(f"init_weights is {self.init_weights!r}: it must be {known}")


@dataclass
class BasesConfig(LowRankConfig):
    """The settings of the methods whose adapters are between frozen factors of a layer.

    Args:
        init_weights: also "paper": as published.
        save_projection: whether files carry the frozen factors. Without, these are made again from
            the weights and `projection_seed`, and checked against a fingerprint in the file.
        projection_seed: of the randomised SVD (LoRA-XS), or of the random factors (LoRA-Mini).

    Other fields: `LowRankConfig`.
    """

    save_projection: bool = True
    projection_seed: int = 42

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.projection_seed = seed("projection_seed", self.projection_seed)
        if not self.save_projection:
            warnings.warn(
                "save_projection=False: files hold a fingerprint of the frozen factors, not these; "
                "other hardware may not be able to make the same ones",
                stacklevel=3,
            )


@dataclass
class LoraXSConfig(BasesConfig, row=LORA_XS):
    """LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): a trained core between frozen bases.

    y = x·Wᵀ + bias + scaling · ((x·downᵀ)·core)·upᵀ,   W = S·Σ·Dᵀ,   down = Σᵣ·Dᵣᵀ,   up = Sᵣ

    core (r, r) is all that is trained. down and up are shared by all adapters of a layer.
    init_weights: True and "identity": core 0; "paper": N(0, 1e-5²). Fields: `BasesConfig`.
    """


@dataclass
class LoraMiniConfig(BasesConfig, row=LORA_MINI):
    """LoRA-Mini (Singh et al. 2024, arXiv 2411.15804): two trained factors between two frozen ones.

    y = x·Wᵀ + bias + scaling · x·Aaux·Atrain·Btrain·Baux

    Atrain (a, r) and Btrain (r, b) are trained. Aaux (in, a) and Baux (b, out) are random, and
    shared by all adapters of a layer. init_weights: True and "identity": Btrain is 0; "paper":
    all four Kaiming-uniform. a and b are taken down to the layer's sides where they are above.
    Other fields: `BasesConfig`.
    """

    r: int = 8
    a: int = 64
    b: int = 64


@dataclass
class LoraFAConfig(LowRankConfig, row=LORA_FA):
    """LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): LoRA whose down is frozen as it starts.

    y = x·Wᵀ + bias + scaling · (x·downᵀ)·upᵀ

    down (r, in) is random, and frozen; up (out, r) starts at 0 and is trained. init_weights
    "kaiming" and "gaussian" say how down starts, True: the first. Fields: `LowRankConfig`.
    """


@dataclass
class TiedLoraConfig(LowRankConfig, row=TIED_LORA):
    """Tied-LoRA (Renduchintala et al. 2023, arXiv 2311.09578): all layers train one pair.

    y = x·Wᵀ + bias + scaling · v ⊙ (((x·downᵀ) ⊙ u)·upᵀ)

    An adapter has one down (r, K) and one up (N, r), of the largest sides of its layers, and in
    each layer u (r,) and v (out,). r may be more than a layer's sides, and is one for all: there is
    no rank_pattern. Other fields: `LowRankConfig`.
    """


@dataclass
class MeloraConfig(LowRankConfig, row=MELORA):
    """MELoRA (Ren et al. 2024, arXiv 2402.17263): n small LoRAs side by side.

    y = x·Wᵀ + bias + scaling · (x·downᵀ)·upᵀ, where down and up are block-diagonal

    down (n · r, in / n) and up (out, r) are trained. n must divide both sides of every layer.
    Other fields: `LowRankConfig`.
    """

    r: int = 4
    n: int = 4


@dataclass
class NolaConfig(LowRankConfig, row=NOLA):
    """NOLA (Koohpayegani et al. 2024, arXiv 2310.02556): factors that are mixtures of random ones.

    y = x·Wᵀ + bias + scaling · (x·downᵀ)·upᵀ,    down = Σᵢ aᵢ·Aᵢ,   up = Σᵢ bᵢ·Bᵢ

    a (m,) and b (m,) are trained, and all that files have: A (m, r, K) and B (m, N, r), which the
    layers of an adapter share, come from `seed`. r may be more than a layer's sides, and is one for
    all: there is no rank_pattern. Other fields: `LowRankConfig`.
    """

    m: int = 64
    seed: int = 0


CONFIGS = (LoraXSConfig, LoraMiniConfig, LoraFAConfig, TiedLoraConfig, MeloraConfig, NolaConfig)


def check_mix(
    configs: Mapping[str, LowRankConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    """Raise ValueError if adapters have no sum, or none under this name; `configs` are by name."""
    if combination_type != "linear":
        raise ValueError(
            f"combination_type is {combination_type!r}: it must be 'linear', which is exact"
        )
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(
            f"there are {len(adapters)} adapters and {len(weights)} weights: give one for each"
        )
    for name in adapters:
        if name not in configs:
            raise ValueError(f"Adapter {name} does not exist")
        if configs[name].bias != "none" or configs[name].modules_to_save:
            raise ValueError(f"{name} has biases or modules_to_save: these cannot be mixed")
        if configs[name].use_dora:
            raise ValueError(
                f"{name} is with use_dora: what it adds to W is no core, and has no sum of its own "
                "kind; activate several at once, model.base_model.set_adapter([…]), or merge them"
            )
    if adapter_name in configs:
        raise ValueError(f"Adapter {adapter_name} exists already: choose another name")


def config_of_mix(
    model: nn.Module, sources: Sequence[LowRankConfig], mixed: dict[str, tuple[Tensor, ...]]
) -> LowRankConfig:
    """The configuration that gives a new adapter a mixture's shapes and scaling 1.

    `sources` are those of the adapters that it is of; `mixed` is its factors, by module.
    """
    config = copy.deepcopy(sources[0])
    ranks = {key: factors[0].shape[1] for key, factors in mixed.items()}
    config.r, config.lora_alpha, config.use_rslora = max(ranks.values()), None, False
    # From its beginning, for a pattern matches the end of a longer name as well.
    config.rank_pattern = {f"^{re.escape(k)}": r for k, r in ranks.items() if r != config.r}
    config.alpha_pattern = {}
    for name in config.ranks[1:]:
        setattr(config, name, max(getattr(source, name) for source in sources))
    config.target_modules = set(mixed)
    keys = [key for key, _ in model.named_modules() if key not in mixed]
    if any(matches(key, config.target_modules) for key in keys):
        config.target_modules = "|".join(map(re.escape, mixed))
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config
