"""`megatron-lpr export`: a checkpoint becomes a stock Hugging Face model."""

import argparse
import json

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import (
    add_graft_delta,
    add_own_recipe,
    found_checkpoint,
    recipe_of,
)
from megatron_lpr.errors import UserError

SPELLING = "the checkpoint comes first and brings its recipe, as export CHECKPOINT OUT [--recipe RECIPE]"
READS = ("model.base", "model.load", "export", "checkpoint.verify")
# options that stand for a setting of the section `export`
_SETTINGS = {
    "dtype": ("DTYPE", "dtype of the weights: auto (as trained), float32, bfloat16 or float16"),
    "max_shard_size": ("SIZE", "largest safetensors file, as 500MB or 4GB"),
    "results": ("JSON", "evaluations for the model card, the base's first"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint, or output folder of a run")
    parser.add_argument("out", metavar="OUT", help="new folder")
    for name, (metavar, what) in _SETTINGS.items():
        option, nargs = f"--{name.replace('_', '-')}", "+" if name == "results" else None
        parser.add_argument(option, nargs=nargs, metavar=metavar, help=f"{what} (export.{name})")
    add_graft_delta(parser, "add INSTRUCT - BASE (delta grafting)")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not check the folder first")
    add_own_recipe(parser)


def run(options: argparse.Namespace) -> None:
    """Write a checkpoint as a stock Hugging Face model that has been checked against the base model."""
    from megatron_lpr.conversion.export.export import export_checkpoint
    from megatron_lpr.platform import single_process

    single_process("export")
    source = found_checkpoint(options.checkpoint, SPELLING)
    given = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    for name in given:
        if both := next((override for override in options.set if override.startswith(f"export.{name}=")), None):
            raise UserError(f"--{name.replace('_', '-')}: is the setting of --set {both}; give one of the two")
    options.set += [f"export.{name}={json.dumps(value)}" for name, value in given.items()]
    recipe = recipe_of(source, options, READS)
    export_checkpoint(
        source,
        options.out,
        base_dir=recipe.model.base,
        load=recipe.model.load,
        settings=recipe.export,
        checksums=recipe.checkpoint.verify,
        graft_delta=options.graft_delta,
        on_verified=print if options.verify else None,
        command=options.command_line,
        progress=True,
        dry_run=options.dry_run,
    )
    done = "would export" if options.dry_run else "exported"
    print(f"{done} {source} to {options.out}" + ("" if options.verify else "; not verified"))


COMMAND = Command(
    "export",
    "write a checkpoint as a stock Hugging Face model",
    add_arguments,
    run,
    reads=READS,
    place=11,
    spelling=SPELLING,
)
