"""`megatron-lpr train`: post-pretraining, review, or a baseline."""

import argparse
import functools

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import add_recipe, typed_recipe
from megatron_lpr.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--ranks", metavar="N", type=int, help="with --dry-run: check a run of this many ranks")


def run(options: argparse.Namespace) -> None:
    """Run a training recipe; resumes where an earlier run stopped."""
    from megatron_lpr.api import plan, train
    from megatron_lpr.checkpoint.completion import complete_saves
    from megatron_lpr.platform import Ranks, together

    recipe = together(functools.partial(typed_recipe, options))
    ranks = Ranks.from_environment()
    if not options.dry_run:
        completed = together(lambda: complete_saves(recipe.output) if ranks.rank == 0 else [])
        for name in completed:
            print(f"completed {name} of {recipe.output}: a crash came when all of it was written", flush=True)
    planned = plan(recipe, world_size=_ranks(options, ranks.world_size))
    if ranks.rank == 0:
        print(planned, flush=True)
    if not options.dry_run:
        train(planned)


def _ranks(options: argparse.Namespace, there: int) -> int:
    if options.ranks is None:
        return there
    if not options.dry_run:
        raise UserError(f"--ranks {options.ranks}: only with --dry-run; a run's ranks are started by torchrun or srun")
    if options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: at least 1")
    return options.ranks


COMMAND = Command(
    "train",
    "post-pretraining, review, or a baseline, as the recipe says; resumes by itself",
    add_arguments,
    run,
    reads=(
        *("name", "output", "model", "data", "train", "parallel", "fp8", "balance", "lpr", "optimizer", "checkpoint"),
        *("logging", "cluster", "evaluation", "preprocess.bos", "preprocess.parse_special_tokens"),
    ),
    place=6,
    distributed=True,
    resumes=True,
)
