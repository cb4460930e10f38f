"""Every language model of transformers that builds small from its config, adapted in both ways.

    python tests/support/sweep.py [KIND or NAME …]    a line a model and way, then a table of them

Of each: all that is trained gets a gradient where the weights it is added to would, what is merged
computes what is adapted, what is saved and loaded does too, and `generate` for two tenants gives
what it gives each alone. The exit code is 1 if any went WRONG, else 0.
"""

import copy
import multiprocessing
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sweep_models import logits, names, ready
from torch import Tensor, nn

SECONDS = 90  # for a model in one way
OUTCOMES = ("right", "refused", "WRONG", "not built")
# What is refused as it is meant: the classes, the ways, and what the error must say. X-MOD sorts
# its rows by language in some layers, and RWKV, generating, adds (B, K) to (B, 1, K), so that its
# layers have B·B rows: mixed batches are refused there.
CONV1D = "are transformers' Conv1D, which have adapters through PEFT alone"
REFUSALS = [
    (("GPT2", "OpenAIGPT"), ("adapt",), CONV1D),
    (("Xmod", "Rwkv"), ("adapt", "PEFT"), "which rows are whose is not known"),
]


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """The model, all that is trained random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) / 4
    return model


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal but for rounding, which models that compute in float32 inside magnify."""
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error < (2e-4 if actual.dtype == torch.float64 else 2e-3):
        raise AssertionError(f"{what}: off by {error:.1e}")


def close_apart(y: Tensor, base: Tensor) -> None:
    """The adapter does something."""
    if not (y - base).abs().max() > 1e-3 * base.abs().max():
        raise AssertionError("the adapter does nothing")


# --- gradients ---


def backward(model: Any, inputs: dict[str, Tensor]) -> None:
    """Of the loss in training, or of the logits where the model has none."""
    model.train()
    if model.config.model_type == "reformer":  # its layers are reached by x alone
        model.enable_input_require_grads()
    torch.manual_seed(2)
    output = model(**inputs)
    loss = getattr(output, "loss", None)
    (output.logits.square().sum() if loss is None else loss).backward()
    model.eval()


def got(parameter: Tensor) -> bool:
    """Whether a gradient that is not zero has come."""
    return parameter.grad is not None and bool(parameter.grad.any())


def check_gradients(
    model: nn.Module, merged: nn.Module, layers: dict[str, nn.Module], inputs: dict[str, Tensor]
) -> str:
    """A layer's factors get a gradient if its weight in the merged model does, which computes the
    same; and where it is never called its base weight is not used. Says how many get none.
    """
    called: set[str] = set()
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, layer in layers.items()
    ]
    backward(model, inputs)
    for hook in hooks:
        hook.remove()
    backward(merged.requires_grad_(), inputs)
    weights = {name: merged.get_submodule(name).weight for name in layers}
    reached = {id(weight) for weight in weights.values() if got(weight)}  # one may be several's
    idle = []
    for name, layer in layers.items():
        factors = [own for own in layer.parameters() if own.requires_grad]
        if not factors:
            raise AssertionError(f"{name} has nothing to train")
        learning = [got(own) for own in factors]
        if any(learning) != (id(weights[name]) in reached) or any(learning) != all(learning):
            raise AssertionError(f"{name}: its weight would get a gradient, its factors do not")
        if not any(learning):
            idle.append(name)
    model.zero_grad()
    before = logits(merged, inputs)
    with torch.no_grad():
        for name in layers.keys() - called:
            weights[name].mul_(1.5)
    if not torch.equal(logits(merged, inputs), before):
        raise AssertionError(
            f"a layer that is not called is used: {sorted(layers.keys() - called)}"
        )
    return f"{len(idle)} of {len(layers)} layers not in use ({idle[0]}, …)" if idle else ""


# --- tenants ---


def generated(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """Four new tokens."""
    if model.config.is_encoder_decoder:
        more["decoder_start_token_id"] = 1
    with torch.no_grad():
        mask = torch.ones_like(ids)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, **more
        )


def generates(model: nn.Module, ids: Tensor) -> bool:
    """Whether the model generates at all, as small as it is."""
    try:
        generated(model, ids)
    except TimeoutError:
        raise
    except Exception:  # whatever a model of theirs raises
        return False
    return True


def check_tenants(
    kind: str,
    base: nn.Module,
    model: nn.Module,
    inputs: dict[str, Tensor],
    tenants: tuple[str, str],
    using: Callable[..., Any],
) -> str:
    """Two tenants in a batch have what each has alone, by generate; by logits where the base model
    has no generate that runs.
    """
    ids, inputs = inputs["input_ids"], {k: v for k, v in inputs.items() if k != "labels"}
    if kind == "masked" or not generates(base, ids):
        both = using(list(tenants), lambda **more: model(**inputs, **more).logits.detach())
        for i, name in enumerate(tenants):
            alone = using(
                [name],
                lambda i=i, **more: model(
                    **{k: v[i : i + 1] for k, v in inputs.items()}, **more
                ).logits.detach(),
            )
            close(both[i], alone[0], f"{name}'s row among two")
        return "logits"
    both = using(list(tenants), lambda **more: generated(model, ids, **more))
    for i, name in enumerate(tenants):
        alone = using([name], lambda i=i, **more: generated(model, ids[i : i + 1], **more))
        if not torch.equal(both[i], alone[0]):
            raise AssertionError(f"{name} generates something else among two")
    return "generate"


