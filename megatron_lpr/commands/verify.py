"""`megatron-lpr verify`: an export against its base model and its checkpoint, or a checkpoint against its checksums."""

import argparse
from pathlib import Path

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import (
    add_graft_delta,
    add_own_recipe,
    found_checkpoint,
    recipe_of,
    refuse_file,
    refuse_unread,
    typed_recipe,
    with_base,
)
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import Recipe

SPELLING = (
    "the export comes first and a checkpoint brings its recipe, "
    "as verify EXPORT [--checkpoint CHECKPOINT | --base BASE] [--recipe RECIPE]"
)
READS = (
    "model.base",
    "model.load",
    "model.spec",
    "evaluation.corpora",
    "evaluation.on_bad_line",
    "checkpoint.verify",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "folder that `export` wrote; or a checkpoint or the output folder of a run, for a look at its files alone"
    parser.add_argument("export", metavar="EXPORT", help=what)
    parser.add_argument("--checkpoint", help="compare every tensor and logits with this checkpoint too")
    parser.add_argument(
        "--no-logits", dest="logits", action="store_false", help="with --checkpoint: tensors only, without Megatron"
    )
    frozen = "frozen experts of an export that neither a record, nor --checkpoint or --recipe tells of (default: 1)"
    parser.add_argument("--num-frozen", metavar="N", type=int, help=frozen)
    add_graft_delta(parser, "the two models whose difference the export has, as it was made with")
    add_own_recipe(parser)


def run(options: argparse.Namespace) -> None:
    """Check an export: its files, names and frozen tensors against the base; tensors and logits against a checkpoint.
    Or a checkpoint: every file against the checksum that was taken when it was written.

    What is frozen and how tokens are routed is the checkpoint's record or the export's, not what a recipe says.
    """
    from megatron_lpr.checkpoint.verification import is_checkpoint
    from megatron_lpr.conversion.verify.verification import plan_verification

    refuse_file(options.export, SPELLING)
    if is_checkpoint(Path(options.export)):
        _verify_checkpoint(options)
        return
    _refuse_what_has_no_effect(options)
    planned = plan_verification(
        options.export,
        checkpoint=options.checkpoint,
        base=options.base,
        recipe=typed_recipe(with_base(options)) if options.recipe else None,
        own=_own_recipe(options),
        logits=options.logits,
        graft_delta=options.graft_delta,
        num_frozen=options.num_frozen,
    )
    if options.dry_run:
        checkpoint = f" and {planned.checkpoint}" if planned.checkpoint else ""
        print(f"would verify {options.export} against {planned.base_dir}{checkpoint}")
        return
    report = planned.run(lambda check: print(check, flush=True), progress=True)
    if planned.checkpoint and not planned.text:
        why = "no Megatron model has the delta that was grafted on" if options.graft_delta else "--no-logits"
        print(f"      logits         not compared: {why}")
    if not report.ok:
        raise UserError(f"verify {options.export}: failed (see above)")


def _verify_checkpoint(options: argparse.Namespace) -> None:
    from megatron_lpr.checkpoint.verification import faults_of_all

    given = ("checkpoint", "base", "recipe", "set", "num_frozen", "graft_delta")
    for name in (name for name in given if getattr(options, name) not in (None, [])):
        raise UserError(f"--{name.replace('_', '-')}: has no effect on {options.export}, which is no export")
    if not options.logits:
        raise UserError(f"--no-logits: has no effect on {options.export}, which is no export")
    if options.dry_run:
        print(f"would verify {options.export} against its checksums")
        return
    damaged = faults_of_all(Path(options.export), lambda line: print(line, flush=True))
    if damaged:
        raise UserError(
            f"verify {options.export}: {damaged} damaged (see above); copy it again, or use another checkpoint"
        )


def _own_recipe(options: argparse.Namespace) -> Recipe | None:
    if not options.checkpoint or options.recipe:
        return None
    return recipe_of(found_checkpoint(options.checkpoint, SPELLING), options, READS)


def _refuse_what_has_no_effect(options: argparse.Namespace) -> None:
    if not options.checkpoint and not options.logits:
        raise UserError("--no-logits: logits are compared with --checkpoint only")
    if options.num_frozen is not None and (options.checkpoint or options.recipe):
        raise UserError(f"--num-frozen {options.num_frozen}: has no effect beside --checkpoint or --recipe")
    if options.set and not (options.checkpoint or options.recipe):
        raise UserError(f"--set {options.set[0]}: has no effect without --checkpoint or --recipe")
    refuse_unread(options.set, READS)


COMMAND = Command(
    "verify",
    "check an export against the base model and its checkpoint, or a checkpoint against its checksums",
    add_arguments,
    run,
    reads=READS,
    place=12,
    spelling=SPELLING,
)
