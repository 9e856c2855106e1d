"""`megatron-lpr evaluate`: bits per byte on held-out text."""

import argparse
from pathlib import Path

from megatron_lpr.commands.command import Command
from megatron_lpr.commands.options import (
    add_gone,
    add_own_recipe,
    found_checkpoint,
    recipe_of,
    refuse_file,
    single_process,
    typed_recipe,
)
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.reading import REST
from megatron_lpr.recipe.settings import Recipe

SPELLING = (
    "the model comes first and a checkpoint brings its recipe, "
    "as evaluate MODEL --name NAME --out FILE [--recipe RECIPE]"
)
READS = ("model.base", "evaluation", "preprocess.bos", "preprocess.parse_special_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "checkpoint, output folder of a run, or folder of any Hugging Face causal model (needs --recipe)"
    parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument("--name", required=True, help="name of the model in the table")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSON file of the result")
    add_own_recipe(parser)
    for option in ("--checkpoint", "--hf"):
        add_gone(parser, option, SPELLING)


def run(options: argparse.Namespace) -> None:
    """Score a checkpoint or a Hugging Face model on the held-out corpora of a recipe."""
    refuse_file(options.model, SPELLING)
    if _is_hf(Path(options.model)):
        _run(options, _recipe_for_hf(options), checkpoint=None, hf=options.model)
    else:
        checkpoint = found_checkpoint(options.model, SPELLING)
        _run(options, recipe_of(checkpoint, options, READS), checkpoint=str(checkpoint), hf=None)


def _run(options: argparse.Namespace, recipe: Recipe, *, checkpoint: str | None, hf: str | None) -> None:
    from megatron_lpr.evaluation.evaluate import check, evaluate_model

    single_process("evaluate")
    out = Path(options.out)
    if options.dry_run:
        check(recipe, out=out, checkpoint=checkpoint, hf=hf)
        names = ", ".join(corpus.name for corpus in recipe.evaluation.corpora)
        print(f"would evaluate {checkpoint or hf} on {names} into {out}")
        return
    evaluate_model(recipe, name=options.name, out=out, checkpoint=checkpoint, hf=hf)


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "run.json").is_file()


def _recipe_for_hf(options: argparse.Namespace) -> Recipe:
    if options.base is not None:
        raise UserError(f"--base {options.base}: has no effect on {options.model}, which is no checkpoint")
    if options.recipe is None:
        raise UserError(f"{options.model} is a Hugging Face model: name the recipe of the held-out text with --recipe")
    return typed_recipe(options, under=REST)


COMMAND = Command(
    name="evaluate",
    about="bits per byte on held-out text",
    add_arguments=add_arguments,
    run=run,
    reads=(*READS, "model.dtype"),
    place=6,
    spelling=SPELLING,
)
