"""How far something is: a line per training step on stdout, documents and bytes on stderr.

A terminal's line is rewritten; files and Slurm logs get a new one, every ten seconds where not every step has its own.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from megatron_lpr.files.json_lines import utc_now
from megatron_lpr.reporting.durations import clock
from megatron_lpr.reporting.metrics_log import StepMetrics, ValidationRecord

_MOST_LANGUAGES = 16  # whose tokens are in a line one by one
_TERMINAL_SECONDS, _LOG_SECONDS = 1.0, 10.0


class Progress:
    """Prints a line per step; the ETA comes from the mean duration of the last `window` steps, and from what has passed
    between steps since the first line, as with validations and checkpoints: of all of them, for few steps have any."""

    def __init__(self, stream: TextIO | None = None, *, window: int = 20):
        self._stream = stream or sys.stdout
        self._seconds: deque[float] = deque(maxlen=window)
        self._told_at: float | None = None  # the line before
        self._between, self._steps = 0.0, 0

    def report(self, metrics: StepMetrics) -> None:
        """Print the line of a step that has just ended."""
        now = time.monotonic()
        if self._told_at is not None:
            self._between += max(0.0, now - self._told_at - metrics["seconds"])
            self._steps += 1
        self._told_at = now
        self._seconds.append(metrics["seconds"])
        mean = sum(self._seconds) / len(self._seconds) + self._between / max(self._steps, 1)
        print(stamped(progress_line(metrics, seconds_per_step=mean)), file=self._stream, flush=True)


def stamped(line: str) -> str:
    """A line of a log with the time before it: UTC, ISO 8601, to the second."""
    return f"{utc_now()[:19]}Z  {line}"


def progress_line(metrics: StepMetrics, *, seconds_per_step: float) -> str:
    """`moe  37% step  9/24  ntp 1.512 (hu 1.602 en 1.422)  lpr 1.003  gnorm 0.82  lr 4.9e-04  88 tok/s ...`"""
    step, steps = metrics["step"], metrics["steps"]
    losses = {"balance": metrics["balance_loss"], "lpr": metrics["lpr_loss"]}
    return "  ".join(
        [
            metrics["stage"],
            f"{100 * step // steps:3d}% step {step:{len(str(steps))}d}/{steps}",
            *(["skipped"] if "skipped" in metrics else []),
            f"ntp {metrics['ntp_loss']:.3f}{_per_language(metrics.get('ntp_loss_per_language', {}))}",
            *(f"{name} {value:.3f}" for name, value in losses.items() if value is not None),
            *([f"held out {held_out(metrics['validation'])}"] if "validation" in metrics else []),
            f"gnorm {metrics['grad_norm']:.2f}",
            f"lr {metrics['lr']:.1e}",
            f"{metrics['tokens_per_second']:,.0f} tok/s",
            *([f"{metrics['tflops_per_device']:.3g} TFLOP/s"] if "tflops_per_device" in metrics else []),
            *([f"MFU {metrics['mfu']:.1%}"] if "mfu" in metrics else []),
            _read(metrics["tokens_per_language"]),
            f"ETA {clock((steps - step) * seconds_per_step)}",
        ]
    )


def held_out(validation: ValidationRecord) -> str:
    """`hu 1.021, en 0.981 (99.1% kept)`: bits per byte; of many languages their mean, and the least that was kept."""
    bits, kept = validation["bits_per_byte"], validation.get("retention", {})
    if len(bits) <= 4:
        marks = {language: f" ({percent:.1f}% kept)" for language, percent in kept.items()}
        return ", ".join(f"{language} {value:.3f}{marks.get(language, '')}" for language, value in bits.items())
    mean = f"mean {sum(bits.values()) / len(bits):.3f}"
    if not kept:
        return mean
    language, percent = min(kept.items(), key=lambda item: item[1])
    return f"{mean} (least kept {language} {percent:.1f}%)"


def _per_language(losses: Mapping[str, float]) -> str:
    """Only where it says more than the mean and leaves the line readable."""
    if not 2 <= len(losses) <= 4:
        return ""
    return f" ({' '.join(f'{language} {loss:.3f}' for language, loss in losses.items())})"


def _read(tokens: Mapping[str, int]) -> str:
    """Of each language; of many their sum, for every step writes a line."""
    if len(tokens) > _MOST_LANGUAGES:
        return f"{len(tokens):,} languages {_short(sum(tokens.values()))}"
    return " ".join(f"{language} {_short(count)}" for language, count in tokens.items())


def _short(count: int) -> str:
    """A count in at most four digits: 999, 9.2k, 138.0M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


class DocumentProgress:
    """Shows share done, documents, tokens, tokens per second and time left of preprocessing.

    What an earlier run did counts in the share, not in the rate or the time left.
    """

    def __init__(self, name: str):
        self._name = name
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._interval = _TERMINAL_SECONDS if self._terminal else _LOG_SECONDS
        self._next = self._start + self._interval
        self._line = ""
        self._kept = (0.0, 0)

    def keep(self, done: float, tokens: int) -> None:
        """Takes the share done and the tokens so far; all of them were there before."""
        self._kept = (done, tokens)

    def update(self, done: float, documents: int, tokens: int) -> None:
        """Takes the share done, in [0, 1], and the counts so far."""
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        kept, kept_tokens = self._kept
        left = 0.0 if done >= 1 else seconds * (1 - done) / (done - kept) if done > kept else float("inf")
        self._line = (
            f"{self._name}: {done:4.0%} | {documents:,} documents | {tokens:,} tokens | "
            f"{(tokens - kept_tokens) / seconds:,.0f} tokens/s | {_duration(left)} left"
        )
        if now >= self._next:
            self._show()
            self._next = now + self._interval

    def close(self) -> None:
        """Shows the last state."""
        if self._line:
            self._show()
            if self._terminal:
                sys.stderr.write("\n")

    def _show(self) -> None:
        sys.stderr.write(f"\r{self._line}\x1b[K" if self._terminal else f"{self._line}\n")
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "? s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min" if minutes >= 2 else f"{seconds:.0f} s"


@contextmanager
def byte_progress(name: str, total: int, *, show: bool) -> Iterator[tqdm]:
    """Share done, bytes, bytes per second, time left: a bar whose `update` takes bytes."""
    interval = 0.2 if sys.stderr.isatty() else _LOG_SECONDS
    with tqdm(
        total=total, desc=name, unit="B", unit_scale=True, disable=not show, mininterval=interval, dynamic_ncols=True
    ) as bar:
        yield bar
