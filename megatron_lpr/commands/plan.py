"""`megatron-lpr plan`: what a recipe needs of so many GPUs, and the layouts that fit."""

import argparse
import json

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import add_recipe, typed_recipe, warn_of_unread
from megatron_lpr.errors import UserError

READS = ("model", "data", "train", "parallel", "fp8", "balance", "lpr", "checkpoint.whole")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--gpus", metavar="N", type=int, required=True, help="GPUs of the run: one rank each")
    parser.add_argument("--gpu", metavar="NAME", default="h100", help="which: a100, h100 (default), h200, b200")
    parser.add_argument("--memory", metavar="GB", type=float, help="of each, where it has not as much as that one")
    parser.add_argument(
        "--rehearse", action="store_true", help="build a rank on this machine too, with a step and without its memory"
    )
    parser.add_argument("--rank", metavar="R", type=int, help="the rank that is rehearsed; default: the fullest")
    parser.add_argument("--json", action="store_true", help="print an object in bytes and seconds, for programs")


def run(options: argparse.Namespace) -> None:
    """Print the plan of a training recipe; of the base model its config.json is read, and nothing is written."""
    from megatron_lpr.planning.rehearsed import rehearsed
    from megatron_lpr.planning.report import text, tree
    from megatron_lpr.planning.run_plan import plan_run

    if options.rank is not None and not options.rehearse:
        raise UserError(f"--rank {options.rank}: without effect; add --rehearse")
    if options.rehearse and options.json:
        raise UserError("--rehearse --json: a rehearsal is printed for people only; give one of the two")
    warn_of_unread(options.set, READS)
    plan = plan_run(typed_recipe(options), options.gpus, options.gpu, gigabytes=options.memory)
    print(json.dumps(tree(plan), indent=2) if options.json else text(plan), flush=True)
    if options.rehearse:
        print(f"\n{rehearsed(plan, options.rank)}")


COMMAND = Command(
    "plan",
    "what a training recipe needs of so many GPUs, and the layouts that fit; needs no GPU, weights or corpora",
    add_arguments,
    run,
    reads=READS,
    place=4,
)
