"""fused-lowrank: what an adapter's file is, and other forms of it.

fused-lowrank inspect SOURCE
fused-lowrank convert SOURCE TARGET --to peft|peft-lora|peft-dora|fused
                      [--base FOLDER] [--class C] [--name NAME] [--on-other-base warn]
fused-lowrank merge SOURCE TARGET --base FOLDER [--class C] [--name NAME] [--on-other-base warn]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bank import file as bank_file
from ..methods import row_of
from ..models.adapt import require_adapted, unload
from ..models.targets import modules_by_name
from ..models.ties import tied_layers
from ..models.whole_modules import SLOTS
from . import adapter as adapter_file
from . import official, peft_folder
from .inspection import describe, kind_of
from .lora_export import export_lora, of_contents, write
from .other_base import WAYS, on_other_base
from .peft_export import export_peft, taken_by, write_own

# The base model's weights in whatever format, which the merged ones replace.
WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf)(\.index\.json)?"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0, or 1 for files that do not do. Usage exits with 2."""
    args = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say("warning", message)
        try:
            args.run(args)
        except (ValueError, OSError, RuntimeError) as error:
            say("error", error)
            return 1
    return 0


def say(what: str, message: object) -> None:
    """Print one line on stderr."""
    words = " ".join(str(message).split())
    words = words.replace("on_other_base='warn'", "--on-other-base warn")  # as it is called here
    print(f"fused-lowrank: {what}: {words}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    top = argparse.ArgumentParser("fused-lowrank", description="Adapters in files.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, what: str, example: str) -> argparse.ArgumentParser:
        own = commands.add_parser(
            name, help=what, description=f"{what}.", epilog=f"example: fused-lowrank {example}"
        )
        own.set_defaults(run=run)
        own.add_argument(
            "source",
            type=Path,
            help="a file of save_adapter or AdapterBank.save; a folder of PEFT's (LoRA-XS, "
            "LoRA-Mini) or of the LoRA-XS authors' code",
        )
        return own

    command("inspect", inspect, "say what an adapter's file or folder is", "inspect a.safetensors")
    both = (
        command(
            "convert",
            convert,
            "write an adapter in another form",
            "convert a.safetensors lora --to peft-lora",
        ),
        command(
            "merge",
            merge,
            "write the base model with the adapter merged into its weights",
            "merge a.safetensors merged --base llama",
        ),
    )
    both[0].add_argument(
        "--to",
        required=True,
        choices=("peft", "peft-lora", "peft-dora", "fused"),
        help="PEFT's own VeRA or AdaLoRA; or plain LoRA in PEFT's format, or of an adapter with "
        "dora PEFT's DoRA; or a file that load_adapter reads",
    )
    for own in both:
        own.add_argument("target", type=Path, help="what to write; must not exist")
        own.add_argument(
            "--base",
            type=Path,
            metavar="FOLDER",
            required=own is both[1],
            help="the base model, as transformers' save_pretrained writes it",
        )
        own.add_argument(
            "--class",
            dest="cls",
            metavar="NAME",
            help="the class of transformers that was adapted, if the base is of another",
        )
        own.add_argument(
            "--on-other-base",
            choices=WAYS,
            default=WAYS[0],
            help="whether another base than the adapter's, further trained say, is an error or a "
            "warning",
        )
        own.add_argument("--name", help="which adapter, where the source is a bank's file")
    return top


# --- the commands ---


def inspect(args: argparse.Namespace) -> None:
    """Print what a source is."""
    for name, value in describe(args.source):
        print(f"{name:<10} {value}")


def convert(args: argparse.Namespace) -> None:
    """Write a source in another form, without its base model where that is possible."""
    kind = convertible(args)
    if args.base is not None:
        model = adapted(args, kind)
        if args.to == "fused":
            adapter_file.save_adapter(model, args.target)
        elif args.to == "peft":
            export_peft(model, args.target)
        else:
            export_lora(model, args.target, dora=args.to == "peft-dora")
        return
    if args.to == "fused":
        raise ValueError("--to fused needs --base: the file is to know its base model's weights")
    config, tensors = contents(args, kind)
    for name, entry in config["layers"].items():
        row = row_of(entry)
        for factor in row.factors:
            if row.key(name, factor) not in tensors:
                raise ValueError(
                    f"{args.source} has no {name}.{factor}: to compute its frozen factors give its "
                    "base model by --base"
                )
    adapter_file.pop_fingerprints(config, tensors)
    if args.to == "peft":
        write_own(of_contents(config, tensors, args.source, taken_by({})), args.target)
    else:
        adapter = of_contents(config, tensors, args.source)
        write(adapter, args.target, None, args.to == "peft-dora")


