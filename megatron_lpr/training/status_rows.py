"""What there is to say of how a run does, for people."""

from typing import cast

from megatron_lpr.reporting.durations import clock
from megatron_lpr.reporting.metrics_log import ValidationRecord
from megatron_lpr.reporting.progress import held_out
from megatron_lpr.training.run_status import LOSSES, RunStatus


def steps_done(status: RunStatus) -> str:
    """`9 of 24 (37%)`, or the steps alone where their number is not known."""
    return f"{status.step:,}" + (f" of {status.steps:,} ({100 * status.step // status.steps}%)" if status.steps else "")


def status_rows(status: RunStatus) -> dict[str, str]:
    """Under short labels; what is not known is left out."""
    found = {
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
        "log": f"lines near the end of metrics.jsonl left out: {status.damaged_lines:,}, no steps' records"
        if status.damaged_lines
        else None,
        "left out": "; ".join(status.faults),
        "slowest": status.slowest_rank
        and "rank {rank} ({host}), {max:.3g} s, median {median:.3g} s".format(**status.slowest_rank),
    }
    return {label: str(value) for label, value in found.items() if value}


def _losses(status: RunStatus) -> str | None:
    shown = [f"{key.removesuffix('_loss')} {status.losses[key]:.3f}" for key in LOSSES if key in status.losses]
    if shown and status.trend is not None:
        half = status.trend_steps // 2
        shown[0] += f" (mean of {half} step{'s' if half > 1 else ''}: {status.trend:+.3f} against the {half} before)"
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
