"""Put adapted layers into a model, and take them out again."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..context.called import refuse_passed_over, watch_gradients
from ..context.disabling import disabled
from ..context.elsewhere import sharder_in
from ..context.learns import warn_of_narrow, warn_of_nothing_learned
from ..context.readers import leave_fast_paths, restore_fast_paths
from ..methods import METHODS, LowRankLinear, named
from ..methods.accept import clashes, sides_of
from ..methods.dora import check_rows
from ..methods.initial.values import Inputs
from ..methods.keywords import check_keywords, integer
from ..methods.layer import why_not_adaptable
from ..methods.shared import shared_by, spread, tie, tie_within
from ..methods.state import refuse_wrong
from .calibration import inputs_of, needed
from .patterns import check_layers, own_keywords
from .refusals import refuse_peft, refuse_wrapped, require_not_fsdp
from .saving import forget_saving, watch_saving
from .targets import (
    Patterns,
    check_patterns,
    fitted,
    match_saved,
    match_targets,
    modules_by_name,
    named_modules,
    replace_modules,
)
from .ties import note_untied, refuse_views, tied_layers
from .unchanged import unchanged_on_error
from .whole_modules import (
    base_in_place,
    base_of,
    forget,
    keep,
    keep_loaded,
    put_back,
    saved_modules,
)

LEAVE = "; exclude_modules leaves a layer out, modules_to_save trains it whole"
Plan = dict[str, tuple[type[LowRankLinear], dict[str, Any]]]  # module → its class and keywords


def adapt(
    model: nn.Module,
    method: str = "lora_xs",
    *,
    target_modules: Patterns,
    exclude_modules: Patterns | None = None,
    modules_to_save: list[str] | tuple[str, ...] | None = None,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: list[str] | str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    fused: bool = True,
    progress: bool = True,
    defer_bases: bool = False,
    data: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    **method_keywords: Any,
) -> nn.Module:
    """Replace linear layers of `model` by adapted ones and freeze everything else, in place.

    Args:
        model: any module; it keeps its class.
        method: "lora", "lora_xs", "lora_mini", or another of `fused_lowrank.methods.METHODS`; or
            "dora", which is "lora" with dora=True.
        target_modules: a list of module names or of their last parts; or a regular expression that
            must match whole names; or "all-linear": every linear layer but the output layer (what
            model.get_output_embeddings() returns or, without such a method, the last nn.Linear),
            routers of experts, layers of one output, those with a forward of their own and those
            whose weights the model reads; ranks are taken down to what a layer has room for. One
            warning says what is left out, and one which ranks are lower.
        exclude_modules: names, or a regular expression, of modules to leave alone.
        modules_to_save: names of modules to train whole, such as a new head; they are saved with
            the adapter. What is tied to them is trained with them, and known by their places they
            may be resized or replaced.
        layers_to_transform: the numbers of the layers to adapt, of the modules that a list of
            target_modules names by their last parts.
        layers_pattern: the name of the nn.ModuleList that these count; None: any.
        rank_pattern: other r, {"q_proj": 32, "layers.0.mlp.*": 8} say: a regular expression
            must match a name whole or its end from a dot on, and the first that does counts.
        alpha_pattern: other alpha, likewise.
        use_rslora: scale = alpha / √r, which a layer has as an alpha of alpha · √r.
        fused: the fused layers, or their plain references.
        progress: show a progress bar and, at the end, what is trained, on stderr.
        defer_bases: leave the factors uninitialised, for a model on the meta device; call
            `init_bases` when its weights are there.
        data: batches of inputs to the model, for an init that needs them; see `calibrate`. For
            "loftq" what was quantised; see `originals`.
        forward_fn: calls the model with a batch; None: model(**batch), or model(*batch).
        method_keywords: for the layers: r, alpha, dropout, rank_dropout, train, dtype; init; svd
            (LoRA-XS); a, b (LoRA-Mini); d_initial, b_initial, seed (VeRA); n (MELoRA); m, seed
            (NOLA); dora. `methods.initial.values` says what an init is.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown method; a model that PEFT has adapted; a pattern that matches
            nothing; a layer that is not there; a rank that does not fit a layer; a weight on the
            meta device, or with NaN or Inf under LoRA-XS; a module whose replacement would never be
            called; a tensor that would be trained and is a view of another.
        TypeError: a target that is no linear layer (`compute.base` has those that are); a keyword
            that the method does not know; a method or patterns that are no strings.

    Whatever is raised, the model is as it was. A UserWarning each says in which layers nothing
    would be learned, what is trained in 16 bits, and which pattern decides nothing.
    """
    method, method_keywords = named(method, method_keywords)
    if any(True for _ in adapted_layers(model)):
        raise ValueError("the model is adapted already: unload(model) first")
    refuse_peft(model)
    cls = METHODS[method][fused]
    check_keywords(cls, method_keywords)
    for rank in cls.row.ranks.keys() & method_keywords.keys():
        method_keywords[rank] = integer(rank, method_keywords[rank])
    need = needed(cls, method_keywords, data, defer_bases)
    check_patterns("target_modules", target_modules)
    check_patterns("exclude_modules", exclude_modules or ())
    if isinstance(modules_to_save, str):
        raise TypeError(f"modules_to_save is {modules_to_save!r}: it must be a list of names")
    check_patterns("modules_to_save", modules_to_save or ())
    saved = match_saved(model, modules_to_save or ())
    within = check_layers(target_modules, layers_to_transform, layers_pattern)
    targets = match_targets(model, target_modules, exclude_modules, saved, within)
    own = own_keywords(targets, cls, method_keywords, rank_pattern, alpha_pattern, use_rslora)
    if target_modules == "all-linear":
        own = fitted(model, own, cls.row)
    plan: Plan = {name: (cls, keywords) for name, keywords in own.items()}
    with unchanged_on_error(model):
        gather = partial(inputs_of, model, plan, need, data, forward_fn, progress)
        layers = build(model, plan, gather, progress=progress, defer_bases=defer_bases, hint=LEAVE)
        refuse_views(model, saved, layers)
        place(model, layers, saved)
        warn_of_nothing_learned(layers, stacklevel=3)
        factors = {id(factor) for layer in layers.values() for factor in layer.trained_factors}
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        warn_of_narrow(((name, p) for name, p in trained if id(p) not in factors), stacklevel=3)
    if progress:
        print(describe(model), file=sys.stderr)
    return model


def build(
    model: nn.Module,
    plan: Plan,
    gather: Callable[[], Mapping[str, Inputs]] = dict,
    *,
    progress: bool,
    defer_bases: bool,
    hint: str = "",
) -> dict[str, LowRankLinear]:
    """The adapted layers of a plan, by name, not yet in the model; all checks come first, then
    `gather` says what is known of the layers' inputs.
    """
    refuse_wrapped(model)
    modules = modules_by_name(model)
    for name, (cls, keywords) in plan.items():
        linear = modules[name]
        if reason := why_not_adaptable(linear, defer_bases):
            raise (ValueError if "meta device" in reason else TypeError)(f"{name} {reason}")
        try:  # on the meta device: all the checks, none of the work
            trial = cls(*sides_of(linear), **{**keywords, "device": "meta"})
        except ValueError as error:
            raise ValueError(f"{name}: {error}{hint}") from None
        if reason := clashes(linear, trial):
            raise TypeError(f"{name} {reason}")
    first, given = next(iter(plan.values()))
    shared = shared_by(first.row, [modules[name] for name in plan], given, defer_bases)
    own = {"_shared": shared} if shared else {}
    layers, inputs = {}, gather()
    bar = tqdm(plan.items(), first.method, disable=not progress, unit="layer")
    for name, (cls, keywords) in bar:
        try:  # what is known of one layer's inputs is gone before the next one's is there
            more = own if name not in inputs else {**own, "_inputs": inputs[name]}
            layers[name] = cls._around(modules[name], defer_bases, keywords, more)
            del more
        except ValueError as error:
            raise ValueError(f"{name}: {error}{hint}") from None
    return layers


def place(model: nn.Module, layers: dict[str, LowRankLinear], saved: list[str]) -> None:
    """Put built layers in their places and freeze everything but them and the modules to save."""
    own = {id(getattr(m, name)) for m in layers.values() for name in m.train_names}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    modules = modules_by_name(model)
    replace_modules(model, {id(modules[name]): layer for name, layer in layers.items()})
    copies: dict[Tensor, Tensor] = {}  # of each parameter one, whoever has it
    for layer in layers.values():
        layer.share_base(copies)
        watch_gradients(layer.trained_factors)
    keep(model, saved, copies)
    leave_fast_paths(model, LowRankLinear)
    model.register_load_state_dict_pre_hook(refuse_wrong_within)
    if any(layer.row.shared for layer in layers.values()):
        model.register_load_state_dict_post_hook(tie_within)
    watch_saving(model)


# --- the whole model's adapters ---


def refuse_wrong_within(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """A `load_state_dict` pre-hook of whole models: it refuses before anything is loaded."""
    for name, layer in module.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(layer, LowRankLinear):
            refuse_wrong(layer, state, f"{name}." if name else "")
    spread(dict(adapted_layers(module)), state, prefix)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """(name, layer) of every adapted layer."""
    for name, module in named_modules(model):
        if isinstance(module, LowRankLinear):
            yield name, module


def require_adapted(model: nn.Module) -> dict[str, LowRankLinear]:
    """The adapted layers by name; raises ValueError if there are none."""
    layers = dict(adapted_layers(model))
    if not layers:
        what = "adapt(model, …) first"
        if hasattr(model, "peft_config"):
            what = (
                "it is a model of PEFT, which saves, merges and unloads itself; for a bank of "
                "LoRA-XS or LoRA-Mini save_pretrained(folder), load_adapter(plain_model, folder)"
            )
        raise ValueError(f"the model has no adapted layers: {what}")
    return layers


def init_bases(model: nn.Module, *, progress: bool = True) -> nn.Module:
    """Initialise the factors of layers that were made before their weights were there.

    For models built on the meta device: build, `adapt(..., defer_bases=True)` if it is not built of
    adapted layers, `to_empty`, load the weights, then this. Layers that are initialised are left as
    they are. Returns the model.

    Raises ValueError if there are no adapted layers, if a weight is still on the meta device, or if
    LoRA-XS is to take its factors from one with NaN or Inf.
    """
    pending = {name: m for name, m in require_adapted(model).items() if m.bases_pending}
    for name, layer in pending.items():
        if layer.base_weight.is_meta:
            raise ValueError(f"{name}.weight is still on the meta device: load the weights first")
        try:
            check_rows(layer.row, layer.base_weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    tie(pending.values())
    for name, layer in tqdm(pending.items(), "init_bases", disable=not progress, unit="layer"):
        try:
            layer.init_factors()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        layer.keep_base()
    keep_loaded(model)
    warn_of_nothing_learned(pending, stacklevel=3)
    return model


def require_known_base(layers: dict[str, LowRankLinear], what: str) -> None:
    """Raise RuntimeError if what was trained of a weight or a bias cannot be given back."""
    if lost := [name for name, layer in layers.items() if layer.base_lost]:
        raise RuntimeError(
            f"cannot {what}: weight or bias of {', '.join(lost)} came, as trained, by a state_dict "
            "onto the meta device, and what they were before is not known. Load the base model's "
            "weights first, then init_bases(model), then the state_dict"
        )


def unload(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Take the adapted layers out, in place: plain nn.Linear with the original weights again.

    With merge=True their weights are W + ΔW instead, modules trained whole keep what they have
    learned, and the config of a transformers model says so if its embeddings are tied no more. What
    is frozen stays frozen. Returns the model.

    Raises ValueError where there are no adapted layers, where a bank of the layers is open, and
    where the inside of a module trained whole was replaced by something of another size, and what
    it was is not known; with merge=True as `merge` does. The model is then as it was.
    """
    layers = require_adapted(model)
    for layer in layers.values():
        if layer.computed_by is not None:
            layer.computed_by.refuse_leaving("unload")
    require_not_fsdp(model, "unload")
    if merge:
        merge_layers(layers, model)
    else:
        require_known_base(layers, "unload")
        base = base_of(model)
        base.check(3)
        unmerge(model)
        put_back(base)
    replace_modules(model, {id(layer): layer.to_linear() for layer in layers.values()})
    if merge:
        note_untied(model)
    forget(model)
    restore_fast_paths(model)
    forget_saving(model)
    for module in model.modules():
        hooks: dict[int, Any] = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if hook.hook is refuse_wrong_within]:
            del hooks[key]
        after: dict[int, Any] = module._load_state_dict_post_hooks
        for key in [key for key, hook in after.items() if hook is tie_within]:
            del after[key]
    return model


