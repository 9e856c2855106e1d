"""`megatron-lpr status`: how runs do."""

import argparse
import dataclasses
import json
from collections.abc import Iterator

from megatron_lpr.commands.command import Command
from megatron_lpr.errors import UserError
from megatron_lpr.files.json_lines import without_controls
from megatron_lpr.training.run_status import RunStatus, run_status
from megatron_lpr.training.status_rows import status_rows, steps_done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument("--json", action="store_true", help="print a JSON list, an object for each run")


def run(options: argparse.Namespace) -> None:
    """Print how runs do; one that cannot be read is told after the others."""
    found: list[RunStatus] = []
    errors: list[UserError] = []
    for folder in options.runs:
        try:
            found.append(run_status(folder))
        except UserError as error:
            errors.append(error)
    if options.json:
        print(json.dumps([dataclasses.asdict(status) for status in found], indent=1, ensure_ascii=False))
    elif found:
        print(without_controls("\n\n".join("\n".join(_lines(status)) for status in found)))
    if errors:
        raise UserError("; ".join(map(str, errors)))


def _lines(status: RunStatus) -> Iterator[str]:
    name = f" ({status.name})" if status.name else ""
    yield f"{status.run}{name}: {status.state}, step {steps_done(status)}"
    yield from (f"  {label:12} {value}" for label, value in status_rows(status).items())


COMMAND = Command(
    "status",
    "how runs do, from their files: state, step, ETA, losses, last checkpoint",
    add_arguments,
    run,
    place=7,
)
