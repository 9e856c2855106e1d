"""`megatron-lpr compare`: a table of evaluation results."""

import argparse

from megatron_lpr.commands.command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="RESULT", help="JSON results; the base model's first")


def run(options: argparse.Namespace) -> None:
    """Print the table of several evaluation results, the base model's first."""
    from megatron_lpr.evaluation.compare import comparison

    print(comparison(options.files))


COMMAND = Command("compare", "table of several evaluation results, with retention", add_arguments, run, place=9)
