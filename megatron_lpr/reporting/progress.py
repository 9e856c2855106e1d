"""The progress line: one plain line per step, made for terminals, files and Slurm logs alike."""

import sys
from collections import deque
from collections.abc import Mapping
from typing import TextIO

from megatron_lpr.reporting.metrics_log import StepMetrics


class Progress:
    """Prints a line per step; the ETA comes from the mean duration of the last `window` steps."""

    def __init__(self, stream: TextIO | None = None, *, window: int = 20):
        self._stream = stream or sys.stdout
        self._seconds: deque[float] = deque(maxlen=window)

    def report(self, metrics: StepMetrics) -> None:
        """Print the line of a step that has just ended."""
        self._seconds.append(metrics["seconds"])
        mean = sum(self._seconds) / len(self._seconds)
        print(progress_line(metrics, seconds_per_step=mean), file=self._stream, flush=True)


def progress_line(metrics: StepMetrics, *, seconds_per_step: float) -> str:
    """`moe  37% step  9/24  ntp 1.512 (hu 1.602 en 1.422)  lpr 1.003  gnorm 0.82  lr 4.9e-04  88 tok/s  hu 9.2k ...`"""
    step, steps = metrics["step"], metrics["steps"]
    seen = metrics["tokens_per_language"]
    losses = {"balance": metrics["balance_loss"], "lpr": metrics["lpr_loss"]}
    return "  ".join(
        [
            metrics["stage"],
            f"{100 * step // steps:3d}% step {step:{len(str(steps))}d}/{steps}",
            f"ntp {metrics['ntp_loss']:.3f}{_per_language(metrics.get('ntp_loss_per_language', {}))}",
            *(f"{name} {value:.3f}" for name, value in losses.items() if value is not None),
            f"gnorm {metrics['grad_norm']:.2f}",
            f"lr {metrics['lr']:.1e}",
            f"{metrics['tokens_per_second']:,.0f} tok/s",
            " ".join(f"{language} {_short(count)}" for language, count in seen.items()),
            f"ETA {_clock((steps - step) * seconds_per_step)}",
        ]
    )


def _per_language(losses: Mapping[str, float]) -> str:
    """Only where it says more than the mean and leaves the line readable."""
    if not 2 <= len(losses) <= 4:
        return ""
    return f" ({' '.join(f'{language} {loss:.3f}' for language, loss in losses.items())})"


def _short(count: int) -> str:
    """A count in at most four digits: 999, 9.2k, 138.0M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _clock(seconds: float) -> str:
    """2:41, 3:02:41, 5d 03:02:41."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{seconds:02d}"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