def merge(model: nn.Module) -> nn.Module:
    """Make every adapted layer's weight W + ΔW, in new storage; `unmerge` undoes it.

    Returns the model.

    One UserWarning says how much of ΔW was lost to rounding, where the weights are below float32,
    and another which weights were tied to others: those others keep W.

    Raises ValueError if the weight of a layer that is not called is read instead, for merged it
    would act where it did not; one that is merged by its own `merge` before is left as it is. Also
    if an adapter holds NaN or Inf, or a sum is more than its dtype can hold. The model is then as
    it was.
    """
    merge_layers(require_adapted(model), model)
    return model


def merge_layers(layers: dict[str, LowRankLinear], model: nn.Module) -> None:
    """Merge, with one warning for all."""
    require_not_fsdp(model, "merge")
    refuse_passed_over(layers)
    for name, layer in layers.items():
        if reason := layer.why_not_merged():
            raise TypeError(f"cannot merge into {name}, which {reason}")
    tied = tied_layers(layers, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lost = merged_whole(layers)
    if tied:
        warnings.warn(
            f"the weights of {', '.join(tied)} were tied to others, which keep their values: "
            "they are tied no longer while merged",
            stacklevel=3,
        )
    worst = max(lost, key=lost.__getitem__)
    if lost[worst]:
        warnings.warn(
            f"merging lost up to {lost[worst]:.2%} of ΔW to rounding (in {worst}); "
            f"{layers[worst].how_to_keep()}",
            stacklevel=3,
        )


def merged_whole(layers: dict[str, LowRankLinear]) -> dict[str, float]:
    """Merge all layers or, if one cannot be, none: what each lost to rounding."""
    lost, fresh = {}, [layer for layer in layers.values() if not layer.merged]
    try:
        for name, layer in layers.items():
            try:
                lost[name] = layer.merge()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    except BaseException:
        for layer in fresh:
            layer.unmerge()
        raise
    return lost


def unmerge(model: nn.Module) -> nn.Module:
    """Put back every weight as it was before `merge`, bit for bit; return the model.

    A layer that is not merged is left as it is. Raises ValueError if there are no adapted layers.
    """
    for layer in require_adapted(model).values():
        layer.unmerge()
    return model


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which the model is as before `adapt`: the reference model of DPO, say.

    That holds for calls of the same thread or asyncio task. Modules that are trained whole, and
    graphs of torch.compile outside a bank, are disabled for all of the process. Of a vocabulary
    that was resized since, the new tokens have the mean of the others; a UserWarning says so.
    Raises ValueError as `unload` does.
    """
    layers = require_adapted(model)
    require_known_base(layers, "disable adapters")
    if saved_modules(model):
        require_not_fsdp(model, "disable modules trained whole")
    # FSDP has its own in the places of parameters; there the layers see to theirs.
    base = nullcontext() if sharder_in(model) else base_in_place(model)
    with disabled(list(layers.values())), base:
        yield model


def describe(model: nn.Module) -> str:
    """The parameters that are trained, of how many, and a learning rate to start from."""
    layers = require_adapted(model)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    first = next(iter(layers.values()))
    return (
        f"{first.row.label}: {len(layers)} layers adapted; {trained:,} of {total:,} parameters "
        f"trained ({trained / total:.3%}); "
        f"a learning rate to start from (AdamW): {first.learning_rate:g}"
    )
