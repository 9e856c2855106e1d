"""`megatron-lpr inspect-data`: what a training recipe reads."""

import argparse

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import add_recipe, typed_recipe, warn_of_unread
from megatron_lpr.errors import UserError

READS = ("data", "train.steps", "train.global_batch_size", "train.seed", "model.base", "preprocess.tokenizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--steps", metavar="N", type=int, help="optimizer steps to look at (default: train.steps)")
    parser.add_argument("--step", metavar="N", type=int, help="list the documents that this step reads, from 1 on")


def run(options: argparse.Namespace) -> None:
    """Print the data plan of a training recipe, or the documents of one step; writes nothing, dry or not."""
    from megatron_lpr.data.sampler.inspect_data import data_plan, step_documents

    if options.step is not None and options.steps is not None:
        raise UserError(f"--steps {options.steps}: has no effect beside --step {options.step}; give one of the two")
    warn_of_unread(options.set, READS)
    recipe = typed_recipe(options)
    print(data_plan(recipe, options.steps) if options.step is None else step_documents(recipe, options.step))


COMMAND = Command(
    "inspect-data",
    "show what a training recipe reads: tokens, epochs, share per language",
    add_arguments,
    run,
    reads=READS,
    place=3,
)
