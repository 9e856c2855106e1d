"""The command line: `megatron-lpr preprocess|upcycle|train|evaluate|compare|export|verify`."""

import argparse
import sys
from collections.abc import Sequence

from megatron_lpr import __version__
from megatron_lpr.data.options import add_options, take_tree
from megatron_lpr.errors import UserError
from megatron_lpr.recipe_io import describe, load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2: something the user can put right, told in one sentence)."""
    options = vars(_parser().parse_args(arguments))
    command, overrides = options.pop("command"), options.pop("set", [])
    try:
        from megatron_lpr import commands

        if "recipe" in options:
            under = take_tree(options) if command == "preprocess" else {}
            options["recipe"] = load_recipe(options["recipe"], overrides, under)
        getattr(commands, command.replace("-", "_"))(**options)
    except UserError as error:
        print(f"megatron-lpr {command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-lpr",
        description="Give a dense language model new languages without making it forget its own (MoE-LPR).",
        epilog="A distributed run is the same command under torchrun, or under srun in a Slurm script.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    preprocess = _add(commands, "preprocess", "tokenise text into Megatron .bin/.idx corpora and a manifest", "?")
    preprocess.add_argument("--overwrite", action="store_true", help="replace corpora that were made from other text")
    add_options(preprocess)
    _add(commands, "upcycle", "write the upcycled dense model as a checkpoint")
    _add(commands, "train", "post-pretraining, review, or a baseline, as the recipe says; resumes by itself")

    evaluate = _add(commands, "evaluate", "bits per byte on held-out text")
    evaluate.add_argument("--checkpoint", help="checkpoint, or output folder of a run")
    evaluate.add_argument("--hf", help="folder of any Hugging Face causal model (default: the base model)")
    evaluate.add_argument("--name", required=True, help="name of the model in the table")
    evaluate.add_argument("--out", required=True, help="JSON file of the result")

    compare = commands.add_parser("compare", help="table of several evaluation results, with retention")
    compare.add_argument("files", nargs="+", metavar="RESULT", help="JSON results; the base model's first")

    export = _add(commands, "export", "write a checkpoint as a stock Hugging Face model")
    export.add_argument("--checkpoint", required=True, help="checkpoint, or output folder of a run")
    export.add_argument("--out", required=True, help="new folder")

    verify = _add(commands, "verify", "check an export against the base model, and against its checkpoint")
    verify.add_argument("export_dir", metavar="EXPORT", help="folder that `export` wrote")
    verify.add_argument("--checkpoint", help="compare logits with this checkpoint too")
    return parser


def _add(commands, name: str, help_text: str, recipes: str | None = None) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog="settings of a recipe:\n" + "\n".join(describe()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs=recipes, help="YAML file; see the settings below")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, as optimizer.lr=1e-4"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, do nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