def merge(args: argparse.Namespace) -> None:
    """Write a base model with W + ΔW for its weights, as save_pretrained does."""
    model = adapted(args, convertible(args))
    untied = unties(model)
    unload(model, merge=True)
    target = args.target
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(unfinished)  # type: ignore[operator]
        copy_rest(args.base, unfinished)
        if untied:
            check_untied(model, unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# --- their steps ---


def copy_rest(base: Path, target: Path) -> None:
    """Copy what a model's folder holds besides its weights, and `target` does not hold yet.

    That is the tokenizer, processors, modules of sentence-transformers, code, README and licence.
    Weights in folders are another model's, and are copied, where modules.json names these folders:
    else they are the same weights in another format.
    """
    listed = base / "modules.json"
    try:
        modules = json.loads(listed.read_text()) if listed.is_file() else []
        whole = {base / str(module["path"]) for module in modules} - {base}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{listed} cannot be read ({error!r})") from error
    for file in sorted(base.rglob("*")):
        inside = file.relative_to(base)
        place = target / inside
        left = any(part.startswith(".") for part in inside.parts) or target in file.parents
        weights = WEIGHTS.fullmatch(file.name) and whole.isdisjoint(file.parents)
        if file.is_file() and not (left or weights or place.exists()):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)


def convertible(args: argparse.Namespace) -> str:
    """The kind of the source; ValueError where it cannot be what was asked for."""
    kind = kind_of(args.source)
    if args.target.exists():
        raise ValueError(f"{args.target} exists already: remove it first, or write elsewhere")
    if kind == "lora":
        raise ValueError(
            f"{args.source} is plain LoRA already, which PEFT loads and merges; "
            "peft.PeftModel.from_pretrained and then fused_lowrank.integrations.peft.fuse_lora run "
            "it through the kernels here"
        )
    if kind == "bank" and args.name is None:
        names = bank_file.contents(args.source)[1]
        raise ValueError(f"{args.source} holds {len(names)} adapters: say which by --name")
    if kind != "bank" and args.name is not None:
        raise ValueError(f"{args.source} holds one adapter: leave --name out")
    return kind


def contents(args: argparse.Namespace, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The source's config and tensors, as `adapter_file.read` has them."""
    if kind == "bank":
        return bank_file.one(args.source, args.name)
    if kind == "official":
        return official.read(args.source)[:2]
    return (adapter_file if kind == "adapter" else peft_folder).read(args.source)


def adapted(args: argparse.Namespace, kind: str) -> nn.Module:
    """The base model with the source's adapter."""
    model = base_model(args.base, args.cls)
    config, tensors = contents(args, kind)
    modules = modules_by_name(model)
    if absent := [name for name in config["layers"] if name not in modules]:
        raise ValueError(
            f"{args.source} adapts {absent[0]}, but the base, a {type(model).__name__}, has no "
            "such module: if another class was adapted, name it by --class"
        )
    if kind == "official":
        return official.load_official_lora_xs(model, args.source)
    with on_other_base(args.on_other_base, args.source):
        return adapter_file.load_contents(model, config, tensors, args.source)


def unties(model: nn.Module) -> bool:
    """Whether merging leaves tensors apart that the base model ties."""
    apart = any(SLOTS in vars(module) for module in model.modules())
    return apart or bool(tied_layers(require_adapted(model), model))


def check_untied(model: nn.Module, folder: Path) -> None:
    """Raise unless a folder gives the very model that was written to it."""
    found, there = model.state_dict(), base_model(folder).state_dict()
    for name, tensor in found.items():
        if name not in there or not torch.equal(there[name].to(tensor), tensor):
            raise ValueError(
                f"{name} is tied to another tensor of the base model, and would be so again when "
                "the merged one is read: it cannot be merged into files of transformers"
            )


def base_model(folder: Path, cls: str | None = None) -> nn.Module:
    """The model in a folder, of the class that was saved or of another, in its own dtype."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--base needs transformers: pip install transformers") from None
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: --base must be a transformers model")
    if (folder / peft_folder.CONFIG).exists():
        raise ValueError(
            f"{folder} holds an adapter, which transformers would load with the model: --base must "
            "be the plain base model"
        )
    if cls is not None and not hasattr(transformers, cls):
        raise ValueError(f"--class is {cls}: transformers has no such class")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        cls = cls or (config.architectures or [""])[0]
        named = getattr(transformers, cls, transformers.AutoModel)
        return named.from_pretrained(folder, dtype="auto", local_files_only=True)
    except Exception as error:  # of any library: what is wrong is the folder
        raise ValueError(f"{folder} cannot be loaded by transformers: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