# --- the two ways ---


def native(kind: str, base: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    """By `adapt`."""
    from fused_lowrank import AdapterBank, adapt, load_adapter, merge, save_adapter, unmerge
    from fused_lowrank.methods.layer import LowRankLinear

    model = copy.deepcopy(base)
    adapt(model, "lora_xs", r=4, target_modules="all-linear", progress=False)
    randomised(model, 3)
    y = logits(model, inputs)
    close_apart(y, logits(base, inputs))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    merge(model)
    close(logits(model, inputs), y, "merged")
    plain = copy.deepcopy(base)
    for name, layer in layers.items():  # a weight that was tied to it keeps its values
        plain.get_submodule(name).weight = nn.Parameter(layer.weight.detach().clone())
    close(logits(plain, inputs), y, "the base model with the merged weights")
    unmerge(model)
    said = check_gradients(model, plain, layers, inputs)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "one")
        loaded = load_adapter(copy.deepcopy(base), Path(folder) / "one", progress=False)
        close(logits(loaded, inputs), y, "loaded")
        save_adapter(randomised(loaded, 4), Path(folder) / "two")
        bank = AdapterBank.from_model(model, slots=2)
        for name in ("one", "two"):
            bank.add(name, Path(folder) / name)

    def using(who: list[str], call: Callable[[], Tensor]) -> Tensor:
        with bank.use(who):
            return call()

    return [check_tenants(kind, base, model, inputs, ("one", "two"), using), said]


def by_peft(kind: str, base: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    """By the PEFT integration."""
    import peft

    from fused_lowrank.integrations.peft import LoraXSConfig
    from fused_lowrank.integrations.peft.layer import PeftLowRankLinear

    config = LoraXSConfig(r=4, target_modules="all-linear")
    model = randomised(peft.get_peft_model(copy.deepcopy(base), config, "one"), 3)
    model.eval()
    y = logits(model, inputs)
    close_apart(y, logits(base, inputs))
    found = model.base_model.model.named_modules()
    layers = {name: m for name, m in found if isinstance(m, PeftLowRankLinear)}
    plain = copy.deepcopy(model).merge_and_unload()
    close(logits(plain, inputs), y, "merged and unloaded")
    said = check_gradients(model, plain, layers, inputs)
    model.merge_adapter()
    close(logits(model, inputs), y, "merged")
    model.unmerge_adapter()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/one")
        close(logits(loaded.eval(), inputs), y, "loaded")
    model.add_adapter("two", config)
    model.set_adapter("two")
    randomised(model, 4).eval()

    def using(who: list[str], call: Callable[..., Tensor]) -> Tensor:
        return call(adapter_names=who)

    return [check_tenants(kind, base, model, inputs, ("one", "two"), using), said]


WAYS = {"adapt": native, "PEFT": by_peft}


# --- the run ---


def result_of(task: tuple[str, str, str]) -> tuple[str, str, str, str, str]:
    """(kind, class, way, what came of it, what it said)."""
    kind, cls, way = task

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    stage = "not built"
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            base, inputs = ready(cls)
            stage = "WRONG"
            said = WAYS[way](kind, base, inputs)
        if next(base.parameters()).dtype == torch.float32:
            said.append("float32")
        own = {str(w.message) for w in warned if "fused_lowrank" in w.filename or "r is" in str(w)}
        return *task, "right", "; ".join(filter(None, [*said, *sorted(own)]))
    except Exception as error:
        for classes, ways, said_so in REFUSALS:
            meant = cls.startswith(classes) and way in ways and isinstance(error, ValueError)
            if stage == "WRONG" and meant and said_so in str(error):
                stage = "refused"
        return *task, stage, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    finally:
        signal.alarm(0)


def table(counts: Counter[tuple[str, str, str]]) -> str:
    """How many of each outcome, by kind and way, in Markdown."""
    rows = [f"| heads | way | {' | '.join(OUTCOMES)} |", "|---|---|" + "---:|" * len(OUTCOMES)]
    for kind, way in dict.fromkeys((kind, way) for kind, way, _ in counts):
        cells = [str(counts[kind, way, what]) for what in OUTCOMES]
        rows.append(f"| {kind} | {way} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(asked: list[str]) -> int:
    """Run all, or the classes asked for; print what came of each, the table, and what is not built
    or refused, with why.
    """
    import peft  # noqa: F401  here, that the processes have them from the start
    import transformers
    import transformers.generation.utils

    import fused_lowrank.integrations.peft  # noqa: F401

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    tasks = [(*which, way) for which in names() for way in WAYS]
    tasks = [task for task in tasks if not asked or {task[0], task[1]} & {*asked}]
    counts: Counter[tuple[str, str, str]] = Counter()
    why: dict[tuple[str, str, str], list[str]] = {}
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=16) as pool:
        for kind, cls, way, what, said in pool.imap(result_of, tasks):
            print(f"{what:<10} {kind:<8} {way:<6} {cls}: {said}", flush=True)
            counts[kind, way, what] += 1
            if what != "right":
                why.setdefault((what, cls, said), []).append(way)
    for what in OUTCOMES[1:]:
        for (_, cls, said), ways in (item for item in why.items() if item[0][0] == what):
            print(f"\n{what}: {cls} ({', '.join(dict.fromkeys(ways))}): {said}", end="")
    print(f"\n\n{table(counts)}")
    return int(any(what == "WRONG" for _, _, what in counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
