"""`megatron-lpr evaluate`: bits per byte on held-out text."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import (
    add_own_recipe,
    found_checkpoint,
    recipe_of,
    refuse_unread,
    typed_recipe,
)
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.task_names import BENCHMARKS
from megatron_lpr.recipe.reading import REST
from megatron_lpr.recipe.settings import Recipe

if TYPE_CHECKING:
    from megatron_lpr.evaluation.evaluate import Evaluation

SPELLING = (
    "the model comes first and a checkpoint brings its recipe, "
    "as evaluate MODEL --name NAME --out FILE [--recipe RECIPE]"
)
READS = (
    "model.base",
    "model.load",
    "model.spec",
    "evaluation",
    "preprocess.bos",
    "preprocess.parse_special_tokens",
    "checkpoint.verify",
    "parallel",
)
HF_READS = ("model.dtype", "evaluation", "preprocess", "data.manifest")  # the last two tell what was trained on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "checkpoint, output folder of a run, or folder of any Hugging Face causal model (needs --recipe)"
    parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument("--name", required=True, help="name of the model in the table")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSON file of the result")
    what = f"benchmarks by lm-evaluation-harness in place of bits per byte, of an export: {','.join(BENCHMARKS)}"
    parser.add_argument("--tasks", metavar="NAME[,NAME...]", help=what)
    add_own_recipe(parser)


def run(options: argparse.Namespace) -> None:
    """Score a checkpoint or a Hugging Face model on the held-out corpora of a recipe."""
    from megatron_lpr.evaluation.evaluate import print_progress
    from megatron_lpr.platform import Ranks, together

    evaluation = together(lambda: _planned(options))
    if options.tasks is not None:
        _run_tasks(options, evaluation)
        return
    if options.dry_run:
        together(evaluation.check)
        names = ", ".join(corpus.name for corpus in evaluation.recipe.evaluation.corpora)
        told = f"would evaluate {evaluation.folder} on {names} into {options.out}"
    else:
        result = evaluation.run(options.name, print_progress)
        told = f"-> {options.out}"
        if Ranks.from_environment().rank == 0:
            print(result, flush=True)  # before it is written: a full disk loses no hours of scoring
            result.save(options.out)
    if Ranks.from_environment().rank == 0:
        print(told, flush=True)


def _run_tasks(options: argparse.Namespace, evaluation: "Evaluation") -> None:
    from megatron_lpr.evaluation.tasks import check_tasks, run_tasks, task_table

    if not evaluation.is_hf:
        raise UserError(
            f"--tasks: {options.model} is no Hugging Face model, as lm-evaluation-harness reads; give the folder that "
            "megatron-lpr export has written, and --recipe"
        )
    tasks = check_tasks(options.tasks.split(","), evaluation.recipe)
    if evaluation.dtype:
        print(f"dtype {evaluation.dtype}", flush=True)
    if options.dry_run:
        print(f"would evaluate {evaluation.folder} on {', '.join(task.name for task in tasks)} into {options.out}")
        return
    result = run_tasks(evaluation.folder, tasks, evaluation.recipe, options.name)
    result.save(options.out)
    print(f"{task_table([result])}\n-> {options.out}")


def _planned(options: argparse.Namespace) -> "Evaluation":
    from megatron_lpr.evaluation.evaluate import is_hf_model, plan_evaluation
    from megatron_lpr.files.output_place import check_file

    if is_hf_model(options.model):
        for override in options.set:
            if override.startswith("parallel."):
                raise UserError(
                    f"--set {override}: has no effect on {options.model}, a Hugging Face model; leave it out"
                )
        evaluation = plan_evaluation(options.model, _recipe_for_hf(options))
    else:
        checkpoint = found_checkpoint(options.model, SPELLING)  # said aloud once
        recipe = recipe_of(checkpoint, options, READS)
        _check_layout_has_effect(options.set)
        evaluation = plan_evaluation(checkpoint, recipe)
    check_file(options.out)
    return evaluation


def _check_layout_has_effect(overrides: Sequence[str]) -> None:
    from megatron_lpr.platform import Ranks

    for override in overrides:
        if override.startswith("parallel.") and Ranks.from_environment().world_size == 1:
            raise UserError(
                f"--set {override}: has no effect in one process, which has the whole model; start several with "
                "torchrun or srun, or leave it out"
            )


def _recipe_for_hf(options: argparse.Namespace) -> Recipe | None:
    if options.base is not None:
        raise UserError(f"--base {options.base}: has no effect on {options.model}, which is no checkpoint")
    refuse_unread(options.set, HF_READS)
    return typed_recipe(options, under=REST) if options.recipe else None


COMMAND = Command(
    "evaluate",
    "bits per byte on held-out text",
    add_arguments,
    run,
    reads=(*READS, "model.dtype"),
    place=8,
    spelling=SPELLING,
    distributed=True,
)
