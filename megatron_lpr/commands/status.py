"""`megatron-lpr status`: how runs do."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import cast

from megatron_lpr.commands.command import Command
from megatron_lpr.errors import UserError
from megatron_lpr.reporting.durations import clock
from megatron_lpr.reporting.metrics_log import ValidationRecord
from megatron_lpr.reporting.progress import held_out
from megatron_lpr.training.run_status import LOSSES, RunStatus, run_status


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
        print("\n\n".join("\n".join(_lines(status)) for status in found))
    if errors:
        raise UserError("; ".join(map(str, errors)))


def _lines(status: RunStatus) -> Iterator[str]:
    of_steps = f" of {status.steps:,} ({100 * status.step // status.steps}%)" if status.steps else ""
    name = f" ({status.name})" if status.name else ""
    yield f"{status.run}{name}: {status.state}, step {status.step:,}{of_steps}"
    rows = {
        "reason": status.reason,
        "ETA": None if status.eta_seconds is None else clock(status.eta_seconds),
        "losses": _losses(status),
        "held out": status.validation
        and f"{held_out(cast(ValidationRecord, status.validation))}, after step {status.validation['step']:,}",
        "speed": _speed(status),
        "checkpoint": _checkpoint(status),
        "last record": status.last_record and f"{status.last_record}, {clock(status.last_record_age_seconds or 0)} ago",
        "held by": status.held_by and ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in status.held_by.items()),
        "skipped": f"{status.skipped_steps:,} steps" if status.skipped_steps else None,
        "slowest": status.slowest_rank
        and "rank {rank} ({host}), {max:.3g} s, median {median:.3g} s".format(**status.slowest_rank),
    }
    yield from (f"  {label:12} {value}" for label, value in rows.items() if value)


def _losses(status: RunStatus) -> str | None:
    shown = [f"{key.removesuffix('_loss')} {status.losses[key]:.3f}" for key in LOSSES if key in status.losses]
    if shown and status.trend is not None:
        shown[0] += f" ({status.trend:+.3f} over {status.trend_steps} steps)"
    return ", ".join(shown) or None


def _speed(status: RunStatus) -> str | None:
    parts = [
        f"{status.tokens_per_second:,.0f} tok/s" if status.tokens_per_second else None,
        f"{status.tflops_per_device:.3g} TFLOP/s a device" if status.tflops_per_device else None,
        f"MFU {status.mfu:.1%}" if status.mfu else None,
        f"{status.seconds_per_step:.3g} s a step" if status.seconds_per_step else None,
    ]
    return ", ".join(part for part in parts if part) or None


def _checkpoint(status: RunStatus) -> str:
    if status.checkpoint is None:
        return status.checkpoint_fault or "none yet"
    fault = f"; {status.checkpoint_fault}" if status.checkpoint_fault else ""
    return f"step {status.checkpoint_step:,}, {clock(status.checkpoint_age_seconds or 0)} old{fault}"


COMMAND = Command(
    "status",
    "how runs do, from their files: state, step, ETA, losses, last checkpoint",
    add_arguments,
    run,
    place=5,
)
