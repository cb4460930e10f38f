"""The methods in PEFT: a layer and a tuner each, generated from the row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.functional import pad

from ...methods.family.lora_fa import LORA_FA
from ...methods.family.lora_mini import LORA_MINI
from ...methods.family.lora_xs import LORA_XS
from ...methods.family.melora import MELORA
from ...methods.family.nola import NOLA
from ...methods.family.tied_lora import TIED_LORA
from ...models.unchanged import unchanged_on_error
from . import files
from .config import BasesConfig, check_mix, config_of_mix
from .layer import PeftCoreLinear, PeftOwnLinear, layers_of
from .model import LowRankModel, Tensors
from .whole import check_name


class CoreModel(LowRankModel):
    """A model whose adapters are cores, which have exact sums."""

    def _check_new_adapter_config(self, config: BasesConfig) -> None:
        super()._check_new_adapter_config(config)
        for other in self.peft_config.values():
            if other.projection_seed != config.projection_seed:
                raise ValueError(
                    f"projection_seed is {config.projection_seed}, but {other.projection_seed} of "
                    "the adapters that are there, and all of a layer share its frozen factors"
                )

    @classmethod
    def to_file(
        cls, model: nn.Module, config: Any, adapter: str, tensors: Tensors, state: Tensors
    ) -> Tensors:
        """The tensors of an adapter's file, of those that are its own; `state` is the model's."""
        return files.to_save(model, adapter, tensors, state, config.save_projection)

    @classmethod
    def from_file(cls, model: nn.Module, adapter: str, tensors: Tensors) -> Tensors:
        """The tensors to load, by the model's keys, of those that an adapter's file holds."""
        return files.to_load(model, adapter, tensors)

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter that is Σ weights[i] · adapters[i], exactly, for their bases are the same.

        Its scaling is 1. A core of LoRA-XS is the sum of theirs, as wide as the widest; the factors
        of LoRA-Mini are theirs side by side: its rank is the sum of theirs, and at most a and b.

        Raises:
            ValueError: an adapter that does not exist, or is there already; not one weight for
                each; a combination_type other than "linear"; adapters with biases or
                modules_to_save, which have no sum; a name that an adapter cannot have. Whatever
                is raised, the model is as it was.
        """
        check_name(adapter_name)
        check_mix(self.peft_config, adapters, weights, adapter_name, combination_type)
        shares = list(zip(adapters, weights, strict=True))
        mixed = {}
        layers: Iterator[Any] = layers_of(self.model)
        for layer in layers:
            if own := [(name, weight) for name, weight in shares if name in layer.scaling]:
                mixed[layer.key] = layer.mix(own)
        if not mixed:
            raise ValueError(f"{', '.join(adapters)} are in no layer: there is nothing to mix")
        with unchanged_on_error(self):
            sources = [self.peft_config[name] for name in adapters]
            self.peft_config[adapter_name] = config_of_mix(self.model, sources, mixed)
            self.inject_adapter(self.model, adapter_name)
            self._cast_adapter_dtype(adapter_name)
            made: Iterator[Any] = layers_of(self.model, adapter_name)
            for layer in made:
                for name, value in zip(layer.core_names, mixed[layer.key], strict=True):
                    own = getattr(layer, name)[adapter_name]
                    rows, columns = (a - b for a, b in zip(own.shape, value.shape, strict=True))
                    own.copy_(pad(value, (0, columns, 0, rows)))


class OwnModel(LowRankModel):
    """A model whose adapters have factors of their own."""

    @classmethod
    def to_file(
        cls, model: nn.Module, config: Any, adapter: str, tensors: Tensors, state: Tensors
    ) -> Tensors:
        """The tensors of an adapter's file, of those that are its own; a shared one is in it once.

        Raises ValueError for tensors of which this process has but a part.
        """
        return files.own_to_save(model, adapter, tensors)

    @classmethod
    def from_file(cls, model: nn.Module, adapter: str, tensors: Tensors) -> Tensors:
        """The tensors to load, by the model's keys: a shared one for each of the layers.

        Raises ValueError for a file of other ranks, or of a model of other sizes.
        """
        return files.own_to_load(model, adapter, tensors)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT makes new Parameters, all of them trained, and of a shared one several.
        if autocast_adapter_dtype:
            layers: Iterator[Any] = layers_of(self.model, adapter_name)
            for layer in layers:
                layer.widen(adapter_name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ValueError: these adapters have no sum that is one of them."""
        raise ValueError(
            f"adapters of {self.tuner_layer_cls.row.name} have no exact sum of their own kind: "
            "activate several at once, model.base_model.set_adapter([…]), or merge them; those of "
            "LoraXSConfig and LoraMiniConfig can be mixed"
        )


class PeftLoraXSLinear(PeftCoreLinear, row=LORA_XS):
    """LoRA-XS: a core (r, r) between the leading singular vectors of the weight."""


class LoraXSModel(CoreModel, layer=PeftLoraXSLinear):
    """A model with adapters of LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604): PEFT's tuner.

    `peft.get_peft_model(model, LoraXSConfig(…))` makes it; `LoraXSConfig` has the equation.
    """


class PeftLoraMiniLinear(PeftCoreLinear, row=LORA_MINI):
    """LoRA-Mini: a core that is the product of (a, r) and (r, b), between random factors."""


class LoraMiniModel(CoreModel, layer=PeftLoraMiniLinear):
    """A model with adapters of LoRA-Mini (Singh et al. 2024, arXiv 2411.15804): PEFT's tuner.

    `peft.get_peft_model(model, LoraMiniConfig(…))` makes it; `LoraMiniConfig` has the equation.
    """


class PeftLoraFALinear(PeftOwnLinear, row=LORA_FA):
    """LoRA-FA: a frozen down (r, in) and a trained up (out, r)."""


class LoraFAModel(OwnModel, layer=PeftLoraFALinear):
    """A model with adapters of LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): PEFT's tuner.

    `peft.get_peft_model(model, LoraFAConfig(…))` makes it; `LoraFAConfig` has the equation.
    """


class PeftTiedLoraLinear(PeftOwnLinear, row=TIED_LORA):
    """Tied-LoRA: u (r,) and v (out,) around down and up, which all layers of an adapter share."""


class TiedLoraModel(OwnModel, layer=PeftTiedLoraLinear):
    """A model with adapters of Tied-LoRA (Renduchintala et al. 2023, arXiv 2311.09578).

    PEFT's tuner: `peft.get_peft_model(model, TiedLoraConfig(…))` makes it; `TiedLoraConfig` has the
    equation.
    """


class PeftMeloraLinear(PeftOwnLinear, row=MELORA):
    """MELoRA: the blocks of down and up, both block-diagonal."""


class MeloraModel(OwnModel, layer=PeftMeloraLinear):
    """A model with adapters of MELoRA (Ren et al. 2024, arXiv 2402.17263): PEFT's tuner.

    `peft.get_peft_model(model, MeloraConfig(…))` makes it; `MeloraConfig` has the equation.
    """


class PeftNolaLinear(PeftOwnLinear, row=NOLA):
    """NOLA: coefficients a (m,) and b (m,) of random factors, which a seed determines."""


class NolaModel(OwnModel, layer=PeftNolaLinear):
    """A model with adapters of NOLA (Koohpayegani et al. 2024, arXiv 2310.02556): PEFT's tuner.

    `peft.get_peft_model(model, NolaConfig(…))` makes it; `NolaConfig` has the equation.
    """


MODELS = (LoraXSModel, LoraMiniModel, LoraFAModel, TiedLoraModel, MeloraModel, NolaModel)
