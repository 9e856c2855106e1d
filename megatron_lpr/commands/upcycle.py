"""`megatron-lpr upcycle`: the base model with experts, as a checkpoint or as a stock Hugging Face model."""

import argparse
import functools

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import add_recipe, typed_recipe, warn_of_unread
from megatron_lpr.errors import warn

HF_READS = ("model", "export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--hf", metavar="OUT", help="new folder: write a stock Hugging Face model, without Megatron")


def run(options: argparse.Namespace) -> None:
    """Write the upcycled model as a checkpoint (step 0), or as what an export of that checkpoint would be."""
    from megatron_lpr import api
    from megatron_lpr.platform import Ranks, together

    recipe = together(functools.partial(typed_recipe, options))
    api.upcycle(
        recipe,
        hf=options.hf,
        progress=True,
        command=options.command_line,
        dry_run=options.dry_run,
        on_verified=print,
    )
    if Ranks.from_environment().rank == 0 and recipe.model.load is not None:
        warn(f"model.load: {recipe.model.load} has no effect here: what is upcycled is model.base")
    if options.hf is not None:
        warn_of_unread(options.set, HF_READS)
        print(f"{'would write' if options.dry_run else 'wrote'} {options.hf}")


COMMAND = Command(
    "upcycle",
    "write the base model with experts, as a checkpoint in the recipe's output or as a Hugging Face model",
    add_arguments,
    run,
    reads=("output", "model", "parallel", "export"),
    place=5,
    distributed=True,
)
