"""The command line: `megatron-lpr preprocess|verify-data|inspect-data|upcycle|train|evaluate|compare|export|verify`."""

import argparse
import contextlib
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence

from megatron_lpr import __version__
from megatron_lpr.errors import AlreadyTold, UserError
from megatron_lpr.platform.stopping import status_of
from megatron_lpr.preprocess_options import add_options, take_tree
from megatron_lpr.recipe.reading import describe, load_recipe

DISTRIBUTED = ("train", "upcycle")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2: what the user can put right, in one sentence; 130: Ctrl-C)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    return status_of(f"megatron-lpr {command}", lambda: _status(command, options, arguments))


def _status(command: str, options: dict, arguments: Sequence[str]) -> int:
    overrides = options.pop("set", [])
    if command == "export":
        overrides += [f"export.{name}={json.dumps(value)}" for name, value in export_settings(options).items()]
        options["command_line"] = shlex.join(["megatron-lpr", *arguments])
    try:
        with all_ranks(functools.partial(_report, command)) if command in DISTRIBUTED else contextlib.nullcontext():
            _run(command, options, overrides)
    except AlreadyTold:
        return 2
    except UserError as error:
        _report(command, error)
        return 2
    return 0


def _run(command: str, options: dict, overrides: list[str]) -> None:
    from megatron_lpr import commands
    from megatron_lpr.platform import together

    if "recipe" in options:
        under = take_tree(options) if command == "preprocess" else {}
        options["recipe"] = together(lambda: load_recipe(options["recipe"], overrides, under))
    getattr(commands, command.replace("-", "_"))(**options)


def all_ranks(report: Callable[[UserError], None]) -> contextlib.AbstractContextManager:
    """For a command that runs on several ranks: all of them stop when one does, and one reports why."""
    from megatron_lpr.platform import Ranks, meeting

    ranks = Ranks.from_environment()
    return meeting(ranks.rank, ranks.world_size, report)


def _report(command: str, error: UserError) -> None:
    print(f"megatron-lpr {command}: error: {error}", file=sys.stderr, flush=True)


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

    about = "compare every byte of the corpora with the digests in their manifest"
    verify_data = commands.add_parser("verify-data", help=about, description=f"{about.capitalize()}.")
    verify_data.add_argument("path", metavar="MANIFEST_OR_RECIPE", help="manifest.yaml, or a recipe that names it")
    verify_data.add_argument("--workers", type=int, default=0, help="files that are read at once (0: one per core)")
    verify_data.add_argument("--record", action="store_true", help="add checksums that an older manifest lacks")

    _add(commands, "upcycle", "write the upcycled dense model as a checkpoint")
    _add(commands, "train", "post-pretraining, review, or a baseline, as the recipe says; resumes by itself")

    inspect = _add(commands, "inspect-data", "show what a training recipe reads: tokens, epochs, share per language")
    inspect.add_argument("--steps", type=int, help="optimizer steps to look at (default: train.steps)")
    inspect.add_argument("--step", type=int, help="list the documents that this step reads instead, from 1 on")

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
    export_options(export)

    verify = _add(commands, "verify", "check an export against the base model, and against its checkpoint")
    verify.add_argument("export_dir", metavar="EXPORT", help="folder that `export` wrote")
    verify.add_argument("--checkpoint", help="compare every tensor and logits with this checkpoint too")
    verify.add_argument(
        "--no-logits", dest="logits", action="store_false", help="with --checkpoint: tensors only, without Megatron"
    )
    _add_graft_delta(verify)
    return parser


def export_options(parser: argparse.ArgumentParser) -> None:
    """What `export` can be told beside its recipe."""
    for name, metavar, help_text in (
        ("dtype", "DTYPE", "dtype of the weights: auto (as trained), float32, bfloat16 or float16"),
        ("max-shard-size", "SIZE", "largest safetensors file, as 500MB or 4GB"),
    ):
        parser.add_argument(f"--{name}", metavar=metavar, help=f"{help_text} (export.{name.replace('-', '_')})")
    parser.add_argument(
        "--results", nargs="+", metavar="JSON", help="evaluations for the model card, the base's first (export.results)"
    )
    _add_graft_delta(parser)
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not check the folder first")


def _add_graft_delta(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--graft-delta", nargs=2, metavar=("BASE", "INSTRUCT"), help="add INSTRUCT - BASE (delta grafting)"
    )


def export_settings(options: dict) -> dict:
    """Takes the settings of a recipe's `export` section out of parsed options, those that were given."""
    names = ("dtype", "max_shard_size", "results")
    return {name: value for name in names if (value := options.pop(name, None)) is not None}


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
