"""`megatron-lpr verify`: an export against its base model and its checkpoint."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import (
    add_graft_delta,
    add_own_recipe,
    found_checkpoint,
    recipe_of,
    refuse_file,
    single_process,
    typed_recipe,
    with_base,
)
from megatron_lpr.conversion.verify.report import Check
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import Recipe

if TYPE_CHECKING:  # imports torch
    from megatron_lpr.conversion.record import Made

SPELLING = (
    "the export comes first and a checkpoint brings its recipe, "
    "as verify EXPORT [--checkpoint CHECKPOINT | --base BASE] [--recipe RECIPE]"
)
READS = ("model.base", "evaluation.corpora", "evaluation.on_bad_line")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", metavar="EXPORT", help="folder that `export` wrote")
    parser.add_argument("--checkpoint", help="compare every tensor and logits with this checkpoint too")
    parser.add_argument(
        "--no-logits", dest="logits", action="store_false", help="with --checkpoint: tensors only, without Megatron"
    )
    frozen = "frozen experts of an export that neither a record, nor --checkpoint or --recipe tells of (default: 1)"
    parser.add_argument("--num-frozen", metavar="N", type=int, help=frozen)
    add_graft_delta(parser)
    add_own_recipe(parser)


def run(options: argparse.Namespace) -> None:
    """Check an export: its files, names and frozen tensors against the base; tensors and logits against a checkpoint.

    What is frozen and how tokens are routed is the checkpoint's record or the export's, not what a recipe says.
    """
    refuse_file(options.export, SPELLING)
    _refuse_what_has_no_effect(options)
    checks = _with_checkpoint(options) if options.checkpoint else _without(options)
    if not all(check.ok for check in checks):
        raise UserError(f"verify {options.export}: failed (see above)")


def _refuse_what_has_no_effect(options: argparse.Namespace) -> None:
    if not options.checkpoint and not options.logits:
        raise UserError("--no-logits: logits are compared with --checkpoint only")
    if options.num_frozen is not None and (options.checkpoint or options.recipe):
        raise UserError(f"--num-frozen {options.num_frozen}: has no effect beside --checkpoint or --recipe")
    if options.set and not (options.checkpoint or options.recipe):
        raise UserError(f"--set {options.set[0]}: has no effect without --checkpoint or --recipe")


def _without(options: argparse.Namespace) -> Sequence[Check]:
    """The checks without a checkpoint."""
    recipe = typed_recipe(with_base(options)) if options.recipe else None
    base = recipe.model.base if recipe else options.base or (options.graft_delta and options.graft_delta[0])
    if base is None:
        raise UserError(
            f"verify {options.export}: against what? Give --checkpoint CHECKPOINT, which knows its base model, or "
            "--base BASE"
        )
    return () if _is_dry(options, base) else _against_base(options, base, recipe=recipe)


def _with_checkpoint(options: argparse.Namespace) -> Sequence[Check]:
    """The same, and tensors and logits of the checkpoint."""
    from megatron_lpr.conversion.record import made_of
    from megatron_lpr.conversion.verify.against_checkpoint import compare_with_checkpoint
    from megatron_lpr.platform import distributed

    checkpoint = found_checkpoint(options.checkpoint, SPELLING)
    recipe = recipe_of(checkpoint, options, READS)
    base, graft_delta = recipe.model.base, options.graft_delta
    with_logits = options.logits and not graft_delta
    if with_logits:
        single_process("verify --checkpoint")
        if not recipe.evaluation.corpora:
            raise UserError(
                "evaluation.corpora: empty; comparing logits needs some held-out text (--recipe), or --no-logits"
            )
    if _is_dry(options, base, f" and {checkpoint}"):
        return ()
    made = made_of(checkpoint)
    checks = [*_against_base(options, base, recipe=recipe if options.recipe else None, checkpoint=made)]
    checks.append(compare_with_checkpoint(checkpoint, made, options.export, base, graft_delta=graft_delta))
    print(checks[-1], flush=True)
    if with_logits:
        with distributed.megatron():
            from megatron_lpr.conversion.verify.against_logits import compare_logits

            checks.append(compare_logits(recipe, str(checkpoint), options.export))
        print(checks[-1])
    else:
        why = "no Megatron model has the delta that was grafted on" if graft_delta else "--no-logits"
        print(f"      logits         not compared: {why}")
    return checks


def _is_dry(options: argparse.Namespace, base: str, more: str = "") -> bool:
    """For a dry run says what would be done."""
    from megatron_lpr.families import read_architecture
    from megatron_lpr.families.hf_config import read_config

    if options.dry_run:
        read_config(options.export), read_architecture(base)
        print(f"would verify {options.export} against {base}{more}")
    return options.dry_run


def _against_base(
    options: argparse.Namespace, base: str, *, recipe: Recipe | None, checkpoint: "Made | None" = None
) -> Sequence[Check]:
    from megatron_lpr.conversion.record import Made
    from megatron_lpr.conversion.verify.verify import verify_export

    grafted_on, hf_dir = options.graft_delta or (None, base)
    report = verify_export(
        options.export,
        hf_dir,
        checkpoint=checkpoint,
        recipe=Made.of_recipe(recipe) if recipe else None,
        num_frozen=options.num_frozen,
        grafted_on=grafted_on,
        progress=True,
    )
    print(report, flush=True)
    return report.checks


COMMAND = Command(
    name="verify",
    about="check an export against the base model, and against its checkpoint",
    add_arguments=add_arguments,
    run=run,
    reads=READS,
    place=9,
    spelling=SPELLING,
)
